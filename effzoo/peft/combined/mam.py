"""MAM: a prefix for attention and a scaled parallel adapter for the feed-forward (He et al. 2022, section 4.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from effzoo.annotations import Count, NonZero
from effzoo.peft.function.parallel import ScaledParallel
from effzoo.peft.input.prefix import Prefix, PrefixMemory
from effzoo.peft.method import Batches, Layers, Modules
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Branch, MemorySite, PeftModule, Site


@peft.register("mam", "mix_and_match")
class MAM(TrainingHooks):
    """Attn(x W_q, [P_k, x W_k], [P_v, x W_v]) and f(x) + s W_up relu(W_down x): a prefix and a scaled parallel adapter.

    length: of the prefix.
    form: of the prefix, as in `prefix`; the paper's 30 keys come from a network with 800 units, of which `finish`
        leaves keys and values (for a small model "flat" trains far less).
    hidden: units of that network.
    init: of the flat form, as in `prefix`.
    bottleneck: inner width of the adapter; 512 in the paper, for a model width of 1024.
    scale: s, 4 in the paper.
    """

    paper = (
        "He et al. 2022, Towards a unified view of parameter-efficient transfer learning, arXiv:2110.04366, section 4.6"
    )
    identity_at_init = False
    accepts = (MemorySite, Branch)
    default_targets = ("attn.memory", "mlp.branch")
    size = "bottleneck"
    learning_rate = 1e-3

    def __init__(
        self,
        *,
        length: Count = 30,
        form: Literal["flat", "mlp"] = "mlp",
        hidden: Count = 800,
        init: Literal["activations", "normal"] | None = None,
        bottleneck: Count = 512,
        scale: NonZero = 4.0,
        layers: Layers = None,
    ):
        super().__init__(layers=layers)
        self.prefix = Prefix(length=length, form=form, hidden=hidden, init=init)
        self.adapter = ScaledParallel(bottleneck=bottleneck, scale=scale)
        # a step moves the adapter's output by about the rate times bottleneck times s
        narrow = min(1.0, 256 / abs(bottleneck * scale))
        self.rates = {"down.*": narrow, "up.*": narrow, "keys": 10.0, "values": 10.0}

    def hooks_in_use(self) -> set[str]:
        return self.prefix.hooks_in_use()

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.prefix.prepare(model, {path: site for path, site in found.items() if isinstance(site, MemorySite)})

    def make(self, site: Site) -> PeftModule:
        return self.prefix.make(site) if isinstance(site, MemorySite) else self.adapter.make(site)

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        self.prefix.calibrate(model, _prefixes(modules), batches)

    def finish(self, modules: Modules) -> None:
        self.prefix.finish(_prefixes(modules))


def _prefixes(modules: Modules) -> dict[str, PeftModule]:
    return {path: module for path, module in modules.items() if isinstance(module, PrefixMemory)}
