"""The process that runs a checked file for `effzoo.checks.apart`: python -m effzoo.checks.child FOLDER."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from effzoo import checks, registry
from effzoo.attention.core import Mask
from effzoo.checks.against import Reference, share
from effzoo.checks.apart import ANSWER, ASKED, INPUTS, OUTPUTS
from effzoo.checks.peft import Subject as Tuned
from effzoo.checks.peft.against import CASES, fill, pairings
from effzoo.checks.peft.subject import modules
from effzoo.checks.runner import Failed
from effzoo.checks.subject import Subject, live
from effzoo.spec import Spec, parse_one

WAYS = 16  # in which factors may belong together


def limit(gigabytes: float, seconds: float) -> None:
    """Bound what this process and those it starts may take, where the system can; seconds: those of two threads."""
    try:
        import resource
    except ImportError:  # only the clock of the parent limits it
        return
    for what, most in (
        (resource.RLIMIT_AS, int(gigabytes * 2**30)),
        (resource.RLIMIT_CPU, 2 * int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 2**28),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (bound, bound))


def report(asked: dict[str, Any]) -> dict[str, Any]:
    """The checks of every entry of the file."""
    names = [(kind, name) for kind, name in registry.load_file(asked["file"]) if kind in asked["checks"]]
    if asked["spec"] is not None:
        names = [(kind, asked["spec"]) for kind, name in names if name == parse_one(asked["spec"]).name]
    told = []
    for kind, name in names:
        wanted = [one for one in asked["checks"][kind] if one != "is_own_work"]
        done = checks.check(kind, name, only=asked["checks"][kind], own=len(wanted) < len(asked["checks"][kind]))
        results = [asdict(result) for result in done.results]
        told.append({"kind": kind, "name": name, "subject": done.subject, "checks": results})
    return {"reports": told}


def numbers(asked: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an entry of the file computes of the given tensors."""
    registry.load_file(asked["file"])
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in asked["options"].items()}
    reference = Reference(asked["kind"], asked["reference"], Spec("reference", options))
    spec = str(reference.options_for(parse_one(asked["name"])))
    outputs: dict[str, Tensor] = {}
    for number, call in enumerate(asked["calls"]):
        start = f"{number}."
        own = {key.removeprefix(start): tensor for key, tensor in inputs.items() if key.startswith(start)}
        of = attention if asked["kind"] == "attention" else method
        outputs |= {f"{number}.{key}": tensor.detach().contiguous() for key, tensor in of(spec, call, own).items()}
    return outputs


def attention(spec: str, call: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of one call of an attention layer."""
    core = Subject.of(spec).core(causal=call["causal"], heads=call["heads"], width=call["width"], max_length=64)
    share({key.removeprefix("state."): x for key, x in given.items() if key.startswith("state.")}, core)
    mask = Mask(given.get("valid"))
    if set(core.uses(mask)) != set(call["names"]):
        raise Failed(f"forward takes {', '.join(core.uses(mask))} where the reference takes {', '.join(call['names'])}")
    inputs = [given[name].requires_grad_() if name in call["names"] else None for name in core.projections]
    out = core(*inputs, mask=mask)
    grads = torch.autograd.grad((out * given["weight"]).sum(), live(inputs), allow_unused=True)
    names = [name for name, x in zip(core.projections, inputs, strict=True) if x is not None]
    return {"the output": out} | {
        f"the gradient of {name}": torch.zeros_like(given[name]) if grad is None else grad
        for name, grad in zip(names, grads, strict=True)
    }


def method(spec: str, call: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits of one model, with each way in which the factors may belong together."""
    case = CASES[call["case"]]
    model = Tuned.of(spec).attached(case).eval()
    hung = modules(model)
    if set(hung) != set(call["paths"]):
        raise Failed(
            f"it hangs on {', '.join(sorted(hung)[:4])}, the reference on {', '.join(sorted(call['paths'])[:4])}"
        )
    factors = {
        path: {key.removeprefix(f"factor.{path}."): x for key, x in given.items() if key.startswith(f"factor.{path}.")}
        for path in hung
    }
    found = {}
    with torch.no_grad():
        for number, pairs in enumerate(pairings(hung, factors, "the reference")):
            if number == WAYS:
                break
            fill(hung, factors, pairs)
            found[f"the output.way{number}"] = model(input_ids=given["input_ids"]).logits
    return found


def main(folder: Path) -> None:
    asked = json.loads((folder / ASKED).read_text())
    inputs = safetensors.torch.load_file(folder / INPUTS)
    answer: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    torch.set_num_threads(1)
    limit(asked["gigabytes"], asked["seconds"])
    try:
        if asked["what"] == "report":
            answer = report(asked)
        else:
            outputs = numbers(asked, inputs)
    except Exception as error:  # of the checked file; the parent shows it
        answer = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    safetensors.torch.save_file(outputs, folder / OUTPUTS)
    (folder / ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
