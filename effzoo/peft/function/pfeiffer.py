"""One bottleneck adapter per block, after the feed-forward (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from effzoo.annotations import Count, Positive
from effzoo.peft.function.houlsby import Houlsby
from effzoo.peft.method import Layers, Targets
from effzoo.registry import peft
from effzoo.sites import Branch


@peft.register("pfeiffer", "bottleneck_adapter")
class Pfeiffer(Houlsby):
    """y' = y + W_up sigma(W_down y) after the feed-forward alone: half of Houlsby's adapters, and no norms are trained.

    bottleneck: inner width; 2 bottleneck dim + bottleneck + dim parameters a block.
    activation: sigma; relu in the paper.
    std: of the truncated normal that both matrices start from, which makes the adapter nearly, not exactly, the
        identity.

    The adapter comes before the residual is added, in pre-norm and in post-norm models; the search in the paper (its
    figure 3) ends with the same place in the block, and with the block's norm once more in front of the adapter, which
    is left out.
    """

    paper = "Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247, appendix; as in AdapterHub, arXiv:2007.07779"
    accepts = (Branch,)
    default_targets = ("mlp.branch",)

    def __init__(
        self,
        *,
        bottleneck: Count = 64,
        activation: str = "relu",
        std: Positive = 1e-2,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(bottleneck=bottleneck, activation=activation, std=std, targets=targets, layers=layers)
