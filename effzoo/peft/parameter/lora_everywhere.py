"""LoRA on every type of site, with ranks by role and other starts: what is registered as `lora`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Positive, Probability, Whole
from effzoo.errors import IncompatiblePeft, OptionError, TargetError, listing
from effzoo.peft.method import Batches, Layers, Modules, Targets
from effzoo.peft.parameter.lora import LoRA, LowRank
from effzoo.peft.parameter.lora_activated import ActivatedLowRank
from effzoo.peft.parameter.lora_conv import LowRankConv
from effzoo.peft.parameter.lora_starts import (
    FromBase,
    Quantised,
    corda,
    eva,
    input_triangles,
    lora_ga,
    olora,
    pissa,
    weight_gradients,
)
from effzoo.peft.parameter.lora_tables import LowRankEmbedding, LowRankHead, LowRankLookup, LowRankTable
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sharding import as_written, gathered
from effzoo.sites import Conv2d, Embedding, Linear, PeftModule, Site, TiedLinear, sites

T = TypeVar("T", int, float)
Start = Literal["default", "gaussian", "pissa", "olora", "eva", "loftq", "corda", "corda_kpm", "lora_ga"]
FROM_DATA = ("eva", "corda", "corda_kpm", "lora_ga")


def by_role(method: str, option: str, value: T | Mapping[str, T], role: str) -> T:
    """The option of a site: one number for all, or of a map {role pattern: number} the first that matches its role."""
    if not isinstance(value, Mapping):
        return value
    for pattern, number in value.items():
        if fnmatchcase(role, pattern):
            return number
    raise OptionError(
        f"{method}: no pattern of {option} ({listing(value)}) matches {role!r}; end the map with '*', or leave this "
        "role out of targets"
    )


def check_rank(method: str, rank: int | Mapping[str, int]) -> None:
    """OptionError for an empty map."""
    if rank == {}:
        raise OptionError(f"{method}: rank is a number or a map from role patterns to numbers, got an empty map")


def scaling(method: str, rank: int, alpha: float | Mapping[str, float] | None, rslora: bool, role: str) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha is the rank when none is given."""
    return (rank if alpha is None else by_role(method, "alpha", alpha, role)) / (math.sqrt(rank) if rslora else rank)


@peft.register("lora")
class LoRAEverywhere(TrainingHooks, LoRA):
    """y = W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank], which starts at 0.

    rank: of the change; a number, or a map from role patterns to numbers, `rank={attn.q: 8, attn.v*: 4}`, which then is
        the default of targets.
    alpha: one number or by role; None for the rank, so that the scale is 1.
    rslora: scale alpha / sqrt(rank), which keeps outputs of one size as the rank grows (Kalajdzievski 2023,
        arXiv:2312.03732, section 3).
    dropout: on the input of A, in linear layers.
    init: "default", A uniform as in a linear layer; "gaussian", A normal with standard deviation 1 / rank; "pissa", the
        largest singular vectors of W (Meng et al. 2024, arXiv:2404.02948); "olora", its QR factors (Buyukakyuz 2024,
        arXiv:2406.01775); "eva", A holds the largest right singular vectors of the layer's inputs, from data before
        training (Paischer et al. 2024, arXiv:2410.07170; every site keeps its rank); "loftq", W is replaced by its
        4-bit form and B A starts as the rest (Li et al. 2023, arXiv:2310.08659), which changes the output a little at
        the start; "corda", the largest components of W as the layer's inputs see it, from data, or "corda_kpm", the
        smallest, so that more of what W knows stays (Yang et al. 2024, arXiv:2406.05223); "lora_ga", singular vectors
        of the gradient of W, from labelled data (Wang et al. 2024, arXiv:2407.05000).
    tied: whether a change of the token embedding also reaches a language-model head that is tied to it; without, it
        acts on lookups alone and cannot be merged.
    invocation: tokens, `invocation=(5, 6, 9)`: the change acts from the first of them on, and keys and values of what
        stands before are the base's (activated LoRA, Greenewald et al. 2025, arXiv:2504.12397, section 3, which targets
        attn.q, attn.k and attn.v). Where it comes several times in a row, the last one counts, as in peft; so what
        stands before it depends on whether it comes: train on labels behind it. A row without it is computed by the
        base. In decoders, on linear layers of the blocks, and never merged. A cache stays as it was computed: give the
        whole invocation in one call.

    The base stays bit-identical under every init (`lora_starts.FromBase` says how). Embeddings and convolutions take
    part when they are targets; for biases use a union, `lora[targets=attn.q]|bitfit[targets=attn.q]`. The default
    targets are the paper's, queries and values; on Longformer `attn.q*` includes the global projections (`attn.q` is
    the local one alone, `attn.q_global` the other).
    """

    accepts = (Linear, Embedding, Conv2d, TiedLinear)
    rank: Any  # a number, or {role pattern: number}
    alpha: Any

    def __init__(
        self,
        *,
        rank: Count | Mapping[str, Count] = 8,
        alpha: Positive | Mapping[str, Positive] | None = None,
        rslora: bool = False,
        dropout: Probability = 0.0,
        init: Start = "default",
        tied: bool = True,
        invocation: Whole | Sequence[Whole] | None = None,
        targets: Targets = None,
        layers: Layers = None,
    ):
        check_rank(self.name, rank)
        super().__init__(
            targets=tuple(rank) if isinstance(rank, Mapping) and targets is None else targets, layers=layers
        )
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.dropout, self.start, self.tied = dropout, init, tied
        self.identity_at_init = init != "loftq"
        self.invocation = (invocation,) if isinstance(invocation, int) else tuple(invocation or ())
        if invocation is not None and not self.invocation:
            raise OptionError(f"{self.name}: invocation is empty; give at least one token, or leave it out")
        if self.invocation and init not in ("default", "gaussian"):
            raise OptionError(
                f"{self.name}: init={init!r} starts from all tokens or moves part of the base into the change, and an "
                "invocation leaves the base as it is before it; use 'default' or 'gaussian'"
            )

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() if self.start in FROM_DATA else set()

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        roles = {site.role for site in found.values()}
        for option, value in (("rank", self.rank), ("alpha", self.alpha)):
            given: tuple[str, ...] = tuple(value) if isinstance(value, Mapping) else ()
            if unused := [pattern for pattern in given if not any(fnmatchcase(role, pattern) for role in roles)]:
                raise TargetError(
                    f"{self.name}: {option} for {unused[0]!r} matches none of its targets; they have the roles "
                    f"{listing(sorted(roles))}"
                )
        if self.invocation:
            self._check_invocation(model, found)
        self.has_tied_head = any(isinstance(site, TiedLinear) for _, site in sites(model))

    def _check_invocation(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        config: Any = getattr(model, "config", None)
        if not getattr(config, "causal", False) or getattr(config, "is_encoder_decoder", False):
            reason = "what stands before the invocation would see what follows it, or is another text"
            what = "a model that is no decoder of its own"
            raise IncompatiblePeft(f"{self.name}[invocation=...]", what, reason, "use a causal model such as gpt2")
        if routed := [site.role for path, site in found.items() if ".experts." in path]:
            raise IncompatiblePeft(
                f"{self.name}[invocation=...]", f"experts at {routed[0]!r}", "they are given some tokens, not the text",
                "use targets of the attention, attn.*",
            )  # fmt: skip
        if max(self.invocation) >= config.vocab:
            raise OptionError(
                f"{self.name}: tokens of the invocation are in [0, {config.vocab}), got {max(self.invocation)}"
            )

    def make(self, site: Site) -> PeftModule:
        rank = by_role(self.name, "rank", self.rank, site.role)
        scale = scaling(self.name, rank, self.alpha, self.rslora, site.role)
        if self.invocation and not (isinstance(site, Linear) and site.layer is not None):
            raise OptionError(
                f"{self.name}: an invocation is for linear layers of the blocks, and {site.role!r} is none; leave it "
                "out of targets"
            )
        if isinstance(site, Linear):
            return self._linear(site, rank, scale)
        if self.start not in ("default", "gaussian"):
            raise OptionError(
                f"{self.name}: init={self.start!r} is for linear layers, and {site.role!r} is {type(site).__name__}; "
                "use 'default' there"
            )
        if isinstance(site, TiedLinear):  # the head alone changes, not the embedding
            return self._started(LowRankHead(site.in_features, site.out_features, rank, scale, self.dropout), rank)
        if isinstance(site, Embedding):
            of_tied = LowRankTable if self.tied else LowRankLookup
            read_twice = self.has_tied_head and site.role == "embed.token"
            return (of_tied if read_twice else LowRankEmbedding)(site.num_embeddings, site.embedding_dim, rank, scale)
        assert isinstance(site, Conv2d)
        return self._started(LowRankConv(site, rank, scale), rank)

    def _linear(self, site: Linear, rank: int, scale: float) -> PeftModule:
        vectors = {"default": 0, "gaussian": 0, "lora_ga": 2 * rank}.get(self.start, rank)
        if vectors > min(site.weight.shape):
            raise OptionError(
                f"{self.name}: init={self.start!r} takes {vectors} vectors of {site.role!r}, whose weight "
                f"{tuple(site.weight.shape)} has {min(site.weight.shape)}; give a smaller rank"
            )
        if self.start == "pissa":
            return FromBase(*pissa(site.weight, rank, scale), scale, self.dropout)
        if self.start == "olora":
            return FromBase(*olora(site.weight, rank), scale, self.dropout)
        if self.start == "loftq":
            return Quantised(site.weight, rank, scale, self.dropout)
        if self.start in ("corda", "corda_kpm", "lora_ga"):  # as plain LoRA until `calibrate`
            plain = LowRank(site.in_features, site.out_features, rank, scale)
            return FromBase(plain.A.detach(), plain.B.detach(), scale, self.dropout)
        if self.invocation:
            inside = site.in_features, site.out_features
            return self._started(ActivatedLowRank(*inside, rank, scale, self.dropout, self.invocation), rank)
        cls = LowRankHead if site.role == "lm.out" else LowRank
        return self._started(cls(site.in_features, site.out_features, rank, scale, self.dropout), rank)

    def _started(self, module: LowRank | LowRankConv, rank: int) -> PeftModule:
        if self.start == "gaussian":
            nn.init.normal_(module.A, std=1 / rank)
        return module

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        low_rank, known = cast("Mapping[str, LowRank]", modules), dict(sites(model))
        if self.start == "lora_ga":
            with gathered(model), as_written(model):  # gradients of whole tensors
                gradients = weight_gradients(model, known, modules, batches)
                for path, module in low_rank.items():
                    weight = cast(Tensor, known[path].weight)
                    cast(FromBase, module).restart(*lora_ga(gradients[path], weight, len(module.A)))
            return
        triangles = input_triangles(model, known, modules, batches, self.start)
        with gathered(model), torch.no_grad():
            for path, module in low_rank.items():
                rank, triangle = len(module.A), triangles[path]
                if isinstance(module, FromBase):
                    weight, smallest = cast(Tensor, known[path].weight), self.start == "corda_kpm"
                    module.restart(*corda(weight, triangle, rank, module.scale, smallest))
                else:
                    module.A.copy_(eva(triangle, rank))
