"""The spec string: `name[option=value, ...]`, joined by `|` into a union.

    union  = spec { "|" spec }
    spec   = name [ "[" option { "," option } "]" ] [ "@" layers ]
    option = key "=" value
    value  = "(" value { "," value } ")" | "{" key ":" value { "," key ":" value } "}" | quoted string | number | true |
    false | none | bare word key    = word | quoted string
    layers = range { "+" range },  range = number [ "-" number ]

A quoted string is in ' or ", and holds its own quote written twice.

`longformer[window=256]`, `lora[rank=4, targets=(attn.q*, attn.v*)]|ia3`, `longformer[window=(32, 64, 128)]`,
`lora[rank={attn.q: 8, attn.v: 4}]`; `prefix@0-3|lora@4-5+8` is short for `prefix[layers=(0, 1, 2, 3)]|lora[layers=(4,
    5, 8)]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

from effzoo.annotations import plain
from effzoo.errors import SpecError, shown

MAX_CHARACTERS = 100_000  # of a spec string; longer lists are given as a mapping {"name": ..., option: values}
MAX_SPECS = 1_000  # of a union
MAX_DEPTH = 16  # of values in values
MAX_LAYERS = 10_000  # a layer number after '@' is below this
MAX_DIGITS = 40  # of a whole number
_TOKEN = re.compile(r"(?P<string>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")|(?P<word>[\w.*+/?\-]+)|(?P<mark>[\[\](){}:@,=|])")
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[\w.*+/?\-]+")
_WHOLE = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_CONSTANTS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spec:
    """One registry name with the options given for it; numbers of numpy become those of Python."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.options, Mapping):
            raise SpecError(
                f"a Spec has a name and a mapping of options, got {shown(self.name)} and {shown(self.options)}"
            )
        object.__setattr__(self, "options", {key: plain(value) for key, value in self.options.items()})

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}[{', '.join(f'{key}={_write(value)}' for key, value in self.options.items())}]"


def parse(given: str | Mapping[str, Any] | Spec | Iterable[Any]) -> tuple[Spec, ...]:
    """Read a spec string, a mapping `{"name": ..., option: value}`, or a list of either, as a union of specs.

    Raises SpecError, for a string with a caret under the first character that does not fit. The time is linear in the
        length of the string.
    """
    specs = tuple(_parsed(given, 0))
    if not specs:
        raise SpecError(f"an empty list names nothing; give a spec such as 'lora[rank=4]', got {shown(given)}")
    return specs


def _parsed(given: Any, depth: int) -> list[Spec]:
    if isinstance(given, Spec):
        return [given]
    if isinstance(given, str):
        return _Reader(given).union()
    if isinstance(given, Mapping):
        if isinstance(given.get("name"), str):
            if odd := [key for key in given if not isinstance(key, str)]:
                raise SpecError(
                    f"the options of {shown(given['name'])} have names, got the key {shown(odd[0])} "
                    f"({type(odd[0]).__name__})"
                )
            return [Spec(given["name"], {key: value for key, value in given.items() if key != "name"})]
        # {"0-1": "adapter|lora", "2-3": "prefix"}
        if given and all(isinstance(key, str) and key[:1].isdigit() for key in given):
            return [_on_layers(spec, layers) for layers, union in given.items() for spec in _parsed(union, depth + 1)]
        if odd := [key for key in given if not isinstance(key, str)]:
            wrong = f"{shown(odd[0])} ({type(odd[0]).__name__})"
            raise SpecError(
                f"the keys of a spec mapping are texts, 'name' and options, or layers ({{'0-3': "
                f"'lora'}}), got the key {wrong}"
            )
        raise SpecError(
            f"a spec mapping has the key 'name' with a string, or layers as keys ({{'0-3': 'lora'}}), "
            f"got {shown(dict(given))}"
        )
    if not isinstance(given, Iterable) or isinstance(given, (bytes, bytearray)) or hasattr(given, "__array__"):
        raise SpecError(f"a spec is a string, a mapping or a list of them, got {type(given).__name__}: {shown(given)}")
    if depth > MAX_DEPTH:
        raise SpecError(f"a list of specs holds specs, not lists in lists {MAX_DEPTH} deep")
    specs: list[Spec] = []
    for part in islice(given, MAX_SPECS + 1):
        specs += _parsed(part, depth + 1)
        if len(specs) > MAX_SPECS:
            raise SpecError(f"a union holds at most {MAX_SPECS:,} specs")
    return specs


def _on_layers(spec: Spec, layers: str) -> Spec:
    """`spec@layers`."""
    if "layers" in spec.options:
        raise SpecError(f"the layers of {spec} are given twice, as an option and by the key {layers!r}")
    return Spec(spec.name, {**spec.options, **_Reader(f"x@{layers}").spec().options})


def parse_one(given: str | Mapping[str, Any] | Spec) -> Spec:
    """Read exactly one spec; a union is an error."""
    specs = parse(given)
    if len(specs) != 1:
        raise SpecError(
            f"expected one spec, got {len(specs)}: {shown(given)}; several kinds of attention are a list "
            "with one spec for each layer"
        )
    return specs[0]


class _Reader:
    """Recursive descent over the grammar in the module's docstring."""

    def __init__(self, text: str):
        if len(text) > MAX_CHARACTERS:
            raise SpecError(
                f"a spec of {len(text):,} characters; at most {MAX_CHARACTERS:,} are read: give long lists as a "
                "mapping, "
                f"{{'name': ..., option: values}}. It begins {shown(text)}"
            )
        self.text, self.at = text, 0
        self._advance()

    def union(self) -> list[Spec]:
        specs = [self.spec()]
        while self._take("|"):
            specs.append(self.spec())
            if len(specs) > MAX_SPECS:
                self._fail(f"a union holds at most {MAX_SPECS:,} specs")
        if self.kind:
            self._fail("expected '|' or the end")
        return specs

    def spec(self) -> Spec:
        name, options = self._word("a name"), {}
        if self._take("[") and not self._take("]"):
            while True:
                key = self._word("an option name")
                if key in options:
                    self._fail(f"option {key!r} is given twice")
                if not self._take("="):
                    self._fail(f"expected '=' after option {key!r}")
                options[key] = self.value()
                if self._take("]"):
                    break
                if not self._take(","):
                    self._fail("expected ',' or ']'")
        if self._take("@"):
            if "layers" in options:
                self._fail("the layers are given twice, as an option and after '@'")
            options["layers"] = self.layers()
        return Spec(name, options)

    def layers(self) -> tuple[int, ...]:
        """`0-3+7` as (0, 1, 2, 3, 7)."""
        found: dict[int, None] = {}
        for part in self._word("layers such as 0-3").split("+"):
            match = _RANGE.fullmatch(part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
            if last < first:
                self._fail(f"{shown(part)} is no layer number or range; write 0-3, or 0-3+7 for several")
            if last >= MAX_LAYERS:
                self._fail(f"layer {last:,} of {part!r} is not below {MAX_LAYERS:,}, the most that are read")
            if any(layer in found for layer in range(first, last + 1)):
                self._fail(f"{part!r} names a layer that is there already; name each layer once")
            found |= dict.fromkeys(range(first, last + 1))
        return tuple(found)

    def value(self, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            self._fail(f"values are at most {MAX_DEPTH} deep inside each other")
        for opening, closing in ("()", "[]"):
            if self._take(opening):
                values = []
                while not self._take(closing):
                    values.append(self.value(depth + 1))
                    if not self._take(",") and self.token != closing:
                        self._fail(f"expected ',' or '{closing}'")
                return tuple(values)
        if self._take("{"):
            mapping: dict[str, Any] = {}
            while not self._take("}"):
                key = self._quoted() if self.kind == "string" else self._word("a pattern")
                if key in mapping:
                    self._fail(f"{key!r} is given twice")
                if not self._take(":"):
                    self._fail(f"expected ':' after {key!r}")
                mapping[key] = self.value(depth + 1)
                if not self._take(",") and self.token != "}":
                    self._fail("expected ',' or '}'")
            return mapping
        return self._quoted() if self.kind == "string" else self._of_word()

    def _of_word(self) -> Any:
        """A constant, a number, or the word itself."""
        start, word = self.at, self._word("a value")
        if word.lower() in _CONSTANTS:
            return _CONSTANTS[word.lower()]
        if _WHOLE.fullmatch(word):
            if len(word) > MAX_DIGITS:
                self._fail(f"a whole number of {len(word):,} digits; at most {MAX_DIGITS} are read", start)
            return int(word)
        if not _DECIMAL.fullmatch(word):
            return word
        number = float(word)
        if number in (float("inf"), -float("inf")):
            self._fail(f"{shown(word)} is beyond the largest float, 1.8e308", start)
        return number

    def _quoted(self) -> str:
        quote, text = self.token[0], self.token[1:-1]
        self._step()
        return text.replace(2 * quote, quote)

    def _advance(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            self.kind = self.token = ""
            if self.at < len(self.text):
                self._fail("this character does not belong in a spec")
            return
        self.kind, self.token, self.next = str(match.lastgroup), match.group(), match.end()

    def _take(self, mark: str) -> bool:
        if self.kind != "mark" or self.token != mark:
            return False
        self._step()
        return True

    def _step(self) -> None:
        self.at = self.next
        self._advance()

    def _word(self, wanted: str) -> str:
        if self.kind != "word":
            self._fail(f"expected {wanted}")
        word = self.token
        self._step()
        return word

    def _fail(self, problem: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        first = max(0, at - 60) if len(self.text) > 160 else 0
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in self.text[first : first + 160])
        raise SpecError(
            f"{problem}, at position {at} of\n  {line}\n  {' ' * (at - first)}^\n"
            "A spec reads name[option=value, ...], several joined by '|', as in 'prefix[length=16]|lora[rank=4]'."
        )


def _write(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_write, value))})"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(
                f"{_write(key) if _WORD.fullmatch(str(key)) is None else key}: {_write(item)}"
                for key, item in value.items()
            )
            + "}"
        )
    if isinstance(value, str) and (
        not _WORD.fullmatch(value)
        or value.lower() in _CONSTANTS
        or _WHOLE.fullmatch(value)
        or _DECIMAL.fullmatch(value)
    ):
        return f"'{value}'" if '"' in value and "'" not in value else '"' + value.replace('"', '""') + '"'
    return str(value)
