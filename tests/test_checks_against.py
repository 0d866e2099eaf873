"""A check against a reference: right solutions are green, however they are stored; own work is told from calls."""

import pytest
import torch
from slips import ATTENTION, LOW_RANK, WINDOW

import effzoo
from effzoo.checks.against import read
from effzoo.errors import OptionError, UnknownNameError

UP_TO_REFERENCE = {"every_length", "is_no_known_slip", "equals_reference"}
METHOD = {"attaches", "tensors_are_registered", "everything_learns", "equals_reference"}


def checked(tmp_path, text, name="mine", only=None, **how):
    file = tmp_path / "mine.py"
    file.write_text(text)
    kind = "peft" if "PeftModule" in text else "attention"
    against = read(how.pop("against"), [kind])
    with effzoo.scope():
        effzoo.load_file(file)
        return effzoo.check(kind, name, only=only, against=against, **how)


def test_a_right_window_equals_the_reference_though_it_has_no_definition(tmp_path):
    report = checked(tmp_path, ATTENTION, only=UP_TO_REFERENCE, against=WINDOW)
    assert report.verified and report.compared_with == WINDOW, f"\n{report}"


def test_options_of_the_reference_are_those_of_the_file_where_it_has_them(tmp_path):
    report = checked(
        tmp_path, ATTENTION, only=UP_TO_REFERENCE, against="longformer[window=4, global_projections=false]"
    )
    assert report.verified and report.subject == "mine[window=4]"
    report = checked(tmp_path, ATTENTION, name="mine[window=6]", only=UP_TO_REFERENCE, against=WINDOW)
    assert not report.ok and "half" not in report.failures[0].reason


DENSE = """
import torch

def dense(q, k, v, *, valid, causal):
    out = torch.zeros_like(q)
    batch, heads, n, d = q.shape
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=q.dtype)
    for i in range(n):
        seen = [j for j in range(n) if abs(i - j) <= 4 and (j <= i or not causal)]
        scores = (q[:, :, i, None] * k[:, :, seen]).sum(-1) / d**0.5
        there = valid[:, None, seen].expand_as(scores)
        weights = scores.masked_fill(~there, -1e300).softmax(-1) * there
        out[:, :, i] = (weights[..., None] * v[:, :, seen]).sum(2)
    return out
"""


def test_a_function_of_an_instructor_is_a_reference_and_names_the_slip(tmp_path):
    (tmp_path / "dense.py").write_text(DENSE)
    against = str(tmp_path / "dense.py")
    assert checked(tmp_path, ATTENTION, only=UP_TO_REFERENCE, against=against).verified
    wrong = ATTENTION.replace("<= self.reach", "< self.reach")
    report = checked(tmp_path, wrong, only=UP_TO_REFERENCE, against=f"{against}:dense")
    assert "1 narrower at both ends" in report.failures[0].reason
    with pytest.raises(OptionError, match="no function 'other' and registers nothing"):
        read(f"{against}:other")
    with pytest.raises(UnknownNameError, match="did you mean 'longformer'"):
        read("longfromer")
    with pytest.raises(OptionError, match="is a reference of peft"):
        effzoo.check("attention", "full", against=read("lora"))


def test_one_mistake_in_pattern_and_forward_is_red_against_the_reference_alone(tmp_path):
    both = '''
from effzoo.attention import PredicateAttention, register

@register("mine")
class Mine(PredicateAttention):
    """Keys at most 4 away."""
    def visible(self, query, key):
        return (query - key).abs() < 4
'''
    only = {"every_length", "is_no_known_slip", "equals_definition"}
    report = checked(tmp_path, both, only=only | UP_TO_REFERENCE, against=WINDOW)
    assert "1 narrower at both ends" in report.failures[0].reason
    with effzoo.scope():
        effzoo.load_file(tmp_path / "mine.py")
        assert effzoo.check("attention", "mine", only=only).ok


@pytest.mark.parametrize("spec", ["linformer", "lsh", "blockwise", "perceiver"])
def test_a_kind_equals_itself_with_its_parameters(spec):
    report = effzoo.check("attention", spec, only=UP_TO_REFERENCE, against=spec)
    assert report.ok and report.result("equals_reference").status == "green", f"\n{report}"


@pytest.mark.parametrize("spec", ["houlsby", "prefix", "pals", "dora", "unipelt", "bitfit", "ia3", "compacter"])
def test_a_method_equals_itself_with_its_factors(spec):
    report = effzoo.check("peft", spec, only={"equals_reference"}, against=spec)
    assert report.verified, f"\n{report}"


@pytest.mark.parametrize(
    ("names", "turned"),
    [(("A", "B"), False), (("A", "B"), True), (("down", "up"), False), (("down", "up"), True), (("B", "A"), False)],
)
def test_factors_may_have_other_names_and_be_stored_transposed(tmp_path, names, turned):
    text = LOW_RANK.replace("self.A", "self.first").replace("self.B", "self.second")
    if turned:
        text = text.replace("torch.randn(rank, n_in)", "torch.randn(n_in, rank)").replace("self.first.T", "self.first")
        text = text.replace("self.first.to(weight)", "self.first.to(weight).T")
    text = text.replace("self.first", f"self.{names[0]}").replace("self.second", f"self.{names[1]}")
    report = checked(tmp_path, text, only=METHOD, against="lora[rank=4, alpha=8.0]")
    assert report.verified, f"\n{report}"


def test_a_dense_function_of_a_method_is_given_factors_and_options_by_name(tmp_path):
    dense = (
        "def dense(x, weight, bias, *, A, B, rank, alpha):\n    return x @ (weight + alpha / rank * B @ A).T + bias\n"
    )
    (tmp_path / "dense.py").write_text(dense)
    against = str(tmp_path / "dense.py")
    assert checked(tmp_path, LOW_RANK, only=METHOD, against=against).verified
    wrong = LOW_RANK.replace("self.alpha / self.rank", "self.alpha * self.rank")
    assert "alpha * rank" in checked(tmp_path, wrong, only=METHOD, against=against).failures[0].reason


OWN = [
    (ATTENTION, WINDOW, None),
    (LOW_RANK, "lora[rank=4]", None),
    (
        "import effzoo\nfrom effzoo.attention import register\nfrom effzoo.attention.longformer import Longformer\n"
        "@register('mine')\nclass Mine(Longformer):\n    '''Derived.'''\n",
        WINDOW,
        "derives from Longformer",
    ),
    (
        ATTENTION.replace("return weights @ v", "return reference.dense(q, k, v, allowed)").replace(
            "import math", "import math\nfrom effzoo.attention import reference"
        ),
        WINDOW,
        "it calls dense of reference.py",
    ),
    (
        ATTENTION.replace(
            "return weights @ v",
            "import importlib\n        other = importlib.import_module('effzoo.attention.longformer')\n"
            "        return other.Longformer(self.context, window=8, global_projections=False)(q, k, v, mask=mask)",
        ),
        WINDOW,
        "of longformer.py",
    ),
    (
        ATTENTION.replace("return weights @ v", "import sys\n        sys.setprofile(None)\n        return weights @ v"),
        WINDOW,
        "turned off the observer",
    ),
    (
        LOW_RANK.replace("class Low(PeftModule)", "from effzoo.peft.parameter.lora import LowRank\nclass Low(LowRank)")
        .replace("super().__init__()\n        self.A", "super().__init__(n_in, n_out, rank, scale, p)\n        self.A"),
        "lora[rank=4]",
        "derives from LowRank",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "against", "said"), OWN, ids=lambda value: None)
def test_own_work_is_told_from_what_is_derived_or_called(tmp_path, text, against, said):
    text = text if "PeftModule" in text or "attention" in text else f"from effzoo.peft import PeftModule\n{text}"
    report = checked(
        tmp_path, text, only={"every_length", "attaches", "is_own_work"} & _known(text), against=against, own=True
    )
    assert report.ok if said is None else said in report.failures[0].reason, f"\n{report}"


def _known(text):
    return {
        check.__name__ for check in effzoo.checks.checks_of("peft" if "PeftModule" in text else "attention", True, True)
    }


def test_the_random_state_is_left_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    checked(tmp_path, ATTENTION, only=UP_TO_REFERENCE, against=WINDOW)
    assert torch.equal(before, torch.get_rng_state())
