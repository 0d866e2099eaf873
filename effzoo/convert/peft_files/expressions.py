"""Regular expressions of foreign files, matched in bounded time.

`re` goes back over what it has tried, so that a few characters of a file can keep it busy for ever. Here an expression
is parsed, and the set of all ends that it can have is computed from each start, once: at most (size of the expression)
x (length of the name)^2 steps, and there is a budget of steps. What needs more than sets of ends (backreferences,
looking behind, possessive repeats, flags) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from effzoo.errors import AdapterError

LONGEST, DEEPEST, MOST_REPEATS, STEPS = 10_000, 50, 1_000, 2_000_000
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_COUNT = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda one: one.isalnum() or one == "_",
    "s": str.isspace,
    "D": lambda one: not one.isdecimal(),
    "W": lambda one: not (one.isalnum() or one == "_"),
    "S": lambda one: not one.isspace(),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


@dataclass(eq=False)
class _One:
    """One character."""

    test: Callable[[str], bool]


@dataclass(eq=False)
class _Place:
    """A place between characters: test(name, at)."""

    test: Callable[[str, int], bool]


@dataclass(eq=False)
class _All:
    """One after the other."""

    parts: list[_Node]


@dataclass(eq=False)
class _Any:
    """One of several."""

    parts: list[_Node]


@dataclass(eq=False)
class _Repeat:
    part: _Node
    least: int
    most: int | None


@dataclass(eq=False)
class _Ahead:
    """Looking ahead: whether the part matches here, or does not."""

    part: _Node
    wanted: bool


_Node = _One | _Place | _All | _Any | _Repeat | _Ahead


class Steps:
    """The steps that all expressions of one file may take together."""

    def __init__(self) -> None:
        self.done = 0

    def count(self, text: str) -> None:
        self.done += 1
        if self.done > STEPS:
            raise AdapterError(
                f"the regular expression {text[:80]!r} of the file takes more than {STEPS:,} steps; name the modules "
                "in a list instead"
            )


class Expression:
    """A regular expression. Raises AdapterError where it cannot be read, and where it takes too many steps."""

    def __init__(self, text: str, steps: Steps):
        self.text, self.steps = text, steps
        if len(text) > LONGEST:
            raise AdapterError(
                f"a regular expression of {len(text):,} characters ({text[:40]!r}...) is refused; at "
                f"most {LONGEST:,} are read"
            )
        self.plain = _PLAIN.fullmatch(text) is not None
        self.root = _ExpressionReader(text).whole()
        self.alternatives = isinstance(self.root, _Any)

    def matches(self, name: str) -> bool:
        """Whether it is the whole name."""
        return len(name) in self.ends(name, 0)

    def ends(self, name: str, start: int) -> set[int]:
        """Every place where a match that begins at `start` can end."""
        if self.plain:  # the path of a module, say, which files have by the hundreds
            self.steps.count(self.text)
            part = name[start : start + len(self.text)]
            fits = len(part) == len(self.text) and all(
                one in (".", other) for one, other in zip(self.text, part, strict=True)
            )
            return {start + len(part)} if fits else set()
        return self._ends(self.root, name, start, {})

    def _ends(self, node: _Node, name: str, at: int, known: dict[tuple[int, int], set[int]]) -> set[int]:
        key = id(node), at
        if key not in known:
            known[key] = set(self._found(node, name, at, known))
        return known[key]

    def _found(self, node: _Node, name: str, at: int, known: dict[tuple[int, int], set[int]]) -> set[int]:
        self.steps.count(self.text)
        if isinstance(node, _One):
            return {at + 1} if at < len(name) and node.test(name[at]) else set()
        if isinstance(node, _Place):
            return {at} if node.test(name, at) else set()
        if isinstance(node, _Ahead):
            return {at} if bool(self._ends(node.part, name, at, known)) == node.wanted else set()
        if isinstance(node, _Any):
            return set().union(*(self._ends(part, name, at, known) for part in node.parts))
        places = {at}
        if isinstance(node, _All):
            for part in node.parts:
                places = self._from(part, name, places, known)
            return places
        for _ in range(node.least):
            places = self._from(node.part, name, places, known)
        ends, rounds = set(places), 0
        while places and (node.most is None or rounds < node.most - node.least):
            places = self._from(node.part, name, places, known) - ends
            ends |= places
            rounds += 1
        return ends

    def _from(self, part: _Node, name: str, places: set[int], known: dict[tuple[int, int], set[int]]) -> set[int]:
        ends: set[int] = set()
        for at in places:
            self.steps.count(self.text)
            ends |= self._ends(part, name, at, known)
        return ends


class _ExpressionReader:
    """Recursive descent over an expression."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def whole(self) -> _Node:
        node = self.choice(0)
        if self.at < len(self.text):
            self.fail("a closing bracket without an opening one")
        return node

    def choice(self, depth: int) -> _Node:
        if depth > DEEPEST:
            self.fail(f"more than {DEEPEST} brackets in one another")
        parts = [self.sequence(depth)]
        while self.take("|"):
            parts.append(self.sequence(depth))
        return parts[0] if len(parts) == 1 else _Any(parts)

    def sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(self.atom(depth)))
        return parts[0] if len(parts) == 1 else _All(parts)

    def repeated(self, part: _Node) -> _Node:
        bounds = self.bounds()
        if bounds is None:
            return part
        least, most = bounds
        if isinstance(part, _Place) or max(least, most or 0) > MOST_REPEATS or (most is not None and most < least):
            self.fail(f"a repeat of nothing, or of more than {MOST_REPEATS:,} times")
        if not self.take("?") and self.text[self.at : self.at + 1] == "+":  # lazy repeats have the same ends
            self.fail("a possessive repeat")
        if self.bounds() is not None:
            self.fail("a repeat of a repeat")
        return _Repeat(part, least, most)

    def bounds(self) -> tuple[int, int | None] | None:
        """How often what stands before is repeated, or None."""
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(mark):
                return bounds
        match = _COUNT.match(self.text, self.at)
        if match is None or match.group() == "{}":
            return None
        self.at = match.end()
        least, comma, most = match.groups()
        return int(least or 0), (int(most) if most else None) if comma else int(least)

    def atom(self, depth: int) -> _Node:
        one = self.text[self.at]
        self.at += 1
        if one == "(":
            return self.group(depth)
        if one == "[":
            return _One(self.charset())
        if one == "\\":
            return self.escape()
        if one == ".":
            return _One(lambda other: other != "\n")
        if one == "^":
            return _Place(lambda name, at: at == 0)
        if one == "$":
            return _Place(lambda name, at: at == len(name) or (at == len(name) - 1 and name[at] == "\n"))
        if one in "*+?":
            self.fail("a repeat of nothing")
        return _One(one.__eq__)

    def group(self, depth: int) -> _Node:
        wanted = None
        if self.take("?"):
            if named := re.compile(r"P<[^\W\d]\w*>").match(self.text, self.at):
                self.at = named.end()
            elif self.take("="):
                wanted = True
            elif self.take("!"):
                wanted = False
            elif not self.take(":"):
                self.fail("a group with flags, a condition, or a look behind")
        inner = self.choice(depth + 1)
        if not self.take(")"):
            self.fail("a bracket that is not closed")
        # a group is no place, even if it holds one: what is repeated may be empty
        return _All([inner]) if wanted is None else _Ahead(inner, wanted)

    def escape(self) -> _Node:
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter == "b":
            return _Place(lambda name, at: _word(name, at - 1) != _word(name, at))
        if letter == "A":
            return _Place(lambda name, at: at == 0)
        if letter == "Z":
            return _Place(lambda name, at: at == len(name))
        return _One(self.escaped(letter))

    def escaped(self, letter: str) -> Callable[[str], bool]:
        if letter in _CLASSES and letter:
            return _CLASSES[letter]
        if not letter or (letter.isascii() and letter.isalnum() and letter not in _CONTROLS):
            self.fail(f"\\{letter}")
        return _CONTROLS.get(letter, letter).__eq__

    def charset(self) -> Callable[[str], bool]:
        negated, tests, first = self.take("^"), [], True
        while True:
            if self.at >= len(self.text):
                self.fail("a bracket that is not closed")
            one = self.text[self.at]
            self.at += 1
            if one == "]" and not first:
                break
            first = False
            test, low = self.member(one)
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 2
                _, high = self.member(self.text[self.at - 1])
                if low is None or high is None or high < low:
                    self.fail("a range of characters that is none")
                tests.append(_between(str(low), str(high)))
            else:
                tests.append(test)
        return lambda other: any(test(other) for test in tests) != negated

    def member(self, one: str) -> tuple[Callable[[str], bool], str | None]:
        """One member of a set: its test, and the character that it is."""
        if one != "\\":
            return one.__eq__, one
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter == "b":
            return "\b".__eq__, "\b"
        return self.escaped(letter), None if letter in _CLASSES else _CONTROLS.get(letter, letter)

    def take(self, mark: str) -> bool:
        taken = self.text.startswith(mark, self.at)
        self.at += len(mark) * taken
        return taken

    def fail(self, what: str) -> None:
        raise AdapterError(
            f"the regular expression {self.text[:80]!r} of the file holds {what} (near character {self.at}), which "
            "effzoo does not read; name the modules in a list instead"
        )


def _word(name: str, at: int) -> bool:
    return 0 <= at < len(name) and _CLASSES["w"](name[at])


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda other: low <= other <= high
