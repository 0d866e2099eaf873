"""README.md of a model's folder: a model card, as hubs show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from effzoo.architectures import AnyModel
from effzoo.folder.description import Description
from effzoo.peft.accounting import account
from effzoo.peft.attach import acting, attached

OURS = "<!-- effzoo.save writes this file anew as long as this line is in it -->"
PIPELINES = {
    "features": "feature-extraction", "classification": "text-classification",
    "token_classification": "token-classification", "question_answering": "question-answering",
    "masked_lm": "fill-mask", "causal_lm": "text-generation",
    "seq2seq_lm": "text2text-generation",
}  # fmt: skip


def is_ours(path: Path) -> bool:
    """Whether a card may be written: there is none, or one with the line that says so."""
    try:
        return OURS in path.read_text()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def card(model: AnyModel, said: Description, metrics: Mapping[str, float], title: str) -> str:
    """The text of the card."""
    config, counted = model.config, account(model)
    attention = config.attention if isinstance(config.attention, tuple) else (config.attention,)
    kinds = " | ".join(dict.fromkeys(map(str, attention)))
    bits = " and ".join(map(str, sorted({*said.quantised.values()})))
    facts = {
        "model": f"{config.name}, {config.layers} layers, width {config.dim}, at most {config.max_length:,} positions",
        "attention": f"`{kinds}`", "task": said.task, "labels": ", ".join(said.label_names),
        "numbers": f"{counted.total:,}",
        "quantised": f"{len(said.quantised)} matrices in {bits} bits" if said.quantised else "",
        "paper": config.paper,
    }  # fmt: skip
    lines = ["---", "library_name: effzoo", f"pipeline_tag: {PIPELINES[said.task]}", "tags:", "- effzoo", "---", ""]
    lines += [OURS, "", f"# {title or config.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in facts.items() if text]
    lines += ["", "```python", "import effzoo", "", 'model = effzoo.load("path/of/this/folder")', "```"]
    if adapters := attached(model):
        lines += ["", "## Adapters", "", "| name | method | acts |", "|---|---|---|"]
        lines += [
            f"| {name} | `{_cell(adapter.spec)}` | {'yes' if name in acting(model) else 'no'} |"
            for name, adapter in adapters.items()
        ]
        lines += ["", "```text", str(counted), "```"]
    if metrics:
        lines += ["", "## Result", "", "| | |", "|---|---|"]
        lines += [
            f"| {_cell(name)} | {f'{value:.6g}' if math.isfinite(value) else 'not defined'} |"
            for name, value in metrics.items()
        ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
