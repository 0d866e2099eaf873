"""From the files of peft to an adapter of ours."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from effzoo.convert.peft_files import patterns, seal, selected
from effzoo.convert.peft_files.kinds import EVERYWHERE, KINDS, SELECTION, Kind
from effzoo.convert.peft_files.twin import Config, Twin, Wanted
from effzoo.convert.peft_files.writing import CONFIG, HEADER, WEIGHTS
from effzoo.errors import AdapterError, EffzooError, listing
from effzoo.peft import attach, attached, detach, finish
from effzoo.peft.manifest import read_json
from effzoo.sites import Embedding
from effzoo.spec import Spec

log = logging.getLogger("effzoo.convert")
OWN_START = (True, False, None, "gaussian", "eva", "orthogonal")  # starts of peft's LoRA that leave the base as it is
TRAINING_ONLY = ("rank_dropout", "module_dropout", "rank_dropout_scale")


def read(model: nn.Module, directory: Path, name: str) -> None:
    """Attach the adapter that peft (or `writing.write`) saved in a directory, under a name; see `effzoo.convert.peft_files`."""
    config, tensors, parts = _open(directory)
    kind = _kind(config, directory)
    twin = Twin(model)
    _check_config(config, kind, directory)
    config = patterns.compiled(config)
    own, others = _sorted_out(twin, config, kind, tensors)
    found = kind.read(twin, config, own, parts)
    kept = selected.read(twin, others, parts)
    _check_whole(twin, config, own)
    log.info("%s: a peft adapter for base %r, which its files cannot prove", directory, config.get("base_model_name_or_path"))
    heads = {path: wanted for path, wanted in kept.items() if twin.is_head(path)}
    rest = {path: wanted for path, wanted in kept.items() if not twin.is_head(path)}
    attach(model, [*specs(twin, found), *specs(twin, rest)], name=name)
    try:
        if config["peft_type"] == "P_TUNING":
            finish(model, name)
        _fill(model, twin, name, [found, rest, heads])
    except EffzooError:
        detach(model, name)
        raise


def _open(directory: Path) -> tuple[Config, dict[str, Tensor], dict[str, list[int]]]:
    config = read_json(directory / CONFIG, "a config that peft wrote")
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{directory / CONFIG} is not a config that peft wrote (it has no peft_type); save the adapter again")
    file = directory / WEIGHTS
    if not file.is_file():
        reason = "adapter_model.bin is a pickle, which effzoo does not open; save it in peft with safe_serialization=True"
        raise AdapterError(f"{file} is missing" + (f": {reason}" if (directory / "adapter_model.bin").is_file() else "; copy the whole directory"))
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118, not a mapping
            header = json.loads((content.metadata() or {}).get(HEADER, "{}"))
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file} is no whole safetensors file: {error}; copy it again") from None
    config, parts = seal.opened(config, tensors, header, directory / CONFIG)
    return config, tensors, parts


def _kind(config: Config, directory: Path) -> Kind:
    for kind in KINDS:
        if config["peft_type"] in kind.peft_types:
            return kind
    known = listing(name for kind in KINDS for name in kind.peft_types)
    raise AdapterError(f"{directory} holds a peft adapter of type {config['peft_type']!r}, which effzoo cannot read; it reads {known}")


def _check_config(config: Config, kind: Kind, directory: Path) -> None:
    given = {key: value for key, value in config.items() if key not in TRAINING_ONLY}
    if given.get("num_transformer_submodules") in (None, 1):
        given.pop("num_transformer_submodules", None)
    patterns.neutral(given, (*EVERYWHERE, *kind.options), str(directory))
    start = config.get("init_lora_weights", True)
    if start not in OWN_START:
        raise AdapterError(
            f"{directory}: init_lora_weights={start!r} has changed the base, and the file does not say how; save it in peft with "
            "path_initial_model_for_weight_conversion, which makes it an ordinary LoRA of twice the rank"
        )
    dropped = [key for key in TRAINING_ONLY if config.get(key)]
    if dropped:
        log.warning("%s: %s acts in training only, and effzoo's training does not have it", directory, ", ".join(dropped))


def _sorted_out(twin: Twin, config: Config, kind: Kind, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method's own tensors and the others (heads, biases), by key without prefix."""
    own: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    ties = twin.layout.ties(twin.model.config, twin.model.task)
    for full, tensor in tensors.items():
        key = full.removeprefix("base_model.model.") if full.startswith("base_model.model.") else full.removeprefix("base_model.")
        if any(part.startswith(kind.marks) for part in key.split(".")):
            own[key] = tensor
            continue
        if ".original_module." in key or (".modules_to_save." in key and key.replace(".modules_to_save.", ".") in key_set(tensors)):
            continue  # peft writes the biases of a saved module thrice
        adapted = ".base_layer." in key
        key = key.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if key in ties and ties[key] in key_set(tensors):
            continue
        if _is_base(twin, key, tensor, adapted):
            continue
        others[key] = tensor
    return own, others


def key_set(tensors: Iterable[str]) -> set[str]:
    """Keys without prefix."""
    return {key.removeprefix("base_model.model.") for key in tensors}


def _is_base(twin: Twin, key: str, tensor: Tensor, adapted: bool) -> bool:
    """Whether this is a weight as the base has it, which peft also saves for embeddings and language-model heads that are adapted."""
    theirs, _, parameter = key.rpartition(".")
    path = twin.rules[theirs].ours[0] if theirs in twin.rules else ""
    if not path or parameter != "weight" or not (adapted or isinstance(twin.sites[path], Embedding)):
        return False
    base = twin.weight(path)
    return base.shape == tensor.shape and torch.equal(base, tensor.to(base))


def _check_whole(twin: Twin, config: Config, own: Mapping[str, Tensor]) -> None:
    """AdapterError for a module that the config names and the file has no tensors for; peft would leave it as it starts, and warn."""
    if config["peft_type"] not in ("LORA", "IA3", "LOKR"):
        return
    have = {re.split(r"\.(?:lora|ia3|lokr)_", key)[0] for key in own}
    saved = tuple(config.get("modules_to_save") or ())
    known = [theirs for theirs in twin.rules if not any(theirs == name or theirs.endswith(f".{name}") for name in saved)]
    named = patterns.matched({key: config.get(key) for key in SELECTION}, known)
    lacking = [theirs for theirs in known if theirs in named - have and twin.sites[twin.rules[theirs].ours[0]].base()]
    if lacking:
        raise AdapterError(f"the config names {lacking[0]} (target_modules), and the file has no tensor for it; copy the whole adapter")
    if not own:
        raise AdapterError("the file has no tensor of its method")
    if not isinstance(config.get("target_modules"), str | list) or config["target_modules"] == "all-linear":
        return  # peft's own choice
    tied = twin.tied_head if config.get("ensure_weight_tying") else None
    if unnamed := sorted(have - named - {tied}):
        raise AdapterError(f"the file has tensors for {unnamed[0]}, which its config does not name (target_modules), so peft would leave them out")


def specs(twin: Twin, wanted: Mapping[str, Wanted]) -> list[Spec]:
    """Specs that hang exactly these modules: one for all roles with the same options in the same layers."""
    groups: dict[tuple[str, str], dict[str, list[int | None]]] = {}
    options: dict[tuple[str, str], dict[str, Any]] = {}
    for path, one in wanted.items():
        key = one.method, repr(one.options)
        options[key] = one.options
        site = twin.sites[path]
        groups.setdefault(key, {}).setdefault(site.role, []).append(site.layer)
    found = []
    for key, roles in groups.items():
        by_layers: dict[tuple[int, ...] | None, list[str]] = {}
        for role, layers in roles.items():
            given = tuple(sorted(layer for layer in layers if layer is not None))
            some = None if given in ((), tuple(range(twin.model.config.layers))) else given
            by_layers.setdefault(some, []).append(role)
        for some, targets in by_layers.items():
            said = {} if key[0] in ("prompt", "p_tuning") else {"targets": tuple(targets)} | ({} if some is None else {"layers": some})
            found.append(Spec(key[0], options[key] | said))
    return found


def _fill(model: nn.Module, twin: Twin, name: str, each: list[dict[str, Wanted]]) -> None:
    """Copy the tensors into what was hung; AdapterError for what does not correspond."""
    filled = set()
    for wanted in each:
        for path, one in wanted.items():
            site = twin.sites[path]
            state = site.of(name)[one.method].state_dict(keep_vars=True) if name in site.adapters and one.method in site.of(name) else {}
            missing = [key for key in state if key not in one.tensors] if one.method != "head" else []
            extra = [key for key in one.tensors if key not in state]
            if missing or extra:
                raise AdapterError(f"{path}: {(missing + extra)[0]} of {one.method} is {'missing' if missing else 'one too many'} in the file")
            with torch.no_grad():
                for key, tensor in one.tensors.items():
                    if state[key].shape != tensor.shape:
                        raise AdapterError(f"{path}: {key} has shape {tuple(tensor.shape)} in the file, this model needs {tuple(state[key].shape)}")
                    state[key].copy_(tensor)
            filled.add((path, one.method))
    for method, paths in attached(model)[name].methods:
        for path in paths:
            if (path, method.name) not in filled and not twin.is_head(path):
                raise AdapterError(f"{path}: the file has nothing for {method.name}")
