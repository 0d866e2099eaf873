"""One function for six methods: the rows of the unified view (He et al. 2022, arXiv:2110.04366, section 3.3 and table
1).

Every method adds delta h = sigma(z W_down) W_up to some representation h. A row says which sigma, where z is taken from
(h itself, or the x that h was made of) and how delta h joins h; `described` computes h' from the row and nothing else,
and `attached` reads h, x, the gate and the two matrices off a model that runs with the method, together with the h'
that it really computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.architectures import Transformer
from effzoo.blocks import Attention
from effzoo.errors import IncompatibleError
from effzoo.peft.function.houlsby import Bottleneck
from effzoo.peft.function.multihead_parallel import HeadBottlenecks
from effzoo.peft.function.parallel import ParallelBottleneck
from effzoo.peft.input.prefix import PrefixMemory
from effzoo.peft.parameter.lora import LowRank
from effzoo.sites import Branch, Linear, PeftModule, sites

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(dim=-1),
    "relu": F.relu,
    "identity": lambda z: z,
}


@dataclass(frozen=True)
class Row:
    """One row of the table, as data.

    form: sigma.
    modified: the representation that changes.
    insertion: "parallel", z is the input x of the layer; "sequential", z is h.
    composition: "gated", h' = (1 - lambda) h + lambda delta h; "scaled", h' = h + s delta h; "added", h' = h + delta
        h.
    """

    method: str
    form: Literal["softmax", "relu", "identity"]
    modified: Literal["head attention", "attention or feed-forward", "query or value"]
    insertion: Literal["parallel", "sequential"]
    composition: Literal["gated", "scaled", "added"]


TABLE = (
    Row("prefix", "softmax", "head attention", "parallel", "gated"),
    Row("houlsby", "relu", "attention or feed-forward", "sequential", "added"),
    Row("lora", "identity", "query or value", "parallel", "scaled"),
    Row("parallel", "relu", "attention or feed-forward", "parallel", "added"),
    Row("multihead_parallel", "relu", "head attention", "parallel", "added"),
    Row("scaled_parallel", "relu", "attention or feed-forward", "parallel", "scaled"),
)


@dataclass(frozen=True)
class Place:
    """One modified representation, as it occurred.

    h [batch, g, n, out], in g groups (heads, or 1), without the method; x [batch, n, in], what it was made of; real: h'
    as the model computed it, after `read_out`. down [g, in, r] with a bias [g, r], up [g, r, out] with a bias [g, out].
    scale: s.
    base_lse [batch, g, n]: log sum exp(q k) over the tokens, where h is attention and there is a softmax to share.
    read_out: what lies between h' and the place where the model shows it.
    """

    path: str
    h: Tensor
    x: Tensor
    real: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: float
    base_lse: Tensor | None
    read_out: Callable[[Tensor], Tensor]


def described(row: Row, place: Place) -> Tensor:
    """h' of the row, [batch, g, n, out].

    Raises IncompatibleError where the row asks for what the place has not: a softmax to share, or a z as wide as
        W_down.
    """
    z = place.x.unsqueeze(1).expand(-1, len(place.down), -1, -1) if row.insertion == "parallel" else place.h
    if z.shape[-1] != place.down.shape[-2]:
        raise IncompatibleError(
            f"{row.method}: {place.path} has a W_down for {place.down.shape[-2]} numbers, and the {row.insertion} z "
            f"has {z.shape[-1]}"
        )
    logits = torch.einsum("bgnd,gdr->bgnr", z, place.down) + place.down_bias[:, None]
    change = torch.einsum("bgnr,gro->bgno", FORMS[row.form](logits), place.up) + place.up_bias[:, None]
    if row.composition == "gated":
        gate = share(logits, place)[..., None]
        return (1 - gate) * place.h + gate * change
    return place.h + (place.scale if row.composition == "scaled" else 1.0) * change


def share(logits: Tensor, place: Place) -> Tensor:
    """lambda(x) = sum exp(q P_k) / (sum exp(q P_k) + sum exp(q k)), equation 5.

    logits: q P_k [..., r]; 1 / sqrt(d) stands in W_down.
    """
    if place.base_lse is None:
        raise IncompatibleError(f"{place.path} is no attention, so there is no softmax whose share could be a gate")
    return (logits.logsumexp(dim=-1) - place.base_lse).sigmoid()


@torch.no_grad()
def difference(row: Row, places: list[Place]) -> float | None:
    """The largest |h' of the row - h' of the model| over all places; None where the row cannot be computed there."""
    try:
        return max(float((place.read_out(described(row, place)) - place.real).abs().max()) for place in places)
    except IncompatibleError:
        return None


@torch.no_grad()
def attached(model: Transformer, **inputs: Tensor) -> list[Place]:
    """Every place that the active adapter modifies in one run, with what is needed to compute it from a row.

    inputs: of the model.

    Raises IncompatibleError for a method that is none of the table's, and for attention that is not full.
    """
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    watched = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (Branch, Linear)) or path.endswith(".attn.core")
    }
    hooks = [module.register_forward_hook(_noting(calls, path), with_kwargs=True) for path, module in watched.items()]
    mode = model.training
    try:
        model.eval()(**inputs)
        return list(_places(model, calls))
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()


def _noting(calls: dict[str, Any], path: str) -> Any:
    def noting(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        calls[path] = (given, named, out)

    return noting


def _places(model: Transformer, calls: dict[str, Any]) -> Iterator[Place]:
    for path, site in sites(model):
        for module in site.hung() if not site.role.startswith("head.") else ():
            if isinstance(module, (Bottleneck, ParallelBottleneck)):
                (x, y, *_), _, real = calls[path]
                scale = float(module.scale) if isinstance(module, ParallelBottleneck) else 1.0
                down, up = module.down, module.up
                yield _plain(path, y, x, real, down.weight, up.weight, down.bias, up.bias, scale)
            elif isinstance(module, LowRank) and isinstance(site, Linear):
                (x,), _, real = calls[path]
                yield _plain(
                    path, F.linear(x, site.weight, site.bias), x, real, module.A, module.B, None, None, module.scale
                )
            elif isinstance(module, (PrefixMemory, HeadBottlenecks)):
                layer = model.get_submodule(path.rpartition(".")[0])
                assert isinstance(layer, Attention)
                yield _of_heads(path.rpartition(".")[0], layer, module, calls)


def _plain(
    path: str,
    h: Tensor,
    x: Tensor,
    real: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: float,
) -> Place:
    """A place of one group; down [r, in] and up [out, r] as layers hold them."""
    zero_down, zero_up = down.new_zeros(1, len(down)), up.new_zeros(1, len(up))
    return Place(
        path, h[:, None], x, real, down.T[None], zero_down if down_bias is None else down_bias[None], up.T[None],
        zero_up if up_bias is None else up_bias[None], scale, None, lambda heads: heads.squeeze(1),
    )  # fmt: skip


def _of_heads(path: str, layer: Attention, module: PeftModule, calls: dict[str, Any]) -> Place:
    """The heads of one attention layer; h is what they give without the method, and both are compared after W_o."""
    core, heads = layer.core, layer.core.context.heads
    if (
        core.name != "full"
        or core.context.causal
        or layer.kv_heads != heads
        or layer.rotary is not None
        or layer.o is None
    ):
        raise IncompatibleError(
            f"{path}: heads are read from full, bidirectional attention without rotary positions, as in BERT"
        )
    projected, named, _ = calls[f"{path}.core"]
    q, k, _ = projected
    x = calls[f"{path}.v"][0][0]
    d = q.shape[-1]
    scores = q @ k.transpose(-1, -2) / d**0.5
    valid = named["mask"].valid
    base_lse = (scores if valid is None else scores.masked_fill(~valid[:, None, None], float("-inf"))).logsumexp(dim=-1)
    if isinstance(module, PrefixMemory):
        keys, up = module.pair()
        query = layer.q
        assert isinstance(query, Linear)
        w_q = rearrange(query.weight, "(h d) i -> h i d", h=heads)
        b_q = rearrange(
            query.weight.new_zeros(query.out_features) if query.bias is None else query.bias, "(h d) -> h 1 d", h=heads
        )
        down = w_q @ keys.transpose(-1, -2) / d**0.5
        down_bias = (b_q @ keys.transpose(-1, -2) / d**0.5).squeeze(1)
        scale = 1.0
    else:
        assert isinstance(module, HeadBottlenecks)
        down, up, scale = module.down.transpose(-1, -2), module.up.transpose(-1, -2), module.scale
        down_bias = down.new_zeros(heads, down.shape[-1])
    o = layer.o
    return Place(
        path, core(*projected, mask=named["mask"]), x, calls[f"{path}.o"][2], down, down_bias, up,
        up.new_zeros(heads, up.shape[-1]), scale, base_lse,
        lambda heads: F.linear(rearrange(heads, "b h n d -> b n (h d)"), o.weight, o.bias),
    )  # fmt: skip
