"""How many small faults in effzoo do the tests find? Draws single-point mutants, runs the tests on each, and counts.

    python scripts/mutants.py                        # 60 mutants, drawn by seed 15
    python scripts/mutants.py --count 20 --seed 3 --only peft --only train

A mutant is one place of one module changed: an operator or comparison exchanged, a constant moved, a `not` or a
keyword argument left out, a raise removed. All is done in a temporary copy of the tree. First the fast tests
(`./scripts/test`) run once, and which functions each of them calls is recorded. Then each mutant meets the fast tests
that call its function, the quickest first, until one fails; if none does, the slow tests of the files those are in. A
mutant that nothing kills may be equivalent to the original, so what counts is the share that the fast tests have in
those that are killed.
"""

import argparse
import ast
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = [
    "attention", "blocks", "architectures", "sites", "peft", "convert", "train", "routing", "quantise", "registry",
    "spec", "generation",
]  # fmt: skip
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or,
    ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change. function: the first line, decorators included, of the function it is in; 0 at the top of a module."""

    path: str
    line: int
    function: int
    change: str
    text: str  # of the whole module


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a module."""
    source = path.read_text()
    lines = [line.encode() for line in source.splitlines(keepends=True)]

    def edited(node: ast.AST, new: str) -> str:
        """The module with other text in the place of a node; offsets of ast count bytes."""
        first, last = node.lineno - 1, node.end_lineno - 1
        head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        return b"".join([*lines[:first], head + new.encode() + tail, *lines[last + 1 :]]).decode()

    found = []
    for node, function in expressions(ast.parse(source), 0):
        for new in changes(node):
            old = " ".join(ast.unparse(node).split())
            found.append(
                Mutant(str(path.relative_to(ROOT)), node.lineno, function, f"{old} -> {new}", edited(node, new))
            )
    return found


def expressions(node: ast.AST, function: int) -> Iterator[tuple[ast.AST, int]]:
    """What can be changed, with the function it is in: no annotations, messages, f-strings or decorators."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc", "cause", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            inside = function
            if isinstance(child, ast.FunctionDef):
                inside = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
            yield child, inside
            yield from expressions(child, inside)


def changes(node: ast.AST) -> Iterator[str]:
    """Texts that may stand in the place of a node."""
    if isinstance(node, ast.Raise):
        yield "pass"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"bool({ast.unparse(node.operand)})"
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield f"({ast.unparse(changed(node, op=SWAPS[type(node.op)]()))})"
    elif isinstance(node, ast.Compare):
        yield f"({ast.unparse(changed(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]]))})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"({node.value} + 1)"
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield ast.unparse(changed(node, keywords=[other for other in node.keywords if other is not keyword]))


def changed(node: ast.AST, **fields: object) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def draw(count: int, seed: int, places: list[str]) -> list[Mutant]:
    """So many mutants, each of a module drawn at random."""
    modules = [
        path for place in places for path in [ROOT / f"effzoo/{place}.py", *(ROOT / "effzoo" / place).rglob("*.py")]
    ]
    candidates = [found for path in modules if path.exists() and (found := mutants(path))]
    chance = random.Random(seed)
    drawn: dict[Mutant, None] = {}
    while len(drawn) < count:
        drawn[chance.choice(chance.choice(candidates))] = None
    return list(drawn)


# --- the plugin of pytest that records which functions a test calls: python -m pytest -p mutants, with MUTANTS_CALLS


def pytest_configure(config) -> None:  # type: ignore[no-untyped-def]
    if "MUTANTS_CALLS" in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ["MUTANTS_CALLS"])))


def processor_seconds() -> float:
    """Those of this process and of its children that have ended."""
    return time.process_time() + sum(os.times()[2:4])


class Recorder:
    """Writes for each test the functions of effzoo that it calls, as "path:first line", and its seconds: those of the
    processor, its children's too, since what else a machine does would put slow tests first."""

    def __init__(self, file: Path):
        self.file = file.with_suffix(f".{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
        self.calls, self.tests = set(), {}
        self.effzoo = str(Path.cwd() / "effzoo")

    def trace(self, frame, event, argument) -> None:  # type: ignore[no-untyped-def]
        self.calls.add(frame.f_code)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.calls, self.started = set(), processor_seconds()
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        called = {(c.co_filename, c.co_firstlineno) for c in self.calls if c.co_filename.startswith(self.effzoo)}
        names = [f"{os.path.relpath(path)}:{line}" for path, line in sorted(called)]
        self.tests[nodeid] = {"seconds": processor_seconds() - self.started, "calls": names}

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.tests))


# --- running

LATE = "takes too long"


def pytest(tree: Path, arguments: list[str], seconds: float = 0, **environment: str) -> tuple[int, str]:
    """The exit status of pytest in the copy, 1 when it takes too long, and the first test that fails. It runs in a fork
    of this process, which has imported what is not effzoo."""
    said = tree / "said.txt"
    child = os.fork()
    if child == 0:
        signal.alarm(math.ceil(seconds))
        os.chdir(tree)
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(PYTHONPATH=f"{tree}:{tree}/scripts", **environment)
        sys.path[:0] = [str(tree), str(tree / "scripts")]
        sys.dont_write_bytecode = False
        os._exit(importlib.import_module("pytest").main(["--tb=no", *arguments]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return 1, LATE
    text = said.read_text()
    told = [row for row in text.splitlines() if row.startswith(("FAILED", "ERROR"))]
    return status, told[0] if told else text[-300:].strip() or f"exit status {status}"


def first_to_fail(tree: Path, tests: list[str], seconds: float, marked: str = "") -> str:
    """The test that fails first, or "" when none does; an import that fails counts as well."""
    (tree / "chosen.txt").write_text("\n".join(tests))
    status, told = pytest(tree, ["-x", *(["-m", marked] if marked else []), "@chosen.txt"], seconds)
    return "" if status in (0, 5) else told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--only", action="append", default=[], help="a package or module of effzoo, such as peft")
    parser.add_argument("--limit", type=float, default=300, help="seconds that the slow tests have for one mutant")
    parser.add_argument("--calls", type=Path, help="a file that keeps what the fast tests call, for the next time")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("torch", "transformers.trainer", "hypothesis.stateful", "peft", "scipy.optimize"):
        importlib.import_module(name)
    drawn = draw(asked.count, asked.seed, asked.only or PLACES)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        calls = (asked.calls or tree / "calls.json").absolute()
        if not calls.exists():
            print("recording what the fast tests call", flush=True)
            pytest(
                tree,
                ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow", "-p", "mutants"],
                MUTANTS_CALLS=str(calls),
            )
            parts = [json.loads(part.read_text()) for part in calls.parent.glob(f"{calls.stem}.gw*")]
            calls.write_text(json.dumps({test: found for part in parts for test, found in part.items()}))
        killed = Counter(meet(tree, mutant, json.loads(calls.read_text()), asked.limit) for mutant in drawn)
    whole = killed["fast"] + killed["slow"]
    share = killed["fast"] / whole
    print(f"{len(drawn)} mutants: {whole} killed, {killed['fast']} of them by the fast tests ({share:.0%})")


def meet(tree: Path, mutant: Mutant, tests: dict, limit: float) -> str:
    """fast, slow or survived."""
    called = f"{mutant.path}:{mutant.function}"
    # what runs when the module is imported may show in any test that calls one of its functions
    hit = {
        name: test["seconds"]
        for name, test in tests.items()
        if called in test["calls"]
        or (mutant.function == 0 and any(call.startswith(f"{mutant.path}:") for call in test["calls"]))
    }
    order = spread(hit)
    batches = [batch for batch in (order[:40], order[40:]) if batch]
    files = [file for file, _ in Counter(name.split("::")[0] for name in hit).most_common()]
    original = (tree / mutant.path).read_text()
    (tree / mutant.path).write_text(mutant.text)
    try:
        told = ""
        for batch in batches:  # a mutant that takes ten times as long is found too
            told = told or first_to_fail(tree, batch, 90 + 10 * sum(hit[test] for test in batch))
        verdict = "fast"
        if not told and files:
            verdict, told = "slow", first_to_fail(tree, files, limit, "slow")
            told = told.replace(LATE, "")  # which says nothing of a test that is slow
    finally:
        (tree / mutant.path).write_text(original)
    verdict = verdict if told else "survived"
    print(f"{verdict:8} {mutant.path}:{mutant.line} {mutant.change}  [{len(hit)} tests] {told}", flush=True)
    return verdict


def spread(seconds: dict[str, float]) -> list[str]:
    """The quickest cell of each test first, then the second of each."""
    met: Counter[str] = Counter()
    order = []
    for test in sorted(seconds, key=seconds.__getitem__):
        name = test.split("[")[0]
        order.append((met[name], seconds[test], test))
        met[name] += 1
    return [test for *_, test in sorted(order)]


if __name__ == "__main__":
    main()
