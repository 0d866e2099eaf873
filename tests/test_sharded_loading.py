"""Each of several processes reads its rows of a checkpoint: to the bits of a whole model, in its part of the memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import sharded_program
import torch
import transformers
from support import free_port
from test_loading import NAMES, made, saved
from test_sharded import check_equal, launch

import effzoo
from effzoo import convert
from effzoo.errors import ArgumentError, ConversionError, IncompatibleError, OptionError

ARCHITECTURES = [
    "encoder full, named", "encoder part, read", "llama full, converted", "tied full, named", "tied lora, converted",
    "mixture full, read", "reversible full, read", "shared full, converted", "perceiver full, read",
    "longformer full, named", "encoder lora merge, named", "mixture lora merge, read",
    "reversible houlsby, read",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_architecture_is_read_in_parts_and_trains(tmp_path, processes):
    """Weights to the bit; losses, norms of gradients, what is trained and what is saved to 1e-10."""
    check_equal(launch(tmp_path, processes, ARCHITECTURES), ARCHITECTURES)


@pytest.mark.slow
def test_every_method_is_attached_to_a_model_that_was_read_in_parts(tmp_path):
    methods = [name for name in effzoo.peft.names() if name != "residual_adapter"]  # for convolutions
    cases = [f"encoder {name}, read" for name in methods]
    check_equal(launch(tmp_path, 2, cases), cases)


@pytest.mark.slow
def test_a_damaged_row_is_an_error_of_every_process(tmp_path):
    """Also of those that did not read it."""
    first, second = launch(tmp_path, 2, ["faulty: ours", "faulty: theirs"])
    hash_differs, nan = (
        r"embeddings\.token\.weight is not the tensor that was saved",
        r"has NaN or infinity in \S+ \(1 ",
    )
    elsewhere = "process {} could not read its part of the model: .*{}"
    assert re.search(hash_differs, first["faulty: ours"])  # it hashes the first tensor
    assert re.match(elsewhere.format(0, hash_differs), second["faulty: ours"])
    assert re.match(elsewhere.format(1, nan), first["faulty: theirs"])  # the last rows are the second's
    assert re.search(nan, second["faulty: theirs"])


# --- refusals


def test_reading_in_parts_wants_processes_and_weights(tmp_path):
    model = sharded_program.build("encoder")
    effzoo.save(model, tmp_path / "ours")
    convert.to_transformers(model).save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        with pytest.raises(IncompatibleError, match=r"torchrun, and call torch\.distributed\.init_process_group"):
            effzoo.load(folder, shard="full")
        with pytest.raises(IncompatibleError, match=r"torchrun, and call torch\.distributed\.init_process_group"):
            effzoo.build(pretrained=folder, shard="full")
    with pytest.raises(OptionError, match=r"effzoo\.sharding\.shard\(effzoo\.build"):
        effzoo.build("bert", shard="full")
    with pytest.raises(ArgumentError, match="shard takes .full. or none"):
        effzoo.build("bert", pretrained=tmp_path / "theirs", shard="half")
    with pytest.raises(IncompatibleError, match="codes are buffers, whole in every process; leave shard out"):
        effzoo.build("bert", pretrained=tmp_path / "theirs", shard="full", quantise=4)


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", "tcp://127.0.0.1:" + str(free_port()), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_process_reads_all_of_it(tmp_path, alone):
    """And refuses what cannot be read in parts."""
    model = sharded_program.build("encoder")
    ours, theirs = effzoo.save(model, tmp_path / "ours"), tmp_path / "theirs"
    convert.to_transformers(model).save_pretrained(theirs)
    for folder in (ours, theirs):
        found = sharded_program.everything(effzoo.load(folder, shard="full"))
        assert sharded_program.largest(found, model.state_dict()) == 0
    with pytest.raises(IncompatibleError, match="build it with the other head once without shard"):
        effzoo.build(pretrained=ours, shard="full", num_labels=5)
    with pytest.raises(IncompatibleError, match="build it with the other attention once without shard"):
        effzoo.build(pretrained=ours, shard="full", attention="longformer[window=4]")
    tensors = safetensors.torch.load_file(theirs / "model.safetensors")
    torch.save(tensors, theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="has no safetensors files .* save it once more with save_pretrained"):
        effzoo.load(theirs, shard="full")


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_read_in_parts(name, tmp_path, alone):
    saved(made(name), tmp_path)
    found, wanted = effzoo.load(tmp_path, shard="full"), effzoo.load(tmp_path)
    assert all(map(effzoo.sharding.is_split, found.parameters()))
    assert sharded_program.largest(sharded_program.everything(found), wanted.state_dict()) == 0
    assert sharded_program.flags(found) == sharded_program.flags(wanted) and found.training == wanted.training


def test_experts_that_files_name_otherwise_are_split_once_effzoo_has_saved_them(tmp_path, alone):
    saved(made("MixtralModel"), tmp_path / "theirs")
    with pytest.raises(ConversionError, match="of a Mixtral or Qwen3-MoE, .* with effzoo.save"):
        effzoo.load(tmp_path / "theirs", shard="full")
    wanted = effzoo.load(tmp_path / "theirs")
    effzoo.save(wanted, tmp_path / "ours")
    found = effzoo.load(tmp_path / "ours", shard="full")
    assert sharded_program.largest(sharded_program.everything(found), wanted.state_dict()) == 0


def test_what_is_read_one_by_one_is_whole_for_a_moment(alone):
    """A shape needs no exchange, and nothing can be written."""
    model = effzoo.sharding.shard(sharded_program.build("encoder"))
    split = model.blocks[0].mlp.up.weight
    with effzoo.sharding.one_by_one(model):
        weight = model.blocks[0].mlp.up.weight
        assert isinstance(weight, torch.nn.Parameter) and not hasattr(weight, "full_tensor")
        assert type(weight + 0) is torch.Tensor and (weight + 0).equal(split.full_tensor())
        for like in (torch.zeros_like(weight), weight.new_zeros(weight.shape)):
            assert type(like) is torch.Tensor and not like.any() and like.device == weight.device
        with pytest.raises(IncompatibleError, match="it can be read alone"), torch.no_grad():
            weight.zero_()
        weight.requires_grad_(False)
    assert model.blocks[0].mlp.up.weight is split and not split.requires_grad


# --- memory, in processes of their own

CHILD = """
import os, resource, sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers, effzoo
from effzoo.sharding import rows_here
from effzoo.train.processes import end_group
torch.set_num_threads(1)
tiny, folder, peft = sys.argv[1:]
torch.distributed.init_process_group()
load = lambda source: effzoo.build(pretrained=source, shard="full", peft=peft or None)
load(tiny)  # what is imported on the way
torch.distributed.barrier()
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = most()
model = load(folder)
grown = most() - before
held = sum(rows_here(tensor.detach())[0].nbytes for tensor in (*model.parameters(), *model.buffers()))
print(held, grown)
end_group()
"""


LARGE = {"layers": 8, "dim": 1024, "heads": 16, "mlp": 2816, "vocab": 16000, "max_length": 512}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Checkpoints of 455 MiB and 369 MiB, ours and those of transformers, and tiny ones of the same layout."""
    home = tmp_path_factory.mktemp("large")
    for size, (width, layers, vocab) in {"large": (1024, 8, 16000), "tiny": (64, 1, 100)}.items():
        llama = transformers.LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
            intermediate_size=width * 11 // 4, vocab_size=vocab, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
        gpt2 = transformers.GPT2Config(
            vocab_size=vocab, n_embd=width, n_layer=layers, n_head=16, n_inner=width * 11 // 4, n_positions=512,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(llama).save_pretrained(home / f"{size} llama", max_shard_size="100MB")
        transformers.GPT2LMHeadModel(gpt2).save_pretrained(home / f"{size} gpt2", max_shard_size="100MB")
        effzoo.save(effzoo.load(home / f"{size} llama"), home / f"{size} ours")
    return home


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "peft", "processes"),
    [("llama", "", 2), ("llama", "", 4), ("gpt2", "", 2), ("ours", "", 2), ("llama", "lora", 2), ("llama", "dora", 2)],
)
def test_a_process_takes_the_memory_of_its_rows_and_of_a_tensor(kind, peft, processes, large):
    sizes = LARGE | ({"kv_heads": 16, "head_dim": 64, "tied": True} if kind != "gpt2" else {})
    task = {"task": "causal_lm", "pad_token": 0}
    plan = effzoo.plan(
        kind.replace("ours", "llama"), peft or None, length=8, ranks=processes, shard="full", **sizes, **task
    )
    port = str(free_port())
    root = str(Path(effzoo.__file__).parent.parent)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, large / f"tiny {kind}", large / f"large {kind}", peft],
            env={**os.environ, "PYTHONPATH": root, "RANK": str(rank), "WORLD_SIZE": str(processes),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in started:
        held, grown = map(int, process.communicate(timeout=600)[0].split())
        assert held <= plan.weights < 1.01 * plan.parameters * 4 / processes + 4e6  # the rotary table, and adapters
        in_blocks = kind != "gpt2" and peft != "dora"  # gpt2 is transposed, and dora takes norms of weights
        assert grown < 1.06 * (held if in_blocks else plan.shards.loading)
