"""What the tests of simulated CUDA run outside their own process: `echo cells | python run.py`. For each part that it
reads it prints the last line that the part printed: the result, as JSON."""

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import sys
import tempfile
import traceback
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
import device  # before torch
import torch
from torch.utils import _pytree as pytree

import effzoo
from effzoo.attention import backends, triton_launch
from effzoo.checks.matrix import ARCHITECTURES
from effzoo.checks.models import TinyModel
from effzoo.checks.peft import Subject
from effzoo.errors import EffzooError
from effzoo.measure import cards, prediction
from effzoo.measure import rows as files
from effzoo.peft import training
from effzoo.peft.attach import adapter_tensors
from tests import doubles, gpu_double

KINDS = (
    "full", "blockwise[blocks=2]", "blockwise[block=8, blocks=8]", "longformer[window=8]",
    "longformer[window=4, dilation=(1, 2)]",
    "longformer[window=8, global_projections=false]", "local[chunk=4]", "local[chunk=4, circular=true]",
    "lsh[chunk=4, rounds=2]",
    "lsh[chunk=4, rounds=2, stable=true, count_once=true]", "lsh[chunk=4, rounds=2, circular=true, count_once=true]",
    "linformer[k=8]",
    "linformer[k=8, sharing=none]", "linformer[k=8, sharing=layerwise]", "linformer[k=8, projection=mean]",
    "linformer[k=8, projection=conv]", "perceiver[latents=4]",
)  # fmt: skip
MODELS = {
    **ARCHITECTURES,
    "llama": ("llama", {"kv_heads": 1}),
    "modernbert": ("modernbert", {}),
    "reformer": ("reformer", {}),
}


def spec(method):
    return str(Subject.of(method).spec)


def case(architecture, kind):
    name, choices = MODELS[architecture]
    return TinyModel(name, kind, kind.startswith("longformer") and architecture != "perceiver", tuple(choices.items()))


def training_step(model, batch):
    """The loss of one step, every gradient, and the logits after it in evaluation mode."""
    torch.manual_seed(5)
    model.train()
    training.schedule(model, 0.0)
    loss = training.loss(model, **batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return loss.detach(), gradients, logits


def apart(one, other):
    """How far two results are from each other, compared with the largest entry."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    one, other = device.on_cpu(one), device.on_cpu(other)
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-6))  # some gradients are 0 but for rounding


def cells():
    """Every kind in every architecture, each with the method that has waited longest of those that it does not refuse:
    how far the device is from the CPU, and what waits."""
    waiting, found = [None, *effzoo.peft.names()], []
    for architecture, kind in itertools.product(MODELS, KINDS):
        one = case(architecture, kind)
        try:
            one.model()
        except EffzooError:
            continue
        for method in waiting:
            try:
                model = one.model() if method is None else effzoo.attach(one.model(), spec(method))
            except EffzooError:
                continue
            found.append([f"{one} with {method}", *compared(model, one.batch())])
            waiting.remove(method)
            waiting.append(method)
            break
    return found


def compared(model, batch):
    """The largest difference of loss, gradients and logits, and the waits of the step."""
    training.calibrate(model, [batch])
    moved = copy.deepcopy(model)
    loss, gradients, logits = training_step(model, batch)
    with device.Machine():
        moved = moved.to("cuda")
        there = {name: x.to("cuda") for name, x in batch.items()}
        device.WAITS.clear(), doubles.calls.clear()
        loss_there, gradients_there, logits_there = training_step(moved, there)
        waits = dict(device.WAITS)
    assert "efficient forward" in doubles.calls
    assert loss_there.is_cuda and logits_there.is_cuda and gradients.keys() == gradients_there.keys()
    each = [
        apart(loss, loss_there),
        apart(logits, logits_there),
        *(apart(x, gradients_there[name]) for name, x in gradients.items()),
    ]
    return max(each), waits


def attached():
    """Every method attached to a model that is on the device: what is left on the CPU, and how far its tensors are from
    those attached before."""
    found = []
    for architecture, kind in (("encoder", "longformer[window=8]"), ("perceiver", "full")):
        one = case(architecture, kind)
        for method in effzoo.peft.names():
            try:
                torch.manual_seed(3)
                before = effzoo.attach(one.model(), spec(method))
            except EffzooError:
                continue
            with device.Machine():
                model = one.model().to("cuda")
                torch.manual_seed(3)
                effzoo.attach(model, spec(method))
                left = [name for name, x in [*model.named_parameters(), *model.named_buffers()] if not x.is_cuda]
                there = adapter_tensors(model, "default")
            here = adapter_tensors(before, "default")
            found.append(
                [
                    f"{one} with {method}",
                    left,
                    max(apart(x, there[name]) for name, x in here.items() if x.is_floating_point()),
                ]
            )
    return found


def lives():
    """Methods attached, trained in all their stages, finished, saved, loaded and taken off on the device: what is left
    on the CPU then, how far the loaded model is from the saved one, and how far that is from such a life on the CPU."""
    found = []
    for method in ("ipt", "ladder", "lt_sft", "diff", "adamix", "prefix"):
        here, _, _ = lived(method, "cpu")
        with device.Machine():
            there, loaded, left = lived(method, "cuda")
        found.append([method, left, apart(there, loaded), apart(here, there)])
    return found


def lived(method, where):
    """The logits of a trained model and of a fresh one that has loaded its adapter, and what is not where it should
    be."""
    one = case("encoder", "longformer[window=8]")
    model, batch = one.model().to(where), {name: x.to(where) for name, x in one.batch().items()}
    torch.manual_seed(3)
    effzoo.attach(model, spec(method))
    training.calibrate(model, [batch])
    for stage, number in training.timetable(model, 2):
        training.begin(model, stage)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(number):
            training.schedule(model, step / number)
            training.loss(model.train(), **batch).backward()
            training.after_backward(model)
            optimizer.step()
            optimizer.zero_grad()
    training.finish(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        effzoo.save_adapter(model, folder)
        other = effzoo.load_adapter(one.model().to(where), folder)
        logits = [each.eval()(**batch).logits for each in (model, other)]
    effzoo.detach(other, "default")
    left = [
        name
        for each in (model, other)
        for name, x in [*each.named_parameters(), *each.named_buffers()]
        if x.device.type != where
    ]
    return *logits, left


def steps():
    """What waits in a step with dropout, a ragged batch and an optimizer: of the kinds with three methods, and of what
    else a model may be."""
    found = []
    wanted = [
        *itertools.product(["encoder"], KINDS, ["lora", "prefix", "houlsby"]),
        *itertools.product(["decoder"], KINDS, ["lora|prefix"]),
    ]
    for architecture, kind, method in wanted:
        one = case(architecture, kind)
        try:
            model = effzoo.attach(one.model(dropout=0.1), method)
        except EffzooError:
            continue
        found.append([f"{one} with {method}", waits_of(model, one.batch())])
    for name, model, batch in others():
        found.append([name, waits_of(model, batch)])
    return found


def waits_of(model, batch):
    """The waits of a step and of an evaluation."""
    with device.Machine():
        model = model.to("cuda").train()
        batch = {name: x.to("cuda") for name, x in batch.items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        device.WAITS.clear()
        training.loss(model, **batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.eval()(**batch)
        return dict(device.WAITS)


launch = triton_launch.started


def started(name, programs, where, given):
    """A kernel in Triton's interpreter, on the values of the device's tensors."""
    doubles.calls.append(f"triton {name}")
    launch(
        name,
        programs,
        torch.device("cpu"),
        {key: device.on_cpu(x) if isinstance(x, torch.Tensor) else x for key, x in given.items()},
    )


def kept(model, batch):
    """Bytes that autograd holds after a forward pass in training, each storage once, without parameters, buffers and
    inputs; and what ran."""
    live = weakref.WeakSet()

    class Held:
        def __init__(self, x):
            self.tensor, self.storage = x, device.on_cpu(x).untyped_storage()
            live.add(self)

    torch.manual_seed(5)
    doubles.calls.clear()
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        output = model.train()(**batch)
    gc.collect()
    own = {
        device.on_cpu(x).untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *batch.values())
    }
    sizes = {held.storage.data_ptr(): held.storage.nbytes() for held in live}
    assert output.loss.requires_grad
    return sum(size for address, size in sizes.items() if address not in own), sorted(set(doubles.calls))


PLANNED = (  # kind, backends beside "auto" that take it
    ("full", ("blocks", "efficient", "flash", "xformers")),
    ("longformer[window=8]", ("reference", "triton")),
    ("lsh[chunk=4, rounds=2]", ("efficient",)),
)


def by_xformers(function):
    """A double of a function of xformers, on the values of the device's tensors."""

    def run(*args):
        found = function(*pytree.tree_map(device.on_cpu, args))
        return pytree.tree_map_only(torch.Tensor, device.Cuda, found)

    return run


def planned():
    """What a plan for CUDA predicts, what is kept there, and what ran, with every backend."""
    found = []
    for kind, names in PLANNED:
        for name in ("auto", *names):
            dropouts = dict.fromkeys(("dropout", "attention_dropout"), 0.0 if name == "xformers" else 0.1)
            model = effzoo.build(
                "bert", attention=kind, backend=name, task="classification", num_labels=2, **SIZES, **dropouts
            )
            effzoo.attach(model, "lora|prefix") if name != "flash" else effzoo.attach(model, "lora")
            ids, lengths = torch.randint(2, 53, (2, 23)), torch.tensor([23, 15])
            batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
            if name != "flash":
                batch["attention_mask"] = (torch.arange(23) < lengths[:, None]).long()
                if kind.startswith("longformer"):
                    batch["global_attention_mask"] = (torch.arange(23) == 0).long().expand(2, -1).contiguous()
            expected = effzoo.plan(model, inputs=batch, device="cuda").kept
            with device.Machine():
                there = copy.deepcopy(model).to("cuda")
                found.append(
                    [f"{kind} by {name}", expected, *kept(there, {key: x.to("cuda") for key, x in batch.items()})]
                )
    return found


def refused():
    """What the device says of wrong values, which it looks at when it comes to them."""
    tasks = effzoo.build("bert", peft="routed[router=fixed, experts=2]", task="classification", num_labels=2, **SIZES)
    numbers = effzoo.build("bert", task="classification", num_labels=1, **SIZES)
    model = effzoo.build(
        "longformer", attention="longformer[window=4, max_globals=2]", task="classification", num_labels=2, **SIZES
    )
    ids, found = torch.ones(2, 8, dtype=torch.long), {}
    wrong = {
        "an id": (model, {"input_ids": ids * 53}),
        "a mask": (model, {"input_ids": ids, "attention_mask": ids * 2}),
        "a mask that is added": (model, {"input_ids": ids, "attention_mask": torch.zeros(2, 8)}),
        "a label": (model, {"input_ids": ids, "labels": torch.tensor([0, 2])}),
        "a number": (numbers, {"input_ids": ids, "labels": torch.tensor([0.0, float("nan")])}),
        "global tokens": (model, {"input_ids": ids, "global_attention_mask": ids}),
        "a task": (tasks, {"input_ids": ids, "task_ids": torch.tensor([0, 2])}),
    }
    for what, (one, batch) in wrong.items():
        with device.Machine():
            try:
                copy.deepcopy(one).to("cuda")(**{name: x.to("cuda") for name, x in batch.items()})
            except RuntimeError as assertion:
                found[what] = str(assertion)
    return found


def suite():
    """The GPU suite at tiny sizes, on a double of a card: the last event of every cell, and the rows, of which times
    are refused."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import gpu

    gpu_double.pretend(built=None)
    cards.need = lambda device: None
    prediction.PROBES["cuda"] = (64, 2**10)
    made, refused = files.made, []

    def untimed(row, where):
        if files.TIMES & row.keys():
            try:
                made(row, where)
            except EffzooError:
                refused.append(row["suite"])
        return made({name: value for name, value in row.items() if name not in files.TIMES}, where)

    files.made = untimed
    # the doubles of the operators take one dtype
    alike = {"dtypes": ("float32",), "dtype": "float32", "precision": "float32"}
    sizes = dataclasses.replace(
        gpu.TINY, checked=("longformer[window=8]", "perceiver[latents=4]"), lengths=(16,), **alike
    )
    with tempfile.TemporaryDirectory() as folder, device.Machine():
        for section in gpu.SHARES:
            gpu.perform(section, Path(folder), sizes, "cuda", math.inf)
        events = [
            [line["section"], line["cell"], line["event"], line.get("why", "")]
            for line in gpu.events(Path(folder)).values()
        ]
        found = [
            json.loads(line)
            for path in Path(folder).glob("*.jsonl")
            if path.stem in gpu.SHARES
            for line in path.read_text().splitlines()
        ]
    return {"events": events, "rows": found, "refused": sorted(set(refused))}


SIZES = {"layers": 2, "dim": 16, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}


def others():
    """Names, models and batches."""
    ids, mask = torch.randint(53, (3, 12)), (torch.arange(12) < torch.tensor([12, 9, 4])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
    build = functools.partial(effzoo.build, task="classification", num_labels=2, **SIZES)
    yield "BERT", build("bert"), batch
    yield "a Longformer", build("longformer", attention="longformer[window=4]"), batch
    yield "a decoder that reads the last token", build("gpt2", pooling="last"), batch
    yield (
        "a regression",
        effzoo.build("bert", task="classification", num_labels=1, **SIZES),
        {**batch, "labels": torch.rand(3)},
    )
    yield "several labels", build("bert"), {**batch, "labels": torch.rand(3, 2)}
    yield "masked words", effzoo.build("roberta", task="masked_lm", **SIZES), {**batch, "labels": ids}
    yield "the next word", effzoo.build("gpt2", task="causal_lm", **SIZES), {**batch, "labels": ids}
    yield "a Reformer", build("reformer", pooling="mean", positions="learned", attention="lsh[chunk=4]"), batch
    yield "packed documents", effzoo.build("gpt2", task="causal_lm", **SIZES), {
        "input_ids": ids, "labels": ids, "position_ids": torch.tensor([[*range(5), *range(7)]])
    }  # fmt: skip
    yield "numbered documents", effzoo.build("bert", task="masked_lm", attention="longformer[window=4]", **SIZES), {
        "input_ids": ids, "labels": ids, "document_ids": torch.tensor([[1] * 5 + [2] * 4 + [0] * 3] * 3)
    }  # fmt: skip
    yield "experts", build("bert", experts=2), batch
    yield "experts in equal shares", build("bert", experts=2, router="base"), batch
    yield (
        "experts by task",
        build("bert", peft="routed[router=fixed, experts=2]"),
        {**batch, "task_ids": torch.tensor([0, 1, 1])},
    )
    yield "experts by token", build("bert", peft="routed[experts=2]"), batch
    yield "the same, computed back", build("bert", peft="routed[experts=2]", norm="pre", residual="reversible"), batch
    chosen = build("bert", peft="fish")
    training.calibrate(chosen, [batch])
    yield "chosen entries", chosen, batch
    yield "orthonormal rows", build("bert", peft="loreft"), batch
    by_row = build("bert", peft="lora")
    effzoo.attach(by_row, "houlsby", name="other")
    yield "adapters by row", effzoo.activate(by_row, rows=["default", "other", "default"]), batch
    quantised = build("bert")
    effzoo.quantise(quantised, bits=4)
    yield "a quantised base", effzoo.attach(quantised, "lora"), batch


def main(part):
    """Print the result of a part."""
    doubles.registered()  # attention there is that of CUDA, in float64 as well
    backends.TAKES["efficient", "cuda"] = backends.ALL
    triton_launch._installed = lambda: part == "planned"  # elsewhere its interpreter would take too long
    if part == "planned":
        backends.TAKES |= {("flash", "cuda"): backends.ALL, ("xformers", "cuda"): backends.ALL}
        backends.has_no_flash = lambda device: ""
        functions = {
            name: by_xformers(run)
            for name, run in vars(doubles.XFORMERS).items()
            if name.startswith("memory_efficient_attention")
        }
        backends.xformers.installed, backends.xformers.ops = lambda: True, lambda: SimpleNamespace(**functions)
        triton_launch.started = started
    warnings.simplefilter("ignore")
    parts = {
        "cells": cells,
        "attached": attached,
        "lives": lives,
        "steps": steps,
        "refused": refused,
        "suite": suite,
        "planned": planned,
    }
    print(json.dumps(parts[part]()))


if __name__ == "__main__":
    for line in sys.stdin:  # each in a fork, which has the imports of this process and nothing of another part
        with tempfile.TemporaryFile("w+") as printed:
            child = os.fork()
            if child == 0:
                os.dup2(printed.fileno(), 1)
                try:
                    main(line.strip())
                except BaseException:
                    traceback.print_exc()
                    print("null")
                sys.stdout.flush()
                os._exit(0)  # what torch does at its end, it would do with the device that is none
            os.waitpid(child, 0)
            printed.seek(0)
            print(printed.read().splitlines()[-1], flush=True)
