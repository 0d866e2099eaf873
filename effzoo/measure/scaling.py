"""The suite `scaling`: time and memory of one attention layer of each kind against the length of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effzoo.errors import EffzooError
from effzoo.measure import cards
from effzoo.measure import rows as files
from effzoo.measure.layer import Case, supported, wrong
from effzoo.measure.memory import OUT_OF_MEMORY, peak, reason
from effzoo.measure.prediction import compared
from effzoo.measure.rows import Row
from effzoo.measure.timing import Times, fitting, ratio

KINDS = (  # every kind of the registry; a window, blocks or segments show a token some 500 to 700 keys
    "full", "blockwise", "blockwise[blocks=8]", "longformer[window=512]", "local[chunk=64]", "lsh[rounds=4, chunk=64]",
    "linformer[k=256]", "perceiver[latents=256]", "linear", "performer[features=256]", "nystromformer[landmarks=64]",
    "streaming[window=256, sinks=4]", "bigbird[block=64]",
    "dilated[segments=(512, 2048, 8192), dilations=(1, 4, 16)]",
)  # fmt: skip
REFERENCE = "full"  # what the others are compared with, in the same rounds


@dataclass(frozen=True)
class Scaling:
    """Settings of the suite.

    batch: sequences; tokens: instead of it, how many tokens a batch has at every length (at least one sequence), so
        that it fills a GPU.
    longest: seconds that one pass may take; a kind that takes more is not tried at greater lengths.
    seconds: for the rounds of one length and mode.
    """

    kinds: Sequence[str] = KINDS
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384)
    modes: Sequence[str] = ("forward", "train", "decode")
    dim: int = 512
    heads: int = 8
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    longest: float = 20.0
    seconds: float = 20.0
    tokens: int | None = None

    def case(self, kind: str, mode: str, n: int) -> Case:
        batch = self.batch if self.tokens is None else max(1, self.tokens // n)
        return Case(kind, mode, n, self.dim, self.heads, batch, self.dtype, self.device)  # type: ignore[arg-type]

    def run(self, path: Path, tell: Callable[[str, int, int], None] = lambda said, done, total: None) -> list[Row]:
        """Measure what the file does not hold yet, a length and mode at a time, and append it. tell: called with what
        comes, done and total."""
        cards.need(self.device)
        known = files.read(path, "scaling", self.device)
        groups = [(mode, n) for mode in self.modes for n in sorted(self.lengths)]
        for done, (mode, n) in enumerate(groups):
            tell(f"{mode}, n = {n:,}", done, len(groups))
            have = {_identity(row) for row in known}
            cases = [case for kind in self.kinds if _identity(asdict(case := self.case(kind, mode, n))) not in have]
            if not cases:
                continue
            # a ratio needs its other side in the same rounds
            if REFERENCE in self.kinds and cases[0].attention != REFERENCE:
                cases.insert(0, self.case(REFERENCE, mode, n))
            rows = [files.made(row, self.device) for row in self._group(cases, known)]
            files.append(path, rows)
            known += rows
        tell("done", len(groups), len(groups))
        return known

    def _group(self, cases: list[Case], known: list[Row]) -> list[Row]:
        """The rows of cases of one length and mode."""
        results: dict[str, Row] = {}
        ready: dict[str, Case] = {}
        for case in cases:
            row = results[case.attention] = {"suite": "scaling", **asdict(case)}
            failed = supported(case) or self._hopeless(case, known) or _unlike(case)
            if not failed and (case.mode != "decode" or torch.device(case.device).type == "cuda"):
                measured = peak(case, 3 * self.longest)
                row["peak_bytes"], failed = measured.bytes, measured.failed
                if not failed and measured.seconds is not None and measured.seconds > self.longest:
                    failed = f"longer than {self.longest:.0f} s"
            if failed:
                row["failed"] = failed
            else:
                ready[case.attention] = case
        times, alone = fitting(
            {name: case.runner for name, case in ready.items()}, seconds=self.seconds, device=self.device
        )
        for name in ready:
            results[name] |= {"alone": True} if alone else {}
            if name not in times:
                results[name]["failed"] = OUT_OF_MEMORY
        for name, case_times in times.items():
            results[name] |= timed(case_times, times.get(REFERENCE))
            results[name] |= compared(ready[name], case_times.median)
        return list(results.values())

    def _hopeless(self, case: Case, known: list[Row]) -> str:
        """Why a kind is not tried: a shorter sequence took too long, or too much memory."""
        for row in known:
            same = all(row.get(key) == value for key, value in asdict(case).items() if key not in ("n", "batch"))
            if same and row["n"] < case.n and row.get("failed", "").startswith(("longer than", "out of memory")):
                return f"{row['failed']} at n = {row['n']:,}"
        return ""


def _unlike(case: Case) -> str:
    """What differs from the definition, or why that cannot be told."""
    try:
        return wrong(case)
    except EffzooError:
        raise
    except Exception as error:
        if torch.device(case.device).type == "cpu":
            raise
        return reason(error)


def timed(times: Times, reference: Times | None) -> Row:
    """The figures of one case, and its ratio to the reference where both have as many rounds."""
    row: dict[str, Any] = {"seconds": times.median, "quartiles": list(times.spread), "rounds": len(times.seconds)}
    if reference is not None and len(reference.seconds) == len(times.seconds):
        relative = ratio(times, reference)
        row |= {"ratio": relative.median, "ratio_quartiles": list(relative.spread)}
    return row


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("attention", "mode", "n", "dim", "heads", "batch", "dtype", "device"))


def crossovers(rows: list[Row]) -> dict[tuple[str, str], int | None]:
    """{(kind, mode): the shortest measured length from which on the kind is faster than full attention at every
    measured length}; None: nowhere."""
    shortest: dict[tuple[str, str], int | None] = {}
    by: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["attention"] != REFERENCE and "ratio" in row:
            by.setdefault((row["attention"], row["mode"]), {})[row["n"]] = row["ratio"]
    for key, ratios in by.items():
        shortest[key] = None
        for n in sorted(ratios, reverse=True):
            if ratios[n] >= 1:
                break
            shortest[key] = n
    return shortest
