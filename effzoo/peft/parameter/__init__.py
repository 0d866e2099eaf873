"""Parameter composition, f(theta + phi): methods that change what a site's weight or bias is."""

from effzoo.peft.parameter import lora, selected

__all__ = ["lora", "selected"]
