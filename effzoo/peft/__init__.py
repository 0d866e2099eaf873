"""PEFT methods behind three doors, and what can be done with them on any model made of sites.

`names()`, `get(name)`, `options(name)` and `register(name)` are the registry's view of this kind.
"""

from effzoo.peft.accounting import Account, account
from effzoo.peft.attach import Attachment, activate, attach, attached, detach, roles
from effzoo.peft.files import load_adapter, save_adapter
from effzoo.peft.function import houlsby, ia3
from effzoo.peft.input import prefix, prompt
from effzoo.peft.merging import merge
from effzoo.peft.method import Method
from effzoo.peft.parameter import lora, selected
from effzoo.registry import peft as _view
from effzoo.sites import PeftModule

names, get, options, register, create, aliases = (_view.names, _view.get, _view.options, _view.register, _view.create, _view.aliases)

__all__ = [
    "Account",
    "Attachment",
    "Method",
    "PeftModule",
    "account",
    "activate",
    "aliases",
    "attach",
    "attached",
    "create",
    "detach",
    "get",
    "houlsby",
    "ia3",
    "load_adapter",
    "lora",
    "merge",
    "names",
    "options",
    "prefix",
    "prompt",
    "register",
    "roles",
    "save_adapter",
    "selected",
]
