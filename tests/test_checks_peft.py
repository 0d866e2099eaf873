"""Broken PEFT methods: each must be caught by the check that is meant for it."""

import pytest
import torch
from torch import nn

import effzoo
from effzoo.checks.facts import ZERO_GRADIENT
from effzoo.peft import Method, PeftModule
from effzoo.peft.parameter.lora import LowRank
from effzoo.sites import Linear, Positionwise

MUTANTS: dict[str, list[type]] = {}


def caught_by(check: str):
    def mark(cls: type) -> type:
        MUTANTS.setdefault(check, []).append(cls)
        return cls

    return mark


class Scale(PeftModule):
    """y' = s * y, a correct module that the mutants below break."""

    def __init__(self, size: int, start: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), start))

    def after(self, x, y, context):
        return y * self.scale

    def delta(self, weight, bias):
        change = self.scale.to(weight) - 1
        return change[:, None] * weight, None if bias is None else change * bias


class Scaling(Method):
    """y' = s * y on the values."""

    accepts = (Linear,)
    default_targets = ("attn.v",)
    module: type[PeftModule] = Scale

    def __init__(self, *, targets: str | None = None):
        super().__init__(targets=targets)

    def make(self, site):
        return self.module(site.out_features)


@caught_by("declares_itself")
class PositionalOption(Scaling):
    """Its option cannot be set by a spec."""

    def __init__(self, start: float = 1.0):
        super().__init__()


@caught_by("declares_itself")
class NoDefault(Scaling):
    """Its option has no default."""

    def __init__(self, *, start: float):
        super().__init__()


@caught_by("declares_itself")
class Undocumented(Scaling):
    __doc__ = None


@caught_by("attaches")
class CrashesInMake(Scaling):
    """Reads an attribute that sites do not have."""

    def make(self, site):
        return Scale(site.width)


@caught_by("attaches")
class NaNAtStart(Scaling):
    """Starts from NaN."""

    def make(self, site):
        return Scale(site.out_features, start=float("nan"))


@caught_by("attaches")
class OnlyInEncoders(Scaling):
    """Hangs on a role that decoders do not have."""

    default_targets = ("embed.norm",)
    accepts = (effzoo.sites.LayerNorm,)

    def make(self, site):
        return Scale(site.normalized_shape[0])


@caught_by("starts_as_identity")
class NotIdentity(Scaling):
    """Starts from 1.001 and claims to change nothing."""

    def make(self, site):
        return Scale(site.out_features, start=1.001)


@caught_by("starts_as_identity")
class ClaimsToChange(Scaling):
    """Says that it is no identity, but is."""

    identity_at_init = False


class WritesIntoTheWeight(Scale):
    """Drifts the base's weight in every forward pass."""

    def weight(self, weight):
        with torch.no_grad():
            weight.mul_(1 + 1e-12 * self.training)
        return weight


@caught_by("base_is_frozen")
class TrainsBaseInPlace(Scaling):
    """Its module writes into the base."""

    module = WritesIntoTheWeight


class HalfUsed(Scale):
    """Owns a tensor that takes no part."""

    def __init__(self, size):
        super().__init__(size)
        self.unused = nn.Parameter(torch.ones(size))


@caught_by("everything_learns")
class NoGradient(Scaling):
    """One tensor gets no gradient."""

    module = HalfUsed


class TwoZeros(LowRank):
    """Both factors start at 0, so neither ever moves."""

    def __init__(self, size):
        super().__init__(16, size, 2, 1.0, 0.0)
        nn.init.zeros_(self.A)


@caught_by("everything_learns")
class ZeroGradient(Scaling):
    """A saddle point that gradient descent never leaves."""

    module = TwoZeros


class RootOfZero(Scale):
    """sqrt(0) has an infinite derivative."""

    def __init__(self, size):
        super().__init__(size, start=0.0)

    def after(self, x, y, context):
        return y * (1 + self.scale.sqrt() * 0)


@caught_by("everything_learns")
class InfiniteGradient(Scaling):
    """Its gradient is NaN at the start."""

    module = RootOfZero


class EveryOther(Scale):
    """Acts in every second call only, so a pass that runs twice is another function."""

    calls = 0

    def after(self, x, y, context):
        self.calls += self.training
        return y * self.scale if self.calls % 2 else y


@caught_by("learns_under_checkpointing")
class CountsCalls(Scaling):
    """Its module keeps state in forward."""

    module = EveryOther


class MovesFromNeighbours(Scale, Positionwise):
    """Adds a little of the mean over all positions."""

    def after(self, x, y, context):
        return (y + y.mean(dim=1, keepdim=True)) * self.scale if y.ndim > 2 else y * self.scale


@caught_by("positions_computed_alone")
class LooksAround(Scaling):
    """Looks at other positions and says that it does not."""

    default_targets = ("attn.o",)
    identity_at_init = False
    module = MovesFromNeighbours


@caught_by("keys_are_kept")
class HangsOutside(Scaling):
    """Puts its tensor on the site instead of in a module."""

    def make(self, site):
        site.scale = nn.Parameter(torch.ones(site.out_features))
        return Scale(site.out_features)


@caught_by("keys_are_kept")
class ReplacesWeights(Scaling):
    """Renames a tensor of the base, as wrapping and parametrising do."""

    def make(self, site):
        site.register_parameter("renamed", site.bias)
        site.bias = None
        return Scale(site.out_features)


class DrawnDirection(Scale):
    """A random direction that no file holds."""

    def __init__(self, size):
        super().__init__(size, start=0.0)
        self.register_buffer("direction", torch.randn(size), persistent=False)

    def after(self, x, y, context):
        return y + self.scale * self.direction

    def delta(self, weight, bias):
        return torch.zeros_like(weight), self.scale.to(weight) * self.direction.to(weight)


@caught_by("saves_and_loads")
class UnsavedRandomness(Scaling):
    """What it drew at the start is lost."""

    module = DrawnDirection


@caught_by("copies")
class UnsavedRandomnessInCopies(UnsavedRandomness):
    """The same; a state-dict round trip shows it too."""


@caught_by("detaches")
class LeavesAHook(Scaling):
    """Changes the site's output with a hook that detaching cannot know of."""

    def make(self, site):
        site.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-6))
        return Scale(site.out_features)


@caught_by("detaches")
class ThawsTheBase(Scaling):
    """Makes a tensor trainable that the user had frozen."""

    default_targets = ("embed.token",)
    accepts = (effzoo.sites.Embedding,)

    def make(self, site):
        site.weight.requires_grad_(True)
        return Scale(site.embedding_dim)


class WrongDelta(LowRank):
    """Forgets the scale when it is merged."""

    def __init__(self, size):
        super().__init__(16, size, 2, 0.5, 0.0)

    def delta(self, weight, bias):
        return self.B.to(weight) @ self.A.to(weight), None


@caught_by("merges")
class MergesWrongly(Scaling):
    """Its delta is not what it adds."""

    module = WrongDelta


class TransposedDelta(Scale):
    """Scales columns instead of rows when it is merged."""

    def delta(self, weight, bias):
        return weight * (self.scale.to(weight) - 1), None


@caught_by("merges")
class MergesTransposed(Scaling):
    """Its delta is right up to a transposition, and forgets the bias."""

    module = TransposedDelta


class AddsToNeighbour(Scale):
    """Reads what the last module of its kind left on the class."""

    last = 0.0

    def after(self, x, y, context):
        if self.training:
            AddsToNeighbour.last = float(self.scale.detach().mean())
        return y * self.scale * (2.0 if AddsToNeighbour.last == 0 else 1 + 0.1 * AddsToNeighbour.last)


@caught_by("adapters_are_independent")
class KeepsStateOnTheClass(Scaling):
    """What one adapter does in training changes the other's output."""

    module = AddsToNeighbour


class Closure(Scale):
    """Holds its own tensor in a closure, which a deep copy does not follow."""

    def __init__(self, size):
        super().__init__(size)
        scale = self.scale
        self.act = lambda y: y * scale

    def after(self, x, y, context):
        return self.act(y)


@caught_by("copies")
class HoldsAClosure(Scaling):
    """Its deep copy trains the original."""

    module = Closure


BEFORE = {"declares_itself": (), "learns_under_checkpointing": ("attaches", "everything_learns")}


@pytest.mark.parametrize(("check", "mutant"), [(check, cls) for check, classes in MUTANTS.items() for cls in classes])
def test_a_broken_method_is_caught_by_the_check_that_is_meant_for_it(check, mutant):
    with effzoo.scope():
        effzoo.peft.register("mutant")(mutant)
        report = effzoo.check("peft", "mutant", only={check, *BEFORE.get(check, ("attaches",))})
    assert [failure.check for failure in report.failures] == [check], f"\n{report}"
    assert len(report.failures[0].reason) > 20


@pytest.mark.slow
def test_the_correct_method_behind_the_mutants_is_green():
    with effzoo.scope():
        effzoo.peft.register("mutant")(Scaling)
        report = effzoo.check("peft", "mutant")
    assert report.ok, f"\n{report}"


def test_a_red_line_names_the_model_and_the_place_in_the_users_file():
    with effzoo.scope():
        effzoo.peft.register("mutant")(CrashesInMake)
        reason = effzoo.check("peft", "mutant", only=["attaches"]).failures[0].reason
    assert (
        reason.startswith("bert with full: AttributeError") and f"{__file__}:" in reason and reason.endswith("in make")
    )


@pytest.mark.parametrize(("tensor", "status"), [("attn.v.B", "green"), ("attn.q.B", "red")])
def test_the_checks_may_be_told_that_a_gradient_vanishes_but_only_where(monkeypatch, tensor, status):
    class Silent(Scaling):
        """Its gradient vanishes."""

        module = TwoZeros

    monkeypatch.setitem(ZERO_GRADIENT, "mutant", {"attn.v.A": "starts at 0", tensor: "starts at 0"})
    with effzoo.scope():
        effzoo.peft.register("mutant")(Silent)
        result = effzoo.check("peft", "mutant", only=["everything_learns"]).result("everything_learns")
    assert result.status == status, result.reason


def test_a_method_without_weights_to_merge_is_green_when_merge_refuses():
    report = effzoo.check("peft", "prefix", only=["merges"])
    assert report.ok
