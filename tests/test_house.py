"""The house: imports run one way, and nothing is named utils."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import effzoo

ROOT = Path(__file__).parent.parent / "effzoo"
FLOORS = [  # a package may import from those before it, and from itself
    {"devices", "errors"},
    {"annotations", "arguments", "checked", "memory", "undrawn"},
    {"export", "placing", "reading", "sharding", "spec", "wrappers", "writing"},
    {"nf4", "registry", "tensors"},
    {"codes", "recompute", "routing"},
    {"sites"},
    {"attention", "peft"},
    {"blocks"},
    {"architectures"},
    {"zoo"},
    {"convert", "lookup", "packing", "plots"},
    {"data", "generation", "quantisation", "swap", "tasks", "vocabulary"},
    {"folder"},
    {"builder"},
    {"parallel", "transformers"},
    {"checks", "plans", "train"},
    {"measure"},
    {"lab"},
    {"course"},
    {"cli"},
]


def modules():
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def imports(path: Path) -> set[str]:
    """First components below `effzoo` of what a module imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "effzoo":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("effzoo.")}
    return found


def test_the_five_files_to_read_first_are_short_and_each_shows_its_formula():
    """The reading list of docs/concepts/house.md."""
    page = (ROOT.parent / "docs/concepts/house.md").read_text().split("<!-- stops -->")[1].split("<!-- /stops -->")[0]
    texts = [(ROOT.parent / path).read_text() for path in re.findall(r"^\| \[`([\w/.]+)`\]", page, re.MULTILINE)]
    assert sum(len(text.splitlines()) for text in texts) < 450
    formulas = [
        'attention = "longformer[window=512]"',
        "scores = q @ k.mT / math.sqrt(d)",
        "(gap.abs() <= self.reach * dilation) & (gap % dilation == 0)",
        "return x + self.feed(self.mlp_norm(x)",
        "return y + self.scale * (x @ self.A.T) @ self.B.T",
    ]
    assert len(texts) == len(formulas) and all(formula in text for formula, text in zip(formulas, texts, strict=True))


def test_imports_run_one_way():
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    offenders = []
    for path in modules():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert own in floor, f"{own} has no floor in the house; add it to FLOORS"
        above = [name for name in imports(path) & {*floor} if name != own and floor[name] >= floor[own]]
        offenders += [f"{path.relative_to(ROOT)} imports {name}" for name in above]
    assert not offenders


def test_blocks_know_no_concrete_attention_or_method():
    for path in (ROOT / "blocks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith(("effzoo.attention", "effzoo.peft"))
            ):
                assert node.module == "effzoo.attention.core", f"{path.name} imports {node.module}"


def test_no_room_is_called_utils():
    assert not [
        p for p in ROOT.rglob("*") if p.stem in {"utils", "util", "common", "base", "helpers", "helper", "misc"}
    ]


def test_only_convert_imports_the_models_of_transformers():
    """And the package in which the classes of transformers for our folders are registered."""
    for path in modules():
        if {"convert", "transformers"} & {*path.relative_to(ROOT).parts}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in getattr(node, "names", [])] if "Import" in type(node).__name__ else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in named if "transformers.models" in name or "AutoModel" in name], path


@pytest.mark.slow
def test_every_part_of_the_house_can_be_the_first_that_is_imported():
    """What one module needs of another it imports: `import effzoo` alone imports nothing."""
    names = sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()})
    program = """
import os, sys, torch, transformers
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__("effzoo." + name)
            from effzoo import attention, peft
            assert "longformer" in attention.names() and "lora" in peft.names()
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_entries_are_registered_when_they_are_looked_up():
    """Also where nothing of effzoo but the registry has been imported."""
    program = "from effzoo.registry import attention, peft, router; print(attention.get('full'), peft.names()[0], "
    program += "router.options('top_k')[0].name)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "full.Full" in done.stdout, done.stdout + done.stderr


def test_a_name_that_effzoo_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'effzoo' has no attribute 'bild'"):
        effzoo.bild  # noqa: B018
    assert {*effzoo.__all__} <= {*dir(effzoo)} and all(hasattr(effzoo, name) for name in effzoo.__all__)


WORD = re.compile(r"^\| (\w+) \| (.+) \| `(\w+)` in \[`(.+)`\]\(../../effzoo/(.+)\) \|$", re.MULTILINE)


def test_every_word_of_the_house_is_defined_where_the_glossary_says():
    page = (ROOT.parent / "docs/concepts/words.md").read_text()
    words = WORD.findall(page)
    assert len(words) == page.count("\n| ") - 1, "a line of the table has another form"
    assert 0 < len(words) <= 20 and len({word for word, *_ in words}) == len(words), "at most 20 words, each once"
    for word, _, symbol, shown, path in words:
        tree = ast.parse((ROOT / path).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert shown == path and symbol in defined, f"{word}: {path} defines no {symbol}"
