"""Model files: read anew each time, checked as the keywords of `build` are, and never a way to run code."""

import os
import sys
from pathlib import Path

import pytest

import effzoo
from effzoo.errors import ArgumentError, ConversionError, OptionError, UnknownNameError

SIZES = {
    "layout": '"bert"',
    "architecture": '"encoder"',
    "vocab": 50,
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "mlp": 32,
    "max_length": 64,
}
NUMBERS = {key: value for key, value in SIZES.items() if isinstance(value, int)}
PACKAGES = [
    "helper.x/y",
    "helper/../../elsewhere",
    "helper//etc",
    "../helper/x",
    "helper/link",
    "",
    "__main__/x",
    "helper\0/x",
]


def write(path, **values):
    path.write_text("\n".join(f"{key} = {value}" for key, value in {**SIZES, **values}.items()) + "\n")
    return path


def test_a_file_is_read_each_time_wherever_its_relative_path_leads(tmp_path, monkeypatch):
    for folder, layers in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "mine.toml", layers=layers)
    found = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        found.append(effzoo.zoo.config("mine.toml").layers)
    write(tmp_path / "b" / "mine.toml", layers=4)
    os.utime("mine.toml", (0, 0))
    assert [*found, effzoo.zoo.config("mine.toml").layers, effzoo.zoo.config(Path("../a/mine.toml")).layers] == [
        2,
        3,
        4,
        2,
    ]
    (tmp_path / "b" / "mine.toml").unlink()
    with pytest.raises(OptionError, match=r"mine\.toml cannot be read as TOML: there is no such file"):
        effzoo.zoo.config("mine.toml")


WRONG = [
    ("dim", '"16"', "16"), ("dim", "16.0", 16.0), ("heads", "true", True), ("layers", "true", True),
    ("layers", "1_000_000_000", 10**9),
    ("dim", "9" * 40, int("9" * 40)), ("dropout", '"0.1"', "0.1"), ("dropout", "nan", float("nan")),
    ("dropout", "1.0", 1.0),
    ("eps", "-1.0", -1.0), ("eps", "inf", float("inf")), ("eps", "0", 0), ("tied", '"false"', "false"),
    ("attn_bias", "0", 0),
    ("pad_token", "-5", -5), ("kv_heads", "-1", -1), ("types", "-1", -1), ("mlp_chunk", "-1", -1),
    ("position_offset", "-1", -1),
    ("activation", '"swoosh"', "swoosh"), ("activation", "[1]", [1]), ("norm", '"mid"', "mid"),
    ("backend", '"cuda"', "cuda"),
    ("axial_shape", '"x"', "x"), ("axial_shape", "[0, -1]", [0, -1]), ("rotary_theta", "-3.0", -3.0),
    ("rotary_theta", "nan", float("nan")),
    ("mlp", "1979-05-27", __import__("datetime").date(1979, 5, 27)), ("pooler", "{a = 1}", {"a": 1}),
    ("embed_norm", "1", 1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "written", "value"), WRONG, ids=[f"{key}={written[:9]}" for key, written, _ in WRONG])
def test_a_wrong_value_is_refused_in_a_file_as_in_a_keyword_and_in_a_config(tmp_path, key, written, value):
    file = write(tmp_path / "mine.toml", **{key: written})
    for refused in (
        lambda: effzoo.zoo.config(file),
        lambda: effzoo.build(write(tmp_path / "good.toml"), **{key: value}),
        lambda: effzoo.architectures.Config("x", "encoder", "bert", **{**NUMBERS, key: value}),
    ):
        with pytest.raises(OptionError, match=key):
            refused()


def test_repeated_values_are_checked_before_they_are_repeated(tmp_path):
    file = write(tmp_path / "mine.toml")
    file.write_text(file.read_text() + "[repeat]\nattention = ['full', 'local']\n")
    assert effzoo.zoo.config(file, layers=3).attention == ("full", "local", "full")
    with pytest.raises(OptionError, match="layers"):
        effzoo.zoo.config(file, layers=10**12)
    file.write_text(file.read_text().replace("[repeat]", "[repeat]\nrotary_theta = ['x']"))
    with pytest.raises(OptionError, match="rotary_theta takes"):
        effzoo.zoo.config(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "cannot be read as TOML: 'utf-8' codec"),
        (b"layers = = 2", "Invalid value"),
        (b"a = " + b"[" * 50_000, "cannot be read as TOML"),
        (b"#" * 1_000_001, "has 1,000,001 bytes"),
        (b"layers = 2\nlayers = 3", "overwrite"),
        (b"layres = 2", "unknown key 'layres'; did you mean 'layers'"),
        (b"architecture = ['encoder']", "lacks"),
        (b"", "lacks architecture, layout, vocab"),
        (b"repeat = 3", r"\[repeat\] is a table of lists"),
    ],
    ids=range(9),
)
def test_what_is_no_model_file_is_refused_with_a_sentence(tmp_path, content, said):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(OptionError, match=said):
        effzoo.build(tmp_path / "mine.toml")


def test_what_is_no_file_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("folder.toml", "pipe.toml"):
        with pytest.raises(OptionError, match="it is no file"):
            effzoo.build(tmp_path / name)
    with pytest.raises(
        OptionError, match=r"ends in \.toml, got 'bert'; the zoo's own model is effzoo\.build\('bert'\)"
    ):
        effzoo.build(Path("bert"))
    with pytest.raises(OptionError, match="cannot be read as TOML: "):
        effzoo.build("a\0.toml")
    with pytest.raises(UnknownNameError, match="unknown model 'brt'; did you mean"):
        effzoo.build("brt")
    with pytest.raises(ArgumentError, match="name takes str or Path or none, got 3"):
        effzoo.build(3)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_in_a_file_runs_no_code_and_leads_nowhere_else(tmp_path, monkeypatch, package):
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (tmp_path / "path" / "helper").mkdir(parents=True)
    (tmp_path / "path" / "helper" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "path" / "helper" / "link").symlink_to(tmp_path / "elsewhere")
    file = write(tmp_path / "mine.toml", package=f'"{package}"'.replace("\0", "\\u0000"))
    with pytest.raises(ConversionError):
        effzoo.build(file, pretrained=True)
    assert not (tmp_path / "ran").exists() and "helper" not in sys.modules


def test_the_folder_of_an_undotted_package_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "holder" / "model").mkdir(parents=True)
    (tmp_path / "holder" / "__init__.py").write_text("raise SystemExit\n")
    (tmp_path / "holder" / "model" / "config.json").write_text("{}")
    config = effzoo.zoo.config(write(tmp_path / "mine.toml", package='"holder/model"'))
    assert effzoo.convert.source_of(config) == str(tmp_path / "holder" / "model")
    assert "holder" not in sys.modules
