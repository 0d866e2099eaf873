"""Adapters on disk: one JSON manifest and one safetensors file, whole at every moment.

The tensors are written under a name that carries their hash, then the manifest is renamed into place, then the older
tensor file is removed: a reader sees the old adapter or the new one, never a mixture (`effzoo.writing`). The manifest
(`effzoo.peft.manifest`) holds the spec, the fingerprint of the base and hashes of everything, itself included.

So another base (`effzoo.peft.same_base`), a truncated or altered file, and a spec that asks for other tensors than the
file holds (`effzoo.peft.stored`) are refused by the first difference, before the model is touched.

A task head (roles `head.*`) is the adapter's own where the adapter replaces its tensors, which it does unless its
methods hang there: then they change a head that is the base's, and the fingerprint holds it. A head of its own comes in
the file's size: the base may have another number of labels.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import stat
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError, EffzooError, UnknownNameError
from effzoo.peft.attach import _known, attach, attached
from effzoo.peft.fingerprint import fingerprint
from effzoo.peft.manifest import MANIFEST, TENSORS, Manifest, read_manifest
from effzoo.peft.method import HEAD
from effzoo.peft.rehearsal import rehearse
from effzoo.peft.rounded import BaseRounding, kept_of
from effzoo.peft.same_base import check_base, check_head
from effzoo.peft.state import label_layers, transition
from effzoo.peft.stored import check_fits, fill, replaced, replaced_embeddings, stored_tensors
from effzoo.peft.training import enter, finish, said
from effzoo.sharding import gathered, is_sharded, one_by_one, writes
from effzoo.sites import sites, unwrap
from effzoo.writing import replace_files

M = TypeVar("M", bound=nn.Module)
OWN = "effzoo"
# prompt tokens, as older files name them
FORMER_KEY = re.compile(r"(\.(?:prompt|p_tuning|ipt|deep_prompt|llama_adapter))\.prompt$")
TRIES = 100  # a reader whose tensors a writer has just replaced begins anew
log = logging.getLogger("effzoo")


@dataclass(frozen=True)
class Foreign:
    """Files of another library.

    manifest: the file by which they are recognised.
    module: imported when they are first used; it has `write(model, directory, name)` and `read(model, directory,
        name)`.
    """

    manifest: str
    module: str


FOREIGN = {"peft": Foreign("adapter_config.json", "effzoo.convert.peft_files")}  # imported on first use


def save_adapter(model: nn.Module, directory: str | Path, *, name: str = "default", format: str = OWN) -> Path:
    """Write one adapter (its head included) to a directory and return the directory.

    model: what the adapter is attached to.
    directory: where to; it is made if there is none. An adapter of the same format in it is replaced; files that are
        not the adapter's stay.
    name: of the adapter.
    format: "effzoo", or "peft" for files of the `peft` package, which `effzoo.convert.peft_files` describes.

    Where the model is split over processes, all of them call this, and the first writes.

    Raises FileError for what cannot be written (what was there is then as it was), UnknownNameError, AdapterError.
    """
    model, directory = unwrap(model), folder_of(directory)
    attachment = _known(model, name)
    if format not in (OWN, *FOREIGN):
        raise UnknownNameError("adapter format", format, [OWN, *FOREIGN])
    for other, recognised in [(OWN, MANIFEST), *((key, foreign.manifest) for key, foreign in FOREIGN.items())]:
        if other != format and (directory / recognised).is_file():
            raise AdapterError(
                f"{directory} holds an adapter in the format of {other} ({recognised}); give this one "
                "a directory of its own"
            )
    with gathered(model, f".adapters.{name}") if is_sharded(model) else nullcontext():
        stored = stored_tensors(model, name)
    if empty := [key for key, value in stored.items() if value.is_meta]:
        raise AdapterError(
            f"{empty[0]} of the adapter {name!r} is on the meta device, which holds shapes alone; "
            "give the model its weights first"
        )
    tensors = {key: value.detach().contiguous().cpu() for key, value in stored.items()}
    _check_finite(tensors, f"the adapter {name!r}", "nothing is written; train it anew with a lower learning rate")
    if format != OWN:
        importlib.import_module(FOREIGN[format].module).write(model, directory, name)
        return directory
    content = safetensors.torch.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        name=name, specs=attachment.specs, finished=attachment.finished, begun=attachment.begun,
        base=str(getattr(getattr(model, "config", None), "name", type(model).__name__)),
        fingerprint=fingerprint(model, without=replaced(model, name), embeddings=replaced_embeddings(model, name)),
        tensors=f"adapter-{digest[:16]}.safetensors", sha256=digest, size=len(content),
        kept=kept_of(model, without=replaced(model, name)),
        dtype=None if attachment.dtype is None else str(attachment.dtype).removeprefix("torch."),
    )  # fmt: skip
    files = {manifest.tensors: content, MANIFEST: manifest.written()}
    heads = {path: site for path, site in sites(model) if fnmatchcase(site.role, HEAD) and name in site.adapters}
    for path, site in heads.items():
        if any(f"{path}.{key}" in manifest.fingerprint.tensors for key in site.base()):
            advice = "keep the model's head too, no other will do"
            log.warning("%s: the adapter changes %s and does not hold it; %s", directory, path, advice)
    if writes(model):
        replace_files(directory, files, afterwards=lambda: _remove_older(directory, manifest.tensors))
    return directory


def load_adapter(
    model: M, directory: str | Path, *, name: str | None = None, trust_base: bool = False, rounded_base: bool = False
) -> M:
    """Attach the adapter that `save_adapter` wrote, under its own or another name; return the model.

    model: the base that the adapter was trained on, or one that computes the same.
    directory: the folder. Files of the `peft` package are recognised; they have no name ("default" then) and cannot
        prove that the base is the one they were trained on (`effzoo.convert.peft_files`).
    name: for the adapter in this model; None for the name that it was saved under.
    trust_base: take files of format 1 (effzoo before 0.2), which know the base's tensors and not what it computes;
        without it they are refused.
    rounded_base: take a base that holds the same weights in another dtype, or quantised, or no more quantised. That
        they are the same is proved, and what the rounding costs is logged and kept in `attached(model)[name].rounding`
        (`effzoo.peft.rounded`). The adapter keeps its own dtype.

    An adapter that was saved in the middle of its training is loaded in the stage that it was in, and goes on from
    there.

    Raises AdapterError that names the first mismatch (another base, a truncated or altered file, missing or extra keys,
    other shapes); the model is then as it was.
    """
    directory = folder_of(directory)
    outer, model = model, unwrap(model)
    for foreign in FOREIGN.values():
        if (directory / foreign.manifest).is_file():
            with transition(outer, reads_base=False), one_by_one(model):
                _read_foreign(foreign, model, directory, "default" if name is None else name)
            return outer
    manifest, tensors = _read(directory)
    base, rounding = check_base(model, manifest, directory, trust_base, rounded_base)
    name, dtype = manifest.name if name is None else name, _dtype_of(manifest, tensors, directory)
    begun, labels = manifest.begun or {}, _labels_in(model, tensors)
    with one_by_one(model):
        shapes, unknown = rehearse(
            model, manifest.specs, name, begun=begun, finished=manifest.finished, dtype=dtype, num_labels=labels,
            most=1000 + 100 * (len(base.tensors) + len(tensors)),
        )  # fmt: skip
    check_head(shapes, name, base, manifest, directory)
    check_fits(shapes, name, tensors, directory, tuple(unknown))
    with transition(outer, reads_base=False), one_by_one(model):
        attach(model, manifest.specs, name=name, dtype=dtype, num_labels=labels)
        attached(model)[name].rounding = rounding
        enter(model, name, begun)
        if manifest.finished:
            finish(model, name)
        fill(model, name, tensors, directory)
    return outer


def _read_foreign(foreign: Foreign, model: nn.Module, directory: Path, name: str) -> None:
    if (directory / MANIFEST).is_file():
        raise AdapterError(
            f"{directory} holds two adapters, {MANIFEST} and {foreign.manifest}; give each a directory of its own"
        )
    try:
        importlib.import_module(foreign.module).read(model, directory, name)
    except EffzooError:
        raise
    except Exception as error:  # files of any origin, with any value in any place
        what = f"{type(error).__name__}: {error!s:.200}"
        raise AdapterError(f"{directory} holds an adapter that cannot be read ({what}); save it again") from error


def swap_weights(model: M, directory: str | Path, *, name: str = "default", rounded_base: bool = False) -> M:
    """Copy the tensors of a saved adapter into an attached one of the same spec; return the model.

    directory: the folder that `save_adapter` wrote.
    name: of the attached adapter.
    rounded_base: as in `load_adapter`.

    The parameters stay the same objects, as an optimizer needs, and as a compiled model needs so as not to compile
    anew. Raises AdapterError as `load_adapter` does, for another spec and for another stage of the training; the
    adapter is then as it was.
    """
    outer, model = model, unwrap(model)
    directory, attachment = folder_of(directory), _known(model, name)
    manifest, tensors = _read(directory)
    base, rounding = check_base(model, manifest, directory, rounded_base=rounded_base)
    saved = "|".join(map(str, manifest.specs))
    if saved != attachment.spec:
        raise AdapterError(
            f"the adapter in {directory} is {saved!r}, the adapter {name!r} of this model is "
            f"{attachment.spec!r}; attach the same"
        )
    if attachment.finished and not manifest.finished:
        raise AdapterError(
            f"the adapter in {directory} is in the middle of its training, the adapter {name!r} of "
            "this model is finished"
        )
    if not manifest.finished and manifest.begun is not None and manifest.begun != attachment.begun:
        theirs, ours = said(manifest.begun), said(attachment.begun)
        raise AdapterError(
            f"the adapter in {directory} is in {theirs} of its training, the adapter {name!r} of this model in {ours}, "
            "which trains other tensors; load it with load_adapter, under another name or after effzoo.detach"
        )
    check_head(model, name, base, manifest, directory)
    with transition(outer, name):
        if manifest.finished:
            finish(model, name)
        fill(model, name, tensors, directory)
        attachment.rounding = rounding
    return outer


def folder_of(given: str | Path) -> Path:
    """The path that was given; AdapterError for one that no file system has, or into which nobody may look."""
    if not str(given) or "\0" in str(given):
        raise AdapterError(
            f"directory is a path with at least one character and no NUL, got {given!r:.80}; give a "
            "folder such as 'out/adapter'"
        )
    folder = Path(given)
    try:
        (folder / MANIFEST).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name cannot be written in the encoding of the file system"
        raise AdapterError(
            f"{str(folder)[:80]!r} cannot be a folder of an adapter: {reason}; give one such as 'out/adapter'"
        ) from None
    return folder


def _read(directory: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """What a folder holds: the old adapter or the new one, while somebody writes to it."""
    manifest = read_manifest(directory)
    for _ in range(TRIES):
        try:
            content = _content(directory / manifest.tensors, manifest)
            break
        except FileNotFoundError:
            again = read_manifest(directory)
            if again == manifest:
                raise AdapterError(
                    f"{directory / MANIFEST} names {manifest.tensors}, which is missing; copy the whole directory"
                ) from None
            manifest = again
        except (OSError, MemoryError) as error:
            raise AdapterError(
                f"{directory / manifest.tensors} cannot be read: {error}; copy the folder again"
            ) from None
    else:
        raise AdapterError(f"{directory} was written {TRIES} times while it was read; load it when nobody saves there")
    try:
        tensors = safetensors.torch.load(content)
    # errors of safetensors' own: a header that is none, a dtype that torch lacks
    except Exception as error:
        raise AdapterError(
            f"{directory / manifest.tensors} is not a safetensors file: {type(error).__name__}: {error}"
        ) from None
    _check_finite(tensors, str(directory), "save an adapter whose training went well")
    return manifest, {FORMER_KEY.sub(r"\1.tokens", key): tensor for key, tensor in tensors.items()}


def _check_finite(tensors: Mapping[str, Tensor], where: str, advice: str) -> None:
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{where}: {key} has NaN or infinity in it; {advice}")


def _content(file: Path, manifest: Manifest) -> bytes:
    """The bytes of the tensors' file, which are those that the manifest names. Raises AdapterError, OSError."""
    status = file.stat()  # once: a writer may remove the file at any moment, which is a FileNotFoundError
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError(f"{file} is no file; copy the whole directory")
    if manifest.size not in (None, size):
        raise AdapterError(f"{file} is truncated or altered: {size} bytes, the manifest says {manifest.size}")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.sha256:
        raise AdapterError(
            f"{file} is truncated or altered: {len(content)} bytes with sha256 {digest[:16]}..., the manifest says "
            f"{manifest.sha256[:16]}..."
        )
    return content


def _remove_older(directory: Path, current: str) -> None:
    """Remove the tensor files that earlier saves left: those whose name is the hash of their content."""
    for path in directory.glob("adapter-*.safetensors"):
        if path.name != current and TENSORS.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.name == f"adapter-{digest[:16]}.safetensors":
                path.unlink(missing_ok=True)


def base_rounding(model: nn.Module, directory: str | Path) -> BaseRounding:
    """What rounding costs between the base of a saved adapter and this model, which holds the same weights rounded.

    model: that `load_adapter(model, directory, rounded_base=True)` would take.
    directory: the folder that save_adapter wrote.

    Raises AdapterError where load_adapter does.
    """
    attached(model)
    directory = folder_of(directory)
    _, rounding = check_base(model, read_manifest(directory), directory, rounded_base=True)
    return rounding or BaseRounding(())


def _dtype_of(manifest: Manifest, tensors: Mapping[str, Tensor], directory: Path) -> torch.dtype | None:
    """The dtype to attach in: the one that was asked for, or one that holds what the file holds exactly."""
    if manifest.dtype is not None:
        dtype = getattr(torch, manifest.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise AdapterError(
                f"{directory / MANIFEST} names the dtype {manifest.dtype!r:.40}, which is none of "
                "torch; save the adapter again"
            )
        return dtype
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else None


def _labels_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """For how many labels the head is that a file holds whole; None where it holds none."""
    for path in label_layers(model):
        for key, tensor in tensors.items():
            if key.startswith(f"{path}.adapters.") and key.endswith(".own_weight") and tensor.ndim == 2 and len(tensor):
                return len(tensor)
    return None
