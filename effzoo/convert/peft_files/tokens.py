"""Trained tokens in the files of peft: its TrainableTokens, alone, or `trainable_token_indices` of a LoRA.

`trainable_tokens_delta` [tokens, dim] holds the embeddings themselves, the config which tokens they are of. Where the
language-model head is tied, peft changes it along, as we do; a head of its own takes embeddings of its own. A head
whose tokens are trained loses its bias in peft, so those are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, shaped
from effzoo.errors import AdapterError
from effzoo.peft import Method
from effzoo.peft.parameter.tokens import ROLES, TokenLookup, TokenTable, spans
from effzoo.sites import TiedLinear

CLASSES = (TokenLookup, TokenTable)
KEY, WRAPPER = "trainable_tokens_delta", "token_adapter."


def write(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    """An adapter of trained tokens alone."""
    out = Written()
    tables = _trained(twin, modules)
    if len({tuple(ids) for ids, _ in tables.values()}) > 1:
        raise AdapterError(
            "TrainableTokens of peft trains the same tokens in the table and in the head; add lora, "
            "with which they may differ"
        )
    for theirs, (_, trained) in tables.items():
        out.targets.append(theirs)
        out.tensors[f"{theirs}.{KEY}"] = trained
    if twin.tied_head is not None:
        out.tensors[f"{twin.tied_head}.{KEY}"] = out.tensors[f"{twin.theirs[twin.token].theirs}.{KEY}"]
    ids = next(iter(tables.values()))[0]
    out.config = {
        "peft_type": "TRAINABLE_TOKENS", "token_indices": ids, "target_modules": list(out.targets),
        "init_weights": True,
    }  # fmt: skip
    return out


def add(twin: Twin, modules: Modules, out: Written) -> None:
    """Add trained tokens to what is written of a LoRA."""
    if not modules:
        return
    if out.config["peft_type"] != "LORA":
        raise AdapterError(
            "trained tokens travel in peft with LoRA, or alone, not with "
            f"{out.config['peft_type']}; save them as two adapters"
        )
    tables = _trained(twin, modules)
    for theirs, (_, trained) in tables.items():
        if theirs in out.targets:
            raise AdapterError(f"{theirs} has a LoRA and trained tokens; peft does one of the two")
        out.tensors[f"{theirs}.{WRAPPER}{KEY}"] = trained
    out.config["trainable_token_indices"] = {theirs: ids for theirs, (ids, _) in tables.items()}


def _trained(twin: Twin, modules: Modules) -> dict[str, tuple[list[int], Tensor]]:
    """{their module: (tokens, their embeddings)}."""
    trained: dict[str, tuple[list[int], Tensor]] = {}
    for path, module in modules.items():
        assert isinstance(module, TokenTable)
        trained[twin.rule(path).theirs] = module.ids.tolist(), module.trained
    _check_bias(twin, modules)
    return trained


def _check_bias(twin: Twin, paths: Collection[str]) -> None:
    """AdapterError where a head that reads trained tokens has a bias."""
    for path, site in twin.sites.items():
        sees = path in paths or (isinstance(site, TiedLinear) and twin.token in paths)
        if site.role == "lm.out" and sees and "bias" in site.base():
            raise AdapterError(
                f"tokens are trained of a table that {path} multiplies by, and peft then leaves out that head's bias, "
                "which effzoo does not; keep effzoo's own format, or train another model"
            )


def read(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    """What the sites shall hold.

    tensors: the trained embeddings, by key without prefix.
    """
    left = {
        key.removesuffix(f".{KEY}").removesuffix(f".{WRAPPER[:-1]}").removesuffix(".base_layer"): tensor
        for key, tensor in tensors.items()
    }
    ids = _indices(twin, config, left)
    table, head = twin.theirs[twin.token].theirs, twin.tied_head
    if head is not None and head in ids:
        if table not in ids:
            raise AdapterError(
                f"the file trains tokens of {head} alone, which is tied to {table} here; load it into "
                "a model with tied=False"
            )
        if ids[head] != ids[table] or (head in left and not torch.equal(left[head], left.get(table, left[head]))):
            raise AdapterError(
                f"the file trains other tokens of {head} than of {table}, which is the same table "
                "here; use a model with tied=False"
            )
        del ids[head]
    if head is not None:
        left.pop(head, None)
    wanted = {}
    for theirs, numbers in ids.items():
        if theirs not in left:
            raise AdapterError(f"{theirs}.{KEY} is missing in the file; copy the whole adapter")
        (path,) = twin.rules[theirs].ours
        tokens, dim = twin.weight(path).shape
        _check(theirs, numbers, tokens)
        trained = shaped(f"{theirs}.{KEY}", left.pop(theirs), len(numbers), dim)
        order = torch.tensor(numbers).argsort()
        ascending = torch.tensor(numbers)[order]
        wanted[path] = Wanted(
            "tokens", {"ids": spans(ascending.tolist())}, {"ids": ascending, "trained": trained[order]}
        )
    _check_bias(twin, wanted)
    if left:
        raise AdapterError(f"{next(iter(left))}.{KEY} is one too many in the file: its config names no tokens for it")
    return wanted


def _indices(twin: Twin, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """{their module: its tokens}, as the config has them."""
    tables = {
        theirs
        for theirs, rule in twin.rules.items()
        if len(rule.ours) == 1 and getattr(twin.sites.get(rule.ours[0]), "role", "") in ROLES
    }
    table = twin.theirs[twin.token].theirs
    if config["peft_type"] == "TRAINABLE_TOKENS":
        strange = sorted(set(tensors) - tables)
        if strange or not tensors:
            raise AdapterError(
                f"{strange[0] if strange else table}.{KEY} is {'one too many' if strange else 'missing'} in the file"
            )
        return dict.fromkeys(tensors, config.get("token_indices") or [])
    given = config.get("trainable_token_indices")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {table: given}
    indices = {}
    for name, numbers in given.items():
        named = [theirs for theirs in tables if theirs == name or theirs.endswith(f".{name}")]
        if len(named) != 1:
            raise AdapterError(
                f"trainable_token_indices of the file names {name!r}; this model's tables are "
                f"{' and '.join(sorted(tables))}"
            )
        indices[named[0]] = numbers
    return indices


def _check(theirs: str, numbers: Sequence[int], tokens: int) -> None:
    if not numbers or len(set(numbers)) != len(numbers) or not all(0 <= one < tokens for one in numbers):
        worst = max(numbers, default=0)
        more = f"; call effzoo.resize_vocabulary(model, {worst + 1}) first" if worst >= tokens else ""
        raise AdapterError(
            f"the file trains the tokens {list(numbers)[:8]} of {theirs}: one or more, each once, in "
            f"[0, {tokens}) are needed{more}"
        )
