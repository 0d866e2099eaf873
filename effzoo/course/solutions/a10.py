import torch
from torch import nn

from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Linear


class LowRank(PeftModule):
    """W x + (alpha / rank) B A x at one layer."""

    def __init__(self, n_in, n_out, rank, scale):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank))
        self.scale = scale

    def after(self, x, y, context):
        return y + self.scale * (x @ self.A.T @ self.B.T)

    def delta(self, weight, bias):
        return self.scale * self.B @ self.A, None


@register("my_lora")
class MyLora(Method):
    """Which layers it hangs on, and with which options."""

    accepts, default_targets = (Linear,), ("attn.q*", "attn.v*")

    def __init__(
        self,
        *,
        rank: int = 4,
        alpha: float = 8.0,
        targets: str | list[str] | None = None,
        layers: int | list[int] | None = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.rank, self.alpha = rank, alpha

    def make(self, site):
        return LowRank(site.in_features, site.out_features, self.rank, self.alpha / self.rank)


def phi(a, b, i, j):
    """How alike the first i directions of a [r, d] and the first j of b [s, d] are, from 0 to 1."""
    u = torch.linalg.svd(a, full_matrices=False).Vh[:i]
    v = torch.linalg.svd(b, full_matrices=False).Vh[:j]
    return float((u @ v.T).square().sum() / min(i, j))
