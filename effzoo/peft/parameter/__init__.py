"""Parameter composition, f(theta + phi): methods that change what a site's weight or bias is."""

from effzoo.peft.parameter import (
    adalora,
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
    randlora,
    rotations,
    selective_methods,
    supermask,
    tokens,
    vblora,
    vera,
)

__all__ = [
    "adalora", "diff_pruning", "dora", "far", "fish", "fourierft", "head_pruning", "intrinsic", "krona", "loha",
    "lora_everywhere", "lora_fa", "lt_sft", "magnitude", "miss", "movement", "randlora", "rotations",
    "selective_methods", "supermask", "tokens", "vblora", "vera",
]  # fmt: skip
