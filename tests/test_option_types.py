"""Options of methods, kinds and routers that users register: an annotation is understood, or refused when the class is
registered."""

import enum
import functools
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Optional, Union

import numpy as np
import pytest
import torch

import effzoo
from effzoo.annotations import Count, Positive, Range, describe, unreadable
from effzoo.errors import OptionError
from effzoo.registry import attention, check_declared, peft, router

VIEWS = (peft, attention, router)


class Colour(enum.Enum):
    RED = 1


class Text(enum.StrEnum):
    A = "a"


class Named(typing.TypedDict):
    a: int


class Unchecked(typing.Protocol):
    def run(self): ...


def registered(annotation, view=peft):
    """A class with one option of this annotation."""

    def made(self, *, opt=None):
        self.opt = opt

    made.__annotations__ = {"opt": annotation}
    parent = effzoo.peft.Method if view is peft else object
    return view.register("mine")(type("Mine", (parent,), {"__init__": made, "make": lambda self, site: None}))


UNDERSTOOD = [
    (list, [1, "a"], 3), (dict, {"a": 1}, [1]), (tuple, (1,), "ab"), (Sequence, [1], "ab"), (Mapping, {"a": []}, 1),
    (Count, 3, 0),
    (typing.List, [1], 1), (typing.Dict, {}, 1), (typing.Tuple, (1, 2), 1), (typing.Sequence, [1], "a"),  # noqa: UP006
    (list[list], [[1]], [1]), (list[Any], [1, "a"], "a"), (Optional[int], None, 1.5), (Union[int, str], "a", 1.5),  # noqa: UP007, UP045
    (int | list, [1], "a"), (Literal["a", 1, None], None, "b"), (Annotated[int, "a note"], 3, "a"),
    (tuple[int, str], [1, "a"], ["a", 1]),
    (tuple[int, ...], [1, 2], ["a"]), (dict[str, float], {"a": 1}, {"a": "b"}), (None, None, 0), (Any, [1], {1}),
    (object, "a", torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "right", "wrong"), UNDERSTOOD)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.kind)
def test_an_annotation_is_understood(annotation, right, wrong, view):
    with effzoo.scope():
        registered(annotation, view)
        assert view.create({"name": "mine", "opt": right}).opt == right
        with pytest.raises(OptionError, match="opt"):
            view.create({"name": "mine", "opt": wrong})
        assert describe(annotation)


def test_a_bare_list_is_given_by_a_spec_string():
    with effzoo.scope():
        registered(list)
        assert effzoo.peft.create("mine[opt=(1, a, none)]").opt == (1, "a", None)
        with pytest.raises(OptionError, match="'opt' of peft 'mine' takes a list, got 3"):
            effzoo.peft.create("mine[opt=3]")


REFUSED = {
    "torch.dtype": torch.dtype, "Callable": Callable, "Callable[[int], int]": Callable[[int], int], "Colour": Colour,
    "Text": Text, "Named": Named,
    "Unchecked": Unchecked, "set": set, "set[int]": set[int], "frozenset": frozenset, "bytes": bytes,
    "complex": complex, "Path": pathlib.Path,
    "Tensor": torch.Tensor, "Module": torch.nn.Module, "float32": np.float32, "type": type, "Hashable": typing.Hashable,
    "TypeVar": typing.TypeVar("T"), "<function": lambda x: x, "3": 3, "partial": functools.partial(int),
    "array": np.zeros(2),
    "dict[int, int]": dict[int, int], "Iterable": typing.Iterable[int], "Literal": Literal[Colour.RED],
    "'int'": list["int"], "Annotated": Annotated[str, Range(0, 1)], "slice": int | slice, "ForwardRef": Optional["int"],
}  # fmt: skip


@pytest.mark.parametrize("annotation", REFUSED.values(), ids=REFUSED)
def test_an_annotation_that_no_spec_can_fill_is_refused_when_the_class_is_registered(annotation):
    with effzoo.scope():
        with pytest.raises(
            OptionError,
            match="peft 'mine': option 'opt' is annotated .+ cannot hold; annotate bool, int, float, str, None",
        ):
            registered(annotation)
        assert "mine" not in effzoo.peft.names()


def test_an_annotation_that_cannot_be_read_is_a_sentence():
    with effzoo.scope():
        for written in ("torch.no_such", "int |", "1 / 0"):
            with pytest.raises(OptionError, match="an annotation in the constructor of Mine cannot be read"):
                registered(written)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.kind)
def test_every_option_of_the_zoo_is_of_a_type_that_specs_hold(view):
    assert len(view.names()) > 5
    for name in view.names():
        check_declared(view.kind, name, view.get(name))
        assert not any(unreadable(option.annotation) for option in view.options(name))


@pytest.mark.parametrize("value", [
    torch.float16, Colour.RED, Text.A, abs, {1}, pathlib.Path("a"), b"a", 1j, float("nan"), {1: 2}, [torch.float16],
    {"a": {None: 1}}, range(3), (1, [b""]), {"a": float("inf")}, np.ones(2), torch.ones(2),
])  # fmt: skip
def test_a_value_that_cannot_be_saved_is_refused_before_anything_is_trained(value):
    with effzoo.scope():
        registered(Any)
        with pytest.raises(
            OptionError, match="option 'opt' of peft 'mine' holds .+ which no spec and no adapter file can hold"
        ):
            effzoo.peft.create({"name": "mine", "opt": value})


@pytest.mark.parametrize(("annotation", "given", "kept"), [
    (float, 1, 1.0), (Positive, 2, 2.0), (Positive | None, 1, 1.0), (int | float, 1, 1),
    (Sequence[float], [1, 0.5], [1.0, 0.5]),
    (tuple[int, float], (1, 1), (1, 1.0)), (list[Positive] | Positive, [1], [1.0]), (Positive, np.int64(1), 1.0),
])  # fmt: skip
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.kind)
def test_a_whole_number_for_a_float_arrives_as_a_float(annotation, given, kept, view):
    with effzoo.scope():
        registered(annotation, view)
        arrived = view.create({"name": "mine", "opt": given}).opt
    assert repr(arrived) == repr(kept)  # 1 == 1.0, and only their texts differ
