"""Attached adapters as the experts of a mixture, and an expert as an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from effzoo.errors import AdapterError, UnknownNameError
from effzoo.peft.aggregation import labels, take_head
from effzoo.peft.attach import _known, attach
from effzoo.peft.modular.mixture import ExpertMixture, MixtureMethod
from effzoo.peft.state import transition
from effzoo.peft.training import finish
from effzoo.sites import Packed, Site, sites
from effzoo.spec import Spec, parse_one


def gather(
    model: nn.Module, adapters: Sequence[str], *, name: str, how: str = "fusion", head: str | None = None
) -> None:
    """Attach a mixture, active, whose experts are copies of attached adapters, which stay.

    adapters: their names. Those that take part in training are finished first, once and for all.
    name: of the mixture.
    how: the mixture with its options but `of` ("fusion", "routed[router=top_k]", "routed[router='fixed',
        frozen=true]").
    head: the adapter whose task head is copied; the mixture's own is fresh without it.

    Raises AdapterError (a mixture among the adapters, an adapter given twice), TargetError; the model is then as it
    was.
    """
    if not adapters or len(set(adapters)) < len(adapters):
        raise AdapterError(f"a mixture is made of adapters, each once, got {list(adapters)}")
    attachments = [_known(model, adapter) for adapter in adapters]
    for attachment in attachments:
        if any(isinstance(method, MixtureMethod) for method, _ in attachment.methods):
            raise AdapterError(
                f"adapter {attachment.name!r} is a mixture itself; extract its experts first (effzoo.peft.extract)"
            )
    spec = parse_one(how)
    if head is not None:
        _known(model, head)
    with transition(model, *adapters), torch.no_grad():
        finish(model, *adapters)
        experts = {"of": tuple(attachment.spec for attachment in attachments), "finished": True}
        num_labels = None if head is None else labels(model, head)
        attach(model, Spec(spec.name, {**spec.options, **experts}), name=name, num_labels=num_labels)
        for _, site in sites(model):
            for number, adapter in enumerate(adapters):
                if (mixture := mixture_at(site, name)) is not None and adapter in site.adapters:
                    _copy({k: m for k, m in site.of(adapter).items() if k != "head"}, mixture.experts[number])
        if head is not None:
            take_head(model, head, name)


def extract(model: nn.Module, mixture: str, expert: int, *, name: str) -> None:
    """Attach an expert of a mixture as an adapter of its own, active, with a copy of the mixture's task head.

    mixture: the adapter.
    expert: its number.
    name: of the new adapter.

    Raises AdapterError for an adapter that is no mixture, UnknownNameError for an expert that it does not have.
    """
    method = next((m for m, _ in _known(model, mixture).methods if isinstance(m, MixtureMethod)), None)
    if method is None:
        raise AdapterError(
            f"adapter {mixture!r} ({_known(model, mixture).spec}) has no experts; give one that is 'routed' or 'fusion'"
        )
    if not 0 <= expert < len(method.of):
        raise UnknownNameError("expert", expert, map(str, range(len(method.of))))
    with transition(model), torch.no_grad():
        attach(model, method.of[expert], name=name, num_labels=labels(model, mixture))
        if method.finished or _known(model, mixture).finished:
            finish(model, name)
        for _, site in sites(model):
            if name in site.adapters and (source := mixture_at(site, mixture)) is not None:
                _copy(dict(source.experts[expert].named_children()), site.of(name))
        take_head(model, mixture, name)


def mixture_at(site: Site, name: str) -> ExpertMixture | None:
    """The mixture that an adapter has hung on a site."""
    return (
        next((m for m in site.of(name).values() if isinstance(m, ExpertMixture)), None)
        if name in site.adapters
        else None
    )


def _copy(given: dict[str, nn.Module], expert: nn.Module) -> None:
    for method, module in given.items():
        to: Any = expert.get_submodule(method)
        packed = module.packed() if isinstance(module, Packed) else None
        if packed is None:
            to.load_state_dict(module.state_dict())
        else:  # what a module has chosen decides the shapes that it holds
            to.unpack({key: value.clone() for key, value in packed.items()})
