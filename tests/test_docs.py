"""The documentation is true: every sample runs and prints what is shown below it, every public name has an entry,
pictures are those of the code."""

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from PIL import Image
from support import free_port
from typer.testing import CliRunner

import effzoo
from effzoo.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CHECK = "effzoo check mine.py"  # which has a test of its own
# what no page runs
ELSEWHERE = ("./scripts/", "accelerate launch", "torchrun ", "ACCELERATE_USE_CPU=true accelerate launch")


@dataclass
class Sample:
    """A block of a page: its language, the file that it stands for, if any, and its text."""

    language: str
    title: str
    text: str


def samples(page):
    return [
        Sample(language, title or "", text) for _, language, title, text in FENCE.findall((DOCS / page).read_text())
    ]


def load(name):
    """A script of the repository."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LONG = ("howto/long-documents.md", "howto/choose-a-method.md", "howto/sequences-over-ranks.md")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in LONG else ()) for page in PAGES if samples(page)]
)
def test_samples_run_and_print_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "sample"}, ""
    with effzoo.scope():
        for sample in samples(page):
            if sample.title:
                Path(sample.title).write_text(sample.text)
                assert sum(sample.title in other.text for other in samples(page)), f"nothing uses {sample.title}"
            elif sample.language == "python":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(sample.text, page, "exec"), namespace)
                printed = out.getvalue()
            elif sample.language == "text":
                assert lines(printed) == lines(sample.text)
            elif sample.language == "bash":
                for line in filter(None, (line.partition("#")[0].strip() for line in sample.text.splitlines())):
                    shell(line)
            else:
                assert sample.language == "toml", f"a block of {sample.language} is neither run nor a file"


def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]


def shell(line):
    """Run a line of a console: ours in this process; of others it is looked whether they are there."""
    if line == CHECK:
        return
    if line.startswith("effzoo "):
        arguments = re.findall(r'"([^"]*)"|(\S+)', line.removeprefix("effzoo "))
        done = CliRunner().invoke(app, [quoted or plain for quoted, plain in arguments], env={"COLUMNS": "200"})
        assert done.exit_code == 0, (line, done.output, done.exception)
    else:
        assert line.startswith(ELSEWHERE), line
        for path in re.findall(r"\./scripts/\w+|\w+\.py", line):
            assert Path(path).exists() or (ROOT / path).exists(), path


def test_every_code_block_is_a_sample():
    """No block escapes the test by another fence or indentation."""
    for page in PAGES:
        text = (DOCS / page).read_text()
        assert text.count("```") == 2 * len(samples(page)), page


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_the_width_of_the_page(page):
    wide = [line for sample in samples(page) if sample.language == "python" for line in lines(sample.text)]
    assert [line for line in wide if len(line) > 90] == []


def test_what_a_script_of_ranks_says_runs_in_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(os.environ))
    (script,) = (sample for sample in samples("howto/sequences-over-ranks.md") if sample.title == "spread.py")
    exec(compile(script.text.replace("29400", str(free_port())), "spread.py", "exec"), {})
    first, _, last = map(float, capsys.readouterr().out.split())
    assert last < first


def test_the_document_over_ranks_is_that_of_the_results():
    text = (DOCS / "howto/sequences-over-ranks.md").read_text().split("<!-- million -->\n")[1].split("<!-- /m")[0]
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/over_ranks-cpu.jsonl").read_text().splitlines()]
    table = [
        f"| {row['length']:,} | {row['seconds']:.0f} | {row['planned_mib']:,.0f} | {max(row['peak_mib']):,.0f} | "
        f"{max(sum(sent.values()) for sent in row['sent']) / 2**20:.2f} | {row['loss']:.5f} |"
        for row in rows
    ]
    assert text.splitlines()[2:] == table and rows[-1]["length"] == 2**20
    peaks, seconds = ([max(row["peak_mib"]) for row in rows], [row["seconds"] for row in rows])
    assert peaks[2] - peaks[1] < 4.4 * (peaks[1] - peaks[0]) and seconds[2] < 4.4 * seconds[1], "not linear"


def test_what_a_script_of_several_processes_says_runs_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = (sample for sample in samples("howto/several-gpus.md") if sample.title == "train.py")
    exec(compile(script.text, "train.py", "exec"), {})
    assert Path("runs/several/adapter/adapter.json").is_file()


def test_what_a_script_that_reads_its_part_says_runs_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    monkeypatch.setattr("os.environ", dict(os.environ) | group)
    model = effzoo.build("bert", layers=1, dim=8, heads=2, mlp=8, vocab=20, max_length=16)
    effzoo.convert.to_transformers(model).save_pretrained("checkpoint")
    (script,) = (sample for sample in samples("howto/several-gpus.md") if sample.title == "large.py")
    names: dict = {}
    try:
        exec(compile(script.text, "large.py", "exec"), names)
        assert effzoo.sharding.is_sharded(names["model"]) and effzoo.attached(names["model"])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "kind", "name"),
    [("howto/write-a-kind.md", "attention", "strided"), ("howto/write-a-method.md", "peft", "shift")],
)
def test_what_the_guides_add_is_short_and_passes_every_check(page, kind, name, tmp_path):
    (mine,) = (sample.text for sample in samples(page) if sample.title == "mine.py")
    assert len([line for line in mine.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 15
    (tmp_path / "mine.py").write_text(mine)
    with effzoo.scope():
        assert effzoo.load_file(tmp_path / "mine.py") == [(kind, name)]
        report = effzoo.check(kind, name)
        assert report.ok, str(report)


def test_links_lead_somewhere():
    reference = load("reference").pages()
    for page in PAGES:
        for path in re.findall(r"\]\((?!http|#)([^)#\s]+)", FENCE.sub("", (DOCS / page).read_text())):
            there = (DOCS / page).parent / path
            made = there.resolve().parent == DOCS / "reference" and there.name in reference
            assert made or there.resolve().exists(), (page, path)


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    for page in PAGES:
        assert re.search(rf"[ :]{re.escape(page)}$", text, re.MULTILINE), page


def public_packages():
    """Every package or module of effzoo with an `__all__`, but those that are for the inside alone."""
    inside = {
        "effzoo.annotations",
        "effzoo.attention.kernel",
        "effzoo.checks.attention",
        "effzoo.checks.peft",
        "effzoo.cli",
        "effzoo.lab.draw",
    }
    found = {"effzoo", *(module.name for module in pkgutil.walk_packages(effzoo.__path__, "effzoo."))} - inside
    return {name for name in found if "__all__" in assigned(name)}


def assigned(name):
    source = Path(importlib.util.find_spec(name).origin).read_text()
    targets = [target for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_every_public_name_has_an_entry():
    reference = load("reference")
    assert set(reference.PACKAGES) == public_packages()
    pages = reference.pages()
    everything = "\n".join(pages.values())
    for package in reference.PACKAGES:
        for name in importlib.import_module(package).__all__:
            assert f"#{package}.{name} }}" in pages[f"{package}.md"], f"{package}.{name}"
            path = reference.where(package, name)
            value = getattr(importlib.import_module(package), name)
            if not isinstance(value, ModuleType):
                assert f"::: {path}\n" in everything or path.startswith(f"{reference.VIEW}."), path


def test_every_kind_and_method_is_on_its_page():
    for page, names in (
        ("kinds", effzoo.attention.names()),
        ("methods", effzoo.peft.names()),
        ("models", effzoo.models()),
    ):
        text = (DOCS / f"zoo/{page}.md").read_text()
        for name in names:
            assert f"`{name}`" in text or f"### {name}\n" in text, name


def test_pictures_are_those_that_the_code_draws():
    script = load("pictures")
    drawn = script.pictures()
    assert {path.stem for path in script.FOLDER.iterdir()} == drawn.keys(), "run python scripts/pictures.py"
    used = "\n".join((DOCS / page).read_text() for page in PAGES)
    for name, draw in drawn.items():
        assert f"pictures/{name}.png" in used, f"no page shows {name}"
        there = Image.open(script.FOLDER / f"{name}.png").convert("L")
        now = Image.open(io.BytesIO(effzoo.plots.png_bytes(draw()))).convert("L")
        assert now.size == there.size, f"{name}: run python scripts/pictures.py"
        differing = numpy.abs(numpy.asarray(now, dtype=int) - numpy.asarray(there, dtype=int)) > 64
        assert differing.mean() < 1e-4, f"{name}: run python scripts/pictures.py"  # a word of a label is more
