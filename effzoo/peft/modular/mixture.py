"""What routed and fused adapters have in common: experts that are PEFT methods of any kind, each with its own hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatiblePeft, OptionError
from effzoo.peft.attach import targets
from effzoo.peft.method import Batches, Layers, Method, Modules
from effzoo.peft.training_hooks import HOOKS, TrainingHooks, uses
from effzoo.registry import peft as registry
from effzoo.sites import Embedding, HookContext, Mixture, PeftModule, Side, SideNetwork, Site, TiedLinear, opens, sites
from effzoo.spec import parse

MOST = 256  # experts


class ExpertMixture(Mixture):
    """A mixture whose experts may be frozen, and of which one alone can be looked at (`only`)."""

    only: int | None = None

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        if self.only is not None:
            return outs[self.only]
        return self.mixed(site, x, plain, outs, context)

    def mixed(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        """`mix` when no expert is looked at alone."""
        raise NotImplementedError


class MixtureMethod(TrainingHooks):
    """Experts of given specs at the sites where they hang; subclasses say how their outputs become one.

    Hooks of the experts (calibrate, schedule, penalty, stages, finish) are called as if each were attached alone.
    Experts that take part in training in different stages, or that hang rows in front of the input or a second network
    beside it, are refused.
    """

    accepts = (Site,)
    default_targets = ("*",)
    identity_at_init = False

    def __init__(self, of: Sequence[str] | str, experts: int, frozen: bool, finished: bool, *, layers: Layers = None):
        super().__init__(layers=layers)
        specs = [of] * experts if isinstance(of, str) else list(of)
        if not 1 <= len(specs) <= MOST or not all(specs):
            raise OptionError(f"{self.name}: from 1 to {MOST} experts, each a spec, got {len(specs)}: {specs[:3]}")
        self.of, self.frozen, self.finished, done = specs, frozen, finished, frozen or finished
        self.inner: list[list[Method]] = [[registry.create(spec) for spec in parse(given)] for given in specs]
        methods = [method for expert in self.inner for method in expert]
        if nested := [method.name for method in methods if isinstance(method, MixtureMethod)]:
            raise OptionError(
                f"{self.name}: an expert is no mixture itself, got {nested[0]!r}; attach both and "
                "activate them together"
            )
        training = [method for method in methods if isinstance(method, TrainingHooks)]
        stages = {tuple(method.stages) for method in training if method.stages}
        if len(stages) > 1:
            raise OptionError(f"{self.name}: the experts train in different stages; give experts of one method")
        self.stages = () if done or not stages else stages.pop()
        self.consistency = 0.0 if done else max((method.consistency for method in training), default=0.0)
        self.schedule_ends = max((method.schedule_ends for method in training), default=1.0)
        self.identity_at_init = all(method.identity_at_init for method in methods)
        self.learning_rate = methods[0].learning_rate
        self.rates = self._rates()

    def hooks_in_use(self) -> set[str]:
        if self.frozen or self.finished:
            return set()
        return {hook for hook in HOOKS if any(uses(method, hook) for expert in self.inner for method in expert)}

    def _rates(self) -> dict[str, float]:
        """The factors that the experts' methods have for their tensors, and those that make their learning rates of the
        first one's."""
        found = {}
        for number, expert in enumerate(self.inner):
            for method in expert:
                own = method.learning_rate / self.learning_rate
                rates = method.rates if isinstance(method, TrainingHooks) else {}
                for pattern, factor in {**rates, "*": 1.0}.items():
                    found[f"experts.{number}.{method.name}.{pattern}"] = own * factor
        return found

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.places: list[list[tuple[Method, set[int]]]] = []
        for expert in self.inner:
            self.places.append([])
            for method in expert:
                own = {path: site for path, site in targets(model, method).items() if path in found}
                method.prepare(model, own)
                self.places[-1].append((method, {id(site) for site in own.values()}))
        self.tied = any(isinstance(site, TiedLinear) for _, site in sites(model))
        shows = [part for part in model.modules() if getattr(part, "shows_mask", False)]
        self.shown = {id(site) for part in shows for _, site in sites(part)}

    def experts_at(self, site: Site) -> list[nn.ModuleDict] | None:
        """What each expert hangs on a site; None when none hangs anything."""
        each = []
        for places in self.places:
            made: dict[str, PeftModule] = {}
            for method, wanted in places:
                if id(site) in wanted and (module := method.make(site)) is not None:
                    if method.name in made:
                        raise OptionError(
                            f"{self.name}: an expert would hang two {method.name!r} modules on {site.role!r}; give "
                            "them disjoint targets"
                        )
                    made[method.name] = module
                    if self.finished and isinstance(method, TrainingHooks):
                        method.finish({site.role: module})
            each.append(nn.ModuleDict(made))
        hung = [module for own in each for module in own.values() if isinstance(module, PeftModule)]
        if not hung:
            return None
        if isinstance(site, Side) or any(isinstance(module, SideNetwork) or opens(module, "prompt") for module in hung):
            reason = "rows in front of the input and a network beside the blocks are there before, or for, all tokens"
            raise IncompatiblePeft(self.name, f"experts at {site.role!r}", reason, "use prefix or deep_prompt")
        if isinstance(site, TiedLinear) or (isinstance(site, Embedding) and self.tied):
            reason = "the head of the model reads the same table, which then differs by token"
            raise IncompatiblePeft(
                self.name,
                f"experts at {site.role!r}",
                reason,
                "give the experts targets inside the blocks, 'attn.*' or 'mlp.*'",
            )
        return each

    def _each(self, modules: Modules, hook: str) -> list[tuple[int, TrainingHooks, dict[str, PeftModule]]]:
        """Every expert's methods that have a hook, with what they have hung, by path."""
        if self.frozen or self.finished:
            return []
        found = []
        mixtures = {path: module for path, module in modules.items() if isinstance(module, ExpertMixture)}
        for number, expert in enumerate(self.inner):
            for method in expert:
                hung = {path: dict(mixture.experts[number].named_children()) for path, mixture in mixtures.items()}
                own = {path: m for path, each in hung.items() if isinstance(m := each.get(method.name), PeftModule)}
                if isinstance(method, TrainingHooks) and uses(method, hook) and own:
                    found.append((number, method, own))
        return found

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        for number, method, own in self._each(modules, "calibrate"):
            try:
                for module in modules.values():
                    module.only = number  # type: ignore[assignment]
                method.calibrate(model, own, batches)
            finally:
                for module in modules.values():
                    module.only = None  # type: ignore[assignment]

    def schedule(self, modules: Modules, progress: float) -> None:
        for _, method, own in self._each(modules, "schedule"):
            method.schedule(own, progress)

    def penalty(self, modules: Modules) -> Tensor | None:
        found = [
            value for _, method, own in self._each(modules, "penalty") if (value := method.penalty(own)) is not None
        ]
        return torch.stack(found).sum() if found else None

    def begin(self, stage: str, modules: Modules) -> None:
        for _, method, own in self._each(modules, "begin"):
            if stage in [part.name for part in method.stages]:
                method.begin(stage, own)

    def finish(self, modules: Modules) -> None:
        for _, method, own in self._each(modules, "finish"):
            method.finish(own)
