"""What the weights that effzoo writes for peft say of themselves: their config, and a hash of both.

The two files of an adapter cannot be renamed in one step, and peft's own have no hashes. So the header of
adapter_model.safetensors, which peft does not read, holds the config that the weights were written with, and a hash of
both: altered files are refused, and so are two that do not belong together. Between the two renames, and when the
writer is killed there, the new config is still in the folder under its temporary name, and is found. Of files that peft
wrote nothing proves that they are whole, but that they fit each other and the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effzoo.convert.peft_files.twin import Config
from effzoo.errors import AdapterError
from effzoo.peft.fingerprint import described
from effzoo.peft.manifest import read_json

# which others may fill in
LABELS = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


def header(config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]) -> str:
    """What goes into the header of the weights."""
    content = json.loads(json.dumps({"config": config, "parts": parts}))
    return json.dumps(content | {"sha256": _digest(content, tensors)})


def opened(
    config: Config, tensors: Mapping[str, Tensor], given: Any, path: Path
) -> tuple[Config, dict[str, list[int]]]:
    """The config that belongs to these weights, and the parts of tensors that several of our modules share.

    config: what was read from path, adapter_config.json.
    given: the header.

    Raises AdapterError for weights that are not those of their header or of the config, and for numbers that are none.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            problem = "NaN or infinity in it" if tensor.is_floating_point() else f"dtype {tensor.dtype}"
            raise AdapterError(
                f"{path.parent}: {key} has {problem}, and an adapter holds finite floating-point numbers; save it again"
            )
    given = given if isinstance(given, dict) else {}
    parts = given.get("parts", {})
    if not isinstance(parts, dict) or not all(
        isinstance(numbers, list) and all(type(n) is int for n in numbers) for numbers in parts.values()
    ):
        raise AdapterError(
            f"{path.parent}: the header of the weights has parts that are no lists of numbers; save the adapter again"
        )
    if "sha256" not in given or not isinstance(given.get("config"), dict):
        return config, parts
    if given["sha256"] != _digest({"config": given["config"], "parts": parts}, tensors):
        raise AdapterError(
            f"{path.parent}: the weights are truncated or altered, they do not fit the hash in their "
            "header; copy the folder again"
        )
    written: Config = given["config"]
    for candidate in _candidates(config, path):
        if _different(candidate, written) is None:
            return candidate, parts
    key = str(_different(config, written))
    raise AdapterError(
        f"{path} has {key}={config.get(key)!r:.80}, the weights there were written with {written.get(key)!r:.80}; "
        "copy both files of one adapter, or save it again"
    )


def _candidates(config: Config, path: Path) -> Iterator[Config]:
    """The config; one that a writer is about to rename to it, or was when it was killed; and the one there now."""
    yield config
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(AdapterError):  # half written: then the weights are not its own either
            yield read_json(partial, "a config that peft wrote")
    yield read_json(path, "a config that peft wrote")


def _different(config: Config, other: Config) -> str | None:
    """The first key, labels aside, in which two configs differ."""
    return next(
        (
            key
            for key in {**other, **config}
            if key not in LABELS and (key in config, config.get(key)) != (key in other, other.get(key))
        ),
        None,
    )


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    content = {**header, "tensors": {key: described(tensor) for key, tensor in tensors.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
