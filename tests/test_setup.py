"""scripts/setup takes the build of torch that EFFZOO_TORCH names, keeps it, and says so; pip is a double that writes
down what it is asked."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOUBLE = """#!/usr/bin/env bash
case "$*" in
  *"importlib.metadata"*) echo "$TORCH_VERSION" ;;
  "-m pip"*) shift 2; echo "$*" >> "$PWD/asked"; echo "Collecting torch"
    echo "  Downloading torch-$TORCH_VERSION.whl (530.1 MB)" ;;
esac
"""
ADDRESS = "https://wheels.example/cpu"
PINNED = next(
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
).removeprefix("torch==")
RANGE = re.search(r'"(torch>=[^"]+)"', (ROOT / "pyproject.toml").read_text())[1]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment is there, with a double of its Python."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup", "scripts/demo"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    double = tmp_path / ".venv/bin/python"
    double.parent.mkdir(parents=True)
    double.write_text(DOUBLE)
    double.chmod(0o755)
    return tmp_path


def setup(checkout, *extras, torch=None, version=PINNED):
    """The requests to pip and what was printed."""
    (checkout / "asked").unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "EFFZOO_TORCH"} | {
        "TORCH_VERSION": version
    }
    if torch is not None:
        environment["EFFZOO_TORCH"] = str(torch)
    done = subprocess.run(
        [checkout / "scripts/setup", *extras], cwd=checkout, env=environment, capture_output=True, text=True
    )
    asked = (checkout / "asked").read_text().splitlines() if (checkout / "asked").exists() else []
    return done, [line.removeprefix("--disable-pip-version-check ") for line in asked]


def test_by_default_the_pinned_torch_comes_from_the_index_of_pip_and_its_size_is_said(checkout):
    done, asked = setup(checkout, "demo")
    assert asked == ["install -c constraints.txt torch", "--quiet install -c constraints.txt -e .[demo]"]
    assert PINNED in done.stdout and "5.7 GB" in done.stdout and "EFFZOO_TORCH" in done.stdout
    assert (
        f"Downloading torch-{PINNED}.whl (530.1 MB)" in done.stdout
        and f"torch {PINNED} is installed; .venv takes" in done.stdout
    )


def test_what_is_installed_is_not_installed_again(checkout):
    setup(checkout, "test", "demo")
    assert setup(checkout, "demo")[1] == []
    assert setup(checkout, "demo", "docs")[1][-1].endswith("-e .[demo,docs]")
    (checkout / "constraints.txt").write_text((checkout / "constraints.txt").read_text() + "\n")
    assert len(setup(checkout, "demo")[1]) == 2


def test_an_index_gives_the_pinned_version_without_its_dependencies(checkout):
    done, asked = setup(checkout, "demo", torch=ADDRESS, version=f"{PINNED}+cpu")
    assert asked[:2] == [
        "--quiet --quiet uninstall --yes torch",
        f"install --no-deps -c constraints.txt --index-url {ADDRESS} torch",
    ]
    assert asked[2:] == ["--quiet install -c constraints.txt -e .[demo]"]
    assert f"torch comes from {ADDRESS}" in done.stdout and "5.7 GB" not in done.stdout


def test_a_wheel_is_installed_as_it_is_and_its_version_kept(checkout):
    wheel = checkout / "torch-2.12.1+cpu-cp311-none-any.whl"
    wheel.touch()
    # by a path from here, which is remembered whole
    _, asked = setup(checkout, "demo", torch=wheel.name, version="2.12.1+cpu")
    assert asked[1:] == [f"install --no-deps --no-index {wheel}", "--quiet install -c .venv/constraints.txt -e .[demo]"]
    pins = (checkout / ".venv/constraints.txt").read_text().splitlines()
    assert (
        "torch==2.12.1+cpu" in pins
        and not any(pin.startswith(("triton==", f"torch=={PINNED}")) for pin in pins)
        and "rich==15.0.0" in pins
    )


def test_a_folder_gives_a_wheel_in_the_declared_range(checkout):
    (checkout / "wheels").mkdir()
    _, asked = setup(checkout, "demo", torch=checkout / "wheels")
    assert asked[1] == f"install --no-deps --no-index --find-links {checkout}/wheels {RANGE}"


def test_the_choice_is_remembered_until_another_is_made(checkout):
    setup(checkout, "demo", torch=ADDRESS)
    assert setup(checkout, "demo")[1] == []
    assert setup(checkout, "demo", torch=ADDRESS)[1] == []
    assert f"--index-url {ADDRESS} " in setup(checkout, "test")[1][0]
    assert setup(checkout, "test", torch="")[1][:2] == [
        "--quiet --quiet uninstall --yes torch",
        "install -c constraints.txt torch",
    ]
    assert setup(checkout, "test")[1] == []


def test_what_is_nowhere_is_refused_before_anything_is_done(checkout):
    done, asked = setup(checkout, "demo", torch="no/such/folder")
    assert done.returncode == 1 and not asked and "EFFZOO_TORCH=no/such/folder is no file" in done.stderr
