"""Local attention in chunks: every query sees its own chunk and its neighbours (Kitaev et al. 2020, Reformer; as in Trax and HF Reformer)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from effzoo.annotations import Count, Whole
from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask, State, memory_part
from effzoo.attention.part import Part, bias_of
from effzoo.errors import IncompatibleError
from effzoo.registry import attention


@attention.register("local", "chunked")
class Local(AttentionCore):
    """Query i sees the keys of its chunk i // chunk, of look_back chunks before it and of look_forward chunks after it.

    softmax over {j : -look_forward <= i // chunk - j // chunk <= look_back} of q_i . k_j / sqrt(d); causal cuts it to j <= i. These are the
    local layers of Reformer; in a model they alternate with `lsh` ones, by a spec per layer. Cost O(n chunk).

    chunk: length of a chunk. look_back: how many chunks before its own a query sees. look_forward: how many after.
    circular: the first chunks see the last ones, and the last the first, as in HF and Trax: in an encoder the end of a sequence is then
    seen from its beginning, and padding matters for it; only for equality with those. A key is seen once, also when the look
    around the ring meets it twice. Decoding keeps (look_back + 1) chunk keys at most.
    """

    paper = "Kitaev et al. 2020, Reformer: the efficient transformer, arXiv:2001.04451; local layers of its released code (Trax)"
    cost = "n * chunk"
    supports_cache = True

    def __init__(self, context: Context, *, chunk: Count = 64, look_back: Whole = 1, look_forward: Whole = 0, circular: bool = False):
        super().__init__(context)
        self.chunk, self.before, self.after, self.circular = chunk, look_back, look_forward, circular

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:  # type: ignore[override]
        batch, _, n, _ = q.shape
        sight = self._sight(n)
        bias = mask.memo(("local", sight, n, self.circular, self.context.causal, q.dtype), lambda: self._bias(batch, n, mask, q))

        def fold(x: Tensor) -> Tensor:
            return rearrange(self._chunks(x), "b h chunks c d -> (b chunks) h c d")

        def unfold(x: Tensor) -> Tensor:
            return rearrange(x, "(b chunks) h c d -> b h (chunks c) d", b=batch)[:, :, :n]

        keys, values = (rearrange(self._seen(x), "b h chunks w d -> (b chunks) h w d") for x in (k, v))
        return self.attend(Part(fold(q), keys, values, bias, fold=fold, unfold=unfold), memory_part(q, memory))

    def _sight(self, n: int) -> tuple[int, int, int]:
        """Length of a chunk and how many chunks are seen before and after, none twice."""
        chunk = min(self.chunk, n)
        others = -(-n // chunk) - 1
        before = min(self.before, others)
        return chunk, before, min(self.after, others - before if self.circular else others)

    def _chunks(self, x: Tensor) -> Tensor:
        """[b, h, n, d] -> [b, h, chunks, chunk, d], zeros at the end."""
        chunk, _, _ = self._sight(x.shape[2])
        return rearrange(F.pad(x, (0, 0, 0, -x.shape[2] % chunk)), "b h (chunks c) d -> b h chunks c d", c=chunk)

    def _seen(self, x: Tensor) -> Tensor:
        """[b, h, n, d] -> what each chunk sees, [b, h, chunks, (before + 1 + after) chunk, d]; zeros outside the sequence."""
        _, before, after = self._sight(x.shape[2])
        x = self._chunks(x)
        chunks = x.shape[2]
        x = torch.cat([x[:, :, chunks - before :], x, x[:, :, :after]], dim=2) if self.circular else F.pad(x, (0, 0, 0, 0, before, after))
        return torch.cat([x[:, :, offset : offset + chunks] for offset in range(before + 1 + after)], dim=3)

    def _bias(self, batch: int, n: int, mask: Mask, q: Tensor) -> Tensor:
        """[batch chunks, 1, chunk, keys]: a token, inside the sequence, and not in the future."""
        place = torch.arange(1, n + 1, device=q.device).expand(batch, n)  # 0 stands for nothing
        held = place if mask.valid is None else place * mask.valid
        key = rearrange(self._seen(held[:, None, :, None]), "b 1 chunks w 1 -> (b chunks) 1 1 w")
        allowed = key > 0
        query = rearrange(self._chunks(place[:, None, :, None]), "b 1 chunks c 1 -> (b chunks) 1 c 1")
        return bias_of(allowed & (key <= query) if self.context.causal else allowed.expand(-1, -1, query.shape[2], -1), q.dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, past: State | None, memory: KeysValues | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        if self.circular and self.after:
            raise IncompatibleError(
                "local: a ring with look_forward shows the last chunks the first ones, and which chunks are last changes with every token; "
                "decode with circular=false, or without a cache (use_cache=False)"
            )
        kept, new = (self.before + 1) * self.chunk, q.shape[2]  # how far back a later query can look
        position = torch.arange(new, device=q.device).expand(q.shape[0], new)
        if past is None:
            out = self(q, k, v, mask=mask, memory=memory)
        else:
            k, v = torch.cat([past["k"], k], dim=2), torch.cat([past["v"], v], dim=2)
            position = torch.cat([past["position"], past["position"][:, -1:] + 1 + position], dim=1)
            query, key = position[:, -new:, None], position[:, None, :]
            allowed = (key <= query) & (query // self.chunk - key // self.chunk <= self.before)
            if mask.valid is not None:
                allowed = allowed & mask.valid[:, None, -k.shape[2] :]
            out = self.attend(Part(q, k, v, bias_of(allowed[:, None], q.dtype)), memory_part(q, memory))
        return out, {"k": k[:, :, -kept:], "v": v[:, :, -kept:], "position": position[:, -kept:]}

    def pattern(self, n: int, mask: Mask) -> Tensor:
        allowed = reference.padding(n, mask.valid)
        chunk_of = torch.arange(n, device=allowed.device) // self.chunk
        gap = chunk_of[:, None] - chunk_of[None, :]
        if self.circular:
            ring = -(-n // self.chunk)
            sight = (gap % ring <= self.before) | (-gap % ring <= self.after)
        else:
            sight = (gap <= self.before) & (gap >= -self.after)
        allowed = allowed & sight
        return allowed & (reference.distance(n, allowed.device) >= 0) if self.context.causal else allowed
