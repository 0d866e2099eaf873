"""The command line: what a newcomer sees, what goes wrong in one message, and what stays out of the imports."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import effzoo
import effzoo.plots
from effzoo.attention.core import Mask
from effzoo.cli import app, describe
from effzoo.cli.describe import meaning
from effzoo.cli.terminal import COMMANDS

MINE = '''
from effzoo.attention import register
from effzoo.attention.full import Full
from effzoo.peft import register as register_method
from effzoo.peft.parameter.lora_everywhere import LoRAEverywhere


@register("mine", "also_mine")
class Mine(Full):
    """Full attention{comment}."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k, v, mask={mask}, memory=memory)


@register_method("my_lora")
class MyLoRA(LoRAEverywhere):
    """LoRA under another name."""
'''


@pytest.fixture
def run(monkeypatch):
    """Run the command line with a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments: str, code: int = 0):
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return invoke


def flat(text: str) -> str:
    return " ".join(text.split())


def test_help_lists_the_commands_in_the_order_in_which_a_newcomer_needs_them(run):
    text = run("--help").output
    places = [text.index(f"│ {command} ") for command in COMMANDS]
    assert places == sorted(places)
    assert "effzoo models" in text and '"longformer[window=256]"' in text


@pytest.mark.parametrize("command", (*COMMANDS, "bench scaling", "bench finetune"))
def test_the_help_of_every_command_has_an_example_and_explains_every_option(run, command):
    shown = run(*command.split(), "--help").output
    text = flat(shown)
    assert f"Example: effzoo {command}" in text
    assert "\\[" not in text
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_models_lists_every_model_with_its_size(run):
    lines = {line.split()[0]: flat(line) for line in run("models").output.splitlines() if line.strip()}
    assert set(effzoo.models()) < set(lines)
    # the published BERT base, with its pooler
    assert "encoder 109,482,240 full 512 Devlin et al. 2019" in lines["bert"]
    assert "decoder 124,439,808 full 1,024" in lines["gpt2"]  # the published GPT-2 small
    assert "longformer 4,096" in lines["longformer"]
    assert "encoder 149,014,272 full, longformer 8,192" in lines["modernbert"]


def test_models_are_a_line_each_in_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("models").output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[1:-2]] == effzoo.models()
    assert "7,110,660,096" in next(line for line in lines if line.startswith("mistral"))


@pytest.mark.slow
def test_attention_and_peft_list_every_entry(run):
    attention, peft = run("attention").output, run("peft").output
    assert all(f"\n{name} " in attention for name in effzoo.attention.names())
    assert all(f"\n{name} " in peft for name in effzoo.peft.names())
    assert "294,912 0.269 % yes" in flat(peft)  # LoRA of rank 8 on q and v of BERT base: 2 * 12 * 2 * 768 * 8


def test_show_gives_every_meaning_of_a_name(run):
    text = run("show", "longformer").output
    assert "longformer, a model" in text and "longformer, an attention kind" in text
    assert "allenai/longformer-base-4096" in text and "arXiv:2004.05150" in text
    assert "a fine-tuning method" in run("show", "full").output and "an attention kind" in run("show", "full").output


def test_show_tells_options_with_type_default_and_meaning(run):
    text = flat(run("show", "lora").output)
    assert "rslora bool false scale alpha / sqrt(rank)" in text
    assert "dropout float (in [0, 1)) 0.0 on the input of A" in text
    assert "targets str or a list of str or none none role patterns such as" in text  # from the parent's docstring
    assert (
        "hangs on attn.q*, attn.v* by default (Linear, Embedding, Conv2d, TiedLinear sites)" in text
        and ("hooks after (function)") in text
    )
    assert "merges yes" in text and "leaves the output unchanged" in text
    assert "also called prefix_tuning" in flat(run("show", "prefix").output)
    assert "memory (input)" in flat(run("show", "prefix_tuning").output)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*effzoo.models(), *effzoo.attention.names(), *effzoo.peft.names()])
def test_every_entry_can_be_shown_and_gives_every_option_a_meaning(run, name):
    text = run("show", name).output
    for view in (effzoo.attention, effzoo.peft):
        if name in view.names():
            assert [option.name for option in view.options(name) if not meaning(view.get(name), option.name)] == []
    assert "paper" in text


TINY_MODEL = """
layout = "bert"
architecture = "encoder"
vocab = 53
dim = 64
layers = 2
heads = 4
mlp = 128
max_length = 256
types = 2
"""


@pytest.mark.slow
def test_the_survey_counts_its_methods_on_a_model(run, tmp_path):
    (tmp_path / "mine.toml").write_text(TINY_MODEL)
    result = run("account", str(tmp_path / "mine.toml"), "--survey")
    text = flat(result.output)
    assert result.exit_code == 0 and "arXiv:2303.15647v1" in text
    lora = 2 * 2 * 2 * 64 * 8 * 2 / 2  # two layers, q and v, A and B of rank 8
    total = sum(p.numel() for p in effzoo.build(str(tmp_path / "mine.toml")).parameters())
    assert f"lora {100 * lora / total:.3g} = 0.01-0.5" in text and "lora: merged, every entry of q and v" in text
    diff = next(line.split() for line in result.output.splitlines() if line.startswith("diff "))
    assert float(diff[1]) > 150 and float(diff[2]) < 100 and diff[-1] == "<1B"  # values and gates; values alone
    assert "leave --peft out" in run("account", "bert", "--survey", "--peft", "lora", code=2).stderr


def test_the_matrix_marks_what_works_and_says_why_something_is_refused(run, tmp_path):
    result = run(
        "matrix", "--method", "lora", "--method", "pals", "--attention", "full", "--save", str(tmp_path / "cells.json")
    )
    text = flat(result.output)
    assert result.exit_code == 0 and "lora +++++" in text and "pals +-+-+" in text and "need a cache of its own" in text
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert len(cells) == 10 and {cell["status"] for cell in cells} == {"works", "refused"}
    assert "did you mean 'lora'" in run("matrix", "--method", "lorra", code=2).stderr


def test_the_matrix_fails_with_a_broken_method(run, tmp_path):
    (tmp_path / "broken.py").write_text(
        "import torch\nfrom effzoo.peft import Method, PeftModule, register\nfrom effzoo.sites import Linear\n"
        "class Silent(PeftModule):\n    def __init__(self):\n        super().__init__()\n        self.unused = "
        "torch.nn.Parameter(torch.zeros(3))\n"
        "@register('silent')\nclass SilentMethod(Method):\n    'Does nothing.'\n    accepts, default_targets = "
        "(Linear,), ('attn.q*',)\n"
        "    def make(self, site):\n        return Silent()\n"
    )
    result = run("matrix", "--method", "silent", "--attention", "full", "--file", str(tmp_path / "broken.py"), code=1)
    assert "FAILS: silent on full, encoder" in result.output and "no gradient (None)" in flat(result.output)


def test_show_draws_the_pattern_and_saves_it(run, tmp_path):
    text = run("show", "longformer[window=8]", "--n", "32", "--causal", "--save", str(tmp_path / "p.png")).output
    assert (
        effzoo.plots.pattern_text("longformer[window=8]", 32, is_global=(0,), causal=True).splitlines()[5].rstrip()
        in text
    )
    assert "32 queries (down) x 32 keys (across)" in text and "a model" not in text
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_account_counts_without_weights(run):
    text = flat(
        run(
            "account", "bert", "--peft", "lora[rank=4]|ia3", "--attention", "longformer[window=64]", "--num-labels", "3"
        ).output
    )
    assert "bert with longformer[window=64] attention, lora[rank=4]|ia3" in text
    assert (
        "lora attn.q_global 12 sites" in text
        and "ia3 mlp.down 12 sites 36,864" in text
        and ("head head.out 1 site 2,307") in text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "longfromer"), "unknown name 'longfromer'; did you mean 'longformer'?"),
        (("show", "longformer[windw=4]"), "has no option 'windw'; did you mean 'window'?"),
        (("show", "longformer[window=3]"), "even and positive"),
        (("show", "bert[dim=3]"), "takes no options in its name"),
        (("show", "lora", "--save", "a.png"), "no attention kind"),
        (("show", "full", "--save", "a.pdf"), "ends in .png"),
        (("account", "brt"), "did you mean 'bert'?"),
        (("account", "bert", "--peft", "lora[rank=4"), "expected ',' or ']'"),
        (("account", "bert", "--peft", "lora[targets=attn.x]"), "matches no role"),
        (("account", "none.toml"), "cannot be read"),
        (("check", "nothing.py"), "no such file: 'nothing.py'; give a Python file"),
        (("check", "lorra"), "did you mean 'lora'?"),
        (("check", "full", "--only", "padding"), "unknown check 'padding'"),
        (("finetune", "bert", "--data", "none.csv", "--output", "out"), "no such file"),
        (("finetune", "bert", "--data", "none.csv", "--output", "out", "--holdout", "2"), "between 0 and 1"),
    ],
)
def test_a_mistake_is_one_red_message_without_traceback_and_exit_code_2(run, arguments, message):
    result = run(*arguments, code=2)
    assert flat(message) in flat(result.output) and result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_debug_anywhere_on_the_line_lets_the_exception_through(run):
    for arguments in (("--debug", "account", "brt"), ("account", "brt", "--debug")):
        assert isinstance(CliRunner().invoke(app, arguments).exception, effzoo.EffzooError)


@pytest.mark.slow
def test_check_of_a_sound_file_is_green(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment="", mask="mask"))
    text = run("check", str(file)).output
    assert "attention mine" in text and "peft my_lora" in text and "everything holds" in text
    assert "RED" not in text and "also_mine" not in text
    assert "mine" not in effzoo.attention.names()


def test_check_of_a_broken_file_names_the_property_and_exits_with_1(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment=" that forgets padding [sic]", mask="type(mask)()"))
    text = run("check", str(file), "--only", "padding_is_invisible", "--only", "attaches", code=1).output
    assert "RED What stands under padding changes nothing, and gets no gradient (padding_is_invisible)" in flat(text)
    assert "output at tokens after other values were put under the padding is off by" in flat(text)
    assert "attention mine: the contract is broken" in text


@pytest.mark.slow
def test_the_first_failure_is_explained_what_happened_the_likely_cause_and_how_to_see_it(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment="", mask="type(mask)()"))
    text = run("check", str(file), code=1).output
    first = flat(text[text.index("the first failure") :])
    assert first.startswith(
        "the first failure, is_no_known_slip what happened the output equals that of its definition"
    )
    assert "with padding seen: mask.valid is not used" in first
    assert (
        "likely cause mask.valid is True at tokens" in first and "how to see it Take the line of the formula" in first
    )
    assert "this alone effzoo check" in first and "--only is_no_known_slip" in first


NO_DEFINITION = '''
from effzoo.attention import AttentionCore, Part, memory_part, register

@register("nodef")
class NoDef(AttentionCore):
    """softmax(q k^T / sqrt(d)) v, with the scale forgotten and no `pattern`."""
    cost = "n^2"
    def forward(self, q, k, v, *, mask, memory=None):
        bias = mask.key_bias(q.dtype)
        return self.attend(Part(q, k, v, bias, causal=self.context.causal, scale=1.0), memory_part(q, memory))
'''


@pytest.mark.slow
def test_a_kind_without_a_definition_is_not_verified_and_the_exit_code_says_so(run, tmp_path):
    file = tmp_path / "nodef.py"
    file.write_text(NO_DEFINITION)
    text = run("check", str(file), code=4).output
    assert "RED" not in text and text.splitlines()[-1] == "not verified: nothing to compare with"
    assert json.loads(run("check", str(file), "--json", code=4).output)["verified"] is False


def test_a_file_of_ones_own_is_shown_counted_and_planned(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment="", mask="mask"))
    for _ in range(2):  # nothing of the file is left behind
        assert "12 queries" in run("show", "mine", "--n", "12", "--file", str(file)).output
        assert "my_lora" in run("account", "bert", "--peft", "my_lora", "--file", str(file)).output
        arguments = ("--attention", "mine", "--length", "8", "--file", str(file))
        assert "parameters are trained" in run("plan", "bert", *arguments).output
    assert "mine" not in effzoo.attention.names()
    assert "no such file" in run("show", "mine", "--file", "absent.py", code=2).output


def test_json_is_one_document_that_a_grader_can_read(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment="", mask="type(mask)()"))
    found = json.loads(
        run("check", str(file), "--json", "--only", "padding_is_invisible", "--only", "attaches", code=1).output
    )
    assert not found["ok"] and [report["subject"] for report in found["reports"]] == ["mine", "my_lora"]
    assert [report["first_failure"] for report in found["reports"]] == ["padding_is_invisible", None]
    (red,) = found["reports"][0]["checks"]
    assert (
        red["status"] == "red"
        and not red["ok"]
        and red["reason"] == f"{red['happened']}; {red['cause']}"
        and red["seconds"] > 0
    )
    sound = json.loads(run("check", "full", "--json", "--only", "declares_itself").output)
    assert sound["ok"] and all(check["status"] == "green" for report in sound["reports"] for check in report["checks"])


def test_a_crash_shows_the_end_of_its_traceback(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment="", mask="missing"))
    text = run("check", str(file), "--only", "shape_and_dtype", code=1).output
    assert "how to see it  the traceback below" in text and text.rstrip().splitlines()[-3].startswith("NameError")


def test_a_crash_in_a_checked_file_names_its_line(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(comment="", mask="missing"))
    text = flat(run("check", str(file), "--only", "shape_and_dtype", code=1).output).replace(" ", "")
    assert (
        "NameError:name'missing'isnotdefined" in text
        and f"mine.py:{MINE[: MINE.index('return')].count(chr(10)) + 1}in" in text
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", '@register("mine")'),
        ("import sys\nsys.exit()", "failed at line 2 while it was imported: SystemExit"),
        ("x = 1\n\nundefined", "failed at line 3 while it was imported: NameError"),
        ("def", "SyntaxError"),
        (
            "from effzoo.attention import register, full\n@register('full')\nclass Mine(full.Full): pass",
            "already registered by Full; choose another name",
        ),
    ],
)
def test_a_file_that_registers_nothing_is_an_error_that_says_what_to_do(run, tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    assert flat(message) in flat(run("check", str(tmp_path / "mine.py"), code=2).output)


def test_a_registered_name_is_checked_in_every_kind_that_has_it(run):
    text = run("check", "full", "--only", "declares_itself").output
    assert "attention full" in text and "peft full" in text
    assert "checked as lora[rank=2]" in run("check", "lora[rank=2]", "--only", "merges").output


def test_a_bug_is_told_as_a_bug_without_traceback(run, monkeypatch):
    monkeypatch.setattr("effzoo.zoo.models", lambda: 1 / 0)
    result = run("models", code=3)
    assert (
        "ZeroDivisionError" in result.output
        and "--debug shows where" in result.output
        and "Traceback" not in result.output
    )


def effzoo_command() -> str:
    return str(Path(sys.executable).with_name("effzoo"))


@pytest.mark.slow
def test_the_installed_command_works_and_wrong_usage_exits_with_2(tmp_path):
    shown = subprocess.run([effzoo_command(), "show", "gpt2"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "124,439,808" in shown.stdout and not shown.stderr
    wrong = subprocess.run(
        [effzoo_command(), "account", "bert", "--pfet", "lora"], cwd=tmp_path, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "No such option" in wrong.stderr and "Traceback" not in wrong.stderr


def test_commands_have_the_help_that_the_list_says(run):
    """The list is written out, since it is shown before the modules of the commands are imported."""
    for name, (_, says) in COMMANDS.items():
        assert says in flat(run(name, "--help").output)


def test_versions_are_shown(run):
    assert run("--version").output.startswith(
        f"effzoo {effzoo.__version__}, torch {importlib.metadata.version('torch')}, "
    )


def test_a_name_is_suggested_for_a_command_that_is_not_there(run):
    assert "Did you mean 'finetune'" in run("finetunee", code=2).output


def test_help_needs_neither_torch_nor_transformers():
    program = """
import sys
from typer.testing import CliRunner
from effzoo.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert "torch" not in sys.modules
assert CliRunner().invoke(app, ["finetune", "--help"]).exit_code == 0
heavy = {"transformers", "datasets", "accelerate", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_looking_around_imports_neither_transformers_nor_datasets(tmp_path):
    (tmp_path / "mine.py").write_text(MINE.format(comment="", mask="mask"))
    program = f"""
import sys
from typer.testing import CliRunner
from effzoo.cli import app
from effzoo.attention.core import Mask
from effzoo.cli import describe
from effzoo.cli.describe import meaning
for line in (["models"], ["show", "longformer"], ["peft"], ["account", "bert", "--peft", "lora"],
             ["check", {str(tmp_path / "mine.py")!r}, "--only", "declares_itself"], ["finetune", "--help"]):
    assert CliRunner().invoke(app, line).exit_code == 0, line
heavy = {{"transformers", "datasets", "accelerate", "matplotlib", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_routers_are_listed_and_shown():
    listed = CliRunner().invoke(app, ["routers"])
    assert listed.exit_code == 0 and all(name in listed.output for name in effzoo.routing.names())
    shown = CliRunner().invoke(app, ["show", "switch"])
    assert (
        shown.exit_code == 0
        and "a router" in shown.output
        and "capacity" in shown.output
        and "2101.03961" in shown.output
    )
    together = CliRunner().invoke(app, ["show", "expert_choice"])
    assert "not in a causal language model" in " ".join(together.output.split())


def test_show_account_and_plan_take_folders(run, tmp_path):
    """Of a saved model and of a checkpoint of transformers."""
    small = {"layers": 1, "dim": 16, "heads": 2, "mlp": 16, "vocab": 60, "max_length": 32}
    model = effzoo.build("bert", task="classification", num_labels=3, peft="lora", **small)
    ours = str(effzoo.save(model, tmp_path / "ours", labels=["a", "b", "c"]))
    theirs = str(tmp_path / "theirs")
    effzoo.convert.to_transformers(effzoo.build("bert", task="masked_lm", **small)).save_pretrained(theirs)
    shown = flat(run("show", ours).output)
    assert "labels a, b, c" in shown and "lora attn.q 1 site 256" in shown and "max_length 32" in shown
    assert "task masked_lm" in flat(run("show", theirs).output)
    counted = run("account", ours).output
    assert "attention, default" in counted and str(effzoo.account(model)).splitlines()[0] in counted
    assert "prefix" in run("account", theirs, "--peft", "prefix").output
    for folder, method in ((ours, ()), (theirs, ("--peft", "lora"))):
        assert "parameters are trained" in run("plan", folder, *method, "--length", "16").output
    assert "has no config.json" in run("show", str(tmp_path), code=2).stderr


def test_show_gives_the_dimensions_of_the_attention_matrix_and_of_the_output(run):
    assert "n x k, as E K and F V are k x d; output n x d (of a head)" in flat(run("show", "linformer").output)
    n = 48
    drawn = {
        "full": ("full", n), "local": ("local[chunk=4, look_forward=1]", 12), "longformer": ("longformer[window=8]", 9),
        "blockwise": ("blockwise[blocks=3]", n // 3),
    }  # fmt: skip
    assert set(describe.MATRICES) == set(effzoo.attention.names())
    for name, (spec, keys) in drawn.items():  # of a query in the middle, as the kind's own pattern has it
        assert int((effzoo.plots.pattern(spec, n)[n // 2] > 0).sum()) == keys, name
    tiny = {"dim": 16, "heads": 2, "layers": 1, "mlp": 16, "vocab": 20, "max_length": n}
    for spec, rows in (("linformer[k=5]", 5), ("perceiver[latents=7]", 7)):
        (core,) = effzoo.build("bert", attention=spec, **tiny).cores()
        keys, values, _ = core.compressed(*torch.randn(2, 1, 2, n, 8), Mask())
        assert keys.shape[-2:] == values.shape[-2:] == (rows, 8), spec
    of = {"n^2": "n x n", "n * window": "n x window", "n^2 / blocks": "n x n / blocks", "n log n": "n x log n"}
    for cost, matrix in of.items():
        mine = type("Mine", (), {"name": "mine", "cost": cost})
        assert describe.dimensions(mine) == f"{matrix}; output n x d", cost
