"""The README is true: its code runs, its tables and those of the pages are those of the code and of the tracked
results."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

import effzoo
from effzoo.cli import app
from effzoo.lab import DECKS, catalogue
from effzoo.spec import parse_one

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
    assert "| TF-IDF |" in README and "the 95 % interval" in README
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


def test_every_experiment_was_run_and_is_on_a_page():
    results = loaded().lab_results()
    assert {*results} == {*catalogue()}, "run effzoo lab NAME --out benchmarks/results/lab"
    for name, result in results.items():
        assert result["claims"] and (ROOT / f"benchmarks/results/lab/{name}/figure.png").is_file()
        assert not result["quick"] and len(result["seeds"]) >= 5, name
        for deck in catalogue()[name].decks:
            assert f"## {name}\n" in (ROOT / f"benchmarks/lectures/deck-{deck}.md").read_text()


SLIDES = [
    slide for deck in tomllib.loads((ROOT / "benchmarks/lectures.toml").read_text())["deck"] for slide in deck["slide"]
]
COMMANDS = sorted({command for slide in SLIDES for command in slide["run"]})
RUN_ELSEWHERE = ("lab", "bench")  # each experiment and suite has tests of its own; here their command lines are read
QUICK = ("effzoo account bert --peft lora", "effzoo plan gpt2 --peft lora --length 512", "effzoo routers")
PLACEHOLDER = re.compile(r"\.\.\.|\b(NAME|SPEC|FILE|FOLDER|MODEL|DATA|[A-Z]+_[A-Z_]+)\b")


def parsed(command):
    """The command's parameters as the command line reads them; click raises where a person would get exit code 2."""
    program, *words = shlex.split(command)
    assert program == "effzoo", command
    group, context = typer.main.get_group(app), None
    while isinstance(group, click.Group):
        name, *words = words
        assert name in group.commands, f"{command}: no command {name}"
        group = group.commands[name]
    context = group.make_context(group.name, list(words))
    return context.params


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(each, marks=() if each.startswith(("effzoo lab", "effzoo bench", *QUICK)) else pytest.mark.slow)
        for each in COMMANDS
    ],
)
def test_the_commands_of_the_slides_run(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    if command.split()[1] in RUN_ELSEWHERE:
        parsed(command)
        return
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0 and done.output.strip(), (done.output, done.exception)
    assert all(len(line) <= 80 for line in done.output.splitlines())


def test_every_slide_has_a_command_and_a_file_to_read():
    assert all(slide["run"] and slide["topic"] for slide in SLIDES)
    for slide in SLIDES:
        assert (ROOT / slide["code"]).is_file(), slide["code"]


def test_every_command_on_the_pages_and_in_the_help_is_one_that_the_command_line_reads():
    """`effzoo ...` between backticks, and the examples of the help; with a placeholder in it, its options alone."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    found = {each for page in pages for each in re.findall(r"`(effzoo [a-z][^`\n]*)`", page.read_text())}
    for source in (ROOT / "effzoo/cli").glob("*.py"):
        found |= {
            each.replace("\\\\", "") for each in re.findall(r"Example: +(effzoo .+)$", source.read_text(), re.MULTILINE)
        }
    known = {*effzoo.models(), *effzoo.attention.names(), *effzoo.peft.names(), *effzoo.routing.names()}
    assert len(found) > 60 and "effzoo account bert --survey" in found
    for command in sorted(found):
        try:
            name = parsed(command).get("name")
            entries = {"show": known, "lab": {*catalogue(), "all"}}.get(command.split()[1])
            assert name is None or entries is None or PLACEHOLDER.search(name) or parse_one(name).name in entries, (
                command
            )
        except click.MissingParameter:
            assert PLACEHOLDER.search(command) or len(command.split()) == 2, command
        except click.UsageError as error:
            raise AssertionError(f"{command}: {error.format_message()}") from error


@pytest.mark.parametrize(("ours", "same"), [("peft", "METHODS"), ("attention", "KINDS")])
def test_who_has_what_is_by_the_names_of_registries(ours, same):
    """A name of ours that is in the table is one, and so is its name in each package; transformers and peft are those
    that are installed."""
    registries = loaded().load("registries", "scripts")
    known, names = registries.known(), getattr(effzoo.registry, ours).names()
    assert {"peft", "transformers", "adapters", "opendelta", "flash_linear_attention", "xformers"} == set(known)
    for name, of in getattr(registries, same).items():
        assert name in names
        assert {
            package: theirs for package, theirs in of.items() if theirs.split(",")[0] not in known[package]["names"]
        } == {}


def loaded():
    """scripts/readme.py."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts/readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    return readme
