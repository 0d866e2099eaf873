"""Dtypes tensor by tensor: a norm or a head that is float32 in a model in bfloat16 stays float32, both ways and through
folders. And so whether a tensor learns, both ways; folders do not say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def hold_in(tensor: Tensor, dtype: torch.dtype) -> None:
    """Hold the content of a tensor in another dtype; the tensor stays the same object."""
    if tensor.dtype != dtype:
        tensor.data = tensor.data.to(dtype)


def let_learn(tensors: Mapping[str, Tensor], learns: Mapping[str, bool]) -> None:
    """Set `requires_grad` of the parameters that are named."""
    for key, flag in learns.items():
        if isinstance(tensors[key], nn.Parameter) and tensors[key].requires_grad != flag:
            tensors[key].requires_grad_(flag)


def load_state(theirs: Any, state: dict[str, Tensor], learns: Mapping[str, bool]) -> None:
    """Load a state dict into a model of transformers, each tensor in its own dtype and trainable as `learns` says.

    What their model ties stays tied.
    """
    tensors = {
        **dict(theirs.named_parameters(remove_duplicate=False)),
        **dict(theirs.named_buffers(remove_duplicate=False)),
    }
    for key, tensor in state.items():
        if key in tensors:
            hold_in(tensors[key], tensor.dtype)
    theirs.load_state_dict(state)
    let_learn(tensors, {key: flag for key, flag in learns.items() if key in tensors})
