"""How near a LoRA and an adapter of a size come to what stands behind one frozen layer (Hu et al. 2021, LoRA,
arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effzoo.errors import OptionError

Target = Literal["full", "mlp"]
COUNT = 2048  # inputs to train on, and as many to count on


@dataclass(frozen=True)
class Teacher:
    """A frozen layer and what it should become.

    weight: W [d, d], float64.
    inputs: x [2, COUNT, d], to train on and to count on.
    change: what is to be added to W x, of the same shape.
    """

    weight: Tensor
    inputs: Tensor
    change: Tensor


def teacher(dim: int, target: Target, seed: int) -> Teacher:
    """W normal with variance 1 / d; "full": the change D x, D of full rank and half as large; "mlp": V tanh(U W x).

    Raises OptionError for another target.
    """
    draw = torch.Generator().manual_seed(seed)
    weight, u, v = (torch.randn(dim, dim, generator=draw, dtype=torch.float64) / dim**0.5 for _ in range(3))
    inputs = torch.randn(2, COUNT, dim, generator=draw, dtype=torch.float64)
    if target == "full":
        return Teacher(weight, inputs, inputs @ (u / 2).T)
    if target == "mlp":
        return Teacher(weight, inputs, (2 * (inputs @ weight.T) @ u.T).tanh() @ v.T)
    raise OptionError(f"target is 'full' or 'mlp', got {target!r}")


def low_rank_error(data: Teacher, rank: int) -> float:
    """|| change - B A x ||^2 / || change ||^2 on the second inputs, for the best B A of a rank on the first.

    The best linear map is the one of least squares; of that, as x is white, the first singular vectors (Eckart-Young).
    """
    best = torch.linalg.lstsq(data.inputs[0], data.change[0]).solution
    u, s, v = torch.linalg.svd(best)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    return _share(data.change[1] - data.inputs[1] @ cut, data.change[1])


def adapter_error(data: Teacher, width: int, *, steps: int, seed: int, learning_rate: float = 1e-2) -> float:
    """The same for W_up tanh(W_down W x), trained with Adam on the first inputs.

    width: of the bottleneck.
    steps: of Adam on all inputs, its rate falling to 0.
    """
    draw, dim = torch.Generator().manual_seed(seed), data.weight.shape[0]
    outputs = (data.inputs @ data.weight.T).float()
    down = (torch.randn(dim, width, generator=draw) / dim**0.5).requires_grad_()
    up = torch.zeros(width, dim, requires_grad=True)
    optimizer = torch.optim.Adam([down, up], lr=learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with torch.enable_grad():
        for _ in range(steps):
            loss = ((outputs[0] @ down).tanh() @ up - data.change[0].float()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    with torch.no_grad():
        return _share(data.change[1] - ((outputs[1] @ down).tanh() @ up).double(), data.change[1])


def _share(left: Tensor, whole: Tensor) -> float:
    return float(left.square().sum() / whole.square().sum())
