"""Regular expressions of foreign files mean what `re` says, and take a bounded time whatever they are."""

import json
import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import effzoo
from effzoo.convert.peft_files import patterns
from effzoo.convert.peft_files.expressions import Expression, Steps
from effzoo.errors import AdapterError

ATOMS = (
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a]",
    "[a-b.]",
    r"\d",
    r"\w",
    r"\W",
    "1",
    r"\b",
    "^",
    "$",
    "(?=a)",
    "(?!b)",
    r"[\d-]",
    r"\-",
    "_",
    "{",
    "[]a]",
)
REPEATS = ("*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{0}")
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda part: st.one_of(
        st.builds("{}{}".format, part, part),
        st.builds("({}|{})".format, part, part),
        st.builds("{}|{}".format, part, part),
        st.builds("(?:{})".format, part),
        st.builds("({}){}".format, part, st.sampled_from(REPEATS)),
        st.builds("{}{}".format, st.sampled_from(("a", ".", "[ab1]", r"\d")), st.sampled_from(REPEATS)),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(EXPRESSIONS, st.text("ab.1_{", min_size=1, max_size=8))
def test_an_expression_means_what_re_says(text, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of `re` about [[
        expected = [re.compile(text).fullmatch(name, start) is not None for start in (0, 1)]
    expression = Expression(text, Steps())
    assert expression.matches(name) == expected[0]
    # `re` takes the given start for the beginning in neither, but looks behind it
    anchored = "^" in text.replace("[^", "")
    assert anchored or (len(name) in expression.ends(name, 1)) == expected[1]


HOSTILE = [
    r"([a-z0-9]+\.?)+!", "(a*)*" * 40 + "!", "(((a?){1000}){1000}){1000}", "(.*)*(.*)*(.*)*!", r"(\w|\d|.)*" * 30 + "!",
    "(?:(?:(?:.?)*)*)*!", "(?=(.*)*!)(.*)*", "|".join(f"(a+)+{i}" for i in range(500)),
]  # fmt: skip
UNREAD = [
    r"(a)\1",
    "(?<=a)b",
    "(?i)a",
    "a*+",
    "(?>a)b",
    "(?(1)a|b)",
    "a{1001}",
    "(" * 60 + ")" * 60,
    "a" * 10_001,
    "(a",
    "a)",
    "[a",
    "*a",
    "a**",
    "[b-a]",
]
PLACES = [
    lambda text: {"target_modules": text},
    lambda text: {"exclude_modules": text},
    lambda text: {"rank_pattern": {text: 8}},
    lambda text: {"alpha_pattern": {text: 8}},
    lambda text: {"layers_to_transform": [0], "layers_pattern": [text]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapter")
    effzoo.save_adapter(effzoo.attach(bert(), "lora"), place, format="peft")
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(save(load(weights.read_bytes())))  # as peft writes it, without a hash of the config
    return place


def bert():
    return effzoo.build("bert", layers=1, dim=16, heads=2, mlp=32, max_length=32, vocab=50)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=["target", "exclude", "rank", "alpha", "layers"])
@pytest.mark.parametrize("text", [*HOSTILE, *UNREAD], ids=range(len(HOSTILE) + len(UNREAD)))
def test_no_expression_of_a_file_is_run_without_an_end(folder, tmp_path, place, text):
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | place(text)))
    start, model = time.process_time(), bert()
    try:
        effzoo.load_adapter(model, tmp_path)
    except AdapterError as refusal:
        assert not effzoo.attached(model) and any(
            said in str(refusal) for said in ("the file", "expression", "layers_pattern")
        )
    else:
        assert text not in UNREAD
    assert time.process_time() - start < 8


NAMES = [
    f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
] + ["lm_head"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.layers\.[02]\..*q_proj"},
        {"target_modules": r"^(?!.*mlp).*(?:q_proj|v_proj|up_proj)$"},
        {"target_modules": r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))|(?:\bx\.y)"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "(layers|h)"},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    ],
)
def test_modules_are_chosen_as_peft_chooses_them(config):
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**config)
    expected = {name for name in NAMES if check_target_module_exists(theirs, name)}
    assert patterns.matched(config, NAMES) == expected and expected


@pytest.mark.parametrize(
    "pattern",
    [{"q_proj": 4, ".*up_proj": 5}, {r"layers\.[01]\..*": 4, "lm_head": 5}, {"^lm_head": 3, "1.*proj": 7}, {"a": 1}],
)
def test_numbers_are_chosen_as_peft_chooses_them(pattern):
    from peft.utils.other import get_pattern_key

    numbers = patterns.Numbers(pattern, Steps())
    for name in NAMES:
        assert numbers.of(name, 8) == pattern.get(get_pattern_key(pattern.keys(), name), 8)
