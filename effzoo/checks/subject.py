"""One attention kind under check: its class, the small options it is built with, and the tensors it is tried on.

Sizes are tiny and the dtype is float64 unless a check says otherwise; every tensor is drawn from a generator of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effzoo.attention.core import AttentionCore, Context, Mask
from effzoo.checks.declared import suitable
from effzoo.checks.runner import NotApplicable, close
from effzoo.registry import attention as registry
from effzoo.sites import KeysValues
from effzoo.spec import Spec, parse_one

BATCH, HEADS, WIDTH, LENGTHS = 3, 2, 8, (1, 2, 7, 16, 31, 64)


@dataclass
class Subject:
    """One attention kind under check: its class and the small options it is built with."""

    spec: Spec
    cls: type[AttentionCore]
    reference: Any = None  # what --against names: `effzoo.checks.against`

    @classmethod
    def of(cls, given: str) -> Subject:
        kind = registry.get(parse_one(given).name)
        return cls(suitable(registry, given, lambda spec: cls(spec, kind).core()), kind)

    def oracle(self, core: AttentionCore) -> Any:
        """What says what a core must compute: itself, by `dense` and `pattern`, or the reference; None for none."""
        if self.reference is not None:
            return self.reference.like(core.context)
        return core if self.has_definition else None

    @property
    def defined(self) -> bool:
        """Whether there is something to compare with."""
        return self.reference is not None or self.has_definition

    def core(
        self,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        layer: int = 0,
        max_length: int = max(LENGTHS),
        seed: int = 3,
        width: int = WIDTH,
        heads: int = HEADS,
    ) -> AttentionCore:
        """The kind as one of two layers, in evaluation mode and float64; what it draws at its start follows from the
        seed."""
        context = Context(
            heads=heads, head_dim=width, causal=causal, dropout=dropout, layer=layer, layers=2, max_length=max_length
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            core: AttentionCore = registry.create(self.spec, context)
        return core.double().eval()

    def cores(self, **options: Any) -> Iterator[tuple[str, AttentionCore]]:
        """Bidirectional and, where the kind can be, causal."""
        yield "bidirectional", self.core(**options)
        if not self.cls.not_causal:
            yield "causal", self.core(causal=True, **options)

    @property
    def has_pattern(self) -> bool:
        return self.cls.pattern is not AttentionCore.pattern

    @property
    def has_definition(self) -> bool:
        """Whether a dense definition says what the output must be."""
        return self.has_pattern or self.cls.dense is not AttentionCore.dense

    def needs_definition(self) -> None:
        if not self.has_definition:
            raise NotApplicable(
                "nothing to compare with: the kind has neither `pattern` nor `dense`; write one, or give --against"
            )


def draw(
    core: AttentionCore,
    n: int,
    mask: Mask,
    batch: int = BATCH,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    keys: int = 0,
) -> list[Any]:
    """The projections that the core uses with this mask, [batch, heads, n, head_dim] each, and None for the others.

    keys: another length for keys and values.
    """
    source, used = torch.Generator().manual_seed(n + 1000 * seed), core.uses(mask)
    heads, width = core.context.heads, core.context.head_dim
    lengths = [keys if keys and side in ("key", "value") else n for side in core.projections.values()]
    drawn = [torch.randn(batch, heads, length, width, dtype=torch.float64, generator=source) for length in lengths]
    return [
        x.to(dtype).requires_grad_() if name in used else None for name, x in zip(core.projections, drawn, strict=True)
    ]


def some_memory(keys: int = 3) -> KeysValues:
    """Keys and values [heads, keys, width] that every query sees."""
    source = torch.Generator().manual_seed(99)
    memory_keys, values = torch.randn(2, HEADS, keys, WIDTH, dtype=torch.float64, generator=source)
    return memory_keys.requires_grad_(), values.requires_grad_()


def given(mask: Mask, memory: KeysValues | None) -> dict[str, Any]:
    """The keywords of a core, as in its layer: kinds that take no memory have no such parameter."""
    return {"mask": mask} if memory is None else {"mask": mask, "memory": memory}


def padding(n: int) -> Tensor:
    """Padding of three examples, bool[3, n]: none, at the end, and at the front with a hole."""
    place = torch.arange(n)
    return torch.stack([place >= 0, place < max(1, n - n // 3), (place >= n // 4) & ((place != n // 2) | (n < 4))])


def some_global(n: int) -> Tensor:
    """Global tokens at other places, and in other number, in each of three examples; the second has none."""
    place = torch.arange(n)
    return torch.stack([place == 0, place < 0, (place == n // 3) | (place == n - 1)])


def masks(core: AttentionCore, n: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments of every mask that the kind must honour: none, padding, and global tokens where it has them."""
    valid = padding(n)
    yield "", {}
    yield " with padding", {"valid": valid}
    if core.knows_globals():
        yield " with global tokens", {"is_global": some_global(n)}
        yield " with global tokens and padding", {"valid": valid, "is_global": some_global(n) & valid}


def live(tensors: list[Any]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def cut(tensors: list[Any], rows: slice = slice(None), places: slice = slice(None)) -> list[Any]:
    """Some rows of the batch and some places of the sequence, of those tensors that are there."""
    return [None if x is None else x[rows, :, places] for x in tensors]


def gradients(out: Tensor, inputs: list[Tensor], at: Tensor | None = None, *, again: bool = True) -> list[Tensor]:
    """Gradients of a random weighted sum over the output; zeros where none flows.

    at: bool[batch, n], the positions that count; None for all.
    again: whether the graph is kept for another pass.
    """
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out)
    if at is not None:
        weight = weight * at[:, None, :, None]
    grads = torch.autograd.grad((out * weight).sum(), inputs, retain_graph=again, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def same_as_definition(
    core: AttentionCore, n: int, where: str, advice: str, memory: KeysValues | None = None, **mask: Any
) -> None:
    """Forward and all gradients of a core against its dense definition."""
    inputs = draw(core, n, Mask(**mask))
    out = core(*inputs, **given(Mask(**mask), memory))
    expected = core.dense(*inputs, mask=Mask(**mask), memory=memory)
    same_as(out, expected, core, inputs, f"{where}, n = {n}", advice, memory)


def same_as(
    out: Tensor,
    expected: Tensor,
    core: AttentionCore,
    inputs: list[Any],
    where: str,
    advice: str,
    memory: KeysValues | None = None,
) -> None:
    """Two outputs, and their gradients with respect to the inputs and the memory, to 1e-10."""
    close(f"{where}: the output", out, expected, 1e-10, advice)
    leaves = live(inputs) + list(memory or ())
    names = [name for name, x in zip(core.projections, inputs, strict=True) if x is not None] + [
        "memory keys",
        "memory values",
    ]
    for name, found, wanted in zip(names, gradients(out, leaves), gradients(expected, leaves), strict=False):
        close(f"{where}: the gradient of {name}", found, wanted, 1e-10, gone(name, found, wanted) or advice)


def gone(name: str, found: Tensor, wanted: Tensor) -> str:
    """The cause of a gradient that vanishes where it must not; "" for another."""
    if bool((found == 0).all()) and bool((wanted != 0).any()):
        return (
            f"no gradient reaches {name}: it is detached on the way, by .detach(), .data, torch.no_grad() or a copy "
            "such as torch.tensor"
        )
    return ""
