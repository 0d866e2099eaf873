"""Prompt lookup: what followed the last tokens before is tried as what follows them now (Saxena 2023, Prompt lookup
decoding, github.com/apoorvumang/prompt-lookup-decoding).

The model computes the logits after the text and after each drafted token in one call. Where the text goes on with the
draft, the logits are there already; where it does not, they are left. So any way of choosing tokens gives the text that
it gives without a draft.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from effzoo.architectures import Transformer
from effzoo.attention.core import Cache
from effzoo.errors import IncompatibleError, InputError
from effzoo.sites import sites
from effzoo.sites.dtypes import decoding

FAR = 16  # tokens that are computed again at most, before the cache is brought up to them


def drafted(ids: Tensor, most: int, ngram: int) -> Tensor:
    """What follows the latest earlier place of the longest last n-gram, int[1, at most `most`]; empty without a place.

    ngram: its length at most.
    """
    text = ids[0]
    for size in range(min(ngram, len(text) - 1), 0, -1):
        windows = text[:-1].unfold(0, size, 1)
        places = (windows == text[-size:]).all(dim=1).nonzero()[:, 0]
        if len(places):
            start = int(places[-1]) + size
            return ids[:, start : start + most]
    return ids[:, :0]


class Ahead:
    """The logits after one row that grows, some of them computed before they are asked for.

    most: drafted tokens of a call. ngram: tokens that are looked up.
    """

    def __init__(
        self, model: Transformer, prompt: Tensor, mask: Tensor | None, is_global: Tensor | None, use_cache: bool,
        most: int, ngram: int,
    ):  # fmt: skip
        if len(prompt) > 1:
            raise InputError(f"prompt lookup continues one prompt at a time, got {len(prompt)}; leave it out")
        if unfit := next((core for core in model.cores() if core.later_values_matter), None):
            raise IncompatibleError(
                f"prompt lookup computes drafted tokens with the text, and attention {unfit.name!r} lets them change "
                f"it: {unfit.later_values_matter}; leave it out"
            )
        hung = (part for _, site in sites(model) for module in site.hung() for part in module.modules())
        if why := next((why for part in hung if (why := getattr(part, "later_tokens_matter", ""))), None):
            raise IncompatibleError(
                f"prompt lookup computes drafted tokens with the text, and an active adapter lets them change it: "
                f"{why}; leave it out"
            )
        if model.config.angles_change_at is not None:
            raise IncompatibleError(
                "prompt lookup computes drafted tokens with the text, and a longer text turns all positions by other "
                "angles (rotary_scaling of type dynamic or longrope); leave it out"
            )
        self.model, self.use_cache, self.most, self.ngram = model, use_cache, most, ngram
        self.cut = 0 if mask is None else int(mask[0].bool().int().argmax())
        self.is_global = None if is_global is None else is_global[:, self.cut :]
        self.calls = 0
        self.cache, self.kept = Cache(), 0  # the state behind the first `kept` tokens
        self.later: tuple[Cache, Tensor] | None = None  # behind a draft, and the tokens to its end
        self.known, self.first, self.logits_known = prompt[:, :0], 0, torch.empty(0)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of the next token, [1, vocab], for ids [1, n]."""
        if len(ids) > 1:
            raise InputError("prompt lookup continues one text; leave out num_beams and num_return_sequences")
        ids = ids[:, self.cut :]
        n = ids.shape[1]
        if not (self.first <= n <= self.known.shape[1] and torch.equal(ids, self.known[:, :n])):
            room = self.model.config.max_length - n
            draft = drafted(ids, max(0, min(self.most, room)), self.ngram)
            self.known, self.first = torch.cat([ids, draft], dim=1), n
            self.logits_known = self._computed(self.known, n)
        return self.logits_known[:, n - self.first]

    def _computed(self, ids: Tensor, n: int) -> Tensor:
        """The logits after the first n tokens, and after each further one."""
        if not self.use_cache:
            return self._called(ids, 0, None)[:, n - 1 :]
        if self.later is not None and torch.equal(ids[:, : self.later[1].shape[1]], self.later[1]):
            end = self.later[1].shape[1]
            if end < n:
                self.cache, self.kept = self.later[0], end
        self.later = None
        if n - self.kept > FAR and ids.shape[1] > n and self.kept:
            self._called(ids[:, : n - 1], self.kept, self.cache)
            self.kept = n - 1
        cache = _copy(self.cache) if ids.shape[1] > n else self.cache
        out = self._called(ids, self.kept, cache)[:, n - 1 - self.kept :]
        if cache is self.cache:
            self.kept = n
        else:
            self.later = cache, ids
        return out

    def _called(self, ids: Tensor, start: int, cache: Cache | None) -> Tensor:
        self.calls += 1
        given: dict[str, Any] = {}
        if start == 0 and self.is_global is not None:
            given["global_attention_mask"] = torch.nn.functional.pad(
                self.is_global, (0, ids.shape[1] - self.is_global.shape[1])
            )
        if offset := self.model.config.position_offset:
            given["position_ids"] = torch.arange(start, ids.shape[1], device=ids.device)[None] + offset
        with decoding():
            return cast(Tensor, self.model(ids[:, start:], cache=cache, **given).logits)


def _copy(cache: Cache) -> Cache:
    """A cache that goes on from the same states, which nobody changes."""
    copied = Cache()
    copied.length, copied.prompt_tokens, copied.ids = cache.length, cache.prompt_tokens, cache.ids
    copied.states = {layer: dict(state) for layer, state in cache.states.items()}
    return copied
