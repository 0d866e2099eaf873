"""Results as JSON lines: a row per measurement, each with the machine, the versions and the commit it was made with."""

from __future__ import annotations

import functools
import json
import logging
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from effzoo.errors import InputError
from effzoo.writing import replace_file

Row = dict[str, Any]
SUITES = {  # what every row of a suite has
    "scaling": ("attention", "mode", "n", "dim", "heads", "batch", "dtype", "device"),
    "finetune": ("attention", "peft", "length", "batch"),
    "peers": ("peer", "n", "device"),  # these two of `benchmarks/run.py`
    "bound": ("attention", "n", "device"),
}
NOT_IDENTITY = ("machine", "versions", "commit")  # of a row: how it was made, not what it is


@functools.cache
def machine(device: str = "cpu") -> str:
    """The processor or the GPU, in words."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = {line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")}
        name = ", ".join(sorted(models)) or name
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


@functools.cache
def commit() -> str:
    """The commit of the code that runs, with `-dirty` where files differ; empty outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def made(row: Mapping[str, Any], device: str) -> Row:
    """The row with how it was made."""
    return {**row, "machine": machine(device), "versions": versions(), "commit": commit()}


def read(path: Path, suite: str) -> list[Row]:
    """The rows of a suite in a file, none when there is no file. A line that was half written, as its writer was killed, is left out and told.

    Raises InputError for a line that is no row, and for rows of another suite.
    """
    return list(_lines(path, suite)) if path.exists() else []


def _lines(path: Path, suite: str) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            begun = line.strip(b"\0 ")  # a disk that was cut off may leave zeros
            if begun and not begun.startswith(b"{"):
                raise InputError(f"{where} is no JSON ({error}); delete the line, and its case is measured again") from None
            logging.getLogger("effzoo").warning("%s was half written and is left out; its case is measured again", where)
            continue
        if not isinstance(row, dict) or row.get("suite") not in SUITES:
            raise InputError(f"{where} is no row of a suite ({', '.join(SUITES)}); delete the line, or give another folder")
        if row["suite"] != suite:
            raise InputError(f"{where} is of the suite {row['suite']!r}, not {suite!r}; give each suite a folder of its own")
        missing = [name for name in SUITES[suite] if name not in row]
        if missing:
            raise InputError(
                f"{where} lacks {missing[0]!r}, which every row of the suite {suite!r} has; delete the line, and its case is measured again"
            )
        yield row


def append(path: Path, rows: list[Row]) -> None:
    """Add rows at the end of a file, in one write. A last line that was half written is taken off, so that the first row begins a line."""
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
