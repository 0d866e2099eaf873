"""Attention kinds: one file each, a plan over the softmax of `kernel.py`, or over the sums of `features.py`.

`names()`, `get(name)`, `options(name)` and `register(name)` are the registry's view of this kind.
"""

from effzoo.annotations import check_arguments
from effzoo.attention import (
    bigbird,
    blockwise,
    dilated,
    full,
    linear,
    linformer,
    local,
    longformer,
    lsh,
    nystromformer,
    perceiver,
    performer,
    streaming,
)
from effzoo.attention.core import AttentionCore, Cache, Context, Mask, memory_part
from effzoo.attention.kernel import attend, choose
from effzoo.attention.part import Part, bias_of
from effzoo.attention.predicate import PredicateAttention
from effzoo.registry import attention as _view

names, get, options, register, create = _view.names, _view.get, _view.options, _view.register, _view.create
aliases = _view.aliases

__all__ = [
    "AttentionCore",
    "Cache",
    "Context",
    "Mask",
    "Part",
    "PredicateAttention",
    "aliases",
    "attend",
    "bias_of",
    "bigbird",
    "blockwise",
    "choose",
    "create",
    "dilated",
    "full",
    "get",
    "linear",
    "linformer",
    "local",
    "longformer",
    "lsh",
    "memory_part",
    "names",
    "nystromformer",
    "options",
    "perceiver",
    "performer",
    "register",
    "streaming",
]

check_arguments(globals())
