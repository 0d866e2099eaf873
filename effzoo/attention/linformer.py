"""Linformer attention: keys and values are projected along the sequence (Wang et al. 2020, arXiv:2006.04768,
section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count
from effzoo.attention import reference
from effzoo.attention.core import CompressedAttention, Context, Mask
from effzoo.attention.part import bias_of
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.registry import attention
from effzoo.sites import KeysValues, Linear, opens
from effzoo.sites.dtypes import linear as product

Sharing = Literal["none", "headwise", "key_value", "layerwise"]


@attention.register("linformer")
class Linformer(CompressedAttention):
    """softmax(q (E K)^T / sqrt(d)) F V, where E and F [k, n] project keys and values along the sequence. Cost O(n k).

    k: rows of E K and F V, at most max_length; one number, or one per layer.
    sharing: "none", an E and an F per head; "headwise", per layer; "key_value", E = F, one per layer; "layerwise", one
        matrix for all layers (section 4, "parameter sharing").
    projection: "linear"; "mean", the mean over segments of ceil(max_length / k) tokens, without parameters; "conv", a
        convolution with that kernel and stride, the same for all channels (section 4, "general projections").

    E has max_length columns; an input of n positions takes the first n. K and V are 0 at padding, bias included. The
    mean is over the tokens of a segment; no query attends to a segment without tokens ("mean", "conv"). An input
    without tokens gives 0. E and F start as the mean over k equal segments (the paper: normal with variance 1 / k).

    One E for all heads is applied to x first where that costs less: E (x W + b) = (E x) W + (E 1) b, unless something
    stands between (an adapter's output, rotary positions, a norm of keys). E and F are sites, `attn.E` and `attn.F`;
    with adapters, x is padded with zeros to max_length for them.
    """

    paper = "Wang et al. 2020, Linformer: Self-attention with linear complexity, arXiv:2006.04768, section 4"
    cost = "n * k"
    not_causal = "it mixes past and future when it projects the sequence"

    def __init__(
        self,
        context: Context,
        *,
        k: Count | Sequence[Count] = 256,
        sharing: Sharing | None = "headwise",
        projection: Literal["linear", "mean", "conv"] = "linear",
    ):
        super().__init__(context)
        sizes = [k] * context.layers if isinstance(k, int) else list(k)
        if len(sizes) != context.layers or min(sizes) < 1:
            raise OptionError(
                f"linformer: k is at least 1, one number or one per layer ({context.layers} layers), got {k}"
            )
        if sharing == "layerwise" and len(set(sizes)) > 1:
            raise OptionError(
                f"linformer: layers that share one matrix have one k, got {k}; give one number, or sharing='key_value'"
            )
        self.k, self.length = min(sizes[context.layer], context.max_length), context.max_length
        self.sharing, self.projection = sharing or "none", projection  # a spec string reads `none` as None
        self.segment = -(-self.length // self.k)
        self.E: nn.Module | None = None
        self.F: nn.Module | None = None
        if projection != "mean":
            if sharing == "layerwise":
                self._share()
            else:
                self.E = self._make("attn.E", context.layer)
                self.F = self._make("attn.F", context.layer) if sharing != "key_value" else None
        self.initialise()

    def _make(self, role: str, layer: int | None) -> nn.Module:
        """The site, or one site per head."""
        inputs, outputs = (self.length, self.k) if self.projection == "linear" else (self.segment, 1)
        if self.sharing == "none":
            return nn.ModuleList(
                Linear(inputs, outputs, bias=False, role=role, layer=layer) for _ in range(self.context.heads)
            )
        return Linear(inputs, outputs, bias=False, role=role, layer=layer)

    def _share(self) -> None:
        """Make the site that all layers share, in the layer that is built first: its weight is stored once.

        The others find it in `context.shared`; when that layer is built again, they find its new site.
        """
        owner = self.context.shared.setdefault(("layer of", self._key), self.context.layer)
        if owner == self.context.layer:
            self.E = self.context.shared[self._key] = self._make("attn.E", None)

    @property
    def _key(self) -> str:
        return f"linformer {self.projection} {self.k} x {self.length}"

    def initialise(self) -> None:
        with torch.no_grad():
            for site in (*self._sites("k"), *self._sites("v")):
                if self.projection == "conv":
                    site.weight.fill_(1 / self.segment)
                else:
                    place = torch.arange(self.length, device=site.weight.device)
                    bounds = torch.arange(self.k + 1, device=site.weight.device)[:, None] * self.length // self.k
                    inside = ((bounds[:-1] <= place) & (place < bounds[1:])).to(site.weight.dtype)
                    site.weight.copy_(inside / inside.sum(dim=1, keepdim=True))

    def _sites(self, name: str) -> list[Linear]:
        """The sites that project keys ("k") or values ("v"): one for all heads, one per head, or none."""
        if self.projection == "mean":
            return []
        if self.sharing == "layerwise" and self.E is None:
            return [self.context.shared[self._key]]
        module = self.F if name == "v" and self.F is not None else self.E
        return [*cast("Iterable[Linear]", module)] if self.sharing == "none" else [cast(Linear, module)]

    def compressed(self, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor | None]:
        # `project` notes in the mask that it has compressed: in cross-attention the shape does not show it
        keys, values = (
            self._compress(name, x, mask) if mask._memo.pop(_note(name), None) is None else x
            for name, x in (("k", k), ("v", v))
        )
        return keys, values, self._bias(mask, k.dtype)

    def project(self, name: str, x: Tensor, linear: Callable[[Tensor], Tensor], mask: Mask) -> Tensor:
        slice_only = mask.over_ranks is not None
        if self.projections[name] == "query" or slice_only or not self._compresses_first(name, x.shape[1], linear):
            return linear(x)
        site, of_keys = cast(Linear, linear), mask._memo.get(_note("k"), (None, None))
        same = name == "v" and of_keys[0] is x and self._sites("k") == self._sites("v")
        compressed = of_keys[1] if same else self._compress(name, x, mask)  # E x serves keys and values when F = E
        mask._memo[_note(name)] = (x, compressed)
        y = product(compressed, site.composed_weight())
        bias = site.composed_bias()
        if bias is None:
            return y
        ones = x.new_ones(1 if mask.valid is None else x.shape[0], x.shape[1], 1)
        return y + (self._compress(name, ones, mask) * bias).to(y.dtype)  # E 1, where 1 is 0 at padding

    def _compresses_first(self, name: str, n: int, linear: Callable[[Tensor], Tensor]) -> bool:
        """Whether (E x) W + (E 1) b is the same function as E (x W + b), and costs fewer multiplications."""
        if (
            self.sharing == "none"
            or not isinstance(linear, Linear)
            or not all(map(_plain, (linear, *self._sites(name))))
        ):
            return False
        k, inner, dim = self._length(n), linear.out_features, linear.in_features
        return (k * n + k * inner) * dim < (n * dim + k * n) * inner

    def _length(self, n: int) -> int:
        """To how many positions n are compressed."""
        if n > self.length:
            raise InputError(
                f"linformer projects sequences of up to max_length {self.length} positions, got {n}; build the model "
                f"with max_length={n}"
            )
        return self.k if self.projection == "linear" else -(-n // self.segment)

    def _compress(self, name: str, x: Tensor, mask: Mask) -> Tensor:
        """E x (F x for values), x 0 at padding: [batch, heads, n, d] -> [batch, heads, k, d], or without heads."""
        n, valid = x.shape[-2], mask.valid
        k, sites = self._length(n), self._sites(name)
        if valid is not None:
            x = x.masked_fill(~valid.view(valid.shape[0], *[1] * (x.ndim - 3), n, 1), 0.0)
        if self.projection == "mean":
            tokens = x.new_ones(1, n) if valid is None else valid.to(x.dtype)
            count = self._segments(tokens[..., None]).sum(dim=-1).clamp(min=1)  # [batch, k, 1]
            return self._segments(x).sum(dim=-1) / count.view(count.shape[0], *[1] * (x.ndim - 3), k, 1)
        if len(sites) == 1:
            return self._through(sites[0], x)
        if self.projection == "linear" and not any(site.active for site in sites):
            return torch.stack([site.weight[:, :n] for site in sites]).to(x) @ x  # one product for all heads
        return torch.stack(
            [self._through(site, head) for site, head in zip(sites, x.unbind(dim=1), strict=True)], dim=1
        )

    def compressed_slice(self, name: str, x: Tensor, mask: Mask, start: int) -> Tensor:
        """What the positions start, start + 1, ... add to E x (F x for values), [batch, heads, k, d].

        The sum over all slices of a sequence is E x. Raises IncompatibleError for a projection that is not linear, or
        has adapters.
        """
        sites = self._sites(name)
        if self.projection != "linear" or any(site.active for site in sites):
            raise IncompatibleError(
                "linformer: slices of a sequence add up where E and F are linear and have no adapters; build it with "
                "projection='linear', and attach adapters elsewhere"
            )
        n = x.shape[-2]
        if start + n > self.length:
            self._length(start + n)
        if mask.valid is not None:
            x = x.masked_fill(~mask.valid[:, None, :, None], 0.0)
        return torch.stack([site.weight[:, start : start + n] for site in sites]).to(x) @ x

    def _through(self, site: Linear, x: Tensor) -> Tensor:
        """One site along the sequence, [..., n, d] -> [..., k, d]."""
        if self.projection == "conv":
            return site(self._segments(x)).squeeze(-1)
        columns = x.transpose(-1, -2)
        n = columns.shape[-1]
        y = site(F.pad(columns, (0, self.length - n))) if site.active else product(columns, site.weight[:, :n])
        return y.transpose(-1, -2).contiguous()  # flash kernels take a dense last axis

    def _segments(self, x: Tensor) -> Tensor:
        """The sequence in segments, the last one padded with zeros, [..., n, d] -> [..., k, d, segment]."""
        padded = F.pad(x, (0, 0, 0, -x.shape[-2] % self.segment))
        return rearrange(padded, "... (k s) d -> ... k d s", s=self.segment)

    def _bias(self, mask: Mask, dtype: torch.dtype) -> Tensor | None:
        """-inf for segments without tokens, [batch, 1, 1, k]; None for a linear E and without padding."""
        valid = mask.valid
        if self.projection == "linear" or valid is None:
            return None
        return mask.memo(
            ("segments", self.segment, dtype),
            lambda: bias_of(self._segments(valid[..., None]).any(dim=-1)[:, None, None, :, 0], dtype),
        )

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition: E and F as matrices [batch, heads, k, n], with columns of 0 at padding."""
        q, k, v = projected
        n, valid = k.shape[2], reference.padding(k.shape[2], mask.valid, k.device)
        place = torch.arange(n, device=k.device)
        in_segment = torch.arange(self._length(n), device=k.device)[:, None] == place // self.segment
        is_linear, tokens = self.projection == "linear", in_segment & valid
        allowed = torch.ones(1, dtype=torch.bool, device=k.device) if is_linear else tokens.any(dim=-1)[:, :, None]

        def matrix(name: str) -> Tensor:
            if self.projection == "mean":
                return tokens.to(k.dtype) / tokens.sum(dim=-1, keepdim=True).clamp(min=1)
            identity = torch.eye(self.length if is_linear else self.segment, dtype=k.dtype, device=k.device)
            weights = torch.stack([site(identity).T for site in self._sites(name)])
            return (weights[:, :, :n] if is_linear else weights[:, :, place % self.segment] * in_segment) * valid

        keys, values = (
            torch.einsum("bhkn,bhnd->bhkd", matrix(name).expand(*x.shape[:2], -1, n), x)
            for name, x in (("k", k), ("v", v))
        )
        return reference.dense(q, keys, values, allowed, memory)


def _note(name: str) -> tuple[str, str]:
    return ("linformer compressed", name)


def _plain(site: Linear) -> bool:
    """Whether the site is x W^T + b: no adapter changes its input or output, and all examples have the same."""
    return not site.mixed and not any(opens(module, "before", "after") for module in site.hung())
