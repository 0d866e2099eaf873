"""Linformer attention: keys and values are projected along the sequence to k rows (Wang et al. 2020, arXiv:2006.04768,
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
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention
from effzoo.sites import KeysValues, Linear, opens
from effzoo.sites.dtypes import linear as product

Sharing = Literal["none", "headwise", "key_value", "layerwise"]


@attention.register("linformer")
class Linformer(CompressedAttention):
    """softmax(q (E k)^T / sqrt(d)) F v, where E and F [k, n] project keys and values along the sequence. Cost O(n k).

    k: rows after the projection, at most max_length; one number, or one per layer.
    sharing: (section 4, "parameter sharing") "none", an E and an F per head; "headwise", per layer; "key_value", E = F,
        one per layer; "layerwise", one matrix for all layers, heads, keys and values.
    projection: (section 4, "general projections") "linear"; "mean", the mean over segments of ceil(max_length / k)
        tokens, without parameters; "conv", a convolution along the sequence whose kernel and stride are that length,
        one kernel for all channels, so that E stays a matrix.

    Lengths: position j meets column j of E, which has max_length columns; a shorter input uses the first n (E[:, :n]).
        Padding: rows of k = x W + b at padding are zeroed, bias included, before they are projected. A "linear" E has a
        weight everywhere, so all its k rows are attended, also where a short input leaves them (nearly) 0; rows of
        "mean" and "conv" whose segment holds no token are not, and the mean is over the tokens that are there. An input
        without any token gives 0.

    Linear projections start as the mean over k equal segments of max_length, convolutions as the mean of theirs (the
    paper: normal, 1 / k).

    Where E is one matrix for all heads, E (x W + b) = (E x) W + (E 1) b: the layer projects only k rows when that costs
    less and no function between the two (an adapter's output, rotary positions, a norm of the keys) forbids it. E and F
    are sites with the roles `attn.E` and
    `attn.F`; while something is hung there, the site's own forward runs on the sequence padded with zeros to
        max_length.
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
        rows = [k] * context.layers if isinstance(k, int) else list(k)
        if len(rows) != context.layers or min(rows) < 1:
            raise OptionError(
                f"linformer: k is at least 1, one number or one per layer ({context.layers} layers), got {k}"
            )
        if sharing == "layerwise" and len(set(rows)) > 1:
            raise OptionError(
                f"linformer: layers that share one matrix have one k, got {k}; give one number, or sharing='key_value'"
            )
        self.k, self.length = min(rows[context.layer], context.max_length), context.max_length
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
        """One site for all layers, found through `context.shared`: a module of the layer that is built first, so its
        weight is stored once. A layer that is built again, in place of the one that holds the site, holds another from
        then on, which all use."""
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
        # `project` leaves a note in the mask when it has compressed: the shape alone does not tell in cross-attention
        keys, values = (
            self._compress(name, x, mask) if mask._memo.pop(_note(name), None) is None else x
            for name, x in (("k", k), ("v", v))
        )
        return keys, values, self._bias(mask, k.dtype)

    def project(self, name: str, x: Tensor, linear: Callable[[Tensor], Tensor], mask: Mask) -> Tensor:
        if self.projections[name] == "query" or not self._compresses_first(name, x.shape[1], linear):
            return linear(x)
        site, of_keys = cast(Linear, linear), mask._memo.get(_note("k"), (None, None))
        again = name == "v" and of_keys[0] is x and self._sites("k") == self._sites("v")
        compressed = of_keys[1] if again else self._compress(name, x, mask)  # E x serves keys and values when F = E
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
        rows, inner, dim = self._rows(n), linear.out_features, linear.in_features
        return (rows * n + rows * inner) * dim < (n * dim + rows * n) * inner

    def _rows(self, n: int) -> int:
        """How many rows a sequence of n becomes."""
        if n > self.length:
            raise InputError(
                f"linformer projects sequences of up to max_length {self.length} positions, got {n}; build the model "
                f"with max_length={n}"
            )
        return self.k if self.projection == "linear" else -(-n // self.segment)

    def _compress(self, name: str, x: Tensor, mask: Mask) -> Tensor:
        """E x (F x for values) without the rows at padding, [b, heads, n, d] -> [b, heads, rows, d], or without the
        axis of heads."""
        n, valid = x.shape[-2], mask.valid
        rows, sites = self._rows(n), self._sites(name)
        if valid is not None:
            x = x.masked_fill(~valid.view(valid.shape[0], *[1] * (x.ndim - 3), n, 1), 0.0)
        if self.projection == "mean":
            there = x.new_ones(1, n) if valid is None else valid.to(x.dtype)
            count = self._segments(there[..., None]).sum(dim=-1).clamp(min=1)  # [b, rows, 1]
            return self._segments(x).sum(dim=-1) / count.view(count.shape[0], *[1] * (x.ndim - 3), rows, 1)
        if len(sites) == 1:
            return self._through(sites[0], x)
        if self.projection == "linear" and not any(site.active for site in sites):
            return torch.stack([site.weight[:, :n] for site in sites]).to(x) @ x  # one product for all heads
        return torch.stack(
            [self._through(site, head) for site, head in zip(sites, x.unbind(dim=1), strict=True)], dim=1
        )

    def _through(self, site: Linear, x: Tensor) -> Tensor:
        """One site along the sequence, [..., n, d] -> [..., rows, d]."""
        if self.projection == "conv":
            return site(self._segments(x)).squeeze(-1)
        columns = x.transpose(-1, -2)
        n = columns.shape[-1]
        rows = site(F.pad(columns, (0, self.length - n))) if site.active else product(columns, site.weight[:, :n])
        return rows.transpose(-1, -2).contiguous()  # the flash kernel wants the last axis dense

    def _segments(self, x: Tensor) -> Tensor:
        """The sequence cut into segments, the last one filled up with zeros, [..., n, d] -> [..., rows, d, segment]."""
        return rearrange(
            F.pad(x, (0, 0, 0, -x.shape[-2] % self.segment)), "... (rows s) d -> ... rows d s", s=self.segment
        )

    def _bias(self, mask: Mask, dtype: torch.dtype) -> Tensor | None:
        """Segments without any token, [b, 1, 1, rows]; None for a linear E and without padding."""
        valid = mask.valid
        if self.projection == "linear" or valid is None:
            return None
        return mask.memo(
            ("segments", self.segment, dtype),
            lambda: bias_of(self._segments(valid[..., None]).any(dim=-1)[:, None, None, :, 0], dtype),
        )

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition with E and F written out as matrices [b, heads, rows, n] whose columns are 0 at padding."""
        q, k, v = projected
        n, valid = k.shape[2], reference.padding(k.shape[2], mask.valid, k.device)
        place = torch.arange(n, device=k.device)
        in_segment = torch.arange(self._rows(n), device=k.device)[:, None] == place // self.segment
        some = (
            torch.ones(1, dtype=torch.bool, device=k.device)
            if self.projection == "linear"
            else (in_segment & valid).any(dim=-1)[:, :, None]
        )

        def matrix(name: str) -> Tensor:
            if self.projection == "mean":
                return (in_segment & valid).to(k.dtype) / (in_segment & valid).sum(dim=-1, keepdim=True).clamp(min=1)
            inputs = torch.eye(
                self.length if self.projection == "linear" else self.segment, dtype=k.dtype, device=k.device
            )
            # a site applied to the identity is its matrix
            weights = torch.stack([site(inputs).T for site in self._sites(name)])
            return (
                weights[:, :, :n] if self.projection == "linear" else weights[:, :, place % self.segment] * in_segment
            ) * valid

        keys, values = (
            torch.einsum("bhrn,bhnd->bhrd", matrix(name).expand(*x.shape[:2], -1, n), x)
            for name, x in (("k", k), ("v", v))
        )
        return reference.dense(q, keys, values, some, memory)


def _note(name: str) -> tuple[str, str]:
    return ("linformer compressed", name)


def _plain(site: Linear) -> bool:
    """Whether the site is its composed weight and bias: nothing active changes its input or its output, or differs by
    row."""
    return not site.mixed and not any(opens(module, "before", "after") for module in site.hung())
