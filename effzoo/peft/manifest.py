"""adapter.json: what it says of an adapter, written with a hash of itself, and read as of any origin.

Format 2 holds the spec, the fingerprint of the base (`effzoo.peft.fingerprint`), name, size and hash of the file with
the tensors, and a hash of all that. Format 1 had hashes of the base's tensors and of the file alone: what cannot be
proved from it is said in `UNPROVED`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effzoo.errors import AdapterError
from effzoo.peft.fingerprint import Fingerprint
from effzoo.peft.rounded import Kept
from effzoo.reading import LARGEST, read_object
from effzoo.spec import Spec

MANIFEST = "adapter.json"
FORMAT = 2
TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")  # the digits are the hash of the content
UNPROVED = (
    "heads, activation, eps, attention and its options, seeds, and the weights of a head that the adapter "
    "does not bring"
)
OLD = ("name", "peft", "base", "base_hashes", "tensors", "sha256")


@dataclass(frozen=True)
class Manifest:
    """What a folder says of the adapter in it.

    name: of the adapter.
    specs: of its methods.
    finished: whether it is.
    base: a label of the base.
    fingerprint: of the base without the tensors that the adapter replaces; in format 1 it has no facts, and hashes
        alone.
    tensors, sha256, size: name, hash and bytes of the other file (size None in format 1).
    format: of this file.
    kept: what shows a base with the same weights in another dtype (`effzoo.peft.rounded`); empty in older files.
    dtype: in which `attach` was asked to hold the adapter's tensors; None for float32 or better.
    begun: {method: stage} of an adapter in the middle of its training; None in older files, which do not say.
    """

    name: str
    specs: tuple[Spec, ...]
    finished: bool
    base: str
    fingerprint: Fingerprint
    tensors: str
    sha256: str
    size: int | None
    format: int = FORMAT
    kept: dict[str, Kept] = field(default_factory=dict, compare=False)
    dtype: str | None = None
    begun: dict[str, str] | None = None

    def written(self) -> bytes:
        """The content of adapter.json."""
        content = {
            "format": self.format, "name": self.name,
            "peft": [{"name": spec.name, **spec.options} for spec in self.specs], "finished": self.finished,
            "begun": self.begun, "base": self.base, "base_fingerprint": asdict(self.fingerprint),
            "base_kept": {key: kept.plain() for key, kept in self.kept.items()}, "dtype": self.dtype,
            "tensors": self.tensors, "sha256": self.sha256, "size": self.size,
        }  # fmt: skip
        text = json.dumps(content | {"manifest_sha256": _hash(json.loads(json.dumps(content)))}, indent=1).encode()
        if len(text) > LARGEST:
            raise AdapterError(
                f"the manifest would have {len(text):,} bytes, and {LARGEST:,} are the most that are "
                "read; adapt a smaller model"
            )
        return text


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a folder. Raises AdapterError for what save_adapter did not write so."""
    path = directory / MANIFEST
    content = read_json(path, "a manifest that save_adapter wrote")
    version = content.get("format")
    if type(version) is int and version not in (1, FORMAT):
        raise AdapterError(
            f"{path} has format {version}, this version of effzoo reads 1 and {FORMAT}; load it with "
            "the version that wrote it"
        )
    try:
        if type(version) is not int:
            raise TypeError(f"format is a number, got {version!r:.40}")
        if version == FORMAT and content.pop("manifest_sha256") != _hash(content):
            raise AdapterError(
                f"{path} is truncated or altered: its own hash does not fit what it says; copy the "
                "folder again, or save again"
            )
        return _checked(content, version)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{path} is not a manifest that save_adapter wrote ({type(error).__name__}: {error}); "
            "save the adapter again"
        ) from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of any origin: of bounded size, every key once, numbers finite, else AdapterError."""
    if not path.is_file():
        raise AdapterError(
            f"no adapter in {path.parent}: {path.name} is missing; give the directory that save_adapter wrote"
        )
    try:
        return read_object(path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is not {what} ({type(error).__name__}: {error}); save the adapter again") from None


def _checked(content: dict[str, Any], version: int) -> Manifest:
    """The manifest, every entry of which has the type that it should have."""
    base, specs = content["base_fingerprint" if version == FORMAT else "base_hashes"], content["peft"]
    if (
        not isinstance(specs, list)
        or not specs
        or not all(isinstance(spec, dict) and isinstance(spec.get("name"), str) for spec in specs)
    ):
        raise TypeError("peft is a list of specs with names")
    if version == FORMAT:
        fingerprint = Fingerprint(
            facts=_typed(base["facts"], dict, "facts"), tensors=_typed(base["tensors"], dict, "tensors")
        )
        size = _typed(content["size"], int, "size")
    else:
        fingerprint, size = Fingerprint({}, _typed(base, dict, "base_hashes")), None
    if not all(isinstance(value, str) for value in fingerprint.tensors.values()):
        raise TypeError("the hashes of the base's tensors are strings")
    begun, finished = content.get("begun"), _typed(content.get("finished", False), bool, "finished")
    if begun is not None and not all(isinstance(stage, str) for stage in _typed(begun, dict, "begun").values()):
        raise TypeError(f"begun is the name of a stage for each method, got {begun!r:.80}")
    if begun and finished:
        raise ValueError(f"a finished adapter is in no stage of its training, got {begun!r:.80}")
    tensors = _typed(content["tensors"], str, "tensors")
    if not TENSORS.fullmatch(tensors):
        raise ValueError(f"tensors names a file of this folder, adapter-(16 digits).safetensors, got {tensors!r:.80}")
    return Manifest(
        name=_typed(content["name"], str, "name"),
        specs=tuple(Spec(spec["name"], {key: value for key, value in spec.items() if key != "name"}) for spec in specs),
        finished=finished,
        base=_typed(content["base"], str, "base"),
        fingerprint=fingerprint,
        tensors=tensors,
        sha256=_typed(content["sha256"], str, "sha256"),
        size=size,
        format=version,
        kept={key: Kept.read(kept) for key, kept in _typed(content.get("base_kept", {}), dict, "base_kept").items()},
        dtype=None if content.get("dtype") is None else _typed(content["dtype"], str, "dtype"),
        begun=begun,
    )


def _typed(value: Any, wanted: type, name: str) -> Any:
    if type(value) is not wanted:
        raise TypeError(f"{name} is of type {wanted.__name__}, got {value!r:.40}")
    return value


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
