"""What a method trains: tensors that the module registers, at each site its own, at the scale that its options say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.checks.facts import SHARED
from effzoo.checks.models import TinyModel, logits, train
from effzoo.checks.peft.subject import CASES, Subject, modules, on_every_model, own_tensors, places
from effzoo.checks.runner import Failed, NotApplicable, close, needs
from effzoo.errors import EffzooError
from effzoo.peft import PeftModule
from effzoo.sites import Linear, opens

VALUES = [(5, 3), (3, 7)]  # of rank and alpha, for which no two of the formulas that are told apart agree
DROPOUTS = ("dropout", "p", "drop", "dropout_p")  # names of options that are the probability of dropout


@needs("attaches")
@on_every_model
def tensors_are_registered(subject: Subject, case: TinyModel) -> None:
    """The method adds tensors of its own, and every one that learns is registered in its module

    Print `list(module.named_parameters())`: a Parameter in a plain list, tuple or dict, or on the class, is not there,
    so it is neither trained nor saved nor moved.
    """
    model = subject.attached(case)
    for path, module in modules(model).items():
        registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for owner in module.modules():
            for name, tensor in _held(owner):
                if id(tensor) not in registered:
                    raise Failed(
                        f"{type(owner).__name__}.{name} at {path} is a tensor that is not registered; assign an "
                        "nn.Parameter to an attribute of the module itself (register_buffer for what does not learn), "
                        "or use nn.ParameterList, nn.ParameterDict or nn.ModuleList in place of a plain list or dict"
                    )
    if not own_tensors(model):
        kinds = sorted({type(module).__name__ for module in modules(model).values()})
        raise Failed(
            f"attaching adds no tensor of the method, only the task head that every adapter has: {', '.join(kinds)} "
            "has no parameter; return a PeftModule with an nn.Parameter from `make`"
        )


def _held(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Numbers in attributes of a module or its class, and in plain containers there."""
    of_class = {name: value for cls in type(owner).__mro__ for name, value in vars(cls).items()}
    for name, value in (*vars(owner).items(), *of_class.items()):
        if name.startswith("_"):
            continue
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for one in several:
            inside = list(one.parameters()) if isinstance(one, nn.Module) else [one]
            yield from ((name, x) for x in inside if isinstance(x, Tensor) and x.is_floating_point())


@needs("tensors_are_registered")
@on_every_model
def sites_share_nothing(subject: Subject, case: TinyModel) -> None:
    """Each site trains tensors of its own, unless the method shares them on purpose

    Print `id(module.A)` at two sites: what is made in the constructor of the method, on a class, or once in a cache is
    one tensor for all layers.
    """
    if subject.cls.name in SHARED:
        raise NotApplicable(f"the paper wants it: {SHARED[subject.cls.name]}")
    at: dict[int, str] = {}
    model = subject.attached(case)
    for key, tensor in own_tensors(model).items():
        place = next(prefix for prefix in places(model) if key.startswith(prefix))
        other = at.setdefault(id(tensor), place)
        if tensor.requires_grad and other != place:
            one, two = (prefix.partition(".adapters.")[0] for prefix in (other, place))
            raise Failed(
                f"{one} and {two} train one and the same tensor, {key.removeprefix(place)}; make a new nn.Parameter, "
                "in a new module, each time `make` is called"
            )


@needs("tensors_are_registered")
@on_every_model
def evaluation_draws_nothing(subject: Subject, case: TinyModel) -> None:
    """In evaluation the output is the same every time: dropout acts in training alone

    Call the model twice after `model.eval()` and compare; `F.dropout(x, p)` drops in evaluation too, `F.dropout(x, p,
    self.training)` and nn.Dropout do not.
    """
    name = subject.option(*DROPOUTS)
    if name is not None:
        with suppress(EffzooError):
            subject = subject.given(**{name: 0.5})
    model = subject.trained(case)
    before = torch.get_rng_state()
    first, second = logits(model, case.batch()), logits(model, case.batch())
    advice = (
        "dropout acts in evaluation, or something else is drawn in a hook: F.dropout takes training=self.training, "
        "and what is drawn once belongs into `make`"
    )
    close("the output of a second call in evaluation", second, first, 0.0, advice)
    if not torch.equal(before, torch.get_rng_state()):
        raise Failed(f"a call in evaluation moves torch's random state; {advice}")


@needs("everything_learns")
@on_every_model
def dropout_acts_in_training(subject: Subject, case: TinyModel) -> None:
    """An option that is the probability of dropout acts in training

    Call the model twice after `model.train()` with dropout = 0.5 and compare.
    """
    name = subject.option(*DROPOUTS)
    if name is None:
        raise NotApplicable("no option of the method is a probability of dropout")
    try:
        model = subject.given(**{name: 0.5}).trained(case)
    except EffzooError:
        raise NotApplicable(f"{name} takes no 0.5") from None
    model.train()
    with torch.no_grad():
        one, two = (model(**case.batch()).logits for _ in range(2))
    if torch.equal(one, two):
        raise Failed(
            f"with {name} = 0.5 two calls in training give the same output; drop with F.dropout(x, p, self.training), "
            "where p is the option"
        )


@needs("everything_learns")
def low_rank_scale(subject: Subject) -> None:
    """A change that is a product of two factors has the scale that its options say: alpha / rank, or 1

    With x = I the site's output is its weight: divide what the adapter changes there by B @ A, and look which number it
    is for two ranks.
    """
    rank, alpha = subject.option("rank", "r"), subject.option("alpha", "lora_alpha")
    if subject.reference is not None:
        raise NotApplicable(f"{subject.reference.text} says the scale")
    if alpha is None and subject.option("scale", "s", "scaling", "gamma", "lr"):
        raise NotApplicable("the scale is an option of its own")
    values = VALUES if rank is not None and alpha is not None else []
    settings: list[dict[str, Any]] = [{str(rank): r, str(alpha): a} for r, a in values] or [{}]
    scales = [scale for options in settings if (scale := scale_of(subject, options)) is not None]
    if len(scales) < len(settings):
        raise NotApplicable("the change of no weight is a multiple of a product of two trained factors")
    if not values:
        if alpha is None and abs(scales[0] - 2) < 1e-6:
            raise Failed(
                "the weight changes by 2 B A, where no option is a scale; the change is added twice: in two hooks, or "
                "in one and again in another line"
            )
        return
    wanted = {"alpha / rank": lambda r, a: a / r, "alpha / sqrt(rank)": lambda r, a: a / r**0.5}
    slips = {
        "alpha * rank": lambda r, a: a * r, "alpha": lambda r, a: a, "rank / alpha": lambda r, a: r / a,
        "1, so alpha does nothing": lambda r, a: 1.0, "1 / rank, so alpha does nothing": lambda r, a: 1 / r,
        "2 alpha / rank, so the change is added twice": lambda r, a: 2 * a / r,
        "alpha^2 / rank^2, so the scale acts twice": lambda r, a: (a / r) ** 2,
        "-alpha / rank, so the change is subtracted": lambda r, a: -a / r,
    }  # fmt: skip

    def is_(formula: Any) -> bool:
        return all(abs(scale - formula(r, a)) < 1e-6 for scale, (r, a) in zip(scales, values, strict=True))

    if any(map(is_, wanted.values())):
        return
    slip = next((name for name, formula in slips.items() if is_(formula)), None)
    numbers = ", ".join(
        f"{scale:.4g} for {rank} = {r} and {alpha} = {a}" for scale, (r, a) in zip(scales, values, strict=True)
    )
    raise Failed(
        f"the scale of the change is {slip or numbers}, where alpha / rank is meant; the weight changes by s B A with "
        "s = alpha / rank, added once, so that the same alpha serves every rank"
    )


def scale_of(subject: Subject, options: dict[str, Any]) -> float | None:
    """s, where the change of a weight is s times a product of two trained factors; None where it is not."""
    case = CASES[0]
    try:
        model = subject.given(**options).attached(case)
    except EffzooError:
        return None
    with torch.enable_grad():  # what calibrates itself
        train(model, case.batch(), steps=1)
    for path, module in modules(model).items():
        site = model.get_submodule(path)
        factors = [x for x in module.parameters() if x.requires_grad]
        if not isinstance(site, Linear) or len(factors) != 2 or any(x.ndim != 2 for x in factors):
            return None
        with torch.no_grad():
            for number, factor in enumerate(factors):
                noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
                factor.copy_(0.3 * noise)
            change = change_at(site, module)
        for one, two in (factors, factors[::-1]):
            for left, right in product((one, one.T), (two, two.T)):
                if left.shape[1] == right.shape[0] and (left @ right).shape == change.shape:
                    both = (left @ right).detach()
                    scale = float((change * both).sum() / both.square().sum())
                    if abs(scale) > 1e-9 and (change - scale * both).abs().max() < 1e-9 * (1 + abs(scale)):
                        return scale
        return None
    return None


def change_at(site: Linear, module: PeftModule) -> Tensor:
    """The change of a site's weight [out, in] by the module that hangs there, from the outputs for x = I."""
    eye = torch.eye(site.in_features, dtype=torch.float64)[None]
    out = site(eye)
    bias = torch.zeros(site.out_features) if site.bias is None else site.bias
    return (out - nn.functional.linear(eye, site.weight, bias))[0].T


def merges_by_delta(subject: Subject) -> bool:
    """Whether every module says by `delta` what it adds, so that merging compares two ways to write it."""
    hung = modules(subject.attached(CASES[0])).values()
    return bool(hung) and all(opens(module, "delta") for module in hung)
