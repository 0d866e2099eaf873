"""MiSS: one small matrix, which every group of inputs shares, is the change of a weight (Kang and Yin 2024)."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


class SharedShards(Positionwise, PeftModule):
    """y' = y + D S x, where S x [rank] is the sum of the groups of x; merged, W changes by [D D D ...]."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.delta_rank = min(rank, inputs, outputs)
        self.D = nn.Parameter(torch.zeros(outputs, min(rank, inputs)))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        rank = self.D.shape[1]
        whole = F.pad(x, (0, -x.shape[-1] % rank))  # the last group may be shorter
        return y + reduce(whole, "... (group r) -> ... r", "sum", r=rank) @ self.D.T

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        inputs = weight.shape[1]
        times = -(-inputs // self.D.shape[1])
        return self.D.to(weight).repeat(1, times)[:, :inputs], None


@peft.register("miss", "bone")
class MiSS(Method):
    """W' = W + [D D D ...]: D [out, rank] is repeated over the inputs, so every group of `rank` inputs shares it.

    rank: columns of D.

    It trains out * rank numbers for each matrix, half of those of LoRA, without a second factor. D starts at 0.
    """

    paper = (
        "Kang and Yin 2024, MiSS: Balancing LoRA performance and efficiency with simple shard sharing, arXiv:2409.15371"
    )
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 1e-3
    size = "rank"

    def __init__(self, *, rank: Count = 8, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        self.rank = rank

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return SharedShards(site.in_features, site.out_features, self.rank)
