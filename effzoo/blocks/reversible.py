"""Reversible residuals: the inputs of a block are computed from its outputs, so that no activation is stored.

    y1 = x1 + attend(norm(x2)),  y2 = x2 + feed(norm(y1))        forward
    x2 = y2 - feed(norm(y1)),    x1 = y1 - attend(norm(x2))      backward, each sub-layer computed once more

Activation memory does not grow with depth (Gomez et al. 2017, arXiv:1707.04585, section 3.2; Kitaev et al. 2020,
Reformer, arXiv:2001.04451, section 3). `two_streams` is the plain form, which stores activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effzoo.attention.core import Cache, Mask
from effzoo.blocks.block import Block
from effzoo.errors import IncompatibleError

SubLayer = Callable[[Tensor], Tensor]


def two_streams(blocks: Sequence[Block], x: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
    """x [batch, n, dim], from which both streams start -> both side by side, [batch, n, 2 dim]."""
    first = second = x
    for attend, feed in _sublayers(blocks, mask, cache):
        first = first + attend(second)
        second = second + feed(first)
    return torch.cat([first, second], dim=-1)


def reversible(blocks: Sequence[Block], x: Tensor, mask: Mask) -> Tensor:
    """`two_streams`, storing activations of one sub-layer at a time, in the backward pass.

    Trainable parameters are inputs of the autograd function, so that adapters above frozen embeddings get gradients,
    and data parallel training sees them. Dropout and autocast are replayed.

    Raises IncompatibleError in the backward pass when a block uses a trainable tensor that is not its parameter, whose
    gradient would be lost.
    """
    parameters = list(dict.fromkeys(p for block in blocks for p in block.parameters() if p.requires_grad))
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not (parameters or x.requires_grad):
        return two_streams(blocks, x, mask)
    first = second = x
    frozen = (
        0
        if x.requires_grad
        else next(i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    )
    for attend, feed in _sublayers(blocks[:frozen], mask, None):  # nothing to learn here, so nothing to compute back
        first = first + attend(second)
        second = second + feed(first)
    first, second = _apply(list(_sublayers(blocks[frozen:], mask, None)), first, second, *parameters)
    return torch.cat([first, second], dim=-1)


def states(blocks: Sequence[Block], x: Tensor, mask: Mask) -> list[Tensor]:
    """Both streams side by side [batch, n, 2 dim], before, between and after the blocks."""
    first = second = x
    both = [torch.cat([first, second], dim=-1)]
    for attend, feed in _sublayers(blocks, mask, None):
        first = first + attend(second)
        second = second + feed(first)
        both.append(torch.cat([first, second], dim=-1))
    return both


def _sublayers(blocks: Sequence[Block], mask: Mask, cache: Cache | None) -> Iterator[tuple[SubLayer, SubLayer]]:
    """The two sub-layers of each block, with their norms."""
    for block in blocks:

        def attend(x: Tensor, block: Block = block) -> Tensor:
            with block.calling(x, mask):
                return block.attend(x if block.attn_norm is None else block.attn_norm(x), mask, cache)

        def feed(x: Tensor, block: Block = block) -> Tensor:
            with block.calling(x, mask):
                return block.feed(block.mlp_norm(x), mask)

        yield attend, feed


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sublayers, first, second, *parameters):  # type: ignore[no-untyped-def]
        x, before = first, []
        for attend, feed in sublayers:
            before.append(_Random(x))
            first = first + attend(second)
            before.append(_Random(x))
            second = second + feed(first)
        ctx.sublayers, ctx.states, ctx.parameters = sublayers, before, parameters
        ctx.autocast = (
            x.device.type,
            torch.get_autocast_dtype(x.device.type),
            torch.is_autocast_enabled(x.device.type),
        )
        ctx.save_for_backward(first, second)
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_first, grad_second):  # type: ignore[no-untyped-def]
        first, second = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        grads: dict[Tensor, Tensor] = {}
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            for attend, feed in reversed(ctx.sublayers):
                added, grad = _again(feed, first, grad_second, ctx.states.pop(), ctx.parameters, grads)
                second, grad_first = second - added, grad_first + grad
                added, grad = _again(attend, second, grad_first, ctx.states.pop(), ctx.parameters, grads)
                first, grad_second = first - added, grad_second + grad
        return None, grad_first, grad_second, *(grads.get(p) for p in ctx.parameters)


_apply: Callable[..., tuple[Tensor, Tensor]] = _Reversible.apply


def _again(
    sublayer: SubLayer, x: Tensor, grad: Tensor, state: _Random, parameters: Sequence[Tensor],
    grads: dict[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute a sub-layer once more: its output, and the gradient of its input; those of parameters go to `grads`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), state.replayed():
        added = sublayer(x)
    if not added.requires_grad:
        return added.detach(), torch.zeros_like(x)
    leaves = _leaves(added)
    used = [p for p in parameters if id(p) in leaves]
    if len(leaves) > len(used) + (id(x) in leaves):
        raise IncompatibleError(
            "a reversible block uses a trainable tensor that is no parameter of its own, so its gradient would be "
            "lost; "
            "register it in the block, or build the model with residual='plain'"
        )
    grad_x, *of_used = torch.autograd.grad(added, [x, *used], grad.to(added.dtype), allow_unused=True)
    for parameter, change in zip(used, of_used, strict=True):
        if change is not None:
            grads[parameter] = grads[parameter] + change if parameter in grads else change
    return added.detach(), torch.zeros_like(x) if grad_x is None else grad_x


def _leaves(out: Tensor) -> set[int]:
    """ids of the leaf tensors in the graph of `out`."""
    leaves, seen, stack = set(), set(), [out.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack.extend(following for following, _ in node.next_functions)
    return leaves


class _Random:
    """The state of the random generators, which `replayed` restores, so that dropout draws the same."""

    def __init__(self, like: Tensor):
        self.devices = [like.device] if like.is_cuda else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
