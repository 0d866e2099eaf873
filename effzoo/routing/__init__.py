"""Routers: which experts a token sees; experts are fine-tuning modules (`peft="routed"`) or feed-forwards
(`experts=8`).

`router.py` is the contract, the others are on the registry: `effzoo.routing.names()`. `losses.py` balances, `watch.py`
shows how experts are used.
"""

from effzoo.annotations import check_arguments
from effzoo.registry import router as _view
from effzoo.routing import arrow, balanced, by_task, mixtures, top_k
from effzoo.routing.assignment import assign
from effzoo.routing.losses import importance_loss, load_loss, switch_loss, z_loss
from effzoo.routing.router import Router, Routing, Scores, TokensOverRanks, over_ranks
from effzoo.routing.watch import Usage, Watch, usage, watch

names, get, options, register, create = _view.names, _view.get, _view.options, _view.register, _view.create
aliases = _view.aliases

__all__ = [
    "Router", "Routing", "Scores", "TokensOverRanks", "Usage", "Watch", "aliases", "arrow", "assign", "balanced",
    "by_task", "create", "get", "importance_loss", "load_loss", "mixtures", "names", "options", "over_ranks",
    "register", "switch_loss", "top_k", "usage", "watch", "z_loss",
]  # fmt: skip

check_arguments(globals())
