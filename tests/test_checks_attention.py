"""Broken attention kinds: each must be caught by the check that is meant for it.

Small slips are classes here; those built on the efficient kinds are files in `mutants/`, and each file names its check.
"""

import ast
from pathlib import Path

import pytest
import torch

import effzoo
from effzoo.attention import AttentionCore, Mask, Part, memory_part
from effzoo.attention.full import Full
from effzoo.attention.longformer import Longformer
from effzoo.checks import KINDS
from effzoo.registry import load_file

MUTANTS: dict[str, list[type]] = {}


def caught_by(check: str):
    def mark(cls: type) -> type:
        MUTANTS.setdefault(check, []).append(cls)
        return cls

    return mark


class Patternless(AttentionCore):
    """Full attention that declares no pattern, so that only the other checks can catch it."""

    cost = "n^2"

    def forward(self, q, k, v, *, mask, memory=None):
        return self.attend(Part(q, k, v, mask.key_bias(q.dtype), causal=self.context.causal), memory_part(q, memory))


@caught_by("positions_computed_alone")
class OtherRows(Full):
    """Its rows see themselves no more than the padding."""

    def forward_at(self, wanted, q, k, v, *, mask, memory=None):
        return super().forward_at(wanted - 1, q, k, v, mask=Mask(), memory=memory)


@caught_by("declares_itself")
class SwallowsKeywords(Full):
    """Takes any keyword."""

    def forward(self, q, k, v, *, mask, memory=None, **ignored):
        return super().forward(q, k, v, mask=mask, memory=memory)


@caught_by("declares_itself")
class PositionalOption(Full):
    """Its option cannot be set by a spec."""

    def __init__(self, context, blocks: int = 4):
        super().__init__(context)


@caught_by("declares_itself")
class WrongDefault(Full):
    """Its default is not of the type it declares."""

    def __init__(self, context, *, blocks: int = "four"):
        super().__init__(context)


@caught_by("declares_itself")
class Costless(AttentionCore):
    """Does not say what it costs."""

    def forward(self, q, k, v, *, mask, memory=None):
        return self.attend(Part(q, k, v, mask.key_bias(q.dtype), causal=self.context.causal), memory_part(q, memory))


@caught_by("declares_itself")
class Undocumented(Full):
    pass


@caught_by("shape_and_dtype")
class AlwaysFloat32(Full):
    """Computes in float32 and forgets to go back."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q.float(), k.float(), v.float(), mask=mask, memory=memory)


@caught_by("every_length")
class OnlyWholeBlocks(Full):
    """Folds into blocks of 8 without padding."""

    def forward(self, q, k, v, *, mask, memory=None):
        if q.shape[2] > 16:
            q.unflatten(2, (-1, 31 if q.shape[2] == 31 else 8))
        else:
            q.unflatten(2, (-1, 8))
        return super().forward(q, k, v, mask=mask, memory=memory)


@caught_by("every_length")
class PaddedOutput(Patternless):
    """Pads to a multiple of 31 and returns the padding."""

    def forward(self, q, k, v, *, mask, memory=None):
        out = super().forward(q, k, v, mask=mask, memory=memory)
        return torch.nn.functional.pad(out, (0, 0, 0, -q.shape[2] % 31))


@caught_by("is_no_known_slip")
class WrongScale(Full):
    """Divides by d instead of the square root of d."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q / q.shape[-1] ** 0.5, k, v, mask=mask, memory=memory)


class AutocastOff(Patternless):
    """Computes in the precision of its inputs, on every device."""

    def forward(self, q, k, v, *, mask, memory=None):
        with torch.autocast(q.device.type, enabled=False):
            return super().forward(q, k, v, mask=mask, memory=memory)


def test_autocast_may_be_turned_off_by_the_type_of_the_device():
    with effzoo.scope():
        effzoo.attention.register("off")(AutocastOff)
        assert effzoo.check("attention", "off", only=with_needs("devices")).ok
    with pytest.raises(RuntimeError, match="scalarType|meta"):  # torch as it was
        torch.autocast("meta", enabled=False)


@caught_by("equals_definition")
class OtherTemperature(Full):
    """A scale that nobody would take by mistake."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q * 1.07, k, v, mask=mask, memory=memory)


@caught_by("equals_definition")
class ForwardOnly(Full):
    """Right values; but the gradient of the keys is lost."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k.detach(), v, mask=mask, memory=memory)


def naive(q, k, v, allowed):
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(dim=-1) @ v


@caught_by("empty_queries_are_zero")
class NaNOnEmptyRows(Full):
    """The textbook softmax."""

    def forward(self, q, k, v, *, mask, memory=None):
        return naive(q, k, v, self.pattern(q.shape[2], mask))


@caught_by("empty_queries_are_zero")
class NaNOnlyInGradient(Full):
    """Replaces the NaN after the fact, which does not help the gradient."""

    def forward(self, q, k, v, *, mask, memory=None):
        out = naive(q, k, v, self.pattern(q.shape[2], mask))
        return torch.where(out.isnan(), 0.0, out)


@caught_by("empty_queries_are_zero")
class UniformOnEmptyRows(Full):
    """Masks with a large negative number, so an empty row becomes the mean of everything."""

    def forward(self, q, k, v, *, mask, memory=None):
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~self.pattern(q.shape[2], mask), -1e4)
        return scores.softmax(dim=-1) @ v


@caught_by("padding_is_invisible")
class IgnoresPadding(Patternless):
    """Never looks at mask.valid."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k, v, mask=Mask(), memory=memory)


@caught_by("padding_is_invisible")
class MeanOverPadding(Patternless):
    """Centres the values over all positions, padding included."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k, v - v.mean(dim=2, keepdim=True), mask=mask, memory=memory)


@caught_by("ragged_equals_alone")
class DependsOnPaddedLength(Patternless):
    """Scales with the length of the padded batch."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q * torch.tensor(q.shape[2] + 1.0).log(), k, v, mask=mask, memory=memory)


@caught_by("future_is_unseen")
class LeaksTheFuture(Patternless):
    """Forgets the causal triangle."""

    def forward(self, q, k, v, *, mask, memory=None):
        return self.attend(Part(q, k, v, mask.key_bias(q.dtype)), memory_part(q, memory))


@caught_by("future_is_unseen")
class LeaksOneStep(Patternless):
    """A triangle that is one too wide."""

    def forward(self, q, k, v, *, mask, memory=None):
        if not self.context.causal:
            return super().forward(q, k, v, mask=mask, memory=memory)
        n = q.shape[2]
        allowed = (
            torch.ones(n, n).tril(1).bool()
            & (torch.ones(1, n).bool() if mask.valid is None else mask.valid)[:, None, None, :]
        )
        return self.attend(Part(q, k, v, effzoo.attention.bias_of(allowed, q.dtype)), memory_part(q, memory))


@caught_by("future_is_unseen")
class SaysItCannotButDoes(Patternless):
    """Declares that it cannot be causal without the constructor that refuses."""

    not_causal = "it says so"

    def __init__(self, context):
        torch.nn.Module.__init__(self)
        self.context = context


@caught_by("memory_is_attended")
class IgnoresMemory(Patternless):
    """Drops the memory."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k, v, mask=mask)


@caught_by("memory_is_attended")
class IgnoresMemoryAndSaysSo(Patternless):
    """Says that it takes no memory, but does not refuse it."""

    def forward(self, q, k, v, *, mask):
        return super().forward(q, k, v, mask=mask)

    def check_memory(self):
        pass


@caught_by("memory_is_attended")
class AddsMemoryOutside(Full):
    """Adds attention over the memory instead of sharing one softmax."""

    def forward(self, q, k, v, *, mask, memory=None):
        out = super().forward(q, k, v, mask=mask)
        return out if memory is None else out + self.attend(memory_part(q, memory))


@caught_by("global_tokens")
class SameGlobalsEverywhere(Longformer):
    """Takes the first example's global tokens for all."""

    def forward(self, q, k, v, q_global=None, k_global=None, v_global=None, *, mask, memory=None):
        if mask.is_global is not None:
            mask = Mask(mask.valid, mask.is_global[:1].expand_as(mask.is_global))
        return super().forward(q, k, v, q_global, k_global, v_global, mask=mask, memory=memory)


@caught_by("global_tokens")
class SharedGlobalProjections(Longformer):
    """Uses the local projections for global rows."""

    def forward(self, q, k, v, q_global=None, k_global=None, v_global=None, *, mask, memory=None):
        globals_ = (None, None, None) if q_global is None else (q, k, v)
        return super().forward(q, k, v, *globals_, mask=mask, memory=memory)


@caught_by("global_tokens")
class AcceptsGlobalsSilently(Patternless):
    """Has no global tokens, and lets them pass."""

    def check(self, mask):
        pass


@caught_by("evaluation_draws_nothing")
class RandomInEvaluation(Patternless):
    """Draws from the global random state in every forward pass."""

    def forward(self, q, k, v, *, mask, memory=None):
        torch.rand(1)
        return super().forward(q, k, v, mask=mask, memory=memory)


@caught_by("evaluation_draws_nothing")
class DifferentEveryTime(Patternless):
    """Counts its calls."""

    calls = 0

    def forward(self, q, k, v, *, mask, memory=None):
        self.calls += not self.training and mask.valid is None
        return super().forward(q, k, v + 1e-9 * self.calls, mask=mask, memory=memory)


@caught_by("dropout_only_in_training")
class NeverDrops(Patternless):
    """Forgets dropout."""

    dropout = 0.0


@caught_by("dropout_only_in_training")
class AlwaysDrops(Patternless):
    """Drops in evaluation too."""

    @property
    def dropout(self):
        return self.context.dropout


@caught_by("trains_lora")
class DetachedQueries(Patternless):
    """No gradient reaches the queries."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q.detach(), k, v, mask=mask, memory=memory)


@caught_by("trains_ia3")
class DetachedKeys(Patternless):
    """No gradient reaches the keys, which LoRA's default targets would not notice."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k.detach(), v, mask=mask, memory=memory)


@caught_by("trains_prefix")
class PlainMemoryInLongSequences(Patternless):
    """Cuts the memory's gradient as soon as the sequence is longer than 16."""

    def forward(self, q, k, v, *, mask, memory=None):
        if memory is not None and q.shape[2] > 16:
            memory = tuple(x.detach() for x in memory)
        return super().forward(q, k, v, mask=mask, memory=memory)


@caught_by("checkpointing_is_exact")
class Stateful(Patternless):
    """In training, every call looks different."""

    calls = 0

    def forward(self, q, k, v, *, mask, memory=None):
        self.calls += self.training
        return super().forward(q, k, v * (1 + 0.1 * self.calls), mask=mask, memory=memory)


FILES = sorted((Path(__file__).parent / "mutants").glob("*.py"))
CHECKS = {check.__name__: check for check in KINDS["attention"]}


def with_needs(name: str) -> set[str]:
    """A check and those that it needs."""
    return {name}.union(*(with_needs(needed) for needed in getattr(CHECKS[name], "needs", ())))


def killer(file: Path) -> str:
    """What the file says: KILLED_BY = "a check"."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "KILLED_BY":
            return node.value.value
    raise AssertionError(f"{file.name} does not say KILLED_BY")


@pytest.mark.parametrize(("check", "mutant"), [(check, cls) for check, classes in MUTANTS.items() for cls in classes])
def test_a_broken_kind_is_caught_by_the_check_that_is_meant_for_it(check, mutant):
    with effzoo.scope():
        effzoo.attention.register("mutant")(mutant)
        report = effzoo.check("attention", "mutant", only=with_needs(check))
    assert [failure.check for failure in report.failures] == [check], f"\n{report}"
    assert len(report.failures[0].reason) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_mutant_of_an_efficient_kind_is_killed_by_the_check_that_its_file_names(file):
    with effzoo.scope():
        assert load_file(file) == [("attention", "mutant")]
        report = effzoo.check("attention", "mutant", only=with_needs(killer(file)))
    assert [failure.check for failure in report.failures] == [killer(file)], f"\n{report}"
    red = report.failures[0]
    assert len(red.happened) > 20 and len(red.cause) > 20 and len(red.see) > 20


def test_every_check_of_a_kind_on_its_own_kills_a_mutant():
    killed = {*MUTANTS, *map(killer, FILES)}
    inside_models = {"trains_prompt", "trains_houlsby", "trains_bitfit"}  # the same as trains_lora with another method
    assert set(CHECKS) - killed == inside_models
    assert len(FILES) >= 10


def test_the_off_by_one_reason_names_the_place_and_the_size_of_the_error():
    with effzoo.scope():
        load_file(Path(__file__).parent / "mutants" / "window_off_by_one.py")
        reason = effzoo.check("attention", "mutant", only=["equals_definition"]).failures[0].reason
        slip = effzoo.check("attention", "mutant", only=["is_no_known_slip"]).failures[0].reason
    assert "n = 7" in reason or "n = 31" in reason
    assert "is off by" in reason and "at index" in reason and "window edges" in reason
    assert "off by" in slip and "with a window that is 1 wider at both ends" in slip


def test_the_meter_counts_products_and_entries_as_worked_out_by_hand():
    from effzoo.checks.cost import CostCounter

    a, b = torch.randn(5, 7), torch.randn(7, 3)
    with CostCounter() as counter:
        c = a @ b  # 2 * 5 * 7 * 3
        c = c + 1  # 15 entries
        c.T.expand(4, 3, 5)  # views
        torch.nn.functional.pad(c, (0, 1, 0, 0))  # 20 entries
    assert counter.cost.work >= 2 * 5 * 7 * 3 + 15 + 20 and counter.cost.work <= 2 * 5 * 7 * 3 + 15 + 2 * 20
    assert counter.cost.largest == 20


def test_the_meter_counts_attention_that_the_flop_counter_of_torch_does_not():
    """4 b h n s d forward, and 2.5 times that backward."""
    from torch.utils.flop_counter import FlopCounterMode

    from effzoo.checks.cost import CostCounter

    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with CostCounter() as counter:
        out = effzoo.attention.attend(Part(q, k, v))
    forward = 4 * 2 * 3 * 8 * 8 * 4
    assert forward <= counter.cost.work <= forward + 10 * out.numel()
    with CostCounter() as counter:
        out.sum().backward()
    assert 2.5 * forward <= counter.cost.work <= 2.5 * forward + 20 * out.numel()
    with FlopCounterMode(display=False) as counter:
        effzoo.attention.attend(Part(q, k, v))
    # when this fails, torch has learnt it: look whether the work is now counted twice
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("cost", "exponent"), [("n^2", 2), ("n ^ 2 / blocks", 2), ("n * window", 1), ("n log n", 1), ("n", 1)]
)
def test_the_declared_exponent_is_the_leading_power_of_n(cost, exponent):
    from effzoo.checks.cost import declared_exponent

    assert declared_exponent(cost) == exponent
