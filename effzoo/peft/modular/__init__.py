"""Modules that compose: experts chosen by a router, attention over adapters, and adapters as experts and back."""

from effzoo.peft.modular import fusion, routed
from effzoo.peft.modular.gathering import extract, gather

__all__ = ["extract", "fusion", "gather", "routed"]
