"""What routed and fused adapters have in common: experts that are PEFT methods of any kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
    """A mixture that can give the output of one expert alone.

    only: the number of that expert; None for the mixture.
    """

    only: int | None = None

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        if self.only is not None:
            return outs[self.only]
        return self.mixed(site, x, plain, outs, context)

    def mixed(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        """`mix` of all experts."""
        raise NotImplementedError


class MixtureMethod(TrainingHooks):
    """Experts of given specs at the sites where they hang; subclasses say how their outputs become one.

    Hooks of the experts (calibrate, schedule, penalty, stages, finish) are called as if each were attached alone.
    Experts that take part in training in different stages, or that add a prompt or a side network, are refused.
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
        """The experts' `rates` for their tensors, times their learning rate relative to the first one's; and that of a
        router's table of skills, whose logits have to go from 0 to some units while weights move by hundredths."""
        factors = {"router.table": 100.0}
        for number, expert in enumerate(self.inner):
            for method in expert:
                own = method.learning_rate / self.learning_rate
                rates = method.rates if isinstance(method, TrainingHooks) else {}
                for pattern, factor in {**rates, "*": 1.0}.items():
                    factors[f"experts.{number}.{method.name}.{pattern}"] = own * factor
        return factors

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
        experts = []
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
            experts.append(nn.ModuleDict(made))
        hung = [module for expert in experts for module in expert.values() if isinstance(module, PeftModule)]
        if not hung:
            return None
        if isinstance(site, Side) or any(isinstance(module, SideNetwork) or opens(module, "prompt") for module in hung):
            reason = "a prompt and a side network act before, or on, all tokens"
            raise IncompatiblePeft(self.name, f"experts at {site.role!r}", reason, "use prefix or deep_prompt")
        if isinstance(site, TiedLinear) or (isinstance(site, Embedding) and self.tied):
            reason = "the head of the model reads the same table, which then differs by token"
            advice = "give the experts targets inside the blocks, 'attn.*' or 'mlp.*'"
            raise IncompatiblePeft(self.name, f"experts at {site.role!r}", reason, advice)
        return experts

    def _hooked(self, modules: Modules, hook: str) -> Iterator[tuple[int, TrainingHooks, dict[str, PeftModule]]]:
        """(number of the expert, method, what it has hung by path), for the experts' methods that have a hook."""
        mixtures = {path: module for path, module in modules.items() if isinstance(module, ExpertMixture)}
        for number, expert in enumerate([] if self.frozen or self.finished else self.inner):
            hung = {path: dict(mixture.experts[number].named_children()) for path, mixture in mixtures.items()}
            for method in expert:
                made = {path: modules.get(method.name) for path, modules in hung.items()}
                hung_by_method = {path: module for path, module in made.items() if isinstance(module, PeftModule)}
                if isinstance(method, TrainingHooks) and uses(method, hook) and hung_by_method:
                    yield number, method, hung_by_method

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        for number, method, own in self._hooked(modules, "calibrate"):
            mixtures = [module for module in modules.values() if isinstance(module, ExpertMixture)]
            try:
                for mixture in mixtures:
                    mixture.only = number
                method.calibrate(model, own, batches)
            finally:
                for mixture in mixtures:
                    mixture.only = None

    def schedule(self, modules: Modules, progress: float) -> None:
        for _, method, own in self._hooked(modules, "schedule"):
            method.schedule(own, progress)

    def after_backward(self, modules: Modules) -> None:
        for _, method, own in self._hooked(modules, "after_backward"):
            method.after_backward(own)

    def penalty(self, modules: Modules) -> Tensor | None:
        values = [method.penalty(own) for _, method, own in self._hooked(modules, "penalty")]
        penalties = [value for value in values if value is not None]
        return torch.stack(penalties).sum() if penalties else None

    def begin(self, stage: str, modules: Modules) -> None:
        for _, method, own in self._hooked(modules, "begin"):
            if stage in [part.name for part in method.stages]:
                method.begin(stage, own)

    def finish(self, modules: Modules) -> None:
        for _, method, own in self._hooked(modules, "finish"):
            method.finish(own)
