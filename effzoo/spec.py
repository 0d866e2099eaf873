"""The spec string: `name[option=value, ...]`, joined by `|` into a union.

    union  = spec { "|" spec }
    spec   = name [ "[" option { "," option } "]" ] [ "@" layers ]
    option = key "=" value
    value  = "(" value { "," value } ")" | "{" word ":" value { "," word ":" value } "}" | quoted string | number | true | false | none | bare word
    layers = range { "+" range },  range = number [ "-" number ]

`longformer[window=256]`, `lora[rank=4, targets=(attn.q*, attn.v*)]|ia3`, `longformer[window=(32, 64, 128)]`,
`lora[rank={attn.q: 8, attn.v: 4}]`; `prefix@0-3|lora@4-5+8` is short for `prefix[layers=(0, 1, 2, 3)]|lora[layers=(4, 5, 8)]`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from effzoo.errors import SpecError

_TOKEN = re.compile(r"\s*(?:(?P<string>'[^']*'|\"[^\"]*\")|(?P<word>[\w.*+/?\-]+)|(?P<mark>[\[\](){}:@,=|]))")
_CONSTANTS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spec:
    """One registry name with the options given for it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}[{', '.join(f'{key}={_write(value)}' for key, value in self.options.items())}]"


def parse(given: str | Mapping[str, Any] | Spec | Iterable[Any]) -> tuple[Spec, ...]:
    """Read a spec string, a mapping `{"name": ..., option: value}`, or a list of either, as a union of specs.

    Raises SpecError with a caret under the first character that does not fit.
    """
    if isinstance(given, Spec):
        return (given,)
    if isinstance(given, str):
        return _Reader(given).union()
    if isinstance(given, Mapping):
        if isinstance(given.get("name"), str):
            return (Spec(given["name"], {key: value for key, value in given.items() if key != "name"}),)
        if given and all(isinstance(key, str) and key[:1].isdigit() for key in given):  # {"0-1": "adapter|lora", "2-3": "prefix"}
            return tuple(parse_one(f"{spec}@{layers}") for layers, union in given.items() for spec in parse(union))
        raise SpecError(f"a spec mapping has the key 'name' with a string, or layers as keys ({{'0-3': 'lora'}}), got {dict(given)!r}")
    if isinstance(given, Iterable):
        return tuple(spec for part in given for spec in parse(part))
    raise SpecError(f"a spec is a string, a mapping or a list of them, got {type(given).__name__}: {given!r}")


def parse_one(given: str | Mapping[str, Any] | Spec) -> Spec:
    """Read exactly one spec; a union is an error."""
    specs = parse(given)
    if len(specs) != 1:
        raise SpecError(f"expected one spec, got {len(specs)}: {given!r}")
    return specs[0]


class _Reader:
    """Recursive descent over the grammar in the module's docstring."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self._advance()

    def union(self) -> tuple[Spec, ...]:
        specs = [self.spec()]
        while self._take("|"):
            specs.append(self.spec())
        if self.kind:
            self._fail("expected '|' or the end")
        return tuple(specs)

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
        found: list[int] = []
        for part in self._word("layers such as 0-3").split("+"):
            first, dash, last = part.partition("-")
            if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
                self._fail(f"{part!r} is no layer number or range; write 0-3, or 0-3+7 for several")
            found += range(int(first), int(last or first) + 1)
        return tuple(found)

    def value(self) -> Any:
        for opening, closing in ("()", "[]"):
            if self._take(opening):
                values = []
                while not self._take(closing):
                    values.append(self.value())
                    if not self._take(",") and self.token != closing:
                        self._fail(f"expected ',' or '{closing}'")
                return tuple(values)
        if self._take("{"):
            mapping: dict[str, Any] = {}
            while not self._take("}"):
                key = self._word("a pattern")
                if not self._take(":"):
                    self._fail(f"expected ':' after {key!r}")
                mapping[key] = self.value()
                if not self._take(",") and self.token != "}":
                    self._fail("expected ',' or '}'")
            return mapping
        if self.kind == "string":
            text = self.token[1:-1]
            self._step()
            return text
        word = self._word("a value")
        if word.lower() in _CONSTANTS:
            return _CONSTANTS[word.lower()]
        try:
            return ast.literal_eval(word)
        except (ValueError, SyntaxError):
            return word

    def _advance(self) -> None:
        rest = self.text[self.at :]
        self.at += len(rest) - len(rest.lstrip())
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            self.kind = self.token = ""
            if self.at < len(self.text):
                self._fail("this character does not belong in a spec")
            return
        self.kind, self.token, self.next = str(match.lastgroup), match.group(str(match.lastgroup)), match.end()

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

    def _fail(self, problem: str) -> None:
        raise SpecError(
            f"{problem}, at position {self.at} of\n  {self.text}\n  {' ' * self.at}^\n"
            "A spec reads name[option=value, ...], several joined by '|', as in 'prefix[length=16]|lora[rank=4]'."
        )


def _write(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_write, value))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_write(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (not re.fullmatch(r"[\w.*+/?\-]+", value) or _Reader(f"x[y={value}]").spec().options["y"] != value):
        return f'"{value}"'
    return str(value)
