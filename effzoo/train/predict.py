"""`predict` and `embed`: what a model says of each example, in the order in which they were given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from effzoo.architectures import EncoderDecoder, Perceiver, Transformer
from effzoo.architectures.heads import pool
from effzoo.errors import IncompatibleError, InputError, OptionError, shown
from effzoo.sites import unwrap
from effzoo.train.batches import Pad
from effzoo.train.examples import examples as checked
from effzoo.train.form import accepted
from effzoo.train.preconditions import check_model, check_precision
from effzoo.train.settings import Steps

PER_TOKEN = ("token_classification", "question_answering")


def predict(
    model: Transformer | Perceiver,
    examples: Any,
    *,
    batch_size: Steps = 16,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    progress: bool = True,
) -> Any:
    """Logits [examples, num_labels], or for a features model the mean of its last hidden states, [examples, dim].

    For the tasks "token_classification" and "question_answering" they are a list of [tokens, num_labels], without
    padding. All are float32 on the CPU, in the order of the examples.

    model: of one of these tasks or "classification"; it runs in evaluation mode on its device.
    examples: tokenised, as for `finetune`; labels may be missing. They run in batches of like lengths.
    precision: of the forward pass.
    progress: show a bar.

    Raises InputError, IncompatibleError.
    """
    model = unwrap(model)
    check_model(model)
    if model.task not in ("classification", "features", *PER_TOKEN):
        raise InputError(
            "predict gives what the head of 'classification', 'features', 'token_classification' or "
            f"'question_answering' says, not {model.task!r}; call the model itself, or effzoo.generate"
        )
    answers: list[Any] = []
    for chosen, out, mask, lengths in _passes(model, examples, batch_size, precision, "Predicting", progress):
        values = out.logits
        if values is None:
            values = pool(out.last_hidden_state.float(), mask, "mean")
        for row, value, length in zip(chosen, values.float().cpu(), lengths, strict=True):
            answers += [None] * (row + 1 - len(answers))
            answers[row] = value[:length] if model.task in PER_TOKEN else value
    return answers if model.task in PER_TOKEN else torch.stack(answers)


def embed(
    model: Transformer | Perceiver,
    examples: Any,
    *,
    pooling: Literal["mean", "first", "last"] = "mean",
    normalise: bool = False,
    batch_size: Steps = 16,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    progress: bool = True,
) -> Tensor:
    """One vector for each example, [examples, dim]: of its last hidden states the mean, the first or the last one.

    They are float32 on the CPU, in the order of the examples.

    model: of any task whose output has the last hidden states; it runs in evaluation mode on its device.
    examples: tokenised; labels are not read.
    pooling: "first" is BERT's [CLS], "last" the last token of a decoder.
    normalise: divide each vector by its length, so that a product of two is their cosine.
    batch_size, precision, progress: as in `predict`.

    Raises InputError, IncompatibleError, OptionError.

    Reimers and Gurevych 2019, Sentence-BERT, arXiv:1908.10084, section 3.
    """
    model = unwrap(model)
    check_model(model)
    if isinstance(model, EncoderDecoder):
        raise IncompatibleError(
            "embed pools the states of one text, and an encoder-decoder has those of two; model.encode(ids, mask) "
            "gives those of the source"
        )
    if pooling not in ("mean", "first", "last"):
        raise OptionError(f"pooling is 'mean', 'first' or 'last', got {shown(pooling)}")
    vectors: list[Any] = []
    for chosen, out, mask, _ in _passes(model, examples, batch_size, precision, "Embedding", progress):
        if out.last_hidden_state is None:
            raise IncompatibleError(f"a {type(model).__name__} for {model.task} gives no last hidden states to pool")
        for row, vector in zip(chosen, pool(out.last_hidden_state.float(), mask, pooling).cpu(), strict=True):
            vectors += [None] * (row + 1 - len(vectors))
            vectors[row] = vector
    found = torch.stack(vectors)
    return torch.nn.functional.normalize(found, dim=-1) if normalise else found


@torch.no_grad()
def _passes(
    model: Any, examples: Any, batch_size: int, precision: str, what: str, progress: bool
) -> Iterator[tuple[list[int], Any, Tensor | None, list[int]]]:
    """Batches of like lengths: the numbers of examples, the output, where it is of tokens, and how many each has."""
    check_precision(model, precision)
    read = checked(examples, model, "examples", labelled=False)
    from tqdm.auto import tqdm  # comes with transformers, and takes a while to import

    device, collate = next(model.parameters()).device, Pad(model.task, model.config.pad_token, accepted(model))
    inputs = [read[i] for i in range(len(read))]
    lengths = [len(x["input_ids" if "input_ids" in x else "inputs_embeds"]) for x in inputs]
    order = sorted(range(len(inputs)), key=lengths.__getitem__)
    was_training = model.training
    model.eval()
    try:
        for at in tqdm(range(0, len(order), batch_size), desc=what, disable=not progress):
            chosen = order[at : at + batch_size]
            batch = {name: x.to(device) for name, x in collate([inputs[i] for i in chosen]).items()}
            with torch.autocast(device.type, dtype=getattr(torch, precision), enabled=precision != "float32"):
                out = model(**batch)
            # latents have no padding
            mask = None if isinstance(model, Perceiver) and not model.config.causal else batch.get("attention_mask")
            yield chosen, out, None if mask is None else mask.bool(), [lengths[i] for i in chosen]
    finally:
        model.train(was_training)
