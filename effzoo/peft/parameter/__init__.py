"""Parameter composition, f(theta + phi): methods that change what a site's weight or bias is."""

from effzoo.peft.parameter import (
    diff_pruning,
    dora,
    far,
    fish,
    fourierft,
    head_pruning,
    intrinsic,
    krona,
    loha,
    lora_everywhere,
    lora_fa,
    lt_sft,
    magnitude,
    miss,
    movement,
    rotations,
    selective_methods,
    supermask,
    tokens,
    vera,
)

__all__ = [
    "diff_pruning", "dora", "far", "fish", "fourierft", "head_pruning", "intrinsic", "krona", "loha",
    "lora_everywhere", "lora_fa", "lt_sft", "magnitude", "miss", "movement", "rotations", "selective_methods",
    "supermask", "tokens", "vera",
]  # fmt: skip
