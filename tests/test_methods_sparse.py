"""Sparse methods against their formulas: masks and gates recomputed densely in float64, exact counts, entries that must
not move, files, stages."""

import copy

import pytest
import torch
from torch.nn import functional as F

import effzoo
from effzoo.errors import AdapterError, IncompatibleError, IncompatiblePeft, OptionError
from effzoo.peft import training
from effzoo.peft.attach import base_tensors
from effzoo.peft.files import swap_weights
from effzoo.peft.parameter import hard_concrete, mask_scores
from effzoo.peft.parameter.head_pruning import importance
from effzoo.peft.parameter.sparse_delta import shared_entries
from effzoo.peft.stored import stored_tensors
from effzoo.sites import Linear, sites

D, MLP, LAYERS, LABELS, VOCAB = 16, 32, 2, 3, 53
HEAD = D * LABELS + LABELS
MATRICES = LAYERS * (4 * D * D + 2 * D * MLP)
NETWORK = VOCAB * D + 64 * D + 2 * D + 2 * D + LAYERS * (4 * (D * D + D) + 4 * D + 2 * D * MLP + MLP + D)
EIGHT = ["magnitude", "movement", "supermask", "diff", "fish", "lt_sft", "head_pruning", "far"]


def build(tiny, peft=None, attention="full", name="minilm", task="classification", **more):
    """A float64 model with weights far from their initial values, then the adapter."""
    more = {"pooling": "mean", "head_dense": False, **more} if task == "classification" else more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # always the same base
        model = effzoo.build(name, attention=attention, task=task, num_labels=LABELS, **{**tiny, **more}).double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return (effzoo.attach(model, peft) if peft else model).eval()


def batch(n=9, size=4, labels=LABELS):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (size, n), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(labels, (size,), generator=draw)}


def modules(model, method, adapter="default"):
    """By path, as the hooks of a method get them."""
    paths = next(paths for own, paths in effzoo.attached(model)[adapter].methods if own.name == method)
    return {path: dict(sites(model))[path].of(adapter)[method] for path in paths}


def chosen_entries(model, method):
    """{(path, key, index)} of the entries that a sparse change holds."""
    found = set()
    for path, module in modules(model, method).items():
        for key, (first, size) in module.spans.items():
            numbers = module.chosen.indices.long()
            found |= {(path, key, int(i) - first) for i in numbers if first <= i < first + size}
    return found


def by_hand(model, total=8, lr=1e-2, until=None, data=None):
    """The loop of training.py, with AdamW and weight decay; `until` stops before that stage's first step."""
    data = data or batch()
    training.calibrate(model, [data])
    for stage in training.stages(model):
        training.begin(model, stage)
        if until is not None and stage.name == until:
            return model.eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
        steps = round(stage.share * total)
        for step in range(steps):
            model.train()
            training.schedule(model, step / steps)
            training.loss(model, **data).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def logits(model, **more):
    with torch.no_grad():
        return model(**{key: value for key, value in batch(**more).items() if key != "labels"}).logits


def effective(model):
    """The weights and biases that the network computes with, {path: {key: tensor}}, where the parameter hooks or delta
    says so."""
    found = {}
    for path, site in sites(model):
        if site.base():
            found[path] = {
                key: site.composed_weight() if key == "weight" else site.composed_bias() for key in site.base()
            }
    return found


# masks, gates, bits


def test_exactly_k_entries_are_chosen_and_equal_ones_count_by_number():
    scores = [torch.tensor([[1.0, 3.0], [3.0, 3.0]]), torch.tensor([3.0, 0.0, 5.0])]
    assert mask_scores.top(scores, 3).tolist() == [1, 2, 6]
    assert mask_scores.top_mask(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
    draw = torch.randint(0, 6, (1000,)).double()
    for k in (1, 17, 500, 1000):
        order = sorted(range(1000), key=lambda i: (-float(draw[i]), i))[:k]
        assert mask_scores.top([draw[:300], draw[300:]], k).tolist() == sorted(order)
    with pytest.raises(IncompatibleError, match="NaN"):
        mask_scores.top([torch.tensor([1.0, float("nan")])], 1)


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (7, 9)])
def test_bits_pack_and_unpack(shape):
    mask = torch.rand(shape) > 0.5
    bits = mask_scores.pack_bits(mask)
    assert (
        bits.dtype == torch.uint8
        and len(bits) == -(-mask.numel() // 8)
        and torch.equal(mask_scores.unpack_bits(bits, shape), mask)
    )
    assert int(bits[0]) & 1 == int(mask.flatten()[0])
    with pytest.raises(ValueError, match="bytes"):
        mask_scores.unpack_bits(torch.cat([bits, bits]), shape)


@pytest.mark.parametrize(("low", "high", "temperature"), [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3)])
def test_the_probability_that_a_hard_concrete_gate_is_open_is_the_share_of_open_draws(low, high, temperature):
    alpha = torch.tensor([-3.0, -1.0, 0.0, 0.7, 2.5], dtype=torch.float64)
    n = 200_000
    drawn = hard_concrete.drawn_gate(alpha.expand(n, -1), low, high, temperature)
    expected = hard_concrete.open_probability(alpha, low, high, temperature)
    error = ((drawn > 0).double().mean(0) - expected) / (expected * (1 - expected) / n).sqrt()
    assert error.abs().max() < 4.5  # standard errors; the noise is cut at 1e-4, far below them
    assert drawn.min() == 0 and drawn.max() == 1
    still = ((1 / (1 + (-alpha).exp())) * (high - low) + low).clamp(0, 1)
    assert torch.allclose(hard_concrete.still_gate(alpha, low, high), still, atol=1e-12)


def test_expected_l0_of_two_independent_gates_is_the_share_of_draws_with_both_open(tiny):
    model = build(tiny, "diff[targets=mlp.up, layers=(0)]")
    module = modules(model, "diff")["blocks.0.mlp.up"]
    with torch.no_grad():
        module.alpha_weight.copy_(torch.randn(MLP, D) * 2)
        module.group_weight.fill_(0.4)
        module.alpha_bias.fill_(-1.0)
        module.group_bias.fill_(1.0)
        module.w_weight.fill_(1.0)
        module.w_bias.fill_(1.0)
        module.train()
        drawn = torch.tensor(
            [sum(int((module.dense(key) != 0).sum()) for key in ("weight", "bias")) for _ in range(4000)],
            dtype=torch.float64,
        )
    error = (drawn.mean() - module.expected()) / (drawn.std() / len(drawn) ** 0.5)
    assert abs(float(error.detach())) < 4.5
    assert torch.allclose(training.penalty(model), 1.25e-7 * module.expected())


def test_straight_through_is_the_mask_forward_and_the_identity_backward():
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask, g = scores.detach() > 0, torch.randn(4, 5, dtype=torch.float64)
    out = mask_scores.straight_through(mask, scores)
    assert torch.equal(out, mask.double())
    assert torch.equal(torch.autograd.grad(out, scores, g)[0], g)


# pruning


def test_the_cubic_schedule_is_the_formula_of_zhu_and_gupta():
    for t in torch.linspace(0, 1, 11).tolist():
        done = mask_scores.through(t, 0.2, 0.7)
        sparsity = 0.8 + (0 - 0.8) * (1 - min(1, max(0, (t - 0.2) / 0.5))) ** 3
        assert abs((1 - mask_scores.cubic(done, 1.0, 0.2)) - sparsity) < 1e-12


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_one_shot_magnitude_pruning_keeps_the_largest_weights(tiny, scope):
    base, model = build(tiny), build(tiny, f"magnitude[keep=0.3, schedule=oneshot, scope={scope}]")
    pruned = {
        path: site.weight.detach() for path, site in sites(base) if isinstance(site, Linear) and site.layer is not None
    }
    everything = torch.cat([w.abs().flatten() for w in pruned.values()])
    kept = 0
    for path, weight in pruned.items():
        pool = everything if scope == "global" else weight.abs().flatten()
        mask = weight.abs() >= pool.sort(descending=True).values[round(0.3 * len(pool)) - 1]
        assert torch.equal(effective(model)[path]["weight"], weight * mask)
        kept += int(mask.sum())
    assert kept == (
        round(0.3 * MATRICES) if scope == "global" else sum(round(0.3 * w.numel()) for w in pruned.values())
    )


@pytest.mark.parametrize(
    "spec",
    [
        "magnitude[keep=0.25]",
        "magnitude[keep=0.25, scope=global]",
        "movement[keep=0.25]",
        "movement[keep=0.25, scope=global]",
    ],
)
def test_iterative_pruning_ends_with_exactly_the_share_and_pruned_weights_are_exactly_zero(tiny, spec):
    model = by_hand(build(tiny, spec), total=10)
    hung = modules(model, spec.partition("[")[0])
    counts = [(int((effective(model)[path]["weight"] != 0).sum()), module.own.numel()) for path, module in hung.items()]
    if "global" in spec:
        assert sum(kept for kept, _ in counts) == round(0.25 * MATRICES)
    else:
        assert all(kept == round(0.25 * n) for kept, n in counts)


def test_what_magnitude_pruning_has_pruned_stays_pruned(tiny):
    model = build(tiny, "magnitude[keep=0.2, end=1.0]")
    module = modules(model, "magnitude")["blocks.0.mlp.up"]
    before = module.mask.clone()
    for step in range(10):
        training.schedule(model, step / 10)
        with torch.no_grad():
            module.own.normal_()
        assert not (module.mask & ~before).any()
        before = module.mask.clone()
    assert before.sum() < before.numel() / 2


def test_the_lottery_ticket_returns_the_kept_weights_to_their_start(tiny):
    """Two rounds: each keeps sqrt(keep) of what is left, and training begins anew from theta_0."""
    model = build(tiny, "magnitude[rewind=true, keep=0.25, rounds=2]")
    assert [stage.name for stage in training.stages(model)] == ["round 0", "round 1", "round 2"]
    stage, *others = training.stages(model)
    training.begin(model, stage)
    hung, known = modules(model, "magnitude"), dict(sites(model))
    for i, stage in enumerate(others, 1):
        with torch.no_grad():
            for module in hung.values():
                module.own.add_(torch.randn_like(module.own))
        trained = {path: (module.own.detach().clone(), module.mask.clone()) for path, module in hung.items()}
        training.begin(model, stage)
        for path, module in hung.items():
            own, mask = trained[path]
            assert int(module.mask.sum()) == round(0.5**i * own.numel())
            left = own.abs()[mask]
            assert torch.equal(
                module.mask, mask & (own.abs() >= left.sort(descending=True).values[int(module.mask.sum()) - 1])
            )
            assert torch.equal(effective(model)[path]["weight"], known[path].weight * module.mask)


def test_rewinding_to_a_step_takes_the_weights_of_that_step(tiny):
    model = build(tiny, "magnitude[rewind=true, rewind_at=0.3]")
    first, second = training.stages(model)
    training.begin(model, first)
    module = modules(model, "magnitude")["blocks.0.attn.v"]
    values = []
    for step in range(10):
        training.schedule(model, step / 10)
        values.append(module.own.detach().clone())
        with torch.no_grad():
            module.own.add_(torch.randn_like(module.own))
    training.begin(model, second)
    assert torch.equal(module.own, values[3])


def test_movement_scores_get_the_gradient_of_the_masked_weight_times_the_weight(tiny):
    model = build(tiny, "movement[keep=0.5]").train()
    training.schedule(model, 0.9)
    path = "blocks.1.mlp.up"
    module = modules(model, "movement")[path]
    dense = {p: m.mask * m.own.detach() for p, m in modules(model, "movement").items()}
    twin = build(tiny)
    with torch.no_grad():
        for p, weight in dense.items():
            dict(sites(twin))[p].weight.copy_(weight)
    g = torch.autograd.grad(twin(**batch()).loss, dict(sites(twin))[path].weight)[0]
    to_scores, to_own = torch.autograd.grad(model(**batch()).loss, [module.scores, module.own])
    assert torch.allclose(to_scores, g * module.own, rtol=0, atol=1e-12)
    assert torch.allclose(to_own, g * module.mask, rtol=0, atol=1e-12)
    assert (~module.mask).sum() > 0 and to_scores[~module.mask].abs().max() > 1e-9  # pruned weights go on being scored


def test_soft_movement_masks_by_the_sigmoid_and_adds_its_mean(tiny):
    model = build(tiny, "movement[mode=soft, threshold=0.4, penalty=2.0, begin=0.0]")
    hung = modules(model, "movement")
    with torch.no_grad():
        for module in hung.values():
            module.scores.normal_(std=2.0)
        hung["blocks.0.attn.o"].scores.fill_(-9.0)
    scores = torch.cat([module.scores.flatten() for module in hung.values()])
    assert torch.allclose(training.penalty(model), 2.0 * (1 / (1 + (-scores).exp())).mean(), atol=1e-12)
    training.schedule(model, 0.3)  # half of [0, 0.6]: tau = 0.4 - 0.4 / 8
    tau = 0.4 * (1 - 0.5**3)
    for path, module in hung.items():
        if path == "blocks.0.attn.o":
            assert int(module.mask.sum()) == max(1, round(0.005 * D * D))  # never nothing
        else:
            assert torch.equal(module.mask, 1 / (1 + (-module.scores).exp()) > tau)


@pytest.mark.parametrize("keep", [None, 0.3])
def test_supermasks_multiply_the_fixed_weight_and_train_the_scores_straight_through(tiny, keep):
    model = build(tiny, f"supermask[keep={keep}]").train()
    path = "blocks.0.mlp.down"
    module, site = modules(model, "supermask")[path], dict(sites(model))[path]
    with torch.no_grad():
        for other in modules(model, "supermask").values():
            other.scores.normal_()
        module.scores[0, 0] = 5e-3  # at the threshold a weight is kept
    mask = module.scores >= 5e-3
    if keep:
        mask = module.scores >= module.scores.flatten().sort(descending=True).values[round(keep * D * MLP) - 1]
    assert torch.equal(effective(model)[path]["weight"], site.weight * mask)
    composed = {
        p: (m.mask() * dict(sites(model))[p].weight).detach().requires_grad_()
        for p, m in modules(model, "supermask").items()
    }
    twin = build(tiny)
    for p, weight in composed.items():
        dict(sites(twin))[p].weight.data.copy_(weight)
    g = torch.autograd.grad(twin(**batch()).loss, dict(sites(twin))[path].weight)[0]
    assert torch.allclose(
        torch.autograd.grad(model(**batch()).loss, module.scores)[0], g * site.weight, rtol=0, atol=1e-12
    )


def test_supermasks_of_two_tasks_live_on_one_base_at_one_bit_a_weight(tiny, tmp_path):
    model = build(tiny, None)
    outs = {}
    for name, rate in (("a", 2e-2), ("b", 3e-2)):
        effzoo.attach(model, "supermask", name=name)
        by_hand(model, total=4, lr=rate, data=batch(n=7 if name == "a" else 9))
        training.finish(model, name)
        outs[name] = logits(model)
    effzoo.activate(model, "a")
    assert torch.equal(logits(model), outs["a"]) and not torch.equal(outs["a"], outs["b"])
    stored = stored_tensors(model, "a")
    bits = [value for key, value in stored.items() if key.endswith("bits")]
    assert (
        sum(len(value) for value in bits) == MATRICES // 8
        and effzoo.account(model).stored_bytes == MATRICES // 8 + 8 * HEAD
    )
    effzoo.save_adapter(model, tmp_path, name="a")
    assert torch.equal(logits(effzoo.load_adapter(build(tiny), tmp_path)), outs["a"])


# sparse changes


def frozen_and_moved(model, base):
    """Entries whose effective value differs from the base's, over the network without the head."""
    moved = 0
    for path, tensors in effective(model).items():
        if not path.startswith("head"):
            moved += sum(int((tensor != base[f"{path}.{key}"]).sum()) for key, tensor in tensors.items())
    return moved


@pytest.mark.parametrize(
    ("spec", "keep"), [("fish[keep=0.02]", 0.02), ("lt_sft[keep=0.02]", 0.02), ("diff[keep=0.02]", 0.02)]
)
@pytest.mark.parametrize("finished", [False, True])
def test_exactly_k_entries_change_and_all_others_are_bit_identical_under_weight_decay(tiny, spec, keep, finished):
    model = build(tiny, spec)
    base = {key: value.clone() for key, value in base_tensors(model).items()}
    by_hand(model)
    if finished:
        training.finish(model)
    k = round(keep * NETWORK)
    account = effzoo.account(model)
    assert account.trainable == account.changed == k + HEAD
    # an int32 and a float64 each
    assert account.stored == 2 * k + HEAD and account.stored_bytes == (4 + 8) * k + 8 * HEAD
    name = spec.partition("[")[0]
    known = dict(sites(model))
    hung = modules(model, name)
    assert (
        sum(m.changed(getattr(known[p], "weight", None), getattr(known[p], "bias", None)) for p, m in hung.items()) == k
    )
    moved = frozen_and_moved(model, base)
    assert k - 8 <= moved <= k  # some entries have no gradient at all: embeddings of absent tokens, biases of keys
    before = logits(model)
    effzoo.merge(model)
    assert (logits(model) - before).abs().max() < 1e-10
    after = base_tensors(model)
    assert sum(int((after[key] != base[key]).sum()) for key in base if not key.startswith("head")) == moved


def per_example(model, data, expected):
    """Fisher information by definition, in a loop of whole backward passes over a bare model."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("head")]
    total = {name: 0 for name in names}
    for i in range(len(data["labels"])):
        for label in range(LABELS) if expected else [int(data["labels"][i])]:
            model.zero_grad()
            log_p = (
                model(data["input_ids"][i : i + 1], attention_mask=data["attention_mask"][i : i + 1])
                .logits[0]
                .log_softmax(-1)
            )
            log_p[label].backward()
            for name, parameter in model.named_parameters():
                if name in total and parameter.grad is not None:
                    total[name] = (
                        total[name] + (float(log_p[label].detach().exp()) if expected else 1) * parameter.grad**2
                    )
    return total


@pytest.mark.parametrize("fisher", ["label", "expected"])
def test_fish_chooses_the_largest_fisher_information_of_single_examples(tiny, fisher):
    bare, model = build(tiny), build(tiny, f"fish[keep=0.03, fisher={fisher}]")
    data = batch()
    information = per_example(bare, data, fisher == "expected")
    training.calibrate(model, [{k: v[:3] for k, v in data.items()}, {k: v[3:] for k, v in data.items()}])
    k = round(0.03 * NETWORK)
    everything = torch.cat([value.flatten() for value in information.values()])
    threshold = everything.sort(descending=True).values[k - 1]
    expected = {
        (*name.rsplit(".", 1), int(i))
        for name, value in information.items()
        for i in (value.flatten() >= threshold).nonzero()
    }
    assert chosen_entries(model, "fish") == expected and len(expected) == k
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".adapters." not in key)


def test_fish_is_not_the_square_of_the_gradient_of_a_batch(tiny):
    """What one backward pass of the whole batch would choose is another mask."""
    model, twin = build(tiny, "fish[keep=0.03]"), build(tiny)
    training.calibrate(model, [batch()])
    twin(**batch()).loss.backward()
    squares = {name: parameter.grad**2 for name, parameter in twin.named_parameters() if not name.startswith("head")}
    threshold = (
        torch.cat([value.flatten() for value in squares.values()])
        .sort(descending=True)
        .values[round(0.03 * NETWORK) - 1]
    )
    wrong = {
        (*name.rsplit(".", 1), int(i))
        for name, value in squares.items()
        for i in (value.flatten() >= threshold).nonzero()
    }
    assert len(wrong) == len(chosen_entries(model, "fish")) and wrong != chosen_entries(model, "fish")


def test_fish_looks_at_as_many_samples_as_asked_and_is_random_before(tiny):
    one, two = build(tiny, "fish[keep=0.03, samples=2]"), build(tiny, "fish[keep=0.03]")
    assert not torch.equal(shared_entries(modules(one, "fish")).indices, shared_entries(modules(two, "fish")).indices)
    first = {key: value[:2] for key, value in batch().items()}
    training.calibrate(one, [batch()])
    training.calibrate(two, [first])
    assert torch.equal(shared_entries(modules(one, "fish")).indices, shared_entries(modules(two, "fish")).indices)


def test_fish_refuses_the_expectation_over_the_labels_of_every_token(tiny):
    model = build(tiny, "fish[fisher=expected]", task="token_classification")
    with pytest.raises(IncompatiblePeft, match="take fisher=label"):
        training.calibrate(model, [{**batch(), "labels": torch.zeros(4, 9, dtype=torch.long)}])
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".adapters." not in key)


def test_lt_sft_chooses_what_moved_most_and_starts_again_from_theta(tiny):
    model = build(tiny, "lt_sft[keep=0.02]")
    full, sparse = training.stages(model)
    training.begin(model, full)
    with torch.no_grad():
        for module in modules(model, "lt_sft").values():
            for key in module.spans:
                getattr(module, f"full_{key}").normal_()
    changes = torch.cat(
        [getattr(m, f"full_{key}").detach().flatten() for m in modules(model, "lt_sft").values() for key in m.spans]
    )
    training.begin(model, sparse)
    chosen = shared_entries(modules(model, "lt_sft"))
    k = round(0.02 * NETWORK)
    assert chosen.indices.tolist() == sorted(
        sorted(range(len(changes)), key=lambda i: (-abs(float(changes[i])), i))[:k]
    )
    assert torch.equal(logits(model), logits_of_base(model)) and not chosen.values.any()
    assert effzoo.account(model).trainable == k + HEAD


def logits_of_base(model):
    """The network at theta_0, under the adapter's head."""
    twin = copy.deepcopy(model)
    for path, site in sites(twin):
        if not path.startswith("head"):
            site.roster = None
    return logits(twin)


def test_two_sparse_changes_add_up(tiny):
    """theta_0 + phi_A + phi_B, also where both chose an entry."""
    model = build(tiny)
    for name in ("a", "b"):
        effzoo.attach(model, "lt_sft[keep=0.3]", name=name)
        by_hand(model, data=batch(n=7 if name == "a" else 9))
    deltas = {}
    for name in ("a", "b"):
        effzoo.activate(model, name)
        deltas[name] = {
            (path, key): t.detach() - dict(sites(model))[path].base()[key]
            for path, ts in effective(model).items()
            for key, t in ts.items()
        }
    overlap = sum(int(((deltas["a"][place] != 0) & (deltas["b"][place] != 0)).sum()) for place in deltas["a"])
    effzoo.activate(model, "a", "b")
    worst = 0.0
    for path, tensors in effective(model).items():
        for key, tensor in tensors.items():
            if not path.startswith("head"):
                expected = dict(sites(model))[path].base()[key] + deltas["a"][path, key] + deltas["b"][path, key]
                worst = max(worst, float((tensor - expected).abs().max()))
    assert worst < 1e-12 and overlap > 10


@pytest.mark.parametrize("stage", ["full", "sparse"])
def test_the_l1_penalty_is_the_mean_size_of_the_change(tiny, stage):
    model = build(tiny, "lt_sft[keep=0.02, l1=3.0]")
    by_hand(model, until="sparse")
    if stage == "full":
        model = build(tiny, "lt_sft[keep=0.02, l1=3.0]")
        for name, p in model.named_parameters():
            if "full_" in name:
                p.data.normal_()
        phi = torch.cat([p.flatten() for name, p in model.named_parameters() if "full_" in name])
    else:
        shared_entries(modules(model, "lt_sft")).values.data.normal_()
        phi = shared_entries(modules(model, "lt_sft")).values
    assert torch.allclose(training.penalty(model), 3.0 * phi.abs().mean(), atol=1e-12)


@pytest.mark.parametrize("structured", [True, False])
def test_diff_pruning_adds_the_gated_change_and_fixes_the_largest_of_it(tiny, structured):
    model = build(tiny, f"diff[keep=0.02, structured={structured}]")
    hung = modules(model, "diff")
    tensors = sum(len(m.spans) for m in hung.values())
    assert effzoo.account(model).trainable == 2 * NETWORK + tensors * structured + HEAD
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".diff." in name:
                p.normal_()
    sigma, z = (lambda a: 1 / (1 + (-a).exp())), {}
    for path, module in hung.items():
        for key in module.spans:
            gate = (sigma(getattr(module, f"alpha_{key}")) * 3 - 1.5).clamp(0, 1)
            if structured:
                gate = gate * (sigma(getattr(module, f"group_{key}")) * 3 - 1.5).clamp(0, 1)
            z[path, key] = (gate * getattr(module, f"w_{key}")).detach()
            assert torch.allclose(
                effective(model)[path][key], dict(sites(model))[path].base()[key] + z[path, key], rtol=0, atol=1e-12
            )
    flat = torch.cat([value.flatten() for value in z.values()])
    # in training mode, as a loop does; the gates of evaluation count
    training.begin(model.train(), training.stages(model)[1])
    chosen, k = shared_entries(hung), round(0.02 * NETWORK)
    assert len(chosen.indices) == k and torch.equal(chosen.indices.long(), flat.abs().topk(k).indices.sort().values)
    assert (
        torch.allclose(chosen.values, flat[chosen.indices.long()], rtol=0, atol=1e-12)
        and training.penalty(model) is None
    )


def test_diff_gates_are_drawn_in_training_and_still_in_evaluation(tiny):
    model = build(tiny, "diff")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".w_" in name or ".alpha_" in name:
                p.normal_()
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


# heads


def sliced(model, gates, name, attention, tiny):
    """A model with the open heads alone: rows of the projections and columns of W_O cut out; the same head in every
    layer."""
    keep = [i for i, gate in enumerate(gates) if gate]
    width = D // 4
    lean = build({**tiny, "heads": len(keep), "head_dim": width}, attention=attention, name=name)
    own = dict(sites(model))
    places = torch.cat([torch.arange(width) + i * width for i in keep])
    with torch.no_grad():
        for path, site in sites(lean):
            for key, parameter in site.base().items():
                value = own[path].composed_weight(()) if key == "weight" else own[path].base()[key]
                if path.startswith("head"):
                    value = own[path].composed_weight() if key == "weight" else own[path].composed_bias()
                elif site.role.startswith("attn.") and site.role != "attn.o" and isinstance(site, Linear):
                    value = value[places]
                elif site.role == "attn.o" and key == "weight":
                    value = value[:, places]
                parameter.copy_(value)
        buffers = dict(model.named_buffers())
        for key, buffer in lean.named_buffers():
            if buffer.shape != buffers[key].shape:  # rotations of the hash, one set for each head
                axis = next(i for i, (a, b) in enumerate(zip(buffer.shape, buffers[key].shape, strict=True)) if a != b)
                assert buffers[key].shape[axis] == 4
                buffer.copy_(buffers[key].index_select(axis, torch.tensor(keep)))
            else:
                buffer.copy_(buffers[key])
    return lean


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("minilm", "full"),
        ("gpt2", "full"),
        ("minilm", "longformer[window=4]"),
        ("minilm", "lsh[buckets=2]"),
        ("gpt2", "lsh[buckets=2]"),
    ],
)
def test_a_model_with_closed_gates_is_the_model_without_these_heads(tiny, name, attention):
    model = build({**tiny, "heads": 4}, "head_pruning", attention=attention, name=name)
    gates = [1, 0, 1, 0]
    for module in modules(model, "head_pruning").values():
        module.alpha.data = torch.tensor([9.0 if gate else -9.0 for gate in gates], dtype=torch.float64)
    lean = sliced(model, gates, name, attention, tiny)
    assert sum(p.numel() for p in lean.parameters()) < sum(p.numel() for p in model.parameters())
    before = logits(model)
    assert (logits(lean) - before).abs().max() < 1e-10
    effzoo.merge(model)
    assert (logits(model) - before).abs().max() < 1e-10
    o, width = dict(sites(model))["blocks.0.attn.o"].weight, D // 4
    assert not o[:, width : 2 * width].any() and not o[:, 3 * width :].any() and o[:, :width].any()


def test_head_importance_is_the_mean_size_of_the_gradient_of_the_gate_normalised_by_layer(tiny):
    model = build({**tiny, "heads": 4}, "head_pruning[mode=importance, share=0.5]")
    hung = modules(model, "head_pruning")
    data, total = batch(), {path: 0 for path in hung}
    for i in range(4):  # the gate's gradient by finite differences of the loss of one example
        one = {key: value[i : i + 1] for key, value in data.items()}
        for path, module in hung.items():
            slopes = []
            for h in range(4):
                losses = []
                for step in (1e-5, -1e-5):
                    module.gate[h] = 1 + step
                    losses.append(float(model(**one).loss.detach()))
                    module.gate[h] = 1
                slopes.append(abs(losses[0] - losses[1]) / 2e-5)
            total[path] = total[path] + torch.tensor(slopes, dtype=torch.float64)
    expected = [value / value.norm() for value in total.values()]
    for got, want in zip(importance(model, hung, [data]), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-7)  # of the finite differences
    training.calibrate(model, [data])
    scores, gates = torch.cat(expected), torch.cat([module.gate for module in hung.values()])
    assert torch.equal(gates == 0, scores <= scores.sort().values[3]) and int((gates == 0).sum()) == 4
    assert effzoo.account(model).trainable == HEAD


def test_the_penalty_of_head_gates_is_the_expected_number_of_open_heads(tiny):
    model = build(tiny, "head_pruning[penalty=0.3]")
    alphas = torch.cat([module.alpha.detach().normal_() for module in modules(model, "head_pruning").values()])
    expected = (1 / (1 + (-(alphas - 2 / 3 * torch.tensor(0.1 / 1.1).log())).exp())).sum()
    assert torch.allclose(training.penalty(model), 0.3 * expected, atol=1e-12)


# FAR


@pytest.mark.parametrize("name", ["minilm", "modernbert"])
def test_far_is_the_sum_of_a_frozen_and_a_learning_feedforward(tiny, name):
    """Plain and gated; the units that moved most learn, the others are at theta_0."""
    model = build(tiny, "far[keep=0.25]", name=name, **({"layers": 2} if name == "minilm" else {}))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".far." in key:
                p.normal_()
    hung, mlp = modules(model, "far"), model.blocks[0].mlp
    parts = {role: hung[f"blocks.0.mlp.{role}"] for role in ("up", "gate", "down") if f"blocks.0.mlp.{role}" in hung}
    moved = sum(
        m.own_weight.abs().sum(0 if role == "down" else 1) + (0 if m.own_bias is None else m.own_bias.abs())
        for role, m in parts.items()
    )
    training.begin(model, training.stages(model)[1])
    learners = moved.topk(round(0.25 * MLP)).indices.sort().values
    assert all(torch.equal(part.units.long(), learners) for part in parts.values())
    frozen = torch.tensor([i for i in range(MLP) if i not in learners.tolist()])
    x = torch.randn(5, D, dtype=torch.float64)

    def half(units, learn):
        def rows(role):
            site, part = getattr(mlp, role), parts[role]
            weight = site.weight[units] + (part.own_weight if learn else 0)
            bias = 0 if site.bias is None else site.bias[units] + (part.own_bias if learn else 0)
            return x @ weight.T + bias

        hidden = mlp.activation(rows("up")) if mlp.gate is None else mlp.activation(rows("gate")) * rows("up")
        return hidden @ (mlp.down.weight[:, units] + (parts["down"].own_weight if learn else 0)).T

    expected = half(frozen, False) + half(learners, True) + (0 if mlp.down.bias is None else mlp.down.bias)
    assert (mlp(x) - expected).abs().max() < 1e-12
    biases = 0 if mlp.up.bias is None else 1
    r = len(learners)
    per_layer = r * (D * len(parts) + biases * (len(parts) - 1))
    trainable = sum(p.numel() for key, p in model.named_parameters() if ".far." in key)
    assert trainable == len(model.blocks) * per_layer
    known = dict(sites(model))
    assert sum(m.changed(known[p].weight, known[p].bias) for p, m in hung.items()) == trainable


def test_far_gradients_optimizer_and_saved_inputs_are_as_small_as_the_learners(tiny):
    """What W_down's learners keep for the backward pass is their own inputs, not all hidden units."""
    model = by_hand(build(tiny, "far[keep=0.25]"), until="learn").train()
    saved = []
    down, x = model.blocks[0].mlp.down, torch.randn(50, MLP, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        down(x).sum().backward()
    assert (50, MLP) not in saved and (50, MLP // 4) in saved
    assert all(p.grad is None or p.numel() <= D * MLP // 4 for key, p in model.named_parameters() if ".far." in key)


# files, stages, options


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        *EIGHT,
        "magnitude[rewind=true]",
        "magnitude[schedule=oneshot]",
        "movement[mode=soft]",
        "supermask[keep=0.5]",
        "head_pruning[mode=importance]",
    ],
)
def test_every_method_trains_by_hand_finishes_and_loads(tiny, tmp_path, spec, finished):
    """Stages as the docstring of training.py runs them; finishing changes no output; a file gives the same output in a
    fresh model."""
    model = by_hand(build(tiny, spec))
    # whose gates were at most drawn nearer
    assert (logits(model) - logits_of_base(model)).abs().max() > 1e-4 or spec.startswith("head_pruning")
    before = logits(model)
    stages = training.stages(model)
    if finished:
        training.finish(model)
        assert torch.equal(logits(model), before)
    effzoo.save_adapter(model, tmp_path)
    fresh = build(tiny)
    if finished or len(stages) == 1:
        loaded = effzoo.load_adapter(fresh, tmp_path)
    else:  # in the middle of its last stage, as a run that goes on: attach, begin, restore
        loaded = effzoo.attach(fresh, spec)
        for stage in stages:
            training.begin(loaded, stage)
        swap_weights(loaded, tmp_path)
    assert torch.equal(logits(loaded.eval()), before)
    twin = copy.deepcopy(loaded)
    assert torch.equal(logits(twin), before)


@pytest.mark.parametrize("spec", ["lt_sft", "diff", "far", "magnitude[rewind=true]"])
def test_finishing_in_the_first_stage_keeps_what_was_trained(tiny, tmp_path, spec):
    model = build(tiny, spec)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**batch()).loss.backward()
    optimizer.step()
    before = logits(model.eval())
    training.finish(model.train())
    assert torch.equal(logits(model.eval()), before)
    effzoo.save_adapter(model, tmp_path)
    assert torch.equal(logits(effzoo.load_adapter(build(tiny), tmp_path)), before)


@pytest.mark.parametrize("spec", ["magnitude", "movement"])
def test_finished_pruning_is_stored_as_bits_and_kept_values(tiny, spec):
    model = by_hand(build(tiny, f"{spec}[keep=0.25]"))
    training.finish(model)
    account = effzoo.account(model)
    assert account.stored_bytes == MATRICES // 8 + 8 * (MATRICES // 4) + 8 * HEAD


@pytest.mark.parametrize("broken", ["order", "range", "length"])
def test_indices_that_do_not_fit_are_refused(tiny, broken):
    model = build(tiny, "fish[keep=0.01]")
    owner = next(m for m in modules(model, "fish").values() if m.owner)
    tensors = {key: value.detach().clone() for key, value in owner.packed().items()}
    if broken == "order":
        tensors["indices"] = tensors["indices"].flip(0)
    elif broken == "range":
        tensors["indices"][-1] = NETWORK
    else:
        tensors["values"] = tensors["values"][1:]
    with pytest.raises(ValueError, match="ascend|below"):
        owner.unpack(tensors)


def test_rows_of_a_batch_take_their_own_sparse_change(tiny):
    """Two FISH adapters chose other entries; each row is what its adapter alone computes."""
    model = build(tiny)
    outs = []
    for name, n in (("a", 7), ("b", 9)):
        effzoo.attach(model, "fish[keep=0.05, targets=(attn.q, mlp.up)]", name=name)
        by_hand(model, data=batch(n=n), lr=5e-2)
        outs.append(logits(model))
    effzoo.activate(model, rows=["a", "b", None, "a"])
    mixed = logits(model)
    assert torch.allclose(mixed[0], outs[0][0], atol=1e-10) and torch.allclose(mixed[1], outs[1][1], atol=1e-10)
    assert torch.allclose(mixed[3], outs[0][3], atol=1e-10) and not torch.allclose(outs[0], outs[1], atol=1e-6)


def test_another_selection_loaded_into_a_model_that_has_run_is_used(tiny):
    """Where a site's entries lie is looked up once, and again after the indices were overwritten in place."""
    one, two = build(tiny, "fish[keep=0.05]"), build(tiny, "fish[keep=0.05]")
    with torch.no_grad():
        for model in (one, two):
            shared_entries(modules(model, "fish")).values.normal_()
    before = logits(two)
    two.load_state_dict(one.state_dict())
    assert torch.equal(logits(two), logits(one)) and not torch.equal(logits(two), before)


def test_fish_fits_a_budget_and_counts_on_a_model_without_memory(tiny):
    model = build(tiny)
    spec = effzoo.peft.within(model, "fish", 100)
    account = effzoo.account(effzoo.attach(model, spec))
    assert 95 <= account.trainable - HEAD <= 100
    with torch.device("meta"):
        bare = effzoo.build(
            "minilm", task="classification", num_labels=LABELS, pooling="mean", head_dense=False, **tiny
        )
        for spec in [*EIGHT, "magnitude[schedule=oneshot]"]:
            account = effzoo.account(effzoo.attach(bare, spec))
            effzoo.detach(bare, "default")
            real = effzoo.account(build(tiny, spec))
            assert (account.trainable, account.changed) == (real.trainable, real.changed)


@pytest.mark.parametrize("spec", EIGHT)
@pytest.mark.parametrize("name", ["reformer", "perceiver-io", "llama"])
def test_every_method_trains_on_reversible_blocks_on_the_perceiver_and_on_gated_decoders(tiny, name, spec):
    more = {
        "reformer": {
            "axial_shape": (8, 8),
            "axial_dims": (8, 8),
            "head_dim": 8,
            "attention": "lsh[chunk=8, buckets=4]",
        },
        "perceiver-io": {
            "channels": 16,
            "latents": 5,
            "head_dim": 4,
            "value_dim": 6,
            "cross_heads": 2,
            "cross_head_dim": 4,
            "cross_value_dim": 8,
        },
        "llama": {"kv_heads": 1, "head_dim": 8},
    }[name]
    decoder = {"decoder_heads": 2, "decoder_head_dim": 4, "decoder_value_dim": 8} if name == "perceiver-io" else {}
    model = effzoo.build(name, task="classification", num_labels=LABELS, **{**tiny, **more, **decoder}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3)
    effzoo.attach(model, spec)
    base = {key: value.clone() for key, value in base_tensors(model).items()}
    data = batch(n=20)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    training.calibrate(model, [data])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        training.loss(model, **data).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(
        not torch.equal(before[key], p) for key, p in model.named_parameters() if key in before and f".{spec}." in key
    )
    assert all(torch.equal(base[key], value) for key, value in base_tensors(model).items())


@pytest.mark.parametrize(
    "spec",
    [
        "magnitude[keep=0]",
        "magnitude[scope=layer]",
        "magnitude[begin=0.8, end=0.2]",
        "magnitude[rounds=3]",
        "magnitude[rewind=true, schedule=oneshot]",
        "movement[mode=medium]",
        "movement[threshold=1.5]",
        "supermask[init=0.001]",
        "supermask[keep=2.0]",
        "diff[gates=1.0]",
        "diff[penalty=-1.0]",
        "fish[keep=1.5]",
        "fish[fisher=batch]",
        "fish[samples=0]",
        "lt_sft[full=0.0]",
        "lt_sft[l1=-1.0]",
        "head_pruning[mode=both]",
        "head_pruning[share=1.0]",
        "far[prime=0.0]",
        "far[keep=0.0]",
    ],
)
def test_options_out_of_range_are_refused_with_a_sentence(tiny, spec):
    with pytest.raises(OptionError, match=spec.partition("[")[0]):
        build(tiny, spec)


def test_importance_alone_has_nothing_to_train_without_a_head(tiny):
    with pytest.raises(AdapterError, match="nothing to train"):
        build(tiny, "head_pruning[mode=importance]", task="features")


def test_biases_and_embeddings_are_neither_pruned_nor_masked(tiny):
    for spec in ("magnitude", "movement", "supermask"):
        paths = set(modules(build(tiny, spec), spec))
        assert paths == {
            f"blocks.{i}.{role}"
            for i in range(LAYERS)
            for role in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
        }


def test_a_feedforward_in_float64_is_what_functional_linear_says(tiny):
    """The oracle of this file, `effective`, is what the sites compute with."""
    model = by_hand(build(tiny, "fish[keep=0.05]"))
    site, x = dict(sites(model))["blocks.0.mlp.up"], torch.randn(3, D, dtype=torch.float64)
    tensors = effective(model)["blocks.0.mlp.up"]
    assert torch.equal(site(x), F.linear(x, tensors["weight"], tensors["bias"]))
