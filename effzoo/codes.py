"""The codes of a matrix, and the matrix that they stand for.

    8 bits   w = s_i c,      c an integer in [-127, 127], s_i = max_j |w_ij| / 127     one scale per output i
    4 bits   w = s_b q[c],   q the 16 values of NormalFloat, s_b = max |w|             one scale per block of 64 entries

Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 2.1 (vector-wise absmax, here of the weight alone: what is
multiplied stays floating); Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (NF4), without quantising the
scales once more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effzoo.errors import OptionError
from effzoo.nf4 import BLOCK, decode, encode, levels

BITS = (8, 4)
_LARGEST = 127
_AT_ONCE = 2**18  # entries that are coded together: what that takes beside them stays small


def check_bits(bits: int) -> None:
    """OptionError for another number of bits than there are codes for."""
    if bits not in BITS:
        raise OptionError(
            f"bits is 8 (integers, a scale per output) or 4 (NormalFloat, a scale per block of {BLOCK}), got {bits!r}"
        )


@torch.no_grad()
def coded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix [out, in], the scales in the dtype of the weight.

    bits: 8, int8[out, in] and [out], every entry at most half a scale away from its code's value; 4, uint8[entries / 2]
        and [blocks], at most half of the gap between two neighbours.
    """
    weight = weight.detach()
    if bits == 4:
        return encode(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.new_empty(len(weight))
    step = max(1, _AT_ONCE // weight.shape[1])
    for rows, of_codes, of_scales in zip(*(torch.split(each, step) for each in (weight, codes, scales)), strict=True):
        of_scales.copy_(rows.abs().amax(dim=1) / _LARGEST)
        steps = rows / of_scales.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]
        of_codes.copy_(steps.round().clamp(-_LARGEST, _LARGEST))
    return codes, scales


def empty(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Room for the codes and scales of a matrix, in the shapes and dtypes of `coded`."""
    if bits == 8:
        return torch.empty(weight.shape, dtype=torch.int8, device=weight.device), weight.new_empty(len(weight))
    blocks = -(-weight.numel() // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=weight.device)
    return codes, weight.new_empty(blocks)


def decoded(codes: Tensor, scales: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """The matrix [out, in], in the dtype of the scales."""
    if bits == 8:
        return codes.to(scales.dtype) * scales[:, None]
    return decode(codes, scales, shape)


def margins(codes: Tensor, scales: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """How far each entry of the matrix [out, in] may be from the one that was coded.

    That is half of the larger gap next to its code, and some rounding.
    """
    if bits == 8:
        gaps = (scales[:, None] / 2).expand(shape)
    else:
        steps = levels().diff() / 2
        widest = torch.maximum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]])).to(scales)
        both = torch.stack([codes % 16, codes // 16], dim=-1).flatten().int()
        of_blocks = widest.index_select(0, both).view(len(scales), -1) * scales[:, None]
        gaps = of_blocks.flatten()[: math.prod(shape)].view(shape)
    return gaps + 4 * torch.finfo(scales.dtype).eps * decoded(codes, scales, shape, bits).abs()
