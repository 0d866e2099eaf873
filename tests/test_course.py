"""The course beside its assignments: formats of graders, hints and their log, notebooks, the board, the kit."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from typer.testing import CliRunner

from effzoo.checks.runner import Failed
from effzoo.cli import app
from effzoo.course import Grade, Outcome, assignments, find, formats, grade, hints
from effzoo.course.handing_out import as_notebook, start
from effzoo.course.kit import read_hidden, write_kit
from effzoo.course.refusals import refused, text_of, written_lines
from effzoo.course.solutions import mutants, solution
from effzoo.course.task import Call, Draw, Function, difference
from effzoo.course.values import pack, unpack
from effzoo.errors import OptionError, UnknownNameError

pytestmark = pytest.mark.usefixtures("forks")

ROOT = Path(__file__).parent.parent


def ran(*arguments, code=0):
    done = CliRunner().invoke(app, ["course", *map(str, arguments)], env={"COLUMNS": "100"})
    assert done.exit_code == code, done.output
    return done.output


def written(folder, name="a10", text=None):
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(solution(name) if text is None else text)
    return file


def mutant(assignment, name):
    return next(one.text for one in mutants(assignment) if one.name == name)


@pytest.fixture
def half(tmp_path):
    """A grade of A10 in which one task is green, one red with a hint taken, and the others are not run."""
    asked = find("a10")
    outcomes = [
        Outcome(asked.parts[0], "green"),
        Outcome(asked.parts[1], "red", "it is off", "a cause", "a call"),
        *(Outcome(part, "not run", "it was not run") for part in asked.parts[2:]),
    ]
    return Grade(asked, tmp_path / "a10.py", "00", outcomes=outcomes, seconds=3.0, hints={asked.parts[0].name: 0.1})


def test_points_lose_what_their_hints_cost_and_red_tasks_have_none_to_lose(half):
    assert half.points == pytest.approx(0.9) and half.lost == pytest.approx(0.1) and half.of == 14 and not half.ok
    half.hints = {half.assignment.parts[1].name: 0.3}
    assert half.points == 1 and half.lost == 0
    assert "1/1  start" in str(half) and "a cause" in str(half)


# --- formats


def test_gradescopes_results_hold_the_documented_fields(half):
    told = json.loads(json.dumps(formats.as_gradescope(half, "after_published", ("merged",))))
    assert told.keys() == {"score", "execution_time", "output", "output_format", "test_output_format",
                           "stdout_visibility", "extra_data", "tests", "leaderboard"}  # fmt: skip
    assert told["score"] == 0.9 and told["execution_time"] == 3 and told["stdout_visibility"] in formats.VISIBILITIES
    assert {test["visibility"] for test in told["tests"]} == {"after_published", "hidden"}
    fields = {"name": str, "number": str, "score": float, "max_score": float, "status": str, "output": str,
              "tags": list, "visibility": str}  # fmt: skip
    for test in told["tests"]:
        assert {key: type(value) for key, value in test.items()} == fields
        assert test["status"] in ("passed", "failed") and 0 <= test["score"] <= test["max_score"]
        assert (test["status"] == "passed") == (test["score"] == test["max_score"])
    assert [test["number"] for test in told["tests"]] == [f"10.{i}" for i in range(1, 7)]
    assert "a cause" in told["tests"][1]["output"] and told["tests"][0]["output"] == ""


def test_a_leaderboard_says_which_end_is_the_better(half):
    outcome = half.outcomes[0]
    half.outcomes[0] = Outcome(outcome.part, "green", extra={"loss": 0.2, "accuracy": 0.9})
    assert formats.as_gradescope(half)["leaderboard"] == [
        {"name": "loss", "value": 0.2, "order": "asc"}, {"name": "accuracy", "value": 0.9, "order": "desc"},
    ]  # fmt: skip


def test_classrooms_result_survives_base64(half):
    told = formats.as_classroom(half)
    again = json.loads(base64.b64decode(base64.b64encode(json.dumps(told).encode())))
    assert again["version"] == 1 and again["status"] == "fail" and again["max_score"] == 14
    assert [test["status"] for test in again["tests"]] == ["pass", *["fail"] * 5]
    assert [test["score"] for test in again["tests"]] == [1, 0, 0, 0, 0, 0]


def test_junits_suite_counts_failures(half):
    suite = ElementTree.fromstring(formats.as_junit(half))
    assert suite.get("tests") == "6" and suite.get("failures") == "5" and len(suite.findall("testcase/failure")) == 5
    assert suite.find("testcase/failure").get("message") == "it is off"


def test_json_holds_the_grade_and_the_files_hash(half):
    told = formats.as_json(half)
    assert told["points"] == 0.9 and told["hints"] == 0.1 and told["sha256"] == "00" and len(told["tasks"]) == 6


# --- hints


@pytest.mark.slow
def test_hints_come_one_by_one_show_the_pattern_and_cost(tmp_path):
    file = written(tmp_path / "work", "a03", mutant("a03", "narrow"))
    first = ran("check", "a03", file, "--task", "window", "--hint", code=1)
    assert "hint, where" in first and "--██" in first and "yours" in first
    assert "hint, paper" in ran("check", "a03", file, "--task", "window", "--hint", code=1)
    assert "self.reach" in ran("check", "a03", file, "--task", "window", "--hint", code=1)
    last = ran("check", "a03", file, "--task", "window", "--hint", code=2)
    assert "every hint" in " ".join(last.split())
    file.write_text(solution("a03"))
    assert "12.8 of 14 points, 1.2 lost to hints" in ran("grade", "a03", file)


def test_a_log_of_hints_that_was_changed_is_refused(tmp_path, half):
    half.file.write_text(solution("a10"))
    asked, outcome = half.assignment, half.outcomes[1]
    for level in ("where", "paper"):
        assert hints.next_hint(half, outcome).level == level
    assert hints.costs(asked, half.file)["trained"] == pytest.approx(0.2)
    log = hints.log_of(half.file)
    told = json.loads(log.read_text())
    for wrong in (
        {"taken": told["taken"][1:]},
        {"taken": [{**told["taken"][0], "task": "merged"}, told["taken"][1]]},
        {"taken": [{**told["taken"][0], "level": "what"}]},
        [],
        {"taken": 3},
    ):
        log.write_text(json.dumps(wrong))
        with pytest.raises(OptionError, match="not as it was written"):
            hints.costs(asked, half.file)
    log.unlink()
    assert hints.costs(asked, half.file)["trained"] == 0


# --- tasks and values


def right(x):
    return (x * x).sum(-1)


def drawn(draw):
    return {"x": draw.normal(draw.whole(1, 4), 3)}


SQUARES = Function("squares", right, drawn, wrong={"not squared": lambda x: x.sum(-1)}, gradients=("x",))


def test_a_task_tells_a_wrong_number_a_wrong_gradient_and_the_known_mistake():
    calls = SQUARES.calls(5)
    answers = [call.right for call in calls]
    assert SQUARES.calls(5)[0].given["x"].equal(calls[0].given["x"])
    assert not any(SQUARES.differs(call, answer) for call, answer in zip(calls, answers, strict=True))
    assert SQUARES.cause(calls, answers) == ""
    slips = [call.wrong["not squared"] for call in calls]
    assert "off by" in SQUARES.differs(calls[0], slips[0]) and SQUARES.cause(calls, slips) == "not squared"
    cut = {**answers[0], "the gradient of x": torch.zeros_like(answers[0]["the gradient of x"])}
    assert "the gradient of x is off by" in SQUARES.differs(calls[0], cut)


@pytest.mark.parametrize(
    ("found", "expected", "word"),
    [
        (2, 2.0, ""), (2.0 + 1e-12, 2, ""), (True, 1, "True"), (1, True, "1"), ("a", "b", "'b' is right"),
        ([1, 2], (1, 2), ""), ([1, 3], [1, 2], "entry 1"), ([1], [1, 2], "must be"), ({"a": 1}, {"a": 1}, ""),
        ({"b": 1}, {"a": 1}, "keys"), (torch.tensor(2.0), 2.0, ""), (torch.ones(2), torch.ones(2), ""),
        (torch.ones(2).double(), torch.ones(2), "float64"), (torch.tensor([1, 2]), torch.tensor([1, 3]), "index (1,)"),
        (torch.ones(3), torch.ones(2), "shape"), (torch.tensor([float("nan")]), torch.ones(1), "NaN"),
        (float("nan"), 1.0, "nan"), (None, 1.0, "None"), (3.0, torch.ones(1), "float"), (None, None, ""),
    ],
)  # fmt: skip
def test_a_difference_is_told_in_a_sentence(found, expected, word):
    said = difference(found, expected, 1e-10)
    assert (said == "") if word == "" else (word in said)


def test_values_go_through_json_and_tensors():
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": torch.arange(3)}, "d": float("inf"), "e": ()}
    tensors = {}
    again = unpack(json.loads(json.dumps(pack(value, tensors, "v"))), tensors)
    assert again["a"] == value["a"] and again["b"]["c"].equal(torch.arange(3)) and again["d"] == float("inf")
    assert again["e"] == []
    for odd in (object(), lambda: 1, {1.5: 2}, "x" * 200_000, [[[[[[[[[[1]]]]]]]]]]):
        with pytest.raises(Failed, match="return tensors"):
            pack(odd, {}, "v")
    for odd in ({"tensor": "absent"}, {"list": 3}, {"a": 1, "b": 2}, [1], {"number": "1"}):
        with pytest.raises(ValueError, match="packed"):
            unpack(odd, {})


def test_draws_are_the_same_everywhere_and_differ_by_number():
    assert Draw(3).whole(0, 10**6) == Draw(3).whole(0, 10**6) != Draw(3, 1).whole(0, 10**6)
    assert sorted(Draw(1).order(5).tolist()) == [0, 1, 2, 3, 4]
    assert {Draw(seed).whole(1, 2) for seed in range(20)} == {1, 2}


def test_lines_of_code_are_counted_without_comments_docstrings_and_imports():
    import ast

    lines = ['"""Doc.', "", 'More."""', "import math", "", "# a comment", "def f(x):", '    """Two', '    lines."""',
             "    y = (1 +", "         2)", "    return y  # why", ""]  # fmt: skip
    text = "\n".join(lines)
    assert written_lines(text, ast.parse(text)) == 4


# --- handing out, notebooks


def test_start_writes_and_never_replaces(tmp_path):
    assert "a03.py" in ran("start", "a3", "--to", tmp_path / "work")
    file = tmp_path / "work" / "a03.py"
    assert file.read_text() == find("a03").starter and (tmp_path / "work" / "picture.png").is_file()
    file.write_text("mine")
    assert "is there already" in ran("start", "a3", "--to", tmp_path / "work", code=2)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", list(assignments()))
def test_a_notebook_is_valid_and_holds_the_starter(name, tmp_path):
    nbformat.validate(nbformat.from_dict(as_notebook(find(name))))
    path = start(find(name), tmp_path, notebook=True)[-1]
    assert text_of(path) == find(name).starter
    marks = [cell["metadata"]["nbgrader"] for cell in json.loads(path.read_text())["cells"]]
    assert len({mark["grade_id"] for mark in marks}) == len(marks)
    assert sum(mark.get("points", 0) for mark in marks) == find(name).of
    assert [mark["grade_id"] for mark in marks if mark["solution"]] == ["solution"]


def executed(notebook, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(folder / "ipython")}
    kernel = {"display_name": "here", "language": "python", "name": "python3"}
    notebook["metadata"]["kernelspec"] = kernel
    client = NotebookClient(nbformat.from_dict(notebook), timeout=300, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment)


@pytest.mark.slow
def test_a_notebook_runs_to_its_end_with_the_solution_and_stops_at_the_starter(tmp_path):
    notebook = as_notebook(find("a10"))
    with pytest.raises(CellExecutionError, match="make the factors here"):
        executed(json.loads(json.dumps(notebook)), tmp_path)
    cell = next(cell for cell in notebook["cells"] if "tags" in cell["metadata"])
    cell["source"] = f"%%writefile a10.py\n{solution('a10')}"
    executed(notebook, tmp_path)
    path = tmp_path / "handed_in.ipynb"
    path.write_text(json.dumps(notebook))
    assert grade("a10", path, only=["start", "similarity"]).ok


@pytest.mark.parametrize(
    ("content", "word"), [("no json", "no notebook"), ('{"cells": []}', 'tag "solution"'), ("[]", "no notebook")]
)
def test_a_notebook_that_is_none_is_refused(content, word, tmp_path):
    path = tmp_path / "a03.ipynb"
    path.write_text(content)
    with pytest.raises(OptionError, match=word):
        grade("a03", path)


# --- the commands


def test_list_shows_every_assignment():
    told = ran("list")
    assert all(name in told for name in assignments())


@pytest.mark.slow
def test_check_names_the_mistake_and_its_exit_code_says_so(tmp_path):
    file = written(tmp_path / "work", text=mutant("a10", "phi_not_squared"))
    told = " ".join(ran("check", "A10", file, "--task", "similarity", code=1).split())
    assert "the norm is not squared" in told and "0 of 3 points" in told and "effzoo course check a10" in told
    assert "3 of 3 points" in ran("check", "A10", written(tmp_path / "work"), "--task", "similarity")


@pytest.mark.slow
def test_grade_writes_every_format_and_the_board_ranks_them(tmp_path):
    write_kit(tmp_path / "kit")
    hidden = tmp_path / "kit" / "hidden.toml"
    for who, text in (("ann", solution("a10")), ("bob", mutant("a10", "phi_not_squared"))):
        file = written(tmp_path / who, text=text)
        ran(
            "grade", "a10", file, "--hidden", hidden, "--format", "json", "--output", tmp_path / "board" / f"{who}.json"
        )
    told = ran("board", tmp_path / "board")
    assert told.index("ann") < told.index("bob") and "14 of 14" in told and "11 of 14" in told
    file = tmp_path / "ann" / "a10.py"
    out = tmp_path / "results.json"
    ran("grade", "a10", file, "--hidden", hidden, "--format", "gradescope", "--output", out)
    assert json.loads(out.read_text())["score"] == 14
    assert ElementTree.fromstring(ran("grade", "a10", file, "--format", "junit")).get("failures") == "0"


def test_a_wrong_name_format_or_folder_is_refused_with_what_there_is(tmp_path):
    assert "Known: a" in ran("check", "a99", "x.py", code=2)
    assert "no such file" in ran("check", "a03", tmp_path / "absent.py", code=2)
    assert "gradescope" in ran("grade", "a03", tmp_path / "x.py", "--format", "csv", code=2)
    assert "has no documents" in " ".join(ran("board", tmp_path, code=2).split())
    assert "no such file" in ran("verify", tmp_path, code=2)
    with pytest.raises(UnknownNameError, match="task"):
        grade("a03", written(tmp_path / "work", "a03"), only=["windows"])
    with pytest.raises(OptionError, match="is no assignment"):
        find(str(tmp_path))


# --- the kit


def test_a_kit_has_every_solution_mutant_and_workflow_and_is_never_replaced(tmp_path):
    ran("kit", tmp_path / "kit")
    kit = tmp_path / "kit"
    hidden = read_hidden(kit / "hidden.toml")
    assert hidden.seed > 0 and hidden.visibility == "visible" and hidden.hidden == ()
    for name in assignments():
        assert (kit / f"solutions/{name}.py").read_text() == solution(name)
        assert {path.stem for path in (kit / f"mutants/{name}").iterdir()} == {one.name for one in mutants(name)}
        steps = yaml.safe_load((kit / f"classroom/{name}.yml").read_text())["jobs"]["autograding"]["steps"]
        graders = [step["with"] for step in steps if "command-grader" in step.get("uses", "")]
        assert sum(one["max-score"] for one in graders) == find(name).of
        runners = steps[-1]["with"]["runners"].split(",")
        assert {f"{one.upper()}_RESULTS" for one in runners} == steps[-1]["env"].keys()
    assert "verify" in yaml.safe_load((kit / ".github/workflows/verify.yml").read_text())["jobs"]
    for script in ("setup.sh", "run_autograder"):
        assert os.access(kit / "gradescope" / script, os.X_OK)
        subprocess.run(["bash", "-n", kit / "gradescope" / script], check=True)
    assert "nothing in it is replaced" in " ".join(ran("kit", kit, code=2).split())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "seed"), ("seed = -1", "seed"), ("seed = true", "seed"), ("seed = 1\nseeds = 2", "seeds"),
        ("seed =", "TOML"),
        ('seed = 1\nvisibility = "never"', "visibility"), ('seed = 1\nhidden = ["a03.absent"]', "a03.absent"),
        ('seed = 1\nhidden = "a03.linear"', "list"),
    ],
)  # fmt: skip
def test_a_hidden_file_that_is_none_is_refused(text, word, tmp_path):
    (tmp_path / "hidden.toml").write_text(text)
    with pytest.raises(OptionError, match=word):
        read_hidden(tmp_path / "hidden.toml")


@pytest.mark.slow
def test_verify_tells_a_solution_that_is_wrong_and_a_mutant_that_is_right(tmp_path):
    write_kit(tmp_path / "kit")
    kit = tmp_path / "kit"
    for path in [*kit.glob("solutions/*.py"), *kit.glob("mutants/*/*.py")]:
        if path.stem not in ("a10", "phi_not_squared", "alpha_times_rank"):
            path.unlink()
    told = ran("verify", kit)
    assert told.count("ok ") == 3 and "RED" not in told
    right_one, wrong_one = solution("a10"), mutant("a10", "phi_not_squared")
    (kit / "solutions/a10.py").write_text(wrong_one)
    (kit / "mutants/a10/phi_not_squared.py").write_text(f"# the first red line must say: not squared\n{right_one}")
    told = ran("verify", kit, code=1)
    assert "a solution with 11 of 14 points" in told and "a mutant with all points" in told


@pytest.mark.slow
def test_the_gradescope_script_grades_a_submission(tmp_path):
    """With the paths of Gradescope's container moved into a folder."""
    write_kit(tmp_path / "kit")
    source, submission, results = (tmp_path / name for name in ("source", "submission", "results"))
    for folder in (source, submission, results):
        folder.mkdir()
    (source / "assignment.txt").write_text("a10\n")
    (source / "hidden.toml").write_text((tmp_path / "kit/hidden.toml").read_text())
    written(submission, text=mutant("a10", "phi_not_squared"))
    script = (tmp_path / "kit/gradescope/run_autograder").read_text().replace("/autograder", str(tmp_path))
    (tmp_path / "run.sh").write_text(script)
    (tmp_path / "effzoo").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from effzoo.cli import app; app()' \"$@\"\n"
    )
    (tmp_path / "effzoo").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", tmp_path / "run.sh"], check=True, env=environment, capture_output=True)
    assert json.loads((results / "results.json").read_text())["score"] == 11


def test_files_of_other_editors_are_read_and_what_is_no_text_is_refused(tmp_path):
    file = tmp_path / "a10.py"
    for text in (solution("a10").replace("\n", "\r\n"), f"\ufeff{solution('a10')}"):
        file.write_bytes(text.encode())
        assert refused(find("a10"), text_of(file)) == ""
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="UTF-8"):
        grade("a10", file)
    (tmp_path / "who.json").write_text("{")
    assert "is no JSON" in " ".join(ran("board", tmp_path, code=2).split())


def test_an_assignment_of_ones_own_is_a_folder(tmp_path):
    folder = tmp_path / "squares"
    folder.mkdir()
    (folder / "README.md").write_text("# Squares\n")
    (folder / "starter.py").write_text("def squares(x): ...\n")
    (folder / "tasks.py").write_text(
        "from effzoo.course.task import Function\n"
        "TASKS = {'sum': Function('squares', lambda x: (x * x).sum(), lambda draw: {'x': draw.normal(3)})}\n"
    )
    toml = 'title = "Squares"\ndeck = "none"\nlecture = "none"\nminutes = 1\n'
    task = '[[tasks]]\nname = "sum"\npoints = 2\ntitle = "a sum"\npaper = "none"\ncode = "x * x"\n'
    (folder / "assignment.toml").write_text(toml + task)
    file = tmp_path / "mine.py"
    file.write_text("def squares(x):\n    return (x ** 2).sum()\n")
    assert grade(find(str(folder)), file).points == 2
    (folder / "assignment.toml").write_text(f"colour = 1\n{toml}{task}")
    with pytest.raises(OptionError, match="colour"):
        find(str(folder))
    (folder / "assignment.toml").write_text(task)
    with pytest.raises(OptionError, match="lacks"):
        find(str(folder))


def test_calls_of_a_function_are_told_with_short_arguments():
    call = Function("f", lambda n, x: n, lambda draw: {"n": 3, "x": draw.normal(5, 2)}).calls(0)[0]
    assert isinstance(call, Call) and call.where == "f(n=3, x=float64[5, 2])"
