"""The closed forms of the lectures beside the plan: activations L (20 h s + 3 s^2), and the memory table of
OPT-1.3B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effzoo.errors import InputError
from effzoo.plans.planning import plan
from effzoo.plans.report import MIB, Plan

# Zhang et al. 2022, arXiv:2205.01068, table 1, as slots of a pre-norm decoder; 1,315,758,080 parameters
OPT_1_3B: dict[str, Any] = {
    "vocab": 50272, "dim": 2048, "layers": 24, "heads": 32, "mlp": 8192, "max_length": 2048, "position_offset": 2,
    "activation": "relu", "eps": 1e-5, "dropout": 0.1, "attention_dropout": 0.0,
}  # fmt: skip


# the lecture's memory table of full fine-tuning at a sequence of 512, in GB, by the part of `opt_table` that it means
OPT_SLIDE = {
    "weights": "2.6",
    "gradients of trainable parameters": "2.6",
    "hidden states, L (20 h s + 3 s^2)": "1 for each example",
    "optimizer states": "5.2",
    "float32 copy": "10.2",
}
OPT_SLIDE_REMARK = (
    "The lecture's last two figures contradict its own formulas: optimizer states are 2 size(float) N, 10.5 GB for "
    "N = 1.32 billion parameters and floats of 4 bytes, and a float32 copy is size(float) N, 5.3 GB. Its 5.2 and 10.2 "
    "fit these two, each in the other's row. It has 1 GB for the CUDA context besides, which no formula gives."
)


def lecture_activations(*, layers: int, dim: int, length: int, batch: int = 1, heads: int = 1) -> int:
    """L (20 h s + 3 s^2) for each row of a batch: how many numbers a transformer keeps, L = layers, h = dim, s =
    length.

    The term in s^2 is that of attention whose weights are written out, of one head; heads=... counts them all, and a
    fused kernel keeps none. We read the formula as numbers, of 2 bytes in half precision. Losses, embeddings and the
    fine-tuning method do not enter: an estimate to compute by hand, and `plan` says how far it is off. Raises
    InputError for sizes below 1.
    """
    sizes = {"layers": layers, "dim": dim, "length": length, "batch": batch, "heads": heads}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} is at least 1, got {value}")
    return batch * layers * (20 * dim * length + 3 * heads * length**2)


@dataclass(frozen=True)
class OptTable:
    """Memory by part in bytes, {column: {part: bytes}}, and the plans that it was made of."""

    title: str
    columns: Mapping[str, Mapping[str, int]]
    plans: Mapping[str, Plan]

    def __str__(self) -> str:
        parts = list(next(iter(self.columns.values())))
        width, wide = max(map(len, parts)), max(12, *map(len, self.columns))
        lines = [self.title, "", f"{'MiB':{width}}" + "".join(f"  {name:>{wide}}" for name in self.columns)]
        lines += [
            f"{part:{width}}" + "".join(f"  {column[part] / MIB:>{wide},.1f}" for column in self.columns.values())
            for part in parts
        ]
        return "\n".join(lines)


def opt_table(
    *, batch: int = 1, length: int = 2048, peft: str = "lora[rank=8]", dtype: str = "float16", **sizes: Any
) -> OptTable:
    """The lectures' memory table of OPT-1.3B: full fine-tuning beside a PEFT method, in half precision with float32
    copies and AdamW.

    Adapters are in half precision too, as the lectures have them. For each parameter: 2 bytes of weight; for each that
    is trained: 2 bytes of gradient, 8 of optimizer states, 4 of float32 copy.

    Hidden states stand there four times. Twice by formula: that of the lectures, and the same with all heads. Twice as
    planned, which is exact and knows the method: with the fused attention kernel, and with attention weights written
    out, as the formula has them.

    sizes: in place of those of OPT-1.3B (layers=..., dim=...).
    """
    plans: dict[str, Plan] = {}
    columns: dict[str, dict[str, int]] = {}
    choices: dict[str, Any] = {"batch": batch, "length": length, "dtype": dtype, "precision": "master"}
    choices["task"] = "causal_lm"
    model = {**OPT_1_3B, **sizes}
    formula = {"layers": model["layers"], "dim": model["dim"], "length": length, "batch": batch}
    for name, spec in (("full", None), (peft, peft)):
        adapter: dict[str, Any] = {} if spec is None else {"adapter_dtype": dtype}
        fused = plan("gpt2", spec, **choices, **adapter, **model)
        written_out = plan("gpt2", spec, **choices, **adapter, **model, backend="reference")
        plans[name] = fused
        columns[name] = {
            "weights": fused.weights,
            "gradients of trainable parameters": fused.gradients,
            "optimizer states": fused.optimizer,
            "float32 copy": fused.master,
            "hidden states, L (20 h s + 3 s^2)": 2 * lecture_activations(**formula),
            "hidden states, the same with every head": 2 * lecture_activations(**formula, heads=model["heads"]),
            "hidden states, planned, fused attention": fused.kept,
            "hidden states, planned, weights written out": written_out.kept,
        }
    return OptTable(f"OPT-1.3B, {batch} x {length}, {dtype} with float32 copies, AdamW", columns, plans)
