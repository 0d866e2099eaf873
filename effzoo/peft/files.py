"""Adapters on disk: one JSON manifest and one safetensors file, whole at every moment.

The tensors are written under a name that carries their hash, then the manifest is renamed into place, then older tensor files are removed:
a reader sees the old adapter or the new one, never a mixture. The manifest holds the spec, a hash per tensor of the base and
one of the tensor file, so that another base, a truncated or an altered file is refused by the first mismatch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError, EffzooError, UnknownNameError
from effzoo.peft.attach import _known, adapter_tensors, attach, base_tensors, detach
from effzoo.peft.method import HEAD
from effzoo.peft.training import finish
from effzoo.sites import PeftModule, sites
from effzoo.spec import Spec

M = TypeVar("M", bound=nn.Module)
FORMAT = 1
MANIFEST = "adapter.json"
OWN = "effzoo"


@dataclass(frozen=True)
class Foreign:
    """Files of another library. manifest: the file by which they are recognised. module: imported when they are first used; it has
    `write(model, directory, name)` and `read(model, directory, name)`."""

    manifest: str
    module: str


FOREIGN: dict[str, Foreign] = {}  # by name; those who know the other library put theirs here


def save_adapter(model: nn.Module, directory: str | Path, *, name: str = "default", format: str = OWN) -> Path:
    """Write one adapter (its head included) to a directory and return it; an adapter of the same format that was saved there is replaced.

    format: "effzoo", or "peft" for files of the `peft` package, which `effzoo.convert.peft_files` describes.
    """
    attachment = _known(model, name)
    directory = Path(directory)
    if format != OWN and format not in FOREIGN:
        raise UnknownNameError("adapter format", format, [OWN, *FOREIGN])
    for other, recognised in [(OWN, MANIFEST), *((key, foreign.manifest) for key, foreign in FOREIGN.items())]:
        if other != format and (directory / recognised).is_file():
            raise AdapterError(f"{directory} holds an adapter in the format of {other} ({recognised}); give this one a directory of its own")
    if format != OWN:
        importlib.import_module(FOREIGN[format].module).write(model, directory, name)
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().contiguous().cpu() for key, value in stored_tensors(model, name).items()}
    content = safetensors.torch.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    manifest = {
        "format": FORMAT,
        "name": name,
        "peft": [{"name": spec.name, **spec.options} for spec in attachment.specs],
        "finished": attachment.finished,
        "base": getattr(getattr(model, "config", None), "name", type(model).__name__),
        "base_hashes": base_hashes(model),
        "tensors": f"adapter-{digest[:16]}.safetensors",
        "sha256": digest,
    }
    replace_file(directory / str(manifest["tensors"]), content)
    replace_file(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    for stale in directory.glob("adapter-*.safetensors"):
        if stale.name != manifest["tensors"]:
            stale.unlink(missing_ok=True)
    return directory


def load_adapter(model: M, directory: str | Path, *, name: str | None = None) -> M:
    """Attach the adapter that `save_adapter` wrote, under its own or another name; return the model.

    Files of the `peft` package are recognised; they have no name ("default" then) and cannot prove that the base is the one they were trained
    on (`effzoo.convert.peft_files`).

    Raises AdapterError that names the first mismatch (another base, a truncated or altered file, missing or extra keys,
    other shapes); the model is then as it was.
    """
    directory = Path(directory)
    found = [foreign for foreign in FOREIGN.values() if (directory / foreign.manifest).is_file()]
    if found and (directory / MANIFEST).is_file():
        raise AdapterError(f"{directory} holds two adapters, {MANIFEST} and {found[0].manifest}; give each a directory of its own")
    if found:
        importlib.import_module(found[0].module).read(model, directory, name or "default")
        return model
    manifest, tensors = _read(directory)
    _check_base(model, manifest, directory)
    name = name or manifest["name"]
    attach(model, [Spec(entry["name"], {k: v for k, v in entry.items() if k != "name"}) for entry in manifest["peft"]], name=name)
    try:
        if manifest["finished"]:
            finish(model, name)
        _fill(model, name, tensors, directory)
    except EffzooError:
        detach(model, name)
        raise
    return model


def restore_adapter(model: M, directory: str | Path, *, name: str = "default") -> M:
    """Copy the tensors that `save_adapter` wrote into an adapter that is attached already, with the same spec; return the model.

    The parameters stay the same objects, as an optimizer needs. Raises AdapterError as `load_adapter` does, and for another spec.
    """
    attachment, directory = _known(model, name), Path(directory)
    manifest, tensors = _read(directory)
    _check_base(model, manifest, directory)
    saved = "|".join(str(Spec(entry["name"], {k: v for k, v in entry.items() if k != "name"})) for entry in manifest["peft"])
    if saved != attachment.spec:
        raise AdapterError(f"the adapter in {directory} is {saved!r}, the adapter {name!r} of this model is {attachment.spec!r}; attach the same")
    if manifest["finished"] and not attachment.finished:
        finish(model, name)
    if attachment.finished and not manifest["finished"]:
        raise AdapterError(f"the adapter in {directory} is in the middle of its training, the adapter {name!r} of this model is finished")
    _fill(model, name, tensors, directory)
    return model


def stored_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a file holds of an adapter, by the tensor's key without the adapter's name: packed where a module can, what is shared once."""
    tensors: dict[str, Tensor] = {}
    whole = adapter_tensors(model, name)
    for path, site in sites(model):
        for method, module in site.of(name).items() if name in site.adapters else ():
            prefix, own = f"{path}.adapters.{name}.{method}.", module.packed() if isinstance(module, PeftModule) else None
            if own is None:
                own = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
            tensors |= {f"{path}.adapters.{method}.{key}": value for key, value in own.items()}
    return tensors


def base_hashes(model: nn.Module) -> dict[str, str]:
    """A hash of each base tensor; the task head is left out, since an adapter brings its own."""
    hashes = {}
    heads = {path for path, site in sites(model) if fnmatchcase(site.role, HEAD)}
    for key, value in base_tensors(model).items():
        if key.rpartition(".")[0] not in heads:
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            hashes[key] = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + content.tobytes()).hexdigest()[:16]
    return hashes


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = directory / MANIFEST
    if not path.is_file():
        raise AdapterError(f"no adapter in {directory}: {MANIFEST} is missing; give the directory that save_adapter wrote")
    try:
        manifest = json.loads(path.read_text())
        wanted = {key: manifest[key] for key in ("format", "name", "peft", "base", "base_hashes", "tensors", "sha256")}
        wanted["finished"] = bool(manifest.get("finished", False))
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is not a manifest that save_adapter wrote ({type(error).__name__}: {error}); save the adapter again") from None
    if wanted["format"] != FORMAT:
        raise AdapterError(f"{path} has format {wanted['format']}, this version of effzoo reads {FORMAT}")
    file = directory / wanted["tensors"]
    if not file.is_file():
        raise AdapterError(f"{path} names {wanted['tensors']}, which is missing; copy the whole directory")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != wanted["sha256"]:
        raise AdapterError(
            f"{file} is truncated or altered: {len(content)} bytes with sha256 {digest[:16]}..., the manifest says {wanted['sha256'][:16]}..."
        )
    try:
        return wanted, safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{file} is not a safetensors file: {error}") from None


def _check_base(model: nn.Module, manifest: dict[str, Any], directory: Path) -> None:
    ours, theirs = base_hashes(model), manifest["base_hashes"]
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if ours.get(key) != theirs.get(key):
            problem = (
                "is missing in this model"
                if key not in ours
                else "is new in this model"
                if key not in theirs
                else "has other values or another shape"
            )
            raise AdapterError(
                f"the adapter in {directory} was trained on another base ({manifest['base']!r}): {key} {problem}; "
                "build the model with the same name, sizes, attention and pretrained weights"
            )


def _fill(model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
    own = stored_tensors(model, name)
    packed: dict[str, tuple[PeftModule, dict[str, Tensor]]] = {}
    for path, site in sites(model):
        for method, module in site.of(name).items() if name in site.adapters else ():
            if isinstance(module, PeftModule) and module.packed() is not None:
                prefix = f"{path}.adapters.{method}."
                packed[prefix] = (module, {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    for key in [*own, *(key for key in tensors if key not in own)]:
        if key not in tensors or key not in own:
            raise AdapterError(
                f"the adapter in {directory} does not fit its own spec: {key} is {'missing' if key in own else 'one too many'} in the file"
            )
        if own[key].shape != tensors[key].shape and not key.startswith(tuple(packed)):
            raise AdapterError(f"{key} has shape {tuple(tensors[key].shape)} in {directory}, this model needs {tuple(own[key].shape)}")
    with torch.no_grad():
        for prefix, (module, found) in packed.items():
            try:
                module.unpack(found)
            except (KeyError, ValueError, IndexError, RuntimeError) as error:
                raise AdapterError(f"what {directory} holds for {prefix}* does not fit this model: {error}") from error
        for key, value in own.items():
            if not key.startswith(tuple(packed)):
                value.copy_(tensors[key])


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
