"""What an attention kind costs, counted and not timed: memory and arithmetic by length, against its declared `cost`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from effzoo.attention.core import Mask
from effzoo.checks.runner import Failed, needs
from effzoo.checks.subject import Subject, draw, gradients, live

SLACK = 0.25  # of the exponent: a logarithm grows by 0.13 between these lengths
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Cost:
    """What one forward and backward pass took. Entries are of a tensor's storage, so a view costs nothing.

    largest: entries of the largest tensor that an operation made.
    where: that operation.
    kept: entries that autograd keeps for the backward pass.
    work: multiply-adds of matrix products and attention, twice, and entries written by everything else.
    """

    largest: int = 0
    where: str = ""
    kept: int = 0
    work: int = 0

    def growth(self, longer: Cost, ratio: float) -> dict[str, float]:
        """The exponents with which each grows when the length grows by the ratio."""
        pairs = {
            "the largest tensor": (self.largest, longer.largest),
            "what autograd keeps": (self.kept, longer.kept),
            "the work": (self.work, longer.work),
        }
        return {what: math.log(max(b, 1) / max(a, 1), ratio) for what, (a, b) in pairs.items()}


class CostCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what every operation below autograd makes and computes, the backward pass included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
        for tensor in made if not func.is_view else ():
            entries = tensor.untyped_storage().nbytes() // tensor.itemsize
            if entries > self.cost.largest:
                self.cost.largest, self.cost.where = entries, func.__name__
        self.cost.work += _work(func, args, kwargs or {}, out, made)
        return out


def _work(func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> int:
    packet = func.overloadpacket
    if packet is _FLASH:
        return _attention(args[0], args[1], args[2])
    if packet is _FLASH_BACKWARD:
        return 5 * _attention(*args[1:4]) // 2  # five products where the forward pass has two
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0 if func.is_view else sum(tensor.numel() for tensor in made)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (k.shape[-1] + v.shape[-1])


def declared_exponent(cost: str) -> int:
    """Of n in the declared cost: 2 when it starts with "n^2", else 1 ("n", "n * window", "n log n")."""
    return 2 if cost.replace(" ", "").startswith("n^2") else 1


def measure(subject: Subject, n: int, *, causal: bool = False, dropout: float = 0.0) -> Cost:
    """One forward and backward pass in float32 over n positions, with padding and global tokens, by a core for this
    length."""
    core = subject.core(causal=causal, dropout=dropout, max_length=n).float().train(dropout > 0)
    place = torch.arange(n)[None]
    mask = Mask(place < n - 3, (place == 0) | (place == n // 2) if core.knows_globals() else None)
    inputs = draw(core, n, mask, batch=1, dtype=torch.float32)
    counter = CostCounter()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    kept: dict[int, int] = {}
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = core(*inputs, mask=mask)
    counter.cost.kept = sum(kept.values())
    with counter:
        gradients(out, live(inputs))
    return counter.cost


@needs("every_length")
def cost_grows_as_declared(subject: Subject) -> None:
    """The largest tensor, what autograd keeps and the work grow with the length as the declared cost says

    `effzoo.checks.cost.measure(subject, n)` with `subject = effzoo.checks.attention.Subject.of(NAME)` counts one pass,
        and names the operation that made the largest tensor.
    """
    declared = declared_exponent(subject.cls.cost)
    short, long = (1024, 4096) if declared == 1 else (256, 1024)
    for where, causal, dropout in (
        ("bidirectional", False, 0.0),
        ("bidirectional in training with dropout", False, 0.1),
        *([] if subject.cls.not_causal else [("causal", True, 0.0)]),
    ):
        small, large = (measure(subject, n, causal=causal, dropout=dropout) for n in (short, long))
        if declared == 1:
            for n, cost in ((short, small), (long, large)):
                if cost.largest >= n * n:
                    size = f"{cost.largest:,} entries at n = {n}, at least n x n = {n * n:,}"
                    raise Failed(
                        f"{where}: {cost.where} makes a tensor of {size}, but the cost is {subject.cls.cost!r}; a mask "
                        "or scores are written out for all pairs: build them in tiles, chunk by chunk"
                    )
        for what, exponent in small.growth(large, long / short).items():
            if exponent > declared + SLACK:
                numbers = f"n^{exponent:.2f} from n = {short} to {long}"
                at = f" (the largest is made by {large.where})" if what == "the largest tensor" else ""
                raise Failed(
                    f"{where}: {what} grows as {numbers}{at}, but the cost {subject.cls.cost!r} says n^{declared}; "
                    "something runs over all pairs of positions, or a width grows with n: bound it by an option"
                )
