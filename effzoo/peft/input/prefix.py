"""Prefix tuning: trained keys and values in every attention layer (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.annotations import Count, NotNegative
from effzoo.errors import OptionError
from effzoo.peft.input.layer import StartsFromActivations, keys_and_values, layers_of, start_from_activations
from effzoo.peft.method import Batches, Layers, Modules, Targets
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import HookContext, Memory, MemorySite, PeftModule, Site


class PrefixEncoder(nn.Module):
    """tanh(W_1 e + b_1) [length, hidden] of trained e [length, width], which all layers share."""

    def __init__(self, length: int, width: int, hidden: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, width))  # e, by the name that files give it
        self.linear = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        out: Tensor = self.linear(self.rows).tanh()
        return out


class PrefixMemory(StartsFromActivations):
    """Trained keys [heads, length, head_dim] and values [heads, length, value_dim].

    trunk: with it, keys and values are W_2 trunk() + b_2 until `drop_network` keeps what they are.
    gate_heads: with it, they have a softmax of their own, whose result is added times tanh(gate), one gate for each
        query head.
    """

    def __init__(
        self, site: MemorySite, length: int, std: float, trunk: PrefixEncoder | None = None, gate_heads: int = 0
    ):
        super().__init__()
        self.trunk: PrefixEncoder | None = trunk
        self.last: nn.Linear | None = None
        self.heads, self.head_dim, self.value_dim = site.heads, site.head_dim, site.value_dim
        self.register_parameter("keys", None)
        self.register_parameter("values", None)
        if trunk is None:
            self.keys = nn.Parameter(torch.randn(site.heads, length, site.head_dim) * std)
            self.values = nn.Parameter(torch.randn(site.heads, length, site.value_dim) * std)
        else:
            self.last = nn.Linear(trunk.linear.out_features, site.heads * (site.head_dim + site.value_dim))
        self.gate = nn.Parameter(torch.zeros(gate_heads)) if gate_heads else None

    def pair(self) -> tuple[Tensor, Tensor]:
        """What is trained, or what the network makes of it."""
        if self.trunk is None or self.last is None:
            return self.keys, self.values
        both = rearrange(self.last(self.trunk()), "n (h d) -> h n d", h=self.heads)
        return both[..., : self.head_dim].contiguous(), both[..., self.head_dim :].contiguous()

    def memory(self, context: HookContext) -> Memory | None:
        if self.collects(context):
            return None
        return Memory(*self.pair(), None if self.gate is None else self.gate.tanh())

    def start(self, tokens: Tensor, context: HookContext) -> None:
        memory = keys_and_values(context, tokens)
        # keys that queries share may come from a projection that is not grouped (qk of LSH): their mean
        self.keys.copy_(rearrange(memory.keys, "(h group) n d -> h group n d", h=self.heads).mean(dim=1))
        self.values.copy_(memory.values)

    def drop_network(self) -> None:
        """Keep the keys and values, drop the network that made them."""
        if self.last is None:
            return
        trainable = self.last.weight.requires_grad
        keys, values = (x.detach().clone() for x in self.pair())
        self.trunk = self.last = None
        self.keys = nn.Parameter(keys, requires_grad=trainable)
        self.values = nn.Parameter(values, requires_grad=trainable)


@peft.register("prefix", "prefix_tuning")
class Prefix(TrainingHooks):
    """head_i = Attn(x W_q, [P_k, x W_k], [P_v, x W_v]): `length` trained keys and values per layer, seen by every
    query.

    length: of the prefix.
    form: "flat", P_k and P_v are trained themselves; "mlp", they are W_2 tanh(W_1 e + b_1) + b_2, with e and W_1 shared
        by all layers and a W_2 for each (section 4.3), and `finish` keeps P_k and P_v alone.
    hidden: units of that network (the paper: 512 or 800).
    init: of the flat form; "activations" (when None), the keys and values that the layer makes of the first `length`
        tokens of the training data, by `calibrate`; "normal", which is also what stands there until data have been
        seen, and learns more slowly.
    std: of the normal distribution.
    softmax: "joint", one for prefix and tokens; "own", one for the prefix, whose result is added times tanh(g), g = 0
        at the start, one for each head: the additive form of He et al., eq. 5, which is the only one here that changes
        nothing at the start.

    Positions do not shift: keys of rotary models are not rotated. A prefix in the joint softmax is not a no-op, not
    even one of zeros: a key of 0 still takes e^0 of the softmax. In LSH attention, which normalises keys, only the
    direction of P_k counts.
    """

    paper = (
        "Li & Liang 2021, Prefix-tuning, arXiv:2101.00190, section 4; as a gate: He et al. 2022, "
        "arXiv:2110.04366, eq. 5"
    )
    identity_at_init = False
    accepts = (MemorySite,)
    default_targets = ("attn.memory",)
    size = "length"
    learning_rate = 2e-2

    def __init__(
        self,
        *,
        length: Count = 16,
        form: Literal["flat", "mlp"] = "flat",
        hidden: Count = 512,
        init: Literal["activations", "normal"] | None = None,
        std: NotNegative = 0.02,
        softmax: Literal["joint", "own"] = "joint",
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        if form == "mlp" and init is not None:
            raise OptionError(
                f"{self.name}: init={init!r} sets keys and values, which form='mlp' computes; give "
                "form='flat', or leave init out"
            )
        self.length, self.form, self.hidden, self.std, self.softmax = length, form, hidden, std, softmax
        self.init = init
        self.identity_at_init = softmax == "own"
        if form == "mlp":
            self.learning_rate = 1e-3

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() - ({"calibrate"} if self.form == "mlp" or self.init == "normal" else set())

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        first = next(iter(found.values()))
        assert isinstance(first, MemorySite)
        self.trunk = (
            PrefixEncoder(self.length, first.heads * first.head_dim, self.hidden) if self.form == "mlp" else None
        )
        self.heads = (
            {key: layer.heads for key, layer in layers_of(self.name, model, found).items()}
            if self.softmax == "own"
            else {}
        )

    def make(self, site: Site) -> PrefixMemory:
        assert isinstance(site, MemorySite)
        return PrefixMemory(site, self.length, self.std, self.trunk, self.heads.get(id(site), 0))

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        start_from_activations(self.name, model, modules, self.length, batches)

    def finish(self, modules: Mapping[str, PeftModule]) -> None:
        for module in modules.values():
            assert isinstance(module, PrefixMemory)
            module.drop_network()
