"""One budget for every method: the size (rank, bottleneck, length, share) at which it trains as much as allowed."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import torch
from torch import nn

from effzoo.annotations import Count
from effzoo.errors import OptionError
from effzoo.peft.attach import attach, attached, detach
from effzoo.peft.method import HEAD, Method
from effzoo.registry import peft as registry
from effzoo.sites import sites, unwrap
from effzoo.spec import Spec, parse_one

M = TypeVar("M", bound=nn.Module)
NAME = "within_budget"
MOST = 2**20  # the largest size that is tried
REFUSED = 2**62  # more than any budget


def within(model: nn.Module, method: str | Spec, trainable: Count) -> Spec:
    """The spec with its size option (`Method.size`) as large as the budget allows.

    model: left as it is.
    method: a spec of one method.
    trainable: the budget, in parameters; the task head is not counted.

    Whole-number sizes are searched by doubling and halving, shares (float options) by bisection; the count must grow
    with the size. Raises OptionError for a method without a size, or when even the smallest size trains more.
    """
    model, spec = unwrap(model), parse_one(method)
    cls: type[Method] = registry.get(spec.name)
    if not cls.size:
        raise OptionError(f"{spec.name} has no size to set; give it as it is")
    option = next(option for option in registry.options(spec.name) if option.name == cls.size)
    shadow = without_memory(model)
    if isinstance(option.default, float):
        best = _share(lambda size: _trained(shadow, spec, cls.size, size), trainable)
    else:
        best = _whole(lambda size: _trained(shadow, spec, cls.size, size), trainable)
    if best is not None and isinstance(best, int) and best >= MOST:
        raise OptionError(
            f"{spec.name} trains fewer than {trainable:,} parameters here at every {cls.size} up to "
            f"{MOST:,}; give a smaller budget"
        )
    if best is None:
        raise OptionError(
            f"{spec.name} trains more than {trainable:,} parameters here at any {cls.size}; give other "
            "options, targets or layers"
        )
    return Spec(spec.name, {**spec.options, cls.size: best})


def _whole(count: Any, budget: int) -> int | None:
    """The largest multiple, within the budget, of the smallest size that the method takes (1, or a divisor)."""
    unit = next((size for size in range(1, 129) if count(size) < REFUSED), None)
    if unit is None or count(unit) > budget:
        return None
    low = 1
    while low < MOST and count(2 * low * unit) <= budget:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle * unit) <= budget else (low, middle)
    return low * unit


def _share(count: Any, budget: int) -> float | None:
    low, high = 0.0, 1.0
    if count(1.0) <= budget:
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    if low == 0.0:
        return None
    short = float(f"{low:.4g}")
    return short if count(short) <= budget else math.floor(low * 1e6) / 1e6


def _trained(model: nn.Module, spec: Spec, option: str, size: float) -> int:
    """Trainable parameters of the adapter at one size, without the head; `REFUSED` where the method refuses it."""
    try:
        with torch.device("meta"):
            attach(model, Spec(spec.name, {**spec.options, option: size}), name=NAME)
    except OptionError:
        return REFUSED
    try:
        heads = {path for path, site in sites(model) if site.role.startswith(HEAD.removesuffix("*"))}
        own = {
            id(p): p.numel()
            for path, site in sites(model)
            if path not in heads and NAME in site.adapters
            for p in site.of(NAME).parameters()
        }
        return sum(own.values())
    finally:
        if NAME in attached(model):
            detach(model, NAME)


def without_memory(model: M) -> M:
    """A copy of the model on the meta device: shapes and dtypes alone."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
