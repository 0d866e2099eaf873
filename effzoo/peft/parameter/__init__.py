"""Parameter composition, f(theta + phi): methods that change what a site's weight or bias is."""

from effzoo.peft.parameter import (
    diff_pruning,
    dora,
    far,
    fish,
    head_pruning,
    intrinsic,
    krona,
    lora_everywhere,
    lt_sft,
    magnitude,
    movement,
    selective_methods,
    supermask,
    tokens,
)

__all__ = [
    "diff_pruning", "dora", "far", "fish", "head_pruning", "intrinsic", "krona", "lora_everywhere", "lt_sft",
    "magnitude", "movement", "selective_methods", "supermask", "tokens",
]  # fmt: skip
