"""Prefix tuning: trained keys and values in every attention layer (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Memory, PeftModule, Site


class KeysValues(PeftModule):
    """Trained keys [heads, length, head_dim] and values [heads, length, value_dim]."""

    def __init__(self, site: Memory, length: int, std: float):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(site.heads, length, site.head_dim) * std)
        self.values = nn.Parameter(torch.randn(site.heads, length, site.value_dim) * std)

    def memory(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@peft.register("prefix", "prefix_tuning")
class Prefix(Method):
    """head_i = Attn(x W_q, [P_k, x W_k], [P_v, x W_v]): `length` trained keys and values per layer, seen by every query.

    length: of the prefix. std: of the normal distribution that P_k and P_v start from.

    Positions do not shift. A prefix is not a no-op, not even one of zeros: a key of 0 still takes e^0 of the softmax. This is the
    flat form, without the reparametrisation by an MLP.
    """

    paper = "Li & Liang 2021, Prefix-tuning, arXiv:2101.00190, section 4; as a gate: He et al. 2022, arXiv:2110.04366, eq. 5"
    identity_at_init = False
    accepts = (Memory,)
    default_targets = ("attn.memory",)

    def __init__(self, *, length: int = 16, std: float = 0.02, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        if length < 1 or std < 0:
            raise OptionError(f"prefix: length is at least 1 and std not negative, got length={length}, std={std}")
        self.length, self.std = length, std

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Memory)
        return KeysValues(site, self.length, self.std)
