"""Combinations: methods that hang modules at several hooks and tie them together (MAM, UniPELT, S4)."""

from effzoo.peft.combined import mam, s4, unipelt

__all__ = ["mam", "s4", "unipelt"]
