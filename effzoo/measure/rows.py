"""Results as JSON lines: a row per measurement, each with the machine, the versions and the commit it was made with."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from effzoo.errors import InputError

Row = dict[str, Any]
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


def read(path: Path) -> list[Row]:
    """The rows of a file, none when there is no file. Raises InputError for a line that is no JSON object."""
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is no JSON ({error}); delete the line, and its case is measured again") from None
        yield row


def append(path: Path, rows: list[Row]) -> None:
    """Add rows at the end of a file, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
