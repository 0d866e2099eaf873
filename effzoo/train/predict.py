"""`predict`: what a model says of each example, in the order in which they were given."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from effzoo.architectures import Perceiver, Transformer
from effzoo.architectures.heads import pool
from effzoo.errors import InputError
from effzoo.sites import unwrap
from effzoo.train.batches import Pad
from effzoo.train.examples import examples as checked
from effzoo.train.form import accepted
from effzoo.train.preconditions import check_model, check_precision
from effzoo.train.settings import Steps


@torch.no_grad()
def predict(
    model: Transformer | Perceiver,
    examples: Any,
    *,
    batch_size: Steps = 16,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    progress: bool = True,
) -> Tensor:
    """Logits [examples, num_labels], or for a features model the mean of its last hidden states, [examples, dim].

    They are float32 on the CPU, in the order of the examples.

    model: of the task "classification" or "features"; it runs in evaluation mode on its device.
    examples: tokenised, as for `finetune`; labels may be missing. They run in batches of like lengths.
    precision: of the forward pass.
    progress: show a bar.

    Raises InputError, IncompatibleError.
    """
    model = unwrap(model)
    check_model(model)
    if model.task not in ("classification", "features"):
        raise InputError(
            "predict gives one row per example, for task 'classification' or 'features', not "
            f"{model.task!r}; call the model itself"
        )
    check_precision(model, precision)
    read = checked(examples, model, "examples", labelled=False)
    from tqdm.auto import tqdm  # comes with transformers, and takes a while to import

    device, collate = next(model.parameters()).device, Pad(model.task, model.config.pad_token, accepted(model))
    inputs = [read[i] for i in range(len(read))]
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].get("input_ids", ())))
    was_training, answers = model.training, torch.empty(0)
    model.eval()
    try:
        for at in tqdm(range(0, len(order), batch_size), desc="Predicting", disable=not progress):
            chosen = order[at : at + batch_size]
            batch = {name: x.to(device) for name, x in collate([inputs[i] for i in chosen]).items()}
            with torch.autocast(device.type, dtype=getattr(torch, precision), enabled=precision != "float32"):
                out = model(**batch)
            # latents have no padding
            mask = None if isinstance(model, Perceiver) and not model.config.causal else batch.get("attention_mask")
            values = out.logits
            if values is None:
                values = pool(out.last_hidden_state.float(), None if mask is None else mask.bool(), "mean")
            if not len(answers):
                answers = torch.empty(len(order), values.shape[1])
            answers[chosen] = values.float().cpu()
    finally:
        model.train(was_training)
    return answers
