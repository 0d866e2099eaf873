"""Rotary positions: queries and keys are rotated by angles proportional to their position (Su et al. 2021,
arXiv:2104.09864, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from effzoo.annotations import SMALLEST, Range, problem
from effzoo.errors import OptionError

Scaling = Annotated[float, Range(SMALLEST, 1e9)]
Factors = tuple[Scaling, ...]
_REQUIRED: dict[str, dict[str, Any]] = {
    "linear": {"factor": Scaling},
    "llama3": {
        "factor": Scaling, "low_freq_factor": Scaling, "high_freq_factor": Scaling,
        "original_max_position_embeddings": Scaling,
    },
    "yarn": {"factor": Scaling, "original_max_position_embeddings": Scaling},
    "dynamic": {"factor": Scaling, "original_max_position_embeddings": Scaling},
    "longrope": {"short_factor": Factors, "long_factor": Factors, "original_max_position_embeddings": Scaling},
}  # fmt: skip
_OPTIONAL: dict[str, dict[str, Any]] = {
    "yarn": {"beta_fast": Scaling, "beta_slow": Scaling, "attention_factor": Scaling, "truncate": bool},
    "longrope": {"factor": Scaling, "attention_factor": Scaling},
}
_DEFAULTS = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}}


@dataclass(frozen=True)
class Rotary:
    """Rotate the pair (x_j, x_{j + d/2}) of a head at position p by the angle p w_j, with w_j = theta^(-2j/d).

    q_i . k_j then depends on i - j alone.

    theta: base of the frequencies.
    fraction: of a head, from its front, that is turned: d = head_dim fraction, rounded down; the rest stays as it is.
    scaling: a type and its numbers; with L = original_max_position_embeddings, s = factor, and t_j = L w_j / (2 pi),
        the turns of pair j within L positions; empty for none:

        linear     w_j / s (Chen et al. 2023, arXiv:2306.15595, equation 4)
        llama3     w_j / s where t_j is below low_freq_factor, w_j where it is above high_freq_factor, between them a
                   mean with weights linear in t_j (Llama 3.1)
        yarn       r_j w_j / s + (1 - r_j) w_j with r_j = (j - a) / (b - a), cut to [0, 1], where a and b are the places
                   j at which t_j is beta_fast (32) and beta_slow (1), rounded outwards unless truncate=False; cos and
                   sin times attention_factor, 0.1 ln s + 1 (Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4)
        dynamic    theta ((s n / L) - (s - 1))^(d / (d - 2)) in place of theta for texts of n > L positions (the same,
                   sections 3.1 and 3.3)
        longrope   w_j / f_j with f = short_factor in texts of at most L positions, else long_factor; cos and sin times
                   attention_factor, sqrt(1 + ln s / ln L) (Ding et al. 2024, arXiv:2402.13753, section 3.2)

    The length n of dynamic and longrope is that of the longest text in the batch, up to its last position, as in
    transformers. A model of transformers also goes on with the longest n that it has seen until a text is shorter than
    L; here n is of this batch alone.
    """

    head_dim: int
    theta: float = 10_000.0
    scaling: tuple[tuple[str, Any], ...] = ()
    fraction: float = field(default=1.0, metadata={"added": "0.3"})

    def __post_init__(self) -> None:
        if self.dim % 2 or not self.dim:
            what = "head_dim is" if self.fraction == 1 else f"head_dim {self.head_dim} times rotary_fraction is"
            raise OptionError(f"rotary positions turn pairs, so {what} even, got {self.dim}")
        if self.scaling:
            self._check_scaling()

    def _check_scaling(self) -> None:
        given = dict(self.scaling)
        kind = given.pop("type", None)
        if not isinstance(kind, str) or kind not in _REQUIRED or not _fits(kind, given):
            known = "; ".join(f"type={name!r} with {_sentence(name)}" for name in _REQUIRED)
            raise OptionError(
                f"rotary scaling is {known}; got type={kind!r} with {', '.join(sorted(given)) or 'nothing'}"
            )
        for name, value in given.items():
            if wrong := problem(value, (_REQUIRED[kind] | _OPTIONAL.get(kind, {}))[name]):
                raise OptionError(f"rotary scaling: {name} {wrong}")
        if kind == "llama3" and given["low_freq_factor"] == given["high_freq_factor"]:
            raise OptionError(
                "rotary scaling: low_freq_factor and high_freq_factor differ, between them the "
                "frequencies pass smoothly"
            )
        if kind == "yarn" and self.theta <= 1:
            raise OptionError(f"rotary scaling of type 'yarn' needs rotary_theta above 1, got {self.theta}")
        if kind == "dynamic" and (self.dim == 2 or given["factor"] < 1):
            raise OptionError(
                "rotary scaling of type 'dynamic' needs more than one pair and a factor of at least 1, got "
                f"{self.dim // 2} and {given['factor']}"
            )
        if kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(given[name]) != self.dim // 2:
                    raise OptionError(
                        f"rotary scaling: {name} has a number for each of {self.dim // 2} pairs, got {len(given[name])}"
                    )
            if not given.keys() & {"factor", "attention_factor"}:
                raise OptionError("rotary scaling of type 'longrope' takes factor or attention_factor, got neither")

    @classmethod
    def of(cls, head_dim: int, theta: float, scaling: Mapping[str, Any], fraction: float = 1.0) -> Rotary:
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in scaling.items()}
        return cls(head_dim, theta, tuple(sorted(options.items())), fraction)

    @property
    def dim(self) -> int:
        """How many numbers of a head are turned."""
        return int(self.head_dim * self.fraction)

    @property
    def options(self) -> dict[str, Any]:
        """The scaling with what is its default."""
        given = dict(self.scaling)
        return _DEFAULTS.get(given.get("type", ""), {}) | given

    @property
    def changes_at(self) -> int | None:
        """The length beyond which the angles depend on the length of the text; None: they never do."""
        changes = self.options.get("type") in ("dynamic", "longrope")
        return int(self.options["original_max_position_embeddings"]) if changes else None

    @property
    def turns_back(self) -> bool:
        """Whether keys of a text that was shorter must be turned anew when it grows beyond `changes_at`."""
        return self.options.get("type") == "longrope" and self.options["short_factor"] != self.options["long_factor"]

    @property
    def magnitude(self) -> float:
        """The factor on cos and sin."""
        scaling = self.options
        kind = scaling.get("type")
        if kind not in ("yarn", "longrope") or "attention_factor" in scaling:
            return float(scaling.get("attention_factor", 1.0))
        if scaling["factor"] <= 1:
            return 1.0
        stretch = math.log(scaling["factor"])
        return 0.1 * stretch + 1 if kind == "yarn" else math.sqrt(1 + stretch / math.log(self._original))

    @property
    def _original(self) -> float:
        return float(self.options["original_max_position_embeddings"])

    def frequencies(self, device: torch.device | None = None, length: Tensor | None = None) -> Tensor:
        """Angles per position, float32[dim / 2]. length: of the longest text, where they depend on it."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64, device=device).float() / self.dim
        scaling = self.options
        kind = scaling.get("type")
        if kind == "dynamic":
            assert length is not None
            factor = scaling["factor"]
            stretch = factor * length.clamp(min=int(self._original)) / self._original - (factor - 1)
            return 1.0 / (self.theta * stretch ** (self.dim / (self.dim - 2))) ** exponent
        wavelength = self.theta**exponent
        if kind == "longrope":
            assert length is not None
            short, long = (
                torch.tensor(scaling[name], dtype=torch.float32, device=device)
                for name in ("short_factor", "long_factor")
            )
            return 1.0 / (torch.where(length > self._original, long, short) * wavelength)
        frequency = 1.0 / wavelength
        if kind == "linear":
            return frequency / scaling["factor"]
        if kind == "llama3":
            turns = self._original * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - smooth) * (frequency / scaling["factor"]) + smooth * frequency
        if kind == "yarn":
            ramp = self._ramp(device)
            return ramp / (scaling["factor"] * wavelength) + (1 - ramp) * frequency
        return frequency

    def _ramp(self, device: torch.device | None) -> Tensor:
        """How much of each pair's frequency is divided by the factor (YaRN, section 3.2)."""

        def place(turns: float) -> float:
            """The j at which a pair turns so often within the original length."""
            return self.dim * math.log(self._original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = place(self.options["beta_fast"]), place(self.options["beta_slow"])
        if self.options["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        pairs = torch.arange(self.dim // 2, dtype=torch.float32, device=device)
        return ((pairs - low) / (high - low or 0.001)).clamp(0, 1)  # 0.001 as in the authors' code

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Position ids [batch, n] -> cos and sin, float32[batch, 1, n, dim], times `magnitude`."""
        length = None if self.changes_at is None else positions.max() + 1
        angle = positions[:, None, :, None].float() * self.frequencies(positions.device, length)
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if self.magnitude == 1 else (cos * self.magnitude, sin * self.magnitude)


def _fits(kind: str, given: Mapping[str, Any]) -> bool:
    """Whether a scaling has all the options that it needs, and none that it does not know."""
    required = _REQUIRED[kind].keys()
    return required <= given.keys() <= required | _OPTIONAL.get(kind, {}).keys()


def _sentence(kind: str) -> str:
    required, optional = sorted(_REQUIRED[kind]), sorted(_OPTIONAL.get(kind, {}))
    return ", ".join(required) + (f" (and {', '.join(optional)})" if optional else "")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x_2, x_1) sin for x = (x_1, x_2) split in the middle of what is turned: as much as cos is wide."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
