"""LoRA: a low-rank change of a weight matrix (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Positive, Probability
from effzoo.errors import OptionError, TargetError, listing
from effzoo.peft.method import Batches, Layers, Modules, Targets
from effzoo.peft.parameter import lora_init
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Conv2d, Embedding, Growing, HookContext, Linear, PeftModule, Positionwise, Site, TiedLinear, longer, sites

T = TypeVar("T", int, float)
Start = Literal["default", "gaussian", "pissa", "olora", "eva", "loftq"]


class LowRank(Positionwise, Growing, PeftModule):
    """y' = y + s B A dropout(x), with A [rank, in] and B [out, rank]; the change of the weight is s B A.

    For the backward pass x and s A x are stored; x once, unless dropout makes another one of it.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout, self.delta_rank = scale, dropout, min(rank, inputs, outputs)
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.change(self.dropped(x), self.A, self.B)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def change(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """s B A x; the scale meets the narrow product."""
        return F.linear(self.scale * F.linear(x, A), B)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * self.B.to(weight) @ self.A.to(weight), None

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.B = longer(self.B, self.B.new_zeros(len(weight), self.B.shape[1]))


class FromBase(LowRank, Positionwise):
    """y' = y + s (B A - B0 A0) dropout(x): starts from factors B0 A0 of the weight (PiSSA, OLoRA) and leaves the base bit-identical.

    The papers take s B0 A0 out of the base. Here it stays, and a copy of the factors, kept in buffers, is subtracted through the function
    door: two thin products that store nothing for the backward pass, where W - s B0 A0 at the parameter door would be a dense matrix per site
    and step. At the start both products are the same numbers, so their difference is exactly 0. The rank of the change is at most 2 rank.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float):
        super().__init__(A.shape[1], B.shape[0], len(A), scale, dropout)
        self.delta_rank = min(2 * len(A), A.shape[1], B.shape[0])
        A, B = A.contiguous(), B.contiguous()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.register_buffer("A0", A)
        self.register_buffer("B0", B)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        x = self.dropped(x)
        return y + (self.change(x, self.A, self.B) - self.change(x, self.A0, self.B0))

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * (self.B.to(weight) @ self.A.to(weight) - self.B0.to(weight) @ self.A0.to(weight)), None

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().grow(weight, bias)
        self.B0 = torch.cat([self.B0, self.B[len(self.B0) :].detach()])


class Quantised(LowRank):
    """y' = Q x + s B A dropout(x): the weight is replaced by its 4-bit form Q, and B A starts as the residual W - Q (LoftQ).

    Q is held, and stored, as two codes per byte and one scale per block of 64. The base stays at the side, so that detaching restores it; what
    this saves is the size of the merged model, not memory in training.
    """

    can_grow = False  # codes have no place for more rows
    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float):
        super().__init__(weight.shape[1], weight.shape[0], rank, scale, dropout)
        codes, scales, A, B = lora_init.loftq(weight, rank, scale)
        self.delta_rank = None
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def weight(self, weight: Tensor) -> Tensor:
        return lora_init.dequantise(self.codes, self.scales.to(weight), weight.shape)


class LowRankRows(Growing, PeftModule):
    """Row i' = row i + s B A[:, i] of an embedding [rows, dim], with A [rank, rows] and B [dim, rank]; only the rows that are read are computed.

    A starts at 0 and B normal, so that rows which never occur in training stay exactly as they are.
    """

    def __init__(self, rows: int, dim: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank, rows, dim)
        self.A = nn.Parameter(torch.zeros(rank, rows))
        self.B = nn.Parameter(torch.randn(dim, rank))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + F.linear(self.scale * F.embedding(x, self.A.T), self.B)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * (self.B.to(weight) @ self.A.to(weight)).T, None

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.A = longer(self.A, self.A.new_zeros(len(self.A), len(weight)), dim=1)


class LookedUp(LowRankRows):
    """The same for lookups alone where a language-model head reads the table too, without the change: no change of the one table does that."""

    def delta(self, weight: Tensor, bias: Tensor | None) -> None:  # type: ignore[override]
        return None


class LowRankTable(Growing, PeftModule):
    """The same change where a language-model head reads the whole table too: W' = W + s (B A)^T, through the parameter door, which both see."""

    def __init__(self, rows: int, dim: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank, rows, dim)
        self.A = nn.Parameter(torch.zeros(rank, rows))
        self.B = nn.Parameter(torch.randn(dim, rank))

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.A.to(weight).T @ self.B.to(weight).T

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.A = longer(self.A, self.A.new_zeros(len(self.A), len(weight)), dim=1)


class LowRankConv(PeftModule):
    """y' = y + s B * (A * x): a convolution of the site's shape to `rank` channels, and one of 1 x 1 from there (s B A of the flattened kernels)."""

    def __init__(self, site: Conv2d, rank: int, scale: float):
        super().__init__()
        outputs, *patch = site.weight.shape
        self.scale, self.stride, self.padding = scale, site.stride, site.padding
        self.delta_rank = min(rank, outputs, math.prod(patch))
        self.A = nn.Parameter(torch.empty(rank, *patch))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        narrow = self.scale * F.conv2d(x, self.A, None, self.stride, self.padding)
        return y + F.conv2d(narrow, self.B[:, :, None, None])

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * torch.einsum("or,r...->o...", self.B.to(weight), self.A.to(weight)), None


def by_role(method: str, option: str, value: T | Mapping[str, T], role: str) -> T:
    """An option that is one number, or a map from role patterns to numbers, of which the first that matches counts."""
    if not isinstance(value, Mapping):
        return value
    for pattern, number in value.items():
        if fnmatchcase(role, pattern):
            return number
    raise OptionError(
        f"{method}: no pattern of {option} ({listing(value)}) matches {role!r}; end the map with '*', or leave this role out of targets"
    )


def check_rank(method: str, rank: int | Mapping[str, int]) -> None:
    """OptionError for an empty map."""
    if rank == {}:
        raise OptionError(f"{method}: rank is a number or a map from role patterns to numbers, got an empty map")


def scaling(method: str, rank: int, alpha: float | Mapping[str, float] | None, rslora: bool, role: str) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha is the rank when none is given."""
    return (rank if alpha is None else by_role(method, "alpha", alpha, role)) / (math.sqrt(rank) if rslora else rank)


@peft.register("lora")
class LoRA(TrainingHooks):
    """W' = W + s B A, with s = alpha / rank, A of shape [rank, in] and B of shape [out, rank]; B starts at 0.

    rank: of the change; a number, or a map from role patterns to numbers, `rank={attn.q: 8, attn.v*: 4}`, which then is the default of targets.
    alpha: scale numerator, one or by role, default the rank, so that the scale is 1. rslora: s = alpha / sqrt(rank), which keeps outputs of one size
    as the rank grows (Kalajdzievski 2023, arXiv:2312.03732, section 3). dropout: on the input of A, in linear layers.
    init: "default", A uniform as in a linear layer; "gaussian", A normal with standard deviation 1 / rank; "pissa", the largest singular
    vectors of W (Meng et al. 2024, arXiv:2404.02948); "olora", its QR factors (Buyukakyuz 2024, arXiv:2406.01775); "eva", A holds the largest
    right singular vectors of the layer's inputs, seen before training (Paischer et al. 2024, arXiv:2410.07170; every site keeps its rank); "loftq",
    W is replaced by its 4-bit form and B A starts as the rest (Li et al. 2023, arXiv:2310.08659), so the output changes a little at the start.

    tied: whether a change of the token embedding reaches the language-model head that is tied to it, or lookups alone, which then cannot be merged.

    The base stays bit-identical under every init (`FromBase` says how). Embeddings and convolutions take part when they are targets; biases of the
    targets in a union, `lora[targets=attn.q]|bitfit[targets=attn.q]`. The default
    targets are the queries and values as in the paper; on Longformer `attn.q*` also takes the global projections (give `attn.q` for the
    local ones alone, `attn.q_global` for those).
    """

    paper = "Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1"
    accepts = (Linear, Embedding, Conv2d, TiedLinear)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 1e-3
    size = "rank"

    def __init__(
        self,
        *,
        rank: Count | Mapping[str, Count] = 8,
        alpha: Positive | Mapping[str, Positive] | None = None,
        rslora: bool = False,
        dropout: Probability = 0.0,
        init: Start = "default",
        tied: bool = True,
        targets: Targets = None,
        layers: Layers = None,
    ):
        check_rank(self.name, rank)
        super().__init__(targets=tuple(rank) if isinstance(rank, Mapping) and targets is None else targets, layers=layers)
        self.rank, self.alpha, self.rslora, self.dropout, self.start, self.tied = rank, alpha, rslora, dropout, init, tied
        self.identity_at_init = init != "loftq"

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() if self.start == "eva" else set()

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        roles = {site.role for site in found.values()}
        for option, value in (("rank", self.rank), ("alpha", self.alpha)):
            unused = [pattern for pattern in value if not any(fnmatchcase(role, pattern) for role in roles)] if isinstance(value, Mapping) else []
            if unused:
                raise TargetError(
                    f"{self.name}: {option} for {unused[0]!r} matches none of its targets; they have the roles {listing(sorted(roles))}"
                )
        self.has_tied_head = any(isinstance(site, TiedLinear) for _, site in sites(model))

    def make(self, site: Site) -> PeftModule:
        rank = by_role(self.name, "rank", self.rank, site.role)
        scale = scaling(self.name, rank, self.alpha, self.rslora, site.role)
        if isinstance(site, Linear):
            return self._linear(site, rank, scale)
        if self.start not in ("default", "gaussian"):
            raise OptionError(
                f"{self.name}: init={self.start!r} is for linear layers, and {site.role!r} is {type(site).__name__}; use 'default' there"
            )
        if isinstance(site, TiedLinear):  # the head alone changes, not the embedding
            return self._started(LowRank(site.in_features, site.out_features, rank, scale, self.dropout), rank)
        if isinstance(site, Embedding):
            of_tied = LowRankTable if self.tied else LookedUp
            read_twice = self.has_tied_head and site.role == "embed.token"
            return (of_tied if read_twice else LowRankRows)(site.num_embeddings, site.embedding_dim, rank, scale)
        assert isinstance(site, Conv2d)
        return self._started(LowRankConv(site, rank, scale), rank)

    def _linear(self, site: Linear, rank: int, scale: float) -> PeftModule:
        if self.start in ("pissa", "olora", "loftq", "eva") and rank > min(site.weight.shape):
            raise OptionError(
                f"{self.name}: init={self.start!r} takes {rank} vectors of {site.role!r}, whose weight {tuple(site.weight.shape)} has "
                f"{min(site.weight.shape)}; give a smaller rank"
            )
        if self.start == "pissa":
            return FromBase(*lora_init.pissa(site.weight, rank, scale), scale, self.dropout)
        if self.start == "olora":
            return FromBase(*lora_init.olora(site.weight, rank), scale, self.dropout)
        if self.start == "loftq":
            return Quantised(site.weight, rank, scale, self.dropout)
        return self._started(LowRank(site.in_features, site.out_features, rank, scale, self.dropout), rank)

    def _started(self, module: LowRank | LowRankConv, rank: int) -> PeftModule:
        if self.start == "gaussian":
            nn.init.normal_(module.A, std=1 / rank)
        return module

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        ranks = {path: len(module.A) for path, module in modules.items()}  # type: ignore[arg-type]
        found = lora_init.input_factors(model, dict(sites(model)), ranks, batches)
        with torch.no_grad():
            for path, module in modules.items():
                module.A.copy_(found[path])  # type: ignore[operator]
