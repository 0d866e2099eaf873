"""Activated LoRA: a low-rank change from an invocation on (Greenewald et al. 2025, arXiv:2504.12397)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.errors import IncompatibleError, InputError
from effzoo.peft.parameter.lora import LowRank
from effzoo.sites import HookContext


def invoked(ids: Tensor, valid: Tensor | None, invocation: tuple[int, ...]) -> Tensor:
    """bool[batch, n]: the positions from the first token of the last invocation in each row of ids [batch, n] on.

    A row without the invocation has none; padding (False in valid) is no part of one.
    """
    text = ids if valid is None else ids.masked_fill(~valid, -1)
    places = torch.arange(text.shape[1], device=text.device)
    found = torch.ones_like(text, dtype=torch.bool)
    for number, token in enumerate(invocation):  # the token `number` places further on
        found = found & (F.pad(text, (0, number), value=-1)[:, number:] == token)
    last = torch.where(found, places, -1).amax(dim=1, keepdim=True)
    return (last >= 0) & (places >= last)


class ActivatedLowRank(LowRank):
    """y' = W x + s B A x at the tokens from the invocation on, and y' = W x before them."""

    not_mergeable = "acts from the invocation on, W + s B A there and W before it, and one weight acts on all tokens"

    later_tokens_matter = "what it changes goes from the last invocation on, which may be in later tokens"

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, invocation: tuple[int, ...]):
        super().__init__(inputs, outputs, rank, scale, dropout)
        self.invocation = invocation

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return torch.where(self.acts(x, context)[..., None], super().after(x, y, context), y)

    def acts(self, x: Tensor, context: HookContext) -> Tensor:
        """Where the change acts, bool[batch, n]; with a cache, the tokens in it count."""
        mask = context.mask
        if mask is not None and mask.over_ranks is not None:
            raise IncompatibleError(
                "an invocation is looked for in whole rows, of which this rank has a slice; use one rank"
            )
        if mask is None or mask.ids is None or mask.start is None:
            raise InputError("an adapter with an invocation looks for it in the tokens; give input_ids")
        active: Tensor = mask.memo(("invoked", self.invocation), lambda: invoked(mask.ids, mask.valid, self.invocation))
        tokens = mask.start.shape[:-1]  # of this call
        if x.shape[:-1] != tokens:
            raise IncompatibleError(
                f"an adapter with an invocation needs the states of {tuple(tokens)} tokens, and its site has an input "
                f"{tuple(x.shape)}; choose targets that are given the text alone: attn.q, or all of "
                "attn.* where no prompt of the layer is projected with it"
            )
        return active[:, -tokens[1] :]

    def delta(self, weight: Tensor, bias: Tensor | None) -> None:
        return None
