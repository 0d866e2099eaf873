"""Keys that are not the sequence itself: memory, a source, a cache; and projections that a kind shortens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, Mask, State
from effzoo.blocks import Attention
from effzoo.checks.runner import Failed, NotApplicable, close, needs
from effzoo.checks.subject import (
    BATCH,
    HEADS,
    WIDTH,
    Subject,
    cut,
    draw,
    given,
    gradients,
    padding,
    same_as,
    same_as_definition,
    some_global,
    some_memory,
)
from effzoo.errors import EffzooError


@needs("every_length")
def memory_is_attended(subject: Subject) -> None:
    """Memory acts as more keys that every query sees

    Give memory values of 1e3: every output must move. Compare with `core.dense(..., memory=memory)`, one softmax
    over both.
    """
    valid, memory = padding(16), some_memory()
    if not subject.cls.takes_memory():
        try:
            subject.core().check_memory()
        except EffzooError:
            raise NotApplicable(
                "the kind takes no memory: its forward has no such parameter, and it refuses one"
            ) from None
        raise Failed(
            "forward has no parameter `memory`, yet check_memory let a memory pass; leave "
            "AttentionCore.check_memory as it is"
        )
    for where, core in subject.cores():
        inputs = draw(core, 16, Mask(valid))
        without, out = core(*inputs, mask=Mask(valid)), core(*inputs, mask=Mask(valid), memory=memory)
        advice = "add `memory_part(q, memory)` to the parts of the softmax"
        if torch.equal(without, out):
            raise Failed(f"{where}: memory of 3 keys changed nothing; {advice}")
        for name, grad in zip(("keys", "values"), gradients(out, list(memory)), strict=True):
            if not torch.isfinite(grad).all() or (grad.abs().amax(dim=-1) == 0).any():
                raise Failed(f"{where}: some memory {name} get a gradient that is 0 or not finite; {advice}")
        if not subject.has_definition:
            continue
        for n in (7, 31):
            same_as_definition(core, n, f"{where} with memory", advice, memory, valid=padding(n))
        if subject.cls.knows_globals():
            same_as_definition(
                core, 31, f"{where} with memory and global tokens", advice, memory, is_global=some_global(31)
            )


@needs("equals_definition", "memory_is_attended")
def crosses_to_a_source(subject: Subject) -> None:
    """Cross-attention: a source of another length, with its own padding, is attended as the dense definition says

    `core(q, k[:, :, :7], v[:, :, :7], mask=Mask(valid_of_the_keys))`: look for a length or a mask that is taken from q
        where k is meant.
    """
    if not subject.core().crosses:
        raise NotApplicable("the kind attends within one sequence only")
    core, memory = subject.core(), some_memory() if subject.cls.takes_memory() else None
    has_dense = subject.cls.dense is not AttentionCore.dense

    def dense(*projected: Tensor, mask: Mask, memory: Any) -> Tensor:
        if has_dense:
            return core.dense(*projected, mask=mask, memory=memory)
        q, k, v = projected
        return reference.dense(q, k, v, reference.padding(k.shape[2], mask.valid), memory)

    advice = "mask.valid speaks of the keys; override `dense` if a query sees fewer keys of a source than all"
    for n, keys in ((7, 31), (31, 7), (1, 16), (16, 1)):
        for what, valid in (("", None), (" with padding", padding(keys))):
            inputs = draw(core, n, Mask(valid), keys=keys)
            out = core(*inputs, **given(Mask(valid), memory))
            expected = dense(*inputs, mask=Mask(valid), memory=memory)
            same_as(out, expected, core, inputs, f"{n} queries and {keys} keys{what}", advice, memory)


@needs("every_length")
def cache_equals_forward(subject: Subject) -> None:
    """Decoding: steps of one and of several positions give the last outputs of forward over all positions so far

    Print the keys that the state holds after each step; the newest position must see itself, and padding in front must
    stay unseen.
    """
    if not subject.cls.decodes():
        raise NotApplicable(
            "the kind cannot be causal" if subject.cls.not_causal else "the kind has a `forward` and no `step`"
        )
    core, sizes = subject.core(causal=True), (12, 1, 1, 5, 1, 11)
    n = sum(sizes)
    advice = "keep every key that a later query can see, and count positions and mask.valid from the first one on"
    front = torch.arange(n) >= torch.tensor([0, 3, 9])[:, None]
    marked = some_global(n) & front & (torch.arange(n) < sizes[0])
    for what, valid, memory, is_global in (
        ("", None, None, None),
        (" with padding in front", front, None, None),
        *([(" with padding in front and memory", front, some_memory(), None)] if subject.cls.takes_memory() else []),
        *([(" with global tokens in the prompt", front, None, marked)] if subject.cls.knows_globals() else []),
    ):
        inputs, state, end = draw(core, n, Mask(valid, is_global)), None, 0
        for size in sizes:
            start, end = end, end + size
            of_keys = None if valid is None else valid[:, :end]
            prompt = is_global[:, :end] if is_global is not None and start == 0 else None
            now = _only(cut(inputs, places=slice(start, end)), core, Mask(of_keys, prompt))
            out, state = core.step(*now, past=state, **given(Mask(of_keys, prompt), memory))
            every = Mask(of_keys, None if is_global is None else is_global[:, :end])
            expected = core(*cut(inputs, places=slice(end)), **given(every, memory))[:, :, start:]
            here = torch.ones(BATCH, size, dtype=torch.bool) if valid is None else valid[:, start:end]
            here = here[:, None, :, None]
            step = f"the step over {size} positions after {start}{what}: its outputs"
            close(step, out.masked_fill(~here, 0.0), expected.masked_fill(~here, 0.0), 1e-10, advice)
            _begins_with_batch(state)


def _only(inputs: list[Any], core: AttentionCore, mask: Mask) -> list[Any]:
    """The projections that the layer would pass with this mask."""
    used = core.uses(mask)
    return [x if name in used else None for name, x in zip(core.projections, inputs, strict=True)]


def _begins_with_batch(state: State) -> None:
    for name, tensor in state.items():
        if tensor.ndim == 0 or tensor.shape[0] != BATCH:
            shape = tuple(tensor.shape)
            raise Failed(
                f"state[{name!r}] has shape {shape}, and not the batch of {BATCH} first; beam search reorders the "
                "first axis of every tensor"
            )


@needs("every_length")
def project_is_the_linear(subject: Subject) -> None:
    """In its layer, a kind that shortens its projections gives what it gives on the plain ones

    Call `core.project` for each projection by hand and compare with `linear(x)`: a bias, padding or the length is
    lost on the way.
    """
    if subject.cls.project is AttentionCore.project:
        raise NotApplicable("the kind takes its projections as the layer makes them")
    for where, core in subject.cores():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layer = Attention(HEADS * WIDTH, subject.spec, core.context, out_dim=0).double().eval()
        layer.core = core
        for n in (7, 31):
            for what, valid in (("", None), (" with padding", padding(n))):
                x = torch.randn(
                    BATCH, n, HEADS * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
                ).requires_grad_()
                plain = [
                    getattr(layer, name)(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for name in core.projections
                ]
                expected = core(*plain, mask=Mask(valid)).transpose(1, 2).flatten(2)
                out = layer(x, Mask(valid))
                advice = (
                    "`project` may only change the order of linear steps, never the function: mind the bias and padding"
                )
                close(f"{where}{what}, n = {n}: the layer's output", out, expected, 1e-10, advice)
                leaves = [x, *layer.parameters()]
                weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
                both = [
                    torch.autograd.grad((result * weight).sum(), leaves, allow_unused=True)
                    for result in (out, expected)
                ]
                for found, wanted in zip(*both, strict=True):
                    found, wanted = (torch.zeros(1) if grad is None else grad for grad in (found, wanted))
                    close(f"{where}{what}, n = {n}: a gradient of the layer", found, wanted, 1e-10, advice)
