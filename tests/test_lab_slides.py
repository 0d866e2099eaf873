"""Analyses of slides that have none elsewhere: verdicts by intervals, filters, blocks, and what LoRA and adapters
recover."""

import copy
import math
import statistics

import pytest
import torch
from scipy import stats

import effzoo
from effzoo.errors import IncompatibleError, OptionError
from effzoo.lab import Claim
from effzoo.lab.analyses import blocks, expert_use, filters, recovery, resnet, tagger
from effzoo.lab.analyses.small_nets import Convolutional
from effzoo.lab.experiment import STUDENT
from effzoo.lab.experiments.listops import marked
from effzoo.lab.fit import Examples, accuracy


def test_a_claim_of_differences_is_judged_by_students_interval_alone():
    values = [0.4, 0.1, 0.6, 0.2, 0.3]
    claim = Claim.of_differences("it is better", values)
    half = 2.776 * statistics.stdev(values) / math.sqrt(5)
    assert claim.interval == pytest.approx((0.32 - half, 0.32 + half)) and claim.verdict == "seen"
    assert str(claim) == f"seen, difference {0.32 - half:.3g} to {0.32 + half:.3g} over 5 seeds: it is better"
    assert Claim.of_differences("x", [-v for v in values]).verdict == "NOT seen"
    unsure = Claim.of_differences("x", [0.4, 0.1, 0.6])  # above 0 with every seed, and yet
    assert unsure.verdict == "cannot be told" and all(unsure.held)
    assert str(unsure).startswith("cannot be told at this size, difference -")
    assert Claim.read(claim.stored()) == claim and Claim.read({"text": "y", "held": [True]}) == Claim.law("y", True)
    with pytest.raises(OptionError, match="two seeds or more, got 1"):
        Claim.of_differences("x", [0.5])


def test_students_quantiles_are_those_of_scipy():
    assert [round(float(stats.t.ppf(0.975, df)), 3) for df in range(1, len(STUDENT) + 1)] == list(STUDENT)


def test_what_a_block_mask_catches_is_the_sum_by_loops():
    n, weights = 7, torch.rand(2, 3, 7, 7, dtype=torch.float64).softmax(dim=-1)
    for mask in ((1, 2), (2, 1), (2, 3, 1)):
        size = -(-n // len(mask))
        by_hand = [
            sum(float(row[i][j]) for i in range(n) for j in range(n) if j // size + 1 == mask[i // size]) / n
            for row in weights.reshape(-1, n, n)
        ]
        assert blocks.caught(weights, mask).flatten().tolist() == pytest.approx(by_hand, abs=1e-12)
    assert blocks.caught(torch.eye(6), (1, 2, 3)) == 1 and blocks.caught(torch.eye(6), (2, 3, 1)) == 0
    whole = sum(blocks.caught(weights, mask) for mask in ((1, 2, 3), (2, 3, 1), (3, 1, 2)))
    assert torch.allclose(whole, torch.ones_like(whole))  # three shifts see every pair once
    with pytest.raises(OptionError, match="one of 1 to 2, each once"):
        blocks.caught(weights, (1, 1))


def test_filters_are_ordered_by_the_sum_of_their_weights_and_a_net_without_them_is_as_by_hand():
    torch.manual_seed(0)
    net = Convolutional((8, 8), channels=(4, 6), kernel=3, padding=1, hidden=(8, 8))
    weight = net.filters()[0].weight
    sizes = [sum(abs(float(w)) for w in filters_.flatten()) for filters_ in weight]
    assert filters.order(weight, "smallest first") == sorted(range(4), key=sizes.__getitem__)
    assert filters.order(weight, "largest first") == sorted(range(4), key=sizes.__getitem__, reverse=True)
    assert sorted(filters.order(weight, "random", 3)) == [0, 1, 2, 3]
    with pytest.raises(OptionError, match="got 'middle'"):
        filters.order(weight, "middle")
    data = Examples({"pixels": torch.randn(40, 1, 8, 8)}, torch.randint(10, (40,)))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = filters.accuracy_without(net, [[1, 2], [0]], data)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.filters()[0].register_forward_hook(lambda part, x, y: y * torch.tensor([1.0, 0, 0, 1])[:, None, None])
    net.filters()[1].register_forward_hook(lambda part, x, y: y * torch.tensor([0.0, 1, 1, 1, 1, 1])[:, None, None])
    assert found == accuracy(net, data)


def test_the_best_low_rank_map_leaves_the_rest_of_the_spectrum_and_nothing_at_full_rank():
    data = recovery.teacher(6, "full", 0)
    change = torch.linalg.lstsq(data.inputs[0], data.change[0]).solution
    values = torch.linalg.svdvals(change)
    assert recovery.low_rank_error(data, 6) < 1e-24
    for rank in (1, 3):  # of white inputs, up to what 2,048 of them differ from white
        rest = float(values[rank:].square().sum() / values.square().sum())
        assert recovery.low_rank_error(data, rank) == pytest.approx(rest, rel=0.1)
    with pytest.raises(OptionError, match="'full' or 'mlp', got 'half'"):
        recovery.teacher(6, "half", 0)


def test_an_adapter_of_the_width_of_the_mlp_comes_nearer_to_it_than_any_linear_map():
    data = recovery.teacher(4, "mlp", 0)
    assert recovery.adapter_error(data, 4, steps=150, seed=0) < recovery.low_rank_error(data, 4) / 2


def test_a_domain_trains_what_it_says_and_the_network_starts_as_it_was():
    torch.manual_seed(0)
    base = resnet.ResNet(channels=4, blocks=2).eval()
    pixels = torch.randn(3, 1, 8, 8)
    head, norms, adapters = 4 * 10 + 10, 5 * 2 * 4, 5 * 4 * 4
    numbers = {"head": head, "norms": head + norms, "adapters": head + adapters}
    numbers |= {"adapters and norms": head + norms + adapters, "full": sum(p.numel() for p in base.parameters())}
    for way in resnet.WAYS:
        net = copy.deepcopy(base)
        assert resnet.specialise(net, way) == numbers[way], way
        assert torch.equal(net.eval()(pixels).logits, base(pixels).logits), way


def test_a_residual_block_is_its_formula_and_training_moves_only_what_is_trained():
    torch.manual_seed(0)
    block = resnet.Residual(3, 1).double().eval()
    for norm in block.norms:
        torch.nn.init.normal_(norm.running_mean)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def normal(y, part):
        y = (y - part.running_mean[:, None, None]) / (part.running_var + part.eps)[:, None, None].sqrt()
        return y * part.weight[:, None, None] + part.bias[:, None, None]

    inner = normal(torch.conv2d(x, *block.convolutions[0].parameters(), padding=1), block.norms[0]).clamp(min=0)
    by_hand = x + normal(torch.conv2d(inner, *block.convolutions[1].parameters(), padding=1), block.norms[1])
    assert torch.allclose(block(x), by_hand.clamp(min=0), atol=1e-12)
    net = resnet.ResNet(channels=4, blocks=1)
    resnet.specialise(net, "adapters and norms")
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    data = Examples({"pixels": torch.randn(16, 1, 8, 8)}, torch.randint(10, (16,)))
    resnet.train(net, data.stream(8, 0), 3, 1e-2)
    for key, p in net.named_parameters():
        assert p.requires_grad != torch.equal(p, before[key]), key


def test_experts_of_tokens_are_those_of_the_router_and_their_information_is_the_definition(tiny):
    torch.manual_seed(0)
    model = effzoo.build("gpt2", task="causal_lm", experts=3, router="switch", **tiny).eval()
    ids = torch.randint(tiny["vocab"], (2, 9))
    first, second = expert_use.chosen(model, ids)
    router = model.blocks[0].mlp.router
    seen = []
    with torch.no_grad():
        hook = router.register_forward_pre_hook(lambda part, given: seen.append(given[0]))
        model(input_ids=ids)
        hook.remove()
    assert torch.equal(first.flatten(), (seen[0] @ router.scores.weight.T).argmax(dim=-1)) and second.shape == (2, 9)
    table = expert_use.counts(first, ids, 3, tiny["vocab"])
    for expert in range(3):
        for token in range(tiny["vocab"]):
            assert table[expert, token] == int(((first == expert) & (ids == token)).sum())
    total, by_hand = int(table.sum()), 0.0
    for row in table.tolist():
        for token, count in enumerate(row):
            if count:
                apart = sum(row) * int(table[:, token].sum()) / total**2
                by_hand += count / total * math.log2(count / total / apart)
    assert expert_use.information(table) == pytest.approx(by_hand, abs=1e-12)
    assert expert_use.information(torch.eye(4)) == pytest.approx(2) and expert_use.information(torch.ones(4, 4)) == 0
    with pytest.raises(IncompatibleError, match="the model has no experts"):
        expert_use.chosen(effzoo.build("gpt2", **tiny), ids)


def test_a_network_of_ones_own_with_blocks_takes_adapters():
    """`blocks` that are no transformer's: nothing in it has projections for global tokens."""
    net = resnet.ResNet(channels=4, blocks=1)
    assert effzoo.account(effzoo.attach(net, "residual_adapter")).trainable > 0


def test_sequences_of_two_factors_are_labelled_by_the_maps_of_both():
    symbols, languages, tasks = 5, 2, 3
    ids, labels, pair = tagger.composed(400, 7, symbols, languages, tasks, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (400, 9) and bool((labels[:, :2] == -100).all())
    assert sorted(set(pair.tolist())) == list(range(6))
    assert torch.equal(ids[:, 0], 1 + pair // tasks) and torch.equal(ids[:, 1], 1 + languages + pair % tasks)
    maps = {}  # of each pair: symbol -> label
    for row, marks, number in zip((ids[:, 2:] - 6).tolist(), labels[:, 2:].tolist(), pair.tolist(), strict=True):
        for symbol, label in zip(row, marks, strict=True):
            assert maps.setdefault((number, symbol), label) == label
    assert all(sorted(maps[number, s] for s in range(symbols)) == list(range(symbols)) for number in range(6))
    for task in range(1, tasks):  # q_t q_0^-1 is the same in every language
        moved = [
            {maps[tasks * language, s]: maps[tasks * language + task, s] for s in range(symbols)}
            for language in range(languages)
        ]
        assert moved[0] == moved[1]
    other = tagger.composed(400, 7, symbols, languages, tasks, torch.Generator().manual_seed(0), variant=1)
    assert torch.equal(other[0], ids) and not torch.equal(other[1], labels)
    with pytest.raises(OptionError, match="at least 1"):
        tagger.composed(1, 0, 5, 2, 3, torch.Generator())


def test_the_share_of_labels_found_leaves_out_those_below_0():
    torch.manual_seed(0)
    model = tagger.tagger(3, 1, 4)
    ids, labels = torch.tensor([[1, 2, 3, 4], [1, 4, 3, 2]]), torch.tensor([[-100, 0, 1, 2], [-100, 2, 2, 2]])
    said = model.eval()(input_ids=ids).logits.argmax(dim=-1)
    by_hand = sum(int(said[i, j] == labels[i, j]) for i in range(2) for j in range(1, 4)) / 6
    assert tagger.right(model.train(), ids, labels) == pytest.approx(by_hand) and model.training


def test_one_digit_is_marked_and_is_the_class():
    examples = marked(300, 6, 0)
    ids = examples.inputs["input_ids"]
    assert ids.shape == (300, 7) and bool((ids[:, 0] == 1).all()) and set(examples.labels.tolist()) == set(range(10))
    places = set()
    for row, label in zip(ids.tolist(), examples.labels.tolist(), strict=True):
        (place,) = (i for i, token in enumerate(row) if token >= 12)
        places.add(place)
        assert row[place] - 12 == label and all(2 <= token < 12 for token in row[1:place] + row[place + 1 :])
    assert places == set(range(1, 7))
