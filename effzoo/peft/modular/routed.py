"""Experts that are PEFT modules, and a router that says which of them act on a token, an example or a task."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Few
from effzoo.errors import IncompatibleError, IncompatiblePeft, InputError, OptionError
from effzoo.peft.input.layer import layers_of
from effzoo.peft.method import Layers, Modules, predicts_next
from effzoo.peft.modular.mixture import ExpertMixture, MixtureMethod
from effzoo.peft.parameter.lora import LowRank
from effzoo.registry import peft
from effzoo.registry import router as routers
from effzoo.routing import Router, Routing
from effzoo.sites import Branch, Embedding, HookContext, Keys, Linear, Memory, MemorySite, Norm, PeftModule, Site

from effzoo.sites import Stream, memories, sites  # isort: skip

Level = Literal["token", "example"]


class Pending:
    """The loss of a router's last pass until the penalty takes it.

    A copy of the model has none: a graph belongs to its own tensors.
    """

    loss: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Pending:
        return Pending()


class Routed(ExpertMixture):
    """y' = y + sum_i w_i (y_i - y), with y_i the site's output with expert i and y that without any.

    Where the weights add up to 1 this is sum_i w_i y_i; a token that no expert takes keeps y. A memory is seen by all
    tokens of an example, so it is mixed by example: keys sum_i w_i K_i, values likewise.
    """

    def __init__(
        self, experts: Sequence[nn.ModuleDict], router: Router, level: str, shared: bool, places: int, frozen: bool
    ):
        super().__init__(experts, frozen)
        self.router, self.level, self.shared, self.places = router, level, shared, places
        self.pending = Pending()

    def mixed(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        y = plain
        for out, weight in zip(outs, self.weights(plain if isinstance(site, Embedding) else x, context), strict=True):
            y = y + (weight * (out - plain)).to(plain.dtype)
        return y

    def weights(self, x: Tensor, context: HookContext) -> Tensor:
        """The weight of each expert at the site's input x [..., dim]: [experts, ..., 1].

        Axes along which it does not differ have length 1. Inputs that belong to no example (a head's pooled states,
        prompt tokens that a projection reads) are tokens each.
        """
        if x.ndim < 3 and (self.router.reads == "tasks" or self.shared):
            raise IncompatibleError(
                f"an input {tuple(x.shape)} belongs to no example, so router {self.router.name!r} cannot place it"
            )
        if x.ndim < 3 or (self.level == "token" and self.router.reads == "tokens"):
            return self._by_token(x, context.valid)
        weights = self._by_example(x, context)
        return weights.T.reshape(weights.shape[1], weights.shape[0], *[1] * (x.ndim - 1))

    def _by_token(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Every position by itself, padding left out: it goes to no expert."""
        tokens = x.reshape(-1, x.shape[-1])
        real = _real(x, valid)
        routing = self._routed(tokens if real is None else tokens[real])
        weights = routing.weights
        if real is not None:
            weights = weights.new_zeros(len(tokens), weights.shape[1]).masked_scatter(real[:, None], weights)
        return weights.T.reshape(-1, *x.shape[:-1], 1)

    def _by_example(self, x: Tensor, context: HookContext) -> Tensor:
        """[batch, experts]: by the number of the task, or by the mean over the tokens of the example."""
        if self.router.reads == "tasks":
            if context.task_ids is None:
                raise InputError(
                    f"router {self.router.name!r} reads the number of each example's task; call "
                    "model(..., task_ids=...)"
                )
            return self._routed(context.task_ids).weights
        if self.shared:
            return self._of_model(context)
        return self._routed(_mean(x, context.valid)).weights

    def _of_model(self, context: HookContext) -> Tensor:
        """One router for the model, which reads the mean of the embeddings, with one noise at all sites of a pass."""
        mask, start = context.mask, context.start
        if mask is None or start is None:
            raise IncompatibleError(
                "a router of the whole model reads the embeddings, which this site does not see; use scope='site'"
            )
        seed = mask.decide if mask.decisions is not None else mask.memo
        number = seed(("routed", id(self.router)), lambda: int(torch.randint(2**31, (1,))))
        with torch.random.fork_rng(devices=[start.device] if start.is_cuda else []):
            torch.manual_seed(number)
            return self._routed(_mean(start.detach(), mask.valid)).weights

    def _routed(self, x: Tensor) -> Routing:
        routing: Routing = self.router(x, self.factors()) if self.router.of_factors else self.router(x)
        if (loss := routing.alone) is not None and torch.is_grad_enabled():
            self.pending.loss = loss / self.places
        return routing

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each expert, which are LoRA."""
        return [(module.A, module.B) for (module,) in self.expert_modules() if isinstance(module, LowRank)]

    def memories(self, context: HookContext) -> list[Memory]:
        of_experts = [
            [one for module in expert for one in memories(module, context)] for expert in self.expert_modules()
        ]
        if self.only is not None:
            return of_experts[self.only]
        all_memories = [one for expert in of_experts for one in expert]
        if not all_memories:
            return []
        assert context.x is not None
        weights = self._by_example(context.x, context)
        if all(one.gate is not None for one in all_memories):
            by_expert = zip(of_experts, weights.T, strict=True)
            return [_weighed(one, weight[:, None]) for expert, weight in by_expert for one in expert]
        shapes = {(one.keys.shape[-3:], one.values.shape[-3:], one.gate is None) for one in all_memories}
        if len(shapes) > 1 or any(len(expert) != 1 for expert in of_experts):
            raise IncompatibleError(
                "routed memories are mixed key by key: every expert needs one of the same length; give such experts"
            )
        keys = _blend([one.keys for one in all_memories], weights)
        return [Memory(keys, _blend([one.values for one in all_memories], weights))]

    def extra_repr(self) -> str:
        return f"router={self.router.name}, experts={len(self.experts)}, level={self.level}"


def _weighed(memory: Memory, weight: Tensor) -> Memory:
    """A memory whose gate is multiplied by weight [batch, 1]."""
    assert memory.gate is not None
    return Memory(memory.keys, memory.values, weight.to(memory.gate) * memory.gate)


def _blend(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_i w_i x_i for x_i [(batch,) heads, keys, d] and weights [batch, experts] -> [batch, heads, keys, d]."""
    total = torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device)
    for x, weight in zip(tensors, weights.T, strict=True):
        total = total + weight.to(x)[:, None, None, None] * x
    return total


def _real(x: Tensor, valid: Tensor | None) -> Tensor | None:
    """bool[tokens] of the positions of x [batch, (heads,) n, dim] that hold a token; None for all of them."""
    if valid is None or x.ndim < 3 or valid.shape[0] != x.shape[0] or valid.shape[1] < x.shape[-2]:
        return None
    now = valid[:, -x.shape[-2] :]  # with a cache, valid covers the past too
    return (now if x.ndim == 3 else now[:, None].expand(x.shape[:-1])).reshape(-1)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of x [batch, (heads,) n, dim] over the positions that hold a token, [batch, dim]."""
    real = _real(x, valid)
    if real is None:
        return x.flatten(1, -2).mean(dim=1)
    kept = real.view(x.shape[:-1]).flatten(1)
    total = x.flatten(1, -2).masked_fill(~kept[..., None], 0.0).sum(dim=1)
    return total / kept.sum(dim=1, keepdim=True).clamp(min=1)


@peft.register("routed", "mixture")
class RoutedMethod(MixtureMethod):
    """y' = y + sum_i w_i (y_i - y): experts in parallel, weighted by a router for each token, example or task.

    of: the spec of an expert, any method or union of methods (`of='lora[rank=4]|ia3'`), or a list with one spec for
        each.
    experts: how many, for one spec.
    router: a router with its options (`effzoo.routing.names()`): 'soft', 'top_k[k=1]', 'switch[capacity=1]', 'gumbel',
        'base', 'expert_choice', 'uniform', 'arrow' of LoRA experts; 'fixed' and 'skills' read `model(..., task_ids=)`.
    level: "token", or "example", the mean over its tokens; memories (prefixes) are always routed by example.
    scope: "site", a router at every site, or "model", one that reads the mean of the embeddings.
    frozen: train the router alone.
    finished: experts come as training leaves them, from `effzoo.peft.gather`.

    Losses of the router are added as a penalty, in the mean over its sites. All experts are computed for all tokens:
    what routing saves here is none of the base's work, and little of the experts' (feed-forwards as experts are
    dispatched: `effzoo.build(..., experts=8)`).
    """

    paper = (
        "Ponti et al. 2022, arXiv:2202.13914; Wang et al. 2022, AdaMix, arXiv:2205.12410; Shazeer et al. 2017, "
        "arXiv:1701.06538"
    )

    def __init__(
        self,
        *,
        of: str | Sequence[str] = "lora[rank=4]",
        experts: Few = 4,
        router: str = "soft",
        level: Level = "token",
        scope: Literal["site", "model"] = "site",
        frozen: bool = False,
        finished: bool = False,
        layers: Layers = None,
    ):
        super().__init__(of, experts, frozen, finished, layers=layers)
        if scope == "model" and level == "token":
            raise OptionError(
                f"{self.name}: a router of the whole model reads the mean of an example; give "
                "level='example' with scope='model'"
            )
        probe: Router = routers.create(router, 1, len(self.of))
        self.router, self.level, self.scope = router, level, scope
        self.reads, self.alone = probe.reads, probe.alone
        self.weighted, self.of_factors = probe.weighted, probe.of_factors
        if self.of_factors and scope == "model":
            raise OptionError(
                f"{self.name}: router {router!r} reads the experts of a site; give scope='site', which is the default"
            )

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() | ({"penalty"} if self.weighted else set())

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        config: Any = getattr(model, "config", None)
        takes = inspect.signature(model.forward).parameters
        if self.weighted and getattr(config, "residual", "plain") == "reversible":
            reason = (
                f"the losses of router {self.router!r} need the graph of the forward pass, which reversible "
                "blocks do not keep"
            )
            raise IncompatiblePeft(
                self.name, "a reversible model", reason, "give its losses weight 0, or use 'soft', 'gumbel' or 'base'"
            )
        if "task_ids" not in takes and (self.reads == "tasks" or self.scope == "model"):
            reason = "it takes no task_ids and shows no embeddings to routers"
            raise IncompatiblePeft(self.name, "this model", reason, "route by tokens at each site")
        if self.scope == "model" and getattr(config, "is_encoder_decoder", False):
            reason = "source and target are two examples, and one router would read the mean of either"
            raise IncompatiblePeft(self.name, "an encoder-decoder", reason, "give each site a router (scope='site')")
        self.causal = predicts_next(model, found)
        if self.causal and self.reads == "tokens" and (self.level == "example" or not self.alone):
            reason = "a token's experts would be chosen by later tokens"
            advice = "route by token, with 'soft', 'top_k', 'switch', 'gumbel' or 'base'"
            raise IncompatiblePeft(self.name, "a causal language model", reason, advice)
        super().prepare(model, found)
        memory_sites = {
            path: site for path, site in found.items() if isinstance(site, MemorySite) and self._wants(site)
        }
        self.widths = layers_of(self.name, model, memory_sites)
        self.one = routers.create(self.router, config.dim, len(self.of)) if self.scope == "model" else None
        wanted = {id(site) for _, site in sites(model) if self._wants(site)}
        self.count = max(1, len(wanted))

    def _wants(self, site: Site) -> bool:
        return any(id(site) in wanted for places in self.places for _, wanted in places)

    def make(self, site: Site) -> PeftModule | None:
        experts = self.experts_at(site)
        if experts is None:
            return None
        if isinstance(site, MemorySite) and self.causal and self.reads == "tokens":
            reason = "a memory is routed by the mean of the whole text, so a token would be predicted from later ones"
            advice = "use experts that hang on weights, such as lora"
            raise IncompatiblePeft(self.name, "a causal language model", reason, advice)
        if id(site) not in self.shown and (self.level == "example" or self.reads == "tasks"):
            reason = "outside the blocks of this model nothing says which positions belong to the example"
            advice = "give the experts targets inside the blocks, or route by token"
            raise IncompatiblePeft(self.name, f"experts at {site.role!r}", reason, advice)
        if self.of_factors and any([type(module) for module in expert.values()] != [LowRank] for expert in experts):
            raise IncompatiblePeft(
                f"{self.name}[router={self.router}]", f"experts at {site.role!r}",
                "it reads A and B of one LoRA of each expert at each site",
                "give all experts as lora with one list of targets, linear layers of the blocks, and init=default",
            )  # fmt: skip
        router = routers.create(self.router, self._width(site), len(self.of)) if self.one is None else self.one
        return Routed(experts, router, self.level, self.one is not None, self.count, self.frozen)

    def _width(self, site: Site) -> int:
        """Of what the router reads."""
        if isinstance(site, MemorySite):
            return self.widths[id(site)].width
        if isinstance(site, (Branch, Keys, Stream)):
            return site.dim
        if isinstance(site, Linear):
            return site.in_features
        if isinstance(site, Embedding):
            return site.embedding_dim
        if isinstance(site, Norm):
            return int(site.base()["weight"].shape[-1])
        reason = "there is no sequence of tokens to route"
        raise IncompatiblePeft(self.name, f"experts at {site.role!r}", reason, "use targets inside the blocks")

    def penalty(self, modules: Modules) -> Tensor | None:
        of_experts = super().penalty(modules)
        values = [] if of_experts is None else [of_experts]
        for module in modules.values():
            if isinstance(module, Routed) and module.pending.loss is not None:
                values.append(module.pending.loss)
                module.pending.loss = None
        return torch.stack([value.to(values[0]) for value in values]).sum() if values else None
