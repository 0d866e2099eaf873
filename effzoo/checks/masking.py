"""What an attention kind may not see: padding, other examples, the future; and what sees everything: global tokens."""

from __future__ import annotations

import torch

from effzoo.attention.core import Mask
from effzoo.checks.runner import Failed, NotApplicable, close, needs
from effzoo.checks.subject import (
    BATCH,
    HEADS,
    Subject,
    cut,
    draw,
    gradients,
    live,
    masks,
    padding,
    same_as_definition,
    some_global,
)
from effzoo.errors import EffzooError


@needs("every_length")
def empty_queries_are_zero(subject: Subject) -> None:
    """A query that may attend to nothing gives 0, never NaN, forward and backward

    One example of the batch is padding throughout: print `core(...)[1]`, and the gradient of the sum of the others.
    """
    n = 16
    valid = torch.stack([torch.ones(n).bool(), torch.zeros(n).bool(), torch.arange(n) >= 5])
    for where, core in subject.cores():
        inputs, mask = draw(core, n, Mask(valid)), Mask(valid)
        out = core(*inputs, mask=mask)
        empty = torch.zeros(BATCH, 1, n, dtype=torch.bool)
        empty[1] = True
        if subject.has_pattern:
            empty = ~core.pattern(n, Mask(valid)).expand(BATCH, -1, n, n).any(dim=3)
        without_keys = out.masked_fill(~empty.expand(BATCH, HEADS, n).unsqueeze(-1), 0.0)
        advice = "a softmax over nothing is NaN, and over -1e9 everywhere a mean: return 0 there"
        close(f"{where}: the output without any key", without_keys, torch.zeros_like(without_keys), 0.0, advice)
        for tensor in (out, *gradients(out, live(inputs))):
            advice = "a NaN behind torch.where still has a NaN gradient"
            close(f"{where}: output or gradient in the same batch", tensor, tensor, 0.0, advice)


@needs("every_length")
def padding_is_invisible(subject: Subject) -> None:
    """What stands under padding changes nothing, and gets no gradient

    Put a large number at one padded position (`k[0, :, -1] = 1e3`) and see which outputs move.
    """
    n = 31
    valid = padding(n)
    for where, core in subject.cores():
        inputs = draw(core, n, Mask(valid))
        noise = [
            None if x is None else torch.where(valid[:, None, :, None], x, 7 * torch.randn_like(x)) for x in inputs
        ]
        out, other = core(*inputs, mask=Mask(valid)), core(*noise, mask=Mask(valid))
        advice = (
            "mask.valid is False at padding; no query may attend there, and no sum or mean over the sequence "
            "may include it"
        )
        under = ~valid[:, None, :, None]
        seen, wanted = other.masked_fill(under, 0.0), out.masked_fill(under, 0.0)
        if not torch.isfinite(wanted).all():  # of which empty_queries_are_zero speaks
            continue
        close(f"{where}: output at tokens after other values were put under the padding", seen, wanted, 1e-12, advice)
        if not torch.isfinite(out).all():
            continue
        for name, grad in zip(core.uses(Mask(valid)), gradients(out, live(inputs), at=valid), strict=False):
            hidden = grad.masked_fill(~under, 0.0)
            close(f"{where}: gradient of {name} under padding", hidden, torch.zeros_like(hidden), 0.0, advice)


@needs("every_length")
def ragged_equals_alone(subject: Subject) -> None:
    """A sequence in a padded batch gives what it gives alone

    Compare `core(x[:1, :, :16], mask=Mask())` with the first 16 outputs of `core(x[:1], mask=Mask(arange(31) < 16))`.
    """
    lengths, n = (31, 16, 7), 31
    valid = torch.arange(n) < torch.tensor(lengths)[:, None]
    advice = (
        "blocks, scales and positions must not depend on the padded length; take them from mask.valid, "
        "max_length or an option"
    )
    for where, core in subject.cores():
        for what, is_global in (("", None), (", with global tokens", some_global(n) & valid))[
            : 1 + core.knows_globals()
        ]:
            inputs = draw(core, n, Mask(valid, is_global))
            out = core(*inputs, mask=Mask(valid, is_global))
            for row, length in enumerate(lengths):
                mask = Mask(is_global=None if is_global is None else is_global[row : row + 1, :length])
                alone = core(*cut(inputs, slice(row, row + 1), slice(length)), mask=mask)
                name = f"{where}: a sequence of {length} padded to {n}{what}"
                close(name, out[row : row + 1, :, :length], alone, 1e-10, advice)


@needs("every_length")
def rows_are_independent(subject: Subject) -> None:
    """The rows of a batch do not influence one another: a row is bit-equal whatever the values of the others

    Change row 1 of every input and compare row 0: `core(*changed, mask=mask)[0] - core(*inputs, mask=mask)[0]`.
    """
    advice = (
        "something is taken over the batch axis: a mean, a sort, a fold that mixes rows, a first row that "
        "stands for all"
    )
    for where, core in subject.cores():
        for what, given in masks(core, 31):
            inputs = draw(core, 31, Mask(**given))
            other = draw(core, 31, Mask(**given), seed=1)
            mixed = [
                None if x is None else torch.cat([x[:1], y[1:2], x[2:]]) for x, y in zip(inputs, other, strict=True)
            ]
            out, changed = core(*inputs, mask=Mask(**given)), core(*mixed, mask=Mask(**given))
            if not torch.isfinite(out).all():  # of which empty_queries_are_zero speaks
                continue
            for row in (0, 2):
                close(f"{where}{what}: row {row} after row 1 was changed", changed[row], out[row], 0.0, advice)
            for name, grad in zip(core.uses(Mask(**given)), gradients(out[:1], live(inputs)), strict=False):
                label = f"{where}{what}: the gradient of row 0 with respect to {name} of the others"
                close(label, grad[1:], torch.zeros_like(grad[1:]), 0.0, advice)


@needs("every_length")
def future_is_unseen(subject: Subject) -> None:
    """Causal: the gradient of output t with respect to inputs after t is exactly 0

    `torch.autograd.grad(out[:, :, t].sum(), v)[0].abs().amax((0, 1, 3))` is not 0 where output t depends on v.
    """
    if subject.cls.not_causal:
        try:
            subject.core(causal=True)
        except EffzooError:
            raise NotApplicable("the kind says that it cannot be causal, and refuses it") from None
        raise Failed(
            "not_causal gives a reason, yet it was built in a causal context; call "
            "super().__init__(context), which refuses"
        )
    core, n = subject.core(causal=True), 31
    for what, given in masks(core, n):
        inputs = draw(core, n, Mask(**given))
        out = core(*inputs, mask=Mask(**given))
        for t in (0, 1, 7, 8, 15, 29):
            for name, grad in zip(
                core.uses(Mask(**given)), gradients(out[:, :, t : t + 1], live(inputs)), strict=False
            ):
                later = grad[:, :, t + 1 :]
                if later.abs().max() > 0:
                    at = t + 1 + int(later.abs().amax(dim=(0, 1, 3)).argmax())
                    raise Failed(
                        f"output {t}{what} depends on {name} at {at}, {at - t} ahead; honour context.causal "
                        "(j <= i) in every part"
                    )


@needs("future_is_unseen")
def future_changes_nothing(subject: Subject) -> None:
    """Causal: outputs up to t keep their values when the inputs after t change, or end

    Compare `core(x)[:, :, :t + 1]` with `core(x[:, :, :t + 1])`: what depends on the length, or on an order of all
    positions, shows here though no gradient does.
    """
    if subject.cls.not_causal:
        raise NotApplicable("the kind cannot be causal")
    core, n = subject.core(causal=True), 31
    if core.later_values_matter:
        raise NotApplicable(f"the kind says that later values may matter: {core.later_values_matter}")
    advice = (
        "an order, a border or a statistic comes from the whole sequence, where a causal query may use only what "
        "stands before it"
    )
    for what, given in masks(core, n):
        inputs, other = draw(core, n, Mask(**given)), draw(core, n, Mask(**given), seed=1)
        out = core(*inputs, mask=Mask(**given))
        for t in (0, 1, 7, 8, 15, 29):
            mixed = [
                None if x is None else torch.cat([x[:, :, : t + 1], y[:, :, t + 1 :]], dim=2)
                for x, y in zip(inputs, other, strict=True)
            ]
            seen = core(*mixed, mask=Mask(**given))[:, :, : t + 1]
            close(
                f"outputs up to {t}{what} after the inputs behind it changed", seen, out[:, :, : t + 1], 1e-12, advice
            )
            short = {name: tensor[:, : t + 1] for name, tensor in given.items()}
            ended = core(*cut(inputs, places=slice(t + 1)), mask=Mask(**short))
            close(f"outputs up to {t}{what} when the sequence ends there", ended, out[:, :, : t + 1], 1e-12, advice)


@needs("every_length")
def global_tokens(subject: Subject) -> None:
    """Global tokens, at other places in each example, see everything and are seen; or they are refused

    Compare `core.pattern(n, mask)[:, :, query]` with the keys that forward shows; a global key in the window stands
    among the global keys as well, and must be counted once.
    """
    if not subject.cls.knows_globals():
        try:
            subject.core().check(Mask(is_global=some_global(16)))
        except EffzooError:
            raise NotApplicable("the kind says that it has no global tokens, and refuses them") from None
        raise Failed(
            "no `visible` asks for key_global, yet check(mask) let global tokens pass; leave "
            "AttentionCore.check as it is"
        )
    subject.needs_definition()
    advice = "each example has its own global tokens, given by mask.is_global; a global key in the window counts once"
    for where, core in subject.cores():
        for n in (7, 31):
            same_as_definition(core, n, f"{where} with global tokens", advice, is_global=some_global(n))
            valid = padding(n)
            name = f"{where} with global tokens and padding"
            same_as_definition(core, n, name, advice, valid=valid, is_global=some_global(n) & valid)
