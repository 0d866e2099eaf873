"""Several processes, each with its rows of every parameter (FSDP2), train as processes do that hold all of them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_program
import torch
from support import free_port

import effzoo
from effzoo.errors import EffzooError, IncompatibleError

PROGRAM = Path(__file__).parent / "sharded_program.py"
ARCHITECTURES = [
    "encoder full", "encoder part", "llama full", "tied full", "mixture full", "reversible full", "shared full",
    "perceiver full", "longformer full", "encoder full blocks", "encoder full nothing", "encoder full offload",
]  # fmt: skip
QUANTISED = ["encoder lora nf4", "encoder lora int8"]
MIXED = ["llama prefix", "mixture lora merge", "shared lora merge", "reversible houlsby", "encoder dora merge"]
SEQUENCES = [
    "longformer full sequence", "longformer lora sequence", "llama prefix sequence", "tied full sequence",
    "encoder houlsby sequence", "longformer lora sequence+shards",
    "llama full sequence+shards",
]  # fmt: skip
FAST = ["encoder full", "encoder lora merge", "longformer lora sequence", "tied lora, named", "encoder full, read"]


def launch(folder, processes, cases):
    """What each of so many processes found, {case: ...}."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(rank), str(processes), port, *cases],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    errors = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors[0][-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(processes)]


def check_equal(results, cases):
    for found in results:
        assert found.keys() == set(cases)
        assert {case: difference for case, difference in found.items() if not difference < 1e-10} == {}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found of a few cases."""
    return launch(tmp_path_factory.mktemp("two"), 2, [*FAST, *MEMORY, *(f"differs: {what}" for what in GIVEN)])


def test_a_sharded_run_has_the_losses_and_weights_of_one_that_is_not(two):
    check_equal([{case: found[case] for case in FAST} for found in two], FAST)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_architecture_trains_sharded(tmp_path, processes):
    cases = [*ARCHITECTURES, *QUANTISED, *MIXED, "mixture part"]
    check_equal(launch(tmp_path, processes, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_sequences_are_spread_over_processes_that_share_batches(tmp_path, processes):
    """Two compute a sequence together; of four, two pairs share the batches, and all split the model."""
    check_equal(launch(tmp_path, processes, SEQUENCES), SEQUENCES)


@pytest.mark.slow
def test_every_method_trains_sharded(tmp_path):
    """Parameter, input, function and routed methods, stages, masks chosen by data, pruning on the way."""
    methods = [name for name in effzoo.peft.names() if name != "residual_adapter"]  # for convolutions
    cases = [f"encoder {name}" for name in methods]
    check_equal(launch(tmp_path, 2, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["encoder", "encoder lora", "tied, converted", "encoder lora, read"])
def test_a_run_resumes_with_another_number_of_processes(tmp_path, monkeypatch, given):
    """Two begin it; four, and one that holds the whole model, go on with it to the losses of one that never stopped."""
    (kind, *peft), begun = given.partition(",")[0].split(" "), tmp_path / "begun"
    begun.mkdir()
    launch(begun, 2, [f"stops: {given}"])
    shutil.copytree(begun, tmp_path / "four")
    for key, value in {"WORLD_SIZE": "1", "FSDP_OFFLOAD_PARAMS": "false", "ACCELERATE_USE_FSDP": "false"}.items():
        monkeypatch.setenv(key, value)
    straight, one = (
        sharded_program.resumed(kind, *(peft or [None]), folder, sharded=False) for folder in (tmp_path / "new", begun)
    )
    four = [found[f"goes on: {given}"] for found in launch(tmp_path / "four", 4, [f"goes on: {given}"])]
    for found in (one, *four):
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(straight[0]), rtol=0, atol=1e-10)
        for key, value in straight[1].items():
            torch.testing.assert_close(torch.tensor(found[1][key]), torch.tensor(value), rtol=0, atol=1e-10)


GIVEN = {
    "data": "data is [0-9a-f]+ in process 0, and [0-9a-f]+ in process 1;",
    "model": r"blocks.1.mlp.up.weight is (torch.float64\[32, 16\]) -?[0-9a-f]+ in process 0, and \1 -?[0-9a-f]+ in "
    "process 1; .* torch.manual_seed",
    "adapter": r"adapters: default is lora\[rank=2\] in process 0, and lora\[rank=3\] in process 1;",
    "settings": "seed is 0 in process 0, and 1 in process 1;",
    "version": "version of effzoo is .* in process 1",
}


MEMORY = ["memory: encoder lora"]


def test_a_process_holds_what_the_plan_says(two):
    check_memory(two[0], MEMORY[0])


@pytest.mark.slow
def test_a_process_holds_what_the_plan_says_of_every_architecture(tmp_path):
    cases = ["memory: encoder", "memory: tied", "memory: reversible", "memory: llama"]
    found = launch(tmp_path, 2, cases)[0]
    for case in cases:
        check_memory(found, case)


def check_memory(found, case):
    """Bytes of the first of two, which holds the odd rows."""
    kind, *peft = case.removeprefix("memory: ").split(" ")
    model = sharded_program.build(kind, *peft)
    plan = effzoo.plan(model, batch=2, length=7, ranks=2, shard="full", optimizer="adamw")
    assert [plan.weights, plan.gradients, plan.optimizer] == found[case], case
    whole = effzoo.plan(model, batch=2, length=7)
    assert plan.weights < whole.weights and plan.kept == whole.kept


@pytest.mark.slow
def test_packed_rows_train_sharded(tmp_path):
    cases = ["tied full packed", "llama lora packed"]
    check_equal(launch(tmp_path, 2, cases), cases)


@pytest.mark.slow
def test_float16_trains_sharded_and_a_step_that_overflows_in_one_process_is_left_out_in_all(tmp_path):
    """Losses, weights and norms are those of processes that hold the whole model, within float32's rounding."""
    same = ["encoder full float16", "encoder lora float16"]
    spoilt = ["overflow: encoder full", "overflow: encoder lora"]
    found = launch(tmp_path, 2, same + spoilt)
    assert all(of_rank[case] < 1e-6 for of_rank in found for case in same)
    for case in spoilt:
        (scale, tensors), other = (of_rank[case] for of_rank in found)
        assert [scale, tensors] == other and scale == 2**15, "half of what it began with, in both"
        assert all(torch.isfinite(torch.tensor(value)).all() for value in tensors.values())


def test_processes_that_were_given_different_things_say_so_and_stop(two):
    for found in two:
        for what, expected in GIVEN.items():
            assert re.search(f"the processes of this run differ: {expected}", found[f"differs: {what}"]), found


@pytest.mark.parametrize(
    ("peft", "settings", "message"),
    [
        ("lora", {}, "sequence_ranks=2 processes compute a sequence together, and 1 processes were started"),
        ("adamix", {}, "the divergence of two forward passes compares whole sequences"),
        ("lora", {"teacher": True}, "a teacher compares whole sequences, of which a process has a part"),
        ("lora", {"metrics": dict}, "metrics reads the logits of whole sequences, of which a process has a part"),
    ],
)
def test_sequences_that_cannot_be_spread_are_refused(tmp_path, peft, settings, message):
    if "teacher" in settings:
        settings = {"teacher": sharded_program.build("encoder")}
    kind = "tied" if "metrics" in settings else "encoder"
    with pytest.raises(EffzooError, match=message):
        effzoo.finetune(
            sharded_program.build(kind, peft), sharded_program.rows_of(kind), output_dir=tmp_path, max_steps=1,
            sequence_ranks=2, **settings,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed: after its backward pass no parameter has .* take FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1, which flattens parameters; give"),
    ],
)
def test_what_cannot_shard_is_refused(tmp_path, monkeypatch, variables, message):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(IncompatibleError, match=message):
        effzoo.finetune(sharded_program.build("encoder"), sharded_program.ROWS, output_dir=tmp_path, max_steps=1)
