"""A checked file in a process of its own: wrong numbers are red whatever the file does, and limits hold."""

import ast

import pytest
from slips import ATTENTION, LOW_RANK, WINDOW
from typer.testing import CliRunner

import effzoo
from effzoo.checks.against import read
from effzoo.checks.apart import Limits, foreign, numbers
from effzoo.checks.runner import Failed
from effzoo.cli import app

WRONG = ATTENTION.replace(" / math.sqrt(q.shape[-1])", "")
LORA = "lora[rank=4, alpha=8.0]"


def sent(tmp_path, text, against=WINDOW, **limits):
    file = tmp_path / "mine.py"
    file.write_text(text)
    numbers(file, "mine", read(against), Limits(**limits))


def test_right_numbers_are_accepted_and_the_file_never_runs_here(tmp_path):
    left = "\nimport sys\nsys.ran_here = True\n"
    sent(tmp_path, ATTENTION + left)
    assert not hasattr(__import__("sys"), "ran_here") and "mine" not in effzoo.attention.names()


@pytest.mark.slow
def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(Failed, match="the output is off by"):
        sent(tmp_path, WRONG)
    with pytest.raises(Failed, match="the gradient of k is off by"):
        sent(tmp_path, ATTENTION.replace("q @ k.mT", "q @ k.detach().mT"))


@pytest.mark.slow
def test_a_method_is_compared_with_the_factors_of_the_reference(tmp_path):
    sent(tmp_path, LOW_RANK, LORA)
    sent(tmp_path, LOW_RANK.replace("self.A", "self.down").replace("self.B", "self.up"), LORA)
    with pytest.raises(Failed, match="the output is off by"):
        sent(tmp_path, LOW_RANK.replace("self.alpha / self.rank", "self.alpha"), LORA)


FORGED = """
import json, os, pathlib
import torch, safetensors.torch
place = pathlib.Path.cwd()
asked = json.loads((place / "asked.json").read_text())
(place / "answer.json").write_text(json.dumps({"reports": [], "ok": True}))
given = safetensors.torch.load_file(place / "inputs.safetensors")
out = {key.split(".")[0] + ".the output": torch.zeros_like(x) for key, x in given.items() if key.endswith(".q")}
safetensors.torch.save_file(out, place / "outputs.safetensors")
os._exit(0)
"""
PATCHED = """
from effzoo.checks import against, apart, runner
runner.close = lambda *arguments: None
apart.close = against.close = runner.close
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said", "limits"),
    [
        ("while True:\n    pass\n", "stopped after 8 seconds|ended with -(24|9)", {"seconds": 8}),
        ("import time\ntime.sleep(1000)\n", "stopped after 8 seconds", {"seconds": 8}),
        ("import torch\nx = torch.ones(5 * 2**30)\n", "failed at line 2.*(memory|alloc)", {}),
        ("x = bytearray(20 * 2**30)\n", "failed at line 1.*MemoryError", {}),
        ("import sys\nsys.exit(0)\n", "SystemExit", {}),
        ("import os\nos._exit(0)\n", "ended with 0 and without an answer", {}),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "ended with -11", {}),
        (FORGED, "the output is off by", {}),
        (PATCHED + WRONG, "the output is off by", {}),
    ],
    ids=["loop", "sleep", "20 GiB", "20 GiB of bytes", "exit", "hard exit", "crash", "forged", "patched"],
)
def test_what_a_file_does_in_place_of_the_work_is_no_answer(tmp_path, text, said, limits):
    with pytest.raises(Failed, match=said):
        sent(tmp_path, text, **limits)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import effzoo", "effzoo"),
        ("import os", "os"),
        ("from effzoo.attention import reference", "effzoo.attention.reference"),
        ("from effzoo.attention.longformer import Longformer", "effzoo.attention.longformer.Longformer"),
        ("from effzoo.registry import attention", "effzoo.registry.attention"),
        ("from pathlib import Path", "pathlib.Path"),
        ("x = __import__('os')", "__import__"),
        ("x = open('hidden.toml')", "open"),
        ("x = ().__class__.__base__.__subclasses__()", "__"),
        ("def f(self): return self.dense(1)", "dense"),
    ],
)
def test_the_text_of_a_file_may_name_only_what_a_solution_needs(line, name):
    for solution in (ATTENTION, LOW_RANK):
        foreign(ast.parse(solution))
        with pytest.raises(Failed, match=f"line 1 names {name}"):
            foreign(ast.parse(line + solution))


@pytest.mark.slow
def test_the_command_grades_a_file_apart(tmp_path):
    (tmp_path / "mine.py").write_text(ATTENTION)
    grade = ["check", str(tmp_path / "mine.py"), "--against", WINDOW, "--apart", "--own", "--only", "every_length"]
    grade += ["--only", "is_own_work"]
    done = CliRunner().invoke(app, grade)
    assert done.exit_code == 0 and "compared here" in " ".join(done.output.split()), done.output
    (tmp_path / "mine.py").write_text(WRONG)
    done = CliRunner().invoke(app, [*grade, "--json"])
    assert done.exit_code == 1 and '"first_failure": "equals_reference"' in done.output
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert CliRunner().invoke(app, grade).exit_code == 2
