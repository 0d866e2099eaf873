"""On a device: the same numbers as on the CPU, no tensor left behind, and no wait of the host that is not named here.

The device is simulated (`simulated_cuda/device.py`): no GPU is needed, but a C++ compiler and a build of torch without
CUDA.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from simulated_cuda.library import compiler, library

import effzoo

WAITS = {  # what is left: the function that makes the host wait, and why
    "peft/parameter/sparse_delta.py: ChosenEntries.bounds": "slices are as long as there are chosen entries in a "
    "tensor: looked up once for every content",
    "peft/modular/routed.py: Routed._by_token": "a router reads the tokens alone, and how many rows those are "
    "decides a shape",
    "elsewhere": "the backward pass of that choice of rows",
    "blocks/reversible.py: _again": "the same, computed back",
    "blocks/experts.py: Experts.forward": "experts read the tokens alone, and how many rows those are decides a shape",
    "blocks/experts.py: Experts._sent": "an expert computes the tokens that are sent to it, and their number decides "
    "a shape",
    "peft/function/loreft.py: orthonormal": "a QR decomposition, which may look at its result",
    "routing/assignment.py: assign": "the exact assignment is found on the CPU",
    "architectures/packing.py: documents_of": "position ids without an attention_mask say whether there are documents, "
    "whose number and lengths decide shapes",
    "architectures/packing.py: documents_by_id": "the same, by their numbers",
}
pytestmark = pytest.mark.slow


@functools.cache
def ran(part):
    """The result of one part of simulated_cuda/run.py."""
    reason = (
        None
        if compiler()
        else ("simulated CUDA needs a C++ compiler: none of g++, clang++ and c++ is here, and CXX names none")
    )
    if torch.version.cuda is not None:
        reason = f"this build of torch, {torch.__version__}, has CUDA of its own, beside which none can be simulated"
    if reason is not None:
        (pytest.fail if os.environ.get("SIMULATED_CUDA") == "required" else pytest.skip)(reason)
    machine, told = started()
    print(part, file=machine.stdin, flush=True)
    result = json.loads(machine.stdout.readline() or "null")
    told.seek(0)
    assert result is not None, told.read()
    return result


@functools.cache
def started():
    """The process that runs the parts, and the file of what it says of errors: it imports for all of them."""
    library()
    here, told = Path(__file__).parent, tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the process runs
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(here / "simulated_cuda/run.py")]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=told, text=True, env=environment), told


def test_a_step_on_the_device_is_the_step_on_the_cpu():
    cells = ran("cells")
    assert len(cells) > 80
    tried = {name.rpartition(" with ")[2] for name, _, _ in cells}
    assert {*effzoo.peft.names(), "None"} - tried == {"residual_adapter"}  # for convolutions
    assert [(name, far) for name, far, _ in cells if not far < 1e-9] == []
    unnamed = {wait for _, _, waits in cells for wait in waits if wait.rpartition(": ")[0] not in WAITS}
    assert unnamed == set()


def test_a_method_attached_on_the_device_is_on_it_and_starts_alike():
    found = ran("attached")
    assert len(found) > 85
    assert [(name, left) for name, left, _ in found if left] == []
    assert [(name, far) for name, _, far in found if not far < 1e-12] == []


def test_a_method_trained_saved_and_loaded_on_the_device_is_what_it_is_on_the_cpu():
    found = ran("lives")
    assert len(found) == 6
    assert [(name, left) for name, left, _, _ in found if left] == []
    assert [(name, *far) for name, _, *far in found if not max(far) < 1e-9] == []


def test_a_plan_for_cuda_is_what_is_kept_there():
    """Byte for byte, with every backend that computes there, with padding, a prefix and global tokens."""
    found = ran("planned")
    assert len(found) == 10
    assert [(name, expected, kept) for name, expected, kept, _ in found if expected != kept or not kept] == []
    for name, _, _, calls in found:
        backend = name.partition(" by ")[2]
        if backend == "auto":
            backend = "triton" if name.startswith("lsh") else "efficient"
        if backend in ("efficient", "triton", "xformers", "flash"):
            assert {call.partition(" ")[0] for call in calls} == {backend}, name


def test_the_host_waits_for_the_device_nowhere_but_where_it_must():
    steps = dict(ran("steps"))
    kinds = {
        name for name in steps if name.endswith((" with lora", " with prefix", " with houlsby", " with lora|prefix"))
    }
    assert len(kinds) > 55
    assert {name: waits for name, waits in steps.items() if waits and name in kinds} == {}
    waiting = {
        "packed documents",
        "numbered documents",
        "experts",
        "experts in equal shares",
        "experts by token",
        "the same, computed back",
        "chosen entries",
        "orthonormal rows",
    }
    assert {name for name in steps if steps[name]} == waiting
    found = {wait.rpartition(": ")[0] for waits in steps.values() for wait in waits}
    assert found == WAITS.keys()


def test_the_device_says_what_is_wrong_with_values_that_the_host_does_not_look_at():
    said = ran("refused")
    assert said == {
        "an id": "input_ids are in [0, 53)",
        "a mask": "attention_mask holds 0 and 1 (or booleans)",
        "a mask that is added": "attention_mask is torch.float32 and 0 everywhere, which marks no token: 1 is for "
        "tokens (masks that are added to "
        "scores have 0 there)",
        "a label": "labels are in [0, 2) or -100",
        "a number": "labels are finite numbers, and some are not",
        "global tokens": "more than 2 global tokens in a sequence; raise longformer[max_globals=...]",
        "a task": "task_ids are integers from 0 to 1, one for each of the 2 experts",
    }
