"""What every attention kind must hold, on its own: its definition, padding, causality, memory, global tokens, dropout.

Sizes are tiny and the dtype is float64 unless a check says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask
from effzoo.checks.declared import check_docstring, check_options, check_signature, suitable
from effzoo.checks.runner import Check, Failed, NotApplicable, close, needs
from effzoo.errors import EffzooError
from effzoo.registry import attention as registry
from effzoo.spec import Spec, parse_one

HEADS, WIDTH, LENGTHS = 2, 8, (1, 2, 7, 16, 31, 64)


@dataclass
class Subject:
    """One attention kind under check: its class and the small options it is built with."""

    spec: Spec
    cls: type[AttentionCore]

    @classmethod
    def of(cls, given: str) -> Subject:
        kind = registry.get(parse_one(given).name)
        return cls(suitable(registry, given, lambda spec: cls(spec, kind).core()), kind)

    def core(self, *, causal: bool = False, dropout: float = 0.0) -> AttentionCore:
        """The kind as the first of two layers, in evaluation mode, always with the same weights."""
        context = Context(heads=HEADS, head_dim=WIDTH, causal=causal, dropout=dropout, layers=2, max_length=max(LENGTHS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            core: AttentionCore = registry.create(self.spec, context)
        return core.double().eval()

    def cores(self) -> Iterator[tuple[str, AttentionCore]]:
        """Bidirectional and, where the kind can be, causal."""
        yield "bidirectional", self.core()
        if self.cls.supports_causal:
            yield "causal", self.core(causal=True)

    def needs_pattern(self) -> None:
        if self.cls.pattern is AttentionCore.pattern and self.cls.dense is AttentionCore.dense:
            raise NotApplicable("the kind has no `pattern`: test an anchor, a setting in which it must equal full attention")


def draw(core: AttentionCore, n: int, mask: Mask, batch: int = 3, dtype: torch.dtype = torch.float64) -> list[Any]:
    """The projections that the core uses with this mask, [batch, heads, n, width] each, and None for the others."""
    source, used = torch.Generator().manual_seed(n), core.uses(mask)
    drawn = [torch.randn(batch, HEADS, n, WIDTH, dtype=torch.float64, generator=source) for _ in core.projections]
    return [x.to(dtype).requires_grad_() if name in used else None for name, x in zip(core.projections, drawn, strict=True)]


def memory_rows(rows: int = 3) -> KeysValues:
    source = torch.Generator().manual_seed(99)
    keys, values = torch.randn(2, HEADS, rows, WIDTH, dtype=torch.float64, generator=source)
    return keys.requires_grad_(), values.requires_grad_()


def padding(n: int) -> Tensor:
    """Padding of three examples, bool[3, n]: none, at the end, and at the front with a hole."""
    place = torch.arange(n)
    return torch.stack([place >= 0, place < max(1, n - n // 3), (place >= n // 4) & ((place != n // 2) | (n < 4))])


def some_global(n: int) -> Tensor:
    """Global tokens at other places, and in other number, in each of three examples; the second has none."""
    place = torch.arange(n)
    return torch.stack([place == 0, place < 0, (place == n // 3) | (place == n - 1)])


def live(tensors: list[Any]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def gradients(out: Tensor, inputs: list[Tensor], rows: Tensor | None = None) -> list[Tensor]:
    """Gradients of a random weighted sum over the output, or over some of its rows (bool[batch, n]); zeros where none flows."""
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    if rows is not None:
        weight = weight * rows[:, None, :, None]
    found = torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def same_as_definition(core: AttentionCore, n: int, where: str, advice: str, memory: KeysValues | None = None, **mask: Any) -> None:
    """Forward and all gradients of a core against its dense definition."""
    inputs = draw(core, n, Mask(**mask))
    leaves = live(inputs) + list(memory or ())
    out = core(*inputs, mask=Mask(**mask), memory=memory)
    expected = core.dense(*inputs, mask=Mask(**mask), memory=memory)
    close(f"{where}, n = {n}: the output", out, expected, 1e-10, advice)
    names = [name for name, x in zip(core.projections, inputs, strict=True) if x is not None] + ["memory keys", "memory values"]
    for name, found, wanted in zip(names, gradients(out, leaves), gradients(expected, leaves), strict=False):
        close(f"{where}, n = {n}: the gradient of {name}", found, wanted, 1e-10, advice)


def declares_itself(subject: Subject) -> None:
    """Options are keyword-only with type and default; docstring and cost are there; nothing is swallowed"""
    check_options(registry, subject.cls, leading=1)
    check_docstring(subject.cls)
    check_signature(subject.cls, "forward")
    if not any("cost" in vars(parent) for parent in subject.cls.__mro__ if issubclass(parent, AttentionCore) and parent is not AttentionCore):
        raise Failed(f"{subject.cls.__qualname__} does not say its cost; write for example cost = 'n * window'")


def shape_and_dtype(subject: Subject) -> None:
    """Output has the shape and dtype of the queries in float32, float64 and bfloat16"""
    for where, core in subject.cores():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            inputs = draw(core, 31, Mask(), dtype=dtype)
            out = core.to(dtype)(*inputs, mask=Mask())
            if out.shape != (3, HEADS, 31, WIDTH) or out.dtype != dtype:
                wanted = f"{dtype} of shape {(3, HEADS, 31, WIDTH)}"
                raise Failed(f"{where}: {out.dtype} of shape {tuple(out.shape)} came out for {wanted}; return the latter")


@needs("shape_and_dtype")
def every_length(subject: Subject) -> None:
    """Every length works, forward and backward: 1, 2, 7, 16, 31, 64"""
    for where, core in subject.cores():
        for n in LENGTHS:
            inputs = draw(core, n, Mask())
            out = core(*inputs, mask=Mask())
            if out.shape[2] != n:
                raise Failed(f"{where}: {out.shape[2]} rows came out for n = {n}; cut the padding to a block multiple off again")
            for tensor in (out, *gradients(out, live(inputs))):
                close(f"{where}, n = {n}: output or gradient", tensor, tensor, 0.0, "mask with care where a block holds no key")


@needs("every_length")
def equals_definition(subject: Subject) -> None:
    """Output and gradients equal the dense definition to 1e-10"""
    subject.needs_pattern()
    advice = "compare `pattern` with what forward attends: window edges, the causal triangle, padding"
    for where, core in subject.cores():
        for n in (1, 7, 31, 64):
            same_as_definition(core, n, where, advice)
        for n in (7, 31):
            same_as_definition(core, n, f"{where} with padding", advice, valid=padding(n))


@needs("every_length")
def empty_rows_are_zero(subject: Subject) -> None:
    """A query that may attend to nothing gives 0, never NaN, forward and backward"""
    n = 16
    valid = torch.stack([torch.ones(n).bool(), torch.zeros(n).bool(), torch.arange(n) >= 5])
    for where, core in subject.cores():
        inputs, mask = draw(core, n, Mask(valid)), Mask(valid)
        out = core(*inputs, mask=mask)
        empty = torch.zeros(3, 1, n, dtype=torch.bool)
        empty[1] = True
        if core.pattern.__func__ is not AttentionCore.pattern:  # type: ignore[attr-defined]
            empty = ~core.pattern(n, Mask(valid)).expand(3, -1, n, n).any(dim=3)
        rows = out.masked_select(empty.expand(3, HEADS, n).unsqueeze(-1))
        close(f"{where}: rows without any key", rows, torch.zeros_like(rows), 0.0, "a softmax over nothing is NaN: return 0 there")
        for tensor in (out, *gradients(out, live(inputs))):
            close(f"{where}: output or gradient beside an empty row", tensor, tensor, 0.0, "a NaN behind torch.where still has a NaN gradient")


@needs("every_length")
def padding_is_invisible(subject: Subject) -> None:
    """What stands under padding changes nothing, and gets no gradient"""
    n = 31
    valid = padding(n)
    for where, core in subject.cores():
        inputs = draw(core, n, Mask(valid))
        noise = [None if x is None else torch.where(valid[:, None, :, None], x, 7 * torch.randn_like(x)) for x in inputs]
        out, other = core(*inputs, mask=Mask(valid)), core(*noise, mask=Mask(valid))
        advice = "mask.valid is False at padding; no query may attend there"
        here = valid[:, None, :, None].expand_as(out)
        close(f"{where}: output at tokens after other values were put under the padding", other[here], out[here], 1e-12, advice)
        for name, grad in zip(core.uses(Mask(valid)), gradients(out, live(inputs), rows=valid), strict=False):
            under = grad.masked_select(~valid[:, None, :, None])
            close(f"{where}: gradient of {name} under padding", under, torch.zeros_like(under), 0.0, advice)


@needs("every_length")
def ragged_equals_alone(subject: Subject) -> None:
    """A sequence in a padded batch gives what it gives alone"""
    lengths, n = (31, 16, 7), 31
    valid = torch.arange(n) < torch.tensor(lengths)[:, None]
    for where, core in subject.cores():
        inputs = draw(core, n, Mask(valid))
        out = core(*inputs, mask=Mask(valid))
        for row, length in enumerate(lengths):
            alone = core(*(None if x is None else x[row : row + 1, :, :length] for x in inputs), mask=Mask())
            advice = "block sizes and positions must not depend on the padded length"
            close(f"{where}: a sequence of {length} padded to {n}", out[row : row + 1, :, :length], alone, 1e-10, advice)


@needs("every_length")
def future_is_unseen(subject: Subject) -> None:
    """Causal: the gradient of output t with respect to inputs after t is exactly 0"""
    if not subject.cls.supports_causal:
        try:
            subject.core(causal=True)
        except EffzooError:
            raise NotApplicable("the kind says that it cannot be causal, and refuses it") from None
        raise Failed("supports_causal is False, yet it was built in a causal context; call super().__init__(context), which refuses")
    core, n = subject.core(causal=True), 31
    for is_global in (None, some_global(n)) if subject.cls.supports_global else (None,):
        mask = Mask(is_global=is_global)
        inputs = draw(core, n, mask)
        out = core(*inputs, mask=mask)
        for t in (0, 1, 7, 8, 15, 29):
            for name, grad in zip(core.uses(mask), gradients(out[:, :, t : t + 1], live(inputs)), strict=False):
                later = grad[:, :, t + 1 :]
                if later.abs().max() > 0:
                    at = t + 1 + int(later.abs().amax(dim=(0, 1, 3)).argmax())
                    raise Failed(f"output {t} depends on {name} at {at}, {at - t} ahead; honour context.causal (j <= i)")


@needs("every_length")
def memory_is_attended(subject: Subject) -> None:
    """Memory acts as more keys that every query sees"""
    valid, memory = padding(16), memory_rows()
    if not subject.cls.supports_memory:
        core = subject.core()
        try:
            core(*draw(core, 16, Mask(valid)), mask=Mask(valid), memory=memory)
        except EffzooError:
            raise NotApplicable("the kind says that it takes no memory, and refuses it") from None
        raise Failed("supports_memory is False, yet memory was taken without a word; raise IncompatibleError, or prefix tuning learns nothing")
    for where, core in subject.cores():
        inputs = draw(core, 16, Mask(valid))
        without, out = core(*inputs, mask=Mask(valid)), core(*inputs, mask=Mask(valid), memory=memory)
        advice = "add `memory_part(q, memory)` to the parts of the softmax"
        if torch.equal(without, out):
            raise Failed(f"{where}: memory of 3 rows changed nothing; {advice}")
        for name, grad in zip(("keys", "values"), gradients(out, list(memory)), strict=True):
            if not torch.isfinite(grad).all() or (grad.abs().amax(dim=-1) == 0).any():
                raise Failed(f"{where}: some memory {name} get a gradient that is 0 or not finite; {advice}")
        try:
            subject.needs_pattern()
        except NotApplicable:
            continue
        for n in (7, 31):
            same_as_definition(core, n, f"{where} with memory", advice, memory, valid=padding(n))
        if subject.cls.supports_global:
            same_as_definition(core, 31, f"{where} with memory and global tokens", advice, memory, is_global=some_global(31))


@needs("every_length")
def global_tokens(subject: Subject) -> None:
    """Global tokens, at other places in each example, see everything and are seen; or they are refused"""
    if not subject.cls.supports_global:
        try:
            subject.core().check(Mask(is_global=some_global(16)))
        except EffzooError:
            raise NotApplicable("the kind says that it has no global tokens, and refuses them") from None
        raise Failed("supports_global is False, yet check(mask) let global tokens pass; leave AttentionCore.check as it is")
    subject.needs_pattern()
    advice = "each example has its own global tokens, given by mask.is_global"
    for where, core in subject.cores():
        for n in (7, 31):
            same_as_definition(core, n, f"{where} with global tokens", advice, is_global=some_global(n))
            valid = padding(n)
            same_as_definition(core, n, f"{where} with global tokens and padding", advice, valid=valid, is_global=some_global(n) & valid)


@needs("every_length")
def evaluation_draws_nothing(subject: Subject) -> None:
    """In evaluation the output is the same every time and torch's random state is untouched"""
    for where, core in subject.cores():
        inputs, before = draw(core, 31, Mask()), torch.get_rng_state()
        first, second = core(*inputs, mask=Mask()), core(*inputs, mask=Mask())
        close(f"{where}: a second call", second, first, 0.0, "draw random numbers once, into a buffer or with a generator of your own")
        if not torch.equal(before, torch.get_rng_state()):
            raise Failed(f"{where}: the forward pass moved torch's global random state; use a torch.Generator of your own")


@needs("every_length")
def dropout_only_in_training(subject: Subject) -> None:
    """Dropout acts on the attention weights in training and not in evaluation"""
    for causal in (False, True) if subject.cls.supports_causal else (False,):
        plain, dropping = subject.core(causal=causal), subject.core(causal=causal, dropout=0.5)
        inputs = draw(plain, 31, Mask())
        expected = plain(*inputs, mask=Mask())
        advice = "use self.dropout, which is 0 in evaluation"
        close("with dropout 0.5 in evaluation, the output", dropping(*inputs, mask=Mask()), expected, 1e-10, advice)
        dropping.train()
        if torch.allclose(dropping(*inputs, mask=Mask()), expected):
            raise Failed("with dropout 0.5 in training, the output is that of evaluation; call self.attend(...), or pass self.dropout on")


CHECKS: tuple[Check, ...] = (
    declares_itself, shape_and_dtype, every_length, equals_definition, empty_rows_are_zero, padding_is_invisible, ragged_equals_alone,
    future_is_unseen, memory_is_attended, global_tokens, evaluation_draws_nothing, dropout_only_in_training,
)  # fmt: skip
