"""What the tests of several method families use."""

import dataclasses
import socket
import sys

import torch

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.sites import sites
from effzoo.train import Callback, Optimisation, Saving

SIZES = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 96}
SMALL = {
    "perceiver": {
        "dim": 16,
        "layers": 2,
        "latents": 5,
        "heads": 2,
        "mlp": 16,
        "grid": (6, 6),
        "bands": 2,
        "cross_attends": 2,
    },
    "perceiver-io": {
        "dim": 16,
        "layers": 2,
        "latents": 5,
        "heads": 2,
        "mlp": 16,
        "vocab": 53,
        "max_length": 96,
        "head_dim": 8,
        "value_dim": 8,
    },
    "reformer": {
        **SIZES,
        "head_dim": 8,
        "axial_shape": (8, 12),
        "axial_dims": (4, 12),
        "attention": ("local[chunk=8]", "lsh[chunk=8]"),
    },
    "reformer-enwik8": {
        **SIZES,
        "head_dim": 8,
        "axial_shape": (8, 12),
        "axial_dims": (4, 12),
        "attention": ("local[chunk=8]", "lsh[chunk=8]"),
    },
}


def sizes_of(name):
    """Sizes with which a model of the zoo is built in milliseconds."""
    grouped = getattr(effzoo.zoo.config(name), "kv_heads", 0)
    return SMALL.get(name, SIZES | ({"head_dim": 8, "kv_heads": 1, "attention": "full"} if grouped else {}))


def module(model, path, method):
    """What a method has hung on the site at a path."""
    return dict(sites(model))[path].of("default")[method]


def labelled(n=9, rows=3, vocab=53, labels=3):
    """The same batch each time, whose second row has five tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocab, (rows, n), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(labels, (rows,), generator=draw)}


def small(kind):
    """An attention kind with options small enough for tiny inputs."""
    return str(Kind.of(kind).spec)


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launcher(processes):
    """How `accelerate launch` starts so many processes on the CPU. The port is a free one: older versions do not take 0
    for that, and wait."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*line, "--main_process_port", str(free_port())]


def finetune(model, train, **settings):
    """`effzoo.finetune` with the fields of `Optimisation` and `Saving` among its keywords."""
    for name, kind in (("optimisation", Optimisation), ("saving", Saving)):
        fields = settings.keys() & {field.name for field in dataclasses.fields(kind)}
        if fields:
            settings[name] = kind(**{field: settings.pop(field) for field in fields})
    return effzoo.finetune(model, train, **settings)


class StopAt(Callback):
    """Interrupts a run when so many steps are taken."""

    def __init__(self, step):
        self.step = step

    def on_step_start(self, loop):
        if loop.step == self.step:
            raise KeyboardInterrupt


def task_of(name):
    """The task with a loss that a model of the zoo is trained for in tests of all of them."""
    config = effzoo.zoo.config(name)
    return "seq2seq_lm" if config.is_encoder_decoder else "causal_lm" if config.causal else "classification"
