"""The intrinsic dimension of a task for a network, read off a curve of scores (Li et al. 2018, arXiv:1804.08838,
section 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from effzoo.errors import InputError


def d90(curve: Mapping[int, float], baseline: float, *, share: float = 0.9) -> int | None:
    """d_int90: the smallest d of the curve whose score is at least `share` of the baseline; None where none is.

    curve: {d: score}; the answer is as fine as the d that were tried.
    baseline: the score of the same network trained in all its parameters.
    """
    _check(curve, share)
    return min((d for d, reached in curve.items() if reached >= share * baseline), default=None)


def crossing(curve: Mapping[int, float], baseline: float, *, share: float = 0.9) -> float | None:
    """Where the curve, drawn straight over log d, first crosses `share` of the baseline.

    The smallest d where that is above already; None where it never is. It lies between `d90` and the d tried before it,
    and makes sweeps of different d comparable.
    """
    last = d90(curve, baseline, share=share)
    if last is None:
        return None
    before = max((d for d in curve if d < last), default=None)
    if before is None:
        return float(last)
    part = (share * baseline - curve[before]) / (curve[last] - curve[before])
    return math.exp(math.log(before) + part * (math.log(last) - math.log(before)))


def _check(curve: Mapping[int, float], share: float) -> None:
    if not curve or min(curve) < 1:
        raise InputError(f"a curve is a map from d, at least 1, to a score, got {dict(curve)}")
    if not 0 < share <= 1:
        raise InputError(f"share is in (0, 1], got {share}")
