"""A method beside a reference: both get the same factors, at the same sites, and must compute the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, permutations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.architectures import Transformer
from effzoo.checks.against import calls, derives, refuse
from effzoo.checks.models import LENGTHS, SIZES, TinyModel
from effzoo.checks.peft.subject import Subject, modules
from effzoo.checks.peft.tensors import VALUES, scale_of
from effzoo.checks.runner import Failed, NotApplicable, close, needs
from effzoo.checks.subject import gone
from effzoo.errors import IncompatiblePeft, listing
from effzoo.peft import attach
from effzoo.registry import peft as registry
from effzoo.sites import Linear, PeftModule

WIDER = (("dim", 24), ("heads", 3), ("mlp", 40))
CASES = (TinyModel("bert", "full"), TinyModel("gpt2", "longformer[window=8]", choices=WIDER))
Pairs = dict[str, tuple[str, bool]]  # own tensor -> that of the reference, and whether it is stored transposed


@needs("everything_learns")
def equals_reference(subject: Subject) -> None:
    """With the same factors the outputs and gradients equal the reference's, on drawn inputs of two widths

    Hang both on one `effzoo.sites.Linear`, copy the factors of one into the other, and compare `site(x)` for x = I.
    """
    refusals = []
    for case in CASES:
        try:
            if subject.reference.function is None:
                attach(case.model(), subject.reference.spec)
        except IncompatiblePeft as refusal:  # of the reference
            refusals.append(str(refusal))
            continue
        for draw in range(2):
            if subject.reference.function is not None:
                _against_function(subject, case, draw)
            else:
                _against_method(subject, case, draw)
    if len(refusals) == len(CASES):
        raise NotApplicable(refusals[0])


def _against_method(subject: Subject, case: TinyModel, draw: int) -> None:
    reference = subject.reference
    mine, theirs = subject.attached(case), attach(case.model(), reference.spec)
    own, wanted = modules(mine), modules(theirs)
    if set(own) != set(wanted):
        extra, missing = sorted(set(own) - set(wanted)), sorted(set(wanted) - set(own))
        what = f"it hangs on {extra[0]}, where" if extra else f"it does not hang on {missing[0]}, where"
        raise Failed(
            f"{case}: {what} {reference.text} hangs on {listing(sorted(wanted)[:4])}; set default_targets, and return "
            "a module from `make` for each site"
        )
    source = torch.Generator().manual_seed(7 + draw + 100 * reference.seed)
    with torch.no_grad():
        for tensor in trained_tensors(wanted).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=source))
    batch = {"input_ids": torch.randint(SIZES["vocab"], (len(LENGTHS), 11 + 4 * draw), generator=source)}
    expected = theirs.eval()(**batch).logits
    tensors = {path: _named(module) for path, module in wanted.items()}
    frozen = {path: dict(module.state_dict()) for path, module in wanted.items()}
    best: tuple[float, dict[str, Pairs]] | None = None
    for pairs in pairings(own, tensors, reference.text):
        fill(own, tensors, pairs, frozen)
        off = float((mine.eval()(**batch).logits - expected).detach().abs().max())
        if best is None or off < best[0]:
            best = off, pairs
        if off < 1e-10:
            break
    assert best is not None
    fill(own, tensors, best[1], frozen)
    out = mine(**batch).logits
    advice = "compare what a hook adds at one site with the formula of the reference, factor by factor"
    if not best[0] < 1e-10:
        advice = _slip(own, wanted, mine, theirs, subject, source) or advice
    close(f"{case}: the output with the factors of {reference.text}", out, expected, 1e-10, advice)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=source)
    names = {f"{path}.{name}": (path, name) for path in own for name in best[1][path]}
    leaves = [_named(own[path])[name] for path, name in names.values()]
    theirs_leaves = [_named(wanted[path])[best[1][path][name][0]] for path, name in names.values()]
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    grads_wanted = torch.autograd.grad((expected * weight).sum(), theirs_leaves, allow_unused=True)
    for key, grad, right, leaf in zip(names, grads, grads_wanted, leaves, strict=True):
        found = torch.zeros_like(leaf) if grad is None else grad
        path, name = names[key]
        turned = best[1][path][name][1]
        right = torch.zeros_like(found) if right is None else right.T if turned else right
        lost = (
            "the output is right, and this gradient is not: something on the way to it is detached, x perhaps, by "
            ".detach(), .data or torch.no_grad()"
        )
        close(f"{case}: the gradient of {key}", found, right, 1e-9, gone(key, found, right) or lost)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in module.named_parameters(remove_duplicate=False) if x.requires_grad}


def trained_tensors(hung: Mapping[str, PeftModule]) -> dict[str, Tensor]:
    """The trained tensors of modules, by path and name."""
    return {f"{path}.{name}": x for path, module in hung.items() for name, x in _named(module).items()}


def pairings(
    own: Mapping[str, PeftModule], wanted: Mapping[str, Mapping[str, Tensor]], text: str
) -> Iterator[dict[str, Pairs]]:
    """The ways in which the tensors of the two may belong together, by path; sites with tensors of the same names go
    together."""
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for path, module in own.items():
        alike.setdefault((tuple(_named(module)), tuple(wanted[path])), []).append(path)
    ways = [list(islice(_ways(own, wanted, paths, text), 24)) for paths in alike.values()]
    for way in islice(product(*ways), 200):
        yield {path: pairs for paths, pairs in zip(alike.values(), way, strict=True) for path in paths}


def _ways(
    own: Mapping[str, PeftModule], wanted: Mapping[str, Mapping[str, Tensor]], paths: list[str], text: str
) -> Iterator[Pairs]:
    """The pairs that fit at all of these sites: by name, else by shape, stored as they are or transposed."""
    path = paths[0]
    mine, theirs = _named(own[path]), wanted[path]
    if len(mine) != len(theirs):
        raise Failed(
            f"at {path} it trains {len(mine)} tensors, {listing(mine)}, where {text} trains {len(theirs)}, "
            f"{listing(f'{name} {tuple(x.shape)}' for name, x in theirs.items())}; train those"
        )
    sizes = [(_named(own[at]), wanted[at]) for at in paths]
    found = False
    for order in islice(permutations(theirs), 720):
        bound = [name in theirs and mine[name].shape == theirs[name].shape for name in mine]
        if any(is_bound and name != other for is_bound, name, other in zip(bound, mine, order, strict=True)):
            continue
        ways: list[list[tuple[str, bool]]] = []
        for name, other in zip(mine, order, strict=True):
            shapes = [(one[name].shape, two[other].shape) for one, two in sizes]
            turns = [turned for turned in (False, True) if all(a == (b[::-1] if turned else b) for a, b in shapes)]
            turns = turns[:1] if mine[name].ndim < 2 or name == other else turns
            ways.append([(other, turned) for turned in turns])
        for way in product(*ways):
            found = True
            yield dict(zip(mine, way, strict=True))
    if not found:
        raise Failed(
            f"at {path} its tensors are {listing(f'{name} {tuple(x.shape)}' for name, x in mine.items())}, where those "
            f"of {text} are {listing(f'{name} {tuple(x.shape)}' for name, x in theirs.items())}; the sizes are part of "
            "the formula"
        )


def fill(
    own: Mapping[str, PeftModule], wanted: Mapping[str, Mapping[str, Tensor]], pairs: Mapping[str, Pairs],
    frozen: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Give the checked modules the tensors of the reference, also frozen ones of the same name."""
    with torch.no_grad():
        for path, module in own.items():
            for name, (other, turned) in pairs[path].items():
                value = wanted[path][other]
                _named(module)[name].copy_(value.T if turned else value)
            theirs = {} if frozen is None else frozen[path]
            for name, tensor in module.state_dict().items():
                if name not in pairs[path] and name in theirs and theirs[name].shape == tensor.shape:
                    tensor.copy_(theirs[name])


def _slip(
    own: Mapping[str, PeftModule], wanted: Mapping[str, PeftModule], mine: Transformer, theirs: Transformer,
    subject: Subject, source: torch.Generator,
) -> str:  # fmt: skip
    """The known mistake that explains the difference at the linear sites; "" for another."""
    for path in own:
        site, other = mine.get_submodule(path), theirs.get_submodule(path)
        if isinstance(site, Linear) and isinstance(other, Linear):
            x = torch.randn(3, 11, site.in_features, dtype=torch.float64, generator=source)
            with torch.no_grad():
                said = slip_of(x, site(x), other(x), site, subject)
            if said:
                return said
    return ""


def slip_of(x: Tensor, out: Tensor, expected: Tensor, site: Linear, subject: Subject) -> str:
    """The known mistake by which the output of a linear site differs from what is expected; "" for another."""
    plain = F.linear(x, site.weight, site.bias)
    added, wanted = out - plain, expected - plain

    def same(one: Tensor, two: Tensor) -> bool:
        return one.shape == two.shape and bool((one - two).abs().max() < 1e-8 * (1 + float(two.abs().max())))

    if same(out, expected):
        return ""
    nothing, bias = torch.zeros_like(added), 0.0 if site.bias is None else site.bias
    square = x.shape == wanted.shape
    for found, said in (
        (nothing, "the module adds nothing: a hook of another name, a factor of 0, or a result that is not returned"),
        (wanted - plain, "it is without the residual: the change takes the place of W x + b; return y + change"),
        (wanted - x if square else None, "it is without the residual of the module: add what came in"),
        (wanted + x if square else None, "x is added once more: one residual too many"),
        (wanted + plain, "y is counted twice: one residual too many"),
        (wanted + bias, "the bias of the site is added once more"),
        (wanted - bias, "the bias of the site is lost"),
        (wanted.flip(-1), "the entries of what is added stand in the opposite order"),
        (wanted.flip(-2), "the positions of what is added stand in the opposite order"),
    ):  # fmt: skip
        if found is not None and same(added, found):
            return said
    ratio = float((added * wanted).sum() / wanted.square().sum())
    if same(added, ratio * wanted):
        return _times(ratio, subject)
    constant = (added - wanted).flatten(0, -2)
    if same(constant, constant[:1].expand_as(constant)):
        return "what is added is right up to a vector that is the same at all positions: a bias, added or lost"
    if square and x[..., 0].numel() >= x.shape[-1]:
        change = torch.linalg.lstsq(x.flatten(0, -2), wanted.flatten(0, -2)).solution  # x^T -> y^T
        if same(x @ change, wanted) and same(added, x @ change.T):
            return "the change is transposed: it is s B A x, with A [r, in] and B [out, r], so x @ A.T @ B.T"
    return ""


FACTORS: list[tuple[str, Callable[[float, float], float]]] = [  # of what is added, beside alpha / rank
    ("the scale is alpha * rank in place of alpha / rank", lambda r, a: r * r),
    ("the scale is alpha in place of alpha / rank", lambda r, a: r),
    ("the scale alpha / rank is left out", lambda r, a: r / a),
    ("the scale is rank / alpha in place of alpha / rank", lambda r, a: (r / a) ** 2),
    ("the scale acts twice", lambda r, a: a / r),
    ("the scale is 1 / rank in place of alpha / rank: alpha does nothing", lambda r, a: 1 / a),
    ("the scale is alpha / sqrt(rank) in place of alpha / rank", lambda r, a: r**0.5),
    ("the change is added twice: in two hooks, or in one and again in another line", lambda r, a: 2.0),
    ("the change is subtracted", lambda r, a: -1.0),
    ("the change is halved", lambda r, a: 0.5),
    ("the change is added three times", lambda r, a: 3.0),
]


def _times(ratio: float, subject: Subject) -> str:
    """What a factor on the change means; where its number may mean several things, two other ranks tell."""
    values = {option.name: option.default for option in registry.options(subject.spec.name)} | dict(
        subject.spec.options
    )
    rank, alpha = subject.option("rank", "r"), subject.option("alpha", "lora_alpha")
    numbers = [values.get(str(name)) for name in (rank, alpha)]
    known = [float(x) for x in numbers if isinstance(x, (int, float))]
    pairs = [(known[0], known[1])] if len(known) == 2 else []
    ratios = [ratio] * len(pairs)
    if pairs and subject.reference.cls is not None:
        theirs = Subject(subject.reference.spec, subject.reference.cls)
        for r, a in VALUES:
            found = scale_of(subject, {str(rank): r, str(alpha): a})
            wanted = scale_of(
                theirs, {str(theirs.option("rank", "r")): r, str(theirs.option("alpha", "lora_alpha")): a}
            )
            if found is not None and wanted is not None:
                pairs, ratios = [*pairs, (float(r), float(a))], [*ratios, found / wanted]
    for meaning, factor in FACTORS:
        at = list(zip(ratios or [ratio], pairs or [(float("nan"), float("nan"))], strict=True))
        if all(abs(one - factor(r, a)) < 1e-6 * (1 + abs(one)) for one, (r, a) in at):
            return f"what is added is {ratio:.4g} times the reference's: {meaning}"
    return f"what is added is {ratio:.4g} times the reference's: a factor is wrong"


def _against_function(subject: Subject, case: TinyModel, draw: int) -> None:
    """At linear sites: dense(x, weight, bias, ...) with the tensors of the module and its options by name."""
    function = subject.reference.function
    model, source = subject.attached(case), torch.Generator().manual_seed(7 + draw + 100 * subject.reference.seed)
    model.eval()
    compared = False
    for path, module in modules(model).items():
        site = model.get_submodule(path)
        if not isinstance(site, Linear):
            continue
        with torch.no_grad():
            for tensor in _named(module).values():
                tensor.copy_(0.3 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=source))
        x = torch.randn(3, 11 + draw, site.in_features, dtype=torch.float64, generator=source)
        known: dict[str, Any] = {
            **{option.name: option.default for option in registry.options(subject.spec.name)},
            **subject.spec.options, **{name.replace(".", "_"): x for name, x in module.state_dict().items()},
        }  # fmt: skip
        asked = list(inspect.signature(function).parameters)[3:]
        if missing := [name for name in asked if name not in known]:
            raise Failed(
                f"the reference asks for {missing[0]!r}; the module has {listing(module.state_dict())} and the options "
                f"{listing(option.name for option in registry.options(subject.spec.name))}; give them the names of the "
                "formula"
            )
        with torch.no_grad():
            out, expected = site(x), function(x, site.weight, site.bias, **{name: known[name] for name in asked})
        said = slip_of(x, out, expected, site, subject)
        close(f"{case}: the output at {path}", out, expected, 1e-10, said or "compare with the formula, line by line")
        compared = True
    if not compared:
        raise Failed("it hangs on no linear layer, of which the reference speaks; set default_targets")


@needs("attaches")
def is_own_work(subject: Subject) -> None:
    """The method is written out: it derives from no registered method and calls none

    Print `type(module).__mro__`, and search the file for imports from effzoo.peft.
    """
    derives(subject.cls.__mro__, subject.reference)
    case = CASES[0]
    others = [cls for name in registry.names() if (cls := registry.get(name)) is not subject.cls]
    files = {inspect.getsourcefile(cls) for cls in others if cls.__module__.startswith("effzoo.")}
    with calls(files, subject.reference) as usual:
        attach(case.model(), "head").eval()(**case.batch())  # the head, which every adapter has
    with calls(files, subject.reference) as called:
        model = subject.attached(case).eval()
        model(**case.batch())
    for module in modules(model).values():
        derives(type(module).__mro__, subject.reference)
    refuse(called - usual)
