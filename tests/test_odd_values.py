"""Odd values at public functions: numbers and texts of foreign types, names that no file system has, very long texts,
arrays without an axis."""

import decimal
import fractions

import numpy as np
import pytest
import torch

import effzoo
import effzoo.data
from effzoo.annotations import Number, Positive, Probability, fits
from effzoo.errors import LONGEST, AdapterError, ArgumentError, EffzooError, InputError, OptionError

SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50, "max_length": 32}


@pytest.fixture(scope="module")
def model():
    return effzoo.build("bert", peft="lora[rank=2]", task="classification", **SIZES)


@pytest.mark.parametrize(
    "name",
    [
        "a" * 101,
        "é" * 51,
        "CON",
        "nul",
        "Com1",
        "lpt9",
        "aux",
        "a b",
        "a/b",
        "..",
        "",
        "a.b",
        "\ud800",
        "a\x00",
        "class-",
        "0",
    ],
)
def test_an_adapter_has_a_name_that_files_can_have(model, name):
    with pytest.raises(AdapterError, match="an adapter name is .+ try 'task_a'"):
        effzoo.attach(model, "lora", name=name)
    assert list(effzoo.attached(model)) == ["default"]


@pytest.mark.parametrize("name", ["a" * 100, "é" * 50, "适应", "console", "com10", np.str_("text")])
def test_any_other_name_is_that_of_a_folder_too(name, tmp_path):
    model = effzoo.build("bert", peft="lora[rank=2]", adapter=name, **SIZES)
    effzoo.save_adapter(model, tmp_path / name, name=name)
    again = effzoo.build("bert", **SIZES)
    again.load_state_dict({key: value for key, value in model.state_dict().items() if ".adapters." not in key})
    assert list(effzoo.attached(effzoo.load_adapter(again, tmp_path / name))) == [str(name)]


LONG = "a" * 100_000
CALLS = [
    lambda model: effzoo.build("bert", adapter_dtype=LONG), lambda model: effzoo.build(LONG),
    lambda model: effzoo.unmerge(model, LONG),
    lambda model: effzoo.quantise(model, targets=LONG),
    lambda model: effzoo.plan("bert", dtype=LONG, batch=1, length=4),
    lambda model: effzoo.attach(model, LONG), lambda model: effzoo.attach(model, "lora", name=LONG + "-"),
    lambda model: effzoo.load_adapter(model, LONG),
    lambda model: effzoo.convert.from_transformers(LONG), lambda model: effzoo.data.load_text(LONG),
    lambda model: effzoo.load_file(LONG),
    lambda model: effzoo.finetune(model, [LONG], output_dir="nowhere"),
    lambda model: effzoo.activate(model, rows=[LONG]),
    lambda model: effzoo.build("bert", **{LONG: 1}),
    lambda model: effzoo.build("bert", attention={"name": "local", LONG: 1}),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_text_of_any_length_gives_a_message_that_can_be_read(model, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EffzooError) as caught:
        call(model)
    assert len(str(caught.value).split()) > 3 and len(str(caught.value)) < LONGEST + 100
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_long_message_stays():
    said = str(EffzooError(f"got {'x' * 9_000}; try 'y'"))
    assert (
        said.startswith("got xxx")
        and said.endswith("xxx; try 'y'")
        and f" ... ({len('got ; try ') + 3 + 9_000 - LONGEST:,} characters) ... " in said
    )
    assert str(EffzooError("short")) == "short" and str(EffzooError()) == ""


@pytest.mark.parametrize("path", ["\ud800", "a\x00b", "a" * 300, " "])
def test_a_path_that_no_file_system_has_is_a_sentence(model, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [
        effzoo.load_file,
        effzoo.convert.from_transformers,
        effzoo.data.load_text,
        lambda path: effzoo.load_adapter(model, path),
    ]
    calls += [] if path == " " else [lambda path: effzoo.save_adapter(model, path)]
    for call in calls:
        with pytest.raises(EffzooError):
            call(path)


def test_folders_that_are_named_like_texts_are_no_texts(tmp_path):
    for name in ("a/con.txt", "b/x.csv"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(EffzooError, match="has no files that can be read"):
        effzoo.data.load_text(tmp_path)
    (tmp_path / "a/one.txt").write_text("text")
    (tmp_path / "b/two.txt").write_text("more")
    assert sorted(row["text"] for row in effzoo.data.load_text(tmp_path)) == ["more", "text"]


@pytest.mark.parametrize("odd", [np.array(2), torch.tensor(2), np.array([]), np.array(["default"])])
def test_an_array_is_no_list_of_names(model, odd):
    for call in (
        lambda: effzoo.activate(model, "default", train=odd),
        lambda: effzoo.check("lora", only=odd),
        lambda: effzoo.activate(model, rows=odd),
    ):
        with pytest.raises(ArgumentError, match="takes .+ got "):
            call()
    for run in (lambda: effzoo.finetune(model, odd, output_dir="nowhere"), lambda: effzoo.predict(model, odd)):
        with pytest.raises(InputError):
            run()


@pytest.mark.parametrize(
    "scale",
    [1e308, -1e7, float("nan"), float("inf"), "1", True, decimal.Decimal(1), fractions.Fraction(1, 2), 1j, 10**400],
)
def test_a_scale_is_a_number_that_outputs_survive(model, scale):
    for given in (scale, {"default": scale}):
        with pytest.raises((ArgumentError, OptionError), match="activate: scale (takes|is) "):
            effzoo.activate(model, "default", scale=given)
    assert effzoo.status(model).scales == {"default": 1.0}


def test_functions_of_tensors_and_models_say_what_they_read():
    with pytest.raises(InputError, match="flops counts a pass over token ids, which Linear does not read"):
        effzoo.peft.flops(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="at least one part"):
        effzoo.attention.attend()
    with pytest.raises(InputError, match=r"weights are floats, got torch.int64; .float\(\)"):
        effzoo.routing.importance_loss(torch.ones(4, 2).long())
    with pytest.raises(InputError, match=r"weights are \[tokens, experts\]"):
        effzoo.routing.importance_loss(torch.tensor(2.0))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, float])
def test_a_range_has_the_same_ends_for_numbers_of_every_width(kind):
    for annotation, inside, outside in (
        (Positive, 0.5, 0.0),
        (Positive, 6e-8, -6e-8),
        (Number, -2.0, float("inf")),
        (Probability, 0.5, 1.0),
    ):
        assert fits(kind(inside), annotation) and not fits(kind(outside), annotation)
    with pytest.raises(OptionError, match="alpha is above 0, got"):
        effzoo.build("bert", peft={"name": "lora", "alpha": kind(0)}, **SIZES)
