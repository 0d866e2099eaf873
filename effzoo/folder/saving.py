"""Writing a model's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from effzoo.architectures import AnyModel, EncoderDecoder, Perceiver, Transformer
from effzoo.errors import EffzooError, FileError, IncompatibleError, OptionError, shown
from effzoo.folder import remote
from effzoo.folder.card import card, is_ours
from effzoo.folder.description import (
    ADAPTERS,
    BUFFERS,
    CARD,
    CONFIG,
    FINGERPRINT,
    GENERATION,
    Description,
    given_names,
    is_folder,
    read_description,
    rehashed,
    written_fingerprint,
)
from effzoo.folder.made import base_tensors, made_of, other_buffers, other_fact
from effzoo.peft.attach import attached
from effzoo.peft.files import save_adapter
from effzoo.peft.fingerprint import described, facts, fingerprint
from effzoo.sharding import class_of, whole, writes
from effzoo.sites import prompt_length, unwrap
from effzoo.tensors import LIMIT, is_coded, names_of, save_tensors
from effzoo.writing import replace_folder


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    labels: Mapping[Any, str] | Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write a whole model to a folder, from which `effzoo.load` makes one that computes the same to the bit; return it.

    It holds sizes, attention, task, labels, settings of generation, weights, each attached adapter, which of them act,
    and a model card. What is merged is part of the weights, and cannot be taken out of the loaded model.

    model: a Transformer, Perceiver or EncoderDecoder of effzoo.
    folder: made if there is none. A model that is there is replaced, files that are not the model's stay.
    tokenizer: one of transformers, saved beside the model, which cuts texts where the model's positions end; None
        leaves what is there.
    labels: names of the labels of a classification head, by number; None for `model.label_names`.
    metrics: what was measured, for the card.

    The folder holds the old model, the new one, or, where the process ends between the two, none that loads. Where the
    model is split over processes, all of them call this, and the first writes.

    Raises FileError for what cannot be written, IncompatibleError for a model that its config does not describe,
        OptionError, AdapterError.
    """
    return write(model, folder, tokenizer=tokenizer, labels=labels, metrics=metrics)


def write(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    labels: Mapping[Any, str] | Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    also: Mapping[str, Any] | None = None,
    adapters_too: bool = False,
    files: Mapping[str, bytes] | None = None,
    limit: int | None = None,
) -> Path:
    """`save`, with what transformers reads besides.

    also: entries of config.json that effzoo does not read.
    metrics: may hold what is not defined, such as the correlation with a constant.
    adapters_too: also write the tensors of adapters among the weights, where a Trainer looks for all that it loads.
    files: others of the model, by name.
    limit: bytes of a file with tensors; 5 GB where it is None.
    """
    model, given, folder = _known(unwrap(model)), folder, Path(folder)
    if not str(given).strip():
        raise FileError("folder is empty; give one such as 'out/model'")
    if "\0" in str(folder):
        raise FileError(f"no path holds a NUL, got {shown(str(folder))}; give a folder such as 'out/model'")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise OptionError(f"tokenizer is one of transformers, with save_pretrained, got {type(tokenizer).__name__}")
    said, buffers = _described(model)
    said = said.with_adapters(model, given_names(labels, model))
    if (folder / CONFIG).exists() and not is_folder(folder):
        raise FileError(f"{folder / CONFIG} is another library's; give the model a folder of its own")
    prints, digest = written_fingerprint(fingerprint(model))
    content = dataclasses.replace(said, fingerprint=digest).written({"auto_map": remote.AUTO_MAP, **(also or {})})
    tensors = model.state_dict(keep_vars=True) if adapters_too else base_tensors(model)
    if not writes(model):
        for tensor in tensors.values():
            whole(tensor)
        for name in attached(model):
            save_adapter(model, folder / ADAPTERS / name, name=name)
        return folder
    with replace_folder(folder, CONFIG, partial(_older, folder)) as new:
        save_tensors(new, tensors, limit=limit or LIMIT, gathered=lambda tensor: whole(tensor.detach()))
        if buffers:
            save_tensors(new, buffers, BUFFERS)
        for name in attached(model):
            save_adapter(model, new / ADAPTERS / name, name=name)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, new, model)
        if is_ours(folder / CARD):
            (new / CARD).write_text(card(model, said, metrics or {}, folder.name))
        (new / remote.FILE).write_text(remote.CODE)
        for name, data in (files or {}).items():
            (new / name).write_bytes(data)
        (new / FINGERPRINT).write_bytes(prints)
        (new / CONFIG).write_bytes(content)
    return folder


def _known(model: nn.Module) -> AnyModel:
    if class_of(model) not in (Transformer, Perceiver, EncoderDecoder):
        raise IncompatibleError(
            f"save writes a Transformer, Perceiver or EncoderDecoder of effzoo, got {class_of(model).__name__}; its "
            "own class says how it is made, so keep its state_dict"
        )
    assert isinstance(model, AnyModel)
    for key, tensor in base_tensors(model).items():
        if is_coded(tensor):
            raise IncompatibleError(
                f"{key} is a {type(tensor).__name__}, which no safetensors file holds; effzoo.quantise keeps a model "
                "in 8 or 4 bits that can be saved"
            )
    return model


def _described(model: AnyModel) -> tuple[Description, dict[str, Tensor]]:
    """What config.json says of a model without its adapters, and the buffers to save beside its state dict.

    Raises IncompatibleError where a model that is made of the description is another.
    """
    plain = Description.of_base(model)
    again, _ = made_of(plain, CONFIG)
    mine, new = other_buffers(model), other_buffers(again)
    buffers = {key: value for key, value in mine.items() if key not in new or described(new[key]) != described(value)}
    said = dataclasses.replace(plain, hashing=rehashed(model, buffers.__contains__))
    for path in said.hashing:
        again.get_submodule(path)._rounds = said.hashing[path]["rounds"]  # type: ignore[assignment]
    if found := other_fact(facts(model), facts(again)):
        raise IncompatibleError(
            f"the model is not what its config says: {found}; change it by the functions of effzoo, which keep the "
            "config true"
        )
    ours, theirs = base_tensors(model), base_tensors(again)
    for key in (*ours, *theirs):
        if key not in ours or key not in theirs or ours[key].shape != theirs[key].shape:
            raise IncompatibleError(
                f"the model is not what its config says: {key} is {_shape(ours.get(key))} in the model and "
                f"{_shape(theirs.get(key))} as the config says"
            )
    return said, buffers


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def _save_tokenizer(tokenizer: Any, folder: Path, model: AnyModel) -> None:
    before = {path.name for path in folder.iterdir()}
    most = getattr(tokenizer, "model_max_length", None) if model.config.vocab else None
    try:
        if most is not None:
            tokenizer.model_max_length = model.config.max_length - prompt_length(model)
        tokenizer.save_pretrained(str(folder))
    except EffzooError:
        raise
    except Exception as error:  # of any class, as tokenizers may be
        raise FileError(f"the tokenizer cannot be written to {folder}: {type(error).__name__}: {error:.200}") from error
    finally:
        if most is not None:
            tokenizer.model_max_length = most
    if clash := sorted({CONFIG, CARD, FINGERPRINT, remote.FILE} & {path.name for path in folder.iterdir()} - before):
        raise FileError(f"the tokenizer writes {clash[0]}, which is the model's; save it in another folder")


def _older(folder: Path) -> list[Path]:
    """What an earlier model left; a tokenizer stays until another comes."""
    files = [folder / name for stem in ("model", BUFFERS) for name in names_of(stem)]
    files += [folder / GENERATION, folder / remote.FILE]
    files += [path for stem in ("model", BUFFERS) for path in folder.glob(f"{stem}-*-of-*.safetensors")]
    try:
        said = read_description(folder)
    except FileError:
        return files
    return [*files, *(folder / ADAPTERS / name for name in said.adapters)]
