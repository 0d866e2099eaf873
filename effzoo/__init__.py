"""effzoo: one transformer; its attention and its fine-tuning method are plugs; every plug fits every other plug.

What is named here is imported when it is asked for, so that the command line can show its help without torch.
"""

import gc
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effzoo import attention, checks, convert, data, peft, routing
    from effzoo.builder import build
    from effzoo.checks import check
    from effzoo.errors import EffzooError
    from effzoo.folder.loading import load
    from effzoo.folder.positions import resize_positions
    from effzoo.folder.saving import save
    from effzoo.generation import generate
    from effzoo.peft import (
        account,
        activate,
        active,
        attach,
        attached,
        combine,
        detach,
        disabled,
        load_adapter,
        merge,
        save_adapter,
        status,
        unmerge,
    )
    from effzoo.plans import Plan, plan
    from effzoo.quantisation import dequantise, quantise
    from effzoo.registry import load_file, scope
    from effzoo.swap import swap_attention
    from effzoo.train.predict import embed, predict
    from effzoo.train.run import finetune
    from effzoo.vocabulary import resize_vocabulary
    from effzoo.zoo import models

__version__ = "0.2.0"
_PLACES = {  # the modules of the public functions and classes
    "EffzooError": "errors", "Plan": "plans", "account": "peft", "activate": "peft", "active": "peft", "attach": "peft",
    "attached": "peft", "build": "builder", "check": "checks", "combine": "peft", "dequantise": "quantisation",
    "detach": "peft", "disabled": "peft", "embed": "train", "finetune": "train", "generate": "generation",
    "load": "folder.loading", "load_adapter": "peft", "load_file": "registry", "merge": "peft", "models": "zoo",
    "plan": "plans", "predict": "train", "quantise": "quantisation", "resize_positions": "folder.positions",
    "resize_vocabulary": "vocabulary", "save": "folder.saving", "save_adapter": "peft", "scope": "registry",
    "status": "peft", "swap_attention": "swap", "unmerge": "peft",
}  # fmt: skip
__all__ = [
    "EffzooError", "Plan", "account", "activate", "active", "attach", "attached", "attention", "build", "check",
    "checks", "combine", "convert", "data", "dequantise", "detach", "disabled", "embed", "finetune", "generate", "load",
    "load_adapter", "load_file", "merge", "models", "peft", "plan", "predict", "quantise", "resize_positions",
    "resize_vocabulary", "routing", "save", "save_adapter", "scope", "status", "swap_attention", "unmerge",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, or a module of effzoo."""
    module = f"effzoo.{_PLACES.get(name, name)}"
    if name not in _PLACES and (name.startswith("_") or importlib.util.find_spec(module) is None):
        raise AttributeError(f"module 'effzoo' has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # imports make what lives on, and a collection would walk over all of torch
    try:
        imported = importlib.import_module(module)
        if name not in _PLACES:
            return imported
        from effzoo.annotations import check_arguments
    finally:
        if collects:
            gc.enable()
    namespace = {"__name__": "effzoo", "__all__": [name], name: getattr(imported, name)}
    check_arguments(namespace)
    return globals().setdefault(name, namespace[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
