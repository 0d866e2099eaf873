"""effzoo: one transformer; its attention and its fine-tuning method are plugs; every plug fits every other plug."""

import gc
import importlib
from typing import TYPE_CHECKING, Any

_collects = gc.isenabled()
# imports make what lives on: a collection in between would walk over all of torch, which takes as long as importing the
# rest
gc.disable()
try:
    from effzoo import attention, peft, routing
    from effzoo.annotations import check_arguments
    from effzoo.build import build
    from effzoo.errors import EffzooError
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
    from effzoo.peft import files as _files
    from effzoo.plan import Plan, plan
    from effzoo.quantise import dequantise, quantise
    from effzoo.registry import load_file, scope
    from effzoo.swap import swap_attention
    from effzoo.vocabulary import resize_vocabulary
    from effzoo.zoo import models
finally:
    if _collects:
        gc.enable()

_files.FOREIGN["peft"] = _files.Foreign("adapter_config.json", "effzoo.convert.peft_files")  # imported on first use

if TYPE_CHECKING:
    from effzoo import checks, convert
    from effzoo.checks import check
    from effzoo.generation import generate
    from effzoo.train.predict import predict
    from effzoo.train.run import finetune

__version__ = "0.2.0"
__all__ = [
    "EffzooError",
    "Plan",
    "account",
    "activate",
    "active",
    "attach",
    "attached",
    "attention",
    "build",
    "check",
    "checks",
    "combine",
    "convert",
    "dequantise",
    "detach",
    "disabled",
    "finetune",
    "generate",
    "load_adapter",
    "load_file",
    "merge",
    "models",
    "peft",
    "plan",
    "predict",
    "quantise",
    "resize_vocabulary",
    "routing",
    "save_adapter",
    "scope",
    "status",
    "swap_attention",
    "unmerge",
]

check_arguments(globals())

_LAZY = {
    "check": "effzoo.checks",
    "checks": "",
    "convert": "",
    "data": "",
    "finetune": "effzoo.train",
    "generate": "effzoo.generation",
    "predict": "effzoo.train",
}  # these import transformers or testing tools


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'effzoo' has no attribute {name!r}")
    return (
        getattr(importlib.import_module(_LAZY[name]), name)
        if _LAZY[name]
        else importlib.import_module(f"effzoo.{name}")
    )
