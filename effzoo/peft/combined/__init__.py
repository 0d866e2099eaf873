"""Combinations: methods that hang modules at several doors and tie them together (MAM, UniPELT, S4)."""
