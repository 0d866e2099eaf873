"""The spec string: what it reads, what it writes, where it points when it does not parse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effzoo.errors import SpecError
from effzoo.spec import Spec, parse, parse_one

VALUES = st.recursive(
    st.one_of(st.integers(-99, 99), st.booleans(), st.none(), st.floats(0, 10), st.from_regex(r"[a-z][a-z_.*]{0,6}", fullmatch=True)),
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
        (" prefix[ length = 16 ] | lora[rank=4,alpha=8.5] ", (Spec("prefix", {"length": 16}), Spec("lora", {"rank": 4, "alpha": 8.5}))),
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
