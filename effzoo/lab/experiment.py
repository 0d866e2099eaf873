"""The contract of an experiment: a function from a Run to Findings, under a name.

    @experiment("spectrum", deck=4, source="Wang et al. 2020, Linformer, figure 1")
    def spectrum(run: Run) -> Findings:
        \"\"\"How much of an attention matrix its largest singular values hold.\"\"\"

The function returns its results: tables with the published numbers in a column of their own, one figure, and claims,
each judged over all seeds. A claim that does not hold is a finding; nothing here asserts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from effzoo.errors import OptionError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Table = list[list[str]]  # the first row is the head
# the 97.5 % quantile of Student's distribution with 1, 2, ... degrees of freedom; the last serves for more
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
DECKS = {
    0: "Transformers and parameter-efficient fine-tuning",
    1: "Input composition and the unified view",
    2: "Low-rank adaptation",
    3: "Modular and sparse fine-tuning",
    4: "Efficient transformers",
}


def silent(said: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Run:
    """How an experiment is run.

    quick: sizes for at most three minutes on two cores, which show that the experiment works; else standard ones, for
        10 to 20 minutes, at which what papers say could be seen.
    seeds: each draws weights, orders, and which examples are trained and tested on.
    data: a file or folder in place of the default.
    say: called with lines about the progress.
    """

    quick: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Path | None = None
    say: Callable[[str], None] = silent

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise OptionError(f"an experiment needs seeds, each once, got {list(self.seeds)}")
        if self.data is not None and not self.data.exists():
            raise OptionError(
                f"there is no {self.data}; give a file or a folder that is there, or leave it out for the default data"
            )

    def choose(self, quick: T, standard: T) -> T:
        """The quick value or the standard one."""
        return quick if self.quick else standard


@dataclass(frozen=True)
class Claim:
    """What a paper says should be seen, and what was seen. Made by one of three functions, by what judges it:

        of_differences: a difference that draws vary, by the interval of its mean
        law:            what is computed to rounding or counted, so that nothing varies but what the seeds draw
        once:           a measurement that was not repeated

    held: whether it held, for each seed; one entry where nothing is drawn.
    interval: of `of_differences`; it alone decides then.
    measured_once: of `once`.
    """

    text: str
    held: tuple[bool, ...]
    interval: tuple[float, float] | None = None
    measured_once: bool = False

    @classmethod
    def of_differences(cls, text: str, differences: Sequence[float]) -> Claim:
        """That a difference is above 0, by Student's 95 % interval of its mean over draws.

        differences: one for each seed, all in one unit. Seeds draw anew what they are to vary: the data first of all.
            That two are alike to within m is the difference m - |a - b|, or m - (a - b) where only a loss counts.

        Raises OptionError for fewer than two.
        """
        n = len(differences)
        if n < 2:
            raise OptionError(f"the interval of a difference needs two seeds or more, got {n}; give --seed twice")
        mean = sum(differences) / n
        error = (sum((x - mean) ** 2 for x in differences) / (n - 1) / n) ** 0.5
        wide = STUDENT[min(n - 2, len(STUDENT) - 1)] * error
        return cls(text, tuple(bool(x > 0) for x in differences), (mean - wide, mean + wide))

    @classmethod
    def law(cls, text: str, held: bool | Iterable[bool]) -> Claim:
        """What is computed to rounding, or counted: seen where it holds with every seed."""
        return cls(text, (held,) if isinstance(held, bool) else tuple(map(bool, held)))

    @classmethod
    def once(cls, text: str, held: bool) -> Claim:
        """What was measured once."""
        return cls(text, (bool(held),), measured_once=True)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Claim:
        """From what `result.json` holds."""
        interval = stored.get("interval")
        return cls(
            stored["text"],
            tuple(stored["held"]),
            None if interval is None else (interval[0], interval[1]),
            stored.get("measured_once", False),
        )

    def stored(self) -> dict[str, Any]:
        """For `result.json`."""
        found: dict[str, Any] = {"text": self.text, "held": list(self.held)}
        if self.interval is not None:
            found["interval"] = list(self.interval)
        return {**found, "measured_once": True} if self.measured_once else found

    @property
    def verdict(self) -> str:
        """seen, NOT seen, or cannot be told (the interval holds 0)."""
        if self.interval is not None:
            low, high = self.interval
            return "seen" if low > 0 else "NOT seen" if high < 0 else "cannot be told"
        return "seen" if all(self.held) else "NOT seen"

    @property
    def grounds(self) -> str:
        """What the verdict stands on."""
        if self.interval is not None:
            low, high = self.interval
            return f"difference {low:.3g} to {high:.3g} over {len(self.held)} seeds"
        if len(self.held) > 1:
            return f"with {sum(self.held)} of {len(self.held)} seeds"
        return "measured once" if self.measured_once else "counted"

    def __str__(self) -> str:
        at = " at this size" if self.verdict == "cannot be told" else ""
        return f"{self.verdict}{at}, {self.grounds}: {self.text}"


@dataclass(frozen=True)
class Findings:
    """The results of an experiment.

    tables: by title; the first is the main one.
    figure: of matplotlib.
    claims: with what was seen of each.
    values: every number behind the tables, for the JSON file, by seed where it depends on one.
    settings: sizes, steps, data.
    notes: what a reader must know to read the numbers rightly.
    """

    tables: Mapping[str, Table]
    figure: Figure
    claims: Sequence[Claim]
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Experiment:
    """One entry of the lab.

    decks: the lectures that show it.
    source: paper and table.
    data: what it reads, in words.
    """

    name: str
    decks: tuple[int, ...]
    source: str
    data: str
    function: Callable[[Run], Findings]

    @property
    def about(self) -> str:
        """What is asked: the first paragraph of the function's docstring."""
        return " ".join((self.function.__doc__ or "").partition("\n\n")[0].split())


_EXPERIMENTS: dict[str, Experiment] = {}


def experiment(
    name: str, *, deck: int | tuple[int, ...], source: str, data: str = "nothing"
) -> Callable[[Callable[[Run], Findings]], Callable[[Run], Findings]]:
    """Put a function into the lab under a name."""

    def entered(function: Callable[[Run], Findings]) -> Callable[[Run], Findings]:
        _EXPERIMENTS[name] = Experiment(name, (deck,) if isinstance(deck, int) else deck, source, data, function)
        return function

    return entered


def catalogue() -> dict[str, Experiment]:
    """All experiments by name, in order of their first deck."""
    import effzoo.lab.experiments  # noqa: F401

    return dict(sorted(_EXPERIMENTS.items(), key=lambda item: (item[1].decks[0], item[0])))


def get(name: str) -> Experiment:
    """One experiment. Raises UnknownNameError."""
    experiments = catalogue()
    if name not in experiments:
        raise UnknownNameError("experiment", name, experiments)
    return experiments[name]
