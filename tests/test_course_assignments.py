"""Every assignment: its starter has 0 to 2 points, its solution all, and every mutant less, with its mistake named."""

import ast

import pytest

from effzoo import course
from effzoo.course import assignments, find, grade
from effzoo.course.solutions import mutants, solution

pytestmark = pytest.mark.usefixtures("forks")

NAMES = list(assignments())
MUTANTS = [(name, one.name) for name in NAMES for one in mutants(name)]


@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_is_whole(name):
    one = find(name)
    assert find(name.upper()) is one and find(str(int(name[1:]))) is one
    assert [*one.tasks()] == [part.name for part in one.parts]
    assert course.assignments is assignments  # and not the folder of this name
    assert 10 <= one.of <= 20 and all(
        part.points >= 1 and part.title and part.paper and part.code for part in one.parts
    )
    assert len(mutants(name)) >= 4
    assert one.text.startswith(f"# {name.upper().replace('A0', 'A')} · {one.title}\n") and "![" in one.text
    assert len(one.text.split()) < 600  # five minutes
    assert (one.folder / "picture.png").stat().st_size < 120_000
    assert all(f"| {part.points} | " in one.text for part in one.parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_starter_has_the_names_of_the_solution(name):
    def names(text):
        return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

    assert names(find(name).starter) <= names(solution(name))


def _graded(name, text, tmp_path, seed=0):
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    return grade(name, file, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_starter_has_at_most_two_points(name, tmp_path):
    assert _graded(name, find(name).starter, tmp_path).points <= 2


@pytest.mark.cover("name")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 20_261])
def test_a_solution_has_all_points(name, seed, tmp_path):
    done = _graded(name, solution(name), tmp_path, seed)
    assert done.ok and done.points == done.of == find(name).of, done.first


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mistake"), MUTANTS)
def test_a_mutant_loses_points_and_its_mistake_is_named(name, mistake, tmp_path):
    mutant = next(one for one in mutants(name) if one.name == mistake)
    done = _graded(name, mutant.text, tmp_path)
    assert done.points < done.of and not done.ok
    assert mutant.cause in f"{done.first.happened}; {done.first.cause}"
