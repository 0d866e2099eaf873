"""The process that runs a file that was handed in: python -m effzoo.course.child FOLDER. Each answer is a file."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import effzoo
from effzoo import checks, registry
from effzoo.attention.core import Mask
from effzoo.checks.against import Reference, share
from effzoo.checks.apart import ASKED, INPUTS
from effzoo.checks.child import limit
from effzoo.checks.peft import Subject as Tuned
from effzoo.checks.peft.against import CASES, _named, fill, pairings, trained_tensors
from effzoo.checks.peft.subject import modules
from effzoo.checks.runner import Failed, crash
from effzoo.checks.subject import Subject
from effzoo.course.entries import TRAINED, norms
from effzoo.course.task import with_gradients
from effzoo.course.values import pack, unpack
from effzoo.peft import merge
from effzoo.spec import Spec, parse_one

WAYS = 16  # in which factors may belong together


class File:
    """What was handed in, imported: its names, and what it registers."""

    def __init__(self, path: str):
        self.path = path
        self.entered = registry.load_file(path)
        self.names = next(
            vars(module)
            for module in list(sys.modules.values())
            if module.__name__.startswith("effzoo_file_") and getattr(module, "__file__", None) == path
        )

    def entry(self, kind: str) -> str:
        """The name of the one entry of a kind."""
        found = list(dict.fromkeys(name for one, name in self.entered if one == kind))
        if len(found) != 1:
            what = f"{len(found)} entries of {kind}" if found else f"nothing of {kind}"
            raise Failed(f"the file registers {what}; put one decorator @register before one class")
        return found[0]


def function(file: File, call: dict[str, Any], given: dict[str, Any]) -> Any:
    """What a function of the file gives, with gradients where they are asked for."""
    found = file.names.get(call["function"])
    if not callable(found):
        raise Failed(f"the file has no function {call['function']}; keep the names of the starter")
    weight = given.pop("weight of the output", None)
    return with_gradients(found, given, call["gradients"], weight, call["unchanged"])


def layer(file: File, call: dict[str, Any], given: dict[str, Any]) -> Any:
    """The output of the attention kind of the file, with gradients where they are asked for."""
    name = file.entry("attention")
    spec = str(_reference("attention", call).options_for(parse_one(name)))
    weight, valid = given.pop("weight"), given.pop("valid", None)
    sizes = {"heads": call["heads"], "width": call["width"], "max_length": call["length"]}
    core = Subject.of(spec).core(causal=call["causal"], **sizes).to(weight.dtype)
    share({key.removeprefix("state."): x for key, x in given.items() if key.startswith("state.")}, core)
    mask, names = Mask(valid), call["names"]
    if set(core.uses(mask)) != set(names):
        raise Failed(f"forward takes {', '.join(core.uses(mask))} where the reference takes {', '.join(names)}")
    inputs = {name: given[name].requires_grad_(call["gradients"]) for name in names}
    out = core(*(inputs.get(name) for name in core.projections), mask=mask)
    found = {"the output": out}
    if call["gradients"]:
        loss = (out * weight).sum()
        grads = torch.autograd.grad(loss, [inputs[name] for name in names], allow_unused=True, retain_graph=True)
        for name, grad in zip(names, grads, strict=True):
            found[f"the gradient of {name}"] = torch.zeros_like(inputs[name]) if grad is None else grad
        found[TRAINED] = norms(loss, [x for x in core.parameters() if x.requires_grad])
    return found


def method(file: File, call: dict[str, Any], given: dict[str, Any]) -> Any:
    """What the method of the file computes on a tiny model, with each way in which factors may belong together."""
    name = file.entry("peft")
    spec = str(_reference("peft", call).options_for(parse_one(name)))
    case, ids = CASES[call["case"]], given["input_ids"]
    model = Tuned.of(spec).attached(case).eval()
    hung = modules(model)
    if set(hung) != set(call["paths"]):
        raise Failed(
            f"it hangs on {', '.join(sorted(hung)[:4])}, the reference on {', '.join(sorted(call['paths'])[:4])}"
        )
    if call["way"] == "trained":
        return {
            "ways": [{"the shapes of what is trained": sorted(sorted(x.shape) for x in trained_tensors(hung).values())}]
        }
    if call["way"] == "start":
        return {"ways": [{"the output": model(input_ids=ids).logits}]}
    factors = {
        path: {key.removeprefix(f"factor.{path}."): x for key, x in given.items() if key.startswith(f"factor.{path}.")}
        for path in hung
    }
    ways = []
    for number, pairs in enumerate(pairings(hung, factors, "the reference")):
        if number == WAYS:
            break
        fill(hung, factors, pairs)
        if call["way"] == "gradients":
            out = model(input_ids=ids).logits
            own = {(path, name): x for path in hung for name, x in _named(hung[path]).items()}
            grads = torch.autograd.grad((out * given["weight"]).sum(), list(own.values()), allow_unused=True)
            found = {}
            for ((path, name), x), grad in zip(own.items(), grads, strict=True):
                other, turned = pairs[path][name]
                grad = torch.zeros_like(x) if grad is None else grad
                found[f"the gradient of {path}.{other}"] = grad.T if turned else grad
            ways.append(found)
            continue
        changed = model
        if call["way"] == "saved":
            effzoo.save_adapter(model, f"adapter{call['number']}.{number}")
            changed = effzoo.load_adapter(case.model(), f"adapter{call['number']}.{number}").eval()
        elif call["way"] == "merged":
            changed = Tuned.of(spec).attached(case).eval()
            fill(modules(changed), factors, pairs)
            merge(changed)
        with torch.no_grad():
            ways.append({"the output": changed(input_ids=ids).logits})
    return {"ways": ways}


def harness(file: File, call: dict[str, Any], given: dict[str, Any]) -> Any:
    """What a program of the assignment makes of the file's names."""
    found = getattr(importlib.import_module(call["module"]), call["program"])
    return found(file.names, **given)


def _reference(kind: str, call: dict[str, Any]) -> Reference:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in call["options"].items()}
    return Reference(kind, call["reference"], Spec("reference", options))


def explain(file: File, kind: str, against: str) -> dict[str, Any]:
    """The checks of the entry of a kind, up to the first red one; without those of training, in which nothing is
    graded."""
    only = [check.__name__ for check in checks.checks_of(kind, bool(against)) if "dropout" not in check.__name__]
    report = checks.check(kind, file.entry(kind), against=against or None, only=only, until_red=True)
    return {"results": [asdict(result) for result in report.results]}


OF: dict[str, Callable[[File, dict[str, Any], dict[str, Any]], Any]] = {
    "function": function, "layer": layer, "method": method, "harness": harness,
}  # fmt: skip


def answer(folder: Path, name: str, what: Callable[[], Any]) -> None:
    """Write what a call gives, or how it failed."""
    outputs: dict[str, Tensor] = {}
    try:
        told = {"value": pack(what(), outputs, name)}
    except Exception as error:  # of the file that was handed in; the parent shows it
        outputs = {}
        own = isinstance(error, Failed)
        told = {"problem": str(error)[:800] if own else crash(error, SOURCE[0]),
                "trace": "" if own else trace_of(error)}  # fmt: skip
    safetensors.torch.save_file(outputs, folder / f"{name}.safetensors")
    (folder / f"{name}.part").write_text(json.dumps(told))
    (folder / f"{name}.part").rename(folder / f"{name}.json")


def trace_of(error: Exception) -> str:
    """The traceback through the file that was handed in, without the frames of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == SOURCE[0]]
    lines = "".join([*traceback.format_list(mine), *traceback.format_exception_only(error)]).splitlines()
    return "\n".join(line for line in lines if set(line) - set(" ^~"))[-4000:]


SOURCE = [""]  # the path of the file that was handed in


def main(folder: Path) -> None:
    asked = json.loads((folder / ASKED).read_text())
    inputs = safetensors.torch.load_file(folder / INPUTS)
    torch.set_num_threads(1)
    limit(asked["gigabytes"], asked["seconds"])
    SOURCE[0] = asked["file"]
    files: list[File] = []
    answer(folder, "file", lambda: files.append(File(asked["file"])))
    for call in asked["calls"] if files else ():

        def run(call: dict[str, Any] = call) -> Any:
            given = unpack(call["given"], inputs)
            return OF[call["of"]](files[0], {**call["about"], "number": call["number"]}, given)

        answer(folder, f"call{call['number']}", run)
    if files and asked["explain"]:
        answer(folder, "explained", lambda: explain(files[0], **asked["explain"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
