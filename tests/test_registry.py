"""The registry: names, options, files, scopes, plug-ins."""

import importlib.metadata
import subprocess
import sys

import pytest

import effzoo
from effzoo import registry
from effzoo.attention import AttentionCore, Context
from effzoo.errors import OptionError, UnknownNameError


def test_options_are_the_keyword_only_parameters():
    options = {option.name: option for option in effzoo.peft.options("lora")}
    assert list(options) == ["rank", "alpha", "rslora", "dropout", "init", "tied", "invocation", "targets", "layers"]
    assert options["rank"].default == 8 and not options["rank"].required


def test_unknown_name_gives_the_closest_and_the_known():
    with pytest.raises(
        UnknownNameError,
        match=r"unknown attention 'longfromer'; did you mean 'longformer'\? Known: big_bird, bigbird, blockbert, ",
    ):
        effzoo.attention.get("longfromer")


def test_unknown_option_gives_the_closest_and_the_known():
    with pytest.raises(
        OptionError, match=r"peft 'lora' has no option 'rnak'; did you mean 'rank'\? Options: rank, alpha"
    ):
        effzoo.peft.create("lora[rnak=4]")


@pytest.mark.parametrize("spec", ["lora[rank=big]", "lora[rank=2.5]", "lora[rank=true]", "lora[layers=(a, b)]"])
def test_value_of_the_wrong_type_says_what_is_taken(spec):
    with pytest.raises(OptionError, match=r"option '\w+' of peft '\w+' takes .+, got"):
        effzoo.peft.create(spec)


def test_a_word_that_is_none_of_the_choices_says_the_choices():
    with pytest.raises(OptionError, match="prompt: init is 'vocabulary' or 'text' or 'normal', got 'zero'"):
        effzoo.peft.create("prompt[init=zero]")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lora[rank=0]", "rank is at least 1, got 0"),
        ("lora[dropout=1]", r"dropout is in \[0, 1\), got 1"),
        ("prefix[length=0]", "length is at least 1"),
        ("prompt[length=0]", "length is at least 1"),
        ("houlsby[bottleneck=0]", "bottleneck is at least 1"),
        ("houlsby[activation=swoosh]", "activation is one of"),
    ],
)
def test_value_outside_the_range_says_the_range(spec, said):
    with pytest.raises(OptionError, match=said):
        effzoo.peft.create(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [("longformer[window=3]", "even and positive"), ("longformer[window=(4, 4, 4)]", "3 windows for 2 layers")],
)
def test_attention_options_say_what_is_accepted(spec, said):
    with pytest.raises(OptionError, match=said):
        effzoo.attention.create(spec, Context(heads=2, head_dim=4, layers=2))


def test_hidden_options_are_refused_at_registration():
    with pytest.raises(OptionError, match=r"takes \*\*options, which hides its options"), effzoo.scope():

        @effzoo.attention.register("swallows")
        class Swallows(AttentionCore):
            def __init__(self, context, **options):
                super().__init__(context)


def test_a_name_is_registered_by_one_origin():
    with pytest.raises(OptionError, match="already registered by Full"):
        effzoo.attention.register("full")(AttentionCore)


CELL = """
import effzoo
from effzoo.attention.full import Full

@effzoo.attention.register("cell")
class Mine(Full):
    cost = "n^{power}"
"""


def test_a_cell_or_a_file_that_runs_again_replaces_its_entry_and_no_other(tmp_path):
    file, other = tmp_path / "mine.py", tmp_path / "other.py"
    with effzoo.scope():
        for power in ("2", "3"):  # as a notebook does: the same module, another piece of code
            exec(compile(CELL.format(power=power), f"<cell {power}>", "exec"), {"__name__": "__main__"})
            assert effzoo.attention.get("cell").cost == f"n^{power}"
    with effzoo.scope():
        for power in ("2", "3"):
            file.write_text(CELL.format(power=power))
            assert effzoo.load_file(file) == [("attention", "cell")]
            assert effzoo.attention.get("cell").cost == f"n^{power}"
        other.write_text(CELL.format(power="4"))
        with pytest.raises(OptionError, match="'cell' is already registered by Mine"):
            effzoo.load_file(other)
        file.write_text(CELL.format(power="5") + "\nundefined")
        with pytest.raises(OptionError, match="NameError"):
            effzoo.load_file(file)
        assert effzoo.attention.get("cell").cost == "n^3"


def test_file_registers_inside_a_scope_and_is_gone_after_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from effzoo.attention import full, register\n\n@register('mine', 'my_alias')\nclass "
        "Mine(full.Full):\n    pass\n"
    )
    with effzoo.scope():
        assert effzoo.load_file(file) == [("attention", "mine"), ("attention", "my_alias")]
        assert effzoo.attention.aliases("mine") == ["my_alias"] and "mine" in effzoo.attention.names()
    assert "mine" not in effzoo.attention.names()


@pytest.mark.parametrize(
    ("text", "said"), [("import nothing_of_this_name", "ModuleNotFoundError"), ("1 +", "SyntaxError")]
)
def test_a_file_that_fails_says_how(tmp_path, text, said):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(OptionError, match=rf"bad.py failed( at line 1)? while it was imported: {said}"):
        effzoo.load_file(tmp_path / "bad.py")
    with pytest.raises(OptionError, match="no such file"):
        effzoo.load_file(tmp_path / "absent.py")


def test_plug_ins_are_found_by_entry_point(monkeypatch, caplog):
    class Point:
        def __init__(self, name, load):
            self.name, self.value, self.load = name, f"{name}:it", load

    def works():
        effzoo.attention.register("plugged")(type("Plugged", (effzoo.attention.full.Full,), {}))

    def breaks():
        raise RuntimeError("broken plug-in")

    monkeypatch.setattr(registry, "_entry_points_loaded", False)
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [Point("bad", breaks), Point("good", works)] if group == "effzoo.plugins" else [],
    )
    assert effzoo.attention.get("plugged").name == "plugged"
    assert "plug-in 'bad'" in caplog.text


def test_importing_effzoo_imports_no_heavy_library():
    heavy = ("transformers", "datasets", "accelerate", "xformers", "matplotlib", "typer", "peft")
    code = f"import sys, effzoo; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


FIRST_USES = {"a scope": "with effzoo.scope(): effzoo.peft.names()", "a file that fails": "effzoo.load_file('mine.py')"}


@pytest.mark.parametrize("use", FIRST_USES.values(), ids=FIRST_USES)
def test_the_zoo_stays_whatever_uses_it_first(use, tmp_path):
    (tmp_path / "mine.py").write_text("import effzoo; effzoo.peft.names(); effzoo.attention.names(); 1 / 0")
    code = (
        f"import effzoo\ntry:\n    {use}\nexcept effzoo.EffzooError:\n    pass\n"
        "print({'lora'} <= set(effzoo.peft.names()), {'full'} <= set(effzoo.attention.names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "True True"


def test_an_annotation_that_names_nothing_is_a_sentence():
    with effzoo.scope():

        @effzoo.peft.register("names_nothing")
        class NamesNothing(effzoo.peft.Method):
            def __init__(self, *, k: "Nope" = 1):  # noqa: F821
                super().__init__()

            def make(self, site):
                return None

        for use in (
            lambda: effzoo.peft.create("names_nothing"),
            lambda: effzoo.peft.options("names_nothing"),
            lambda: NamesNothing(k=2),
        ):
            with pytest.raises(OptionError, match="NamesNothing names 'Nope', which its module does not have"):
                use()


def test_a_method_whose_constructor_calls_no_parent_has_the_default_targets(tiny):
    with effzoo.scope():

        @effzoo.peft.register("plain_shift")
        class PlainShift(effzoo.peft.Method):
            default_targets = ("attn.q",)

            def __init__(self, *, k: float = 1.0):
                self.k = k

            def make(self, site):
                return effzoo.peft.create("lora").make(site)

        model = effzoo.build("bert", peft="plain_shift[k=2]", **tiny)
        assert {role for _, role in effzoo.attached(model)["default"].places["plain_shift"]} == {"attn.q"}
