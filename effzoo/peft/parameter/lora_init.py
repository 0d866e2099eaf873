"""Where LoRA starts: factors of the weight (PiSSA, OLoRA), of its quantisation error (LoftQ), of what the layer sees (EVA).

A factor pair is A [rank, in] and B [out, rank], computed in float64 and given in the dtype of an adapter on such a weight: float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.errors import IncompatibleError
from effzoo.peft.method import Batches
from effzoo.sites import Site

Factors = tuple[Tensor, Tensor]
BLOCK = 64  # entries that share one scale (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3)
ALTERNATIONS = 5  # of quantising and factorising (LoftQ, algorithm 1)


@torch.no_grad()
def pissa(weight: Tensor, rank: int, scale: float) -> Factors:
    """A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s), so that s B A is the best approximation of W = U S V^T (Meng et al. 2024, eq. 2-3)."""
    U, S, Vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return _given(root[:, None] * Vt[:rank], weight), _given(U[:, :rank] * root, weight)


@torch.no_grad()
def olora(weight: Tensor, rank: int) -> Factors:
    """A = the first rows of R and B = the first columns of Q, of W = Q R (Buyukakyuz 2024, section 3)."""
    Q, R = torch.linalg.qr(weight.detach().double())
    return _given(R[:rank], weight), _given(Q[:, :rank], weight)


@torch.no_grad()
def loftq(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Alternate Q = quantised(W - s B A) and s B A = best approximation of W - Q, from B A = 0 (Li et al. 2023, algorithm 1).

    Returns the codes and scales of the last Q, and its factors A, B.
    """
    like, weight = weight, weight.detach().double()
    A, B = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for _ in range(ALTERNATIONS):
        codes, scales = quantise(weight - scale * B @ A)
        A, B = pissa(weight - dequantise(codes, scales, weight.shape), rank, scale)
    return codes, _given(scales, like), _given(A, like), _given(B, like)


def _given(exact: Tensor, weight: Tensor) -> Tensor:
    """A result in float64 in float32, or as it is for a weight in float64."""
    return exact.to(torch.promote_types(weight.dtype, torch.float32))


@cache
def levels() -> Tensor:
    """The 16 values of 4-bit NormalFloat: normal quantiles, 8 above zero, 7 below, and zero, the largest being 1 (QLoRA, appendix E)."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64, device="cpu")[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64, device="cpu")[:-1])
    found = torch.cat([below, above.new_zeros(1), above]).sort().values
    return found / found.max()


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8[ceil(entries / 2)], two to a byte, and the scale of each block of 64: its largest absolute entry."""
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.abs().amax(dim=1)
    middle = (levels()[1:] + levels()[:-1]) / 2
    codes = torch.bucketize(flat / scales.clamp(min=torch.finfo(flat.dtype).tiny)[:, None], middle.to(flat)).to(torch.uint8).flatten()
    return codes[0::2] + 16 * codes[1::2], scales


def dequantise(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """The weight of the given shape, in the dtype of the scales."""
    values = levels().to(scales)[torch.stack([codes % 16, codes // 16], dim=-1).long()]
    return (values.view(-1, BLOCK) * scales[:, None]).flatten()[: math.prod(shape)].view(shape)


@torch.no_grad()
def input_factors(model: nn.Module, known: Mapping[str, Site], ranks: Mapping[str, int], batches: Batches) -> dict[str, Tensor]:
    """The `rank` largest right singular vectors, [rank, in], of the inputs of each site (by path), over all tokens of all batches.

    The inputs X [tokens, in] are never held together: X^T X = R^T R, and R, which is triangular, is brought up to date batch by batch (QR of R
    on top of the new rows). Where the first two axes of an input are those of the attention mask, padding is left out. Raises IncompatibleError for a
    site that no batch reaches.
    """
    triangles: dict[str, Tensor] = {}
    hooks = []
    tokens: list[Tensor | None] = [None]

    def see(path: str, site: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, mask = inputs[0].detach().double(), tokens[0]
        rows = x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else rearrange(x, "... d -> (...) d")
        seen = torch.cat([triangles[path], rows]) if path in triangles else rows
        triangles[path] = torch.linalg.qr(seen, mode="r").R

    try:
        hooks = [known[path].register_forward_pre_hook(_of(see, path)) for path in ranks]
        with torch.no_grad():
            for batch in batches:
                tokens[0] = batch.get("attention_mask")
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    for path in ranks:
        if path not in triangles:
            raise IncompatibleError(
                f"eva starts from what {known[path].role!r} ({path}) sees, but no batch reaches it; leave it out of the targets, or give "
                "batches that use it (global tokens, for the projections of global tokens)"
            )
    return {path: torch.linalg.svd(triangles[path], full_matrices=True).Vh[:rank] for path, rank in ranks.items()}


def _of(see: Callable[[str, nn.Module, tuple[Any, ...]], None], path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return partial(see, path)
