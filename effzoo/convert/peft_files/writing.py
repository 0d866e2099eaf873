"""From an adapter of ours to the files of peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from effzoo.convert.peft_files import seal, tokens, whole_modules
from effzoo.convert.peft_files.counterparts import COUNTERPARTS, Counterpart
from effzoo.convert.peft_files.twin import Twin, Written
from effzoo.errors import AdapterError, listing
from effzoo.peft import Method, PeftModule, attached
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.sites import Norm
from effzoo.writing import replace_files

CONFIG, WEIGHTS, HEADER = "adapter_config.json", "adapter_model.safetensors", "effzoo"


def write(model: nn.Module, directory: Path, name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained(twin, directory)`
    loads.

    twin: the model of transformers with the same weights, as `effzoo.convert.to_transformers` makes it of the model
        without adapters.

    The weights get their name before the config, and hold the config themselves: who reads them here gets the old
    adapter or the new one at every moment (`seal`); peft itself, in the moment between the two, the new weights with
    the old config. Raises AdapterError, and writes nothing, for what peft has no counterpart for.
    """
    twin = Twin(model)
    hung: dict[str, tuple[Method, PeftModule]] = {}
    copies: dict[str, PeftModule] = {}
    for method, paths in attached(model)[name].methods:
        for path in paths:
            module = twin.sites[path].of(name)[method.name]
            assert isinstance(module, PeftModule)
            if isinstance(module, Copy):
                if path in copies:
                    raise AdapterError(f"{path} is trained by two methods of this adapter; peft trains it once")
                copies[path] = module
            elif path in hung:
                raise AdapterError(
                    f"{path} has two methods, {hung[path][0].name} and {method.name}; a peft adapter is of one method"
                )
            else:
                hung[path] = method, module
    trained_tokens = {path: module for path, (_, module) in hung.items() if isinstance(module, tokens.CLASSES)}
    if len(trained_tokens) < len(hung):
        hung = {path: pair for path, pair in hung.items() if path not in trained_tokens}
    else:  # an adapter of its own
        trained_tokens = {}
    norms = _norms(twin, copies) if not hung else {}
    with torch.no_grad():
        if norms:
            out = whole_modules.write_norms(twin, norms)
        else:
            counterpart = _counterpart(hung, attached(model)[name].spec)
            methods = list(dict.fromkeys(method for method, _ in hung.values()))
            out = counterpart.write(twin, {path: module for path, (_, module) in hung.items()}, methods)
        tokens.add(twin, trained_tokens, out)
        whole_modules.write(twin, {path: module for path, module in copies.items() if path not in norms}, out)
    out.config |= {
        "task_type": None if _adapts_classifier(out) else twin.task_type, "base_model_name_or_path": None,
        "revision": None, "inference_mode": True,
    }  # fmt: skip
    _files(directory, out)


def _adapts_classifier(out: Written) -> bool:
    """Whether the method hangs on the classifier itself: peft would train it as a whole instead if it knew the task."""
    return any(set(theirs.split(".")) & set(whole_modules.CLASSIFIERS) for theirs in out.targets)


def _norms(twin: Twin, copies: dict[str, PeftModule]) -> dict[str, PeftModule]:
    """The trained norms, if all that is trained outside the head is whole norms."""
    body = {path: module for path, module in copies.items() if not twin.is_head(path)}
    whole = all(
        isinstance(twin.sites[path], Norm) and len(list(module.parameters())) == len(twin.sites[path].base())
        for path, module in body.items()
    )
    return body if whole else {}


def _counterpart(hung: dict[str, tuple[Method, PeftModule]], spec: str) -> Counterpart:
    """The one counterpart of all modules."""
    counterparts: dict[int, Counterpart] = {}
    for path, (method, module) in hung.items():
        fitting = [counterpart for counterpart in COUNTERPARTS if type(module) in counterpart.classes]
        if not fitting:
            raise AdapterError(
                f"{method.name} on {path} has no counterpart in the format of peft, which takes lora, dora, ia3, "
                "krona, adalora, loha, vera, vblora, fourierft, oft, boft, hra, miss, prompt, p_tuning, prefix, "
                "llama_adapter, tokens and norms; save it with format='effzoo', or merge it and convert the model"
            )
        counterparts[id(fitting[0])] = fitting[0]
    if len(counterparts) != 1:
        known = listing(counterpart.peft_types[0] for counterpart in counterparts.values())
        reason = f"this one has {known}" if counterparts else "this one only trains weights that the model has already"
        raise AdapterError(
            f"a peft adapter is of exactly one method of its own, and {reason} ({spec}); save it with format='effzoo'"
        )
    return next(iter(counterparts.values()))


def _files(directory: Path, out: Written) -> None:
    prompt = out.config["peft_type"] in whole_modules.PROMPT_LEARNING
    tensors = {}
    for key, value in out.tensors.items():
        inside = "." in key and not prompt  # what all modules share is outside the model
        full = key if key == "prompt_embeddings" else f"base_model.model.{key}" if inside else f"base_model.{key}"
        tensors[full] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    config: dict[str, Any] = dict(sorted(out.config.items()))
    metadata = {"format": "pt", HEADER: seal.header(config, tensors, out.parts)}
    replace_files(
        directory, {WEIGHTS: safetensors.torch.save(tensors, metadata), CONFIG: json.dumps(config, indent=2).encode()}
    )
