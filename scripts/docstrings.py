"""How the reference pages show our docstrings: arguments as a list, what is raised in bold, angle brackets as they are.

Our docstrings are plain sentences: `name: what it is.`, one argument after the other. Here each becomes an item. What
is indented stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHAPE = r"(?: [a-z]*\[[^\]]*\])?"  # as in `x [batch, n, dim]: ...`
ROW = re.compile(r"^\s+(\S+)\s{2,}(\S.*)$")  # a line of a table: a word, some room, what it means
CALL = re.compile(r"\w+\(([^)]*)\)[:,]")


class Arguments(griffe.Extension):
    """Rewrites every docstring before it is read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        # where the signature says less, as of `forward`
        called = CALL.match(func.docstring.value) if func.docstring else None
        said = set(re.findall(r"[a-z_]+", called[1])) if called else set()
        rewrite(func, said | {parameter.name.lstrip("*") for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        made = cls.members.get("__init__")
        of_init = {parameter.name for parameter in made.parameters} if isinstance(made, griffe.Function) else set()
        rewrite(cls, {name for name, member in cls.members.items() if member.is_attribute} | of_init)

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        rewrite(mod, set())

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        rewrite(attr, set())


def rewrite(found: griffe.Object, names: set[str]) -> None:
    if found.docstring is not None:
        found.docstring.value = shown(found.docstring.value, names - {"self", "cls"})


def shown(text: str, names: set[str]) -> str:
    """A docstring as Markdown."""
    return "\n\n".join(paragraph(block, names) for block in re.split(r"\n\s*\n", text))


def paragraph(block: str, names: set[str]) -> str:
    """A paragraph as Markdown: code if it is indented, else a sentence and a list of the arguments named in it."""
    lines = block.split("\n")
    if lines[0].startswith("    "):
        return block
    if re.search(r"^\S.*\S {3,}\S", block, re.MULTILINE):  # aligned by hand, as formulas one below the other
        return "\n".join(f"    {line}" for line in lines)
    joined: list[str] = []
    for line in lines:
        row = ROW.match(line)
        if row and joined:
            joined.append(f"\n    - `{row[1]}`: {row[2]}")
        elif joined:
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    text = escaped("".join(joined))
    text = re.sub(r"(^|(?<=[.;)] ))Raises ", r"\n\n**Raises** ", text)
    return items(text, names).strip("\n")


def items(text: str, names: set[str]) -> str:
    """`a: x. b, c: y.` as a list, for what is an argument or a field."""
    if not names:
        return text
    one = "(?:" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")"
    entry = re.compile(rf"(?:^|(?<=[.;:)\]\"`] ))({one}(?:(?:, or |, and |, | or | and ){one})*)({SHAPE}): ")
    parts = entry.split(text)
    lines = [parts[0].rstrip(" ")]
    for named, shape, said in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        marked = re.sub(one, lambda name: f"`{name[0]}`", named)
        kept, raises, rest = said.partition("\n\n**Raises**")
        lines.append(f"- {marked}{shape}: {kept.rstrip(' ')}{raises}{rest}")
    head, *rest = lines
    return "\n".join([head, "", *rest]) if rest else head


def escaped(text: str) -> str:
    """Angle brackets outside backticks are no tags."""
    return "".join(
        part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(re.split(r"(`[^`]*`)", text))
    )
