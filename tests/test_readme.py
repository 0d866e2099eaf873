"""The README is true: its code runs, its how-tos pass the checks in at most 15 lines, its figures are those of the tracked results."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effzoo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(tmp_path):
    run = subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "trainable" in run.stdout and (tmp_path / "out/adapter/adapter.json").is_file()
    assert len(PYTHON[0].splitlines()) <= 12


@pytest.mark.parametrize(("code", "kind", "name"), [(PYTHON[1], "attention", "strided"), (PYTHON[2], "peft", "shift")])
def test_what_it_adds_passes_every_check(tmp_path, code, kind, name):
    (tmp_path / "mine.py").write_text(code)
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(body) <= 15
    with effzoo.scope():
        assert effzoo.load_file(tmp_path / "mine.py") == [(kind, name)]
        report = effzoo.check(kind, name)
        assert report.ok, str(report)


def test_the_model_it_adds_builds_and_runs(tmp_path):
    (tmp_path / "mine.toml").write_text(TOML[0])
    assert len(TOML[0].splitlines()) <= 15
    model = effzoo.build(str(tmp_path / "mine.toml"), peft="lora")
    assert model(torch.randint(0, 30522, (1, 100))).last_hidden_state.shape == (1, 100, 256)
    assert [core.reach for core in model.cores()] == [16, 16, 32, 32]


def test_its_table_names_everything_that_is_registered():
    table = README.split("## What is here")[1].split("## ")[0]
    for name in [*effzoo.attention.names(), *effzoo.peft.names(), *effzoo.models()]:
        assert f"`{name}`" in table, name


def test_its_paths_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_its_figures_are_those_of_the_tracked_results():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts/readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert readme.rendered(README) == README, "run python scripts/readme.py"
    assert "| test accuracy |" in README
    benchmarks = (ROOT / "benchmarks/README.md").read_text()
    assert readme.rendered_benchmarks(benchmarks) == benchmarks, "run python scripts/readme.py"
    assert "262,144" in benchmarks and "| 4 | " in benchmarks and "| linformer |" in benchmarks
