"""Adapters on disk: one JSON manifest and one safetensors file, whole at every moment.

The tensors are written under a name that carries their hash, then the manifest is renamed into place, then the older
tensor file is removed: a reader sees the old adapter or the new one, never a mixture (`effzoo.writing`). The manifest
(`effzoo.peft.manifest`) holds the spec, the fingerprint of the base and hashes of everything, itself included. So
another base, and a truncated or altered file, are refused by the first difference, and so is a spec that asks for other
tensors than the file holds; the model is touched when all that has been compared.

A task head (roles `head.*`) is the adapter's own where the adapter replaces its tensors, which it does unless its
methods hang
there: then they change a head that is the base's, and the fingerprint holds it. A head of its own comes in the file's
    size: the base may have another number of labels.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError, EffzooError, UnknownNameError
from effzoo.peft.attach import _known, adapter_tensors, attach, attached
from effzoo.peft.fingerprint import Fingerprint, content_hash, difference, embeddings_left_out, fingerprint
from effzoo.peft.manifest import MANIFEST, TENSORS, UNPROVED, Manifest, read_manifest
from effzoo.peft.method import HEAD
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.peft.parameter.tokens import spans
from effzoo.peft.rehearsal import rehearse
from effzoo.peft.rounded import BaseRounding, compare, differing_kind, kept_of
from effzoo.peft.state import label_layers, transition
from effzoo.peft.training import enter, finish, said
from effzoo.sites import Growing, Packed, sites, unwrap
from effzoo.writing import replace_files

M = TypeVar("M", bound=nn.Module)
OWN = "effzoo"
# prompt tokens, as older files name them
FORMER_KEY = re.compile(r"(\.(?:prompt|p_tuning|ipt|deep_prompt|llama_adapter))\.prompt$")
TRIES = 100  # a reader whose tensors a writer has just replaced begins anew
CHANGES = (
    "its methods change this head and bring none, so give the model the head it had then, or target what is no head"
)
log = logging.getLogger("effzoo")


@dataclass(frozen=True)
class Foreign:
    """Files of another library. manifest: the file by which they are recognised. module: imported when they are first
    used; it has
    `write(model, directory, name)` and `read(model, directory, name)`."""

    manifest: str
    module: str


FOREIGN: dict[str, Foreign] = {}  # by name; those who know the other library put theirs here


def save_adapter(model: nn.Module, directory: str | Path, *, name: str = "default", format: str = OWN) -> Path:
    """Write one adapter (its head included) to a directory and return it; an adapter of the same format that was saved
    there is replaced.

    model: what the adapter is attached to.
    directory: where to; it is made if there is none. Files that are not the adapter's stay.
    name: of the adapter.
    format: "effzoo", or "peft" for files of the `peft` package, which `effzoo.convert.peft_files` describes.

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
        name=name,
        specs=attachment.specs,
        finished=attachment.finished,
        begun=attachment.begun,
        base=str(getattr(getattr(model, "config", None), "name", type(model).__name__)),
        fingerprint=fingerprint(model, without=replaced(model, name), embeddings=replaced_embeddings(model, name)),
        tensors=f"adapter-{digest[:16]}.safetensors",
        sha256=digest,
        size=len(content),
        kept=kept_of(model, without=replaced(model, name)),
        dtype=None if attachment.dtype is None else str(attachment.dtype).removeprefix("torch."),
    )
    files = {manifest.tensors: content, MANIFEST: manifest.written()}
    for path, site in sites(model):
        if (
            fnmatchcase(site.role, HEAD)
            and name in site.adapters
            and any(f"{path}.{key}" in manifest.fingerprint.tensors for key in site.base())
        ):
            log.warning(
                "%s: the adapter changes %s and does not hold it; keep the model's head too, no other will do",
                directory,
                path,
            )
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
        they are the same is proved (`effzoo.peft.rounded`), and what the rounding costs is told, by
        `attached(model)[name].rounding` too. The adapter keeps its own dtype.

    An adapter that was saved in the middle of its training is loaded in the stage that it was in, and goes on from
    there.

    Raises AdapterError that names the first mismatch (another base, a truncated or altered file, missing or extra keys,
    other shapes); the model is then as it was.
    """
    directory = folder_of(directory)
    outer, model = model, unwrap(model)
    found = [foreign for foreign in FOREIGN.values() if (directory / foreign.manifest).is_file()]
    if found and (directory / MANIFEST).is_file():
        raise AdapterError(
            f"{directory} holds two adapters, {MANIFEST} and {found[0].manifest}; give each a directory of its own"
        )
    if found:
        try:
            with transition(outer):
                importlib.import_module(found[0].module).read(model, directory, "default" if name is None else name)
        except EffzooError:
            raise
        except Exception as error:  # files of any origin, with any value in any place
            raise AdapterError(
                f"{directory} holds an adapter that cannot be read ({type(error).__name__}: "
                f"{error!s:.200}); save it again"
            ) from error
        return outer
    manifest, tensors = _read(directory)
    base, rounding = _check_base(model, manifest, directory, trust_base, rounded_base)
    name, dtype = manifest.name if name is None else name, _dtype_of(manifest, tensors, directory)
    most = 1000 + 100 * (len(base.tensors) + len(tensors))
    begun, labels = manifest.begun or {}, _labels_in(model, tensors)
    shapes, unknown = rehearse(
        unwrap(model),
        manifest.specs,
        name,
        begun=begun,
        finished=manifest.finished,
        most=most,
        dtype=dtype,
        num_labels=labels,
    )
    _check_head(shapes, name, base, manifest, directory)
    _check_fits(shapes, name, tensors, directory, tuple(unknown))
    with transition(outer):
        attach(model, manifest.specs, name=name, dtype=dtype, num_labels=labels)
        attached(model)[name].rounding = rounding
        enter(model, name, begun)
        if manifest.finished:
            finish(model, name)
        _fill(model, name, tensors, directory)
    return outer


def swap_weights(model: M, directory: str | Path, *, name: str = "default", rounded_base: bool = False) -> M:
    """Copy the tensors that `save_adapter` wrote into an adapter that is attached already, with the same spec; return
    the model.

    The parameters stay the same objects, as an optimizer needs, and as a compiled model needs to go on without
    compiling anew. rounded_base: as in
    `load_adapter`. Raises AdapterError as `load_adapter` does, for another spec and for another stage of the training;
        the adapter is then as it was.
    """
    outer, model = model, unwrap(model)
    directory, attachment = folder_of(directory), _known(model, name)
    manifest, tensors = _read(directory)
    base, rounding = _check_base(model, manifest, directory, rounded_base=rounded_base)
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
    _check_head(model, name, base, manifest, directory)
    with transition(outer, name):
        if manifest.finished:
            finish(model, name)
        _fill(model, name, tensors, directory)
        attachment.rounding = rounding
    return outer


def folder_of(given: str | Path) -> Path:
    """The path that was given. Raises AdapterError for one that no file system has, or into which nobody may look."""
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


def stored_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a file holds of an adapter, by the tensor's key without the adapter's name: packed where a module can, what
    is shared once."""
    packed, before = _packed(model, name), f".adapters.{name}."
    whole = {key.replace(before, ".adapters.", 1): value for key, value in adapter_tensors(model, name).items()}
    tensors = {key: value for key, value in whole.items() if not key.startswith(tuple(packed))}
    return tensors | {
        f"{prefix}{key}": value for prefix, module in packed.items() for key, value in (module.packed() or {}).items()
    }


def replaced(model: nn.Module, name: str) -> set[str]:
    """The keys of the base's tensors that an adapter puts its own in the place of: of the task head, which belongs to
    the adapter's task."""
    return {
        f"{path}.{parameter}"
        for path, site in sites(model)
        if fnmatchcase(site.role, HEAD) and name in site.adapters
        for parameter in site.base()
        if any(isinstance(module, Copy) and hasattr(module, f"own_{parameter}") for module in site.hung(name))
    }


def replaced_embeddings(model: nn.Module, name: str) -> dict[str, str]:
    """By key of a tensor of the base, the rows of it, as in "5-7+9", that an adapter puts its own in the place of
    (`tokens`)."""
    found: dict[str, set[int]] = {}
    for path, site in sites(model):
        for module in site.hung(name):
            if isinstance(module, Growing):
                found.setdefault(path, set()).update(module.replaces())
    return {f"{path}.weight": spans(sorted(rows)) for path, rows in found.items() if rows}


def _read(directory: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """What a folder holds, old or new while somebody writes to it."""
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
    # of a kind that is safetensors' own affair: a header that is none, a dtype that torch lacks
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
    """The bytes of the tensors' file, which are those that the manifest knows. Raises AdapterError, OSError."""
    size = file.stat().st_size
    if not file.is_file():
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
    """What lies between the base of a saved adapter and this model, which holds the same weights in another dtype or
    quantised: what rounding costs.

    model: that `load_adapter(model, directory, rounded_base=True)` would take.
    directory: the folder that save_adapter wrote.

    Raises AdapterError where load_adapter does.
    """
    attached(model)
    directory = folder_of(directory)
    _, rounding = _check_base(model, read_manifest(directory), directory, rounded_base=True)
    return rounding or BaseRounding(())


def _dtype_of(manifest: Manifest, tensors: Mapping[str, Tensor], directory: Path) -> torch.dtype | None:
    """The dtype to attach in: the one that was asked for, or one that holds what the file holds exactly."""
    if manifest.dtype is not None:
        found = getattr(torch, manifest.dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise AdapterError(
                f"{directory / MANIFEST} names the dtype {manifest.dtype!r:.40}, which is none of "
                "torch; save the adapter again"
            )
        return found
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else None


def _check_base(
    model: nn.Module, manifest: Manifest, directory: Path, trust_base: bool = False, rounded_base: bool = False
) -> tuple[Fingerprint, BaseRounding | None]:
    """The fingerprint of the model, heads included, which is that of the manifest but for what the adapter brings
    itself; and what lies between the bases, where rounding may."""
    model, theirs = unwrap(model), manifest.fingerprint
    ours = fingerprint(model, embeddings=embeddings_left_out(theirs))
    if manifest.format == 1:
        if not trust_base:
            raise AdapterError(
                f"the adapter in {directory} has format 1, which cannot prove the base's {UNPROVED}; when this is the "
                "model it was trained on, load it with trust_base=True, and save it again"
            )
        log.warning("%s has format 1: the base's tensors are compared, and nothing proves its %s", directory, UNPROVED)
        values = dict(model.state_dict())
        ours = Fingerprint({}, {key: content_hash(values[key]) for key in ours.tensors if key in values})
    heads = {path for path, site in sites(model) if fnmatchcase(site.role, HEAD)}
    without = {key for key in ours.tensors if key.rpartition(".")[0] in heads and key not in theirs.tensors}
    seen = Fingerprint(ours.facts, {key: value for key, value in ours.tensors.items() if key not in without})
    theirs, seen = _of_any_labels(model, theirs, seen)
    found = difference(theirs, seen)
    if found and manifest.format > 1 and (kinds := differing_kind(theirs, seen)):
        if rounded_base and manifest.kept:
            try:
                rounding = compare(theirs, manifest.kept, seen, model)
            except AdapterError as error:
                raise AdapterError(
                    f"the adapter in {directory} was trained on another base ({manifest.base!r}), "
                    f"rounded or not: {error}"
                ) from None
            log.warning(
                "%s: the base is not the one of the file but the same weights, rounded: %s",
                directory,
                str(rounding).partition("\n")[0],
            )
            heads_alone = {key: value for key, value in ours.tensors.items() if key in without or key in theirs.tensors}
            return Fingerprint(ours.facts, heads_alone), rounding
        advice = (
            "it was saved before files could tell rounded weights: save it again on its own base"
            if rounded_base
            else (
                "load_adapter(..., rounded_base=True) takes a base that holds the same weights rounded, proves it, "
                "and says what that costs"
            )
        )
        raise AdapterError(
            f"the adapter in {directory} was trained on another base ({manifest.base!r}): {kinds}; {advice}"
        )
    if found:
        advice = "build the model with the same name, sizes, attention and pretrained weights"
        if found.split(": ")[0].rpartition(".")[0] in heads:
            advice = CHANGES
        if found.startswith("num_labels: "):
            advice = f"{CHANGES}: an adapter that brings its whole head loads whatever the model's number of labels"
        if found.startswith("vocab: "):
            advice = _resize(theirs.facts.get("vocab"), ours.facts.get("vocab"))
        raise AdapterError(
            f"the adapter in {directory} was trained on another base ({manifest.base!r}): {found}; {advice}"
        )
    return ours, None


def _of_any_labels(model: nn.Module, theirs: Fingerprint, ours: Fingerprint) -> tuple[Fingerprint, Fingerprint]:
    """Both without the number of labels, where the file holds no hash of a layer that has an output for each: the
    adapter brings its own."""
    layers = label_layers(model)
    if not layers or any(f"{path}.{key}" in theirs.tensors for path, site in layers.items() for key in site.base()):
        return theirs, ours
    told = {"num_labels"}.union(*({f"{path}.out_features", f"{path.rpartition('.')[0]}.num_labels"} for path in layers))
    without = (
        replace(each, facts={name: value for name, value in each.facts.items() if name not in told})
        for each in (theirs, ours)
    )
    return next(without), next(without)


def _labels_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """For how many labels the head is that a file holds whole; None where it holds none."""
    for path in label_layers(model):
        for key, tensor in tensors.items():
            if key.startswith(f"{path}.adapters.") and key.endswith(".own_weight") and tensor.ndim == 2 and len(tensor):
                return len(tensor)
    return None


def _resize(theirs: Any, ours: Any) -> str:
    """What to do about another number of tokens."""
    if isinstance(theirs, int) and isinstance(ours, int) and theirs > ours:
        return f"give the model its tokens first: effzoo.resize_vocabulary(model, {theirs})"
    return (
        "load it into the model that it was trained on, and call effzoo.resize_vocabulary with the adapter "
        "attached, which keeps it"
    )


def _check_head(shapes: nn.Module, name: str, base: Fingerprint, manifest: Manifest, directory: Path) -> None:
    """Refuse a file without the hash of a head, or of rows, that the adapter changes and does not bring."""
    left_out = embeddings_left_out(manifest.fingerprint)
    if unproved := [key for key, rows in left_out.items() if replaced_embeddings(shapes, name).get(key) != rows]:
        key = unproved[0]
        brought = replaced_embeddings(shapes, name).get(key, "none")
        raise AdapterError(
            f"the adapter in {directory} brings rows {brought} of {key}, and its manifest has no hash of "
            f"{left_out[key]}; save it again"
        )
    lacking = base.tensors.keys() - manifest.fingerprint.tensors.keys() - replaced(shapes, name)
    if lacking and manifest.format == 1:
        log.warning("%s: nothing proves the base's %s, which the adapter changes", directory, min(lacking))
    elif lacking:
        raise AdapterError(
            f"the adapter in {directory} changes {min(lacking)}, of which its manifest has no hash; "
            "save the adapter again"
        )


def _check_fits(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], directory: Path, unknown: tuple[str, ...] = ()
) -> None:
    """Refuse tensors that are not those of the attached adapter, by key, shape and dtype. unknown: what begins so may
    have another shape."""
    own = stored_tensors(model, name)
    free = (*_packed(model, name), *unknown)
    for key in [*own, *(key for key in tensors if key not in own)]:
        if key not in tensors or key not in own:
            raise AdapterError(
                f"the adapter in {directory} does not fit its own spec: {key} is "
                f"{'missing' if key in own else 'one too many'} in the file"
            )
        mine, given = own[key], tensors[key]
        if mine.shape != given.shape and not key.startswith(free):
            said = f"{key} has shape {tuple(given.shape)} in {directory}, this model needs {tuple(mine.shape)}"
            head = key.partition(".adapters.")[0] in label_layers(model) and key.endswith(".own_weight")
            raise AdapterError(
                said
                + (": heads for other numbers of labels; load_adapter attaches one in the file's size" if head else "")
            )
        exact = mine.dtype == given.dtype or (
            mine.is_floating_point()
            and given.is_floating_point()
            and torch.promote_types(mine.dtype, given.dtype) == mine.dtype
        )
        if not exact:
            raise AdapterError(
                f"{key} is {given.dtype} in {directory}, this model needs {mine.dtype}, which cannot "
                "hold the same numbers"
            )


def _packed(model: nn.Module, name: str) -> dict[str, Packed]:
    """The modules that a file holds packed, experts of a mixture too, by the beginning of their keys there."""
    hung = {
        f"{path}.adapters.{method}.": module
        for path, site in sites(model)
        if name in site.adapters
        for method, module in site.of(name).items()
    }
    return {prefix: packing for start, module in hung.items() for prefix, packing in _packing(start, module).items()}


def _packing(start: str, module: nn.Module) -> dict[str, Packed]:
    """The module itself where it packs, else what packs inside it."""
    if isinstance(module, Packed) and module.packed() is not None:
        return {start: module}
    return {
        prefix: packing
        for key, part in module.named_children()
        for prefix, packing in _packing(f"{start}{key}.", part).items()
    }


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Put the tensors of a file into an adapter. Raises AdapterError when they do not fit, perhaps half way."""
    _check_fits(model, name, tensors, directory)
    packed = _packed(model, name)
    for prefix, module in packed.items():
        try:
            # cloned here, where torch.inference_mode is off: what was read inside it could never take part in training
            module.unpack(
                {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}
            )
        except Exception as error:  # whatever the module finds wrong with content of any origin
            raise AdapterError(f"what {directory} holds for {prefix}* does not fit this model: {error}") from error
    for key, value in stored_tensors(model, name).items():
        if not key.startswith(tuple(packed)):
            value.copy_(tensors[key])
