"""Function composition, phi(f(x)): methods that transform what a site receives or returns."""

from effzoo.peft.function import (
    adamix,
    compacter,
    houlsby,
    ia3,
    ladder,
    loreft,
    multihead_parallel,
    pals,
    parallel,
    pfeiffer,
    residual_adapter,
    sparse_adapter,
)

__all__ = [
    "adamix", "compacter", "houlsby", "ia3", "ladder", "loreft", "multihead_parallel", "pals", "parallel", "pfeiffer",
    "residual_adapter", "sparse_adapter",
]  # fmt: skip
