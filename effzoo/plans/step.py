"""One training step on shadows: what autograd keeps after the forward pass, and the most that lives at one time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from effzoo.errors import IncompatibleError
from effzoo.plans.saved import Record, Saved
from effzoo.plans.shadow import LiveBytes, Shadows, key


def step(
    model: nn.Module, inputs: Mapping[str, Any], shadows: Shadows, autocast: torch.dtype | None = None,
    call: Callable[..., Any] | None = None,
) -> tuple[list[Saved], int]:  # fmt: skip
    """Forward and backward of a model of stand-ins -> what autograd saved, and the peak without the weights.

    call: runs the model, if not the model itself.

    The loss is the model's own, or the sum of its outputs when it has none. Raises IncompatibleError when the code
    needs a value that is not computed.
    """
    parameters, given = [*model.parameters(), *model.buffers()], [x for x in inputs.values() if isinstance(x, Tensor)]
    shadows.weights = {key(parameter) for parameter in model.parameters()}
    live_bytes = LiveBytes()
    live_bytes.known_before([*parameters, *given])
    record = Record([*parameters, *given], shadows.half_copies)
    record.follow(model)
    shadows.live_bytes = live_bytes
    try:
        with shadows, record:
            with torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext():
                output = (call or model)(**inputs)
            kept = [dataclasses.replace(saved, causes=dict(saved.causes)) for saved in record.storages.values()]
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
        shadows.live_bytes = None
    return kept, live_bytes.peak


def _loss(output: Any) -> Tensor | None:
    """The entry `loss`, or the sum of all outputs with a gradient; None without any."""
    loss = output.get("loss") if isinstance(output, dict) else None
    if loss is not None:
        return loss if loss.requires_grad else None
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    sums = [x.sum() for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return sum(sums[1:], sums[0]) if sums else None
