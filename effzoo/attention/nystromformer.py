"""Nystrom attention: the softmax matrix from its rows and columns at a few landmarks (Xiong et al. 2021, Nystromformer,
arXiv:2102.03902, section 3)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Range
from effzoo.attention.core import AttentionCore, Context, Mask, memory_part
from effzoo.attention.part import Part, bias_of
from effzoo.devices import without_autocast
from effzoo.errors import OptionError
from effzoo.registry import attention
from effzoo.sites import KeysValues, Linear

Steps = Annotated[int, Range(1, 30)]  # each makes what rounding leaves of a singular A 13 / 4 times as large


@attention.register("nystromformer")
class Nystromformer(AttentionCore):
    """softmax(q k~^T / sqrt(d)) Z softmax(q~ k^T / sqrt(d)) v, where q~ and k~ are means of queries and keys over
    segments, and Z is near the pseudo-inverse of A = softmax(q~ k~^T / sqrt(d)).

    Z_0 = A^T / (|A|_1 |A|_inf),    Z_(j+1) = Z_j (13 I - A Z_j (15 I - A Z_j (7 I - A Z_j))) / 4

    (equations 13 and 14, algorithm 1). Cost O(n m) for m landmarks. A segment is a stretch of as many tokens as the
    others, or one more; padding is in none, and an example with fewer tokens than m has one landmark for each. Memory
    keys (prefix tuning) are more columns of the last softmax. Dropout acts on the first and the last softmax.

    landmarks: m; None: full attention, for the convolution alone.
    iterations: of Z (the paper: 6).
    conv: odd; the length of a convolution of v along the sequence, one kernel for each head, that is added to the
        output (the skip connection of figure 2); a site with the role `attn.conv`. None: no convolution.
    hf: segments of the whole row and the convolution have padding in them too, and Z_0 of all heads and examples is
        divided by the largest |A|_1 of them; for equality with HF alone, as it lets padding and other examples matter.
    """

    paper = "Xiong et al. 2021, Nystromformer, arXiv:2102.03902, equations 13 and 14, algorithm 1"
    cost = "n * landmarks"
    not_causal = "its landmarks are means over past and future together"

    def __init__(
        self,
        context: Context,
        *,
        landmarks: Count | None = 64,
        iterations: Steps = 6,
        conv: Count | None = None,
        hf: bool = False,
    ):
        super().__init__(context)
        if conv is not None and conv % 2 == 0:
            raise OptionError(f"nystromformer: conv is odd, so that a token stands in the middle, got {conv}")
        self.landmarks, self.iterations, self.hf = landmarks, iterations, hf
        self.conv: Linear | None = None
        if conv is not None:
            self.conv = Linear(conv, context.heads, bias=False, role="attn.conv", layer=context.layer)
        self.initialise()

    def initialise(self) -> None:
        if self.conv is not None:
            nn.init.normal_(self.conv.weight, std=0.02)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        bias = mask.key_bias(q.dtype)
        if self.landmarks is None:
            out = self.attend(Part(q, k, v, bias), memory_part(q, memory))
        else:
            means, there = self.segments(k.shape[2], mask, k)
            q_, k_ = means @ q, means @ k
            read = self.attend(Part(q_, k, v, bias), memory_part(q_, memory))
            out = self.through_landmarks(q, q_, k_, read, there)
        return out if self.conv is None else out + self.convolved(v, mask)

    def through_landmarks(self, q: Tensor, q_: Tensor, k_: Tensor, read: Tensor, there: Tensor) -> Tensor:
        """softmax(q k_^T / sqrt(d)) Z read, of what the landmarks that are there have read."""
        with without_autocast(q):
            Z = self.inverse(_softmax(q_, k_, there) * there.mT)
            values = (Z @ read.to(Z.dtype)).to(read.dtype)
        return self.attend(Part(q, k_, values, bias_of(there, q.dtype)))

    def segments(self, n: int, mask: Mask, like: Tensor) -> tuple[Tensor, Tensor]:
        """The means over segments of n positions as a matrix [batch or 1, 1, m, n] with the dtype of `like`, and which
        segments have a token, bool[batch or 1, 1, 1, m]."""
        assert self.landmarks is not None
        m, valid = min(self.landmarks, n), None if self.hf else mask.valid

        def make() -> tuple[Tensor, Tensor]:
            tokens = torch.ones(1, n, dtype=torch.bool, device=like.device) if valid is None else valid
            count = tokens.sum(dim=1, keepdim=True)
            used = count.clamp(max=m)
            place = (tokens.cumsum(dim=1) - 1) * used // count.clamp(min=1)
            number = torch.arange(m, device=like.device)
            inside = (place[:, None] == number[:, None]) & tokens[:, None]
            means = inside.to(like.dtype) / inside.sum(dim=-1, keepdim=True).clamp(min=1)
            return means[:, None], (number < used)[:, None, None]

        return make() if valid is None else mask.memo(("landmarks", self.landmarks, like.dtype), make)

    def inverse(self, A: Tensor) -> Tensor:
        """Z of A [..., m, m], whose rows sum to 1 or are 0."""
        largest = A.sum(dim=-2).amax(dim=-1)  # |A|_1; |A|_inf is 1
        factor = largest.amax() if self.hf else largest[..., None, None]
        Z, identity = A.mT / factor.clamp(min=0.5), torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        with without_autocast(A):
            for _ in range(self.iterations):
                AZ = A @ Z
                Z = Z @ (13 * identity - AZ @ (15 * identity - AZ @ (7 * identity - AZ))) / 4
        return Z

    def convolved(self, v: Tensor, mask: Mask) -> Tensor:
        """v convolved along the sequence with the kernel of its head."""
        assert self.conv is not None
        if mask.valid is not None and not self.hf:
            v = v.masked_fill(~mask.valid[:, None, :, None], 0.0)
        half = self.conv.in_features // 2
        windows = F.pad(v, (0, 0, half, half)).unfold(2, self.conv.in_features, 1)  # [batch, heads, n, d, kernel]
        if self.conv.active:  # adapters see a window, and give an output for each head
            of_all: Tensor = self.conv(windows)
            return of_all.diagonal(dim1=1, dim2=4).movedim(-1, 1)
        return torch.einsum("bhndt,ht->bhnd", windows, self.conv.weight.to(v.dtype))

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition with the three matrices written out."""
        q, k, v = projected
        n, valid = k.shape[2], torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
        valid = (valid if mask.valid is None else mask.valid)[:, None, None, :]
        keys, values = k, v
        if memory is not None:
            in_front = [x.to(q.dtype).expand(q.shape[0], *x.shape[-3:]) for x in memory]
            keys, values = (torch.cat(pair, dim=2) for pair in zip(in_front, (k, v), strict=True))
            valid = F.pad(valid, (keys.shape[2] - n, 0), value=True)
        if self.landmarks is None:
            out = _softmax(q, keys, valid) @ values
        else:
            means, there = self.segments(n, mask, k)
            q_, k_ = means @ q, means @ k
            last = _softmax(q_, keys, valid) @ values
            out = _softmax(q, k_, there) @ self.inverse(_softmax(q_, k_, there) * there.mT) @ last
        out = out.to(v.dtype)
        return out if self.conv is None else out + self.convolved(v, mask)


def _softmax(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the allowed keys [..., 1, s], in float32 or better; 0 where none is."""
    exact = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        scores = q.to(exact) @ k.to(exact).mT / math.sqrt(q.shape[-1])
        return scores.masked_fill(~allowed, torch.finfo(exact).min).softmax(dim=-1) * allowed
