"""`build`: a zoo name, an attention spec and a PEFT spec -> a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from effzoo import zoo
from effzoo.annotations import Count
from effzoo.architectures import Transformer
from effzoo.codes import check_bits
from effzoo.errors import IncompatibleError, OptionError
from effzoo.folder.hub import folder_of
from effzoo.folder.loading import reused
from effzoo.peft.attach import attach
from effzoo.placing import check_not_both, placed
from effzoo.quantisation import quantise as quantise_whole
from effzoo.quantisation.model import weight_by_weight
from effzoo.sharding import all_processes, together
from effzoo.sites.dtypes import floating
from effzoo.undrawn import Undrawn

_OF_TEXTS = ("pad_token", "bos_token", "eos_token", "generation")  # which weights bring along, unless they are given


def build(
    name: str | Path | None = None,
    *,
    attention: str | Mapping[Any, Any] | Sequence[Any] | None = None,
    peft: Any = None,
    task: str | None = None,
    num_labels: Count | None = None,
    pretrained: Any = None,
    dtype: torch.dtype | str | None = None,
    quantise: int | None = None,
    shard: Literal["full"] | None = None,
    device_map: Any = None,
    adapter: str = "default",
    adapter_dtype: torch.dtype | str | None = None,
    **sizes: Any,
) -> Transformer:
    """Build a model of the zoo, with any attention kind and any PEFT method.

    name: of the zoo (`effzoo.models()`), or a TOML file; with `pretrained` None, for the sizes and layout found there.
    attention: a spec such as `"longformer[window=256]"` instead of the entry's own.
    peft: a spec such as `"prefix[length=16]|lora[rank=4]"`.
    task: features, classification, token_classification, question_answering, masked_lm, causal_lm or, of an
        encoder-decoder, seq2seq_lm; None for that of a folder that `effzoo.save` wrote, or of a checkpoint without a
        name, else features.
    num_labels: of a classification head; 1 for regression. None for those of the weights' own head, else 2.
    pretrained: a folder that `effzoo.save` wrote; a local folder, hub id or live model in a layout of transformers; or
        True for the entry's own weights.
    dtype: of the weights, such as torch.bfloat16; "auto" for that of the pretrained ones; None for float32, and for its
        own of a folder that `effzoo.save` wrote.
    quantise: bits of the projections and feed-forward matrices of the blocks, 8 or 4, as `effzoo.quantise` stores them;
        None for dense ones.
    shard: "full" splits the model over all processes of torch.distributed, as `finetune` under FSDP2 does, and each
        reads its rows of the weights of `pretrained`; None for the whole model in each.
    device_map: where the model stands when it is there: a device; {path of a module: device}; or "auto", with which
        accelerate fills the devices (`effzoo.placing`). None for the CPU, or where a live model is.
    adapter, adapter_dtype: the name of the adapter that `peft` makes, and the dtype of its tensors; None for float32,
        or the model's where that is wider.
    sizes: fields of the config, such as `dim, layers, heads, mlp, vocab, max_length, dropout`.

    With `pretrained`, longer `max_length` extends the positions by copying them, and projections that only the new
    attention has start as copies of its queries, keys or values (Beltagy et al. 2020, section 5). Safetensors files are
    read, and quantised, tensor by tensor: loading takes no memory beside the model's, or beside a process's rows of it
    and one tensor (what the layout transposes, joins or cuts is whole for a moment). Of a folder that `effzoo.save`
    wrote, the sizes are fixed, but for max_length (`effzoo.resize_positions`) and those that only training and
    generation read (dropout, backend, eos_token); the attention may be swapped, and another task has a new head.

    Raises UnknownNameError, OptionError, SpecError, IncompatibleError, TargetError, ConversionError.
    """
    if adapter_dtype is not None and peft is None:
        raise OptionError(
            f"adapter_dtype={adapter_dtype!r} is the dtype of an adapter, and peft names none; give "
            "peft, or leave adapter_dtype out"
        )
    if attention is not None:
        sizes["attention"] = attention
    if quantise is not None:
        check_bits(quantise)
    check_not_both(shard, device_map)
    mesh = _mesh(shard, pretrained, quantise)
    if (folder := folder_of(pretrained)) is not None:
        model: Any = reused(folder, name, task, num_labels, dtype, sizes, shard, quantise).train()
    elif name is None:
        model = _of_checkpoint(pretrained, task, num_labels, dtype, sizes, mesh, quantise).train()
    elif pretrained is None or pretrained is False:
        model = zoo.create(name, task=task or "features", num_labels=num_labels or 2, **sizes)
        if dtype not in (None, "auto"):
            model.to(floating(dtype))
        if quantise is not None:
            quantise_whole(model, quantise)
    else:
        from effzoo import convert  # takes a tenth of a second, which `import effzoo` must not
        from effzoo.convert.filling import Fresh
        from effzoo.convert.importing import load, wanted_dtype

        wanted = wanted_dtype(dtype)
        with Undrawn() as undrawn:
            model = zoo.create(name, task=task or "features", num_labels=num_labels or 2, **sizes)
        done = None if quantise is None else weight_by_weight(model, quantise)
        source = convert.source_of(model.config) if pretrained is True else pretrained
        with together(mesh):
            load(model, source, Fresh(undrawn, wanted, done=done, mesh=mesh))
        model.config = dataclasses.replace(model.config, **{name: sizes[name] for name in _OF_TEXTS if name in sizes})
    if peft is not None:
        model = attach(model, peft, name=adapter, dtype=adapter_dtype)
    return placed(model, device_map)


def _mesh(shard: str | None, pretrained: Any, quantise: int | None) -> Any:
    """The processes over which a model is split while it is read; None for one that is whole in each."""
    if shard is not None and (pretrained is None or pretrained is False):
        raise OptionError(
            f"shard={shard!r} has each process read its part of the weights of pretrained, which is not given; a model "
            "that is drawn is whole first: effzoo.sharding.shard(effzoo.build(...)), or finetune under FSDP2, splits it"
        )
    if shard is not None and quantise is not None:
        raise IncompatibleError(
            f"quantise={quantise} with shard={shard!r}: FSDP2 splits parameters, and codes are buffers, whole in every "
            "process; leave shard out (each weight is quantised as soon as it is read, so the dense model never "
            "exists), and finetune under FSDP2 splits what stays dense"
        )
    return all_processes(shard)


def _of_checkpoint(
    source: Any, task: str | None, num_labels: int | None, dtype: Any, sizes: dict[str, Any], mesh: Any,
    bits: int | None,
) -> Any:  # fmt: skip
    """The model of a checkpoint of transformers, with the sizes that are found there."""
    if source is None or isinstance(source, bool):
        raise OptionError(
            "build needs the name of a model of the zoo, a TOML file, or pretrained= with a folder or hub id"
        )
    from effzoo.convert.importing import converted, wanted_dtype

    coding = None if bits is None else partial(weight_by_weight, bits=bits)
    with together(mesh):
        return converted(source, task, num_labels, wanted_dtype(dtype or "float32") or "auto", mesh, sizes, coding)
