"""LSH attention: tokens attend to those that hash into the same bucket (Kitaev et al. 2020, Reformer, arXiv:2001.04451,
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
from effzoo.attention.core import AttentionCore, Context, Mask, Side, State, append, memory_part
from effzoo.attention.hashing import automatic, buckets_of, draw_rotations, sort
from effzoo.attention.part import Part, bias_of
from effzoo.attention.rounds import HashingRounds
from effzoo.attention.traced import Traced
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention
from effzoo.sites import Keys, KeysValues


@attention.register("lsh", "reformer")
class LSH(AttentionCore):
    """Queries are keys; each round hashes them, sorts them by (bucket, position), cuts them into chunks; a query sees
    its chunk and the one before.

    out_i = sum over rounds r and keys j != i that i sees in round r of exp(x_i . k_j) v_j, divided by the sum of the
    same exp(x_i . k_j), with k_j = x_j / |x_j| (as x rsqrt(mean(x^2) + 1e-6) / sqrt(d)) and no further scale: the
    length of a query is its temperature. A token sees itself only when it sees no other key in any round (section 2,
    "causal masking for shared-QK attention"). The bucket of x is argmax [x R, -x R] with a random R for every round and
    head (section 2, equation for h(x)). Cost O(rounds n chunk).

    rounds: of hashing; may be set on a built core (`core.rounds = 8`): round r has the same rotations whatever their
        number.
    chunk: length of a chunk.
    buckets: 1 or an even number, or even factors of it; None: 2 max_length / chunk as a power of two, factorised
        when large. It depends on max_length alone, so a sequence is hashed alike in every batch.
    look_back: chunks before its own that a query sees.
    look_forward: chunks after it.
    seed: of the rotations, which are drawn from a generator of their own and not saved; `resample` draws others.
    within_buckets: only keys of the query's own bucket count (equation 3; HF and Trax leave this out).
    count_once: a pair that meets in N_ij rounds counts once, by the bias -log N_ij (appendix A, equation of N_ij; HF
        and Trax leave this out).
    circular: the first chunk looks back to the last chunk of the round before, as in HF and Trax. It shows the end
        of a sequence to its beginning whatever their buckets, and lets the length of the batch matter; only for
        equality with those. Buckets of two rounds are never the same, so it changes nothing within_buckets when
        there are several rounds.

    stable: a query sees the keys of its own bucket that stand at most look_back chunk places before it in the sorted
        order, and at most look_forward chunk places after it. Chunk borders play no part, as they do without it: where
        a border falls depends on how many *later* tokens have smaller buckets, so the value of a causal output may
        change when the sequence grows, though its gradient with respect to later inputs is exactly 0. Decoding with a
        cache equals the forward pass in the newest rows, always; in all rows, and so through several layers, when
        stable.

    The normalised keys pass a site with the role `attn.keys`, so that a method can scale keys and leave queries, and
    buckets, as they are. Memory keys are normalised as all keys are, and every query sees them in every round (once,
    when pairs count once). Padding sees them alone. Copied from another kind, the shared projection starts as that of
    the queries, since they decide what is looked for.
    """

    paper = "Kitaev et al. 2020, Reformer: the efficient transformer, arXiv:2001.04451, section 2 and appendix A"
    projections: Mapping[str, Side] = {"qk": "query and key", "v": "value"}
    cost = "n * rounds * chunk"
    rotations: Tensor
    hash_seed: int | None = None  # of transformers, from which rotations were drawn that `rotate_by` was given

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
        """How often a query sees what it sees in every round."""
        return 1 if self.count_once else self._rounds

    def forward(self, qk: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        n, k = qk.shape[2], self._keys(qk)
        if n <= self.chunk and not (self.within_buckets or self.circular):  # every round would see everything once
            part, times = self._one_chunk(qk, k, v, mask), 1
        else:
            part, times = self.part(qk, k, v, self._buckets(qk, mask)), self._times
            if torch.compiler.is_compiling():
                part = replace(part, tiling=Traced(self._number))
        out, lse = self.attended(part, _memory_part(qk, memory, times))
        if memory is not None:
            return out
        assert lse is not None
        alone = lse.squeeze(-1) == -math.inf
        if mask.valid is not None:
            alone = alone & mask.valid[:, None, :]
        weight = F.dropout(alone.to(v.dtype), self.dropout)  # of their own value: all there is, and `out` is 0 there
        return out + weight.unsqueeze(-1) * v

    def _keys(self, qk: Tensor) -> Tensor:
        """k, [batch, heads, n, head_dim]: normalised, and then what is hung on their site."""
        k = _normalised(qk)
        return (
            rearrange(self.keys(rearrange(k, "b h n d -> b n (h d)")), "b n (h d) -> b h n d", h=k.shape[1])
            if self.keys.active
            else k
        )

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
        """What is seen in all rounds, given the buckets."""
        return Part(q, k, v, scale=1.0, tiling=self._tiling, inputs=[buckets])

    @property
    def _tiling(self) -> HashingRounds:
        """What is seen in all rounds. Buckets of different rounds are never the same, so within them several rounds
        make no ring."""
        options = self.within_buckets, self.count_once, self.stable, self.context.causal
        ring = self.circular and (self._rounds == 1 or not self.within_buckets)
        return HashingRounds(self.chunk, self.before, self.after, ring, *options, padding=math.prod(self.factors))

    def _buckets(self, qk: Tensor, mask: Mask) -> Tensor:
        """[rounds, batch, heads, n], one more than the largest at padding; decided once for a batch, however often a
        block is computed."""

        def make() -> Tensor:
            found = buckets_of(qk, self.rotations[: self._rounds], self.factors)
            return found.to(torch.int16 if math.prod(self.factors) < 2**15 else torch.int32)

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
        return self.attend(
            Part(qk, self._keys(state["qk"]), state["v"], bias, scale=1.0), _memory_part(qk, memory, self._times)
        ), state

    def _counts(self, buckets: Tensor, place: Tensor, start: int, mask: Mask, remembers: bool) -> Tensor:
        """The definition: how often query i >= start sees key j, int[batch, heads, n - start, n].

        buckets and place, the rank of a position by (bucket, position), are [rounds, batch, heads, n].
        """
        n, stands = buckets.shape[-1], (place if self.stable else place // self.chunk, buckets)
        total = self._tiling.meetings((stands[0][..., start:], buckets[..., start:]), stands, -(-n // self.chunk))
        position = torch.arange(n, device=buckets.device)
        query = position[start:, None]
        valid = torch.ones(1, n, dtype=torch.bool, device=buckets.device) if mask.valid is None else mask.valid
        both = valid[:, None, start:, None] & valid[:, None, None, :]
        total = total * (both & (position < query if self.context.causal else position != query))
        if not remembers:
            alone = (total == 0).all(dim=-1, keepdim=True)
            total = total + (alone & both & (position == query)).to(total.dtype)
        return total.clamp(max=1) if self.count_once else total

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition in O(n^2): softmax of x_i . k_j + log(how often i sees j), 0 where nothing is seen."""
        qk, v = projected
        buckets, n = self._buckets(qk, mask), qk.shape[2]
        position = torch.arange(n, device=qk.device)
        mine, other = buckets[..., :, None], buckets[..., None, :]
        # how many stand before
        place = ((other < mine) | ((other == mine) & (position < position[:, None]))).sum(dim=-1)
        logits = (qk @ self._keys(qk).transpose(-1, -2)) + self._counts(buckets, place, 0, mask, memory is not None).to(
            qk.dtype
        ).log()
        if memory is not None:
            keys, values = (x.expand(qk.shape[0], *x.shape[-3:]) for x in memory)
            logits = torch.cat([qk @ _normalised(keys).transpose(-1, -2) + math.log(self._times), logits], dim=-1)
            v = torch.cat([values, v], dim=2)
        some = (logits > -math.inf).any(dim=-1, keepdim=True)
        return (torch.where(some, logits, 0.0).softmax(dim=-1) * some) @ v


def _normalised(x: Tensor) -> Tensor:
    """x / |x| over the last axis; a row of zeros stays one."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square() / x.shape[-1]
    return (exact * ((mean_square + 1e-6).rsqrt() / math.sqrt(x.shape[-1]))).to(x.dtype)


def _memory_part(qk: Tensor, memory: KeysValues | None, times: int) -> Part | None:
    """The memory, seen so many times by every query."""
    part = memory_part(qk, memory)
    if part is None:
        return None
    bias = None if times == 1 else part.k.new_full((1, 1, 1, part.k.shape[2]), math.log(times))
    return Part(part.q, _normalised(part.k), part.v, bias, scale=1.0)
