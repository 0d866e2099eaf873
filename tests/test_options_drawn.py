"""Every option of every registered method, kind and router, at and past every edge and with wrong types: computed as
the number says, or refused.

EFFZOO_DRAWN=n draws n more values of each number (0 in the suite).
"""

import math
import os
import random
import resource
import typing
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import effzoo
from effzoo import registry
from effzoo.annotations import Range, problem
from effzoo.attention import Context
from effzoo.errors import EffzooError

MORE = int(os.environ.get("EFFZOO_DRAWN", "0"))
SIZES = {
    "layers": 2,
    "dim": 16,
    "heads": 2,
    "mlp": 32,
    "vocab": 50,
    "max_length": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
IDS = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
WRONG = [
    math.nan, math.inf, -math.inf, -1, -1.0, 0, 0.0, -0.0, 1, 1.0, 2, 0.5, 1e-300, 1e-9, 1e6, 1e7, 1e30, 1e300,
    10**9, 2**31, 2**53 + 1, 2**63, 10**400,
    1j, True, None, "x", "16", "nan", b"1", [], [1], (1, math.nan), {}, {"*": 0}, {"*": math.nan}, Fraction(1, 2),
    Decimal(1), object(), np.float64("nan"),
    np.int64(-1), np.float32(1e38), range(3), torch.tensor(2), [[1]], {1: 2},
]  # fmt: skip
VIEWS = {"attention": registry.attention, "peft": registry.peft, "router": registry.router}
OPTIONS = [
    (kind, name, option) for kind, view in VIEWS.items() for name in view.names() for option in view.options(name)
]
COUNT = {"tried": 0, "refused": 0, "computed": 0}


def ranges(annotation):
    """The ranges in an annotation."""
    if typing.get_origin(annotation) is typing.Annotated:
        return [limit for limit in typing.get_args(annotation)[1:] if isinstance(limit, Range)]
    return [limit for part in typing.get_args(annotation) for limit in ranges(part)]


def values(option, draw):
    """Edges of the declared ranges, one step past them, what is inside, wrong types, and drawn numbers."""
    found = list(WRONG)
    for limit in ranges(option.annotation):
        for edge in (limit.low, limit.high):
            found += (
                [edge, edge + 1, edge - 1]
                if isinstance(edge, int)
                else [edge, math.nextafter(edge, math.inf), math.nextafter(edge, -math.inf)]
            )
    found += [
        draw.choice([draw.randint(-3, 40), draw.uniform(-2, 2), 10 ** draw.uniform(-12, 12), 2 ** draw.randint(1, 70)])
        for _ in range(MORE)
    ]
    return [*found, option.default] if not option.required else found


def computed(kind, name, options):
    """What the entry computes on a tiny model, forward and backward: tensors that have to be finite."""
    spec = {"name": name, **options}
    torch.manual_seed(0)
    if kind == "router":
        made = registry.router.create(
            {"name": name, **({"tasks": 2} if name == "skills" else {}), **options}, 16, 4
        ).train()
        routing = made(torch.zeros(6, dtype=torch.long) if made.reads == "tasks" else torch.randn(6, 16))
        return [
            value for value in vars(routing).values() if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
    base = "gpt2" if kind == "attention" and options and random.random() < 0.3 * bool(MORE) else "bert"
    model = effzoo.build(
        base,
        **SIZES,
        **({"attention": spec} if kind == "attention" else {}),
        task="token_classification" if base == "bert" else "causal_lm",
    )
    if kind == "peft":
        effzoo.attach(model, spec)
    out = model.train()(input_ids=IDS, labels=IDS % 2)
    penalty = effzoo.peft.penalty(model) if kind == "peft" else None
    loss = out.loss if penalty is None else out.loss + penalty
    loss.backward()
    return [out.loss, out.logits, loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def little_memory():
    """2 GiB more than the process has: a number that asks for more is an error of this test, not the machine's end."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), sorted({(kind, name) for kind, name, _ in OPTIONS}), ids=lambda value: value)
def test_a_number_is_computed_as_it_says_or_refused_with_a_sentence(kind, name, monkeypatch, little_memory):
    # of which 64 MiB are not kept back: larger tensors are refused
    monkeypatch.setattr("effzoo.memory.free", lambda device: 2**28 + 2**26)
    draw = random.Random(f"{kind} {name}")
    view = VIEWS[kind]
    for option in (option for owner, of, option in OPTIONS if (owner, of) == (kind, name)):
        for value in values(option, draw):
            COUNT["tried"] += 1
            what = f"{kind} {name}[{option.name}={value!r:.60}]"
            if problem(value, option.annotation):
                check_refused(view, kind, name, option.name, value, what)
                COUNT["refused"] += 1
                continue
            try:
                tensors = computed(kind, name, {option.name: value})
            # the number is one, but not on this model: more heads than there are, more memory than there is
            except EffzooError as error:
                assert str(error)
                COUNT["refused"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error
            assert all(bool(tensor.isfinite().all()) for tensor in tensors), (
                f"{what} gives outputs or gradients that are not finite"
            )
            COUNT["computed"] += 1


def check_refused(view, kind, name, option, value, what):
    """By a mapping, a constructor and, where it can be written, a spec string."""
    options = {**({"tasks": 2} if name == "skills" else {}), option: value}
    ways = [
        lambda: view.create({"name": name, **options}, *leading(kind)),
        lambda: view.get(name)(*leading(kind), **options),
    ]
    if type(value) in (int, bool) or (type(value) is float and math.isfinite(value)):  # a string says nan by a word
        ways.append(
            lambda: view.create(
                f"{name}[{', '.join(f'{key}={given}' for key, given in options.items())}]", *leading(kind)
            )
        )
    for way in ways:
        try:
            way()
        except EffzooError as error:
            assert option in str(error) or "spec" in str(error), (
                f"{what} was refused with {error!r}, which does not name the option"
            )
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{what} was taken")


def leading(kind):
    """What stands before the options in a constructor."""
    return {"attention": (Context(heads=2, head_dim=8, layers=2, max_length=64),), "router": (16, 4), "peft": ()}[kind]


def test_what_was_tried_is_told(capsys):
    """The counts of the run, which `pytest -s` shows: a value that is taken silently, or met with a raw error, is in
    neither."""
    neither = COUNT["tried"] - COUNT["computed"] - COUNT["refused"]
    with capsys.disabled() if MORE else nullcontext():
        print(
            f"{COUNT['tried']:,} values tried: {COUNT['computed']:,} computed, {COUNT['refused']:,} refused, "
            f"{neither:,} silent or raw"
        )
    assert neither == 0
