"""NaN, infinity, complex and huge numbers: refused where they come in, and never made finite on the way."""

import copy
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import effzoo
import effzoo.data
from effzoo.annotations import Count, Number, Positive, Probability, Range, Share, Whole, describe, problem
from effzoo.attention import Part, attend
from effzoo.attention.kernel import _plain
from effzoo.errors import AdapterError, DataError, EffzooError, OptionError, SpecError, UnknownNameError

NAN, INF = math.nan, math.inf
SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50, "max_length": 32}


@pytest.mark.parametrize(
    ("annotation", "accepted", "refused"),
    [
        (
            Count,
            [1, 2**40, np.int64(3), np.uint8(1)],
            [0, -1, 2**63, True, np.True_, 1.0, np.float64(1), "1", "16", 1j, None, Fraction(2), Decimal(2)],
        ),
        (Whole, [0, 5], [-1, False, 10**400]),
        (
            Number,
            [0, -3, 1.5, np.float32(0.5), -0.0, 1_000_000],
            [NAN, INF, -INF, 1e7, 1j, "1", True, Fraction(1, 2), Decimal("1"), 10**400],
        ),
        (Positive, [1e-9, 1], [0, -0.0, 0.0, -1, NAN, INF]),
        (Share, [1, 1.0, 0.5], [0, 1.1, NAN, -INF]),
        (Probability, [0, 0.0, 0.999], [1, 1.0, -0.1, NAN]),
        (int | float | None, [None, 3, 2.5], [NAN, "x", True, 1j]),
        (dict[str, Count], [{}, {"a": 1}], [{"a": 0}, {1: 1}, {"a": NAN}, [("a", 1)]]),
    ],
    ids=lambda value: describe(value) if not isinstance(value, list) else "",
)
def test_what_a_range_takes(annotation, accepted, refused):
    assert [value for value in accepted if problem(value, annotation)] == []
    assert [value for value in refused if not problem(value, annotation)] == []


def test_a_broken_range_says_which_end():
    assert problem(0, Count) == "is at least 1, got 0"
    assert problem(NAN, Number) == "is a finite number, got nan"
    assert problem((1, -2), tuple[Count, ...]) == "is at least 1, got (1, -2)"
    assert problem(10**999, Count).startswith("is a number of at most 63 bits, got a whole number of 3,319 bits")
    assert problem("x", Count) == "takes int (at least 1), got 'x' (str)"
    assert str(Range(0.0, 1.0, above=True)) == "in (0, 1]"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_a_nan_score_gives_a_nan_output_and_gradient_as_the_definition_does(dtype, value, causal):
    """Against the scores written out: rows that are NaN there are NaN here, the others are equal."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=dtype) for _ in range(3))
    q[0, 1, 2, :2] = value
    if value == 1e30:
        k[0, 1, :, 0], k[0, 1, :, 1] = value, -value
    part = Part(q.requires_grad_(), k, v, causal=causal)
    out, expected = attend(part), _plain((part,), 0.0)[0]
    if value != 1e30 or dtype != torch.float64:  # whose products float64 holds
        assert bool(expected[0, 1, 2].isnan().all()) and not bool(expected[0, 0].isnan().any())
    torch.testing.assert_close(out[0, 0], expected[0, 0], rtol=1e-2, atol=1e-2)
    assert torch.equal(out.isnan().any(-1), expected.isnan().any(-1))
    (found,) = torch.autograd.grad(out.sum(), q)
    assert bool(found[0, 1, 2].isnan().any()) == bool(expected[0, 1, 2].isnan().any())


def test_a_score_of_zero_is_no_nan():
    q, k, v = torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    assert torch.equal(attend(Part(q, k, v)), v.expand(1, 1, 3, 4))


@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_a_model_whose_queries_are_nan_has_no_finite_output(kind):
    for base in ("bert", "gpt2"):
        for weight in ("q", "k", "v"):
            for dropout in (0.0, 0.1):
                try:
                    model = effzoo.build(base, **SIZES, attention=kind, attention_dropout=dropout)
                except EffzooError:
                    continue
                projection = getattr(model.blocks[0].attn, weight, None)
                if projection is not None:
                    torch.nn.init.constant_(projection.weight, NAN)
                    out = model(input_ids=torch.ones(1, 20, dtype=torch.long)).last_hidden_state
                    assert not bool(out.isfinite().any()), (base, weight, dropout)


@pytest.mark.slow
def test_nan_reaches_the_output_of_compiled_code():
    q = torch.full((1, 2, 5, 8), NAN)
    k = v = torch.randn(1, 2, 5, 8)
    assert bool(torch.compile(lambda q, k, v: attend(Part(q, k, v)), fullgraph=True)(q, k, v).isnan().all())


def trained(names):
    torch.manual_seed(0)
    model = effzoo.build("bert", **SIZES).eval()
    for name in names:
        effzoo.attach(model, "lora[rank=2]", name=name)
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("weight", [NAN, INF, -INF, 1e39, 1j, "1", None, True, 10**400, Decimal(1)], ids=str)
def test_a_weight_that_is_no_number_combines_nothing(weight):
    model = trained(["a", "b"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EffzooError, match="combine: weights"):
        effzoo.combine(model, {"a": 1.0, "b": weight}, name="c")
    assert list(effzoo.attached(model)) == ["a", "b"] and all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )


def test_an_adapter_that_holds_nan_is_not_combined():
    model = trained(["a", "b"])
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if ".adapters.b." in key)[0, 0] = NAN
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        effzoo.combine(model, {"a": 1.0, "b": 1.0}, name="c")


def test_ties_with_an_adapter_that_has_learned_nothing_is_what_the_other_keeps():
    model = trained(["a"])
    effzoo.attach(model, "lora[rank=2]", name="fresh")
    effzoo.combine(model, {"a": 2.0, "fresh": 1.0}, name="c", how="ties", keep=0.3)
    change, made = effzoo.peft.delta(model, "a"), effzoo.peft.delta(model, "c")
    change = {key: value for key, value in change.items() if value.any()}
    flat = torch.cat([2.0 * change[key].abs().flatten() for key in change])
    least = flat.topk(round(0.3 * len(flat))).values[-1]
    for key in change:
        expected = 2.0 * change[key]
        torch.testing.assert_close(
            made[key].double(), torch.where(expected.abs() >= least, expected, 0.0), rtol=1e-5, atol=1e-7
        )
    with pytest.raises(AdapterError, match="change nothing"):
        effzoo.combine(model, {"fresh": 1.0}, name="d", how="ties")


def test_arguments_that_name_nothing_or_no_size_are_refused():
    model = trained(["a"])
    for call, error, said in [
        (lambda: effzoo.attach(model, [], name="b"), SpecError, "an empty list"),
        (lambda: effzoo.peft.finish(model, "nosuch"), UnknownNameError, "unknown adapter 'nosuch'"),
        (lambda: effzoo.peft.within(model, "lora", NAN), EffzooError, "trainable takes int"),
        (lambda: effzoo.peft.within(model, "lora", -1), OptionError, "trainable is at least 1"),
        (lambda: effzoo.peft.within(model, "lora", 10**11), OptionError, "trains fewer than 100,000,000,000"),
        (lambda: effzoo.peft.schedule(model, 1.5), OptionError, "progress is in"),
        (
            lambda: effzoo.build("bert", num_labels=0, task="classification", **SIZES),
            OptionError,
            "num_labels is at least 1",
        ),
        (
            lambda: effzoo.build("bert", task="classification", num_labels=2.0, **SIZES),
            EffzooError,
            "num_labels takes int",
        ),
        (lambda: effzoo.quantise(model, 5), OptionError, "bits is 8"),
        (lambda: effzoo.plan("bert", batch=0, **SIZES), OptionError, "batch is at least 1"),
    ]:
        with pytest.raises(error, match=said):
            call()


def test_text_and_label_are_two_columns(tmp_path):
    file = Path(tmp_path) / "a.csv"
    file.write_text("text,label\na,b\nc,d\n")
    with pytest.raises(DataError, match="is read as text and named as the label"):
        effzoo.data.load_text(file, label="text")


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 2.5}, {"max_new_tokens": True}, {"max_new_tokens": 0}, {"top_p": NAN, "do_sample": True},
    {"num_beams": 0},
     {"num_beams": 2.0},
     {"eos_token_id": NAN}, {"eos_token_id": [1, "x"]}, {"length_penalty": NAN, "num_beams": 2},
     {"repetition_penalty": INF}, {"min_new_tokens": -1},
     {"top_k": 1.5, "do_sample": True}, {"num_return_sequences": -1}, {"temperature": NAN, "do_sample": True},
     {"do_sample": "yes"}],
    ids=str,
)  # fmt: skip
def test_generate_refuses_numbers_that_are_none(options):
    model = effzoo.build("gpt2", **SIZES, task="causal_lm")
    with pytest.raises(OptionError, match=next(iter(options))):
        effzoo.generate(model, torch.ones(1, 3, dtype=torch.long), **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("value", [NAN, INF, 0, -2, "x", True, 10**400], ids=lambda value: str(value)[:5])
def test_seeds_rounds_and_scalings_are_checked_where_they_are_set(value):
    core = next(effzoo.build("bert", **SIZES, attention="lsh[chunk=8]").cores())
    for change in (lambda: core.resample(value), lambda: setattr(core, "rounds", value)):
        if value != 0 or change.__code__.co_names[0] != "resample":  # 0 is a seed
            with pytest.raises(OptionError, match="lsh: (seed|rounds)"):
                change()
    with pytest.raises(OptionError, match="factor"):
        effzoo.build("bert", **SIZES, positions="rotary", rotary_scaling={"type": "linear", "factor": value})
