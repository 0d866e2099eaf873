"""One training step on shadows: what autograd keeps after the forward pass, and the most that lives at one time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from effzoo.errors import IncompatibleError
from effzoo.plan.saved import Record, Saved
from effzoo.plan.shadow import Meter, Shadows, key


def step(
    model: nn.Module, inputs: Mapping[str, Any], shadows: Shadows, autocast: torch.dtype | None = None
) -> tuple[list[Saved], int]:
    """Forward and backward of a model of stand-ins -> what was kept for the backward pass, and the peak without the
    weights.

    The loss is the model's own, or the sum of its outputs when it has none. Raises IncompatibleError when the code
    needs a value that is not computed.
    """
    parameters, given = [*model.parameters(), *model.buffers()], [x for x in inputs.values() if isinstance(x, Tensor)]
    shadows.weights = {key(parameter) for parameter in model.parameters()}
    meter = Meter()
    meter.known_before([*parameters, *given])
    record = Record([*parameters, *given], shadows.half_copies)
    record.follow(model)
    shadows.meter = meter
    try:
        with shadows, record:
            with torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext():
                output = model(**inputs)
            kept = [dataclasses.replace(saved, causes=dict(saved.causes)) for saved in record.held.values()]
            loss = _loss(output)
            del output
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise IncompatibleError(
            f"this model cannot be planned: {record.failed or type(model).__name__} decides by the values of "
            f"activations or weights ({error}), and a "
            "plan computes none; give it a path whose shapes do not depend on them"
        ) from error
    finally:
        shadows.meter = None
    return kept, meter.peak


def _loss(output: Any) -> Tensor | None:
    """What is derived: the entry `loss`, or the sum of everything that has a gradient; None when nothing has."""
    loss = output.get("loss") if isinstance(output, dict) else None
    if loss is not None:
        return loss if loss.requires_grad else None
    found = [
        x
        for x in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
        if isinstance(x, Tensor) and x.requires_grad
    ]
    return sum(x.sum() for x in found) if found else None  # type: ignore[return-value]
