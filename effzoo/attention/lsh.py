"""LSH attention: tokens attend to tokens of the same hash bucket (Kitaev et al. 2020, Reformer, arXiv:2001.04451,
section 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from effzoo.annotations import Count, Few, Seed, Whole, problem
from effzoo.attention.core import AttentionCore, Context, Mask, ProjectionType, State, append, memory_part
from effzoo.attention.hashing import automatic, buckets_of, draw_rotations, sort
from effzoo.attention.part import Part, bias_of
from effzoo.attention.rounds import HashingRounds
from effzoo.attention.traced import Traced
from effzoo.devices import is_portable
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention
from effzoo.sites import Keys, KeysValues


@attention.register("lsh", "reformer")
class LSH(AttentionCore):
    """Queries are keys; each round sorts them by hash bucket and cuts them into chunks; a query sees its own chunk and
    the one before.

    out_i = sum_r,j exp(x_i . k_j) v_j / sum_r,j exp(x_i . k_j),    k_j = x_j / |x_j|,
        over rounds r and the keys j != i that query i sees in round r

    bucket(x) = argmax [x R, -x R], with a random R for each round and head. Cost O(rounds n chunk). A token sees itself
    only where it sees no other key in any round (section 2, "causal masking for shared-QK attention").

    rounds: of hashing; can be changed later (`core.rounds = 8`).
    chunk: positions of a chunk.
    buckets: 1, an even number, or even factors of it; None: 2 max_length / chunk as a power of two, in factors where it
        is large. It does not depend on the batch.
    look_back: chunks before its own that a query sees.
    look_forward: chunks after its own that a query sees.
    seed: of R, which has a generator of its own and is not saved; `resample` draws another.
    within_buckets: a query sees only keys of its own bucket (equation 3; not in HF and Trax).
    count_once: a pair that meets in N_ij rounds counts once, by the bias -log N_ij (appendix A; not in HF and Trax).
    circular: the first chunk looks back to the last one of the round before; for equality with HF and Trax alone, as it
        shows the end of a sequence to its beginning, and lets padding matter.
    stable: look_back and look_forward are counted from the query (look_back chunk keys of its bucket) instead of from
        its chunk. Without it, a chunk border depends on how many later tokens have smaller buckets: the value of a
        causal output may change as the sequence grows, though its gradient with respect to later tokens is 0, and a
        step of decoding equals the forward pass at the newest position alone.

    Keys are a site, `attn.keys`, so that a method can scale them without changing queries and buckets. Memory keys are
    normalised too; every query sees them in every round.
    """

    paper = "Kitaev et al. 2020, Reformer: the efficient transformer, arXiv:2001.04451, section 2 and appendix A"
    projections: Mapping[str, ProjectionType] = {"qk": "query and key", "v": "value"}
    cost = "n * rounds * chunk"
    rotations: Tensor
    hash_seed: int | None = None  # of transformers, where `rotate_by` was given rotations drawn from it

    def __init__(
        self,
        context: Context,
        *,
        rounds: Few = 4,
        chunk: Count = 64,
        buckets: Count | Sequence[Count] | None = None,
        look_back: Whole = 1,
        look_forward: Whole = 0,
        within_buckets: bool = False,
        count_once: bool = False,
        circular: bool = False,
        stable: bool = False,
        seed: Seed = 0,
    ):
        super().__init__(context)
        if stable and (look_back < 1 or circular):
            raise OptionError(
                "lsh: stable needs look_back of at least 1, and has no borders that could be circular; "
                "leave one of the two out"
            )
        given = (buckets,) if isinstance(buckets, int) else buckets
        factors = automatic(context.max_length, chunk) if given is None else tuple(given)
        if not factors or (factors != (1,) and any(factor < 2 or factor % 2 for factor in factors)):
            raise OptionError(f"lsh: buckets is 1, an even number or even factors such as (8, 16), got {buckets}")
        self.chunk, self.factors, self.before, self.after = chunk, factors, look_back, look_forward
        self.within_buckets, self.count_once, self.circular = within_buckets or stable, count_once, circular
        self.stable = stable
        self.shift_invariant = not circular
        if not stable:
            self.later_values_matter = (
                "a chunk border depends on how many later tokens have smaller buckets; lsh[stable=true] has no borders"
            )
        self.keys = Keys(context.heads * context.head_dim, role="attn.keys", layer=context.layer)
        self._seed: int | None = seed
        self.register_buffer("rotations", self._draw(range(0)), persistent=False)
        self.rounds = rounds

    @property
    def rounds(self) -> int:
        """How often the sequence is hashed."""
        return self._rounds

    @rounds.setter
    def rounds(self, rounds: int) -> None:
        if wrong := problem(rounds, Few):
            raise OptionError(f"lsh: rounds {wrong}")
        have = self.rotations.shape[0]
        if rounds > have:
            if self._seed is None:
                raise OptionError(
                    f"lsh: {rounds} rounds, but rotations were given for {have}; give more, or draw "
                    "some with resample(seed)"
                )
            self.rotations = torch.cat([self.rotations, self._draw(range(have, rounds)).to(self.rotations)])
        self._rounds = rounds

    def resample(self, seed: int) -> None:
        """Draw other rotations."""
        if wrong := problem(seed, Seed):
            raise OptionError(f"lsh: seed {wrong}")
        self._seed = seed
        self.rotations = self._draw(range(self._rounds)).to(self.rotations)

    def rotate_by(self, rotations: Tensor) -> None:
        """Hash with these rotations [rounds, heads, head_dim, sum of the factors / 2], as many rounds as they have."""
        if rotations.shape[1:] != self.rotations.shape[1:] or len(rotations) < 1:
            wanted = ", ".join(map(str, self.rotations.shape[1:]))
            raise InputError(
                f"lsh: rotations have the shape [rounds, {wanted}] for these heads and buckets, got "
                f"{list(rotations.shape)}"
            )
        self._seed, self.rotations, self._rounds = None, rotations.detach().to(self.rotations.device), len(rotations)

    def _draw(self, rounds: range) -> Tensor:
        assert self._seed is not None
        return draw_rotations(
            self._seed, self.context.layer, rounds, self.context.heads, self.context.head_dim, self.factors
        )

    @property
    def _times(self) -> int:
        """How often a key counts that a query sees in every round."""
        return 1 if self.count_once else self._rounds

    def forward(self, qk: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        n, k = qk.shape[2], self._keys(qk)
        if n <= self.chunk and not (self.within_buckets or self.circular):  # every round sees every key
            part, times = self._one_chunk(qk, k, v, mask), 1
        else:
            part, times = self.part(qk, k, v, self._buckets(qk, mask)), self._times
            if torch.compiler.is_compiling():
                part = replace(part, tiling=Traced(self._number))
        out, lse = self.attended(part, _memory_part(qk, memory, times))
        if memory is not None:
            return out
        assert lse is not None
        sees_none = lse.squeeze(-1) == -math.inf
        if mask.valid is not None:
            sees_none = sees_none & mask.valid[:, None, :]
        weight = F.dropout(sees_none.to(v.dtype), self.dropout)  # of the token itself, where out is 0
        return out + weight.unsqueeze(-1) * v

    def _keys(self, qk: Tensor) -> Tensor:
        """x / |x|, [batch, heads, n, head_dim], with the adapters of the site `attn.keys`."""
        k = _normalised(qk)
        if not self.keys.active:
            return k
        return rearrange(self.keys(rearrange(k, "b h n d -> b n (h d)")), "b n (h d) -> b h n d", h=k.shape[1])

    def _one_chunk(self, qk: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part:
        """Full attention without the diagonal."""

        def make() -> Tensor:
            place = torch.arange(qk.shape[2], device=qk.device)
            allowed = (place < place[:, None] if self.context.causal else place != place[:, None])[None, None]
            if mask.valid is not None:
                allowed = allowed & mask.valid[:, None, None, :] & mask.valid[:, None, :, None]
            return bias_of(allowed, qk.dtype)

        return Part(qk, k, v, mask.memo(("lsh", qk.shape[2], self.context.causal, qk.dtype), make), scale=1.0)

    def part(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor | None) -> Part:
        """The keys that queries see in all rounds."""
        return Part(q, k, v, scale=1.0, tiling=self._tiling, inputs=[buckets])

    @property
    def _tiling(self) -> HashingRounds:
        """All rounds; buckets of different rounds are never the same, so within_buckets of several needs no ring."""
        options = self.within_buckets, self.count_once, self.stable, self.context.causal
        ring = self.circular and (self._rounds == 1 or not self.within_buckets)
        return HashingRounds(self.chunk, self.before, self.after, ring, *options, padding=math.prod(self.factors))

    def _buckets(self, qk: Tensor, mask: Mask) -> Tensor:
        """Buckets [rounds, batch, heads, n], the number of buckets at padding; the same when a block is recomputed."""

        def make() -> Tensor:
            buckets = buckets_of(qk, self.rotations[: self._rounds], self.factors)
            small = math.prod(self.factors) < 2**15 and not is_portable()  # onnxruntime has no such integers
            return buckets.to(torch.int16 if small else torch.int32)

        return self._padding_last(mask.decide(("buckets", self.context.layer), make), mask)

    def _padding_last(self, buckets: Tensor, mask: Mask) -> Tensor:
        return buckets if mask.valid is None else buckets.masked_fill(~mask.valid[:, None, :], math.prod(self.factors))

    def attend_memory(self, *projected: Any, mask: Mask, memory: KeysValues, wanted: Tensor | None = None) -> Tensor:
        return self.attend(_memory_part(projected[0], memory, 1))

    def step(
        self, qk: Tensor, v: Tensor, *, mask: Mask, past: State | None, memory: KeysValues | None = None
    ) -> tuple[Tensor, State]:
        hashed = buckets_of(qk, self.rotations[: self._rounds], self.factors).transpose(0, 1)
        if past is None:
            return self(qk, v, mask=mask, memory=memory), {"qk": qk, "v": v, "buckets": hashed}
        if past["buckets"].shape[1] != self._rounds:
            raise InputError(
                f"lsh: the cache was filled with {past['buckets'].shape[1]} rounds, now there are "
                f"{self._rounds}; start a new one"
            )
        state = {name: append(past[name], new, 2) for name, new in (("qk", qk), ("v", v))}
        state["buckets"] = append(past["buckets"], hashed, 3)  # [batch, rounds, heads, n]
        buckets = self._padding_last(state["buckets"].transpose(0, 1), mask)
        counts = self._counts(buckets, sort(buckets)[1], past["qk"].shape[2], mask, memory is not None)
        bias = counts.to(torch.promote_types(qk.dtype, torch.float32)).log().to(qk.dtype)
        part = Part(qk, self._keys(state["qk"]), state["v"], bias, scale=1.0)
        return self.attend(part, _memory_part(qk, memory, self._times)), state

    def _counts(self, buckets: Tensor, place: Tensor, start: int, mask: Mask, has_memory: bool) -> Tensor:
        """The definition: how often query i >= start sees key j, int[batch, heads, n - start, n].

        place: rank of a position by (bucket, position); both [rounds, batch, heads, n].
        """
        n, keys = buckets.shape[-1], (place if self.stable else place // self.chunk, buckets)
        total = self._tiling.meetings((keys[0][..., start:], buckets[..., start:]), keys, -(-n // self.chunk))
        position = torch.arange(n, device=buckets.device)
        query = position[start:, None]
        valid = torch.ones(1, n, dtype=torch.bool, device=buckets.device) if mask.valid is None else mask.valid
        both = valid[:, None, start:, None] & valid[:, None, None, :]
        total = total * (both & (position < query if self.context.causal else position != query))
        if not has_memory:
            sees_none = (total == 0).all(dim=-1, keepdim=True)
            total = total + (sees_none & both & (position == query)).to(total.dtype)
        return total.clamp(max=1) if self.count_once else total

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition in O(n^2): softmax of x_i . k_j + log(how often i sees j); 0 for a query without keys."""
        qk, v = projected
        buckets, n = self._buckets(qk, mask), qk.shape[2]
        position = torch.arange(n, device=qk.device)
        bucket, other = buckets[..., :, None], buckets[..., None, :]
        place = ((other < bucket) | ((other == bucket) & (position < position[:, None]))).sum(dim=-1)
        counts = self._counts(buckets, place, 0, mask, memory is not None).to(qk.dtype)
        logits = qk @ self._keys(qk).transpose(-1, -2) + counts.log()
        if memory is not None:
            keys, values = (x.expand(qk.shape[0], *x.shape[-3:]) for x in memory)
            logits = torch.cat([qk @ _normalised(keys).transpose(-1, -2) + math.log(self._times), logits], dim=-1)
            v = torch.cat([values, v], dim=2)
        some = (logits > -math.inf).any(dim=-1, keepdim=True)
        return (torch.where(some, logits, 0.0).softmax(dim=-1) * some) @ v


def _normalised(x: Tensor) -> Tensor:
    """x / |x| over the last axis, as x rsqrt(mean(x^2) + 1e-6) / sqrt(d); 0 for 0."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square() / x.shape[-1]
    return (exact * ((mean_square + 1e-6).rsqrt() / math.sqrt(x.shape[-1]))).to(x.dtype)


def _memory_part(qk: Tensor, memory: KeysValues | None, times: int) -> Part | None:
    """The memory as a part that every query sees so many times."""
    part = memory_part(qk, memory)
    if part is None:
        return None
    bias = None if times == 1 else part.k.new_full((1, 1, 1, part.k.shape[2]), math.log(times))
    return Part(part.q, _normalised(part.k), part.v, bias, scale=1.0)
