"""KronA in the files of peft, where it is LoKr with two full factors: `lokr_w1` = A and `lokr_w2` = B, s = alpha / r.

peft derives the shapes from the sizes and one `decompose_factor`, its r decides whether the second factor is full. A
file with factors that are low-rank themselves (`lokr_w1_a` @ `lokr_w1_b`) is read as their product, which computes the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, first_axis, shaped, tidy
from effzoo.errors import AdapterError
from effzoo.peft import Method
from effzoo.peft.parameter.krona import Kronecker
from effzoo.sites import Linear

CLASSES = (Kronecker,)
BALANCED = -1  # their factor for divisors near the root


def divided(size: int, factor: int) -> int:
    """The first axis of their first factor, of a matrix that has `size` there."""
    if factor > 0 and size % factor == 0:
        return factor
    most = size if factor == BALANCED else factor
    return max(
        divisor
        for divisor in range(1, size + 1)
        if size % divisor == 0 and divisor**2 <= size and divisor <= max(most, 1)
    )


def write(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    out, scales, wanted = Written(), {}, {}
    for path, module in modules.items():
        rule = twin.rule(path)
        assert isinstance(module, Kronecker)
        if len(rule.ours) > 1 or rule.transposed:
            raise AdapterError(
                f"krona on {path}: LoKr of peft adapts linear layers, and {rule.theirs} of transformers is a Conv1D or "
                "stacks several of ours; use lora, or merge the adapter"
            )
        out.targets.append(rule.theirs)
        out.tensors |= {f"{rule.theirs}.lokr_w1": module.A, f"{rule.theirs}.lokr_w2": module.B}
        scales[rule.theirs], wanted[path] = module.scale, tuple(module.A.shape)
    factors = [BALANCED, *sorted({size for shape in wanted.values() for size in shape})]
    fitting = [
        factor for factor in factors if all(_shape(twin, path, factor) == shape for path, shape in wanted.items())
    ]
    if not fitting:
        path, shape = next(iter(wanted.items()))
        raise AdapterError(
            f"krona: peft chooses the shapes of all first factors by one decompose_factor, and none gives {shape} on "
            f"{path} and those of the other "
            f"sites; leave shape out, which is what peft does by default ({_shape(twin, path, BALANCED)} there)"
        )
    largest = max(max(tensor.shape) for tensor in out.tensors.values())
    # at least half of every side, so that the second factor is full; a power of two keeps s exact
    rank = 1 << (largest - 1).bit_length()
    alphas = {theirs: tidy(scale * rank) for theirs, scale in scales.items()}
    alpha = next(iter(alphas.values()))
    out.config = {
        "peft_type": "LOKR", "r": rank, "alpha": alpha,
        "alpha_pattern": {theirs: own for theirs, own in alphas.items() if own != alpha}, "rank_pattern": {},
        "decompose_both": False, "decompose_factor": fitting[0], "target_modules": out.targets, "init_weights": True,
    }  # fmt: skip
    return out


def _shape(twin: Twin, path: str, factor: int) -> tuple[int, int]:
    outputs, inputs = twin.weight(path).shape
    return divided(outputs, factor), divided(inputs, factor)


def read(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    left, wanted = dict(tensors), {}
    while left:
        key = next(iter(left))
        theirs, _, rest = key.rpartition(".lokr_")
        rule = twin.rules.get(theirs)
        if rule is None or len(rule.ours) > 1 or rule.transposed or not isinstance(twin.sites[rule.ours[0]], Linear):
            raise AdapterError(
                f"{key}: LoKr is read for single linear layers of this model's twin, which {theirs!r} is not"
            )
        A, B = _factor(left, theirs, "w1"), _factor(left, theirs, "w2")
        if any(other.startswith(f"{theirs}.lokr_") for other in left):
            raise AdapterError(f"{key}: unknown or doubled tensor {rest!r} of LoKr")
        outputs, inputs = twin.weight(rule.ours[0]).shape
        first_axis(f"{theirs}.lokr_w1", A)
        if outputs % len(A) or inputs % A.shape[1]:
            raise AdapterError(
                f"{theirs}.lokr_w1 has shape {tuple(A.shape)}, which does not divide {rule.ours[0]}, "
                f"{outputs} x {inputs}"
            )
        shaped(f"{theirs}.lokr_w2", B, outputs // len(A), inputs // A.shape[1])
        rank = config["rank_pattern"].of(theirs, config.get("r", 8))
        alpha = config["alpha_pattern"].of(theirs, config.get("alpha", 8))
        wanted[rule.ours[0]] = Wanted(
            "krona", {"shape": tuple(A.shape), "scale": float(alpha / rank)}, {"A": A, "B": B}
        )
    return wanted


def _factor(left: dict[str, Tensor], theirs: str, name: str) -> Tensor:
    """One factor of theirs, or the product of the two that it consists of."""
    key = f"{theirs}.lokr_{name}"
    if key in left:
        return left.pop(key)
    pair = [left.pop(f"{key}_{half}", None) for half in "ab"]
    if pair[0] is None or pair[1] is None:
        raise AdapterError(f"{key} is missing in the file, or one half of it; copy the whole adapter")
    if first_axis(f"{key}_b", pair[1]) != pair[0].shape[-1] or not first_axis(f"{key}_a", pair[0]):
        raise AdapterError(
            f"{key}_a and {key}_b have shapes {tuple(pair[0].shape)} and {tuple(pair[1].shape)}, which have no product"
        )
    product: Tensor = pair[0] @ pair[1]
    return product
