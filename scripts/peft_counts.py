"""Trainable parameters in the comparison of methods of the package peft: its experiments on Llama-3.2-3B, as specs.

Nothing is allocated: models have shapes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import effzoo

SIZES: dict[str, Any] = {
    "layers": 28, "dim": 3072, "heads": 24, "kv_heads": 8, "head_dim": 128, "mlp": 8192, "vocab": 128256, "tied": True,
}  # fmt: skip


class Experiment(NamedTuple):
    """An adapter in both libraries.

    name: of the experiment in the folder method_comparison/MetaMathQA of peft.
    kind, options: of its config.
    spec: ours.
    """

    name: str
    kind: str
    options: dict[str, Any]
    spec: str


EXPERIMENTS = (
    Experiment("lora/rank32", "LORA", {"r": 32}, "lora[rank=32]"),
    Experiment("lora/rank64-rslora", "LORA", {"r": 64, "use_rslora": True}, "lora[rank=64, rslora=true]"),
    Experiment(
        "lora/rank10-target-mlp", "LORA", {"r": 10, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "lora[rank=10, targets=(mlp.gate, mlp.up, mlp.down)]",
    ),
    Experiment("lora/rank32-dora", "LORA", {"r": 32, "use_dora": True}, "dora[rank=32]"),
    Experiment("adalora/rank32", "ADALORA", {"init_r": 64, "target_r": 32, "total_step": 5000}, "adalora[rank=64]"),
    Experiment("loha/rank32", "LOHA", {"r": 32, "target_modules": ["q_proj", "v_proj"]}, "loha[rank=32]"),
    Experiment("vera/default", "VERA", {"r": 256}, "vera[rank=256]"),
    Experiment("vblora/default", "VBLORA", {"r": 4}, "vblora[rank=4, vectors=256, length=256]"),
    Experiment(
        "randlora/default", "RANDLORA", {"r": 32},
        "randlora[bases=96, targets=attn.q]|randlora[bases=32, targets=attn.v]",
    ),
    Experiment("fourierft/n_frequency-5000", "FOURIERFT", {"n_frequency": 5000}, "fourierft[frequencies=5000]"),
    Experiment(
        "oft/rank32", "OFT", {"r": 32, "oft_block_size": 0, "target_modules": ["q_proj", "v_proj"]}, "oft[block=96]"
    ),
    Experiment("hra/rank32", "HRA", {"r": 32, "target_modules": ["q_proj", "v_proj"]}, "hra[rank=32]"),
    Experiment("miss/default", "MISS", {"r": 64, "target_modules": ["q_proj", "v_proj"]}, "miss[rank=64]"),
    Experiment("ia3/default", "IA3", {}, "ia3[targets=(attn.k, attn.v, mlp.down)]"),
    Experiment("ln_tuning/default", "LN_TUNING", {}, "norms"),
    Experiment("prompt_tuning/default", "PROMPT_TUNING", {"num_virtual_tokens": 200}, "prompt[length=200]"),
    Experiment("prefixtuning/default", "PREFIX_TUNING", {"num_virtual_tokens": 200}, "prefix[length=200]"),
)  # fmt: skip


def trainable(specs: list[str], layers: int) -> list[int]:
    """What each spec trains on Llama-3.2-3B, with so many layers."""
    counts = []
    with torch.device("meta"):
        model = effzoo.build("llama", task="causal_lm", **{**SIZES, "layers": layers})
        for spec in specs:
            effzoo.attach(model, spec)
            counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
            effzoo.detach(model, "default")
    return counts


def on_the_whole_model() -> list[int]:
    """What each experiment trains: every further layer adds as much as the second."""
    specs = [one.spec for one in EXPERIMENTS]
    one_layer, two_layers = trainable(specs, 1), trainable(specs, 2)
    more = SIZES["layers"] - 1
    return [first + more * (second - first) for first, second in zip(one_layer, two_layers, strict=True)]


def table() -> str:
    """The counts, in which both libraries agree."""
    lines = ["| experiment of peft | here | trainable parameters |", "|---|---|---|"]
    for one, count in zip(EXPERIMENTS, on_the_whole_model(), strict=True):
        spec = one.spec.replace("|", "\\|")
        lines.append(f"| `{one.name}` | `{spec}` | {count:,} |")
    return "\n".join(lines)
