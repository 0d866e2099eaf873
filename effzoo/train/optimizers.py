"""Optimizers by name, the groups of parameters that they are given, and the norm of gradients."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from effzoo.errors import IncompatibleError, OptionError, did_you_mean, listing
from effzoo.peft.training import learning_rates
from effzoo.sharding import group_of, is_split, rows_here

if TYPE_CHECKING:
    from effzoo.train.setup import Setup

Groups = list[dict[str, Any]]
_WITHOUT_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


def parameter_groups(setup: Setup, *, first: bool = True) -> Groups:
    """The trainable parameters in groups of one learning rate and one weight decay.

    Biases and norms have no weight decay and come last.

    first: whether the first stage begins, in which every pattern of `rates` fits; later ones train other parameters.
    """
    model, settings = setup.model, setup.optimisation
    rates = learning_rates(model, setup.learning_rate)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = factors_of([name for name, _ in trained], settings.rates, check=first)
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}  # no optimizer takes split and whole ones together
    decays = {n: not n.startswith(norms) and not _WITHOUT_DECAY.search(n.lower()) for n, _ in trained}
    for name, parameter in sorted(trained, key=lambda entry: not decays[entry[0]]):
        rate = rates.get(name, setup.largest_rate) * factors[name]
        decay = settings.weight_decay if decays[name] else 0.0
        groups.setdefault((decay, rate, is_split(parameter)), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (decay, rate, _), group in groups.items()]


def factors_of(names: list[str], rates: Mapping[str, float], *, check: bool = True) -> dict[str, float]:
    """The factor on the learning rate of each parameter: that of the first pattern that its name fits, else 1.

    rates: {pattern: factor}.
    check: raise OptionError for a pattern that fits no trained parameter.
    """
    for pattern in rates if check else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(
                f"optimisation: rates names {pattern!r}, which no trained parameter fits{did_you_mean(pattern, names)} "
                f"They are called, for example, {listing(names[:3])}; * stands for any text."
            )
    fits = {name: [rates[pattern] for pattern in rates if fnmatchcase(name, pattern)] for name in names}
    return {name: factors[0] if factors else 1.0 for name, factors in fits.items()}


def make_optimizer(given: str | Callable[[Groups], torch.optim.Optimizer], groups: Groups) -> torch.optim.Optimizer:
    """An optimizer by its name in OPTIMIZERS, or what a function makes of the groups."""
    try:
        optimizer = (OPTIMIZERS[given] if isinstance(given, str) else given)(groups)
    except IncompatibleError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"optimisation: optimizer is called with parameter groups, and {given!r:.80}: {error}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(f"optimisation: optimizer returns {optimizer!r:.80}; a torch.optim.Optimizer is needed")
    optimizer.defaults["lr"] = max(group["lr"] for group in groups)  # which some schedules read
    return optimizer


def _adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def _adafactor(groups: Groups) -> torch.optim.Optimizer:
    if any(is_split(parameter) for group in groups for parameter in group["params"]):
        raise IncompatibleError("torch's Adafactor does not sum over rows that other processes hold; take 'adamw'")
    return torch.optim.Adafactor(groups)


def _sgd(groups: Groups, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=momentum)


def _bitsandbytes(name: str, groups: Groups) -> torch.optim.Optimizer:
    if any(p.device.type == "cpu" for group in groups for p in group["params"]):
        raise IncompatibleError("optimizers of bitsandbytes run on a GPU; take 'adamw', or 'adamw_8bit_torchao'")
    return cast(torch.optim.Optimizer, getattr(_library("bitsandbytes").optim, name)(groups))


def _torchao(name: str, groups: Groups) -> torch.optim.Optimizer:
    return cast(torch.optim.Optimizer, getattr(_library("torchao.optim"), name)(groups))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise IncompatibleError(f"this optimizer needs {package} ({error}); pip install 'effzoo[{package}]'") from None


OPTIMIZERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "adamw": _adamw,  # Loshchilov & Hutter 2019, Decoupled weight decay, arXiv:1711.05101
    "adamw_8bit": partial(_bitsandbytes, "AdamW8bit"),  # Dettmers et al. 2022, 8-bit optimizers, arXiv:2110.02861
    "adamw_8bit_paged": partial(_bitsandbytes, "PagedAdamW8bit"),  # Dettmers et al. 2023, QLoRA, arXiv:2305.14314
    "adamw_8bit_torchao": partial(_torchao, "AdamW8bit"),
    "adamw_4bit_torchao": partial(_torchao, "AdamW4bit"),
    "adafactor": _adafactor,  # Shazeer & Stern 2018, Adafactor, arXiv:1804.04235
    "sgd": _sgd,  # these two have the names that `effzoo.plan` gives them
    "momentum": partial(_sgd, momentum=0.9),
}


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], largest: float | None) -> float:
    """The norm of all gradients together; they are scaled down to the largest norm where it is above that.

    Of a gradient that is split over processes each adds its rows.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = [gradient for gradient in gradients if is_split(gradient)]
    parts = [nn.utils.get_total_norm([gradient for gradient in gradients if not is_split(gradient)])]
    if split:
        square = nn.utils.get_total_norm([rows_here(gradient)[0] for gradient in split]).square()
        torch.distributed.all_reduce(square, group=group_of(split[0]))
        parts.append(square.sqrt())
    norm = nn.utils.get_total_norm(parts)
    if largest is not None:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            rows_here(gradient)[0].mul_(scale.to(gradient.device))
    return float(norm)
