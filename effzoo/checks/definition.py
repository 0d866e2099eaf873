"""An attention kind against what it says of itself: projections, shapes, lengths, and its dense definition."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from effzoo.attention.core import AttentionCore, Mask
from effzoo.checks.declared import check_docstring, check_options, check_signature
from effzoo.checks.runner import Failed, close, needs
from effzoo.checks.subject import (
    BATCH,
    HEADS,
    LENGTHS,
    WIDTH,
    Subject,
    draw,
    gradients,
    live,
    masks,
    padding,
    same_as_definition,
    some_global,
)
from effzoo.registry import attention as registry


def declares_itself(subject: Subject) -> None:
    """Options are keyword-only with type and default; docstring and cost are there; nothing is swallowed

    `effzoo show NAME` prints what the class says of itself; options are the keyword-only parameters of its constructor.
    """
    check_options(registry, subject.cls, leading=1)
    check_docstring(subject.cls)
    for method in ("forward", "step", "dense", "project"):
        check_signature(subject.cls, method)
    own = subject.cls.__mro__[: subject.cls.__mro__.index(AttentionCore)]
    if not any("cost" in vars(parent) for parent in own):
        raise Failed(f"{subject.cls.__qualname__} does not say its cost; write for example cost = 'n * window'")


def projections_match(subject: Subject) -> None:
    """The declared projections are those that forward takes, by name and in order

    Compare `core.projections` with `inspect.signature(type(core).forward)`.
    """
    for _, core in subject.cores():
        declared = list(core.projections)
        for method in ("forward", "dense", "step"):
            _match(subject.cls, method, declared)
        for mask in (Mask(), Mask(is_global=some_global(7))) if subject.cls.knows_globals() else (Mask(),):
            used = core.uses(mask)
            if tuple(name for name in declared if name in used) != tuple(used):
                raise Failed(
                    f"uses(mask) names {list(used)}; return some of the declared {list(declared)}, in the same order"
                )


def _match(cls: type[AttentionCore], method: str, declared: Sequence[str]) -> None:
    """Fail unless a method takes these projections first; it may take more, with defaults."""
    if getattr(cls, method) is getattr(AttentionCore, method):
        return
    parameters = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    wanted = ("mask", "memory") if cls.takes_memory() else ("mask",)
    missing = [name for name in wanted if name not in (p.name for p in parameters)]
    if missing:
        raise Failed(f"{method} takes no {missing[0]!r}; its keywords are mask and memory (past as well in step)")
    places = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in ("mask", "memory", "past")
    ]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    taken = [p.name for p in places]
    absent = [name for name in declared if name not in taken]
    if absent:
        raise Failed(
            f"{absent[0]!r} is declared in `projections`, but {method} takes {taken}; add it to {method}, "
            "or take it out of `projections`"
        )
    extra = [p.name for p in places if p.name not in declared and p.default is p.empty]
    if extra:
        raise Failed(
            f"{method} takes {extra[0]!r}, which `projections` {list(declared)} lacks, so the layer builds none; "
            "name it there, or give it a default"
        )
    if taken[: len(declared)] != list(declared):
        raise Failed(
            f"{method} takes {taken[: len(declared)]} where `projections` says {list(declared)}; the layer passes "
            "them by place: use one order"
        )


@needs("projections_match")
def shape_and_dtype(subject: Subject) -> None:
    """Output and gradients have the shape and dtype of the inputs in float32, float64, bfloat16 and float16

    Print `out.dtype` after each line of forward: masks and tables made without `dtype=q.dtype` are float32.
    """
    for where, core in subject.cores():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            inputs = draw(core, 31, Mask(), dtype=dtype)
            out = core.to(dtype)(*inputs, mask=Mask())
            wanted = (BATCH, HEADS, 31, WIDTH)
            if out.shape != wanted or out.dtype != dtype:
                raise Failed(
                    f"{where}: {out.dtype} of shape {tuple(out.shape)} came out for {dtype} of shape "
                    f"{wanted}; return the latter"
                )
            for tensor in (out, *gradients(out, live(inputs))):
                advice = (
                    "mask with -inf or torch.finfo(dtype).min: -1e9 overflows float16" if dtype is torch.float16 else
                    "a softmax over no key is 0 / 0: a query that sees none gives 0, by nan_to_num(0.0) behind it"
                )  # fmt: skip
                close(f"{where}, {dtype}: output or gradient", tensor, tensor, 0.0, advice)


@needs("shape_and_dtype")
def runs_under_autocast(subject: Subject) -> None:
    """Under autocast, with bfloat16 projections and own parameters in float32, the output is the float64 one to
    bfloat16 accuracy

    `with torch.autocast("cpu", torch.bfloat16): core(*bfloat16_inputs, mask=mask)`, and print the dtypes after each
        line.
    """
    for where, core in subject.cores():
        for what, given in masks(core, 31):
            exact = [None if x is None else x.to(torch.bfloat16).double() for x in draw(core, 31, Mask(**given))]
            expected = core.double()(*exact, mask=Mask(**given)).detach()
            inputs = [None if x is None else x.detach().to(torch.bfloat16).requires_grad_() for x in exact]
            with torch.autocast("cpu", torch.bfloat16):
                out = core.float()(*inputs, mask=Mask(**given))
            if out.dtype != torch.bfloat16:
                raise Failed(
                    f"{where}{what}: {out.dtype} came out of bfloat16 under autocast; cast own parameters to q.dtype "
                    "where they meet the inputs"
                )
            gradients(out, live(inputs))
            advice = (
                "keep softmax statistics and discrete choices (hashes, sorts) in float32, and cast own "
                "parameters to q.dtype"
            )
            close(
                f"{where}{what}: the output under autocast",
                out.detach().double(),
                expected,
                0.05 * float(1 + expected.abs().max()),
                advice,
            )


@needs("shape_and_dtype")
def every_length(subject: Subject) -> None:
    """Every length works, forward and backward: 1, 2, 7, 16, 31, 64

    `effzoo check FILE --only every_length`: the reason names the first length that does not work.
    """
    for where, core in subject.cores():
        for n in LENGTHS:
            inputs = draw(core, n, Mask())
            out = core(*inputs, mask=Mask())
            if out.shape[2] != n:
                raise Failed(
                    f"{where}: {out.shape[2]} positions came out for n = {n}; cut padding to a block multiple off again"
                )
            for tensor in (out, *gradients(out, live(inputs))):
                advice = "mask with care where a block holds no key"
                close(f"{where}, n = {n}: output or gradient", tensor, tensor, 0.0, advice)


@needs("every_length", "is_no_known_slip")
def equals_definition(subject: Subject) -> None:
    """Output and gradients equal the dense definition to 1e-10

    At the index of the reason, which is (batch, head, query, dimension), compare `core.pattern(n, mask)[batch, head,
    query]` with the keys that forward shows to that query: feed one-hot values (`v = torch.eye(n)` in the first
    dimensions), and the output is the weights.
    """
    subject.needs_definition()
    advice = (
        "compare `pattern` with what forward attends: window edges, the causal triangle, padding, the scale 1 / sqrt(d)"
    )
    for where, core in subject.cores():
        for n in (1, 7, 31, 64):
            same_as_definition(core, n, where, advice)
        for n in (7, 31):
            same_as_definition(core, n, f"{where} with padding", advice, valid=padding(n))


@needs("every_length")
def gradients_are_derivatives(subject: Subject) -> None:
    """Gradients of inputs and own parameters equal numerical derivatives (gradcheck)

    `torch.autograd.gradcheck(lambda v: core(q, k, v, mask=Mask()), v)` for one input after the other; look for detach,
        no_grad,
    `.data`, in-place writes, or an autograd.Function with a wrong backward.
    """
    for where, core in subject.cores():
        for what, given in masks(core, 7):
            inputs = draw(core, 7, Mask(**given))
            here, parameters = live(inputs), dict(core.named_parameters())

            def output(
                *tensors: Tensor,
                core: Any = core,
                given: Any = given,
                inputs: Any = inputs,
                parameters: Any = parameters,
            ) -> Tensor:
                rest = iter(tensors)
                filled = [None if x is None else next(rest) for x in inputs]
                own = dict(zip(parameters, rest, strict=True))
                return torch.func.functional_call(core, own, tuple(filled), {"mask": Mask(**given)})

            try:
                gradcheck(output, (*here, *parameters.values()), fast_mode=True)
            except GradcheckError as error:
                what_failed = " ".join(str(error).split())[:200]
                raise Failed(
                    f"{where}{what}, n = 7: {what_failed}; some step of forward is not what its backward differentiates"
                ) from error
