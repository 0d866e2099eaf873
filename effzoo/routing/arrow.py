"""Arrow: a router without training, from the inputs that low-rank experts change most (Ostapenko et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from effzoo.annotations import Count, Positive
from effzoo.devices import without_autocast
from effzoo.errors import IncompatibleError, OptionError
from effzoo.registry import router
from effzoo.routing.router import Router, Routing

Factors = Sequence[tuple[Tensor, Tensor]]


def prototypes(factors: Factors) -> Tensor:
    """The first right singular vector of each B A, [experts, in], for A [rank, in] and B [out, rank]; 0 where B A is.

    With B = Q R, the right singular vectors of R A [rank, in] are those of B A = Q R A, which is not made.
    """
    rows = []
    for A, B in factors:
        exact = torch.promote_types(A.dtype, torch.float32)  # there is no decomposition in half precision
        R = torch.linalg.qr(B.detach().to(exact)).R
        S, V = torch.linalg.svd(R @ A.detach().to(exact), full_matrices=False)[1:]
        rows.append(torch.where(S[0] > 0, V[0], 0.0))
    return torch.stack(rows)


@router.register("arrow")
class Arrow(Router):
    """weights softmax(|x . v_i| / temperature) over the k largest, 0 elsewhere, with v_i the first right singular
    vector of B_i A_i, the direction of inputs that expert i changes most; nothing is learned.

    k: experts of a token.
    temperature: below 1 sharpens.

    The experts are LoRA, one at each site, and are usually finished: `effzoo.peft.gather(model, names, name="both",
    how="routed[router=arrow]")`. Where they train on, v_i follows them, and no gradient goes through it.
    """

    paper = "Ostapenko et al. 2024, Towards modular LLMs by building and reusing a library of LoRAs, arXiv:2405.11157"
    of_factors: ClassVar[bool] = True

    def __init__(self, dim: int, experts: int, *, k: Count = 2, temperature: Positive = 1.0):
        super().__init__(dim, experts)
        if not 1 <= k <= experts:
            raise OptionError(f"{self.name}: k is between 1 and the number of experts, {experts}, got {k}")
        self.k, self.temperature = k, temperature

    def forward(self, x: Tensor, factors: Factors = ()) -> Routing:
        """factors: A and B of each expert."""
        if len(factors) != self.experts:
            raise IncompatibleError(
                f"router {self.name!r} reads A and B of {self.experts} LoRA experts, got {len(factors)}; use it in "
                "adapters, as routed[of=lora, router=arrow]"
            )
        with without_autocast(x):
            v = prototypes(factors)
            exact = torch.promote_types(x.dtype, v.dtype)
            scores = (x.to(exact) @ v.to(exact).T).abs()
            best = scores.topk(self.k, dim=-1).indices
            sent = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
            p = scores / self.temperature
            return Routing(p.masked_fill(~sent, float("-inf")).softmax(dim=-1), sent, p.softmax(dim=-1))
