"""A model with its loss, as one module: what several processes wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.parallel import OverRanks
from effzoo.peft import training
from effzoo.train.teaching import Teaching

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Supervised(nn.Module):
    """Labelled inputs -> (loss,) or (loss, penalty) in training, (loss, logits, positions) otherwise.

    All that has a gradient is computed here; a teacher is no part of it. positions: of the logits in the sequence; None
    for all.

    over: the model over processes that compute a sequence together.
    precision: of the forward pass ("float32", "bfloat16", "float16"); penalties are of the weights, which stay as they
        are.
    """

    def __init__(
        self,
        model: Transformer,
        teaching: Teaching | None = None,
        precision: str = "float32",
        over: OverRanks | None = None,
    ):
        super().__init__()
        self.model, self.teaching, self.autocast_dtype, self.over = model, teaching, HALF.get(precision), over

    def forward(self, penalised: bool = False, **inputs: Tensor) -> tuple[Any, ...]:
        kind = next(iter(inputs.values())).device.type
        with torch.autocast(kind, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if not self.training:
                output = (self.over or self.model)(**inputs)
                loss = output.loss.float() if self.autocast_dtype else output.loss
                return loss, output.logits, output.get("positions")
            if self.over is not None:
                loss = self.over(**inputs).loss
            elif self.teaching is None:
                loss = training.supervised(self.model, inputs)
            else:
                loss = self.teaching(self.model, inputs)
        penalty = training.penalty(self.model) if penalised else None
        return (loss,) if penalty is None else (loss, penalty)
