"""VB-LoRA: the factors of LoRA are put together from vectors of one bank (Li et al. 2024, arXiv:2405.15179)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from effzoo.annotations import Count
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site

LONGEST = 256  # vectors of a bank whose length is not given


class Admixture(Positionwise, PeftModule):
    """y' = y + B A x; each run of `length` entries of a row of A, or of a column of B, is sum_m softmax(z)_m h_m over
    the k largest logits z.

    bank: the vectors h [vectors, length], which all sites share.
    logits_A: [rank, in / length, vectors].
    logits_B: [out / length, rank, vectors].
    """

    def __init__(self, inputs: int, outputs: int, rank: int, k: int, bank: nn.Parameter):
        super().__init__()
        self.k, self.bank, self.delta_rank = k, bank, min(rank, inputs, outputs)
        vectors, length = bank.shape
        self.logits_A = nn.Parameter(0.1 * torch.randn(rank, inputs // length, vectors))
        self.logits_B = nn.Parameter(0.1 * torch.randn(outputs // length, rank, vectors))

    def mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """The mixture of k vectors for each of the logits [..., vectors]: [..., length]."""
        largest, places = logits.topk(self.k, dim=-1)
        return einsum(largest.softmax(dim=-1), bank[places], "... k, ... k length -> ... length")

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank]."""
        logits_A, logits_B, bank = (part.to(like) for part in (self.logits_A, self.logits_B, self.bank))
        A = rearrange(self.mixed(logits_A, bank), "rank run length -> rank (run length)")
        return A, rearrange(self.mixed(logits_B, bank), "run rank length -> (run length) rank")

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        A, B = self.factors(self.bank)
        return y + (x @ A.T) @ B.T

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.factors(weight)
        return B @ A, None


@peft.register("vblora", "vb_lora")
class VBLoRA(Method):
    """W' = W + B A: A [rank, in] and B [out, rank] are cut into runs, and each run is a mixture of k vectors of one
    bank, which all sites share; the bank and the logits that choose from it are trained.

    rank: of the change.
    vectors: in the bank.
    length: of a vector, which divides in and out of every matrix; None for the largest such number up to 256.
    k: vectors in a mixture: those with the largest logits, weighted by their softmax.

    It trains vectors * length numbers, and vectors * rank * (in + out) / length for each matrix. The bank starts
    uniform within 0.02, so that the change is small at the start, and not 0.
    """

    paper = "Li et al. 2024, VB-LoRA: Extreme parameter efficient fine-tuning with vector banks, arXiv:2405.15179"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    identity_at_init = False
    learning_rate = 1e-2
    size = "vectors"

    def __init__(
        self, *, rank: Count = 4, vectors: Count = 90, length: Count | None = None, k: Count = 2,
        targets: Targets = None, layers: Layers = None,
    ):  # fmt: skip
        super().__init__(targets=targets, layers=layers)
        if k > vectors:
            raise OptionError(
                f"{self.name}: a mixture takes k={k} of {vectors} vectors; give vectors={k} or a smaller k"
            )
        self.rank, self.vectors, self.length, self.k = rank, vectors, length, k

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> Mapping[str, Any]:
        sites = [cast(Linear, site) for site in found.values()]
        common = math.gcd(*(size for site in sites for size in (site.in_features, site.out_features)))
        if self.length is None:
            self.length = next(size for size in range(min(common, LONGEST), 0, -1) if common % size == 0)
        if common % self.length:
            raise OptionError(
                f"{self.name}: vectors of length {self.length} have to divide the inputs and outputs of every matrix, "
                f"whose common divisors are those of {common}; give one of these, or leave it out"
            )
        self.bank = nn.Parameter(torch.empty(self.vectors, self.length).uniform_(-0.02, 0.02))
        return {"length": self.length}

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return Admixture(site.in_features, site.out_features, self.rank, self.k, self.bank)
