"""The spec string: what it reads, what it writes, where it points when it does not parse."""

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effzoo.errors import SpecError
from effzoo.spec import Spec, parse, parse_one

VALUES = st.recursive(
    st.one_of(
        st.integers(-99, 99),
        st.booleans(),
        st.none(),
        st.floats(0, 10),
        st.from_regex(r"[a-z][a-z_.*]{0,6}", fullmatch=True),
    ),
    lambda inner: st.lists(inner, min_size=0, max_size=3).map(tuple),
    max_leaves=4,
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora", (Spec("lora"),)),
        ("lora[]", (Spec("lora"),)),
        ("lora[rank=4]", (Spec("lora", {"rank": 4}),)),
        (
            " prefix[ length = 16 ] | lora[rank=4,alpha=8.5] ",
            (Spec("prefix", {"length": 16}), Spec("lora", {"rank": 4, "alpha": 8.5})),
        ),
        ("lora[targets=(attn.q*, attn.v*)]", (Spec("lora", {"targets": ("attn.q*", "attn.v*")}),)),
        ("lora[layers=[0,-1]]", (Spec("lora", {"layers": (0, -1)}),)),
        ("x[a=true, b=None, c='two words', d=1e-3]", (Spec("x", {"a": True, "b": None, "c": "two words", "d": 1e-3}),)),
        ({"name": "longformer", "window": 256}, (Spec("longformer", {"window": 256}),)),
        (["lora", {"name": "ia3"}], (Spec("lora"), Spec("ia3"))),
    ],
)
def test_reads(text, expected):
    assert parse(text) == expected


@given(name=NAMES, options=st.dictionaries(NAMES, VALUES, max_size=3))
def test_what_a_spec_writes_it_reads_back(name, options):
    spec = Spec(name, options)
    assert parse_one(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 0, "a name"),
        ("lora[", 5, "option name"),
        ("lora[rank]", 9, "expected '='"),
        ("lora[rank=]", 10, "a value"),
        ("lora[rank=4", 11, "',' or ']'"),
        ("lora[rank=4, rank=5]", 17, "twice"),
        ("lora rank=4", 5, "'|' or the end"),
        ("lora|", 5, "a name"),
        ("lora[rank=(1,2]", 14, "')'"),
        ("lora{rank=4}", 4, "'|' or the end"),
        ("lora[rank={attn.q 8}]", 18, "':'"),
        ("lora[layers=1]@0-1", 15, "twice"),
        ("lora@3-1", 8, "no layer number"),
        ("lora;rank", 4, "does not belong"),
    ],
)
def test_points_at_what_does_not_parse(text, column, problem):
    with pytest.raises(SpecError) as error:
        parse(text)
    message = str(error.value)
    assert problem in message
    assert f"\n  {text}\n  {' ' * column}^\n" in message


@pytest.mark.parametrize("given", [3, {"window": 4}, None])
def test_refuses_what_is_no_spec(given):
    with pytest.raises(SpecError):
        parse(given)


@given(st.one_of(st.text(max_size=60), st.text(alphabet="lora[]=,(){}:@|'\" -0129.e+\0²xnone", max_size=60)))
def test_any_string_is_a_spec_or_an_error_and_what_is_read_is_written_again(text):
    try:
        specs = parse(text)
    except SpecError:
        return
    assert parse("|".join(map(str, specs))) == specs


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=8), max_size=3), st.text(max_size=10))
def test_any_text_as_a_value_or_a_key_is_written_so_that_it_is_read_again(mapping, word):
    spec = Spec("x", {"a": word, "b": mapping, "c": (word, mapping)})
    assert parse_one(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora@0-99999999", "not below 10,000"),
        ("lora@" + "0-9999+" * 14_000 + "1", "already"),
        ("lora@0+0", "already"),
        ("lora@²", "no layer number"),
        ("lora@٣", "no layer number"),
        ("lora[targets=" + "(" * 90_000, "16 deep"),
        ("(" * 90_000, "a name"),
        ("lora[a=" + "{b:" * 30_000, "16 deep"),
        ("|".join(["a"] * 50_000), "at most 1,000 specs"),
        ("lora[rank=" + "9" * 5_000 + "]", "5,000 digits"),
        ("lora[alpha=1e999]", "largest float"),
        ("lora[a=" + "x, " * 30_000, "expected '='"),
        ("x" * 100_001, "100,001 characters"),
        ("'" * 90_001, "a name"),
        ("x[a='" + "''" * 40_000 + ",", "does not belong"),
        ("lora[a={b: 1, b: 2}]", "twice"),
        ("lora[a=\0]", "does not belong"),
    ],
)
def test_a_hostile_string_is_refused_at_once(text, said):
    started = time.process_time()
    with pytest.raises(SpecError, match=said) as error:
        parse(text)
    assert time.process_time() - started < 1 and len(str(error.value)) < 800


def test_lists_in_lists_endless_lists_and_foreign_numbers():
    endless: list = []
    endless.append(endless)
    for wrong, said in (
        (endless, "lists in lists"),
        (itertools.repeat("lora"), "at most 1,000"),
        (b"lora", "got bytes"),
        ({"name": "x", 3: 4}, "names, got the key 3"),
    ):
        with pytest.raises(SpecError, match=said):
            parse(wrong)
    (spec,) = parse(
        {"name": "lora", "rank": np.int64(4), "alpha": {"attn.q": np.float32(0.5)}, "layers": [np.int32(1)]}
    )
    assert json.dumps(spec.options) == '{"rank": 4, "alpha": {"attn.q": 0.5}, "layers": [1]}'  # which files hold


def test_words_that_python_would_evaluate_stay_words():
    assert parse_one("x[a=1j, b=..., c=0x10, d=--1, e=1_000, f=.5, g=1+1j]").options == dict(
        a="1j", b="...", c="0x10", d="--1", e=1000, f=0.5, g="1+1j"
    )
