"""What an adapter costs, counted: bytes kept for the backward pass, and operations of a training step and of a forward
pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo import peft
from effzoo.checks.cost import CostCounter
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


def step_operations(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Operations of a labelled batch forward and backward, without the optimizer's.

    A multiplication and an addition of a product of matrices or of attention are two; everything else counts the
    entries that it writes. The model's gradients are cleared.
    """
    mode = model.training
    model.train()
    try:
        with CostCounter() as counter:
            torch.autograd.backward(peft.loss(model, **batch))
    finally:
        model.zero_grad()
        model.train(mode)
    return counter.cost.work


def pass_operations(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Operations of one pass in evaluation without gradients, counted as by `step_operations`."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    mode = model.training
    model.eval()
    try:
        with CostCounter() as counter, torch.no_grad():
            model(**inputs)
    finally:
        model.train(mode)
    return counter.cost.work


def mergeable(model: nn.Module, name: str) -> bool:
    """Whether the adapter is a change of weights, so that it can be merged."""
    try:
        peft.delta(model, name)
    except AdapterError:
        return False
    return True
