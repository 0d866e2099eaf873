"""Combinations: methods that hang modules at several doors and tie them together (MAM, UniPELT, S4)."""

from effzoo.peft.combined import s4, unipelt

__all__ = ["s4", "unipelt"]
