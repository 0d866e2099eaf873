"""A PEFT method under check, and the models: an encoder and a decoder, with full and with windowed attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.checks.declared import suitable
from effzoo.checks.models import TinyModel, train
from effzoo.checks.runner import Check, Failed, NotApplicable
from effzoo.errors import IncompatiblePeft
from effzoo.peft import Method, PeftModule, attach
from effzoo.peft.attach import attached
from effzoo.registry import peft as registry
from effzoo.spec import Spec, parse_one

WINDOW = "longformer[window=8]"
REVERSIBLE = TinyModel("bert", "full", choices=(("norm", "pre"), ("residual", "reversible")))
CASES = (
    TinyModel("bert", "full"),
    TinyModel("gpt2", "full"),
    TinyModel("bert", WINDOW, has_global=True),
    TinyModel("gpt2", WINDOW, has_global=True),
)


@dataclass
class Subject:
    """One PEFT method under check: its class and the small options it is attached with."""

    spec: Spec
    cls: type[Method]
    reference: Any = None  # what --against names: `effzoo.checks.against`

    @classmethod
    def of(cls, given: str) -> Subject:
        method = registry.get(parse_one(given).name)
        return cls(suitable(registry, given, lambda spec: cls(spec, method).attached(CASES[0])), method)

    @property
    def identity_at_init(self) -> bool:
        """Whether the method says that attaching leaves the output as it is."""
        return bool(registry.create(self.spec).identity_at_init)

    def attached(self, case: TinyModel, name: str = "default") -> Transformer:
        return attach(case.model(), self.spec, name=name)

    def option(self, *names: str) -> str | None:
        """The first of these names that the method has as an option."""
        had = {option.name for option in registry.options(self.spec.name)}
        return next((name for name in names if name in had), None)

    def given(self, **options: Any) -> Subject:
        """The method with other values of some options. Raises OptionError for values that it does not take."""
        spec = Spec(self.spec.name, {**self.spec.options, **options})
        registry.create(spec)
        return Subject(spec, self.cls, self.reference)

    def trained(self, case: TinyModel) -> Transformer:
        """A model with the method attached and moved away from its start by three steps."""
        model = self.attached(case)
        train(model, case.batch())
        return model


def on_every_model(check: Callable[[Subject, TinyModel], None]) -> Check:
    """Run a check on each of the `CASES`; what goes wrong has the model's name."""

    @functools.wraps(check)
    def run(subject: Subject) -> None:
        refusals: list[str] = []
        for case in CASES:
            try:
                check(subject, case)
            except IncompatiblePeft as refusal:
                refusals.append(str(refusal))
            except Exception as error:
                error.add_note(str(case))
                raise
        if len(refusals) == len(CASES):
            raise NotApplicable(refusals[0])

    return run


def unless_refused(check: Callable[[Subject], None]) -> Check:
    """Run a check on its one model; a method that refuses the model need not have the property."""

    @functools.wraps(check)
    def run(subject: Subject) -> None:
        try:
            check(subject)
        except IncompatiblePeft as refusal:
            raise NotApplicable(str(refusal)) from None

    return run


def same(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], advice: str) -> None:
    """Fail unless two sets of tensors have the same names and are bit-identical."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found or name not in expected:
            raise Failed(f"{what}: {name} is {'missing' if name in expected else 'new'}; {advice}")
        if not torch.equal(found[name], expected[name]):
            different = (
                int((found[name] != expected[name]).sum())
                if found[name].shape == expected[name].shape
                else found[name].numel()
            )
            raise Failed(f"{what}: {name} differs in {different} of {found[name].numel()} entries; {advice}")


def places(model: nn.Module, adapter: str = "default") -> dict[str, Method]:
    """Where the methods of an adapter hang, "path.adapters.NAME.METHOD.", without the head that every adapter has."""
    methods = attached(model)[adapter].methods
    own = methods[:-1] if len(methods) > 1 and methods[-1][0].name == "head" else methods
    return {f"{path}.adapters.{adapter}.{method.name}.": method for method, paths in own for path in paths}


def modules(model: nn.Module, adapter: str = "default") -> dict[str, PeftModule]:
    """The modules of an adapter by the path of their site, without the head that every adapter has."""
    return {
        prefix.partition(".adapters.")[0]: cast(PeftModule, model.get_submodule(prefix[:-1]))
        for prefix in places(model, adapter)
    }


def own_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Parameters and buffers of an adapter by their key, without those of the head that every adapter has; what
    several sites share appears at each."""
    prefixes = tuple(places(model, adapter))
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {key: tensor for key, tensor in every if key.startswith(prefixes)}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
