"""Where LoRA starts: factors of the weight (PiSSA, OLoRA), its quantisation error (LoftQ), the layer's inputs (EVA),
the weight as these inputs see it (CorDA), or its gradient (LoRA-GA).

A pair of factors is A [rank, in] and B [out, rank], computed in float64 and given in the dtype of an adapter on such a
weight: float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import IncompatibleError
from effzoo.nf4 import decode, encode
from effzoo.peft.method import Batches, examples
from effzoo.peft.parameter.lora import LowRank
from effzoo.peft.parameter.lora_tables import LowRankHead
from effzoo.sites import HookContext, Positionwise, Site

Factors = tuple[Tensor, Tensor]
ALTERNATIONS = 5  # of quantising and factorising (LoftQ, algorithm 1)
GAMMA = 16  # of the scale at which LoRA-GA starts


class FromBase(LowRankHead, Positionwise):
    """y' = y + s (B A - B0 A0) dropout(x), from factors B0 A0 of the weight or of its gradient (PiSSA, OLoRA, CorDA,
    LoRA-GA); the base stays as it is.

    The papers take s B0 A0 out of the base. Here the base keeps it, and copies of the factors, in buffers, are
    subtracted: two thin products, where W - s B0 A0 by `weight` would make a dense matrix for each site and step. At
    the start both products are the same numbers, so their difference is exactly 0. The rank of the change is at most 2
    rank.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float):
        super().__init__(A.shape[1], B.shape[0], len(A), scale, dropout)
        self.delta_rank = min(2 * len(A), A.shape[1], B.shape[0])
        self.A, self.B = nn.Parameter(A.contiguous().clone()), nn.Parameter(B.contiguous().clone())
        self.register_buffer("A0", A.contiguous())
        self.register_buffer("B0", B.contiguous())

    @torch.no_grad()
    def restart(self, A: Tensor, B: Tensor) -> None:
        """Start from these factors."""
        for own, given in ((self.A, A), (self.A0, A), (self.B, B), (self.B0, B)):
            own.copy_(given)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        now = self.scale * (x @ self.A.T) @ self.B.T
        start = self.scale * (x @ self.A0.T) @ self.B0.T
        return y + (now - start)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return self.scale * (self.B.to(weight) @ self.A.to(weight) - self.B0.to(weight) @ self.A0.to(weight)), None

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().grow(weight, bias)
        self.B0 = torch.cat([self.B0, self.B[len(self.B0) :].detach()])


class Quantised(LowRank):
    """y' = Q x + s B A dropout(x), with Q the 4-bit form of the weight and B A at first the residual W - Q (LoftQ).

    Q is kept, and stored, as two codes per byte and one scale per block of 64. The base keeps W, so that detaching
    restores it: what this saves is the size of the merged model, not memory in training.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float):
        super().__init__(weight.shape[1], weight.shape[0], rank, scale, dropout)
        codes, scales, A, B = loftq(weight, rank, scale)
        self.delta_rank = None
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def weight(self, weight: Tensor) -> Tensor:
        return decode(self.codes, self.scales.to(weight), weight.shape)


@torch.no_grad()
def pissa(weight: Tensor, rank: int, scale: float) -> Factors:
    """A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s), so that s B A is the best approximation of W = U S V^T.

    Meng et al. 2024, PiSSA, arXiv:2404.02948, eq. 2-3.
    """
    U, S, Vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return _given(root[:, None] * Vt[:rank], weight), _given(U[:, :rank] * root, weight)


@torch.no_grad()
def olora(weight: Tensor, rank: int) -> Factors:
    """A = the first `rank` rows of R and B = the first columns of Q, of W = Q R.

    Buyukakyuz 2024, OLoRA, arXiv:2406.01775, section 3.
    """
    Q, R = torch.linalg.qr(weight.detach().double())
    return _given(R[:rank], weight), _given(Q[:, :rank], weight)


@torch.no_grad()
def loftq(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of Q, and A, B: alternately Q = quantised(W - s B A) and s B A = best approximation of W - Q.

    Starts from B A = 0 (Li et al. 2023, LoftQ, arXiv:2310.08659, algorithm 1).
    """
    like, weight = weight, weight.detach().double()
    A, B = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for _ in range(ALTERNATIONS):
        codes, scales = encode(weight - scale * B @ A)
        A, B = pissa(weight - decode(codes, scales, weight.shape), rank, scale)
    return codes, _given(scales, like), _given(A, like), _given(B, like)


def _given(exact: Tensor, weight: Tensor) -> Tensor:
    """A float64 result in float32, or as it is for a weight in float64."""
    return exact.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def input_triangles(
    model: nn.Module, known: Mapping[str, Site], paths: Iterable[str], batches: Batches, start: str
) -> dict[str, Tensor]:
    """R of each site [in or less, in], by path, with R^T R = X^T X for its inputs X [tokens, in] over all tokens.

    start: the name, for errors.

    The inputs are never stored together: R is updated batch by batch (QR of R on top of the new inputs). Padding is
    left out where the first two axes of an input are those of the attention mask; packed documents go one by one.
    Raises IncompatibleError for a site that no batch reaches.
    """
    triangles: dict[str, Tensor] = {}
    hooks = []
    tokens: list[Tensor | None] = [None]

    def see(path: str, site: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, mask = inputs[0].detach().double(), tokens[0]
        seen = x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else rearrange(x, "... d -> (...) d")
        stacked = torch.cat([triangles[path], seen]) if path in triangles else seen
        triangles[path] = torch.linalg.qr(stacked, mode="r").R

    try:
        hooks = [known[path].register_forward_pre_hook(partial(see, path)) for path in paths]
        for batch in batches:
            for part in examples([batch]) if "document_ids" in batch else (batch,):
                tokens[0] = part.get("attention_mask")
                model(**part)
    finally:
        for hook in hooks:
            hook.remove()
    for path in paths:
        if path not in triangles:
            raise _unreached(start, known[path], path)
    return triangles


def _unreached(start: str, site: Site, path: str) -> IncompatibleError:
    return IncompatibleError(
        f"{start} starts from what {site.role!r} ({path}) sees, but no batch reaches it; leave it out of the targets, "
        "or give batches that use it (global tokens, for the projections of global tokens)"
    )


def eva(triangle: Tensor, rank: int) -> Tensor:
    """A: the `rank` largest right singular vectors [rank, in] of a layer's inputs.

    Paischer et al. 2024, EVA, arXiv:2410.07170.
    """
    return _signed(torch.linalg.svd(triangle, full_matrices=True).Vh[:rank])


@torch.no_grad()
def corda(weight: Tensor, triangle: Tensor, rank: int, scale: float, smallest: bool) -> Factors:
    """A = sqrt(S_r / s) V_r^T C^-1 and B = U_r sqrt(S_r / s) of W C = U S V^T, with C the second moments of the inputs.

    smallest: the components with the smallest singular values, which the inputs need least, in place of the largest.

    C has a mean diagonal of 1, and 0.01 is added to its diagonal, so that it can be inverted
    (Yang et al. 2024, CorDA, arXiv:2406.05223, section 3.2-3.3).
    """
    moments = triangle.T @ triangle
    C = moments / moments.diagonal().mean() + 0.01 * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    U, S, Vt = torch.linalg.svd(weight.detach().double() @ C, full_matrices=False)
    chosen = slice(len(S) - rank, None) if smallest else slice(rank)
    root = (S[chosen] / scale).sqrt()
    A = torch.linalg.solve(C, root[:, None] * Vt[chosen], left=False)
    return _given(A, weight), _given(U[:, chosen] * root, weight)


def weight_gradients(
    model: nn.Module, known: Mapping[str, Site], paths: Iterable[str], batches: Batches
) -> dict[str, Tensor]:
    """dL/dW of each site [out, in], by path, the sum over examples, so that it does not depend on how they are batched.

    Raises IncompatibleError where there is none.
    """
    weights = {path: cast(Tensor, known[path].weight) for path in paths}
    before = [weight.requires_grad for weight in weights.values()]
    totals = {path: torch.zeros_like(weight, dtype=torch.float64) for path, weight in weights.items()}
    reached: set[str] = set()
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for example in examples(batches):
            gradients = torch.autograd.grad(model(**example).loss, list(weights.values()), allow_unused=True)
            for path, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    reached.add(path)
                    totals[path] += gradient
    finally:
        for weight, flag in zip(weights.values(), before, strict=True):
            weight.requires_grad_(flag)
    for path in weights:
        if path not in reached:
            raise _unreached("lora_ga", known[path], path)
    return totals


@torch.no_grad()
def lora_ga(gradient: Tensor, weight: Tensor, rank: int) -> Factors:
    """A = c V_r^T of the gradient U S V^T, and B = c times the next `rank` columns of U, with c = out^(1/4) / sqrt(16).

    The first step of the factors then moves the weight in the direction of a step of full fine-tuning
    (Wang et al. 2024, LoRA-GA, arXiv:2407.05000, algorithm 1).
    """
    U, _, Vt = torch.linalg.svd(gradient, full_matrices=False)
    c = len(weight) ** 0.25 / GAMMA**0.5
    return _given(c * Vt[:rank], weight), _given(c * U[:, rank : 2 * rank], weight)


def _signed(vectors: Tensor) -> Tensor:
    """Singular vectors, which have no sign of their own, with a positive largest entry."""
    return vectors * vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
