"""The README is true: its code runs, its how-tos pass the checks in at most 15 lines, its figures are those of the tracked results."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer

import effzoo
from effzoo.cli import app
from effzoo.lab import DECKS, catalogue

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
    readme = loaded()
    assert readme.rendered(README) == README, "run python scripts/readme.py"
    assert "| test accuracy |" in README
    benchmarks = (ROOT / "benchmarks/README.md").read_text()
    assert readme.rendered_benchmarks(benchmarks) == benchmarks, "run python scripts/readme.py"
    assert "262,144" in benchmarks and "| 4 | " in benchmarks and "| linformer |" in benchmarks


def test_the_pages_of_the_decks_are_those_of_the_tracked_results():
    pages = loaded().lecture_pages()
    assert {*pages} == {path.name for path in (ROOT / "benchmarks/lectures").iterdir()} == {f"deck-{number}.md" for number in DECKS}
    for name, text in pages.items():
        assert (ROOT / "benchmarks/lectures" / name).read_text() == text, "run python scripts/readme.py"
        for path in re.findall(r"\]\(([\w/.-]+)\)", text):
            assert (ROOT / "benchmarks/lectures" / path).resolve().is_file(), path


def test_every_experiment_was_run_quickly_and_is_on_a_page():
    results = loaded().lab_results()
    assert {*results} == {*catalogue()}, "run effzoo lab NAME --quick --out benchmarks/results/lab"
    for name, result in results.items():
        assert result["quick"] and len(result["seeds"]) == 3 and result["claims"] and (ROOT / f"benchmarks/results/lab/{name}/figure.png").is_file()
        for deck in catalogue()[name].decks:
            assert f"## {name}\n" in (ROOT / f"benchmarks/lectures/deck-{deck}.md").read_text()


def test_the_commands_of_the_slides_exist():
    commands = {command.name: command for command in typer.main.get_group(app).commands.values()}
    known = {*effzoo.models(), *effzoo.attention.names(), *effzoo.peft.names(), *effzoo.routing.names()}
    for deck in tomllib.loads((ROOT / "benchmarks/lectures.toml").read_text())["deck"]:
        for run in (run for slide in deck["slide"] for run in slide["run"]):
            program, command, *rest = run.split()
            assert program == "effzoo" and command in commands, run
            assert command != "lab" or rest[0] in catalogue(), run
            assert command != "show" or rest[0] in known, run
        for slide in deck["slide"]:
            assert (ROOT / slide["code"]).is_file(), slide["code"]


def loaded():
    """scripts/readme.py."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts/readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    return readme
