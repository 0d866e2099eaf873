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


class NoTensors(Scaling):
    """Hangs modules that have nothing to train; only the task head learns."""

    def make(self, site):
        return PeftModule()


class InAList(PeftModule):
    """B A x with both factors in a plain list, where no module registers them."""

    def __init__(self, size):
        super().__init__()
        self.factors = [nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.zeros(size, 2))]

    def after(self, x, y, context):
        down, up = self.factors
        return y + x @ down.to(x).T @ up.to(x).T


class HalfInAList(Scale):
    """One of its two tensors is in a dict."""

    def __init__(self, size):
        super().__init__(size)
        self.more = {"shift": nn.Parameter(torch.zeros(size, dtype=torch.float64))}

    def after(self, x, y, context):
        return y * self.scale + self.more["shift"]


class OnTheClass(Scale):
    """Its tensor is an attribute of the class."""

    shift = nn.Parameter(torch.zeros(16, dtype=torch.float64))

    def after(self, x, y, context):
        return y * self.scale + self.shift


@caught_by("tensors_are_registered")
class TrainsNothing(NoTensors):
    """Hangs modules that have nothing to train."""


@caught_by("tensors_are_registered")
class KeepsAList(Scaling):
    """Its parameters are in a list."""

    module = InAList


@caught_by("tensors_are_registered")
class KeepsADict(Scaling):
    """One of its parameters is in a dict."""

    module = HalfInAList


@caught_by("tensors_are_registered")
class KeepsOnTheClass(Scaling):
    """One of its parameters is on the class."""

    module = OnTheClass


@caught_by("sites_share_nothing")
class OneForAll(Scaling):
    """Makes one tensor in the constructor, for all layers."""

    def __init__(self, *, targets: str | None = None):
        super().__init__(targets=targets)
        self.shared = nn.Parameter(torch.ones(16))

    def make(self, site):
        module = Scale(site.out_features)
        module.scale = self.shared
        return module


class Drops(Scale):
    """Drops in evaluation as well."""

    def after(self, x, y, context):
        return y + nn.functional.dropout(y, 0.1) * (self.scale - 1)


@caught_by("evaluation_draws_nothing")
class DropsInEvaluation(Scaling):
    """Forgets that F.dropout drops unless it is told not to."""

    module = Drops


@caught_by("dropout_acts_in_training")
class NeverDrops(Scaling):
    """Has an option that does nothing."""

    def __init__(self, *, dropout: float = 0.0, targets: str | None = None):
        super().__init__(targets=targets)


class Frozen(Scale):
    """Holds a tensor that is not trained."""

    def __init__(self, size):
        super().__init__(size)
        self.scale = None
        self.register_buffer("factor", torch.ones(size))

    def after(self, x, y, context):
        return y * self.factor

    delta = PeftModule.delta


@caught_by("everything_learns")
class OnlyABuffer(Scaling):
    """Its tensor is a buffer, so only the task head learns."""

    module = Frozen


class OneProduct(LowRank):
    """W' = W + s B A."""

    def __init__(self, size, rank, scale):
        super().__init__(16, size, rank, scale, 0.0)


class Products(Method):
    """W' = W + s B A."""

    accepts, default_targets = (Linear,), ("attn.v",)
    scale = staticmethod(lambda rank, alpha: alpha / rank)

    def __init__(self, *, rank: int = 4, alpha: float = 8.0, targets: str | None = None):
        super().__init__(targets=targets)
        self.rank, self.alpha = rank, alpha

    def make(self, site):
        return OneProduct(site.out_features, self.rank, self.scale(self.rank, self.alpha))


SCALES = {
    "alpha * rank": lambda rank, alpha: alpha * rank,
    "rank / alpha": lambda rank, alpha: rank / alpha,
    "the change is added twice": lambda rank, alpha: 2 * alpha / rank,
    "alpha does nothing": lambda rank, alpha: 1.0,
    "alpha, where": lambda rank, alpha: alpha,
    "subtracted": lambda rank, alpha: -alpha / rank,
}


@pytest.mark.parametrize("said", SCALES)
def test_a_wrong_scale_of_a_low_rank_change_is_named(said):
    only = {"attaches", "tensors_are_registered", "everything_learns", "low_rank_scale"}
    with effzoo.scope():
        effzoo.peft.register("mutant")(
            type("Wrong", (Products,), {"__doc__": "B A", "scale": staticmethod(SCALES[said])})
        )
        report = effzoo.check("peft", "mutant", only=only)
    assert [failure.check for failure in report.failures] == ["low_rank_scale"], f"\n{report}"
    assert said in report.failures[0].happened


def test_scales_that_papers_have_are_green_and_count_as_compared():
    for scale in (lambda rank, alpha: alpha / rank, lambda rank, alpha: alpha / rank**0.5):
        with effzoo.scope():
            kind = type("Right", (Products,), {"__doc__": "B A", "scale": staticmethod(scale)})
            effzoo.peft.register("mutant")(kind)
            only = {"attaches", "tensors_are_registered", "everything_learns", "low_rank_scale"}
            report = effzoo.check("peft", "mutant", only=only)
            assert report.verified and "s B A" in report.compared_with, f"\n{report}"


class Twice(LowRank):
    """Adds its change in two hooks."""

    def __init__(self, size):
        super().__init__(16, size, 2, 1.0, 0.0)

    def weight(self, weight):
        return weight + self.B.to(weight) @ self.A.to(weight)


@caught_by("low_rank_scale")
class AddsTwice(Scaling):
    """Its module changes the weight and the output."""

    module = Twice


BEFORE = {
    "declares_itself": (),
    "attaches": (),
    "tensors_are_registered": ("attaches",),
    "sites_share_nothing": ("attaches", "tensors_are_registered"),
    "evaluation_draws_nothing": ("attaches", "tensors_are_registered"),
    "low_rank_scale": ("attaches", "everything_learns"),
    "dropout_acts_in_training": ("attaches", "everything_learns"),
    "learns_under_checkpointing": ("attaches", "everything_learns"),
}


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
    class AndAFactor(TwoZeros):
        def __init__(self, size):
            super().__init__(size)
            self.factor = nn.Parameter(torch.ones(size))

        def after(self, x, y, context):
            return super().after(x, y, context) * self.factor

        delta = PeftModule.delta

    class Silent(Scaling):
        """The gradient of two of its tensors vanishes."""

        module = AndAFactor

    monkeypatch.setitem(ZERO_GRADIENT, "mutant", {"attn.v.A": "starts at 0", tensor: "starts at 0"})
    with effzoo.scope():
        effzoo.peft.register("mutant")(Silent)
        result = effzoo.check("peft", "mutant", only=["everything_learns"]).result("everything_learns")
    assert result.status == status, result.reason


def test_a_method_without_weights_to_merge_is_green_when_merge_refuses():
    report = effzoo.check("peft", "prefix", only=["merges"])
    assert report.ok
