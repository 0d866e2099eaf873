"""Every number that the command line takes, at and past its edges: refused in one message, or done as it says. And what
Ctrl-C leaves."""

import functools
import importlib
import inspect
import re
import typing

import pytest
import typer
from typer.testing import CliRunner

from effzoo.cli import app
from effzoo.cli.terminal import COMMANDS, KEPT
from effzoo.measure.finetuning import Finetuning
from effzoo.measure.scaling import Scaling

BASE = {  # a line on which each number is tried
    "show": ["show", "full"],
    "account": ["account", "bert"],
    "plan": ["plan", "minilm", "--length", "8"],
    "finetune": ["finetune", "minilm", "--data", "no-such-file.csv", "--output", "out"],
    "predict": ["predict", "no-such-folder", "--data", "no-such-file.csv"],
    "generate": ["generate", "no-such-folder", "--prompt", "x"],
    "embed": ["embed", "no-such-folder", "--data", "no-such-file.csv", "--output", "out.npy"],
    "check": ["check", "no-such-file.py", "--against", "full"],
    "course check": ["course", "check", "a03", "no-such-file.py"],
    "lab": ["lab", "spectrum", "--quick"],
    "bench scaling": ["bench", "scaling"],
    "bench finetune": ["bench", "finetune"],
}
WRONG = ["-1", "0", str(2**70), str(-(2**70)), "1e400", "nan", "-inf", "2.5", "x", ""]
RIGHT = {  # of those that are an accepted value somewhere
    ("lab", "--seed"): {"0"}, ("check", "--seed"): {"0"}, ("check", "--seconds"): {"2.5"},
    ("course check", "--seed"): {"0"},
    ("check", "--gigabytes"): {"2.5"},
    ("finetune", "--seed"): {"0"}, ("finetune", "--epochs"): {"2.5", str(2**70)},
    ("bench finetune", "--dropout"): {"0"}, ("plan", "--link"): {"2.5"},
    ("finetune", "--learning-rate"): {"2.5", str(2**70)}, ("bench scaling", "--longest"): {"0", "2.5", str(2**70)},
    ("predict", "--stride"): {"0"}, ("generate", "--seed"): {"0"}, ("generate", "--top-k"): {"0"},
    ("generate", "--no-repeat-ngram-size"): {"0"}, ("generate", "--temperature"): {"2.5", str(2**70)},
    ("generate", "--repetition-penalty"): {"2.5", str(2**70)},
    ("bench scaling", "--seconds"): {"0", "2.5", str(2**70)}, ("bench finetune", "--seconds"): {"0", "2.5", str(2**70)},
}  # fmt: skip


def commands():
    """(name, command) of every command, those of groups too."""
    for module, _ in COMMANDS.values():
        importlib.import_module(f"effzoo.cli.{module}")
    top = typer.main.get_command(app)
    for name, command in top.commands.items():
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {sub}", one) for sub, one in inner.items()) if inner else ((name, command),)


def within(hint):
    """An annotation and those inside it."""
    return {hint}.union(*(within(inner) for inner in typing.get_args(hint)))


def numeric():
    """(command, option) of every option that takes a number: read from the annotations, which no version of typer
    changes."""
    for name, command in commands():
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        for parameter in command.params:
            if {int, float} & within(hints.get(parameter.name)) and parameter.opts[0].startswith("--"):
                yield name, parameter.opts[0]


NUMERIC = list(numeric())


def test_numbers_are_found_at_every_command_that_takes_some():
    assert {command for command, _ in NUMERIC} == set(BASE)


def test_brackets_in_help_are_shown_and_not_taken_for_markup():
    texts = {(name, p.name): p.help or "" for name, command in commands() for p in command.params}
    assert [key for key, text in texts.items() if re.search(r"(?<!\\)\[[a-z]", text)] == []


@pytest.fixture
def quick(monkeypatch):
    """Nothing is measured: what is accepted reaches this error."""

    def stop(*_, **__):
        raise typer.Exit(0)

    for suite in (Scaling, Finetuning):
        monkeypatch.setattr(suite, "run", stop)
    monkeypatch.setattr("effzoo.lab.perform", stop)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), NUMERIC)
def test_a_number_past_its_edge_is_refused_in_one_message(quick, tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    assert command in BASE, f"{command} takes a number: give it a line here"
    for value in WRONG:
        result = CliRunner().invoke(app, [*BASE[command], f"{option}={value}"])
        told = result.output + (result.stderr or "")
        assert "bug in effzoo" not in told and "Traceback" not in told, (value, told)
        if value in RIGHT.get((command, option), ()):
            assert result.exit_code == 0 or "no such file" in told or "is no local folder" in told, (value, told)
        else:
            assert result.exit_code == 2 and option.lstrip("-") in told.replace("\n", ""), (value, told)
    assert not list(tmp_path.iterdir())


def test_the_largest_picture_is_a_limit_and_the_smallest_has_one_position():
    assert CliRunner().invoke(app, ["show", "full", "--n", "1"]).exit_code == 0
    told = CliRunner().invoke(app, ["show", "full", "--n", "0"])
    assert told.exit_code == 2 and "--n is an integer of at least 1, got 0" in told.stderr
    told = CliRunner().invoke(app, ["show", "full", "--n", "1000000"])
    assert told.exit_code == 2 and "--n is an integer from 1 to 4,096, got 1000000" in told.stderr


def interrupting(callback):
    """A command with the same options that Ctrl-C stops at once."""

    @functools.wraps(callback)
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    return interrupted


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_what_is_true_of_it(monkeypatch, tmp_path, name):
    lines = {
        "bench": ["bench", "scaling"],
        "check": ["check", "full"],
        "course": ["course", "list"],
        "matrix": ["matrix", "--method", "lora"],
        "lab": ["lab"],
        **BASE,
    }
    line = lines.get(name, [name])

    infos = [
        info
        for one in (app, *(group.typer_instance for group in app.registered_groups))
        for info in one.registered_commands
    ]
    for info in infos:
        monkeypatch.setattr(info, "callback", interrupting(info.callback))
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, line)
    assert told.exit_code == 130
    assert f"interrupted; {KEPT.get(name, 'nothing was written')}" in told.stderr.replace("\n", " ")
    assert ("--resume" in told.stderr) == (name == "finetune") and ("rows.jsonl" in told.stderr) == (name == "bench")
