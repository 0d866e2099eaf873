"""What is lost when a trained adapter is taken out of some blocks (Houlsby et al. 2019, arXiv:1902.00751, section 3.6
and figure 6)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn

from effzoo.errors import AdapterError, OptionError
from effzoo.peft import attached
from effzoo.sites import overruled, sites

Span = tuple[int, int]  # the first and the last layer, both among them


def spans(layers: int) -> list[Span]:
    """Every contiguous span of so many layers, layers (layers + 1) / 2 in number. Raises OptionError for no layers."""
    if layers < 1:
        raise OptionError(f"spans are of 1 layer or more, got {layers}")
    return [(first, last) for first in range(layers) for last in range(first, layers)]


@contextmanager
def without(model: nn.Module, layers: Collection[int], name: str = "default") -> Iterator[None]:
    """Inside the block the adapter does not act in these layers, with nothing that its method has hung there.

    What lies outside the layers stays, the task head too, and nothing is trained again.

    Raises AdapterError for an unknown name, OptionError for layers that the adapter does not touch.
    """
    if name not in attached(model):
        raise AdapterError(
            f"there is no adapter {name!r} on this model; attached: {', '.join(attached(model)) or '(none)'}"
        )
    touched = {site.layer for _, site in sites(model) if name in site.adapters}
    missing = [layer for layer in layers if layer not in touched]
    if missing:
        raise OptionError(
            f"adapter {name!r} has nothing in layers {missing}; it acts in "
            f"{sorted(layer for layer in touched if layer is not None)}"
        )
    with overruled(
        {site: site.now.without(name) for _, site in sites(model) if site.layer in layers and name in site.active}
    ):
        yield


def ablated(model: nn.Module, measure: Callable[[], float], layers: int, name: str = "default") -> dict[Span, float]:
    """`measure` with the adapter taken out of every span in turn."""
    values = {}
    for first, last in spans(layers):
        with without(model, range(first, last + 1), name):
            values[first, last] = measure()
    return values
