"""LoReFT: hidden states between the blocks are edited at some positions (Wu et al. 2024, arXiv:2404.03592)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Whole
from effzoo.errors import IncompatibleError, IncompatiblePeft, OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, PeftModule, Site, Stream


def orthonormal(V: Tensor) -> Tensor:
    """R [rank, dim], whose orthonormal rows span those of V: R^T is Q of V^T = Q U, with a positive diagonal of U."""
    exact = V.to(torch.promote_types(V.dtype, torch.float32))  # there is no decomposition in half precision
    Q, U = torch.linalg.qr(exact.mT)
    return torch.where(U.diagonal() < 0, -Q, Q).mT.to(V)


class Intervention(PeftModule):
    """h' = h + R^T (W h + b - R h) at the first and last tokens, and h' = h at all others.

    V: [rank, dim], from which R is made; so R has orthonormal rows whatever the optimizer does.
    """

    not_mergeable = "edits the hidden states of some positions alone, and a weight acts on all positions alike"

    def __init__(self, dim: int, rank: int, first: int, last: int):
        super().__init__()
        self.first, self.last = first, last
        self.V = nn.Parameter(torch.empty(rank, dim))
        nn.init.orthogonal_(self.V)
        self.source = nn.Linear(dim, rank)  # W and b

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        R = orthonormal(self.V)
        edited = y + (self.source(y) - y @ R.mT) @ R
        return torch.where(self.chosen(y, context)[..., None], edited, y)

    def chosen(self, h: Tensor, context: HookContext) -> Tensor:
        """The positions that are edited, bool[batch or 1, n]; with a cache, the tokens in it count as earlier ones."""
        mask, n = context.mask, h.shape[-2]
        if mask is not None and mask.over_ranks is not None:
            raise IncompatibleError(
                "loreft counts tokens from both ends of a sequence, of which this rank has a slice; use one rank"
            )
        valid = None if mask is None else mask.valid
        if valid is None:
            valid = torch.ones(1, context.past + n, dtype=torch.bool, device=h.device)
        number = valid.cumsum(dim=-1)
        from_end = number[:, -1:] - number
        return (valid & ((number <= self.first) | (from_end < self.last)))[:, -n:]


@peft.register("loreft", "reft")
class LoReFT(Method):
    """h' = h + R^T (W h + b - R h), an edit of the hidden state behind a block in the `rank` directions R, at the first
    and last tokens alone; R has orthonormal rows.

    rank: of the edit.
    first: so many tokens at the beginning are edited.
    last: so many at the end; None for as many as `first` in an encoder, and none in a decoder, where no position knows
        how many follow.

    It trains (2 dim + 1) rank numbers for each block. Padding is not counted, prompt tokens are. W starts as in a
    linear layer, so the model does not start as it is. A reversible model has two streams, and so none to edit.
    """

    paper = "Wu et al. 2024, ReFT: Representation finetuning for language models, arXiv:2404.03592, section 3.2, eq. 2"
    accepts = (Stream,)
    default_targets = ("stream",)
    identity_at_init = False
    learning_rate = 2e-3
    size = "rank"

    def __init__(
        self, *, rank: Count = 4, first: Whole = 4, last: Whole | None = None, targets: Targets = None,
        layers: Layers = None,
    ):  # fmt: skip
        super().__init__(targets=targets, layers=layers)
        if first + (last or 0) == 0:
            raise OptionError(f"{self.name}: no token is edited with first={first} and last={last}; give one of them")
        self.rank, self.first, self.last = rank, first, last

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> Mapping[str, Any]:
        causal = any(cast(Stream, site).causal for site in found.values())
        if self.last is None:
            self.last = 0 if causal else self.first
        if self.last and causal:
            raise IncompatiblePeft(
                f"{self.name}[last={self.last}]", "a causal block", "whether a token is one of the last depends on how "
                "many come after it, which its hidden state must not",
                "edit the first tokens (last=0), or blocks of an encoder alone",
            )  # fmt: skip
        return {"last": self.last}

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Stream) and self.last is not None
        if self.rank > site.dim:
            raise OptionError(f"{self.name}: R has at most {site.dim} orthonormal rows, got rank={self.rank}")
        return Intervention(site.dim, self.rank, self.first, self.last)
