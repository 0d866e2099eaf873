"""Meanings of the lab: what a restaurant is like, as slots and values, and several texts that say so. From files as the
E2E challenge has them, or from a small grammar."""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass
from pathlib import Path

from effzoo.errors import DataError
from effzoo.lab.experiment import Run

DATA = "CSV files with the columns mr and ref, such as E2E's (default: a grammar of restaurants)"
REFERENCES = 6  # texts of each meaning of the grammar
_WORD = re.compile(r"\w+|[^\w\s]")
_SLOT = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")
NAMES = (
    "The Copper Kettle", "Blue Door", "Harbour Light", "Old Station", "Green Lantern", "Bella Notte", "Stone Bridge",
    "The Hungry Otter", "Maple Court", "Silver Spoon", "The Quiet Hen", "Lotus Garden", "Red Barn", "North Star",
    "The Tin Whistle", "Olive Branch", "Corner House", "White Heron", "The Lucky Fox", "Amber Room",
)  # fmt: skip
NEAR = ("Town Hall", "Rose Theatre", "Kings Market", "Grand Library", "East Gate", "Botanic Garden", "Clock Tower",
        "Fish Market")  # fmt: skip
TYPES, FOODS = ("pub", "cafe", "restaurant"), ("Italian", "Indian", "French", "Thai", "English", "Greek")
PHRASES = {  # each may stand behind "a pub" and behind "it is"
    ("area", "centre"): ("in the city centre", "in the middle of town", "in the heart of the city"),
    ("area", "river"): ("by the river", "on the riverside", "down by the water"),
    ("price", "low"): ("in the cheap price range", "at low prices", "easy on the purse"),
    ("price", "medium"): ("moderately priced", "at average prices", "in the middle price range"),
    ("price", "high"): ("on the expensive side", "at high prices", "in the top price range"),
    ("rating", "1"): ("rated 1 of 5 by customers", "with a low customer rating", "poorly rated"),
    ("rating", "3"): ("rated 3 of 5 by customers", "with an average customer rating", "rated as average"),
    ("rating", "5"): ("rated 5 of 5 by customers", "with a high customer rating", "highly rated"),
    ("children", "yes"): ("friendly to families", "fit for children", "where children are welcome"),
    ("children", "no"): ("not for families", "for adults only", "where children are not welcome"),
}


@dataclass(frozen=True)
class Meaning:
    """What is to be said, and how it has been said.

    slots: names and values, in order.
    references: texts, each of which says it.
    """

    slots: tuple[tuple[str, str], ...]
    references: tuple[str, ...]

    @property
    def line(self) -> str:
        """The slots as a text: name : value | name : value."""
        return " | ".join(f"{name} : {value}" for name, value in self.slots)


def words(text: str) -> list[str]:
    """Words, numbers and marks of a text, in lower case."""
    return _WORD.findall(text.lower())


def meanings(run: Run, count: int) -> tuple[list[Meaning], str]:
    """All meanings of `run.data`, or `count` of the grammar, in an order that is always the same; and what they are."""
    found = restaurants(count) if run.data is None else read_meanings(run.data)
    random.Random(0).shuffle(found)
    return found, "a grammar of restaurants" if run.data is None else run.data.name


def read_meanings(path: Path) -> list[Meaning]:
    """Meanings of a CSV file, or of all those in a folder, with rows such as `"name[The Mill], area[riverside]",text`;
    texts of one mr are the references of one meaning.

    Raises DataError where there is none.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for row in csv.DictReader(lines):
                if row.get("mr") and row.get("ref"):
                    found.setdefault(row["mr"], []).append(row["ref"])
    if not found:
        raise DataError(f"{path} has no CSV file with rows of mr and ref; give files as those of the E2E challenge")
    return [Meaning(_slots(mr), tuple(texts)) for mr, texts in found.items()]


def _slots(mr: str) -> tuple[tuple[str, str], ...]:
    """familyFriendly[yes] is ("family friendly", "yes")."""
    apart = re.compile(r"(?<=[a-z])(?=[A-Z])")
    return tuple((apart.sub(" ", name).strip().lower(), value.strip()) for name, value in _SLOT.findall(mr))


def restaurants(count: int, seed: int = 0) -> list[Meaning]:
    """Different meanings of the grammar, each a name, a type and two to five more slots, with six texts.

    A text names a value in one of three ways, and puts slots in any order into one sentence or two.
    """
    draw = random.Random(seed)
    found: dict[tuple[tuple[str, str], ...], Meaning] = {}
    while len(found) < count:
        values = {
            "food": draw.choice(FOODS),
            **{name: draw.choice([v for n, v in PHRASES if n == name]) for name in ("price", "rating", "area")},
            "children": draw.choice(("yes", "no")),
            "near": draw.choice(NEAR),
        }
        kept = sorted(draw.sample(range(len(values)), draw.randint(2, 5)))
        slots = (
            ("name", draw.choice(NAMES)),
            ("type", draw.choice(TYPES)),
            *(item for place, item in enumerate(values.items()) if place in kept),
        )
        if slots not in found:
            found[slots] = Meaning(slots, tuple(_said(dict(slots), draw) for _ in range(REFERENCES)))
    return list(found.values())


def _said(slots: dict[str, str], draw: random.Random) -> str:
    """One text of the grammar."""
    name, kind, food = slots["name"], slots["type"], slots.get("food")
    phrases = [draw.choice(PHRASES[item]) for item in slots.items() if item in PHRASES]
    if "near" in slots:
        phrases.append(draw.choice(("near {}", "close to {}", "not far from {}")).format(slots["near"]))
    draw.shuffle(phrases)
    what = f"{food} {kind}" if food and draw.random() < 0.5 else f"{kind} that serves {food} food" if food else kind
    article = "an" if what[0] in "EI" else "a"
    first = phrases[: draw.randint(0, 2)]
    later = phrases[len(first) :]
    if first and draw.random() < 0.4:
        opening = f"{first[0]} there is {article} {what} called {name}"
        first = first[1:]
    else:
        opening = draw.choice((f"{name} is {article} {what}", f"there is {article} {what} called {name}"))
    sentences = [" , ".join([opening, *first])]
    if later:
        it = draw.choice((name, "it", "the place"))
        sentences.append(f"{it} is " + (" , ".join(later[:-1]) + " and " if len(later) > 1 else "") + later[-1])
    return " . ".join(sentences) + " ."
