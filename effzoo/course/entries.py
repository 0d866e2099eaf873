"""Tasks on what a file registers: an attention kind or a method beside a reference that it cannot edit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from effzoo.attention.core import Context, Mask
from effzoo.checks.against import Reference, Written, read
from effzoo.checks.apart import Limits
from effzoo.checks.models import LENGTHS, SIZES
from effzoo.checks.peft.against import CASES, trained_tensors
from effzoo.checks.peft.subject import modules
from effzoo.checks.subject import Subject
from effzoo.course.task import Call, Draw, Slips, Task, difference
from effzoo.peft import attach
from effzoo.spec import Spec

TRAINED = "the norms of the gradients of what is trained, in order of size"
NOT_TRAINED = (
    "no gradient reaches what is trained: it is detached on the way, by .detach(), .data or torch.no_grad(), or it is "
    "no nn.Parameter"
)
Padding = Literal["none", "some", "all"]
Way = Literal["start", "attached", "gradients", "merged", "saved", "trained"]


@dataclass
class Layer(Task):
    """An attention kind: its output on drawn q, k, v and masks is that of the reference, to 1e-10 in float64.

    reference: a spec such as "longformer[window=8]", or dense(q, k, v, *, valid, causal) -> out.
    causal: whether queries see no later keys.
    padding: "some" of the positions, or "all" of one example, whose queries see nothing and give 0.
    gradients: whether those of q, k, v and of what is trained are compared too.
    lengths: the least and the greatest number of positions.
    dtype: of q, k, v; "float32" for long input, compared to 1e-4.
    wrong: dense functions that make a known mistake, by the sentence that names it; one with the keyword `state` is
        given the tensors of the reference.
    """

    reference: str | Callable[..., Tensor]
    causal: bool = False
    padding: Padding = "none"
    gradients: bool = False
    lengths: tuple[int, int] = (1, 40)
    draws: int = 5
    dtype: str = "float64"
    wrong: dict[str, Callable[..., Tensor]] | None = None
    limits: Limits | None = None

    def known(self) -> Reference:
        """The reference, as `effzoo.checks` reads it."""
        if callable(self.reference):
            return Reference("attention", self.reference.__name__, Spec("dense"), None, self.reference)
        return read(self.reference, ["attention"])

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.dtype == "float64" else 1e-4

    def calls(self, seed: int) -> list[Call]:
        return [self._call(self.known(), Draw(seed, number)) for number in range(self.draws)]

    def _call(self, reference: Reference, draw: Draw) -> Call:
        n, batch = draw.whole(*self.lengths), draw.whole(2, 3) if self.padding != "none" else draw.whole(1, 3)
        heads, width = draw.whole(1, 3), draw.one_of(4, 6, 8)
        if n > 1000:  # long input is one head of one example
            batch, heads, width = 1, 1, 8
        core: Any = reference.like(Context(heads, width, causal=self.causal, layers=2, max_length=max(64, n)))
        dtype = getattr(torch, self.dtype)
        if isinstance(core, torch.nn.Module):
            core.to(dtype)
            for x in core.parameters():  # other ones in every draw
                x.data.copy_(draw.normal(*x.shape))
        valid = None
        if self.padding == "some":
            valid = draw.yes(0.7, batch, n)
        elif self.padding == "all":
            valid = torch.arange(batch)[:, None].expand(batch, n) != draw.whole(0, batch - 1)
        mask = Mask(valid)
        given: dict[str, Any] = {name: draw.normal(batch, heads, n, width).to(dtype) for name in core.uses(mask)}
        right = self._outputs(core, given, mask, weight := draw.normal(batch, heads, n, width).to(dtype))
        wrong: dict[str, Callable[[], Any]] = {}
        for said, slip in (self.wrong or {}).items():
            bound = partial(slip, state=core.state_dict()) if "state" in signature(slip).parameters else slip
            wrong[said] = partial(self._outputs, Written(bound, core.context), given, mask, weight)
        about = {
            "heads": heads, "width": width, "causal": self.causal, "names": list(given), "gradients": self.gradients,
            "length": max(64, n), "reference": reference.text, "options": dict(reference.spec.options),
        }  # fmt: skip
        state = {f"state.{key}": x for key, x in core.state_dict().items()}
        sent = {**given, **state, "weight": weight, **({} if valid is None else {"valid": valid})}
        said = {"none": "", "some": " with padding", "all": " where one example is all padding"}[self.padding]
        where = (
            f"{'causal' if self.causal else 'bidirectional'}{said}, {heads} head{'s' * (heads > 1)} of {width}, n = {n}"
        )
        return Call("layer", where, sent, right, about, Slips(wrong))

    def pattern_call(self, n: int) -> Call | None:
        """A call with one-hot values, so that the output is the weights [n, n]; None where values are no projection."""
        draw, reference = Draw(1), self.known()
        core: Any = reference.like(Context(1, n, causal=self.causal, layers=2, max_length=64))
        valid = torch.arange(n)[None] < n - 3 if self.padding != "none" else None
        mask = Mask(valid)
        names = core.uses(mask)
        if "v" not in names or core.state_dict():
            return None
        given = {name: draw.normal(1, 1, n, n) for name in names} | {"v": torch.eye(n, dtype=torch.float64)[None, None]}
        weight = torch.zeros(1, 1, n, n, dtype=torch.float64)
        right = {"the output": self._outputs(core, given, mask, weight)["the output"]}
        about = {
            "heads": 1, "width": n, "causal": self.causal, "names": list(given), "gradients": False, "length": 64,
            "reference": reference.text, "options": dict(reference.spec.options),
        }  # fmt: skip
        sent = {**given, "weight": weight, **({} if valid is None else {"valid": valid})}
        return Call("layer", f"one-hot values, n = {n}", sent, right, about)

    def _outputs(self, core: Any, given: dict[str, Tensor], mask: Mask, weight: Tensor) -> dict[str, Tensor]:
        inputs = {name: x.clone().requires_grad_(self.gradients) for name, x in given.items()}
        dense = isinstance(core, Written) or (
            weight.shape[2] <= 1000 and Subject(Spec(type(core).name, {}), type(core)).has_definition
        )
        out = (core.dense if dense else core)(*(inputs.get(name) for name in core.projections), mask=mask)
        found = {"the output": out.detach()}
        if self.gradients:
            loss = (out * weight).sum()
            grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, retain_graph=True)
            for (name, x), grad in zip(inputs.items(), grads, strict=True):
                found[f"the gradient of {name}"] = torch.zeros_like(x) if grad is None else grad
            trained = list(core.parameters()) if isinstance(core, torch.nn.Module) else []
            found[TRAINED] = norms(loss, trained)
        return found

    def differs(self, call: Call, value: Any) -> str:
        return difference(value, call.right, self.tolerance)

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        said = next(said for call, value in zip(calls, values, strict=True) if (said := self.differs(call, value)))
        return super().cause(calls, values) or (NOT_TRAINED if TRAINED in said else "")


def norms(loss: Tensor, trained: Sequence[Tensor]) -> list[float]:
    """The norms of the gradients of a loss, the least first."""
    grads = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
    return sorted(0.0 if grad is None else float(grad.norm()) for grad in grads)


@dataclass
class Method(Task):
    """A fine-tuning method on tiny models, with the factors of the reference.

    reference: a spec such as "lora[rank=4, alpha=8]".
    way: what is compared. "start": the logits right after attaching, with the model's own; "attached": the logits with
        the drawn factors; "gradients": those of the factors; "merged": the logits after `effzoo.merge`; "saved": after
        `save_adapter` and `load_adapter` into a new model; "trained": the shapes of what is trained.
    wrong: with "attached", what the hook of the reference's modules would give with a known mistake, by the sentence
        that names it; a function of the module and of what the hook is given but its context: (module, x, y) -> y'.
    hook: which one, "after" or "memory".
    """

    reference: str
    way: Way = "attached"
    draws: int = 2
    wrong: dict[str, Callable[..., Any]] | None = None
    hook: Literal["after", "memory"] = "after"
    limits: Limits | None = None

    def known(self) -> Reference:
        """The reference, as `effzoo.checks` reads it."""
        return read(self.reference, ["peft"])

    def calls(self, seed: int) -> list[Call]:
        reference = self.known()
        return [
            self._call(reference, number % len(CASES), Draw(seed, number))
            for number in range(max(self.draws, len(CASES)))
        ]

    def _call(self, reference: Reference, case: int, draw: Draw) -> Call:
        bare = CASES[case].model().eval()
        ids = draw.wholes(0, SIZES["vocab"] - 1, len(LENGTHS), 9 + 5 * draw.number)
        with torch.no_grad():
            before = bare(input_ids=ids).logits
        model = attach(copy.deepcopy(bare), reference.spec).eval()
        hung = modules(model)
        with torch.no_grad():
            for tensor in trained_tensors(hung).values():
                tensor.copy_(0.3 * draw.normal(*tensor.shape))
        factors = {f"factor.{key}": x.detach().clone() for key, x in trained_tensors(hung).items()}
        out = model(input_ids=ids).logits
        weight = draw.normal(*out.shape)
        slips = (self.wrong or {}).items()
        wrong = Slips({said: partial(self._slipped, model, hung, slip, ids) for said, slip in slips})
        about = {
            "case": case, "paths": list(hung), "way": self.way,
            "reference": reference.text, "options": dict(reference.spec.options),
        }  # fmt: skip
        right: dict[str, Any] = {"the output": out.detach()}
        if self.way == "start":
            right = {"the output": before}
        elif self.way == "gradients":
            own = trained_tensors(hung)
            grads = torch.autograd.grad((out * weight).sum(), list(own.values()))
            right = {f"the gradient of {name}": grad for name, grad in zip(own, grads, strict=True)}
        elif self.way == "trained":
            shapes = sorted(sorted(x.shape) for x in trained_tensors(hung).values())
            right = {"the shapes of what is trained": shapes}
        said = {"start": "right after attaching", "attached": "with given factors", "gradients": "with given factors",
                "merged": "merged", "saved": "saved and loaded", "trained": "what is trained"}[self.way]  # fmt: skip
        where = f"{said} on {CASES[case]}, {ids.shape[1]} tokens"
        return Call("method", where, {**factors, "input_ids": ids, "weight": weight}, right, about, wrong)

    def _slipped(self, model: Any, hung: Mapping[str, Any], slip: Callable[..., Any], ids: Tensor) -> dict[str, Tensor]:
        """The output where the modules make a mistake."""
        for module in hung.values():
            setattr(module, self.hook, lambda *given, module=module: slip(module, *given[:-1]))
        with torch.no_grad():
            out = model(input_ids=ids).logits
        for module in hung.values():
            delattr(module, self.hook)
        return {"the output": out}

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        """The known mistake of which every answer is the outcome, in one of the ways of each."""
        pairs = list(zip(calls, values, strict=True))
        for said in self.wrong or ():
            if all(any(not difference(way, call.wrong[said], 1e-9) for way in value["ways"]) for call, value in pairs):
                return said
        return ""

    def differs(self, call: Call, value: Any) -> str:
        """The least wrong of the ways in which factors of one shape may belong together."""
        ways = value.get("ways") if isinstance(value, dict) else None
        if not isinstance(ways, list) or not ways:
            return f"its process answered {str(value)[:80]}"
        said = [difference(one, call.right, 1e-9) for one in ways]
        return "" if "" in said else said[0]
