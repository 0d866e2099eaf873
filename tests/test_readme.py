"""The README is true: its code runs, its tables and those of the pages are those of the code and of the tracked
results."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import typer

import effzoo
from effzoo.cli import app
from effzoo.lab import DECKS, catalogue

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(tmp_path):
    run = subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "trainable" in run.stdout and (tmp_path / "out/adapter/adapter.json").is_file()
    assert len(PYTHON[0].splitlines()) <= 12


def test_its_table_names_everything_that_is_registered():
    table = README.split("## What is here")[1].split("## ")[0]
    for name in [*effzoo.attention.names(), *effzoo.peft.names(), *effzoo.models()]:
        assert f"`{name}`" in table, name


def test_its_paths_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_tables_are_those_of_the_code_and_of_the_tracked_results():
    readme = loaded()
    for path, rendered in readme.PAGES.items():
        text = (ROOT / path).read_text()
        assert rendered(text) == text, "run python scripts/readme.py"
    assert "| test accuracy |" in README
    benchmarks = (ROOT / "benchmarks/README.md").read_text()
    assert "262,144" in benchmarks and "| [`duplication`]" in benchmarks and "| [`listops`]" in benchmarks


def test_the_pages_of_the_decks_are_those_of_the_tracked_results():
    pages = loaded().lecture_pages()
    assert (
        {*pages}
        == {path.name for path in (ROOT / "benchmarks/lectures").iterdir()}
        == {f"deck-{number}.md" for number in DECKS}
    )
    for name, text in pages.items():
        assert (ROOT / "benchmarks/lectures" / name).read_text() == text, "run python scripts/readme.py"
        for path in re.findall(r"\]\(([\w/.-]+)\)", text):
            assert (ROOT / "benchmarks/lectures" / path).resolve().is_file(), path


def test_every_experiment_was_run_quickly_and_is_on_a_page():
    results = loaded().lab_results()
    assert {*results} == {*catalogue()}, "run effzoo lab NAME --quick --out benchmarks/results/lab"
    for name, result in results.items():
        assert (
            result["quick"]
            and len(result["seeds"]) == 3
            and result["claims"]
            and (ROOT / f"benchmarks/results/lab/{name}/figure.png").is_file()
        )
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
