"""What it costs to spread a sequence over ranks: bytes over the link, operations over the rate, for the rank in the
middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effzoo.annotations import Count, PerSecond, Whole
from effzoo.architectures import Transformer
from effzoo.attention.predicate import PredicateAttention
from effzoo.blocks.attention import Attention
from effzoo.errors import InputError
from effzoo.parallel import OverRanks
from effzoo.parallel.cost import Shapes, scores, sent
from effzoo.parallel.kinds import sees_all
from effzoo.parallel.ranks import Planned, Split
from effzoo.sites import Linear, unwrap

BACKWARD = 2.5  # operations of attention backward, in times of forward: five products for two


@dataclass(frozen=True)
class Layer:
    """Bytes that a rank sends for the attention of a layer in a training step, and the operations of that attention.

    overlapped: whether they are sent while the rank computes, around the ring; else before.
    """

    kind: str
    sent: float
    operations: float
    overlapped: bool

    def seconds(self, link: float, rate: float) -> float:
        times = self.sent / link, self.operations / rate
        return max(times) if self.overlapped else sum(times)


@dataclass(frozen=True)
class Spread:
    """One training step of one of several ranks that compute a sequence together.

    layers: of the attention.
    products: operations of all else: products with weights.
    gradients: bytes sent to sum the gradients of trainable parameters.
    link, rate: bytes and operations a second; None where not given.
    """

    ranks: int
    layers: tuple[Layer, ...]
    products: float
    gradients: float
    link: float | None = None
    rate: float | None = None

    @property
    def sent(self) -> float:
        """Bytes that the rank sends in a step."""
        return sum(layer.sent for layer in self.layers) + self.gradients

    @property
    def operations(self) -> float:
        """Operations of the rank in a step; a product and a sum are two."""
        return sum(layer.operations for layer in self.layers) + self.products

    @property
    def link_seconds(self) -> float:
        """sent / link. Raises InputError without a link."""
        return self.sent / _given("link", self.link)

    @property
    def compute_seconds(self) -> float:
        """operations / rate. Raises InputError without a rate."""
        return self.operations / _given("rate", self.rate)

    @property
    def seconds(self) -> float:
        """Of a step: of a layer around the ring the larger of both times, of others their sum. Raises InputError
        without a link or a rate."""
        link, rate = _given("link", self.link), _given("rate", self.rate)
        return sum(layer.seconds(link, rate) for layer in self.layers) + self.products / rate + self.gradients / link

    def __str__(self) -> str:
        text = f"each of {self.ranks} ranks sends {self.sent / 2**20:,.2f} MiB in a step"
        if self.link is not None:
            text += f", {self.link_seconds:.3g} s over the link"
        if self.rate is not None:
            text += f", and computes {self.operations / 1e12:,.3g} T operations, {self.compute_seconds:.3g} s"
        return text


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise InputError(f"seconds need the {name}: plan(..., {name}=...)")
    return value


def spread(
    model: nn.Module, *, batch: Count = 1, length: Count, ranks: Count, link: PerSecond | None = None,
    rate: PerSecond | None = None, dtype: torch.dtype | None = None, globals: Whole | None = None,
) -> Spread:  # fmt: skip
    """A training step of a Transformer over ranks by closed forms: nothing runs, weights may be on the meta device.

    batch, length: of the inputs, without padding.
    link, rate: bytes that a rank sends, and operations that it computes, a second.
    dtype: of activations; None: of the weights.
    globals: the most global tokens of a sequence; None: those that the model marks by itself.

    Operations are those of attention, and of products with weights: 2 forward, 2 for the gradient of the input, 2 for
    that of a weight that is trained, for each token and number. What is computed again counts again, and is sent again.

    Raises IncompatibleError for what cannot be spread, InputError for more ranks than pieces.
    """
    model = unwrap(model)
    over = OverRanks(model, Planned(ranks, ranks // 2))
    model, config = over.model, over.model.config
    prompt = model.embeddings.prompt()
    p = 0 if prompt is None else prompt.shape[-2]
    split = over.split(p + length)
    kind = next(parameter.dtype for parameter in model.parameters()) if dtype is None else dtype
    again = config.residual == "reversible" or (model.recompute == "blocks" and model.training)
    marked = _marked(model, p) if globals is None else globals
    layers, known = [], dict[Any, Layer]()  # layers of the same attention cost the same
    for block in model.by_layer():
        core = block.attn.core
        key = core.key if isinstance(core, PredicateAttention) else id(core)
        if key not in known:
            known[key] = _layer(block.attn, split, batch, kind, marked, again)
        layers.append(known[key])
    numbers = 0.0  # that a token is multiplied with, forward and backward
    inside = {id(part) for part in model.blocks.modules()}
    of_cores = {id(part) for core in model.cores() for part in core.modules()}  # those act along the sequence
    for part in model.modules():
        if isinstance(part, Linear) and id(part) not in of_cores:
            computed_again, times = (again, config.layers // config.blocks) if id(part) in inside else (False, 1)
            numbers += times * part.weight.numel() * (2 + computed_again + part.weight.requires_grad)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = 2 * (ranks - 1) / ranks * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return Spread(ranks, tuple(layers), 2 * batch * split.size() * numbers, gradients, link, rate)


def _layer(layer: Attention, split: Split, batch: int, kind: torch.dtype, globals: int, again: bool) -> Layer:
    core = layer.core
    shapes = Shapes(batch, kind, core.context.heads // layer.kv_heads, globals)
    bytes_sent, pairs = sent(core, split, shapes), batch * scores(core, split)
    operations = 4 * core.context.heads * core.context.head_dim * pairs * (1 + again + BACKWARD)
    return Layer(core.name, bytes_sent.forward * (1 + again) + bytes_sent.backward, operations, sees_all(core))


def _marked(model: Transformer, prompt_length: int) -> int:
    """Global tokens of a sequence where nobody names any, as `Transformer.mask_of` marks them."""
    first = model.task == "classification" and not model.config.causal
    return prompt_length + (first and any(core.for_globals() for core in model.cores()))
