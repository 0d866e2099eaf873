"""Training a selection of the model's own parameters: everything, the biases, the task head.

The selected parameters are copied and the copies are trained, so the base stays bit-identical, several adapters can live side
by side, and detaching restores the model exactly. The price is memory for one more copy of what was selected.
"""

from __future__ import annotations

from torch import Tensor, nn

from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import PeftModule, Site


class Copy(PeftModule):
    """theta' = phi, with phi starting as a copy of theta: weight decay acts as it would on the parameter itself."""

    delta_rank = None  # of the change to a matrix: anything up to full

    def __init__(self, **parameters: Tensor):
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(f"own_{name}", nn.Parameter(parameter.detach().clone()))

    def weight(self, weight: Tensor) -> Tensor:
        return getattr(self, "own_weight", weight)

    def bias(self, bias: Tensor) -> Tensor:
        return getattr(self, "own_bias", bias)


@peft.register("full")
class Full(Method):
    """Full fine-tuning: every parameter of the targets is trained (on copies; the base stays as it was)."""

    paper = "the baseline of every comparison; freezing layers: Lee et al. 2019, arXiv:1911.03090"
    zero_gradient = {"*.k*.own_bias": "softmax does not change when one number is added to all scores of a query, so key biases have none"}

    default_targets = ("*",)

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)

    def make(self, site: Site) -> PeftModule | None:
        base = site.base()
        return Copy(**base) if base else None


@peft.register("head", "head_only", "linear_probe")
class Head(Method):
    """Only the task head is trained; the network is a fixed feature extractor."""

    paper = "the baseline called feature extraction in Peters et al. 2019, arXiv:1903.05987"

    zero_gradient = Full.zero_gradient
    default_targets = ("head.*",)

    def __init__(self, *, targets: Targets = None):
        super().__init__(targets=targets)

    def make(self, site: Site) -> PeftModule | None:
        return Copy(**site.base())


@peft.register("bitfit")
class BitFit(Method):
    """Only biases are trained: theta' = theta except b' = phi. Their gradient needs no stored activations.

    targets selects which: the paper's strongest small group is ("attn.q*", "mlp.up").
    """

    paper = "Ben Zaken et al. 2022, BitFit, arXiv:2106.10199"
    zero_gradient = Full.zero_gradient

    default_targets = ("embed.*", "attn.*", "mlp.*", "final.*")

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)

    def make(self, site: Site) -> PeftModule | None:
        bias = site.base().get("bias")
        return None if bias is None else Copy(bias=bias)
