"""Reading a model's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from effzoo import zoo
from effzoo.annotations import plain
from effzoo.architectures import AnyModel, Config, PerceiverConfig, Transformer
from effzoo.architectures.function import MEANT, WITHOUT_EFFECT, meant
from effzoo.architectures.heads import head
from effzoo.errors import (
    AdapterError,
    EffzooError,
    FileError,
    IncompatibleError,
    OptionError,
    UnknownNameError,
    listing,
    shown,
)
from effzoo.folder.description import (
    ADAPTERS,
    BUFFERS,
    CONFIG,
    FINGERPRINT,
    Description,
    read_description,
    read_fingerprint,
)
from effzoo.folder.hub import folder_of
from effzoo.folder.made import base_tensors, made_of, of_adapter, other_buffers, other_fact
from effzoo.folder.positions import resize_positions
from effzoo.peft.attach import attached
from effzoo.peft.files import load_adapter
from effzoo.peft.fingerprint import begun_hash, bytes_of, described, ended_hash, facts
from effzoo.peft.manifest import MANIFEST
from effzoo.peft.state import act, transition
from effzoo.placing import check_not_both, placed
from effzoo.quantisation import quantise as quantise_whole
from effzoo.quantisation.model import weight_by_weight
from effzoo.sharding import all_processes, is_split, rows_here, shard, together
from effzoo.sites.dtypes import floating
from effzoo.swap import swap_attention
from effzoo.tensors import DTYPES, StoredTensor, names_of, stored_tensors
from effzoo.undrawn import Undrawn


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    shard: Literal["full"] | None = None,
    device_map: Any = None,
) -> Any:
    """The model of a folder that `effzoo.save` wrote, or of a checkpoint of transformers, in evaluation mode.

    source: a folder, or the id of such a one on the hub. Those of transformers go to
        `effzoo.convert.from_transformers`, which finds sizes and layout in their config.json.
    dtype: of the weights, as after `model.to(dtype)`; None or "auto" for those of the files. Adapters keep theirs.
    shard: "full" splits the base over all processes, as `effzoo.build` does; each reads its rows, and each of n hashes
        every n-th tensor.
    device_map: where the model stands when it is there, as in `effzoo.build`.

    Tensors are read one by one into place, so loading takes no memory beside the model's. Each is compared with the
    hash of what was saved, and so is what the config says. Nothing in a folder is executed.

    Raises FileError that names the file, for another format, unknown or missing fields, damaged files and files of
        another model; AdapterError, ConversionError.
    """
    check_not_both(shard, device_map)
    if not str(source):
        raise FileError("source is empty; give a folder, or the id of one on the hub")
    wanted = None if dtype == "auto" else floating(dtype)
    if (folder := folder_of(source)) is None:
        if isinstance(source, Path) or Path(source).is_dir():
            _check_there(Path(source))
        from effzoo import convert  # imports transformers

        return placed(convert.from_transformers(source, dtype=dtype, shard=shard), device_map)
    mesh = all_processes(shard)
    with torch.random.fork_rng(devices=[]):  # what is drawn is written over
        with together(mesh):
            said = read_description(folder)
            model = _base(folder, said, wanted, mesh)
        return placed(_with_adapters(model, said, folder, rounded=wanted is not None), device_map)


def reused(
    folder: Path,
    name: Any,
    task: str | None,
    num_labels: int | None,
    dtype: Any,
    sizes: Mapping[str, Any],
    shard: str | None = None,
    quantise: int | None = None,
) -> AnyModel:
    """The model of a folder as `effzoo.build` was asked for it, its dense weights quantised while they are read.

    Raises OptionError for another model than that of `name`, and for sizes that the weights have not,
        IncompatibleError for a head that cannot be another, and for a split model that would have another head or
        attention.
    """
    mesh, wanted, sizes = all_processes(shard), None if dtype == "auto" else floating(dtype), dict(sizes)
    attention, max_length = sizes.pop("attention", None), sizes.pop("max_length", None)
    with torch.random.fork_rng(devices=[]):
        with together(mesh):
            said = _asked(folder, name, sizes)
            other_head = task not in (None, said.task) or num_labels not in (None, said.own_labels)
            if mesh is not None and (other_head or attention is not None):
                what = "head" if other_head else "attention"
                raise IncompatibleError(
                    f"{folder} is read in parts (shard={shard!r}) with the {what} that it has; build it with the other "
                    f"{what} once without shard, effzoo.save it, and read that"
                )
            resized = max_length not in (None, said.config.max_length)
            if resized and mesh is not None:
                raise IncompatibleError(
                    f"{folder} is read in parts (shard={shard!r}) with the {said.config.max_length} positions that it "
                    "has; build it with others once without shard, effzoo.save it, and read that"
                )
            # adapters were trained on dense weights, and a swapped attention copies them
            at_once = quantise if attention is None and not said.adapters else None
            model = _base(folder, said, wanted, mesh, at_once)
        _with_adapters(model, said, folder, rounded=wanted is not None)
    if resized:
        model = resize_positions(model, max_length)
    if other_head:
        new_head(model, folder, task or said.task, num_labels or 2)
    if attention is not None:
        swap_attention(model, attention)
    if quantise is not None and at_once is None:
        quantise_whole(model, quantise)
    return model


def _asked(folder: Path, name: Any, sizes: Mapping[str, Any]) -> Description:
    """What a folder says, with these sizes."""
    said = read_description(folder)
    if name is not None and (known := zoo.config(name).name) != said.config.name:
        raise OptionError(
            f"{folder} holds the model {said.config.name!r}, not {known!r}; leave the name out, or give that one"
        )
    for key, value in sizes.items():
        if key not in WITHOUT_EFFECT and not _same(said.config, key, value):
            raise OptionError(
                f"{key} is {shown(getattr(said.config, key, None))} in {folder}, got {shown(value)}; what its "
                f"weights are made for stays, only {listing(sorted(WITHOUT_EFFECT))} may be others"
            )
    return dataclasses.replace(said, config=dataclasses.replace(said.config, **sizes))


def _same(config: Config | PerceiverConfig, name: str, value: Any) -> bool:
    """Whether a field has this value, or another of the same meaning."""
    if plain(value) == getattr(config, name, None):
        return True
    return name in MEANT and meant(dataclasses.replace(config, **{name: value}), name) == meant(config, name)


def new_head(model: AnyModel, folder: Path, task: str, num_labels: int, *, pooler: bool | None = None) -> None:
    """Another head, which is new; pooler: whether a features model gets one, None for what the config says."""
    if not isinstance(model, Transformer):
        raise IncompatibleError(
            f"{folder} holds a {type(model).__name__} for {model.task}, whose decoder is that of its task; build it "
            "with this task and its labels"
        )
    if names := attached(model):
        raise IncompatibleError(
            f"{folder} holds adapters ({listing(names)}) with heads for {model.task}; load it with effzoo.load, merge "
            "or detach them, and save it again"
        )
    like = next(model.parameters())
    if pooler is not None:
        model.config = model.embeddings.config = dataclasses.replace(model.config, pooler=pooler)
    model.head = head(model.config, task, num_labels).to(like.device, like.dtype)
    model.head.apply(model._initialise)
    model.task, model.own_labels, model.label_names, model.problem_type = task, num_labels, (), None


def _base(folder: Path, said: Description, wanted: torch.dtype | None, mesh: Any, bits: int | None = None) -> AnyModel:
    """The model without its adapters, split over a mesh, or quantised while it is read."""
    prints = read_fingerprint(folder, said.fingerprint)
    try:
        model, undrawn = made_of(said, str(folder / CONFIG))
    except EffzooError as error:
        if isinstance(error, FileError):
            raise
        hint = (
            "; what registers it is loaded first, with effzoo.load_file" if isinstance(error, UnknownNameError) else ""
        )
        raise FileError(f"{folder / CONFIG} says a model that cannot be made{hint}: {error}") from error
    stored = _stored(model, said, prints.tensors, folder)
    _fill_buffers(model, said, prints.tensors, folder, wanted)
    if found := other_fact(prints.facts, facts(model)):
        raise FileError(
            f"{folder / CONFIG} says another model than the one that was saved: {found} ({FINGERPRINT}); copy the "
            "whole folder again"
        )
    _fill(model, undrawn, stored, prints.tensors, wanted, mesh, bits)
    model.eval()
    model.label_names, model.problem_type = said.label_names, said.problem_type
    return model


def _with_adapters(model: AnyModel, said: Description, folder: Path, rounded: bool) -> AnyModel:
    _attach(model, said, folder, rounded)
    _check_twice(model, folder)
    if model.num_labels != said.num_labels:
        raise FileError(
            f"{folder / CONFIG} names {said.num_labels} labels, and the head that acts has {model.num_labels}"
        )
    return model


def _check_there(folder: Path) -> None:
    if not folder.exists():
        raise FileError(f"there is no folder {folder}; give one that effzoo.save or save_pretrained wrote")
    if (folder / MANIFEST).is_file():
        raise FileError(
            f"{folder} holds an adapter, which is no model: effzoo.load_adapter(model, {str(folder)!r}) puts it on the "
            "model that it was trained on"
        )
    if not (folder / CONFIG).is_file():
        raise FileError(
            f"{folder} has no {CONFIG}; give a folder that effzoo.save or save_pretrained wrote, or save the model "
            "again where saving was interrupted"
        )


def _stored(model: AnyModel, said: Description, prints: dict[str, Any], folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the base in the files, which have the names and shapes of the model's and are hashed."""
    stored, mine = stored_tensors(folder), base_tensors(model)
    if said.adapters:  # a Trainer's checkpoint has them twice
        stored = {key: tensor for key, tensor in stored.items() if not of_adapter(key)}
    _check_names(stored, mine, folder / names_of()[0])
    _check_hashed(prints, {*mine, *other_buffers(model)}, folder)
    return stored


@torch.no_grad()
def _fill(
    model: AnyModel,
    undrawn: Undrawn,
    stored: Mapping[str, StoredTensor],
    prints: dict[str, Any],
    wanted: torch.dtype | None,
    mesh: Any,
    bits: int | None,
) -> None:
    """Read every tensor of the base into place: of one that is split, the rows of this process.

    bits: of the weights that are quantised as soon as each is there.
    """
    quantised = None if bits is None else weight_by_weight(model, bits)
    mine = base_tensors(model)
    for key, tensor in mine.items() if quantised is None else ():
        _make_room(key, tensor, stored[key], undrawn, wanted)
    if mesh is not None:
        shard(model, mesh)
        mine = base_tensors(model)
    for number, key in enumerate([*mine]):
        tensor = mine.pop(key)
        if quantised is not None:
            _make_room(key, tensor, stored[key], undrawn, wanted)
        if not is_split(tensor) or number % mesh.size() == mesh.get_local_rank():
            _read(key, tensor, stored[key], prints[key])
        else:
            here, first = rows_here(tensor.detach())
            for index, rows in stored[key].blocks(first, first + len(here)):
                here[index].copy_(rows)
        del tensor
        if quantised is not None:
            quantised(key)


def _fill_buffers(
    model: AnyModel, said: Description, prints: dict[str, Any], folder: Path, wanted: torch.dtype | None
) -> None:
    """Buffers that no state dict holds: those of their file, and the others as they are made."""
    buffers, undrawn = other_buffers(model), Undrawn()
    stored: dict[str, StoredTensor] = {}
    if any((folder / name).is_file() for name in names_of(BUFFERS)):
        stored = stored_tensors(folder, BUFFERS)
    for key in stored:
        if key not in buffers:
            raise FileError(f"{stored[key].file} holds {key}, which is no buffer of this model")
    for key, buffer in buffers.items():
        path, _, name = key.rpartition(".")
        owner: Any = model.get_submodule(path)
        if key in stored:
            read = buffer.new_empty(stored[key].shape)
            _make_room(key, read, stored[key], undrawn, wanted)
            _read(key, read, stored[key], prints[key])
            owner._buffers[name] = read
            if path in said.hashing:
                seed = owner.hash_seed
                owner.rotate_by(read)
                owner.hash_seed = seed
                owner.rounds = said.hashing[path]["rounds"]
        elif described(buffer) != prints[key]:
            file = folder / names_of(BUFFERS)[0]
            raise FileError(f"{key} is not as it was saved, and {file} does not hold it; copy the whole folder again")
        elif wanted is not None and buffer.is_floating_point():
            owner._buffers[name] = buffer.to(wanted)


def _make_room(key: str, tensor: Tensor, stored: StoredTensor, undrawn: Undrawn, wanted: torch.dtype | None) -> None:
    """Let a tensor have the dtype of the stored one, or that which is wanted; its numbers come next."""
    dtype = DTYPES[stored.kind]
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise FileError(f"{stored.file}: {key} is {dtype} in the file and {tensor.dtype} in the model of {CONFIG}")
    kept = wanted if wanted is not None and dtype.is_floating_point else dtype
    undrawn.written(tensor)
    if tensor.dtype != kept:
        tensor.data = torch.empty_like(tensor.data, dtype=kept)


def _read(key: str, tensor: Tensor, stored: StoredTensor, expected: str) -> None:
    """Read a tensor, or the rows of it that are here, and compare the hash of all that was read."""
    dtype = DTYPES[stored.kind]
    digest = begun_hash(dtype, stored.shape)
    here, first = rows_here(tensor.detach())
    for index, rows in stored.blocks():
        digest.update(bytes_of(rows))
        if is_split(tensor):
            start, end = max(index.start, first), min(index.stop, first + len(here))
            if start < end:
                here[start - first : end - first].copy_(rows[start - index.start : end - index.start])
        else:
            here[index].copy_(rows)
    found = f"{str(dtype).removeprefix('torch.')}{list(stored.shape)} {ended_hash(digest)}"
    if found != expected:
        raise FileError(
            f"{stored.file}: {key} is not the tensor that was saved ({found}, and {FINGERPRINT} says {expected}); the "
            "file is damaged or of another model, copy the whole folder again"
        )


def _check_twice(model: AnyModel, folder: Path) -> None:
    """Adapters that are also among the weights are the same there."""
    mine = model.state_dict()
    for key, stored in stored_tensors(folder).items():
        if of_adapter(key) and (key not in mine or described(mine[key]) != described(stored.read())):
            raise FileError(
                f"{stored.file}: {key} is not as in {folder / ADAPTERS}; the folder holds files of two models, copy "
                "the whole folder again"
            )


def _check_names(stored: dict[str, StoredTensor], mine: dict[str, Tensor], file: Path) -> None:
    for key in (*mine, *stored):
        if key not in stored:
            raise FileError(f"{file} lacks {key}, which the model of {CONFIG} has; copy the whole folder again")
        if key not in mine:
            raise FileError(
                f"{file} holds {key}, which the model of {CONFIG} does not have; copy the whole folder again"
            )
        if stored[key].shape != mine[key].shape or stored[key].kind not in DTYPES:
            raise FileError(
                f"{stored[key].file}: {key} is {stored[key].kind}{list(stored[key].shape)} in the file, and has the "
                f"shape {list(mine[key].shape)} in the model of {CONFIG}"
            )


def _check_hashed(prints: dict[str, Any], wanted: set[str], folder: Path) -> None:
    for key in sorted(wanted):
        if not isinstance(prints.get(key), str):
            raise FileError(f"{folder / FINGERPRINT} has no hash of {key}; copy the whole folder again")


def _attach(model: AnyModel, said: Description, folder: Path, rounded: bool) -> None:
    """The adapters, and which of them act."""
    for name in said.adapters:
        load_adapter(model, folder / ADAPTERS / name, name=name, rounded_base=rounded)
    if said.adapters:
        try:
            with transition(model, reads_base=False) as state:
                act(model, state, said.activity)
        except AdapterError as error:
            raise FileError(f"{folder / CONFIG} says adapters that cannot act together: {error}") from error
