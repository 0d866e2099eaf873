"""What the show command says about an entry: its summary, its options with their meaning, its hooks, its size on a
model."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effzoo import build, zoo
from effzoo.annotations import describe
from effzoo.architectures import Transformer
from effzoo.attention.core import AttentionCore
from effzoo.errors import EffzooError, IncompatiblePeft, TargetError
from effzoo.peft import Account, account
from effzoo.peft.merging import merged_parameters
from effzoo.registry import View
from effzoo.sites import PeftModule, SideNetwork, opens, sites
from effzoo.spec import Spec, parse
from effzoo.undrawn import Undrawn

TINY: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}
SHOWN = (
    "architecture", "attention", "dim", "layers", "heads", "mlp", "max_length", "vocab", "norm", "activation",
    "dropout", "layout", "hub", "package",
)  # fmt: skip
HOOKS = {
    "weight": "parameter", "bias": "parameter", "prompt": "input", "memory": "input", "before": "function",
    "after": "function",
}  # fmt: skip


MATRICES = {  # the weights of a head that a kind computes, for n tokens of head width d
    "full": "n x n",
    "blockwise": "n / blocks x n / blocks for each of the blocks of queries",
    "longformer": "n x (window + 1 + globals); a global token's row has n",
    "bigbird": "n x (3 + random) block, and the global tokens; a global token's row has n",
    "dilated": "segment / dilation x segment / dilation for each segment, in each pair",
    "local": "n x (look_back + 1 + look_forward) chunk",
    "streaming": "n x (window + sinks) when causal, else n x (2 window - 1 + sinks)",
    "lsh": "n x (look_back + 1 + look_forward) chunk, in each round",
    "linformer": "n x k, as E K and F V are k x d",
    "perceiver": "latents x n, then n x latents",
    "nystromformer": "n x landmarks, landmarks x landmarks, then landmarks x n",
    "linear": "none: the sum of phi(k) v^T is d x d",
    "performer": "none: the sum of phi(k) v^T is features x d",
}


def dimensions(cls: type[AttentionCore]) -> str:
    """The dimensions of a head's attention matrix and output; of a kind that is not in the table, those that its cost
    says: n x m for a cost of n * m."""
    matrix = MATRICES.get(cls.name) or "n x " + re.sub(r"^n ?(\^ ?2|\* ?)?", lambda m: "n" * ("2" in m[0]), cls.cost)
    return f"{matrix}; output n x d"


def summary(cls: type) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def first_sentence(cls: type) -> str:
    """The first sentence of the docstring."""
    return re.split(r"(?<=[.]) ", summary(cls), maxsplit=1)[0].removesuffix(".")


def meaning(cls: type, option: str) -> str:
    """What the docstrings of a class and its parents say after `option:`, or `one, option and another:`, up to the next
    option or paragraph."""
    for parent in cls.__mro__:
        text = inspect.cleandoc(parent.__dict__.get("__doc__") or "")
        more = r"(?:\w+,? (?:and )?)*"
        match = re.search(
            rf"(?:^|[\s(]){more}{re.escape(option)}(?:,? (?:and )?\w+)*: (.*?)(?=(?<=[.;])\s[a-z_]+: |\n\n|\Z)",
            text,
            re.DOTALL,
        )
        if match:
            return " ".join(match[1].split())
    return ""


def kinds(given: str | dict[str, Any] | tuple[Any, ...]) -> str:
    """The names of the attention kinds of a config, each once: layers may have different ones."""
    return ", ".join(dict.fromkeys(spec.name for spec in parse(given)))


def option_rows(view: View[Any], name: str) -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of each option."""
    cls, options = view.get(name), view.options(name)
    return [
        (o.name, describe(o.annotation), "required" if o.required else _written(o.default), meaning(cls, o.name))
        for o in options
    ]


def on_meta(name: str, **choices: Any) -> Transformer:
    """A model without memory: shapes only, for counting. Of a folder, the model with its weights."""
    if Path(name).is_dir():
        return build(pretrained=name, **choices)
    try:
        with torch.device("meta"), Undrawn():  # drawing on the device meta takes time as well
            return build(name, **choices)
    except EffzooError:
        raise
    except Exception:  # a plug-in that computes with the weights when it is made: then they are needed
        return build(name, **choices)


@dataclass(frozen=True)
class Hung:
    """How a PEFT method sits in a model: through which hooks, on which roles, and whether it can be merged."""

    hooks: tuple[str, ...]
    roles: tuple[str, ...]
    mergeable: bool
    on_bert: Account


def hung(spec: Spec) -> Hung | None:
    """Attach a method to a tiny encoder and look, and count it on the meta device on BERT base; None where a
    transformer has no such sites."""
    head: dict[str, Any] = {}
    try:
        model = build("bert", peft=spec, **TINY)
    except IncompatiblePeft:
        return None
    except TargetError:  # nothing to hang on without a task head
        head = {"task": "classification"}
        model = build("bert", peft=spec, **head, **TINY)
    places = [(site, module) for _, site in sites(model) for module in site.hung()]
    hooks = [f"{hook} ({what})" for hook, what in HOOKS.items() if any(opens(module, hook) for _, module in places)]
    if any(isinstance(module, SideNetwork) for _, module in places):
        hooks.append("forward (a second network)")
    return Hung(
        hooks=tuple(hooks),
        roles=tuple(dict.fromkeys(site.role for site, _ in places)),
        mergeable=all(_merges(site, module) for site, module in places),
        on_bert=account(on_meta("bert", peft=spec, **head)),
    )


def _merges(site: Any, module: PeftModule) -> bool:
    try:
        merged_parameters(site, [module])
    except EffzooError:
        return False
    return True


def parameters(name: str) -> int:
    """The number of parameters of a zoo entry."""
    return sum(parameter.numel() for parameter in on_meta(name).parameters())


def model_rows(name: str) -> list[tuple[str, str]]:
    """What a zoo entry consists of, field by field."""
    return config_rows(zoo.config(name), parameters(name))


def config_rows(config: Any, count: int) -> list[tuple[str, str]]:
    """The fields of a configuration, and the number of parameters."""
    given = [(field, getattr(config, field, None)) for field in SHOWN]
    lines = [(field, str(value)) for field, value in given if value not in ("", None)]
    return [("parameters", f"{count:,}"), *lines, ("paper", config.paper or "-")]


def _written(default: Any) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
