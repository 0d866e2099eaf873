"""What a text that is handed in must not do: too many lines, names that would do the work, names that hide."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path

from effzoo.checks.apart import FROM, foreign
from effzoo.checks.runner import Failed
from effzoo.course.assignment import Assignment
from effzoo.errors import OptionError

# what reaches past the file, also where torch has imported it: torch.sys, torch.os
HIDING = {"getattr", "setattr", "delattr", "type", "sys", "os", "io", "importlib", "builtins", "subprocess", "ctypes",
          "inspect", "gc", "types", "threading", "multiprocessing", "pickle", "pathlib", "shutil", "runpy", "hub",
          "ops", "library", "package", "serialization", "cpp_extension", "from_file", "fromfile", "tofile", "numpy",
          "settrace", "breakpoint", "input"}  # fmt: skip


def text_of(file: Path) -> str:
    """The code of a .py file, or of the cell of a notebook that is marked as the solution.

    Raises OptionError where there is none.
    """
    if not file.is_file():
        raise OptionError(f"no such file: {file}; `effzoo course start` writes the one to begin with")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error
    if file.suffix != ".ipynb":
        return text
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        found = ["".join(cell["source"]) for cell in cells if "solution" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{file} is no notebook: {type(error).__name__} {error}") from error
    if not found:
        raise OptionError(
            f'{file} has no code cell with the tag "solution"; `effzoo course start --notebook` makes one'
        )
    lines = "\n\n".join(found).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("%", "!")))  # without magics


def refused(assignment: Assignment, text: str) -> str:
    """Why a text is not run, in a sentence; "" where it may be."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        return f"it does not parse: {line}{getattr(error, 'msg', error)}"
    allowed = {module: FROM.get(module, set()) | set(names) for module, names in assignment.allow.items()}
    try:
        foreign(tree, allowed)
    except Failed as failure:
        return str(failure)
    for number, name in named(tree):
        if name in HIDING or name in assignment.forbid or private(name):
            why = "which would do the work" if name in assignment.forbid else "which a solution does not need"
            return f"line {number} names {name}, {why}; write it out"
    lines = written_lines(text, tree)
    if lines > assignment.max_lines:
        return f"it has {lines} lines of code, and at most {assignment.max_lines} are needed; write it shorter"
    return ""


def private(name: str) -> bool:
    """Whether a name is one that modules keep to themselves, such as _sys; `_` alone is nobody's."""
    return name.startswith("_") and name.strip("_") != "" and name not in ("__init__", "__future__")


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The names in a text with their lines: variables, attributes and what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id.lstrip("_") or node.id
        elif isinstance(node, ast.Attribute):
            of_its_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield node.lineno, node.attr.lstrip("_") if of_its_own else node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, part) for alias in node.names for part in alias.name.split("."))


def written_lines(text: str, tree: ast.AST) -> int:
    """The lines of code without comments, docstrings and imports."""
    lines: set[int] = set()
    without = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in without:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            assert isinstance(node, ast.stmt)
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)
