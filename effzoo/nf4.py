"""4-bit NormalFloat: w = s_b q[c], q the 16 values below, c one of them, and s_b = max |w| over a block of 64 entries.

Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E, without quantising the scales once more.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from effzoo.devices import table

BLOCK = 64  # entries that share one scale
_AT_ONCE = 2**12  # blocks that are encoded together: what that takes beside them, 13 bytes an entry, stays small


@cache
def levels() -> Tensor:
    """The 16 values: normal quantiles, 8 above zero, 7 below, and zero, the largest being 1."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64, device="cpu")[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64, device="cpu")[:-1])
    values = torch.cat([below, above.new_zeros(1), above]).sort().values
    return values / values.max()


_VALUES = levels().tolist()
_PAIRS = [(_VALUES[byte % 16], _VALUES[byte // 16]) for byte in range(256)]  # the two values that a byte stands for


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8[ceil(entries / 2)], two to a byte, and the scale of each block: its largest absolute entry."""
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    parts = [_encoded(blocks) for blocks in torch.split(flat, _AT_ONCE)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _encoded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of blocks [b, 64]."""
    scales = blocks.abs().amax(dim=1)
    middle = (levels()[1:] + levels()[:-1]) / 2
    units = blocks / scales.clamp(min=torch.finfo(blocks.dtype).tiny)[:, None]
    codes = torch.bucketize(units, middle.to(blocks)).to(torch.uint8).flatten()
    return codes[0::2] + 16 * codes[1::2], scales


def decode(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """The weight of the given shape, in the dtype of the scales."""
    values = table(_PAIRS, scales.device, scales.dtype).index_select(0, codes.int())
    return (values.view(len(scales), -1) * scales[:, None]).flatten()[: math.prod(shape)].view(shape)
