"""LoRA and DoRA in the files of peft: `lora_A` [rank, in], `lora_B` [out, rank], `lora_magnitude_vector` [out].

Where their module stacks several of ours (GPT-2's c_attn holds q, k and v), ours become one low rank of theirs whose
rank is the sum, A = [A_q; A_v] and B = diag(B_q, B_v): exactly the same function, with zeros that peft would train as
well.

The file's header keeps the ranks, so that the way back is exact; without it (a file of peft's) each of our modules gets
a copy of A and its outputs of B, which is the same function, and A is no longer shared if training goes on.

Where a language-model head is tied to the table, a LoRA of ours on the table changes both, which peft does with
`ensure_weight_tying`: its head then has the same factors, transposed. Without, peft changes lookups alone, our
`lora[tied=false]`, or the head alone, our LoRA on `lm.out`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effzoo.convert.keymap import Rule
from effzoo.convert.peft_files.twin import (
    Config,
    Modules,
    Twin,
    Wanted,
    Written,
    first_axis,
    parts_of,
    shaped,
    split,
    tidy,
    whole,
)  # fmt: skip
from effzoo.errors import AdapterError, listing
from effzoo.peft import Method
from effzoo.peft.parameter.dora import DecomposedWeight, DoRA
from effzoo.peft.parameter.lora import LowRank
from effzoo.peft.parameter.lora_activated import ActivatedLowRank
from effzoo.peft.parameter.lora_everywhere import LoRAEverywhere
from effzoo.peft.parameter.lora_starts import FromBase
from effzoo.peft.parameter.lora_tables import LowRankEmbedding, LowRankHead, LowRankLookup, LowRankTable
from effzoo.sites import Embedding, TiedLinear

LowRanks = LowRank | LowRankEmbedding | LowRankTable | DecomposedWeight
CLASSES = (
    LowRank, ActivatedLowRank, FromBase, LowRankEmbedding, LowRankHead, LowRankLookup, LowRankTable, DecomposedWeight,
)  # fmt: skip
# relative, between the norms of this base and those of the base that the file was written from
MAGNITUDE_TOLERANCE = 1e-5


def write(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    """An adapter of LoRA or DoRA modules.

    Those that start from factors of the base have twice the rank, [A; A_0] and [B, -B_0].
    """
    dora = any(isinstance(module, DecomposedWeight) for module in modules.values())
    if dora and not all(isinstance(module, DecomposedWeight) for module in modules.values()):
        raise AdapterError(
            "peft has one use_dora for a whole adapter, this one has sites of both lora and dora; "
            "save them as two adapters"
        )
    dropouts = {method.dropout if isinstance(method, LoRAEverywhere) else 0.0 for method in methods}
    if len(dropouts) > 1:
        raise AdapterError(
            f"peft has one lora_dropout for a whole adapter, this one has {sorted(dropouts)}; attach "
            "it with one dropout"
        )
    invocations = {module.invocation if isinstance(module, ActivatedLowRank) else () for module in modules.values()}
    if len(invocations) > 1:
        raise AdapterError(
            f"peft has one alora_invocation_tokens for a whole adapter, this one has {listing(sorted(invocations))}; "
            "save them as several adapters"
        )
    rslora = all(isinstance(method, LoRAEverywhere | DoRA) and method.rslora for method in methods)
    out, ranks, alphas = Written(), {}, {}
    for theirs, paths in whole(modules, twin).items():
        rule = twin.adapted(paths[0])
        out.targets.append(theirs)
        if isinstance(twin.sites[paths[0]], Embedding):
            A, B, scale = _embedding(modules[paths[0]])
            out.tensors |= {f"{theirs}.lora_embedding_A": A, f"{theirs}.lora_embedding_B": B}
        else:
            A, B, scale, part_ranks = _stacked(twin, rule, modules)
            out.tensors |= {f"{theirs}.lora_A.weight": A, f"{theirs}.lora_B.weight": B}
            if len(rule.ours) > 1:
                out.parts[theirs] = part_ranks
        if dora:
            out.tensors[f"{theirs}.lora_magnitude_vector"] = torch.cat(
                [_magnitude(twin, path, modules) for path in rule.ours]
            )
        ranks[theirs], alphas[theirs] = len(A), tidy(scale * (math.sqrt(len(A)) if rslora else len(A)))
    tied = [path for path, module in modules.items() if isinstance(module, LowRankTable)]
    if tied:
        _tie(twin, tied[0], out, ranks, alphas)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    out.config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "rank_pattern": {theirs: number for theirs, number in ranks.items() if number != rank},
        "alpha_pattern": {theirs: number for theirs, number in alphas.items() if number != alpha}, "use_rslora": rslora,
        "use_dora": dora, "lora_dropout": dropouts.pop(),
        "fan_in_fan_out": any(twin.rules[theirs].transposed for theirs in out.targets), "bias": "none",
        "target_modules": out.targets, "init_lora_weights": True, "ensure_weight_tying": bool(tied),
    }  # fmt: skip
    if invocation := invocations.pop():
        out.config["alora_invocation_tokens"] = list(invocation)
    return out


def _tie(twin: Twin, path: str, out: Written, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Write for the tied head what peft makes of the table's factors."""
    table, head = twin.theirs[path].theirs, twin.tied_head
    assert head is not None
    if head in out.targets:
        raise AdapterError(
            f"{path} changes the table and the tied head, and the head is adapted besides; in peft "
            "its factors are those of the table"
        )
    out.targets[out.targets.index(table)] = twin.ties_with_peft(path)
    out.tensors[f"{head}.lora_A.weight"] = out.tensors[f"{table}.lora_embedding_B"].T
    out.tensors[f"{head}.lora_B.weight"] = out.tensors[f"{table}.lora_embedding_A"].T
    ranks[head], alphas[head] = ranks[table], alphas[table]


def _factors(module: LowRanks) -> tuple[Tensor, Tensor]:
    if isinstance(module, FromBase):
        return torch.cat([module.A, module.A0]), torch.cat([module.B, -module.B0], dim=1)
    return module.A, module.B


def _embedding(module: object) -> tuple[Tensor, Tensor, float]:
    assert isinstance(module, LowRankEmbedding | LowRankTable)
    return module.A, module.B, module.scale


def _stacked(twin: Twin, rule: Rule, modules: Modules) -> tuple[Tensor, Tensor, float, list[int]]:
    """One A and B for all of our modules in one of theirs, their common scale, and the rank of each."""
    pairs, scale = [], 0.0
    for path in rule.ours:
        module = modules.get(path)
        if module is None:
            weight = twin.weight(path)
            pairs.append((weight.new_zeros(0, weight.shape[1]), weight.new_zeros(len(weight), 0)))
            continue
        assert isinstance(module, LowRank | DecomposedWeight)
        scale = scale or module.scale
        A, B = _factors(module)
        pairs.append((A, B if module.scale == scale else B * (module.scale / scale)))
    B = torch.block_diag(*(B for _, B in pairs))  # type: ignore[no-untyped-call]
    return torch.cat([A for A, _ in pairs]), B, scale, [len(A) for A, _ in pairs]


def _magnitude(twin: Twin, path: str, modules: Modules) -> Tensor:
    module = modules.get(path)
    return module.magnitude if isinstance(module, DecomposedWeight) else twin.weight(path).norm(dim=1)


def read(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    """What each of our sites shall hold; `tensors` are the low-rank ones, by key without prefix."""
    wanted: dict[str, Wanted] = {}
    if config.get("alora_invocation_tokens") and config.get("use_dora"):
        raise AdapterError(
            "the config has both alora_invocation_tokens and use_dora; effzoo has invocations for lora alone"
        )
    # tables first: a tied head's factors may be theirs
    left = dict(sorted(tensors.items(), key=lambda item: ".lora_embedding_" not in item[0]))
    while left:
        theirs = next(iter(left)).split(".lora_")[0]
        if theirs not in twin.rules:
            raise AdapterError(
                f"{next(iter(left))}: this model's twin has no module {theirs!r}; its modules begin "
                f"with {next(iter(twin.rules))!r}"
            )
        rule = twin.rules[theirs]
        if config.get("alora_invocation_tokens") and twin.sites[rule.ours[0]].layer is None:
            raise AdapterError(
                f"{theirs} is outside the blocks, and the config has alora_invocation_tokens; effzoo has invocations "
                "for linear layers of the blocks alone"
            )
        if isinstance(twin.sites[rule.ours[0]], Embedding):
            wanted |= _read_embedding(twin, config, theirs, left)
        else:
            wanted |= _read_linear(twin, config, theirs, left, parts_of(theirs, rule, parts))
    return wanted


def _take(tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise AdapterError(f"{key} is missing in the file; copy the whole adapter")
    return tensors.pop(key)


def _options(config: Config, theirs: str, rank: int, given: int) -> dict[str, object]:
    """Our options for one module: of rank `rank` within a low rank of `given` of theirs."""
    stated = config["rank_pattern"].of(theirs, config.get("r", 8))
    if stated != given:
        raise AdapterError(f"{theirs} has rank {given} in the file and {stated} in its config")
    alpha = config["alpha_pattern"].of(theirs, config.get("lora_alpha", 8))
    rslora = bool(config.get("use_rslora", False))
    own = tidy(alpha * (math.sqrt(rank / given) if rslora else rank / given))
    options: dict[str, object] = {"rank": rank, "alpha": own, "rslora": rslora}
    if invocation := config.get("alora_invocation_tokens"):
        options["invocation"] = tuple(invocation)
    return options if config.get("use_dora") else options | {"dropout": float(config.get("lora_dropout", 0.0))}


def _read_embedding(twin: Twin, config: Config, theirs: str, left: dict[str, Tensor]) -> dict[str, Wanted]:
    path = twin.rules[theirs].ours[0]
    if config.get("use_dora"):
        raise AdapterError(f"{theirs} is an embedding with use_dora=True; effzoo has DoRA for linear layers only")
    A, B = _take(left, f"{theirs}.lora_embedding_A"), _take(left, f"{theirs}.lora_embedding_B")
    tokens, dim = twin.weight(path).shape
    rank = first_axis(f"{theirs}.lora_embedding_A", A)
    shaped(f"{theirs}.lora_embedding_A", A, rank, tokens)
    shaped(f"{theirs}.lora_embedding_B", B, dim, rank)
    options = _options(config, theirs, rank, rank) | {"dropout": 0.0}  # which peft does not apply to embeddings either
    if path != twin.token or twin.tied_head is None:
        return {path: Wanted("lora", options, {"A": A, "B": B})}
    if not config.get("ensure_weight_tying"):
        return {path: Wanted("lora", options | {"tied": False}, {"A": A, "B": B})}
    head = twin.tied_head
    for key, same in ((f"{head}.lora_A.weight", B.T), (f"{head}.lora_B.weight", A.T)):
        if key in left and not torch.equal(left.pop(key), same):
            raise AdapterError(
                f"{key}: the config says ensure_weight_tying, and these are not the factors of "
                f"{theirs}; save the adapter again"
            )
    if _options(config, head, rank, rank) | {"dropout": 0.0} != options:
        raise AdapterError(
            f"{head} is tied to {theirs}, and has another rank or alpha in the config; effzoo has one change for both"
        )
    return {path: Wanted("lora", options, {"A": A, "B": B})}


def _read_linear(
    twin: Twin, config: Config, theirs: str, left: dict[str, Tensor], ranks: list[int] | None
) -> dict[str, Wanted]:
    rule, dora = twin.rules[theirs], bool(config.get("use_dora", False))
    A, B = _take(left, f"{theirs}.lora_A.weight"), _take(left, f"{theirs}.lora_B.weight")
    first_axis(f"{theirs}.lora_A.weight", A)
    if dora and isinstance(twin.sites[rule.ours[0]], TiedLinear):
        raise AdapterError(
            f"{theirs} is tied to the table, with use_dora=True; effzoo has DoRA for layers with a weight of their own"
        )
    weights = [twin.weight(path) for path in rule.ours]
    outputs = sum(len(weight) for weight in weights)
    shaped(f"{theirs}.lora_A.weight", A, len(A), weights[0].shape[1])
    shaped(f"{theirs}.lora_B.weight", B, outputs, len(A))
    sizes = [len(weight) for weight in weights]
    magnitudes: Sequence[Tensor | None] = [None] * len(sizes)
    if dora:
        key = f"{theirs}.lora_magnitude_vector"
        magnitudes = split(shaped(key, _take(left, key), outputs), sizes)
    blocks = _blocks(theirs, A, B, sizes, ranks)
    wanted = {}
    for path, weight, block, magnitude in zip(rule.ours, weights, blocks, magnitudes, strict=True):
        if block is None:
            if magnitude is not None and not torch.allclose(
                magnitude.to(weight), weight.norm(dim=1), rtol=MAGNITUDE_TOLERANCE, atol=0
            ):
                raise AdapterError(
                    f"{theirs}.lora_magnitude_vector: the lengths of {path}, which has no adapter, "
                    "are those of another base"
                )
            continue
        own = {"A": block[0], "B": block[1]} | ({} if magnitude is None else {"magnitude": magnitude})
        wanted[path] = Wanted("dora" if dora else "lora", _options(config, theirs, len(block[0]), len(A)), own)
    return wanted


def _blocks(
    theirs: str, A: Tensor, B: Tensor, sizes: list[int], ranks: list[int] | None
) -> list[tuple[Tensor, Tensor] | None]:
    """A and B of each of our modules in one of theirs; None for one without an adapter."""
    of_outputs = split(B, sizes)
    if ranks is None:
        return [(A, own) for own in of_outputs]
    if sum(ranks) != len(A):
        raise AdapterError(
            f"{theirs} has rank {len(A)} in the file, whose header gives ranks {ranks}; save the adapter again"
        )
    blocks = [split(own, ranks, 1) for own in of_outputs]
    if any(block.any() for i, of_module in enumerate(blocks) for j, block in enumerate(of_module) if i != j):
        raise AdapterError(
            f"{theirs}: the file's header says that lora_B is block-diagonal, and it is not; save the adapter again"
        )
    return [(own, blocks[i][i]) if len(own) else None for i, own in enumerate(split(A, ranks))]
