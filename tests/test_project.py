"""What stands around the code: the wheel works outside a checkout, versions agree, hooks and guides say what is
there."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import effzoo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USED = """
import sys
from pathlib import Path
import torch
import effzoo

assert Path(effzoo.__file__).is_relative_to(sys.argv[1]), effzoo.__file__
sizes = dict(layers=1, dim=16, heads=2, mlp=32, vocab=53, max_length=64)
model = effzoo.build(
    "longformer", attention="longformer[window=4]", peft="lora[rank=2]", task="classification", **sizes)
model(torch.randint(2, 53, (1, 9)), labels=torch.tensor([1])).loss.backward()
effzoo.save_adapter(model, "adapter")
effzoo.load_adapter(effzoo.detach(model, "default"), "adapter")
from effzoo.measure.rows import commit
assert commit() == "", commit()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (path,) = folder.iterdir()
    return path


def run(*command, cwd, **environment):
    """What a command prints; it must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_wheel_holds_the_package_the_zoo_and_the_mark_of_its_types(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "effzoo").rglob("*.py")}
    kinds = {".md", ".png", ".toml"}  # texts, pictures and points of the course's assignments
    course = {path.relative_to(ROOT).as_posix() for path in (ROOT / "effzoo/course").rglob("*") if path.suffix in kinds}
    zoo = {f"effzoo/_models/{path.name}" for path in (ROOT / "models").glob("*.toml")}
    assert {name for name in held if ".dist-info/" not in name} == {*sources, *course, *zoo, "effzoo/py.typed"}


@pytest.mark.slow
def test_an_installed_wheel_works_outside_a_checkout(wheel, tmp_path):
    there, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("git", "init", "--quiet", ".", cwd=tmp_path)  # as in an environment inside another project
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        there,
        wheel,
        cwd=tmp_path,
    )
    environment = {"PYTHONPATH": str(there), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    listed = run(there / "bin/effzoo", "models", cwd=elsewhere, **environment)
    assert all(name in listed for name in effzoo.models())
    run(there / "bin/effzoo", "course", "start", "a03", cwd=elsewhere, **environment)
    assert (elsewhere / "a03/a03.py").is_file()
    run(sys.executable, "-c", USED, there, cwd=elsewhere, **environment)
    assert (elsewhere / "adapter/adapter.json").is_file()


def test_one_version_with_one_date():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == effzoo.__version__ == citation["version"]
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == (citation["version"], citation["date-released"])
    assert [date for _, date in versions] == sorted((date for _, date in versions), reverse=True)


def test_hooks_run_what_the_tests_run():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    commands = {" ".join(hook["entry"].split()[:2]) for hook in hooks}
    assert commands == {".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/mypy"}
    assert all(command in (ROOT / "scripts/test").read_text() for command in commands)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_paths_of_the_guides_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\]\((?!http)([\w/.-]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|scripts|effzoo|models|benchmarks|\./scripts|\.ci)/[\w/.*-]+)`", text):
        assert "NAME" in path or list(ROOT.glob(path.removeprefix("./"))), path
