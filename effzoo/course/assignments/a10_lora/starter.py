import torch
from torch import nn

from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Linear


class LowRank(PeftModule):
    """W x + (alpha / rank) B A x at one layer."""

    def __init__(self, n_in, n_out, rank, scale):
        super().__init__()
        # self.A [rank, n_in] and self.B [n_out, rank]
        raise NotImplementedError("make the factors here")

    def after(self, x, y, context):
        # x [.., n_in] and y = W x + b [.., n_out]
        raise NotImplementedError("add the change here")

    def delta(self, weight, bias):
        # the change of the weight [n_out, n_in] and of the bias, or None
        raise NotImplementedError("return the change of the weight here")


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
    raise NotImplementedError("compare the singular vectors here")
