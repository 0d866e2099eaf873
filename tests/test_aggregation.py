"""Adapters combined into one: against the definitions on the changes themselves, in float64, and the laws of sums."""

import copy
import itertools
import math

import pytest
import torch

import effzoo
from effzoo.errors import AdapterError, OptionError, UnknownNameError
from effzoo.peft import combine, delta
from effzoo.peft.aggregation import HOWS
from effzoo.sites import sites
from tests.support import labelled

EXACT = {"rtol": 1e-10, "atol": 1e-12}
METHODS = {"a": "lora[rank=2]", "b": "ia3", "c": "bitfit", "d": "krona", "e": "full[targets=(attn.q, embed.norm)]"}


def moved(model, name, seed):
    """The adapter's tensors, moved away from where they start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))


def built(methods, tiny, task="features"):
    torch.manual_seed(0)
    model = effzoo.build("bert", task=task, **tiny).double().eval()
    for seed, (name, method) in enumerate(methods.items()):
        effzoo.attach(model, method, name=name)
        moved(model, name, seed)
    return model


def total(model, weights):
    """The definition of a sum, tensor by tensor."""
    found = {}
    for name, weight in weights.items():
        for key, change in delta(model, name).items():
            found[key] = found.get(key, 0) + weight * change
    return found


def close(found, wanted):
    for key in found.keys() | wanted.keys():
        zero = torch.zeros_like(found[key] if key in found else wanted[key])
        torch.testing.assert_close(found.get(key, zero), wanted.get(key, zero), **EXACT)


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.5, "b": -2.0, "c": 0.3, "d": 1.0, "e": 0.25}])
def test_a_sum_across_methods_is_the_sum_of_their_changes(weights, tiny):
    model = built(METHODS, tiny)
    combine(model, weights, name="sum")
    close(delta(model, "sum"), total(model, weights))
    assert effzoo.peft.attached(model).keys() == {*METHODS, "sum"} and all(
        site.active in ((), ("sum",)) for _, site in sites(model)
    )
    inputs = {"input_ids": labelled()["input_ids"]}
    base = copy.deepcopy(model)
    merged = effzoo.merge(copy.deepcopy(model), "sum")
    torch.testing.assert_close(
        model(**inputs).last_hidden_state, merged(**inputs).last_hidden_state, rtol=1e-9, atol=1e-9
    )
    effzoo.peft.activate(base)
    assert not torch.allclose(model(**inputs).last_hidden_state, base(**inputs).last_hidden_state)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("method", METHODS.values())
def test_one_adapter_at_weight_one_is_itself_and_minus_itself_is_nothing(how, method, tiny):
    model = built({"a": method}, tiny)
    combine(model, {"a": 1.0}, name="same", how=how)
    close(delta(model, "same"), delta(model, "a"))
    effzoo.attach(model, method, name="twin")
    for _, site in sites(model):
        if "twin" in site.adapters:
            site.of("twin").load_state_dict(site.of("a").state_dict())
    combine(model, {"a": 1.0, "twin": -1.0}, name="nothing", how=how, drop=0.0)
    assert max(float(x.detach().abs().max()) for x in delta(model, "nothing").values()) < 1e-15


@pytest.mark.parametrize("method", ["diff[targets=attn.q]", "diff|ia3", "head_pruning", "lora[dropout=0.5]"])
def test_what_an_adapter_changes_is_what_merging_adds_and_no_draw_of_training(method, tiny):
    model = built({"a": method}, tiny)
    expected, random = delta(model, "a"), torch.get_rng_state()
    found, modes = delta(model.train(), "a"), [module.training for module in model.modules()]
    assert all(modes) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, expected[key]) for key, x in found.items())
    before = {key: x.clone() for key, x in model.state_dict().items()}
    effzoo.merge(model, "a")
    assert all(
        torch.allclose(x - before[key], expected.get(key, torch.zeros_like(x)), **EXACT)
        for key, x in model.state_dict().items()
    )


def test_no_products_of_the_factors_of_different_adapters(tiny):
    model = built({"a": "lora[rank=2]", "b": "lora[rank=2]"}, tiny)
    result = combine(model, {"a": 0.7, "b": 0.3}, name="both", rank=4)
    close(delta(model, "both"), total(model, {"a": 0.7, "b": 0.3}))
    assert result.worst < 1e-12 and result.spec.startswith("lora[")
    a, b = (dict(sites(model))["blocks.0.attn.q"].of(name)["lora"] for name in "ab")
    factors = (0.7 * a.B + 0.3 * b.B) @ (0.7 * a.A + 0.3 * b.A)
    assert not torch.allclose(factors, delta(model, "both")["blocks.0.attn.q.weight"], atol=1e-3)


def test_a_rank_holds_the_best_approximation_and_says_what_it_cuts_off(tiny):
    model = built({"a": "lora[rank=3]", "b": "lora[rank=2]"}, tiny)
    result = combine(model, {"a": 1.0, "b": 1.0}, name="cut", rank=2)
    wanted, found = total(model, {"a": 1.0, "b": 1.0}), delta(model, "cut")
    for key, change in wanted.items():
        if key in result.truncation:
            tail = torch.linalg.svdvals(change)[2:]
            assert math.isclose(float((found[key] - change).norm()), float(tail.norm()), rel_tol=1e-9)
            assert math.isclose(result.truncation[key], float(tail.norm() / change.norm()), rel_tol=1e-9)
    assert 0 < result.worst < 1
    with pytest.raises(AdapterError, match="leave rank out"):
        combine(built({"a": "bitfit"}, tiny), {"a": 1.0}, name="cut", rank=2)


def test_ties_is_its_definition(tiny):
    model = built({"a": "lora[rank=2]", "b": "lora[rank=2, targets=(attn.q, attn.k)]", "c": "ia3"}, tiny)
    weights, keep = {"a": 1.0, "b": -0.5, "c": 2.0}, 0.3
    combine(model, weights, name="ties", how="ties", keep=keep)
    own = {name: {key: w * x for key, x in delta(model, name).items() if x.any()} for name, w in weights.items()}
    for each in own.values():  # trim over the whole change of an adapter
        entries = sorted((abs(v) for x in each.values() for v in x.flatten().tolist()), reverse=True)
        least = entries[round(keep * len(entries)) - 1]
        for x in each.values():
            x[x.abs() < least] = 0
    found = delta(model, "ties")
    for key in {key for each in own.values() for key in each}:
        stacked = [each[key].flatten().tolist() for each in own.values() if key in each]
        expected = []
        for entry in zip(*stacked, strict=True):
            sign = math.copysign(1, sum(entry)) if sum(entry) else 0
            agreeing = [v for v in entry if v and math.copysign(1, v) == sign]
            expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        torch.testing.assert_close(found[key].flatten(), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_dare_drops_and_rescales(tiny):
    model = built({"a": "lora[rank=2]", "b": "lora[rank=2, targets=(attn.k,)]"}, tiny)
    mean, times = {}, 40
    for seed in range(times):
        combine(model, {"a": 1.0, "b": 1.0}, name="dare", how="dare", drop=0.75, seed=10 * seed)
        found = delta(model, "dare")
        effzoo.detach(model, "dare")
        for key, change in total(model, {"a": 1.0, "b": 1.0}).items():
            kept = (found[key] != 0) | (change == 0)
            torch.testing.assert_close(found[key][kept], 4 * change[kept], **EXACT)
            if change.any():
                mean[key] = mean.get(key, 0) + kept.double().mean() / times
    assert all(abs(float(share) - 0.25) < 0.05 for share in mean.values())
    for first, second in itertools.pairwise(_dare(model, seed) for seed in (3, 3)):
        close(first, second)


def _dare(model, seed):
    combine(model, {"a": 1.0, "b": 1.0}, name="dare", how="dare", seed=seed)
    found = delta(model, "dare")
    effzoo.detach(model, "dare")
    return found


def test_the_head_is_that_of_the_adapter_that_is_named(tiny, tmp_path):
    model = built({"a": "lora", "b": "lora[targets=(attn.k,)]"}, tiny, task="classification")
    with pytest.raises(AdapterError, match="head='a'"):
        combine(model, {"a": 1.0, "b": 1.0}, name="both")
    combine(model, {"a": 1.0, "b": 1.0}, name="both", head="b")
    heads = [site for _, site in sites(model) if site.role == "head.out"]
    assert torch.equal(heads[0].of("both")["head"].own_weight, heads[0].of("b")["head"].own_weight)
    inputs = {"input_ids": labelled()["input_ids"]}
    effzoo.save_adapter(model, tmp_path, name="both")
    torch.manual_seed(0)
    fresh = effzoo.load_adapter(effzoo.build("bert", task="classification", **tiny).double().eval(), tmp_path)
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("weights", "choices", "error", "message"),
    [
        ({}, {}, OptionError, "at least one adapter"),
        ({"z": 1.0}, {}, UnknownNameError, "adapter"),
        ({"a": 1.0}, {"how": "slerp"}, OptionError, "how is 'sum' or 'ties' or 'dare', got 'slerp'"),
        ({"a": 1.0, "b": 1.0}, {}, AdapterError, "cannot be merged"),
        ({"a": 1.0}, {"rank": 0}, OptionError, "rank is at least 1"),
        ({"a": 1.0}, {"keep": 0.0}, OptionError, "keep is in"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_the_model_stays(weights, choices, error, message, tiny):
    model = built({"a": "lora", "b": "prefix[length=2]"}, tiny)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        combine(model, weights, name="new", **choices)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert effzoo.peft.attached(model).keys() == {"a", "b"}
