"""The contract of an experiment: a function from a Run to Findings, under a name.

    @experiment("spectrum", deck=4, source="Wang et al. 2020, Linformer, figure 1")
    def spectrum(run: Run) -> Findings:
        \"\"\"How much of an attention matrix its largest singular values hold.\"\"\"

The function returns its results: tables with the published numbers in a column of their own, one figure, and claims,
each judged for every seed. A claim that does not hold is a finding; nothing here asserts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from effzoo.errors import OptionError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Table = list[list[str]]  # the first row is the head
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

    quick: sizes for minutes on two cores.
    seeds: each draws weights and orders anew.
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

    def choose(self, quick: T, full: T) -> T:
        """The quick value or the full one."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Claim:
    """What a paper says should be seen, and whether it held, for each seed (one entry where nothing is drawn)."""

    text: str
    held: tuple[bool, ...]

    def __str__(self) -> str:
        seen = sum(self.held)
        if len(self.held) == 1:
            return f"{'seen' if seen else 'NOT seen'}: {self.text}"
        verdict = "seen" if seen == len(self.held) else "seen in part" if seen else "NOT seen"
        return f"{verdict}, {seen} of {len(self.held)} seeds: {self.text}"


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
