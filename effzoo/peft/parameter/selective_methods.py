"""Training some of the model's own parameters: everything, the upper layers, the norms, the biases, the task head.

Copies of these parameters are trained, so the base stays bit-identical, several adapters can live side by side, and
detaching restores the model exactly. The price is memory for one more copy of what is trained. What lies below the
lowest trained tensor needs no gradient, so autograd stores none of its activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Probability, Whole
from effzoo.errors import OptionError, TargetError, listing
from effzoo.peft.method import HEAD, Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Growing, Norm, OwnOutputs, PeftModule, Site, longer, sites
from effzoo.tensors import uncoded


class Copy(Growing, OwnOutputs, PeftModule):
    """theta' = phi, with phi starting as a copy of theta: weight decay acts as it would on the parameter itself.

    Of a weight of codes (torchao) phi starts as the numbers that they stand for, since codes have no gradient.
    """

    delta_rank = None  # of the change to a matrix: anything up to full

    def __init__(self, **parameters: Tensor):
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(f"own_{name}", nn.Parameter(uncoded(parameter.detach()).clone()))

    def weight(self, weight: Tensor) -> Tensor:
        return getattr(self, "own_weight", weight)

    def bias(self, bias: Tensor) -> Tensor:
        return getattr(self, "own_bias", bias)

    @property
    def own_outputs(self) -> int | None:
        weight = self._parameters.get("own_weight")
        return None if weight is None else len(weight)

    @torch.no_grad()
    def renew(self, outputs: int) -> None:
        """A fresh head, as a model starts with: drawn with a standard deviation of 0.02, biases 0."""
        for name, old in list(self._parameters.items()):
            assert old is not None
            new = nn.Parameter(old.new_zeros(outputs, *old.shape[1:]), requires_grad=old.requires_grad)
            setattr(self, name, nn.init.normal_(new, std=0.02) if name == "own_weight" else new)

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        for name, added in (("own_weight", weight), ("own_bias", bias)):
            if added is not None and hasattr(self, name):
                setattr(self, name, longer(getattr(self, name), added))


@peft.register("full", "select")
class FullFineTuning(Method):
    """Full fine-tuning: theta' = phi for every parameter of the targets, with phi a copy that is trained.

    With targets or layers it trains any group by role or by block: `full[targets=(attn.E, attn.F)]`,
    `full[targets=mlp.*, layers=(-2, -1)]`. The task head, which is new, learns at the rate of `head`, unless it is
    given as a target.
    """

    paper = "the baseline of every comparison: Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.2"
    learning_rate = 5e-5
    default_targets = ("*",)

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)

    def make(self, site: Site) -> PeftModule | None:
        left_to_head = self.targets is None and fnmatchcase(site.role, HEAD)
        return Copy(**site.base()) if site.base() and not left_to_head else None


class _Upper(Method):
    """The blocks from some number on, and what lies behind the last one; everything before the first stays frozen.

    The task head is left to `head`, whose rate suits what is new.
    """

    learning_rate = 5e-5
    default_targets = ("*",)
    below = ("embed.*", "latents", "cross.*")  # roles outside the blocks that lie before them
    trained: set[int]  # ids of the sites

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        depth = 1 + max((site.layer for _, site in sites(model) if site.layer is not None), default=-1)
        if depth == 0:
            raise TargetError(f"{self.name}: this model has no blocks; use full with targets")
        lowest = self.first_trained(depth)
        above = [site for site in found.values() if site.base() and self.lies_above(site, lowest)]
        body = [site for site in above if not fnmatchcase(site.role, HEAD)]
        self.trained = {id(site) for site in body or above}
        if not body:  # every block is frozen: what is left is the head
            self.learning_rate = Head.learning_rate

    def first_trained(self, depth: int) -> int:
        """The number of the lowest block that is trained, of `depth` blocks; `depth` for none."""
        raise NotImplementedError

    def lies_above(self, site: Site, lowest: int) -> bool:
        """Whether a site is in block number `lowest` or behind it."""
        return (
            site.layer >= lowest
            if site.layer is not None
            else not any(fnmatchcase(site.role, role) for role in self.below)
        )

    def make(self, site: Site) -> PeftModule | None:
        return Copy(**site.base()) if id(site) in self.trained else None


@peft.register("last", "last_layers")
class Last(_Upper):
    """The last `count` blocks are trained, with the final norm, the pooler and the head behind them; all below is
    fixed.

    count: how many blocks; a model with fewer is refused.
    """

    paper = (
        "Howard & Ruder 2018, ULMFiT, arXiv:1801.06146, section 3.3 (unfreezing from the last layer on, here "
        "without the schedule)"
    )
    size = "count"

    def __init__(self, *, count: Count = 2):
        super().__init__()
        self.count = count

    def first_trained(self, depth: int) -> int:
        if self.count > depth:
            raise OptionError(
                f"{self.name}: count={self.count} blocks, but this model has {depth}; give at most {depth}, or use full"
            )
        return depth - self.count


@peft.register("freeze", "freeze_first")
class Freeze(_Upper):
    """The embeddings and the `first` blocks are frozen, the rest is trained; the frozen part stores no activations.

    first: blocks (an int), or a share of them (a float below 1), rounded down. The paper finds that training a fourth
        of the layers reaches 90 % of the quality, hence 0.75.
    """

    paper = "Lee et al. 2019, What would Elsa do? Freezing layers during transformer fine-tuning, arXiv:1911.03090"

    def __init__(self, *, first: Whole | Probability = 0.75):
        super().__init__()
        self.first = first

    def first_trained(self, depth: int) -> int:
        first = int(self.first * depth) if isinstance(self.first, float) else self.first
        if first > depth:
            raise OptionError(
                f"{self.name}: first={self.first} blocks, but this model has {depth}; give at most {depth}"
            )
        return first


@peft.register("head", "head_only", "linear_probe")
class Head(Method):
    """Only the task head is trained; the network is a fixed feature extractor."""

    paper = "the baseline called feature extraction in Peters et al. 2019, arXiv:1903.05987"
    learning_rate = 1e-3
    default_targets = (HEAD,)

    def __init__(self, *, targets: Targets = None):
        super().__init__(targets=targets)

    def make(self, site: Site) -> PeftModule | None:
        return Copy(**site.base()) if site.base() else None


@peft.register("norms", "ln_tuning", "layernorm")
class Norms(Method):
    """Only the LayerNorms or RMSNorms are trained: their weight and, where there is one, their bias."""

    paper = (
        "Qi et al. 2022, Parameter-efficient tuning on layer normalization for pre-trained language models, "
        "arXiv:2211.08682"
    )
    learning_rate = 1e-3
    accepts = (Norm,)
    default_targets = ("*norm*",)

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)

    def make(self, site: Site) -> PeftModule | None:
        return Copy(**site.base()) if site.base() else None


GROUPS = {
    "all": ("embed.*", "attn.*", "mlp.*", "final.*"), "strong": ("attn.q*", "mlp.up"), "query": ("attn.q*",),
    "key": ("attn.k*",), "value": ("attn.v*",), "output": ("attn.o", "mlp.down"),
    "intermediate": ("mlp.up", "mlp.gate"), "norms": ("attn.norm*", "mlp.norm*"), "attention_norm": ("attn.norm*",),
    "output_norm": ("mlp.norm*",),
}  # fmt: skip


@peft.register("bitfit")
class BitFit(Method):
    """Only biases are trained: theta' = theta except b' = phi. Their gradient needs no stored activations.

    group: which biases, one name or several: "all"; "strong", the two that matter most, half of all (section 4: the
        query's, b_q, and the middle of the feed-forward, b_m2); "query", "key", "value" (with the projections of global
        tokens); "output" (of attention and of the feed-forward); "intermediate"; "attention_norm", "output_norm",
        "norms" (both).
    targets: role patterns instead of a group.
    """

    paper = "Ben Zaken et al. 2022, BitFit, arXiv:2106.10199"
    learning_rate = 1e-3
    default_targets = GROUPS["all"]

    def __init__(self, *, group: str | Sequence[str] = "all", targets: Targets = None, layers: Layers = None):
        groups = (group,) if isinstance(group, str) else tuple(group)
        unknown = [name for name in groups if name not in GROUPS]
        if unknown or not groups:
            raise OptionError(f"bitfit: group is one or several of {listing(GROUPS)}, got {group!r}")
        if groups != ("all",) and targets is not None:
            raise OptionError(
                f"bitfit: give a group ({group!r}) or targets ({targets!r}), not both; a group is a name for targets"
            )
        super().__init__(targets=targets, layers=layers)
        self.default_targets = tuple(dict.fromkeys(role for name in groups for role in GROUPS[name]))

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        if not any("bias" in site.base() for site in found.values()):
            roles = listing(sorted({site.role for site in found.values()}))
            raise TargetError(
                f"bitfit: none of the {len(found)} sites has anything to adapt, because none has a bias ({roles}); "
                "models without biases can train their norms instead: 'norms'"
            )

    def make(self, site: Site) -> PeftModule | None:
        bias = site.base().get("bias")
        return None if bias is None else Copy(bias=bias)
