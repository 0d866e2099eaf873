"""S4: four groups of layers, each with other methods (Chen et al. 2023, arXiv:2301.01821)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from effzoo.annotations import Count
from effzoo.peft.function.houlsby import Bottleneck
from effzoo.peft.input.prefix import Prefix, PrefixMemory
from effzoo.peft.method import Batches, Layers, Modules
from effzoo.peft.parameter.lora import LowRank
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Branch, Counted, Linear, MemorySite, PeftModule, Site, sites

ASSIGNED = {
    1: ("adapter", "lora"),
    2: ("adapter", "prefix"),
    3: ("adapter", "prefix", "bitfit"),
    4: ("prefix", "bitfit", "lora"),
}


def group_of(layer: int, depth: int) -> int:
    """The group, 1 to 4, of a layer: a spindle, whose groups have 1/6, 1/3, 1/3 and 1/6 of the layers (2, 4, 4, 2 of
    12).

    A layer belongs where its middle, (layer + 1/2) / depth, lies. With few layers some groups are empty: 3 layers are
    groups 2, 3 and 4, two are 2 and 3, and one is 3, the group with the most methods.
    """
    middle = 2 * layer + 1  # in units of half a layer, of which there are 2 depth
    return 1 if 3 * middle < depth else 2 if middle < depth else 3 if 3 * middle < 5 * depth else 4


class LowRankAndBias(Counted, LowRank):
    """y' = W x + s B A x + phi, where phi starts as the site's bias and takes its place."""

    def __init__(self, site: Linear, rank: int):
        super().__init__(site.in_features, site.out_features, rank, scale=1.0)
        self.own_bias = nn.Parameter(site.bias.detach().clone())

    def bias(self, bias: Tensor) -> Tensor:
        return self.own_bias

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int | None:
        return None if weight is None or bias is None else weight.numel() + bias.numel()


@peft.register("s4")
class S4(TrainingHooks):
    """Four groups of layers: adapter, LoRA; adapter, prefix; adapter, prefix, BitFit; prefix, BitFit, LoRA.

    bottleneck: of the adapters.
    rank: of LoRA.
    length: of the prefix, which starts as in `prefix`.

    Every layer of a group has the same methods, and every layer the same sizes ("uniform"). Adapters come after both
    sub-layers, LoRA on queries and values, BitFit on all biases of the layer (none in models without). `group_of` says
    which layers a group has, for any depth.
    """

    paper = (
        "Chen et al. 2023, Parameter-efficient fine-tuning design spaces, arXiv:2301.01821, section 4 (S4-model "
        "of T5-base)"
    )
    identity_at_init = False
    default_targets = ("attn.*", "mlp.*")
    size = "bottleneck"
    learning_rate = 1e-3
    rates = {"keys": 10.0, "values": 10.0}

    def __init__(self, *, bottleneck: Count = 16, rank: Count = 8, length: Count = 16, layers: Layers = None):
        super().__init__(layers=layers)
        self.bottleneck, self.rank, self.prefix = bottleneck, rank, Prefix(length=length)

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.prefix.prepare(model, {path: site for path, site in found.items() if isinstance(site, MemorySite)})
        self.depth = 1 + max(site.layer for _, site in sites(model) if site.layer is not None)

    def make(self, site: Site) -> PeftModule | None:
        if site.layer is None:  # a projection that all layers share belongs to no group
            return None
        assigned = ASSIGNED[group_of(site.layer, self.depth)]
        if isinstance(site, MemorySite):
            return self.prefix.make(site) if "prefix" in assigned else None
        if isinstance(site, Branch):
            return Bottleneck(site.dim, self.bottleneck, "relu", 1e-2) if "adapter" in assigned else None
        bias = site.base().get("bias") if "bitfit" in assigned else None
        if isinstance(site, Linear) and "lora" in assigned and site.role.startswith(("attn.q", "attn.v")):
            if bias is not None:
                return LowRankAndBias(site, self.rank)
            return LowRank(site.in_features, site.out_features, self.rank, scale=1.0)
        return None if bias is None else Copy(bias=bias)

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        prefixes = {path: module for path, module in modules.items() if isinstance(module, PrefixMemory)}
        self.prefix.calibrate(model, prefixes, batches)
