"""ListOps: the value of a nested expression in prefix notation (Nangia & Bowman 2018, arXiv:1804.06028), long as in
Long Range Arena.

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

MIN, MAX, MED (median, rounded down) and SM (sum modulo 10) over digits. Above depth `depth` a place holds an operator
with probability 1/4 and a digit otherwise, as the generator of Long Range Arena draws it (Tay et al. 2020,
arXiv:2011.04006, section 2.2.1).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.errors import OptionError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
VOCABULARY = ("<pad>", "<cls>", *(f"[{name}" for name in OPERATORS), "]", *map(str, range(10)))
VALUE_PROBABILITY = 0.25
IDS = {token: number for number, token in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class ListOps:
    """The distribution of expressions: at most `depth` nested operators with 2 to `arguments` arguments, `shortest` to
    `longest` tokens.

    The published task: depth 10, arguments 10, 501 to 1,999 tokens; 10 classes.
    """

    depth: int = 10
    arguments: int = 10
    shortest: int = 501
    longest: int = 1999

    def __post_init__(self) -> None:
        if self.depth < 2 or self.arguments < 2 or not 1 <= self.shortest <= self.longest:
            raise OptionError(f"ListOps needs depth and arguments of at least 2 and shortest <= longest, got {self}")

    def expression(self, draw: random.Random) -> list[str]:
        """One expression as tokens, drawn again until its length fits."""
        for _ in range(1_000_000):
            tokens = self._tree(draw, 1)
            if tokens is not None and self.shortest <= len(tokens) <= self.longest:
                return tokens
        raise OptionError(
            f"no expression of {self.shortest} to {self.longest} tokens was drawn in a million; allow other lengths, "
            "depth or arguments"
        )

    def _tree(self, draw: random.Random, depth: int) -> list[str] | None:
        if depth >= self.depth or draw.random() > VALUE_PROBABILITY:
            return [str(draw.randrange(10))]
        tokens = [f"[{draw.choice(tuple(OPERATORS))}"]
        for _ in range(draw.randint(2, self.arguments)):
            below = self._tree(draw, depth + 1)
            if below is None or len(tokens) + len(below) > self.longest:
                return None
            tokens += below
        return [*tokens, "]"]

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """`count` different expressions: ids [count, longest + 1] with <cls> in front, mask, and labels [count]."""
        draw = random.Random(seed)
        seen: dict[tuple[str, ...], None] = {}
        while len(seen) < count:
            seen[tuple(self.expression(draw))] = None
        ids = torch.zeros(count, self.longest + 1, dtype=torch.long)
        for row, tokens in enumerate(seen):
            ids[row, : len(tokens) + 1] = torch.tensor([IDS["<cls>"], *(IDS[token] for token in tokens)])
        return ids, (ids != 0).long(), torch.tensor([evaluate(tokens) for tokens in seen])


def evaluate(tokens: Sequence[str]) -> int:
    """The value of an expression, by a stack of open operators."""
    stack: list[tuple[str, list[int]]] = []
    value = None
    for token in tokens:
        if token.startswith("["):
            stack.append((token[1:], []))
            continue
        if token == "]":
            name, arguments = stack.pop()
            value = OPERATORS[name](arguments)
        else:
            value = int(token)
        if stack:
            stack[-1][1].append(value)
    if value is None or stack:
        raise OptionError(f"not a whole expression: {' '.join(tokens)}")
    return value
