"""Results as JSON lines: a row per measurement, each with the machine, the versions and the commit it was made with."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from effzoo.errors import InputError, OptionError
from effzoo.measure import cards
from effzoo.writing import replace_file

Row = dict[str, Any]
SUITES = {  # what every row of a suite has
    "scaling": ("attention", "mode", "n", "dim", "heads", "batch", "dtype", "device"),
    "finetune": ("attention", "peft", "length", "batch"),
    "peers": ("peer", "n", "device"),  # these two of `benchmarks/run.py`
    "bound": ("attention", "n", "device"),
    "parity": ("attention", "backend", "dtype", "n", "device"),  # and these of `benchmarks/gpu.py`
    "rates": ("half", "single", "bandwidth", "launch"),
}
TIMES = {
    "seconds", "quartiles", "ratio", "ratio_quartiles", "tokens_per_second", "ours_seconds", "theirs_seconds",
    "full_seconds", "share", "plain_ratio",
}  # fmt: skip


@functools.cache
def commit() -> str:
    """The commit of the code that runs, with `-dirty` where files differ; empty outside a checkout of effzoo."""
    root = Path(__file__).parents[2]
    # an installed package: the repository around it, if any, is another project's
    if not (root / "pyproject.toml").is_file():
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def made(row: Mapping[str, Any], device: str) -> Row:
    """The row with how it was made. Raises OptionError for times of a device that is simulated."""
    if not cards.real(device) and (timed := TIMES & row.keys()):
        raise OptionError(
            f"this CUDA is simulated on the CPU, so its times mean nothing: {', '.join(sorted(timed))} are not written"
        )
    return {**row, "machine": cards.machine(device), "versions": cards.versions(device), "commit": commit()}


def read(path: Path, suite: str, device: str = "cpu") -> list[Row]:
    """The rows of a suite in a file, none when there is no file. A line that was half written, as its writer was
    killed, is left out and told.

    Raises InputError for a line that is no row, for rows of another suite, and when this device is a GPU, for rows of
        another one.
    """
    rows = list(_lines(path, suite)) if path.exists() else []
    if torch.device(device).type == "cuda":
        others = sorted({row.get("machine", "an unknown device") for row in rows} - {cards.machine(device)})
        if others:
            raise InputError(
                f"{path} has rows of {', '.join(others)}, and this is {cards.machine(device)}; give "
                "each card a file of its own"
            )
    return rows


def _lines(path: Path, suite: str) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            begun = line.strip(b"\0 ")  # a disk that was cut off may leave zeros
            if begun and not begun.startswith(b"{"):
                raise InputError(
                    f"{where} is no JSON ({error}); delete the line, and its case is measured again"
                ) from None
            logging.getLogger("effzoo").warning(
                "%s was half written and is left out; its case is measured again", where
            )
            continue
        if not isinstance(row, dict) or row.get("suite") not in SUITES:
            raise InputError(
                f"{where} is no row of a suite ({', '.join(SUITES)}); delete the line, or give another folder"
            )
        if row["suite"] != suite:
            raise InputError(
                f"{where} is of the suite {row['suite']!r}, not {suite!r}; give each suite a folder of its own"
            )
        missing = [name for name in SUITES[suite] if name not in row]
        if missing:
            raise InputError(
                f"{where} lacks {missing[0]!r}, which every row of the suite {suite!r} has; delete the line, and its "
                "case is measured again"
            )
        yield row


def append(path: Path, rows: list[Row]) -> None:
    """Add rows at the end of a file, in one write. A last line that was half written is taken off, so that the first
    row begins a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        replace_file(path, _whole_lines(content))
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def _whole_lines(content: bytes) -> bytes:
    """Without a last line that is no JSON; with an end of line after one that is."""
    *_, last = content.splitlines()
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return content[: len(content) - len(last)]
    return content + b"\n"
