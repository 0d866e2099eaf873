"""SparseAdapter: bottleneck adapters that are pruned before they are trained (He et al. 2022, arXiv:2210.04284)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Positive, Probability
from effzoo.checked import counted
from effzoo.peft.function.houlsby import ACTIVATIONS, check_bottleneck
from effzoo.peft.method import Batches, Layers, Modules, Targets
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, PeftModule, Positionwise, Site


class Sparse(nn.Module):
    """W x + b, [..., in] -> [..., out], in which `kept` entries of W are trained and all others are 0."""

    indices: Tensor
    start: Tensor | None

    def __init__(self, inputs: int, outputs: int, kept: int, std: float):
        super().__init__()
        weight = nn.init.trunc_normal_(torch.empty(outputs, inputs), std=std, a=-2 * std, b=2 * std)
        self.shape = weight.shape
        self.values = nn.Parameter(torch.empty(kept))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("indices", torch.zeros(kept, dtype=torch.int32))
        self.register_buffer("start", weight, persistent=False)  # until the entries are chosen
        self.probe: nn.Parameter | None
        self.register_parameter("probe", None)  # all of W, while saliencies are measured

    def keep(self, scores: Tensor) -> None:
        """Train the entries with the largest scores, from where they started."""
        assert self.start is not None
        chosen = scores.flatten().topk(len(self.values)).indices.sort().values
        with torch.no_grad():
            self.indices.copy_(chosen)
            self.values.copy_(self.start.flatten()[chosen])

    def matrix(self) -> Tensor:
        """W, [out, in]."""
        if self.probe is not None:
            return self.probe
        return (
            self.values.new_zeros(self.shape.numel()).index_copy(0, self.indices.long(), self.values).view(self.shape)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)


class SparseBottleneck(Positionwise, PeftModule):
    """y' = y + W_up sigma(W_down y + b_down) + b_up with sparse W_down and W_up."""

    def __init__(self, down: Sparse, up: Sparse, activation: str):
        super().__init__()
        self.down, self.up, self.activation = down, up, ACTIVATIONS[activation]()

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.up(self.activation(self.down(y)))


@peft.register("sparse_adapter", "sparseadapter")
class SparseAdapter(TrainingHooks):
    """y' = y + W_up sigma(W_down y) after each sub-layer; a share `sparsity` of the entries of W is 0 from the
    beginning.

    bottleneck: inner width before pruning; wide and sparse beats narrow and dense at equal size (Large-Sparse, section
        3.4).
    sparsity: share of the entries of each matrix that is pruned.
    by: which are kept: "snip", those with the largest |w dL/dw| on labelled batches before training (Lee et al. 2019,
        arXiv:1810.02340), until then random ones; "magnitude", the largest |w|; "random".
    activation: sigma.
    std: of the truncated normal that the weights start from.

    Only kept entries are parameters, so nothing can move the others. Each matrix keeps the same share; the paper also
    compares over all matrices together.
    """

    paper = "He et al. 2022, SparseAdapter, arXiv:2210.04284, section 3"
    identity_at_init = False
    accepts = (Branch,)
    default_targets = ("attn.branch", "mlp.branch")
    size = "bottleneck"
    learning_rate = 3e-3

    def __init__(
        self,
        *,
        bottleneck: Count = 64,
        sparsity: Probability = 0.8,
        by: Literal["snip", "magnitude", "random"] = "snip",
        activation: str = "gelu",
        std: Positive = 1e-2,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        check_bottleneck("sparse_adapter", bottleneck, activation)
        self.bottleneck, self.sparsity, self.by, self.activation, self.std = bottleneck, sparsity, by, activation, std

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() - (set() if self.by == "snip" else {"calibrate"})

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Branch)
        kept = max(1, round((1 - self.sparsity) * site.dim * self.bottleneck))
        down, up = Sparse(site.dim, self.bottleneck, kept, self.std), Sparse(self.bottleneck, site.dim, kept, self.std)
        for layer in (down, up):
            assert layer.start is not None
            layer.keep(layer.start.abs() if self.by == "magnitude" else torch.rand_like(layer.start))
            if self.by != "snip":
                layer.start = None
        return SparseBottleneck(down, up, self.activation)

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        adapters = [module for module in modules.values() if isinstance(module, SparseBottleneck)]
        layers = [layer for module in adapters for layer in (module.down, module.up)]
        starts = [layer.start for layer in layers if layer.start is not None]
        if len(starts) < len(layers):
            return
        probes = [nn.Parameter(start.clone()) for start in starts]
        saliency = [torch.zeros_like(start) for start in starts]
        for layer, probe in zip(layers, probes, strict=True):
            layer.probe = probe
        try:
            for batch in batches:  # the loss over all of their labels, however they are cut
                count = counted(batch["labels"], *(getattr(model, name, None) for name in ("task", "num_labels")))
                loss = model(**batch).loss * count
                for total, gradient in zip(saliency, torch.autograd.grad(loss, probes), strict=True):
                    total += gradient
        finally:
            for layer in layers:
                layer.probe = None
        for layer, start, total in zip(layers, starts, saliency, strict=True):
            layer.keep((start * total).abs())
            layer.start = None

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, SparseBottleneck)
            module.down.start = module.up.start = None
