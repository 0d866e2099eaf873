"""Trained copies: task heads and other whole modules (`modules_to_save` of peft), norms (LN_TUNING), biases (`bias`).

A trained bias without its weight can travel only together with LoRA, the one method that has a `bias` option:
`base_layer.bias` in a module that LoRA adapts, `bias` in another. Only the trained ones are written, which peft takes;
if it trains on, it trains all.

A trained token table reaches a tied language-model head in effzoo, and in peft with `ensure_weight_tying`. A table that
peft has saved without saying that it was trained holds the embeddings of new tokens: those that differ from the base
are read, as trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, more_tokens, parts_of
from effzoo.errors import AdapterError
from effzoo.peft.method import LABELS
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.peft.parameter.tokens import ROLES, spans
from effzoo.sites import Norm, TiedLinear

PROMPT_LEARNING = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
HEADLESS = ("ADAPTION_PROMPT", "TRAINABLE_TOKENS")
NORM = "ln_tuning_layers."
CLASSIFIERS = ("classifier", "score")  # the heads that peft saves for a prompt


def write(twin: Twin, modules: Modules, out: Written) -> None:
    """Add the trained copies to what is written."""
    peft_type = out.config["peft_type"]
    saved: dict[str, None] = {}
    biases, tied = set(), False
    for path, module in modules.items():
        assert isinstance(module, Copy)
        rule = twin.rule(path)
        own, base = dict(module.named_parameters()), twin.sites[path].base()
        if len(own) == len(base) and not isinstance(twin.sites[path], TiedLinear):
            name = rule.theirs.split(".")[0] if twin.is_head(path) and twin.outside(rule.theirs) else rule.theirs
            saved[name] = None
            tied |= path == twin.token and twin.tied_head is not None
        elif set(own) == {"own_bias"}:
            biases.add(rule.theirs)
        else:
            raise AdapterError(
                f"{path}: peft trains a whole module or its bias, this adapter trains "
                f"{', '.join(own)} of {', '.join(base)}"
            )
    _check(twin, peft_type, saved, biases, out)
    for theirs in twin.rules:
        inside = any(theirs == name or theirs.startswith(f"{name}.") for name in saved)
        if inside or theirs in biases:
            clash = theirs in out.targets and inside
            if clash:
                raise AdapterError(f"{theirs} is trained as a whole and adapted besides; peft does one of the two")
            middle = ".base_layer" if theirs in out.targets else ""
            for parameter in ("weight", "bias") if inside else ("bias",):
                tensors = _stacked(twin, modules, theirs, parameter)
                if tensors is not None:
                    out.tensors[f"{theirs}{middle}.{parameter}"] = tensors
                    if len(twin.rules[theirs].ours) > 1:
                        out.parts[f"{theirs}.{parameter}"] = [int(path in modules) for path in twin.rules[theirs].ours]
    if tied:
        _tie(twin, peft_type, saved, out)
    if peft_type not in HEADLESS:
        out.config["modules_to_save"] = list(saved) or None
    if biases:
        out.config["bias"] = "lora_only" if biases == set(out.targets) else "all"


def _tie(twin: Twin, peft_type: str, saved: dict[str, None], out: Written) -> None:
    """Let the tied head have the table's values in peft as well."""
    if peft_type != "LORA":
        raise AdapterError(
            f"{twin.token} is trained, and the tied head with it; peft ties trained modules "
            f"with LoRA only, not with {peft_type}"
        )
    if any(".lora_embedding_" in key or key.startswith(f"{twin.tied_head}.lora_") for key in out.tensors):
        raise AdapterError(
            f"{twin.token} is trained as a whole, and the head that is tied to it adapted besides; "
            "peft does one of the two"
        )
    table = twin.theirs[twin.token].theirs
    del saved[table]
    saved[twin.ties_with_peft(twin.token)] = None
    out.tensors[f"{twin.tied_head}.weight"] = out.tensors[f"{table}.weight"]
    out.config["ensure_weight_tying"] = True


def write_norms(twin: Twin, modules: Modules) -> Written:
    """An adapter that trains norms alone: LN_TUNING."""
    out = Written()
    for path, module in modules.items():
        theirs = twin.rule(path).theirs
        out.targets.append(theirs)
        out.tensors |= {
            f"{theirs}.{NORM}{name.removeprefix('own_')}": value for name, value in module.named_parameters()
        }
    out.config = {"peft_type": "LN_TUNING", "target_modules": list(out.targets)}
    return out


def read_norms(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    """What peft's LN_TUNING has trained."""
    return read(twin, config, {key.replace(f".{NORM}", "."): tensor for key, tensor in tensors.items()}, parts)


def _check(twin: Twin, peft_type: str, saved: Mapping[str, None], biases: set[str], out: Written) -> None:
    if biases and peft_type != "LORA":
        raise AdapterError(
            f"biases travel in peft with LoRA only, not with {peft_type}; save them as an adapter with lora"
        )
    if saved and peft_type in HEADLESS:
        raise AdapterError(
            f"peft does not save the head ({', '.join(saved)}) with {peft_type}; use it on a model without a task head"
        )
    if peft_type in PROMPT_LEARNING and (others := [name for name in saved if name not in CLASSIFIERS]):
        raise AdapterError(
            f"with {peft_type} peft saves the heads classifier and score, this adapter trains {', '.join(others)} too"
        )


def _stacked(twin: Twin, modules: Modules, theirs: str, parameter: str) -> Tensor | None:
    """A parameter of one of their modules, made of trained copies and, where a part has none, of the base."""
    rule, tensors = twin.rules[theirs], []
    for path in rule.ours:
        tensor = getattr(modules.get(path), f"own_{parameter}", twin.sites[path].base().get(parameter))
        if tensor is None:
            return None
        tensors.append(tensor)
    return rule.join(parameter, tensors)


def read(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    """What sites of ours shall hold of whole modules and biases.

    tensors: by their key without prefix and without `base_layer`.
    """
    of_sites: dict[str, Wanted] = {}
    saved = names_of(config.get("modules_to_save"))
    for key, tensor in tensors.items():
        theirs, _, parameter = key.rpartition(".")
        rule = twin.rules.get(theirs)
        if rule is None or parameter not in rule.parameters:
            raise AdapterError(f"{key} is one too many in the file: this model's twin has no such parameter")
        if not tensor.ndim:
            raise AdapterError(
                f"{key} has shape (), and a weight or bias has at least one axis; copy the whole adapter"
            )
        trained = parts_of(key, rule, parts) or [1] * len(rule.ours)
        for path, part, hung in zip(rule.ours, rule.split(parameter, tensor), trained, strict=True):
            site = twin.sites[path]
            if isinstance(site, TiedLinear) and parameter == "weight":
                raise AdapterError(
                    f"{key} is a weight of its own in the file, and this model's head is tied to the token table; load "
                    "it into a model with tied=False, or train it in peft with ensure_weight_tying=True"
                )
            base = site.base().get(parameter)
            if base is not None and site.role in ROLES and base.shape[1:] == part.shape[1:] and len(base) != len(part):
                raise AdapterError(
                    f"{key} has {len(part)} tokens in the file, this model has {len(base)}{more_tokens(part, base)}"
                )
            # of any number of labels
            labelled = site.role == LABELS and base is not None and base.shape[1:] == part.shape[1:] and len(part) > 0
            if base is None or (base.shape != part.shape and not labelled):
                needed = "has none" if base is None else f"needs {tuple(base.shape)}"
                raise AdapterError(
                    f"{key} has shape {tuple(tensor.shape)}, of which {path} would get "
                    f"{tuple(part.shape)}; this model {needed}"
                )
            with_head = (
                path == twin.token and bool(config.get("ensure_weight_tying")) and named(str(twin.tied_head), saved)
            )
            if parameter == "weight" and site.role in ROLES and not (with_head or named(theirs, saved)):
                if changed := (part.to(base) != base).any(dim=1).nonzero().flatten().tolist():
                    of_sites[path] = Wanted(
                        "tokens", {"ids": spans(changed)}, {"ids": torch.tensor(changed), "trained": part[changed]}
                    )
            elif hung:
                of_sites.setdefault(path, Wanted("", {}, {})).tensors[f"own_{parameter}"] = part
            elif not torch.equal(part.to(base), base):
                raise AdapterError(
                    f"{key}: {path}, which was not trained, has other values in this model; the "
                    "adapter is of another base"
                )
    for path, wanted in of_sites.items():
        if wanted.method:
            continue
        if path == twin.token and twin.tied_head is not None and not config.get("ensure_weight_tying"):
            raise AdapterError(
                f"the file trains {twin.theirs[path].theirs} for lookups alone, and this model's language-model head "
                "is tied to that table; "
                "load it into a model with tied=False, or train it in peft with ensure_weight_tying=True"
            )
        alone = set(wanted.tensors) == {"own_bias"} and "weight" in twin.sites[path].base()
        norm = isinstance(twin.sites[path], Norm)
        wanted.method = "head" if twin.is_head(path) else "bitfit" if alone else "norms" if norm else "full"
    return of_sites


def names_of(given: object) -> tuple[str, ...]:
    """`modules_to_save` as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else ()


def named(theirs: str, saved: tuple[str, ...]) -> bool:
    """Whether `modules_to_save` names this module, or one that it is in."""
    return any(f".{name}." in f".{theirs}." for name in saved)
