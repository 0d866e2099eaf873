"""What an adapter costs: bytes kept for the backward pass, and the time of a training step and a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from effzoo import peft
from effzoo.errors import AdapterError
from effzoo.plans.saved import Record


def kept_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes that autograd keeps of one labelled batch for the backward pass, each storage once.

    Parameters, buffers and the batch itself are not counted.
    """
    mode = model.training
    model.train()
    try:
        with Record([*model.parameters(), *model.buffers(), *batch.values()]) as record:
            loss = peft.loss(model, **batch)
            kept = sum(saved.bytes for saved in record.storages.values())
            del loss
    finally:
        model.train(mode)
    return kept


def step(model: nn.Module, batch: Mapping[str, Tensor], learning_rate: float = 1e-6) -> Callable[[], None]:
    """One AdamW step of what is trainable, with clipping, as a function to be timed; it moves the weights a little."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)

    def once() -> None:
        model.train()
        optimizer.zero_grad()
        torch.autograd.backward(peft.loss(model, **batch))
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()

    return once


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """One pass in evaluation without gradients, as a function to be timed."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}

    def once() -> None:
        model.eval()
        with torch.inference_mode():
            model(**inputs)

    return once


def mergeable(model: nn.Module, name: str) -> bool:
    """Whether the adapter is a change of weights, so that it can be merged."""
    try:
        peft.delta(model, name)
    except AdapterError:
        return False
    return True
