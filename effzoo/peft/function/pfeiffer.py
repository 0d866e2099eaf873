"""One bottleneck adapter per block, after the feed-forward (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from effzoo.annotations import Count, Positive
from effzoo.peft.function.houlsby import Bottleneck, check_bottleneck
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Branch, PeftModule, Site


@peft.register("pfeiffer", "bottleneck_adapter")
class Pfeiffer(Method):
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
    identity_at_init = False
    accepts = (Branch,)
    default_targets = ("mlp.branch",)
    size = "bottleneck"
    learning_rate = 1e-3

    def __init__(
        self,
        *,
        bottleneck: Count = 64,
        activation: str = "relu",
        std: Positive = 1e-2,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        check_bottleneck("pfeiffer", bottleneck, activation)
        self.bottleneck, self.activation, self.std = bottleneck, activation, std

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Branch)
        return Bottleneck(site.dim, self.bottleneck, self.activation, self.std)
