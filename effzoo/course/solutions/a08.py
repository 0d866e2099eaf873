import torch
from torch import nn

from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Branch, Positionwise


class Bottleneck(Positionwise, PeftModule):
    """y + W_up relu(W_down y + b_down) + b_up at the end of a feed-forward."""

    def __init__(self, dim, bottleneck):
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def after(self, x, y, context):
        return y + self.up(torch.relu(self.down(y)))


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
    adapter = 2 * bottleneck * dim + bottleneck + dim
    norm = 2 * dim
    return blocks * (2 * adapter + 2 * norm)


def bitfit(names):
    """The parameters that BitFit trains, in the order of the names."""
    return [name for name in names if name.split(".")[-1] == "bias"]
