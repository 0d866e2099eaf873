"""Training the embeddings of chosen tokens, new ones say, while every other one stays as it is, bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import OptionError, TargetError, listing
from effzoo.peft.method import Method, Targets
from effzoo.registry import peft
from effzoo.sites import Counted, Embedding, Growing, HookContext, Linear, Packed, PeftModule, Site, TiedLinear, sites

NEW = "new"
ROLES = ("embed.token", "lm.out")
Ids = int | str | Sequence[int | str] | None


class TokenTable(Packed, Counted, Growing, PeftModule):
    """W' = W except W'[ids] = phi, by the hook `weight`: a language-model head may read the table too, or be it.

    Each pass makes W' anew, and the backward pass a gradient as large, of which the part of phi is kept.
    """

    ids: Tensor

    def __init__(self, numbers: Sequence[int], weight: Tensor):
        super().__init__()
        self.numbers = tuple(numbers)
        ids = torch.tensor(self.numbers, dtype=torch.long, device=weight.device)
        self.register_buffer("ids", ids)
        self.trained = nn.Parameter(weight.detach()[ids].clone())
        self.delta_rank = min(self.trained.shape)

    def weight(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.trained.to(weight))

    def replaces(self) -> Sequence[int]:
        return self.numbers

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int:
        return self.trained.numel()

    def packed(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "rows": self.trained}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        ids, trained = tensors["ids"], tensors["rows"]
        if (
            len(tensors) != 2
            or ids.dtype != torch.long
            or ids.shape != self.ids.shape
            or trained.shape != self.trained.shape
        ):
            raise ValueError(
                f"{tuple(ids.shape)} ids, values of shape {tuple(trained.shape)}, for {len(self.ids)} trained tokens"
            )
        if tuple(ids.tolist()) != self.numbers:
            raise ValueError(f"values of the tokens {spans(ids.tolist())}, where the spec says {spans(self.numbers)}")
        self.trained.copy_(trained)

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Nothing to do: the tokens keep their numbers."""


class TokenLookup(TokenTable):
    """The same where the embedding alone reads the table: only tokens that occur are looked up, and no W' is made."""

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        at = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)
        return torch.where((self.ids[at] == x)[..., None], F.embedding(at, self.trained).to(y), y)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(weight).index_copy(0, self.ids, self.trained.to(weight) - weight[self.ids]), None


@peft.register("tokens", "trainable_tokens")
class Tokens(Method):
    """W' = W except W'[ids] = phi: of the token embedding only these tokens are trained and stored.

    ids: a token, several (5, 6, 9), ranges "100-140" or "5-7+9", "new" for the tokens that `effzoo.resize_vocabulary`
        has added, or none for every token.
    targets: embed.token, the default; (embed.token, lm.out) to train these tokens in a language-model head with a
        weight of its own as well, or lm.out alone. A head that is tied reads the trained embeddings anyway.

    Together with any other method: `lora|tokens[ids=new]`. An embedding begins as it is in the base, and takes the
    place of what methods before it in the union make of that token.
    """

    paper = (
        "TrainableTokens of the package peft; how new embeddings should begin: Hewitt 2021, "
        "nlp.stanford.edu/~johnhew/vocab-expansion.html"
    )
    accepts = (Embedding, Linear, TiedLinear)
    default_targets = ("embed.token",)
    learning_rate = 1e-3
    tied: bool  # whether a tied head reads the table

    def __init__(self, *, ids: Ids = None, targets: Targets = None):
        super().__init__(targets=targets)
        given = [] if ids is None else list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
        if ids is not None and not given:
            raise OptionError(f"{self.name}: ids is empty; give at least one token, or none for every token")
        self.given = [span for one in given for span in _read(one)]

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> Mapping[str, Any] | None:
        tied = any(isinstance(site, TiedLinear) for _, site in sites(model))
        for site in found.values():
            if site.role not in ROLES:
                raise TargetError(f"{self.name}: {site.role!r} is not made of tokens; targets are {listing(ROLES)}")
            if isinstance(site, TiedLinear):
                raise TargetError(
                    f"{self.name}: {site.role!r} is tied to embed.token, whose trained tokens it reads "
                    "anyway; leave it out of targets"
                )
        token = next(
            (site for _, site in sites(model) if isinstance(site, Embedding) and site.role == "embed.token"), None
        )
        size = min(len(site.base()["weight"]) for site in found.values())
        added = 0 if token is None else token.added
        self.numbers = self._numbers(size, added)
        self.tied = tied
        return {"ids": spans(self.numbers)} if self.given else None

    def _numbers(self, size: int, added: int) -> list[int]:
        """The tokens, ascending, in a table of `size` tokens, the last `added` of which are new."""
        if not self.given:
            return list(range(size))
        numbers: list[int] = []
        for first, last in self.given:
            if last < 0:  # new
                if not added:
                    raise OptionError(
                        f"{self.name}: ids=new are the tokens that effzoo.resize_vocabulary(model, n) has added, and "
                        f"this model has none; call it first, or give numbers in [0, {size})"
                    )
                first, last = size - added, size - 1
            if last >= size:
                raise OptionError(
                    f"{self.name}: ids are in [0, {size}), got {last}; effzoo.resize_vocabulary(model, "
                    f"{last + 1}) adds tokens"
                )
            numbers += range(first, last + 1)
            if len(numbers) > size:
                break
        numbers.sort()
        if twice := [one for one, after in itertools.pairwise(numbers) if one == after]:
            raise OptionError(f"{self.name}: token {twice[0]} is given twice; give each once")
        return numbers

    def make(self, site: Site) -> PeftModule:
        cls = TokenLookup if isinstance(site, Embedding) and not self.tied else TokenTable
        return cls(self.numbers, site.base()["weight"])


def spans(ids: Sequence[int]) -> str:
    """Ascending numbers as `5-7+9`."""
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in _spans(ids))


def numbers_of(text: str, below: int) -> list[int]:
    """The numbers that a text as `spans` writes it names, all below a limit. Raises OptionError for any other text."""
    numbers: list[int] = []
    for first, last in _read(text):
        if last >= below or first <= (numbers[-1] if numbers else -1):
            raise OptionError(f"tokens: {text[:80]!r} does not name ascending tokens in [0, {below})")
        numbers += range(first, last + 1)
    return numbers


def _spans(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for one in ids:
        if last is not None and one == last + 1:
            last = one
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = one
    if first is not None and last is not None:
        yield first, last


def _read(given: int | str) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of what was given for ids; (-1, -1) for the new tokens."""
    if given == NEW:
        yield -1, -1
        return
    for part in str(given).split("+"):
        first, dash, last = part.strip().partition("-")
        fits = first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit()))
        if not fits or max(len(first), len(last)) > 18 or int(last or first) < int(first):
            raise OptionError(
                f"tokens: {part!r} is no token and no range of tokens; write 7, '100-140', '5-7+9' or new"
            )
        yield int(first), int(last or first)
