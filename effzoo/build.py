"""`build`: a zoo name, an attention spec and a PEFT spec -> a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effzoo import zoo
from effzoo.annotations import Count
from effzoo.architectures import Transformer
from effzoo.errors import OptionError
from effzoo.peft.attach import attach

_OF_TEXTS = ("pad_token", "bos_token", "eos_token", "generation")  # which weights bring along, unless they are given


def build(
    name: str | Path,
    *,
    attention: str | Mapping[Any, Any] | Sequence[Any] | None = None,
    peft: Any = None,
    task: str = "features",
    num_labels: Count = 2,
    pretrained: Any = None,
    adapter: str = "default",
    adapter_dtype: torch.dtype | str | None = None,
    **sizes: Any,
) -> Transformer:
    """Build a model of the zoo, with any attention kind and any PEFT method.

    name: of the zoo (`effzoo.models()`), or a TOML file.
    attention: a spec such as `"longformer[window=256]"` instead of the entry's own.
    peft: a spec such as `"prefix[length=16]|lora[rank=4]"`.
    task: features, classification, token_classification, masked_lm or causal_lm.
    num_labels: of a classification head; 1 for regression.
    pretrained: a local folder, hub id or live model in a layout of transformers, or True for the entry's own weights.
    adapter, adapter_dtype: the name of the adapter that `peft` makes, and the dtype of its tensors; None for float32,
        or the model's where that is wider.
    sizes: fields of the config, such as `dim, layers, heads, mlp, vocab, max_length, dropout`.

    With `pretrained`, longer `max_length` extends the positions by copying them, and projections that only the new
    attention has start as copies of its queries, keys or values (Beltagy et al. 2020, section 5).

    Raises UnknownNameError, OptionError, SpecError, IncompatibleError, TargetError, ConversionError.
    """
    if adapter_dtype is not None and peft is None:
        raise OptionError(
            f"adapter_dtype={adapter_dtype!r} is the dtype of an adapter, and peft names none; give "
            "peft, or leave adapter_dtype out"
        )
    if attention is not None:
        sizes["attention"] = attention
    model = zoo.create(name, task=task, num_labels=num_labels, **sizes)
    if pretrained is not None and pretrained is not False:
        from effzoo import convert  # imports transformers, which `import effzoo` must not

        convert.load_pretrained(model, convert.source_of(model.config) if pretrained is True else pretrained)
        model.config = dataclasses.replace(model.config, **{name: sizes[name] for name in _OF_TEXTS if name in sizes})
    return model if peft is None else attach(model, peft, name=adapter, dtype=adapter_dtype)
