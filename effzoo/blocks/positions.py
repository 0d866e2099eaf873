"""Rotary positions: queries and keys are rotated by angles proportional to their position (Su et al. 2021,
arXiv:2104.09864, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from effzoo.annotations import SMALLEST, Range, problem
from effzoo.errors import OptionError

Scaling = Annotated[float, Range(SMALLEST, 1e9)]
_SCALING = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class Rotary:
    """Rotate the pair (x_j, x_{j + d/2}) of a head at position p by the angle p theta^(-2j/d).

    q_i . k_j then depends on i - j alone.

    theta: base of the frequencies.
    scaling: "linear", positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595); "llama3", low frequencies
        alone are divided, with a smooth transition (Llama 3.1); empty: none.
    """

    head_dim: int
    theta: float = 10_000.0
    scaling: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise OptionError(f"rotary positions turn pairs, so head_dim is even, got {self.head_dim}")
        given = dict(self.scaling)
        if given:
            kind = given.pop("type", None)
            if not isinstance(kind, str) or kind not in _SCALING or set(given) != _SCALING[kind]:
                known = "; ".join(f"type={name!r} with {', '.join(sorted(keys))}" for name, keys in _SCALING.items())
                raise OptionError(
                    f"rotary scaling is {known}; got type={kind!r} with {', '.join(sorted(given)) or 'nothing'}"
                )
            for name, value in given.items():
                if wrong := problem(value, Scaling):
                    raise OptionError(f"rotary scaling: {name} {wrong}")
            if kind == "llama3" and given["low_freq_factor"] == given["high_freq_factor"]:
                raise OptionError(
                    "rotary scaling: low_freq_factor and high_freq_factor differ, between them the "
                    "frequencies pass smoothly"
                )

    @classmethod
    def of(cls, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> Rotary:
        return cls(head_dim, theta, tuple(sorted(scaling.items())))

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Angles per position, float32[head_dim / 2]."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        frequency = 1.0 / self.theta**exponent
        scaling = dict(self.scaling)
        if not scaling:
            return frequency
        slow = frequency / scaling["factor"]
        if scaling["type"] == "linear":
            return slow
        # over the length of pretraining
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * slow + smooth * frequency

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Position ids [batch, n] -> cos and sin, float32[batch, 1, n, head_dim]."""
        angle = positions[:, None, :, None].float() * self.frequencies(positions.device)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x_2, x_1) sin for x = (x_1, x_2) split in the middle of a head."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
