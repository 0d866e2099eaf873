"""Input composition, f([phi, x]): methods that add rows to the input or keys and values to attention."""

from effzoo.peft.input import prefix, prompt

__all__ = ["prefix", "prompt"]
