"""Routers and their losses against their definitions, written densely and with loops in float64; balanced assignment
against scipy's exact one."""

import json
import math
from collections import Counter

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck
from typer.testing import CliRunner

import effzoo
from effzoo import routing
from effzoo.cli import app
from effzoo.errors import InputError, OptionError, UnknownNameError
from effzoo.registry import ENTRY_POINT_GROUP
from effzoo.routing import Router, Routing

DIM, EXPERTS = 6, 5
OF_TOKENS = ("base", "expert_choice", "gumbel", "soft", "switch", "top_k", "uniform")
exact = {"atol": 1e-12, "rtol": 1e-12}


def tokens(n=13, dim=DIM):
    return torch.randn(n, dim, dtype=torch.float64)


def make(spec, experts=EXPERTS, training=False, dim=DIM):
    router = routing.create(spec, dim, experts).double().train(training)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def p_of(router, x):
    """softmax(x W^T) by loops."""
    rows = []
    for token in x:
        powers = [math.exp(float(token @ row)) for row in router.scores.weight.detach()]
        rows.append([power / sum(powers) for power in powers])
    return torch.tensor(rows, dtype=torch.float64)


def squared_cv(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


# ---- the contract ----


def test_the_registry_knows_the_routers():
    assert routing.names() == [
        "arrow",
        "base",
        "expert_choice",
        "fixed",
        "gumbel",
        "skills",
        "soft",
        "switch",
        "top_k",
        "uniform",
    ]
    # Fedus et al. 2021, section 2.2; the z-loss is of later models
    assert {option.name: option.default for option in routing.options("switch")} == {
        "capacity": 1.25, "balance": 0.01, "z": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("experts", [1, 2, EXPERTS])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3, 13])
def test_every_router_sends_as_its_contract_says(name, experts, training, n):
    router = make("top_k[k=1]" if name == "top_k" else name, experts, training)
    found = router(tokens(n))
    assert found.weights.shape == found.sent.shape == found.probabilities.shape == (n, experts)
    assert found.sent.dtype == torch.bool and not bool(found.weights[~found.sent].abs().sum())
    torch.testing.assert_close(found.probabilities.sum(dim=-1), torch.ones(n, dtype=torch.float64), **exact)
    assert not router.dense or bool(found.sent.all())
    if found.loss is not None:
        assert training and router.weighted and found.loss.ndim == 0
    assert bool(training and router.weighted and n) == (found.loss is not None)
    assert int(found.dropped) == sum(not any(row) for row in found.sent.tolist())


@pytest.mark.parametrize("name", OF_TOKENS)
def test_evaluation_is_deterministic_and_a_token_alone_is_routed_as_among_others(name):
    router, x = make(name), tokens()
    first, second = router(x), router(x)
    assert torch.equal(first.weights, second.weights) and torch.equal(first.sent, second.sent)
    assert router.alone == (name != "expert_choice")
    single = torch.cat([router(token[None]).weights for token in x])
    reverse = router(x.flip(0)).weights.flip(0)
    torch.testing.assert_close(reverse, first.weights, **exact)  # of a set of tokens the order does not matter to any
    if router.alone:
        torch.testing.assert_close(single, first.weights, **exact)
    else:
        assert not torch.equal(single != 0, first.sent)


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name != "uniform"])
def test_tokens_and_scores_get_a_gradient_in_training(name):
    router, x = make(name, training=True), tokens().requires_grad_()
    found = router(x)
    (found.weights * torch.randn_like(found.weights)).sum().backward()
    for tensor in (x, router.scores.weight):
        assert bool(tensor.grad.isfinite().all()) and bool((tensor.grad != 0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_computed_in_float32_or_better(dtype):
    scores, x = routing.Scores(DIM, EXPERTS).to(dtype), tokens().to(dtype)
    expected = x.float() @ scores.weight.float().T
    assert torch.equal(scores(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores(x), expected)


def test_unknown_names_and_options_say_what_is_accepted():
    with pytest.raises(UnknownNameError, match="unknown router 'swich'; did you mean 'switch'"):
        routing.create("swich", DIM, EXPERTS)
    for spec, said in [
        ("switch[capasity=1]", "did you mean 'capacity'"), ("switch[capacity=0]", "capacity is above 0, got 0"),
        ("switch[balance=-1]", "0 or more"), ("top_k[k=6]", "k is between 1 and the number of experts, 5, got 6"),
        ("top_k[k=0]", "got 0"),
        ("gumbel[form=hard]", "'softmax' or 'sigmoid'"), ("gumbel[temperature=0]", "above 0"),
        ("skills", "needs the option 'tasks'"), ("skills[tasks=0]", "at least 1"),
        ("skills[tasks=2, form=firm]", "'soft' or 'hard'"), ("expert_choice[capacity=-1]", "above 0"),
        ("soft[temperature=-1]", "above 0"),
    ]:  # fmt: skip
        with pytest.raises(OptionError, match=said):
            routing.create(spec, DIM, EXPERTS)
    with pytest.raises(OptionError, match="at least one expert, got 0"):
        routing.create("switch", DIM, 0)
    with pytest.raises(OptionError, match="is 'softmax' or 'sigmoid', got 'hard'"):  # without the registry too
        routing.mixtures.Gumbel(DIM, EXPERTS, form="hard")


# ---- top_k: Shazeer et al. 2017 ----


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_top_k_is_the_softmax_over_the_k_largest_scores(k):
    router, x = make(f"top_k[k={k}]"), tokens()
    found = router(x)
    scores = (x @ router.scores.weight.T).tolist()
    for t, row in enumerate(scores):
        kept = sorted(range(EXPERTS), key=row.__getitem__)[-k:]
        total = sum(math.exp(row[i]) for i in kept)
        for i in range(EXPERTS):
            assert bool(found.sent[t, i]) == (i in kept)
            assert float(found.weights[t, i].detach()) == pytest.approx(
                math.exp(row[i]) / total if i in kept else 0.0, abs=1e-12
            )
    torch.testing.assert_close(found.probabilities, p_of(router, x), **exact)


def test_top_k_in_training_adds_normal_noise_times_softplus_and_its_losses():
    router, x = make("top_k[k=2, importance=0.3, load=0.7]", training=True), tokens()
    torch.manual_seed(7)
    with torch.no_grad():
        found = router(x)
    torch.manual_seed(7)
    drawn = torch.randn(len(x), EXPERTS, dtype=torch.float64)
    clean = (x @ router.scores.weight.T).tolist()
    width = [[math.log1p(math.exp(value)) for value in row] for row in (x @ router.noise.weight.T).tolist()]
    h = [[clean[t][i] + float(drawn[t, i]) * width[t][i] for i in range(EXPERTS)] for t in range(len(x))]
    importance, load = [0.0] * EXPERTS, [0.0] * EXPERTS
    for t, row in enumerate(h):
        kept = sorted(range(EXPERTS), key=row.__getitem__)[-2:]
        total = sum(math.exp(row[i]) for i in kept)
        for i in range(EXPERTS):
            weight = math.exp(row[i]) / total if i in kept else 0.0
            assert float(found.weights[t, i]) == pytest.approx(weight, abs=1e-12)
            importance[i] += weight
            kth_excluding = sorted((row[j] for j in range(EXPERTS) if j != i), reverse=True)[1]
            load[i] += phi((clean[t][i] - kth_excluding) / width[t][i])
    assert float(found.loss) == pytest.approx(0.3 * squared_cv(importance) + 0.7 * squared_cv(load), rel=1e-12)


def test_the_load_is_the_probability_to_be_kept_when_the_noise_on_one_expert_is_drawn_again():
    clean, width = torch.randn(1, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64) + 0.5
    noisy = clean + torch.randn(1, 4, dtype=torch.float64) * width
    shares = []
    for i in range(4):
        again = noisy.expand(200_000, 4).clone()
        again[:, i] = clean[0, i] + torch.randn(200_000, dtype=torch.float64) * width[0, i]
        shares.append(float((again.topk(2, dim=-1).indices == i).any(dim=-1).double().mean()))
    # drawn 200,000 times
    assert float(routing.load_loss(clean, noisy, width, 2)) == pytest.approx(squared_cv(shares), rel=0.02)


def test_losses_of_top_k_are_zero_when_experts_are_used_alike():
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert float(routing.importance_loss(even)) == pytest.approx(0, abs=1e-15)
    # one of four has all: n - 1
    assert float(routing.importance_loss(torch.eye(4, dtype=torch.float64)[:1])) == pytest.approx(3)
    rolled = torch.stack([torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64).roll(i) for i in range(4)])
    assert float(routing.load_loss(rolled, rolled, torch.ones_like(rolled), 2)) == pytest.approx(0, abs=1e-15)


def test_gradients_of_the_losses():
    clean = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    width = (torch.rand(7, 4, dtype=torch.float64) + 0.5).requires_grad_()
    drawn = torch.randn(7, 4, dtype=torch.float64)
    assert gradcheck(lambda c, w: routing.load_loss(c, c + drawn * w, w, 2), (clean, width))
    assert gradcheck(lambda c: routing.importance_loss(c.softmax(dim=-1)), (clean,))
    chosen = torch.nn.functional.one_hot(torch.arange(7) % 4, 4).bool()
    assert gradcheck(lambda c: routing.switch_loss(c.softmax(dim=-1), chosen), (clean,))
    assert gradcheck(routing.z_loss, (clean,))


def test_noise_that_has_vanished_leaves_the_gradient_finite():
    clean = torch.randn(7, 4, requires_grad=True)
    width = torch.zeros(7, 4, requires_grad=True)
    routing.load_loss(clean, clean + 0.0, width, 2).backward()
    assert bool(clean.grad.isfinite().all()) and bool(width.grad.isfinite().all())


# ---- switch: Fedus et al. 2021 ----


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.25, 10.0])
def test_switch_drops_the_tokens_that_come_last_to_a_full_expert(capacity):
    router, x = make(f"switch[capacity={capacity}]", training=True), tokens(29)
    found, p = router(x), p_of(router, x)
    room, dropped = math.ceil(capacity * 29 / EXPERTS), 0
    taken = Counter()
    for t, row in enumerate(p.tolist()):
        best = max(range(EXPERTS), key=row.__getitem__)
        taken[best] += 1
        goes = taken[best] <= room
        dropped += not goes
        assert found.sent[t].tolist() == [goes and i == best for i in range(EXPERTS)]
        assert found.weights[t].tolist() == pytest.approx(
            [row[i] if goes and i == best else 0.0 for i in range(EXPERTS)], abs=1e-12
        )
    assert int(found.dropped) == dropped and (dropped > 0 or capacity > 1)
    assert routing.usage(found).dropped == dropped / 29
    assert int(router.eval()(x).dropped) == 0


def test_a_capacity_is_not_raised_by_rounding():
    assert 1.1 * 50 / 5 > 11  # in floating point
    assert (
        routing.router.places(1.1, 50, 5) == 11
        and routing.router.places(1.25, 10, 4) == 4
        and routing.router.places(0.1, 3, 8) == 1
    )


def test_switch_adds_the_balancing_loss_and_the_z_loss():
    router, x = make("switch[balance=0.5, z=0.25]", training=True), tokens(29)
    p = p_of(router, x).tolist()
    f = Counter(max(range(EXPERTS), key=row.__getitem__) for row in p)
    balance = EXPERTS * sum(f[i] / 29 * sum(row[i] for row in p) / 29 for i in range(EXPERTS))
    z = (
        sum(math.log(sum(math.exp(float(token @ row)) for row in router.scores.weight.detach())) ** 2 for token in x)
        / 29
    )
    assert float(router(x).loss.detach()) == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-12)


def test_the_balancing_loss_is_one_where_experts_are_used_alike_and_more_elsewhere():
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    chosen = torch.eye(4, dtype=torch.bool).repeat(2, 1)
    assert float(routing.switch_loss(uniform, chosen)) == 1.0
    one = torch.zeros(8, 4, dtype=torch.float64)
    one[:, 2] = 1
    assert float(routing.switch_loss(one, one.bool())) == 4.0
    for _ in range(20):  # f = P: N sum P_i^2 >= 1
        p = torch.rand(4, dtype=torch.float64).softmax(dim=0)
        assert 4 * float(p.square().sum()) >= 1


# ---- balance by rule ----


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.0, 9.0])
def test_expert_choice_takes_the_likeliest_tokens_of_each_expert(capacity):
    router, x = make(f"expert_choice[capacity={capacity}]"), tokens()
    found, p = router(x), p_of(router, x)
    count = min(13, math.ceil(capacity * 13 / EXPERTS))
    for i in range(EXPERTS):
        column = p[:, i].tolist()
        taken = sorted(range(13), key=column.__getitem__)[-count:]
        assert found.weights[:, i].tolist() == pytest.approx(
            [column[t] if t in taken else 0.0 for t in range(13)], abs=1e-12
        )


def test_base_assigns_equal_shares_in_training_and_the_best_expert_in_evaluation():
    router, x = make("base", experts=4, training=True), tokens(14)
    scores = x @ router.scores.weight.T
    found = router(x)
    assert sorted(found.sent.sum(dim=0).tolist()) == [3, 3, 4, 4] and found.sent.sum(dim=1).tolist() == [1] * 14
    torch.testing.assert_close(found.weights, torch.where(found.sent, 1 / (1 + torch.exp(-scores)), 0.0), **exact)
    assert router.eval()(x).sent.int().argmax(dim=1).tolist() == [
        max(range(4), key=row.__getitem__) for row in scores.tolist()
    ]


def best_total(scores):
    """The largest sum, by scipy on one column for each place at an expert."""
    n, experts = scores.shape
    columns = [i for i in range(experts) for _ in range(n // experts + (i < n % experts))]
    repeated = scores.double()[:, columns].numpy()
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].sum())


def drawn(kind, n, experts):
    draw = torch.Generator().manual_seed(n + experts)
    normal = torch.randn(n, experts, generator=draw, dtype=torch.float64)
    centres = torch.randn(4, experts, generator=draw, dtype=torch.float64)[torch.randint(4, (n,), generator=draw)]
    return {
        "random": normal,
        "clustered": centres + 1e-5 * normal,
        "duplicates": centres,
        "integers": torch.randint(-3, 4, (n, experts), generator=draw).double(),
        "lopsided": normal + 10 * torch.arange(experts),
        "heavy tails": normal**9,
        "equal": torch.ones(n, experts, dtype=torch.float64),
    }[kind]


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates", "integers", "lopsided", "heavy tails", "equal"])
@pytest.mark.parametrize(("n", "experts"), [(1, 1), (7, 1), (2, 5), (1, 3), (16, 4), (37, 6), (64, 64), (203, 8)])
def test_assignment_has_the_largest_sum_and_equal_shares(kind, n, experts):
    scores = drawn(kind, n, experts)
    chosen = routing.assign(scores)
    assert [int((chosen == i).sum()) for i in range(experts)] == [
        n // experts + (i < n % experts) for i in range(experts)
    ]
    total, best = float(scores.gather(1, chosen[:, None]).sum()), best_total(scores)
    if kind in ("integers", "equal"):
        assert total == best
    assert total == pytest.approx(best, rel=1e-12, abs=1e-12 * float(scores.abs().max()) * n)


def test_assignment_of_a_batch_is_the_best_too():
    for kind in ("random", "clustered", "integers"):
        scores = drawn(kind, 1024, 8).float()
        chosen = routing.assign(scores)
        assert torch.bincount(chosen).tolist() == [128] * 8 and chosen.dtype == torch.long
        assert float(scores.double().gather(1, chosen[:, None]).sum()) == pytest.approx(best_total(scores), rel=1e-12)


def test_assignment_refuses_scores_that_are_not_finite():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="not finite"):
            routing.assign(torch.tensor([[0.0, value], [1.0, 2.0]]))
    assert routing.assign(torch.empty(0, 3)).shape == (0,)


# ---- mixtures ----


def test_uniform_and_soft_see_every_expert():
    x = tokens()
    assert torch.equal(make("uniform")(x).weights, torch.full((13, EXPERTS), 1 / EXPERTS, dtype=torch.float64))
    router = make("soft[temperature=0.5]")
    scores = x @ router.scores.weight.T
    powers = [[math.exp(2 * value) for value in row] for row in scores.tolist()]
    torch.testing.assert_close(
        router(x).weights, torch.tensor([[v / sum(row) for v in row] for row in powers], dtype=torch.float64), **exact
    )


def gumbel_parts(scores, form, temperature, seed):
    """The choice and its relaxation with the noise of this seed, from their definitions."""
    torch.manual_seed(seed)
    if form == "softmax":
        relaxed = ((scores - torch.empty_like(scores).exponential_().log()) / temperature).softmax(dim=-1)
        chosen = torch.nn.functional.one_hot(relaxed.argmax(dim=-1), scores.shape[-1]).double()
        return chosen, relaxed
    u = torch.rand_like(scores)
    p = 1 / (1 + torch.exp(-(scores + u.log() - (1 - u).log()) / temperature))
    on = (p > 0.5) | (p == p.max(dim=-1, keepdim=True).values) & ~(p > 0.5).any(dim=-1, keepdim=True)
    return on.double() / on.sum(dim=-1, keepdim=True), p / p.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_gumbel_is_a_hard_choice_with_the_gradient_of_its_relaxation(form):
    router, x = make(f"gumbel[form={form}, temperature=0.7]", training=True), tokens(40)
    out = torch.randn(40, EXPERTS, dtype=torch.float64)
    choice, relaxed = gumbel_parts(x @ router.scores.weight.T, form, 0.7, seed=3)
    torch.manual_seed(3)
    found = router(x)
    # to the bit: a one-hot row is one-hot
    assert torch.equal(found.weights, choice) and torch.equal(found.sent, choice > 0)
    torch.testing.assert_close(found.probabilities, relaxed, **exact)
    (expected,) = torch.autograd.grad((relaxed * out).sum(), router.scores.weight)
    (grad,) = torch.autograd.grad((found.weights * out).sum(), router.scores.weight)
    torch.testing.assert_close(grad, expected, **exact)
    assert form == "softmax" or len(set(found.sent.sum(dim=-1).tolist())) > 1
    scores = x @ router.scores.weight.T
    wanted = (
        (scores == scores.max(dim=-1, keepdim=True).values)
        if form == "softmax"
        else (scores > 0) | (scores == scores.amax(-1, keepdim=True))
    )
    assert torch.equal(router.eval()(x).sent, wanted)  # without noise


def test_gumbel_draws_experts_as_often_as_their_probability_says():
    router = make("gumbel", experts=3, training=True)
    x = tokens(1).expand(60_000, DIM)
    shares = router(x).weights.mean(dim=0)
    # five standard deviations of 60,000 draws
    torch.testing.assert_close(shares, p_of(router, x[:1])[0], atol=0.01, rtol=0)


# ---- by task ----


def test_fixed_sends_task_t_to_expert_t():
    found = make("fixed")(torch.tensor([3, 0, 4], dtype=torch.int32))
    assert (
        found.weights.tolist() == [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
        and found.sent.tolist() == found.weights.bool().tolist()
    )
    for wrong in ([5], [-1, 2], [0.5]):
        with pytest.raises(
            InputError, match=r"task_ids are integers from 0 to 4, one for each of the 5 experts, got \["
        ):
            make("fixed")(torch.tensor(wrong))


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_skills_share_a_task_among_its_skills(form):
    router, tasks = make(f"skills[tasks=3, form={form}, temperature=0.8]"), torch.tensor([2, 0, 2, 1])
    found = router(tasks)
    for row, task in zip(found.weights.tolist(), tasks.tolist(), strict=True):
        p = [1 / (1 + math.exp(-value / 0.8)) for value in router.table[task].tolist()]
        on = p if form == "soft" else [float(value > 0.5 or value == max(p)) for value in p]
        assert row == pytest.approx([value / sum(on) for value in on], abs=1e-12)
    router.train()
    choice, relaxed = gumbel_parts(router.table[tasks], "sigmoid", 0.8, seed=5)
    torch.manual_seed(5)
    torch.testing.assert_close(router(tasks).weights, relaxed if form == "soft" else choice, **exact)
    assert router.dense == (form == "soft") and router.reads == "tasks"
    with pytest.raises(InputError, match="from 0 to 2, one for each of the 3 tasks of the table"):
        router(torch.tensor([3]))


def test_skills_start_as_all_for_all():
    router = routing.create("skills[tasks=3]", DIM, 4).eval()
    torch.testing.assert_close(router(torch.arange(3)).weights, torch.full((3, 4), 0.25), atol=1e-3, rtol=0)


# ---- usage ----


def hand(weights, sent=None, probabilities=None):
    weights = torch.tensor(weights, dtype=torch.float64)
    return Routing(
        weights,
        weights > 0 if sent is None else torch.tensor(sent),
        weights if probabilities is None else torch.tensor(probabilities),
    )


def test_usage_of_a_routing_by_hand():
    probabilities = [[0.25] * 4, [1.0, 0, 0, 0]] * 2
    found = routing.usage(
        hand([[0.5, 0, 0, 0], [0, 0.25, 0, 0], [0, 0.25, 0, 0], [0, 0, 0, 0]], probabilities=probabilities), "here"
    )
    assert found.router == "here" and found.tokens == 4 and found.dropped == 0.25
    assert found.share == (0.5, 0.5, 0.0, 0.0) and found.entropy == pytest.approx(math.log(2) / math.log(4))
    assert found.certainty == pytest.approx(0.5)  # the mean of an even row, 0, and of a sure one, 1
    assert found.unused == 2 and found.collapsed


def test_usage_knows_even_collapsed_and_empty():
    even = routing.usage(hand([[1.0, 0], [0, 1.0]]))
    assert (
        even.entropy == pytest.approx(1)
        and even.certainty == pytest.approx(1)
        and not even.collapsed
        and even.unused == 0
    )
    one = routing.usage(hand([[1.0, 0, 0]] * 5))
    assert one.entropy == 0 and one.unused == 2 and one.collapsed
    single = routing.usage(hand([[1.0]]))
    assert single.entropy == 0 and not single.collapsed
    none = routing.usage(hand([[0.0, 0.0]]))
    assert none.share == (0.0, 0.0) and none.dropped == 1.0


def test_watch_records_every_pass_in_order_and_nothing_after_it():
    model = torch.nn.ModuleDict({"first": make("switch"), "second": make("soft")})
    x = tokens()
    with routing.watch(model) as seen:
        model["first"](x), model["second"](x), model["first"](x[:4]), model["first"](x[:0])
    model["first"](x)
    assert [(u.router, u.tokens) for u in seen.passes] == [("first", 13), ("second", 13), ("first", 4)]
    assert seen.routers == ["first", "second"] and [u.tokens for u in seen.of("first")] == [13, 4]
    assert seen.passes[0] == routing.usage(model["first"](x), "first")


def test_watch_leaves_out_what_a_checkpoint_computes_again():
    router, x = make("soft"), tokens().requires_grad_()
    with routing.watch(router) as seen:
        torch.utils.checkpoint.checkpoint(
            lambda given: router(given).weights.square().sum(), x, use_reentrant=False
        ).backward()
    assert len(seen.passes) == 1


# ---- a router of one's own ----

MINE = """
from effzoo.routing import Router, Routing, register

@register("first_ones")
class FirstOnes(Router):
    def __init__(self, dim, experts, *, share: float = 0.5):
        super().__init__(dim, experts)
        self.share = share

    def forward(self, x):
        weights = x.new_zeros(len(x), self.experts)
        weights[:, : max(1, int(self.share * self.experts))] = 1.0
        return Routing(weights, weights > 0, weights / weights.sum(dim=-1, keepdim=True))
"""


def test_a_router_of_a_file_is_used_by_its_name(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    with effzoo.scope():
        assert effzoo.load_file(tmp_path / "mine.py") == [("router", "first_ones")]
        router = routing.create("first_ones[share=0.4]", DIM, EXPERTS)
        assert isinstance(router, Router) and router(tokens()).sent.sum(dim=0).tolist() == [13, 13, 0, 0, 0]
    assert "first_ones" not in routing.names()


def test_a_router_is_found_by_entry_point(monkeypatch):
    class Point:
        name = value = "good"

        def load(self):
            exec(MINE, {"__name__": "plugged"})

    monkeypatch.setattr(effzoo.registry, "_entry_points_loaded", False)
    monkeypatch.setattr(effzoo.registry, "_table", dict(effzoo.registry._table))
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [Point()] if group == ENTRY_POINT_GROUP else []
    )
    assert "first_ones" in routing.names()


def test_check_says_that_routers_have_no_checks_and_never_that_they_hold(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    found = CliRunner().invoke(app, ["check", str(tmp_path / "mine.py")])
    assert found.exit_code == 2 and isinstance(found.exception, SystemExit | OptionError)
    both = MINE + (
        "\nfrom effzoo.attention import full, register as enter\n\n@enter('mine')\nclass Mine(full.Full):\n    pass\n"
    )
    (tmp_path / "both.py").write_text(both)
    found = CliRunner().invoke(app, ["check", str(tmp_path / "both.py"), "--json", "--only", "equals_definition"])
    assert [report["subject"].split("[")[0] for report in json.loads(found.output)["reports"]] == ["mine"]


def test_of_one_expert_the_task_teaches_only_a_router_that_weighs_it():
    """The weight of top_k[k=1] is constant, so that its gradient is exactly 0; that of switch is p."""
    for spec, learns in (("top_k[k=1]", False), ("top_k[k=2]", True), ("switch", True)):
        router = make(spec, training=True)
        weights = router(tokens()).weights
        (gradient,) = torch.autograd.grad((weights * torch.arange(EXPERTS).to(weights)).sum(), router.scores.weight)
        assert (gradient.abs().max() > 1e-6) == learns, spec
    for spec in ("top_k[k=1, load=0]", "top_k[k=1, noise=false]", "top_k[k=1, importance=0, load=0]"):
        with pytest.raises(
            OptionError, match="so only the load loss teaches the scores; give load above 0 .* router='switch'"
        ):
            make(spec)
    assert make("top_k[k=1, load=0]", experts=1)(tokens()).weights.eq(1).all()
