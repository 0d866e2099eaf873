"""AdapterFusion: attention over the outputs of several adapters (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Few, NotNegative, Positive
from effzoo.errors import IncompatiblePeft
from effzoo.peft.method import Layers, Modules
from effzoo.peft.modular.mixture import ExpertMixture, MixtureMethod
from effzoo.registry import peft
from effzoo.sites import HookContext, MemorySite, PeftModule, Site


class Fused(ExpertMixture):
    """y' = y + sum_i s_i V a_i with s = softmax_i((Q y) . (K a_i)) at every position; a_i = y_i - y is what expert i
    adds.

    Q and K are drawn, V starts as the identity: a single expert is then itself.
    """

    def __init__(self, experts: Sequence[nn.ModuleDict], dim: int, frozen: bool, std: float):
        super().__init__(experts, frozen)
        self.query, self.key = nn.Parameter(torch.randn(dim, dim) * std), nn.Parameter(torch.randn(dim, dim) * std)
        self.value = nn.Parameter(torch.eye(dim))

    def mixed(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        added = torch.stack([out - plain for out in outs], dim=-2)
        scores = torch.einsum("...d,...ed->...e", F.linear(plain, self.query), F.linear(added, self.key))
        share = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(added)
        return plain + F.linear(torch.einsum("...e,...ed->...d", share, added), self.value).to(plain)

    def regularisation(self) -> Tensor:
        """|V - I|_F^2."""
        identity = torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
        return (self.value - identity).square().sum()


@peft.register("fusion", "adapter_fusion")
class Fusion(MixtureMethod):
    """y' = y + sum_i softmax_i((Q y) . (K a_i)) V a_i: learned attention over adapters, which stay as they are.

    of: the spec of an adapter, or a list with one spec for each; `effzoo.peft.gather` fills in trained ones.
    experts: how many, for one spec.
    frozen: whether they stay as they are.
    finished: whether they come as training leaves them.
    regularisation: weight of |V - I|_F^2, summed over the sites (0.01 in the released code).
    std: of the normal that Q and K are drawn from.

    Works at every site where an expert changes an output: branches for bottleneck adapters as in the paper, projections
    for LoRA. In the paper the values are the adapters' outputs; here they are what adapters add, so that expert and
    fusion are the same where there is one expert.
    """

    paper = "Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247, section 3.2"
    learning_rate = 5e-4

    def __init__(
        self,
        *,
        of: str | Sequence[str] = "pfeiffer[bottleneck=16]",
        experts: Few = 2,
        frozen: bool = True,
        finished: bool = False,
        regularisation: NotNegative = 0.01,
        std: Positive = 0.02,
        layers: Layers = None,
    ):
        super().__init__(of, experts, frozen, finished, layers=layers)
        self.regularisation, self.std = regularisation, std

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() | ({"penalty"} if self.regularisation else set())

    def make(self, site: Site) -> PeftModule | None:
        experts = self.experts_at(site)
        if experts is None:
            return None
        width = getattr(site, "out_features", None) or getattr(site, "dim", None)
        if isinstance(site, MemorySite) or width is None:
            raise IncompatiblePeft(
                self.name, f"experts at {site.role!r}", "it attends over outputs, and there is none", "use routed"
            )
        return Fused(experts, int(width), self.frozen, self.std)

    def penalty(self, modules: Modules) -> Tensor | None:
        values = [] if (own := super().penalty(modules)) is None else [own]
        if self.regularisation:
            values += [self.regularisation * m.regularisation() for m in modules.values() if isinstance(m, Fused)]
        return torch.stack(values).sum() if values else None
