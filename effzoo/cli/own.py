"""`--file`: a Python file whose attention kinds and fine-tuning methods a command takes by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from effzoo.registry import load_file, scope

File = Annotated[
    Path | None, typer.Option("--file", help="A Python file whose attention kinds and methods can be named here.")
]


@contextmanager
def loaded(file: Path | None) -> Iterator[None]:
    """Inside the block what the file registers can be named."""
    with scope():
        if file is not None:
            load_file(file)
        yield
