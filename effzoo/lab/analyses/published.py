"""Tables 2, 3 and 4 of Hu et al. 2021, LoRA, arXiv:2106.09685, and how many parameters our methods train there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import effzoo

GPT3 = {"layers": 96, "dim": 12288, "heads": 96, "mlp": 49152, "max_length": 2048}
MEDIUM = {"layers": 24, "dim": 1024, "heads": 16, "mlp": 4096}
LARGE = {"layers": 36, "dim": 1280, "heads": 20, "mlp": 5120}
XXL = {"layers": 48, "dim": 1536, "heads": 24, "mlp": 6144}
ADAPTERS = "targets=(attn.branch, mlp.branch)"  # two a layer, norms frozen


@dataclass(frozen=True)
class Row:
    """A row of a published table.

    method: as it is named there.
    model, sizes: ours of these slots.
    spec: our method with the options of the paper's appendix; None for full fine-tuning, "" where they are not given.
    millions: trained parameters, as printed there.
    scores: as printed there.
    """

    method: str
    model: str
    sizes: Mapping[str, int]
    spec: str | None
    millions: str
    scores: Sequence[float]


@dataclass(frozen=True)
class Published:
    """A published table with the names of its scores."""

    title: str
    scores: Sequence[str]
    rows: Sequence[Row]


GLUE = Published(
    "Table 2, GLUE",
    ("MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B", "mean"),
    (
        Row("RoBERTa base, full", "roberta", {}, None, "125.0", (87.6, 94.8, 90.2, 63.6, 92.8, 91.9, 78.7, 91.2, 86.4)),
        Row("BitFit", "roberta", {}, "bitfit", "0.1", (84.7, 93.7, 92.7, 62.0, 91.8, 84.0, 81.5, 90.8, 85.2)),
        Row("Adapter D", "roberta", {}, "", "0.3", (87.1, 94.2, 88.5, 60.8, 93.1, 90.2, 71.5, 89.7, 84.4)),
        Row("Adapter D", "roberta", {}, "pfeiffer[bottleneck=48]", "0.9",
            (87.3, 94.7, 88.4, 62.6, 93.0, 90.6, 75.9, 90.3, 85.4)),
        Row("LoRA", "roberta", {}, "lora[rank=8]", "0.3", (87.5, 95.1, 89.7, 63.4, 93.3, 90.8, 86.6, 91.5, 87.2)),
        Row("RoBERTa large, full", "roberta", MEDIUM, None, "355.0",
            (90.2, 96.4, 90.9, 68.0, 94.7, 92.2, 86.6, 92.4, 88.9)),
        Row("LoRA", "roberta", MEDIUM, "lora[rank=8]", "0.8", (90.6, 96.2, 90.9, 68.2, 94.9, 91.6, 87.4, 92.6, 89.0)),
        Row("Adapter P", "roberta", MEDIUM, "pfeiffer[bottleneck=64]", "3.0",
            (90.2, 96.1, 90.2, 68.3, 94.8, 91.9, 83.8, 92.1, 88.4)),
        Row("Adapter P", "roberta", MEDIUM, "pfeiffer[bottleneck=16]", "0.8",
            (90.5, 96.6, 89.7, 67.8, 94.8, 91.7, 80.1, 91.9, 87.9)),
        Row("Adapter H", "roberta", MEDIUM, f"houlsby[bottleneck=64, {ADAPTERS}]", "6.0",
            (89.9, 96.2, 88.7, 66.5, 94.7, 92.1, 83.4, 91.0, 87.8)),
        Row("Adapter H", "roberta", MEDIUM, f"houlsby[bottleneck=8, {ADAPTERS}]", "0.8",
            (90.3, 96.3, 87.7, 66.3, 94.7, 91.5, 72.9, 91.5, 86.4)),
        Row("DeBERTa XXL, full", "", {}, "", "1500.0", (91.8, 97.2, 92.0, 72.0, 96.0, 92.7, 93.9, 92.9, 91.1)),
        Row("LoRA", "roberta", XXL, "lora[rank=16]", "4.7", (91.9, 96.9, 92.6, 72.4, 96.0, 92.9, 94.9, 93.0, 91.3)),
    ),
)  # fmt: skip
E2E = Published(
    "Table 3, E2E",
    ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"),
    (
        Row("GPT-2 medium, full", "gpt2", MEDIUM, None, "354.92", (68.2, 8.62, 46.2, 71.0, 2.47)),
        Row("Adapter L", "gpt2", MEDIUM, "", "0.37", (66.3, 8.41, 45.0, 69.8, 2.40)),
        Row("Adapter L", "gpt2", MEDIUM, "", "11.09", (68.9, 8.71, 46.1, 71.3, 2.47)),
        Row("Adapter H", "gpt2", MEDIUM, "", "11.09", (67.3, 8.50, 46.0, 70.7, 2.44)),
        Row("last two layers", "gpt2", MEDIUM, "full[layers=(22,23)]", "25.19", (68.1, 8.59, 46.0, 70.8, 2.41)),
        Row("PreLayer", "gpt2", MEDIUM, "", "0.35", (69.7, 8.81, 46.1, 71.4, 2.49)),
        Row("LoRA", "gpt2", MEDIUM, "lora[rank=4]", "0.35", (70.4, 8.85, 46.8, 71.8, 2.53)),
        Row("GPT-2 large, full", "gpt2", LARGE, None, "774.03", (68.5, 8.78, 46.0, 69.9, 2.45)),
        Row("Adapter L", "gpt2", LARGE, "", "0.88", (69.1, 8.68, 46.3, 71.4, 2.49)),
        Row("Adapter L", "gpt2", LARGE, "", "23.00", (68.9, 8.70, 46.1, 71.3, 2.45)),
        Row("PreLayer", "gpt2", LARGE, "", "0.77", (70.3, 8.85, 46.2, 71.7, 2.47)),
        Row("LoRA", "gpt2", LARGE, "lora[rank=4]", "0.77", (70.4, 8.89, 46.8, 72.0, 2.47)),
    ),
)
OF_GPT3 = Published(
    "Table 4, GPT-3",
    ("WikiSQL", "MNLI-m", "R1", "R2", "R-L"),
    (
        Row("GPT-3, full", "gpt2", GPT3, None, "175255.8", (73.8, 89.5, 52.0, 28.0, 44.5)),
        Row("BitFit", "gpt2", GPT3, "bitfit", "14.2", (71.3, 91.0, 51.3, 27.4, 43.5)),
        Row("PreEmbed", "gpt2", GPT3, "prompt[length=264]", "3.2", (63.1, 88.6, 48.3, 24.2, 40.5)),
        Row("PreLayer", "gpt2", GPT3, "deep_prompt[length=16]", "20.2", (70.1, 89.5, 50.8, 27.3, 43.5)),
        Row("Adapter H", "gpt2", GPT3, f"houlsby[bottleneck=1, {ADAPTERS}]", "7.1", (71.9, 89.8, 53.0, 28.9, 44.8)),
        Row("Adapter H", "gpt2", GPT3, f"houlsby[bottleneck=8, {ADAPTERS}]", "40.1", (73.2, 91.5, 53.2, 29.0, 45.1)),
        Row("LoRA", "gpt2", GPT3, "lora[rank=1]", "4.7", (73.4, 91.7, 53.8, 29.8, 45.9)),
        Row("LoRA", "gpt2", GPT3, "lora[rank=8]", "37.7", (74.0, 91.6, 53.4, 29.2, 45.1)),
    ),
)
TABLES = (GLUE, E2E, OF_GPT3)


def counted(row: Row) -> int | None:
    """How many parameters are trained, counted on a model without memory; None where the paper's options are unknown.

    Task heads are not counted, and neither are the embeddings of the prompt in the vocabulary.
    """
    if row.spec == "":
        return None
    sizes: dict[str, Any] = dict(row.sizes)
    with torch.device("meta"):
        model = effzoo.build(row.model, **sizes)
        if row.spec is None:
            return sum(p.numel() for p in model.parameters())
        effzoo.attach(model, row.spec)
    return effzoo.account(model).trainable


def agrees(count: int, millions: str) -> str:
    """Whether a count is the printed number of millions to its last figure: "yes", "in 2^20" where a million is taken
    as 2^20 there, or how much larger the count is, in percent."""
    places = len(millions.partition(".")[2])
    if f"{count / 1e6:.{places}f}" == millions:
        return "yes"
    if f"{count / 2**20:.{places}f}" == millions:
        return "in 2^20"
    return f"{100 * (count / 1e6 / float(millions) - 1):+.1f} %"
