"""UniPELT: a prefix, LoRA and an adapter in every layer, each with a gate (Mao et al. 2022, arXiv:2110.07577)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from effzoo.annotations import Count
from effzoo.errors import IncompatiblePeft
from effzoo.peft.function.houlsby import Bottleneck
from effzoo.peft.input.layer import layers_of
from effzoo.peft.input.prefix import Prefix, PrefixMemory
from effzoo.peft.method import Batches, Layers, Modules, predicts_next
from effzoo.peft.parameter.lora import LowRank
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, Linear, Memory, MemorySite, PeftModule, Site


class Gate(nn.Module):
    """g = mean over the tokens of sigmoid(w x + b), [batch, n, dim] -> [batch, 1, 1]; padding is left out."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 1)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        gates: Tensor = self.linear(x).sigmoid()
        if valid is None:
            return gates.mean(dim=-2, keepdim=True)
        tokens = valid.sum(dim=-1).clamp(min=1)[:, None, None]
        return gates.masked_fill(~valid[..., None], 0.0).sum(dim=-2, keepdim=True) / tokens


class GatedPrefix(PeftModule):
    """Keys g P_k and values g P_v, [batch, heads, length, head_dim]."""

    def __init__(self, prefix: PrefixMemory, dim: int):
        super().__init__()
        self.prefix, self.gate = prefix, Gate(dim)

    def memory(self, context: HookContext) -> Memory | None:
        memory = self.prefix.memory(context)
        if memory is None:
            return None
        gate = self.gate(context.x, context.valid)[..., None]
        return Memory(gate * memory.keys, gate * memory.values)


class GatedLowRank(LowRank):
    """y' = y + g B A x, g the gate of the layer, which its LoRA modules share and compute from their input."""

    def __init__(self, site: Linear, rank: int, gate: Gate):
        super().__init__(site.in_features, site.out_features, rank, scale=1.0)
        self.gate = gate

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        valid = context.valid if x.ndim > 2 else None  # prompt tokens belong to no example: all of them count
        return y + self.gate(x, valid) * (x @ self.A.T) @ self.B.T

    def delta(self, weight: Tensor, bias: Tensor | None) -> None:
        """None: the change differs by example."""
        return


class GatedBottleneck(Bottleneck):
    """y' = y + g W_up sigma(W_down y), the gate from the input x of the sub-layer."""

    def __init__(self, dim: int, bottleneck: int, activation: str, std: float):
        super().__init__(dim, bottleneck, activation, std)
        self.gate = Gate(dim)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.gate(x, context.valid) * self.up(self.activation(self.down(y)))


@peft.register("unipelt")
class UniPELT(TrainingHooks):
    """[g_P P_k, K], [g_P P_v, V]; W_q + g_L B A, W_v + g_L B' A'; y + g_A W_up relu(W_down y): three gates a layer.

        g = mean over the tokens of sigmoid(w x + b), in (0, 1) for each example

    length: of the prefix.
    form, hidden, init: as in `prefix`.
    rank: of LoRA on queries and values.
    bottleneck: of the adapter after the feed-forward (a sixteenth of BERT's 768).

    x is the input of the attention (prefix and LoRA) or of the feed-forward (adapter). The gate of LoRA takes the place
    of alpha / rank. That of the prefix multiplies keys and values, so at 0 each key of the prefix still takes e^0 of
    the softmax; in LSH attention, which normalises keys, it acts on the values alone.

    Padding is left out of the mean, unlike in the released code, so an example computes the same in any batch. A causal
    model's gates see all of the given text, which suits a label for it but not a language model: there it is refused.
    """

    paper = "Mao et al. 2022, UniPELT, arXiv:2110.07577, section 3"
    identity_at_init = False
    accepts = (MemorySite, Linear, Branch)
    default_targets = ("attn.memory", "attn.q*", "attn.v*", "mlp.branch")
    size = "bottleneck"
    learning_rate = 1e-3
    rates = {"prefix.keys": 10.0, "prefix.values": 10.0}

    def __init__(
        self,
        *,
        length: Count = 10,
        form: Literal["flat", "mlp"] = "flat",
        hidden: Count = 512,
        init: Literal["activations", "normal"] | None = None,
        rank: Count = 8,
        bottleneck: Count = 48,
        layers: Layers = None,
    ):
        super().__init__(layers=layers)
        self.prefix = Prefix(length=length, form=form, hidden=hidden, init=init)
        self.rank, self.bottleneck = rank, bottleneck

    def hooks_in_use(self) -> set[str]:
        return self.prefix.hooks_in_use()

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        if predicts_next(model, found):
            reason = "its gates are means over the whole text, so a token would be predicted from later ones"
            raise IncompatiblePeft(
                self.name, "a causal language model", reason, "use mam, or a union such as 'prefix|lora|houlsby'"
            )
        memories = {path: site for path, site in found.items() if isinstance(site, MemorySite)}
        self.prefix.prepare(model, memories)
        self.found = layers_of(self.name, model, memories)
        self.gates: dict[int | None, Gate] = {}

    def make(self, site: Site) -> PeftModule:
        if isinstance(site, MemorySite):
            return GatedPrefix(self.prefix.make(site), self.found[id(site)].width)
        if isinstance(site, Branch):
            return GatedBottleneck(site.dim, self.bottleneck, "relu", 1e-2)
        assert isinstance(site, Linear)
        if site.layer not in self.gates:
            self.gates[site.layer] = Gate(site.in_features)
        return GatedLowRank(site, self.rank, self.gates[site.layer])

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        self.prefix.calibrate(model, _prefixes(modules), batches)

    def finish(self, modules: Modules) -> None:
        self.prefix.finish(_prefixes(modules))


def _prefixes(modules: Modules) -> dict[str, PeftModule]:
    return {path: module.prefix for path, module in modules.items() if isinstance(module, GatedPrefix)}
