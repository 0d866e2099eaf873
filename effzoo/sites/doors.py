"""The doors: what a PeftModule may do at the site where it hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Seen:
    """What an attention layer shows to the modules of its memory site.

    x [batch, n, dim]: the layer's input. valid bool[batch, n]: tokens, or None when there is no padding. keys_values: rows [..., r, source_dim] ->
    the keys [..., heads, r, head_dim] and values that this layer's own projections make of them (not rotated, with the bias).
    """

    x: Tensor
    valid: Tensor | None
    keys_values: Callable[[Tensor], KeysValues]


class PeftModule(nn.Module):
    """What is hung on a site; every door is open and does nothing until it is overridden.

    by_position: whether what it computes for a position follows from that position alone (a memory may be made of all). The last block
    then leaves out what no head reads. grows: whether `grow` can follow a site whose weight gets more rows (`effzoo.resize_vocabulary`).
    """

    by_position: ClassVar[bool] = True
    grows: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype | None:
        """In which its numbers are held, and in which the site lets it compute; None where it has no numbers."""
        for own in self._parameters.values():  # most have some of their own: this is asked at every door of every pass
            if own is not None and own.is_floating_point():
                return own.dtype
        return next((tensor.dtype for tensor in chain(self.parameters(), self.buffers()) if tensor.is_floating_point()), None)

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def bias(self, bias: Tensor) -> Tensor:
        return bias

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def joined(self, x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        """`after` on a Branch, for modules that must know which positions hold a token (bool[batch, n], or None for all)."""
        return self.after(x, y)

    def rows(self) -> Tensor | None:
        """Embedding rows put in front of every input, [rows, dim]."""
        return None

    def memory(self) -> KeysValues | None:
        """Keys and values that every query of the layer also sees, each [heads, rows, head_dim]."""
        return None

    def remember(self, seen: Seen) -> KeysValues | None:
        """`memory` for modules that make it of what the layer sees; it may then differ by example, [batch, heads, rows, head_dim]."""
        return self.memory()

    def beyond(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and a gate [heads]: gate * Attn(q, keys, values), with a softmax of its own, is added to each head's output."""
        return None

    def beside(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """What replaces the output of the last block, of the states [batch, n, width] before, between and after the blocks."""
        raise NotImplementedError

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What merging adds to the site's weight and bias so that the function door is no longer needed.

        None when no such change exists. Computed in the dtype of `weight`, which `merge` makes float64. Modules that
        enter through the parameter door need not override it: the door itself says what the merged tensors are.
        """
        return None

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int | None:
        """How many entries of the site's weight and bias merging may change; None for every entry of the tensors that it touches."""
        return None

    def packed(self) -> dict[str, Tensor] | None:
        """What a file needs to hold, where that is less than the state dict (indices and values, bits); None for the state dict itself."""
        return None

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Take what `packed` gave. Raises KeyError or ValueError for tensors that do not fit."""
        raise NotImplementedError

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """The site's weight and bias got these rows at their ends; take as many more, so that nothing changes there yet."""
        raise NotImplementedError

    def replaces(self) -> Sequence[int]:
        """Rows of the site's weight that it puts rows of its own in the place of, whatever they are."""
        return ()

    @property
    def own_outputs(self) -> int | None:
        """Of how many outputs the weight is that it puts in the place of the site's, whatever that is; None where it changes the site's own."""
        return None

    def renew(self, outputs: int) -> None:
        """Start anew with a weight of so many outputs. Only for what has `own_outputs`."""
        raise NotImplementedError

    def opens(self, *doors: str) -> bool:
        """Whether this module, or its class, overrides one of the named doors."""
        kind, own = type(self), vars(self)  # either may have been changed since
        return any(door in own or getattr(kind, door) is not getattr(PeftModule, door) for door in doors)

    def learn(self, on: bool) -> None:
        """Make what is trained here trainable, or not."""
        self.requires_grad_(on)

    def apart(self, seen: Seen) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What is `beyond`, as often as there is something; a gate [batch, heads] differs by example."""
        found = self.beyond(seen)
        return [] if found is None else [found]


def longer(parameter: nn.Parameter, rows: Tensor, dim: int = 0) -> nn.Parameter:
    """A parameter with rows (or columns, dim=1) added at its end."""
    return nn.Parameter(torch.cat([parameter.detach(), rows.to(parameter)], dim=dim), requires_grad=parameter.requires_grad)


class Mixture(PeftModule):
    """Several experts at one site, each of them modules; the site computes with each, and `mix` makes one output of theirs.

    experts: the modules of each expert at this site, by method; an expert may have none here, and then leaves the output as it is.
    """

    def __init__(self, experts: Sequence[nn.ModuleDict]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def at_hand(self) -> list[tuple[PeftModule, ...]]:
        """The modules of each expert."""
        return [tuple(cast("Iterable[PeftModule]", expert.values())) for expert in self.experts]  # type: ignore[operator]

    @staticmethod
    def at_the_output(modules: Sequence[PeftModule]) -> bool:
        """Whether these change the output alone, so that the product need not be computed again."""
        return not any(module.opens("weight", "bias", "before") for module in modules)

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor]) -> Tensor:
        """One output of the experts' `outs`; plain: the output without any. x: the site's input."""
        raise NotImplementedError

    def opens(self, *doors: str) -> bool:
        """An output is mixed here, and what the experts open is open."""
        return "after" in doors or any(module.opens(*doors) for own in self.at_hand() for module in own)
