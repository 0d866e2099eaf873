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

from effzoo.annotations import problem
from effzoo.convert.peft_files import patterns, seal, tokens, whole_modules
from effzoo.convert.peft_files.counterparts import COUNTERPARTS, EVERYWHERE, SELECTION, Counterpart
from effzoo.convert.peft_files.twin import Config, Twin, Wanted, more_tokens
from effzoo.convert.peft_files.writing import CONFIG, HEADER, WEIGHTS
from effzoo.errors import AdapterError, EffzooError, listing
from effzoo.peft import attach, attached, detach, finish
from effzoo.peft.manifest import read_json
from effzoo.peft.method import LABELS
from effzoo.sites import Embedding
from effzoo.spec import Spec

log = logging.getLogger("effzoo.convert")
OWN_START = (True, False, None, "gaussian", "eva", "orthogonal")  # starts of peft's LoRA that leave the base as it is
TRIES = 100
# of which null is none; null elsewhere says that nothing was chosen
NUMBERS = (
    "r", "lora_alpha", "alpha", "lora_dropout", "scaling", "projection_prng_key", "n_frequency", "random_loc_seed",
    "oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "num_vectors", "vector_length",
    "topk", "init_r",
)  # fmt: skip
# what their tensors of a module begin with
OF_MODULES = (
    "lora_", "ia3_", "lokr_", r"ln_tuning_layers\.", "trainable_tokens_", "hada_", "vera_", "fourierft_", "oft_",
    "hra_", "miss_", "boft_", "vblora_",
)  # fmt: skip
TRAINING_ONLY = ("rank_dropout", "module_dropout", "rank_dropout_scale")


def read(model: nn.Module, directory: Path, name: str) -> None:
    """Attach the adapter that peft (or `writing.write`) saved in a directory, under a name; see
    `effzoo.convert.peft_files`."""
    config, tensors, parts = _open(directory)
    counterpart = _counterpart(config, directory)
    twin = Twin(model)
    _check_config(config, counterpart, directory)
    config = patterns.compiled(config)
    own, others, of_tokens = _sorted_out(twin, counterpart, tensors)
    of_method = counterpart.read(twin, config, own, parts)
    trained_tokens = tokens.read(twin, config, of_tokens, parts) if counterpart.peft_types == ("LORA",) else {}
    kept = whole_modules.read(twin, config, others, parts)
    _check_whole(twin, config, own)
    _check_saved(twin, config, tensors)
    whole = {path for path, wanted in kept.items() if wanted.method in ("full", "tokens")}
    if clash := [*(trained_tokens.keys() & (of_method.keys() | whole)), *(whole & of_method.keys())]:
        raise AdapterError(f"the file holds two things for {clash[0]}; peft has written one of them for another module")
    if counterpart.peft_types == ("LN_TUNING",):
        of_method, kept = {}, of_method | kept
    log.info(
        "%s: a peft adapter for base %r, which its files cannot prove", directory, config.get("base_model_name_or_path")
    )
    heads = {path: wanted for path, wanted in kept.items() if twin.is_head(path)}
    rest = {path: wanted for path, wanted in kept.items() if not twin.is_head(path)}
    groups = [of_method, trained_tokens, rest]
    attach(model, [spec for group in groups for spec in specs(twin, group)], name=name, num_labels=_labels(twin, heads))
    try:
        if config["peft_type"] in ("P_TUNING", "ADALORA"):
            finish(model, name)
        _fill(model, twin, name, [*groups, heads])
    except EffzooError:
        detach(model, name)
        raise


def _labels(twin: Twin, heads: Mapping[str, Wanted]) -> int | None:
    """For how many labels the head of the file is.

    Raises AdapterError for one of another size than the model's that is not whole.
    """
    for path, wanted in heads.items():
        if twin.sites[path].role != LABELS or not (sizes := {len(tensor) for tensor in wanted.tensors.values()}):
            continue
        base = twin.sites[path].base()
        ours = len(base["weight"])
        other = sizes != {ours}
        if other and (len(sizes) > 1 or set(wanted.tensors) != {f"own_{key}" for key in base}):
            raise AdapterError(
                f"{path}: the file's head has {' and '.join(map(str, sorted(sizes)))} outputs, this model's {ours}; "
                "one of another size comes whole, weight and bias; copy the whole adapter"
            )
        return sizes.pop()
    return None


def _open(directory: Path) -> tuple[Config, dict[str, Tensor], dict[str, list[int]]]:
    """What the two files hold, of one adapter also while others are written there."""
    for _ in range(TRIES):
        seen = _state(directory)
        try:
            return _opened(directory)
        except AdapterError:
            if seen == _state(directory):
                raise
    raise AdapterError(f"{directory} was written {TRIES} times while it was read; load it when nobody saves there")


def _state(directory: Path) -> list[tuple[int, int] | None]:
    """What changes when the files are written again."""
    files = [directory / name for name in (CONFIG, WEIGHTS)]
    return [(path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None for path in files]


def _opened(directory: Path) -> tuple[Config, dict[str, Tensor], dict[str, list[int]]]:
    config = read_json(directory / CONFIG, "a config that peft wrote")
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(
            f"{directory / CONFIG} is not a config that peft wrote (it has no peft_type); save the adapter again"
        )
    file = directory / WEIGHTS
    if not file.is_file():
        reason = (
            "adapter_model.bin is a pickle, which effzoo does not open; save it in peft with safe_serialization=True"
        )
        raise AdapterError(
            f"{file} is missing"
            + (f": {reason}" if (directory / "adapter_model.bin").is_file() else "; copy the whole directory")
        )
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118, not a mapping
            header = json.loads((content.metadata() or {}).get(HEADER, "{}"))
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file} is no whole safetensors file: {error}; copy it again") from None
    config, parts = seal.opened(config, tensors, header, directory / CONFIG)
    return config, tensors, parts


def _counterpart(config: Config, directory: Path) -> Counterpart:
    for counterpart in COUNTERPARTS:
        if config["peft_type"] in counterpart.peft_types:
            return counterpart
    known = listing(name for counterpart in COUNTERPARTS for name in counterpart.peft_types)
    raise AdapterError(
        f"{directory} holds a peft adapter of type {config['peft_type']!r}, which effzoo cannot read; it reads {known}"
    )


def _check_config(config: Config, counterpart: Counterpart, directory: Path) -> None:
    given = {key: value for key, value in config.items() if key not in TRAINING_ONLY}
    if given.get("num_transformer_submodules") in (None, 1):
        given.pop("num_transformer_submodules", None)
    fields = {**EVERYWHERE, **counterpart.fields}
    patterns.neutral(given, fields, str(directory))
    for field, value in given.items():
        if field in fields and (value is not None or field in NUMBERS) and (said := problem(value, fields[field])):
            raise AdapterError(f"{directory}: {field} of the config {said}")
    start = config.get("init_lora_weights", True)
    if start not in OWN_START:
        raise AdapterError(
            f"{directory}: init_lora_weights={start!r} has changed the base, and the file does not say how; save it in "
            "peft with path_initial_model_for_weight_conversion, which makes it an ordinary LoRA of twice the rank"
        )
    dropped = [key for key in TRAINING_ONLY if config.get(key)]
    if dropped:
        log.warning(
            "%s: %s acts in training only, and effzoo's training does not have it", directory, ", ".join(dropped)
        )


def _sorted_out(
    twin: Twin, counterpart: Counterpart, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The method's own tensors, the others (heads, biases), and a LoRA's trained tokens, by key without prefix."""
    own: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    of_tokens: dict[str, Tensor] = {}
    ties = twin.layout.ties(twin.model.config, twin.model.task)
    for full, tensor in tensors.items():
        key = full.removeprefix("base_model.").removeprefix("model." if full.startswith("base_model.model.") else "")
        if any(part.startswith(counterpart.marks) for part in key.split(".")):
            own[key] = tensor
            continue
        if key.endswith(f".{tokens.WRAPPER}{tokens.KEY}"):
            of_tokens[key] = tensor
            continue
        if ".original_module." in key or (
            ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in key_set(tensors)
        ):
            continue  # peft writes the biases of a saved module thrice
        adapted = ".base_layer." in key
        key = key.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if key in ties and (other := _tensor(tensors, ties[key])) is not None:
            if other.shape != tensor.shape or not torch.equal(other, tensor):
                raise AdapterError(
                    f"the file trains {key} and {ties[key]} as two tensors, which are one in this model; load it into "
                    "a model with tied=False, or train it in peft with ensure_weight_tying=True"
                )
            continue
        if _is_base(twin, key, tensor, adapted):
            continue
        others[key] = tensor
    return own, others, of_tokens


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor | None:
    """The tensor of a module that is saved as it is, by its key without prefix."""
    return next(
        (tensors[full] for full in (f"base_model.model.{key}", f"base_model.{key}", key) if full in tensors), None
    )


def key_set(tensors: Iterable[str]) -> set[str]:
    """Keys without prefix."""
    return {key.removeprefix("base_model.model.") for key in tensors}


def _is_base(twin: Twin, key: str, tensor: Tensor, adapted: bool) -> bool:
    """Whether this is a weight as the base has it.

    peft also saves those of embeddings and language-model heads that are adapted.
    """
    theirs, _, parameter = key.rpartition(".")
    path = twin.rules[theirs].ours[0] if theirs in twin.rules else ""
    if not path or parameter != "weight" or not (adapted or isinstance(twin.sites[path], Embedding)):
        return False
    base = twin.weight(path)
    if base.shape == tensor.shape and torch.equal(base, tensor.to(base)):
        return True
    if adapted:
        said = (
            f"the file's has shape {tuple(tensor.shape)}, this model's {tuple(base.shape)}"
            if base.shape != tensor.shape
            else "it has other values"
        )
        raise AdapterError(
            f"{key}: the adapter was trained on another base, of which the file holds this weight: "
            f"{said}{more_tokens(tensor, base)}"
        )
    return False


def _check_whole(twin: Twin, config: Config, own: Mapping[str, Tensor]) -> None:
    """AdapterError for a module that the config names and the file has no tensors for; peft would only warn."""
    if config["peft_type"] in (*whole_modules.PROMPT_LEARNING, "ADAPTION_PROMPT"):
        return
    have = {re.split(rf"\.(?:{'|'.join(OF_MODULES)})", key)[0].removesuffix(".base_layer") for key in own if "." in key}
    saved = whole_modules.names_of(config.get("modules_to_save"))
    known = [
        theirs for theirs in twin.rules if not any(theirs == name or theirs.endswith(f".{name}") for name in saved)
    ]
    named = patterns.matched({key: config.get(key) for key in SELECTION}, known)
    lacking = [theirs for theirs in known if theirs in named - have and twin.sites[twin.rules[theirs].ours[0]].base()]
    tied = (
        {twin.tied_head, twin.theirs[twin.token].theirs}
        if config.get("ensure_weight_tying") or config["peft_type"] == "TRAINABLE_TOKENS"
        else set()
    )
    if lacking:
        raise AdapterError(
            f"the config names {lacking[0]} (target_modules), and the file has no tensor for it; copy the whole adapter"
        )
    if not own:
        raise AdapterError("the file has no tensor of its method")
    if not isinstance(config.get("target_modules"), str | list) or config["target_modules"] == "all-linear":
        return  # peft's own choice
    if unnamed := sorted(have - named - tied):
        raise AdapterError(
            f"the file has tensors for {unnamed[0]}, which its config does not name (target_modules), "
            "so peft would leave them out"
        )


def _check_saved(twin: Twin, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """AdapterError for a module, or for biases, that the config says are saved, and the file has no tensors for."""
    keys = key_set(tensors) | {key.removeprefix("base_model.") for key in tensors}
    for theirs in twin.rules if whole_modules.names_of(config.get("modules_to_save")) else ():
        named = whole_modules.named(theirs, whole_modules.names_of(config.get("modules_to_save")))
        site = twin.sites.get(twin.rules[theirs].ours[0])
        if named and site is not None and site.base() and not any(key.startswith(f"{theirs}.") for key in keys):
            raise AdapterError(
                f"the config says that {theirs} is saved (modules_to_save), and the file has no "
                "tensor of it; copy the whole adapter"
            )
    lacking = config.get("bias", "none") not in (None, "none") and not any(key.endswith(".bias") for key in keys)
    if lacking and any("bias" in site.base() for site in twin.sites.values()):
        raise AdapterError(f"the config says bias={config['bias']!r}, and the file has no bias; copy the whole adapter")


def specs(twin: Twin, wanted: Mapping[str, Wanted]) -> list[Spec]:
    """Specs that hang exactly these modules: one for all roles with the same options in the same layers."""
    groups: dict[tuple[str, str], dict[str, list[int | None]]] = {}
    options: dict[tuple[str, str], dict[str, Any]] = {}
    for path, one in wanted.items():
        key = one.method, repr(one.options)
        options[key] = one.options
        site = twin.sites[path]
        groups.setdefault(key, {}).setdefault(site.role, []).append(site.layer)
    made = []
    for key, roles in groups.items():
        by_layers: dict[tuple[int, ...] | None, list[str]] = {}
        for role, layers in roles.items():
            given = tuple(sorted(layer for layer in layers if layer is not None))
            some = None if given in ((), tuple(range(twin.model.config.layers))) else given
            by_layers.setdefault(some, []).append(role)
        for some, targets in by_layers.items():
            said = (
                {}
                if key[0] in ("prompt", "p_tuning")
                else {"targets": tuple(targets)} | ({} if some is None else {"layers": some})
            )
            made.append(Spec(key[0], options[key] | said))
    return made


def _fill(model: nn.Module, twin: Twin, name: str, groups: list[dict[str, Wanted]]) -> None:
    """Copy the tensors into what was hung; AdapterError for what does not correspond."""
    filled = set()
    for wanted in groups:
        for path, one in wanted.items():
            site = twin.sites[path]
            state = (
                site.of(name)[one.method].state_dict(keep_vars=True)
                if name in site.adapters and one.method in site.of(name)
                else {}
            )
            missing = [key for key in state if key not in one.tensors] if one.method != "head" else []
            extra = [key for key in one.tensors if key not in state]
            if missing or extra:
                raise AdapterError(
                    f"{path}: {(missing + extra)[0]} of {one.method} is "
                    f"{'missing' if missing else 'one too many'} in the file"
                )
            with torch.no_grad():
                for key, tensor in one.tensors.items():
                    if state[key].shape != tensor.shape:
                        raise AdapterError(
                            f"{path}: {key} has shape {tuple(tensor.shape)} in the file, this model "
                            f"needs {tuple(state[key].shape)}"
                        )
                    state[key].copy_(tensor)
            filled.add((path, one.method))
    for method, paths in attached(model)[name].methods:
        for path in paths:
            if (path, method.name) not in filled and not twin.is_head(path):
                raise AdapterError(f"{path}: the file has nothing for {method.name}")
