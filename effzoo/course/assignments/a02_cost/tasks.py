"""What is right: counted and measured. torch counts the operations of a layer, autograd tells what it saves, and
`effzoo.plan` plans a small model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import effzoo
from effzoo.course.task import Draw, Function, Task
from effzoo.lab.analyses.layer_cost import counted, layer
from effzoo.plans import plan

PARTS = ("projections", "attention", "feed-forward")


def operations(n: int, d: int, heads: int, hidden: int) -> dict[str, int]:
    """As torch counts them while a layer runs, on the device meta, where nothing is computed."""
    with torch.device("meta"):
        return counted(layer(d, heads, hidden, longest=n), torch.zeros(1, n, d))


def crossover(d: int, hidden: int) -> int:
    """By trying: what torch counts at a short length, each part with the power of n that it grows with."""
    short = operations(2, d, 1, hidden)
    n = 1
    while short["attention"] * n**2 / 4 <= (short["projections"] + short["feed-forward"]) * n / 2:
        n += 1
    return n


def parameters(layers: int, d: int, hidden: int, vocabulary: int, positions: int) -> int:
    """Those of the model itself."""
    with torch.device("meta"):
        model = effzoo.build(
            "gpt2", task="causal_lm", vocab=vocabulary, dim=d, layers=layers, heads=1, mlp=hidden, max_length=positions
        )
    return sum(parameter.numel() for parameter in model.parameters())


def kept(batch: int, n: int, d: int, heads: int) -> int:
    """By listening to autograd while attention is computed, each storage once."""
    saved: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    q, k, v = (torch.zeros(batch, heads, n, d // heads, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        weights = (q @ k.mT / math.sqrt(d // heads)).softmax(dim=-1)
        alive.append(weights @ v)
    return sum(saved.values())


PLANNED: dict[tuple[int, int], dict[str, int]] = {}  # by parameters and trained


def small_model(draw: Draw) -> dict[str, Any]:
    """A small decoder, trained as a whole or with LoRA: what `effzoo.plan` says of it."""
    heads = draw.whole(1, 3)
    sizes: dict[str, Any] = {
        "vocab": draw.whole(20, 60),
        "dim": 8 * heads,
        "layers": 1,
        "heads": heads,
        "mlp": draw.whole(9, 40),
    }
    method: dict[str, Any] = {"peft": "lora[rank=2]", "adapter_dtype": "float16"} if draw.number else {}
    planned = plan(
        "gpt2", **method, batch=1, length=3, max_length=8, dtype="float16", precision="master", task="causal_lm",
        **sizes,
    )  # fmt: skip
    found = {
        "weights": planned.weights, "gradients": planned.gradients, "optimizer": planned.optimizer,
        "copy": planned.master,
    }  # fmt: skip
    PLANNED[planned.parameters, planned.trainable] = found
    return {"parameters": planned.parameters, "trained": planned.trainable}


def memory(parameters: int, trained: int) -> dict[str, int]:
    return PLANNED[parameters, trained]


def table(parameters: int, trained: int, of: tuple[int, int, int, int]) -> dict[str, int]:
    """So many bytes for each number, in the order weights, gradients, optimizer and copy."""
    counts = (parameters, trained, trained, trained)
    return {part: size * count for part, size, count in zip(memory(parameters, trained), of, counts, strict=True)}


def layer_sizes(draw: Draw) -> dict[str, Any]:
    heads = draw.whole(1, 4)
    return {"n": draw.whole(1, 60), "d": heads * draw.whole(2, 9), "heads": heads, "hidden": draw.whole(3, 90)}


def with_parts(factors: tuple[float, float, float]) -> Any:
    """The right operations, each part times a factor."""

    def wrong(**sizes: int) -> dict[str, int]:
        right = operations(**sizes)
        return {part: round(factor * right[part]) for part, factor in zip(PARTS, factors, strict=True)}

    return wrong


def attention_times(factor: Any) -> Any:
    """The right operations with those of attention times factor(sizes)."""

    def wrong(**sizes: int) -> dict[str, int]:
        right = operations(**sizes)
        return {**right, "attention": round(factor(sizes) * right["attention"])}

    return wrong


TASKS: dict[str, Task] = {
    "operations": Function(
        "operations",
        right=operations,
        arguments=layer_sizes,
        wrong={
            "each multiplication is counted once: with its addition it is two operations": with_parts((0.5, 0.5, 0.5)),
            "there are four projections, q, k, v and the output: one is missing": with_parts((0.75, 1, 1)),
            "attention has two products, Q K^T and the weights times V: one is missing": with_parts((1, 0.5, 1)),
            "the feed-forward has two products, up and down: one is missing": with_parts((1, 1, 0.5)),
            "attention is counted once for each head with the whole d: a head is d / heads wide": attention_times(
                lambda sizes: sizes["heads"]
            ),
            "attention is counted for one head: there are as many as heads says": attention_times(
                lambda sizes: 1 / sizes["heads"]
            ),
            "attention is linear in n: each of n queries meets n keys": attention_times(lambda sizes: 1 / sizes["n"]),
        },
    ),
    "crossover": Function(
        "crossover",
        right=crossover,
        arguments=lambda draw: {"d": draw.whole(2, 80), "hidden": draw.whole(2, 300)},
        wrong={
            "at this n both are equal: the first at which attention takes more is the next one": (
                lambda d, hidden: 2 * d + hidden
            ),
            "this compares attention with the feed-forward alone; the rest of the layer has the projections too": (
                lambda d, hidden: hidden + 1
            ),
            "this compares attention with the projections alone; the rest of the layer has the feed-forward too": (
                lambda d, hidden: 2 * d + 1
            ),
            "this takes hidden = 4 d, and hidden is given": lambda d, hidden: 6 * d + 1,
        },
    ),
    "parameters": Function(
        "parameters",
        right=parameters,
        arguments=lambda draw: {
            "layers": draw.whole(1, 3),
            "d": 2 * draw.whole(2, 12),
            "hidden": draw.whole(3, 60),
            "vocabulary": draw.whole(20, 60),
            "positions": draw.whole(3, 20),
        },
        draws=3,
        wrong={
            "the last norm is missing": lambda **s: parameters(**s) - 2 * s["d"],
            "the biases are missing: each linear layer has one number for each output": (
                lambda **s: parameters(**s) - s["layers"] * (5 * s["d"] + s["hidden"])
            ),
            "d numbers are missing in each layer: one of its biases, a scale or a shift": (
                lambda **s: parameters(**s) - s["layers"] * s["d"]
            ),
            "a layer has two norms: one is missing": lambda **s: parameters(**s) - 2 * s["layers"] * s["d"],
            "the norms of the layers are missing": lambda **s: parameters(**s) - 4 * s["layers"] * s["d"],
            "a norm has a scale and a shift: the shifts are missing": (
                lambda **s: parameters(**s) - (2 * s["layers"] + 1) * s["d"]
            ),
            "the embedding of positions is missing": lambda **s: parameters(**s) - s["positions"] * s["d"],
            "the output uses the embedding of tokens again; it is counted twice": (
                lambda **s: parameters(**s) + s["vocabulary"] * s["d"]
            ),
        },
    ),
    "kept": Function(
        "kept",
        right=kept,
        arguments=lambda draw: {"batch": draw.whole(1, 3), "n": draw.whole(2, 40), "d": 12, "heads": draw.whole(1, 4)},
        wrong={
            "scores and weights are both counted: the softmax needs its output alone": (
                lambda batch, n, d, heads: kept(batch, n, d, heads) + batch * heads * n**2
            ),
            "the weights are counted for one head: each head has its own n x n": (
                lambda batch, n, d, heads: kept(batch, n, d, 1)
            ),
            "q, k and v are not counted: the products need them": lambda batch, n, d, heads: batch * heads * n**2,
            "q, k and v are all needed, in the two products: one of them is missing": (
                lambda batch, n, d, heads: kept(batch, n, d, heads) - batch * n * d
            ),
            "the output is counted: this layer's backward pass does not need it": (
                lambda batch, n, d, heads: kept(batch, n, d, heads) + batch * n * d
            ),
            "q, k and v are counted with the width d for each head: d is that of all heads together": (
                lambda batch, n, d, heads: kept(batch, n, d * heads, heads)
            ),
            "this is of one example": lambda batch, n, d, heads: kept(1, n, d, heads),
        },
    ),
    "memory": Function(
        "memory",
        right=memory,
        arguments=small_model,
        draws=2,
        wrong={
            "the optimizer has one moment of 4 bytes: AdamW keeps two": lambda **s: table(**s, of=(2, 2, 4, 4)),
            "the moments are in half precision: they are float32, 4 bytes each": lambda **s: table(
                **s, of=(2, 2, 4, 2)
            ),
            "the optimizer counts the copy too, which has a part of its own": lambda **s: table(**s, of=(2, 2, 12, 4)),
            "gradients are counted in float32: they are of 2 bytes": lambda **s: table(**s, of=(2, 4, 8, 4)),
            "weights are counted in float32: they are of 2 bytes": lambda **s: table(**s, of=(4, 2, 8, 4)),
            "all parameters have gradients, moments and copies: only those that are trained have": (
                lambda parameters, trained: {
                    "weights": 2 * parameters,
                    "gradients": 2 * parameters,
                    "optimizer": 8 * parameters,
                    "copy": 4 * parameters,
                }
            ),
            "the copy is of all parameters: only a weight that is trained needs one": (
                lambda parameters, trained: memory(parameters, trained) | {"copy": 4 * parameters}
            ),
            "only what is trained has a weight here: the frozen ones stand in memory too": (
                lambda parameters, trained: memory(parameters, trained) | {"weights": 2 * trained}
            ),
        },
    ),
}
