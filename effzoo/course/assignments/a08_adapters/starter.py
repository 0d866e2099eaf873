import torch
from torch import nn

from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Branch, Positionwise


class Bottleneck(Positionwise, PeftModule):
    """y + W_up relu(W_down y + b_down) + b_up at the end of a feed-forward."""

    def __init__(self, dim, bottleneck):
        super().__init__()
        # W_down [bottleneck, dim], b_down [bottleneck], W_up [dim, bottleneck], b_up [dim]
        raise NotImplementedError("make the two layers here")

    def after(self, x, y, context):
        # x [.., dim] went into the feed-forward, y [.., dim] came out of it
        raise NotImplementedError("add the adapter here")


@register("my_adapter")
class MyAdapter(Method):
    """Where it hangs, and how wide it is."""

    accepts, default_targets = (Branch,), ("mlp.branch",)

    def __init__(
        self, *, bottleneck: int = 16, targets: str | list[str] | None = None, layers: int | list[int] | None = None
    ):
        super().__init__(targets=targets, layers=layers)
        self.bottleneck = bottleneck

    def make(self, site):
        return Bottleneck(site.dim, self.bottleneck)


def houlsby_numbers(dim, bottleneck, blocks):
    """How many numbers Houlsby's method trains in a model of so many blocks."""
    raise NotImplementedError("count here")


def bitfit(names):
    """The parameters that BitFit trains, in the order of the names."""
    raise NotImplementedError("choose the names here")
