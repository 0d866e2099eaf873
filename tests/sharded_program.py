"""What test_sharded starts in several processes: python tests/sharded_program.py FOLDER RANK RANKS PORT CASE..."""

import importlib.metadata
import json
import math
import os
import struct
import sys
import warnings
from pathlib import Path

import torch
from support import StopAt

import effzoo
from effzoo import convert, sharding
from effzoo.errors import EffzooError, TrainingError
from effzoo.tensors import stored_tensors
from effzoo.train import Callback, Optimisation, Saving, checkpoints, run
from effzoo.train.processes import end_group

SIZES = {"layers": 2, "dim": 16, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}
ROWS = [{"input_ids": [2 + i % 9, 3, 4 + i % 5, *[7] * (i % 4)], "labels": i % 3} for i in range(13)]
TOKENS = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
MODELS = {
    "encoder": ("bert", {"task": "classification", "num_labels": 3}),
    "llama": ("llama", {"task": "causal_lm", "kv_heads": 1, "head_dim": 8}),
    "tied": ("gpt2", {"task": "causal_lm"}),
    "mixture": ("bert", {"task": "classification", "num_labels": 3, "experts": 4, "router": "switch"}),
    "reversible": ("bert", {"task": "classification", "num_labels": 3, "residual": "reversible", "norm": "pre"}),
    "shared": ("albert", {"task": "classification", "num_labels": 3}),
    "perceiver": ("perceiver-io", {"task": "classification", "num_labels": 3, "latents": 5, "head_dim": 8,
                                   "value_dim": 8}),
    "longformer": ("longformer", {"task": "classification", "num_labels": 3, "attention": "longformer[window=4]"}),
}  # fmt: skip


def build(kind, peft=None, bits=None, dropout=0.0, half=False):
    torch.manual_seed(0)
    name, options = MODELS[kind]
    model = effzoo.build(name, **{**SIZES, "dropout": dropout, "attention_dropout": 0.0, **options})
    if bits is not None:
        effzoo.quantise(model, bits)
    if not half:
        model = model.double()
    torch.manual_seed(1)
    return model if peft is None else effzoo.attach(model, peft)


def saved(kind, folder, how):
    """The folder of a model that the first process has written, ours or of transformers."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    if torch.distributed.get_rank() == 0:
        if how == "read":
            effzoo.save(build(kind), folder)
        else:
            convert.to_transformers(build(kind)).save_pretrained(folder, max_shard_size="4kB")
    torch.distributed.barrier()
    return folder


def read(kind, peft, folder, how):
    """The model of `build`, of which each process has read its part: of our folder ("read"), of one of transformers,
    or of that as the name of the zoo has it."""
    name, options = MODELS[kind]
    folder, sizes = saved(kind, folder, how), {"dropout": 0.0, "attention_dropout": 0.0, "shard": "full", "peft": peft}
    if how != "read":
        sizes |= {"dtype": torch.float64, "task": options["task"]}
    torch.manual_seed(1)
    if how == "named":
        model = effzoo.build(name, **{**SIZES, **options, **sizes}, pretrained=folder)
    else:
        model = effzoo.build(pretrained=folder, **sizes)
    first = build(kind, peft)
    assert all(sharding.is_split(p) == (".adapters." not in key) for key, p in model.named_parameters())
    assert largest(everything(model), everything(first)) == 0
    assert flags(model) == flags(first)
    return model


def everything(model):
    return {key: sharding.whole(value) for key, value in model.state_dict().items()}


def flags(model):
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


def rows_of(kind):
    return TOKENS if MODELS[kind][1]["task"] == "causal_lm" else ROWS


def trained(model):
    """What is trained, whole: the adapters, or all."""
    state = dict(model.named_parameters())
    if effzoo.attached(model):
        state = {key: value for key, value in state.items() if ".adapters." in f".{key}"}
    return {key: sharding.whole(value.detach()).clone() for key, value in state.items()}


def frozen_in_part(model):
    model.embeddings.requires_grad_(False)
    model.blocks[0].attn.requires_grad_(False)
    return model


def finetune(model, kind, folder, *, sharded, offload=False, **settings):
    os.environ |= {"ACCELERATE_USE_FSDP": str(sharded).lower(), "FSDP_OFFLOAD_PARAMS": str(offload).lower()}
    data = rows_of(kind) * (20 if settings.get("packing") else 1)
    return effzoo.finetune(model, data, evaluate=data[:5], output_dir=folder, **{
        "batch_size": 8 // int(os.environ["WORLD_SIZE"]) // 2, "max_steps": 4, "learning_rate": 1e-2, "progress": False,
        "saving": Saving(log_every=1, save_every=2, evaluate_every=4),
        "optimisation": Optimisation(gradient_accumulation=2), **settings,
    })  # fmt: skip


def measured(result):
    return [[e.get("loss", 0), e.get("grad_norm", 0), e.get("eval_loss", 0)] for e in result.history]


def largest(tensors, others):
    assert tensors.keys() == others.keys()
    return max(float((x.double() - others[key].double()).abs().max()) for key, x in tensors.items())


def compared(case, folder):
    """The largest difference between a run that is sharded, or spreads sequences, and one that does neither: losses,
    norms of gradients, what is trained, what is read back from the files, and the base that a merge makes of it."""
    case, _, reads = case.partition(", ")
    kind, peft, how = f"{case}  ".split(" ")[:3]
    bits = {"nf4": 4, "int8": 8}.get(how)
    settings = {
        "blocks": {"recompute": "blocks"}, "nothing": {"recompute": "nothing"}, "packed": {"packing": True},
        "float16": {"precision": "float16"},
    }.get(how, {})  # fmt: skip
    whole_model, runs = peft in ("full", "part"), []
    for sharded in (False, True):
        spec, half = None if whole_model else peft, how == "float16"
        reading = sharded and reads
        model = read(kind, spec, folder / "whole", reads) if reading else build(kind, spec, bits, half=half)
        model = frozen_in_part(model) if peft == "part" else model
        splits, more = sharded and how != "sequence", {}
        if sharded and how.startswith("sequence"):
            more = {"sequence_ranks": 2, "batch_size": 8 // int(os.environ["WORLD_SIZE"])}
        if sharded and how == "offload":
            more = {"offload": True}
        result = finetune(model, kind, folder / str(sharded), sharded=splits, **settings, **more)
        assert sharding.is_sharded(model) == splits
        runs.append((torch.tensor(measured(result), dtype=torch.float64), trained(model)))
        again = build(kind, None, bits, half=half)
        if whole_model:
            checkpoints.load_weights(again, result.weights.parent)
            loaded = effzoo.load(result.weights.parent).state_dict()
            assert largest(loaded, again.state_dict()) == 0
        else:
            effzoo.load_adapter(again, result.adapter)
        runs[-1] += (trained(again),)
        if how == "merge":
            effzoo.merge(model)
            runs[-1] += ({key: sharding.whole(value).clone() for key, value in model.state_dict().items()},)
            effzoo.unmerge(model)
            assert largest(trained(model), runs[-1][1]) == 0
    (one, *tensors), (other, *others) = runs
    return max(float((one - other).abs().max()), *map(largest, tensors, others), largest(others[0], others[1]))


class Overflow(Callback):
    """In the second step the gradients of the last process are infinite, as float16 makes them."""

    def on_step_start(self, loop):
        spoils = loop.step == 1 and loop.processes.index == loop.processes.number - 1

        def spoil(_module, _inputs, outputs):
            if spoils:
                outputs[0].register_hook(lambda gradient: gradient * float("inf"))

        self.hook = loop.supervised.register_forward_hook(spoil)

    def on_update(self, loop):
        self.hook.remove()
        self.scale = loop.scaler.get_scale()


def overflowing(kind, peft, folder):
    """The scale of the loss after such a run, and what was trained."""
    model, overflow = build(kind, None if peft == "full" else peft, half=True), Overflow()
    finetune(model, kind, folder, sharded=True, precision="float16", callbacks=[overflow])
    return overflow.scale, {key: value.tolist() for key, value in trained(model).items()}


def made(kind, peft, folder, reads):
    return read(kind, peft, folder / "whole", reads) if reads else build(kind, peft)


def interrupted(kind, peft, folder, reads=""):
    """Begin a run of four steps, and stop it in the fourth."""
    try:
        finetune(made(kind, peft, folder, reads), kind, folder / "run", sharded=True, callbacks=[StopAt(3)])
    except KeyboardInterrupt:
        return None


def resumed(kind, peft, folder, sharded=True, reads=""):
    """Go on with a run: its losses, and what is trained at the end."""
    model = made(kind, peft, folder, reads)
    result = finetune(model, kind, folder / "run", sharded=sharded, resume=True)
    return measured(result), {key: value.tolist() for key, value in trained(model).items()}


class Bytes(Callback):
    """What this process holds when the optimizer has taken a step: weights, gradients and optimizer states."""

    def on_update(self, loop):
        tensors = (*loop.model.parameters(), *loop.model.buffers())
        gradients = [p.grad for p in loop.model.parameters() if p.grad is not None]
        states = [x for kept in loop.optimizer.state.values() for name, x in kept.items() if name != "step"]
        self.found = [held(tensors), held(gradients), held(states)]


def held(tensors):
    """Bytes of the storages, each once: gradients of a unit share one."""
    storages = [sharding.rows_here(tensor.detach())[0].untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory(kind, peft, folder):
    seen = Bytes()
    finetune(build(kind, peft), kind, folder, sharded=True, max_steps=1, callbacks=[seen])
    return seen.found


def refused(what, folder):
    """The error of reading a file in which one number is another; it lies in the last rows of a table."""
    how = "read" if what == "ours" else "converted"
    saved("encoder", folder, how)
    name = "embeddings.token.weight" if what == "ours" else "bert.embeddings.word_embeddings.weight"
    tensor = stored_tensors(folder)[name]
    if torch.distributed.get_rank() == 0:
        with tensor.file.open("r+b") as file:
            file.seek(tensor.start + tensor.shape.numel() * 8 - 8)
            file.write(struct.pack("<d", 7.5 if what == "ours" else math.nan))
    torch.distributed.barrier()
    try:
        effzoo.load(folder, shard="full")
    except EffzooError as error:
        return str(error)


def differing(what):
    """The error of a run in which the last process was given something else; None where there is none."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    model, data, settings = build("encoder", "lora[rank=2]"), ROWS, {}
    if last and what == "model":
        with torch.no_grad():
            model.blocks[1].mlp.up.weight[0, 0] += 1
    if last and what == "adapter":
        model = build("encoder", "lora[rank=3]")
    if last and what == "data":
        data = [*ROWS[:-1], {**ROWS[-1], "labels": 1}]
    if last and what == "settings":
        settings = {"seed": 1}
    if last and what == "version":
        importlib.metadata.version = lambda package, real=importlib.metadata.version: f"{real(package)}.1"
    try:
        effzoo.finetune(model, data, output_dir=Path(sys.argv[1]) / what, max_steps=1, progress=False, **settings)
    except TrainingError as error:
        return str(error)


def main():
    folder, rank, ranks, port, *cases = sys.argv[1:]
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "2",
    }  # fmt: skip
    torch.set_num_threads(1)
    if any("float16" in case or "overflow" in case for case in cases):
        run.check_precision = lambda *_: None  # float16 is refused on a CPU, though torch scales losses there as well
    found = {}
    for number, case in enumerate(cases):
        what, _, arguments = case.partition(": ")
        arguments, _, reads = arguments.partition(", ")
        given = arguments.split(" ")
        if what == "differs":
            found[case] = differing(arguments)
        elif what == "overflow":
            found[case] = overflowing(*given, Path(folder) / str(number))
        elif what == "stops":
            found[case] = interrupted(given[0], *(given[1:] or [None]), Path(folder), reads)
        elif what == "memory":
            found[case] = memory(given[0], *(given[1:] or [None]), Path(folder) / str(number))
        elif what == "goes on":
            found[case] = resumed(given[0], *(given[1:] or [None]), Path(folder), reads=reads)
        elif what == "faulty":
            found[case] = refused(arguments, Path(folder) / str(number))
        else:
            found[case] = compared(case, Path(folder) / str(number))
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
    end_group()
