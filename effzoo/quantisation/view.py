"""The weight of a quantised site as a tensor that others read, which takes memory only while it is computed with."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effzoo.errors import AdapterError

_REFUSAL = (
    "this weight is quantised, and rounding a small change to its few codes would lose most of it, so nothing is "
    "merged into it; keep the adapter attached, or call effzoo.dequantise(model) first"
)


class Decoded(Tensor):
    """A weight that each operation decodes anew; the results are plain tensors.

    There is one object per site, so its identity says whose it is. Writing to it raises AdapterError, and so does
    `double()`: that is how `merge` begins, which so refuses before it writes anywhere else.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    site: weakref.ref[nn.Module]

    @staticmethod
    def of(site: Any) -> Decoded:
        """The one of a site, as long as its dtype and device stay."""
        known = _known.get(site)
        if known is not None and (known.dtype, known.device) == (site.scales.dtype, site.scales.device):
            return known
        shape = (site.out_features, site.in_features)
        made: Decoded = Tensor._make_wrapper_subclass(
            Decoded, shape, dtype=site.scales.dtype, device=site.scales.device
        )
        made.site = weakref.ref(site)
        _known[site] = made
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, Decoded) and argument.alias_info is not None and argument.alias_info.is_write:
                raise AdapterError(_REFUSAL)
        args, kwargs = pytree.tree_map_only(Decoded, _numbers, (args, kwargs))
        return func(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> Decoded:
        if requires_grad:
            raise AdapterError(
                "this weight is quantised and has no gradient; a method that chooses by gradients of the base (fish) "
                "needs a dense base"
            )
        return self

    def double(self, *_: Any, **__: Any) -> Tensor:
        raise AdapterError(_REFUSAL)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Decoded({_numbers(self)})"


_known: weakref.WeakKeyDictionary[nn.Module, Decoded] = weakref.WeakKeyDictionary()


def _numbers(decoded: Decoded) -> Tensor:
    site: Any = decoded.site()
    numbers: Tensor = site.numbers()
    return numbers
