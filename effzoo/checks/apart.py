"""The checked file in a process of its own, with limits of time and memory; its numbers are compared here.

The file never runs in this process, and what its process says of itself is not believed: that a check is green there
is shown, but an entry counts as verified only when the numbers that it sends equal those of a reference, of which its
process knows the inputs alone. Answers are JSON and safetensors, which hold no code.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import effzoo
from effzoo.attention.core import Context, Mask
from effzoo.checks.against import DRAWS, Reference, Written
from effzoo.checks.models import LENGTHS, SIZES
from effzoo.checks.peft.against import CASES, trained_tensors
from effzoo.checks.peft.subject import modules
from effzoo.checks.runner import Check, Failed, Report, Result, close, label_of, see_of
from effzoo.checks.server import end_group, server
from effzoo.checks.subject import Subject
from effzoo.errors import OptionError, listing
from effzoo.peft import attach

ASKED, INPUTS, ANSWER, OUTPUTS = "asked.json", "inputs.safetensors", "answer.json", "outputs.safetensors"
# what a solution may import, and of effzoo which names
IMPORTS = {"torch", "math", "einops", "typing", "__future__", "dataclasses", "collections", "itertools", "functools",
           "effzoo"}  # fmt: skip
FROM: dict[str, set[str]] = {
    "effzoo.attention": {"AttentionCore", "PredicateAttention", "Part", "Mask", "Context", "State", "register",
                         "bias_of", "memory_part"},
    "effzoo.peft": {"Method", "PeftModule", "TrainingHooks", "register"},
    "effzoo.sites": {"Linear", "LayerNorm", "Embedding", "Branch", "Norm", "Site", "PeftModule", "Positionwise",
                     "Memory", "MemorySite", "SublayerEnd", "HookContext", "KeysValues"},
    "effzoo.errors": {"OptionError"},
}  # fmt: skip
HIDING = {"__import__", "eval", "exec", "compile", "open", "globals", "locals", "vars", "__builtins__"}
LARGEST = 2**26  # bytes of an answer
SEE = "Run the file without --apart: the same checks, in one process, with the traceback."


@dataclass(frozen=True)
class Limits:
    """Of the process that runs the file.

    seconds: from its start to its end.
    gigabytes: of its address space, where the system can limit it; torch itself takes about 3.
    """

    seconds: float = 120.0
    gigabytes: float = 12.0


def check_apart(
    file: str | Path, checks: dict[str, list[Check]], *, reference: Reference | None, spec: str | None, limits: Limits
) -> list[Report]:
    """A report for each entry of a file, of which this process runs nothing.

    checks: of each kind, as `effzoo.checks.checks_of` lists them, without those of a reference.
    reference: what the numbers must equal; without one nothing is verified.
    spec: which entry, with its options; None for all.

    Raises OptionError for a file that registers nothing or cannot be imported, and for one that is stopped.
    """
    wanted = {kind: [check.__name__ for check in every] for kind, every in checks.items()}
    answer, _ = ask({"what": "report", "checks": wanted, "spec": spec, **_file(file)}, {}, limits)
    if "problem" in answer:
        raise OptionError(f"{file}: {answer['problem']}")
    reports = []
    for told in answer.get("reports", []):
        kind = str(told.get("kind"))
        if kind not in checks or (reference is not None and kind != reference.kind):
            continue
        report = Report(kind, str(told.get("subject")), [_told(check, told) for check in checks[kind]])
        if any(check.__name__ == "is_own_work" for check in checks[kind]):
            report.results.insert(0, _written_out(file))
        if reference is not None:
            report.results.append(_compared(file, str(told.get("name")), reference, limits))
            report.compared_with = reference.text if report.results[-1].ok else ""
        reports.append(report)
    if not reports:
        raise OptionError(
            f"{file} registers nothing that is asked for; put a decorator such as @register before a class"
        )
    return reports


def _written_out(file: str | Path) -> Result:
    """Whether the text of a file names nothing that would compute what was to be written, or would hide it."""
    label = "The file imports and names only what a solution is written with"
    see = "Search the file for the name that the reason gives."
    try:
        foreign(ast.parse(Path(file).read_text()))
    except Failed as failure:
        return Result("is_written_out", label, "red", str(failure), see=see)
    return Result("is_written_out", label, "green", see=see)


def foreign(tree: ast.AST, more: Mapping[str, set[str]] | None = None) -> None:
    """Raise Failed for an import or a name that a solution does not need.

    more: modules of effzoo that it may import too, with the names.
    """
    may = {**FROM, **(more or {})}
    advice = f"a solution is written with {listing(sorted(IMPORTS))}, and of effzoo with what a guide names"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            wrong = [name for name in names if name.split(".")[0] not in IMPORTS - {"effzoo"}]
        elif isinstance(node, ast.ImportFrom):
            module, names = node.module or "", [alias.name for alias in node.names]
            allowed = may.get(module, set() if module.startswith("effzoo") else None)
            known = module.split(".")[0] in IMPORTS
            wrong = names if not known else [] if allowed is None else [name for name in names if name not in allowed]
            wrong = [f"{module}.{name}" for name in wrong]
        elif isinstance(node, ast.Name):
            wrong = [node.id] if node.id in HIDING else []
        elif isinstance(node, ast.Attribute):
            hidden = node.attr.startswith("__") and node.attr != "__init__"
            wrong = [node.attr] if hidden or node.attr in ("dense", "load", "setprofile") else []
        else:
            continue
        if wrong:
            raise Failed(f"line {node.lineno} names {wrong[0]}; {advice}")


def _file(file: str | Path) -> dict[str, str]:
    return {"file": str(Path(file).absolute())}


def _told(check: Check, told: dict[str, Any]) -> Result:
    """What the other process says of a check, as far as it is well formed."""
    said = next((one for one in told.get("checks", []) if one.get("check") == check.__name__), None)
    if said is None or said.get("status") not in ("green", "red", "skipped", "not run"):
        return Result(check.__name__, label_of(check), "red", "its process says nothing of this check", see=SEE)
    reason, trace = str(said.get("reason", ""))[:2000], str(said.get("trace", ""))[:8000]
    seconds = float(said.get("seconds", 0.0))
    return Result(check.__name__, label_of(check), said["status"], reason, seconds, see_of(check), trace)


def _compared(file: str | Path, name: str, reference: Reference, limits: Limits) -> Result:
    """The numbers of an entry beside those of the reference, as a result."""
    label, started = (
        "The numbers of its process equal the reference's on drawn inputs, compared here",
        time.perf_counter(),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            numbers(file, name, reference, limits)
    except Failed as failure:
        return Result("equals_reference", label, "red", str(failure), time.perf_counter() - started, SEE)
    return Result("equals_reference", label, "green", "", time.perf_counter() - started, SEE)


def numbers(file: str | Path, name: str, reference: Reference, limits: Limits) -> None:
    """Raise Failed unless the numbers that the file's process sends equal those of the reference to 1e-10."""
    if reference.kind == "peft" and reference.cls is None:
        raise OptionError("--apart compares methods with a method; a function is compared without --apart")
    drawn = _attention(reference) if reference.kind == "attention" else _methods(reference)
    calls: list[dict[str, Any]] = []
    inputs: dict[str, Tensor] = {}
    expected: list[dict[str, Tensor]] = []
    for number, (call, tensors, wanted) in enumerate(drawn):
        calls.append(call)
        inputs |= {f"{number}.{key}": tensor.detach().contiguous() for key, tensor in tensors.items()}
        expected.append({key: tensor.detach() for key, tensor in wanted.items()})
    given = {"options": dict(reference.spec.options), "reference": reference.text}
    asked = {"what": "numbers", "kind": reference.kind, "name": name, "calls": calls, **given, **_file(file)}
    answer, outputs = ask(asked, inputs, limits)
    if "problem" in answer:
        raise Failed(f"{answer['problem']}; run the file without --apart to see where")
    for number, (call, wanted) in enumerate(zip(calls, expected, strict=True)):
        for key, right in wanted.items():
            found = [x for at, x in outputs.items() if at == f"{number}.{key}" or at.startswith(f"{number}.{key}.way")]
            if not found:
                raise Failed(f"{call['where']}: its process sent no {key}; let forward return it")
            best = min(found, key=lambda x: _distance(x, right))
            advice = f"compare with what {reference.text} computes there; without --apart the mistake may have a name"
            close(f"{call['where']}: {key}", best, right, 1e-10, advice)


def _distance(found: Tensor, right: Tensor) -> float:
    same = found.shape == right.shape and found.dtype == right.dtype
    return float((found - right).abs().max().nan_to_num(torch.inf)) if same and found.numel() else torch.inf


Drawn = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


def _attention(reference: Reference) -> Iterator[Drawn]:
    """Calls of an attention layer: what is said of each, its tensors, and what must come out."""
    source = torch.Generator().manual_seed(5000 + reference.seed)

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=source))]

    causal_too = reference.cls is None or not reference.cls.not_causal
    for number in range(DRAWS * (1 + causal_too)):
        causal, n, batch = number >= DRAWS, one_of(*range(1, 50)), one_of(1, 2, 3)
        heads, width = one_of(1, 2, 3), one_of(4, 6, 8)
        core = reference.like(Context(heads, width, causal=causal, layers=2, max_length=64))
        valid = torch.rand(batch, n, generator=source) < 0.8 if number % 3 else None
        mask = Mask(valid)
        tensors = {
            name: torch.randn(batch, heads, n, width, dtype=torch.float64, generator=source).requires_grad_()
            for name in core.uses(mask)
        }
        weight = torch.randn(batch, heads, n, width, dtype=torch.float64, generator=source)
        has_dense = isinstance(core, Written) or Subject(reference.spec, reference.cls).has_definition
        out = (core.dense if has_dense else core)(*(tensors.get(name) for name in core.projections), mask=mask)
        grads = torch.autograd.grad((out * weight).sum(), list(tensors.values()), allow_unused=True)
        wanted = {"the output": out} | {
            f"the gradient of {name}": torch.zeros_like(x) if grad is None else grad
            for (name, x), grad in zip(tensors.items(), grads, strict=True)
        }
        where = f"{'causal' if causal else 'bidirectional'}{' with padding' * (valid is not None)}, n = {n}"
        call = {"heads": heads, "width": width, "causal": causal, "names": list(tensors), "where": where}
        sent = {**tensors, "weight": weight, **{f"state.{key}": x for key, x in core.state_dict().items()}}
        yield call, sent if valid is None else {**sent, "valid": valid}, wanted


def _methods(reference: Reference) -> Iterator[Drawn]:
    """Models with the method attached: the factors and the batch of each, and the logits."""
    source = torch.Generator().manual_seed(6000 + reference.seed)
    for number, case in enumerate(CASES):
        for again in range(2):
            model = attach(case.model(), reference.spec)
            hung = modules(model)
            with torch.no_grad():
                for tensor in trained_tensors(hung).values():
                    tensor.copy_(0.3 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=source))
            ids = torch.randint(SIZES["vocab"], (len(LENGTHS), 9 + 5 * again), generator=source)
            factors = {f"factor.{key}": x for key, x in trained_tensors(hung).items()}
            with torch.no_grad():
                out = model.eval()(input_ids=ids).logits
            call = {"case": number, "paths": list(hung), "where": f"{case}, {ids.shape[1]} tokens"}
            yield call, {**factors, "input_ids": ids}, {"the output": out}


def ask(asked: dict[str, Any], inputs: dict[str, Tensor], limits: Limits) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a process of its own answers: a JSON object with "problem" where there is one, and tensors."""
    with process("effzoo.checks.child", asked, inputs, limits) as ended:
        return ({"problem": ended.problem}, {}) if ended.problem else _answer(ended.folder, ended.code)


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    folder: what it left.
    code: its exit code.
    problem: why it was stopped, or "".
    """

    folder: Path
    code: int
    problem: str

    @property
    def printed(self) -> str:
        """The last that it printed, at most 2,000 bytes."""
        return (self.folder / "said.txt").read_bytes()[-2000:].decode(errors="replace").strip()


@contextmanager
def process(module: str, asked: dict[str, Any], inputs: dict[str, Tensor], limits: Limits) -> Iterator[Ended]:
    """Run `python -m module FOLDER` to its end, with what is asked and the inputs in that folder and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / ASKED).write_text(json.dumps({**asked, "gigabytes": limits.gigabytes, "seconds": limits.seconds}))
        safetensors.torch.save_file(inputs, place / INPUTS)
        paths = [str(Path(effzoo.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }  # fmt: skip
        started = server()
        if started is not None:
            code = started.run(module, folder, environment, limits.seconds)
        else:
            code = _run(module, folder, environment, limits.seconds)
        stopped = f"it was stopped after {limits.seconds:g} seconds" if code is None else ""
        yield Ended(place, -signal.SIGKILL if code is None else code, stopped)


def _run(module: str, folder: str, environment: dict[str, str], seconds: float) -> int | None:
    """The exit code of `python -m module FOLDER`; None where it was stopped."""
    with (Path(folder) / "said.txt").open("wb") as said:
        started = subprocess.Popen(
            [sys.executable, "-m", module, folder],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            return started.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(started.pid, started.returncode is None)
            started.wait()


def _answer(place: Path, code: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        for name in (ANSWER, OUTPUTS):
            if (place / name).is_symlink() or (place / name).stat().st_size > LARGEST:
                return {"problem": f"its process left a {name} that is no answer"}, {}
        answer = json.loads((place / ANSWER).read_text())
        if not isinstance(answer, dict):
            return {"problem": "its process left an answer that is none"}, {}
        return answer, safetensors.torch.load_file(place / OUTPUTS)
    except (OSError, ValueError, SafetensorError):
        last = Ended(place, code, "").printed.splitlines()
        return {"problem": f"its process ended with {code} and without an answer{': ' + last[-1] if last else ''}"}, {}
