"""Tiny models in float64 on which the checks run, one batch for them, and training that records every gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo import zoo
from effzoo.architectures import EncoderDecoderConfig, Transformer
from effzoo.attention.core import Mask, take_positions
from effzoo.blocks.block import Block
from effzoo.checks.facts import zero_gradient
from effzoo.peft import training
from effzoo.peft.attach import attached
from effzoo.sites import sites

SIZES = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}
LABELS, LENGTHS = 3, (20, 13, 7)
SILENT = 1e-13  # of the largest gradient: below that, a float64 gradient is rounding noise around an exact zero


@dataclass(frozen=True)
class TinyModel:
    """The recipe of one tiny model in float64, and of its batch.

    architecture: a zoo entry.
    attention: a spec.
    has_global: whether its batch has global tokens.
    choices: other fields of its config.
    """

    architecture: str
    attention: str
    has_global: bool = False
    choices: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        chosen = "".join(f", {name}={value}" for name, value in self.choices)
        return f"{self.architecture} with {self.attention}{' and global tokens' * self.has_global}{chosen}"

    def model(self, dropout: float = 0.0) -> Transformer:
        """A fresh copy of the model, always with the same weights, in evaluation mode."""
        return copy.deepcopy(_built(self.architecture, self.attention, dropout, self.choices))

    def batch(self) -> dict[str, Tensor]:
        """Three sequences of different lengths, every token labelled (of an encoder-decoder, as many as it writes), and
        global tokens at other places in each."""
        draw = torch.Generator().manual_seed(1)
        n = max(LENGTHS)
        mask = torch.arange(n) < torch.tensor(LENGTHS)[:, None]
        batch = {
            "input_ids": torch.randint(SIZES["vocab"], (len(LENGTHS), n), generator=draw),
            "attention_mask": mask.long(),
            "labels": torch.randint(LABELS, (len(LENGTHS), n), generator=draw).masked_fill(~mask, -100),
        }
        if self.has_global:
            batch["global_attention_mask"] = torch.zeros(len(LENGTHS), n, dtype=torch.long)
            for example, places in enumerate(((0, 9), (4,), (0, 3, 6))):
                batch["global_attention_mask"][example, list(places)] = 1
        return batch


@cache
def _built(architecture: str, attention: str, dropout: float, choices: tuple[tuple[str, Any], ...]) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = zoo.config(
            architecture, attention=attention, dropout=dropout, attention_dropout=dropout,
            **{**SIZES, **dict(choices)},
        )  # fmt: skip
        task = "seq2seq_lm" if isinstance(config, EncoderDecoderConfig) else "token_classification"
        model = zoo.made(config, task, LABELS)
        for parameter in model.parameters():  # larger than at a real start, so that attention is far from uniform
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def forget() -> None:
    """Drop the built models: names may mean other classes after a registry scope ends."""
    _built.cache_clear()


@torch.no_grad()
def last_block_at_two_positions(model: Transformer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last block at two positions of each example: computed for them alone, and taken from all that it computes."""
    block = cast(Block, model.eval().blocks[-1])
    valid, is_global = batch["attention_mask"].bool(), batch.get("global_attention_mask")
    x = torch.randn(*valid.shape, model.config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = Mask(valid, None if is_global is None else is_global.bool(), torch.arange(x.shape[1])[None])
    wanted = torch.stack([torch.zeros(len(x), dtype=torch.long), valid.sum(dim=1) - 2], dim=1)
    return block(x, mask, None, wanted), take_positions(block(x, mask), wanted)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's output in evaluation mode."""
    out: Tensor = model.eval()(**batch).logits
    return out


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 3) -> dict[str, float | None]:
    """The largest absolute gradient of each trainable tensor in AdamW steps with weight decay 0.1; None for no
    gradient."""
    training.calibrate(model, [batch])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    seen: dict[str, float | None] = {
        name: None for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for step in range(steps):
        optimizer.zero_grad()
        training.schedule(model, step / steps)
        training.loss(model, **batch).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if name in seen and parameter.grad is not None:
                seen[name] = _larger(seen[name], float(parameter.grad.abs().max()))
        training.after_backward(model)
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return seen


def _larger(before: float | None, now: float) -> float:
    """The larger of both; NaN wins, so that it is seen at the end."""
    return now if before is None or math.isnan(now) or now > before else before


def silent(model: nn.Module, seen: dict[str, float | None]) -> str:
    """What is wrong with the gradients that `train` recorded, as a clause that names the first tensor, or ""."""
    if not seen:
        return "nothing is trainable"
    excused = _excused(model)
    largest = max((value for value in seen.values() if value is not None and math.isfinite(value)), default=0.0)
    for problem, holds in (
        ("a gradient that is not finite", lambda value: value is not None and not math.isfinite(value)),
        ("no gradient (None)", lambda value: value is None),
        ("a gradient of 0", lambda value: value <= SILENT * largest),
    ):
        wrong = [name for name, value in seen.items() if name not in excused and holds(value)]
        if wrong:
            return (
                f"{len(wrong)} of {len(seen)} trainable tensors got {problem} in three steps, the first is {wrong[0]}"
            )
    return ""


def _excused(model: nn.Module) -> set[str]:
    """The parameters whose method says that their gradient vanishes by mathematics."""
    excused = set()
    known = dict(sites(model))
    for adapter, attachment in attached(model).items():
        for method, paths in attachment.methods:
            for path in paths:
                names = [name for name, _ in known[path].of(adapter)[method.name].named_parameters()]
                vanishing = [
                    name
                    for name in names
                    if any(fnmatchcase(f"{known[path].role}.{name}", pattern) for pattern in zero_gradient(method))
                ]
                excused |= {f"{path}.adapters.{adapter}.{method.name}.{name}" for name in vanishing}
    return excused
