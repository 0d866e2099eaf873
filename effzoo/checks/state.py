"""What an attention kind keeps and draws between calls: nothing; dropout in training; copies, compilation, devices."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from effzoo.attention.core import AttentionCore, Mask
from effzoo.attention.predicate import PredicateAttention
from effzoo.checks.runner import Failed, close, needs
from effzoo.checks.subject import BATCH, HEADS, WIDTH, Subject, draw, gradients, live, masks, padding, some_global

DROPOUT = 0.25


@needs("every_length")
def evaluation_draws_nothing(subject: Subject) -> None:
    """In evaluation the output is the same every time and torch's random state is untouched

    Call the core twice and compare; `torch.get_rng_state()` before and after shows which call draws.
    """
    for where, core in subject.cores():
        inputs, before = draw(core, 31, Mask()), torch.get_rng_state()
        first, second = core(*inputs, mask=Mask()), core(*inputs, mask=Mask())
        advice = (
            "dropout acts in evaluation (pass self.dropout, which is 0 there), or a number is drawn anew in each call: "
            "draw it once, in the constructor, into a buffer"
        )
        close(f"{where}: a second call", second, first, 0.0, advice)
        if not torch.equal(before, torch.get_rng_state()):
            raise Failed(
                f"{where}: the forward pass moved torch's global random state; use a torch.Generator of your own"
            )


@needs("evaluation_draws_nothing")
def calls_leave_nothing(subject: Subject) -> None:
    """A call leaves nothing behind: not in the core, and in the mask that layers share only what is true of the batch

    Run two inputs through one core, or two cores with one Mask, and compare with a fresh core and a fresh Mask; look
    for what is stored on
    `self`, and for keys of mask.memo that leave out what the value depends on (dtype, window, n).
    """
    for where, core in subject.cores():
        for what, given in masks(core, 31):
            inputs, other = draw(core, 31, Mask(**given)), draw(core, 31, Mask(**given), seed=1)
            expected = subject.core(causal=core.context.causal)(*inputs, mask=Mask(**given))
            if not torch.isfinite(expected).all():  # of which empty_queries_are_zero speaks
                continue
            core(*draw(core, 64, Mask()), mask=Mask())
            core(*other, mask=Mask(**given))
            got = core(*inputs, mask=Mask(**given))
            advice = "keep nothing of a call on self"
            close(f"{where}{what}: the output after calls with other inputs", got, expected, 0.0, advice)
            shared = Mask(**given)
            second = subject.core(causal=core.context.causal, layer=1)
            alone = [second(*other, mask=Mask(**given)), expected]
            together = [second(*other, mask=shared), core(*inputs, mask=shared)]
            advice = (
                "mask.memo is shared by all layers: its key must name everything that the value depends on, and "
                "no input of one layer"
            )
            for layer, (got, wanted) in enumerate(zip(together, alone, strict=True)):
                close(f"{where}{what}: layer {1 - layer} with the mask of another layer", got, wanted, 0.0, advice)
            single = copy.deepcopy(core).float()(*(None if x is None else x.float() for x in inputs), mask=shared)
            if single.dtype != torch.float32:
                raise Failed(
                    f"{where}{what}: {single.dtype} came out of float32 after float64 with the same mask; put the "
                    "dtype into the key of memo"
                )


@needs("every_length")
def decisions_are_replayed(subject: Subject) -> None:
    """A second computation from inputs that moved a little takes the same discrete decisions, as reversible blocks need
    it

    `mask = Mask(decisions={})`, then call the core twice with inputs that differ by 1e-3: what is chosen by argmax,
        sort or a threshold of inputs must come from `mask.decide(key, make)`, with the layer in its key.
    """
    for where, core in subject.cores():
        inputs, direction = draw(core, 64, Mask()), draw(core, 64, Mask(), seed=2)
        weight, mask = torch.randn(BATCH, HEADS, 64, WIDTH, dtype=torch.float64), Mask(decisions={})

        def total(
            move: float,
            core: AttentionCore = core,
            start: Any = inputs,
            way: Any = direction,
            weight: Any = weight,
            mask: Any = mask,
        ) -> Tensor:
            moved = [None if x is None else x + move * y for x, y in zip(start, way, strict=True)]
            return (core(*moved, mask=Mask(decisions=mask.decisions)) * weight).sum()

        grads = torch.autograd.grad(total(0.0), live(inputs), allow_unused=True)
        slope = sum(
            (grad * way).sum().item() for grad, way in zip(grads, live(direction), strict=True) if grad is not None
        )
        seen = (total(1e-3).item() - total(-1e-3).item()) / 2e-3
        if abs(seen - slope) > 0.01 * (10 + abs(slope)):
            what = f"between inputs 0.002 apart the output moves with slope {seen:.2f}, its gradient is {slope:.2f}"
            raise Failed(
                f"{where}: {what}; a discrete choice was taken anew and came out differently: take it "
                "through mask.decide"
            )


@needs("every_length")
def dropout_only_in_training(subject: Subject) -> None:
    """Dropout acts on the attention weights in training and not in evaluation

    `core.train()` and `core.eval()` with dropout 0.5 in the context; `self.dropout` is the probability that holds now.
    """
    for causal in (False, True) if not subject.cls.not_causal else (False,):
        plain, dropping = subject.core(causal=causal), subject.core(causal=causal, dropout=0.5)
        inputs = draw(plain, 31, Mask())
        expected = plain(*inputs, mask=Mask())
        advice = "dropout acts in evaluation too: use self.dropout, which is 0 there, not self.context.dropout"
        close("with dropout 0.5 in evaluation, the output", dropping(*inputs, mask=Mask()), expected, 1e-10, advice)
        dropping.train()
        if torch.allclose(dropping(*inputs, mask=Mask()), expected):
            raise Failed(
                "with dropout 0.5 in training, the output is that of evaluation; call self.attend(...), or "
                "pass self.dropout on"
            )


@needs("dropout_only_in_training", "rows_are_independent")
def dropout_keeps_the_mean(subject: Subject) -> None:
    """Dropout acts once, on the weights, and keeps the mean: zeros come with the given probability, the rest is scaled
    up

    With `v = torch.eye(8)` and 8 positions the output is the attention weights: in training each is 0 or weight / (1 -
    p).
    """
    for causal in (False, True) if not subject.cls.not_causal else (False,):
        core = subject.core(causal=causal, dropout=DROPOUT)
        where = "causal" if causal else "bidirectional"
        _mean(core, where)
        if subject.has_pattern and _counts_once(core):
            _weights(core, where)


def _counts_once(core: AttentionCore) -> bool:
    """Whether no key counts several times for a query: each of the times may be dropped by itself."""
    if not isinstance(core, PredicateAttention):
        return True
    return bool((core.seen_at(torch.arange(WIDTH)[None], WIDTH, Mask()).int() <= 1).all())


def _mean(core: AttentionCore, where: str, draws: int = 400) -> None:
    """The mean over many draws, one per example, points along the output of evaluation, which itself is not dropped."""
    n = 31
    inputs = [
        None if x is None else x.detach().expand(draws, -1, -1, -1).contiguous() for x in draw(core, n, Mask(), batch=1)
    ]
    expected = core.eval()(*(None if x is None else x[:1] for x in inputs), mask=Mask()).detach()
    out = core.train()(*inputs, mask=Mask()).detach()
    core.eval()
    share = float((out.mean(dim=0, keepdim=True) * expected).sum() / expected.square().sum())
    if abs(share - 1) > 0.08:
        cause = "the weights that are kept are divided by 1 - p once, by F.dropout; nothing else may scale them"
        raise Failed(
            f"{where}: with dropout {DROPOUT} the mean over {draws} draws is {share:.3f} times the output of "
            f"evaluation; {cause}"
        )
    middle, there = out[:, :, n // 2], expected[:, :, n // 2] != 0  # a query that sees many keys, or none in some heads
    zeros = float(((middle == 0) & there).sum() / (there.sum() * draws).clamp(min=1))
    if zeros > DROPOUT / 2:
        cause = "dropout belongs on the attention weights alone, not on the output; the block drops that"
        raise Failed(
            f"{where}: with dropout {DROPOUT} a share of {zeros:.3f} of the output at {n // 2} is exactly 0; {cause}"
        )


def _weights(core: AttentionCore, where: str, draws: int = 200) -> None:
    """With one-hot values the output is the weights: which of them are 0 in training, and what the others are."""
    inputs = [x.detach().expand(draws, -1, -1, -1).contiguous() for x in live(draw(core, WIDTH, Mask(), batch=1))]
    names = core.uses(Mask())
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(draws, HEADS, -1, -1)
    values = [eye if core.projections[name] == "value" else x for name, x in zip(names, inputs, strict=True)]
    filled = [dict(zip(names, values, strict=True)).get(name) for name in core.projections]
    weights, dropped = core.eval()(*filled, mask=Mask()).detach(), core.train()(*filled, mask=Mask()).detach()
    core.eval()
    there = weights > 1e-12
    if not there.any():  # in so short a sequence, no query sees a key
        return
    kept = there & (dropped != 0)
    advice = (
        "it must be weight / (1 - p): dropout acts on the softmax, before the values, once and with p = self.dropout"
    )
    what = f"{where}: an attention weight that dropout {DROPOUT} kept"
    close(what, torch.where(kept, dropped * (1 - DROPOUT), 0.0), torch.where(kept, weights, 0.0), 1e-10, advice)
    share = 1 - float(kept.sum() / there.sum())
    bound = 6 * (DROPOUT * (1 - DROPOUT) / float(there.sum())) ** 0.5
    if abs(share - DROPOUT) > bound:
        cause = (
            f"dropout acts twice (that would give {1 - (1 - DROPOUT) ** 2:.3f}), or with another probability "
            "than self.dropout"
        )
        raise Failed(
            f"{where}: with dropout {DROPOUT} a share of {share:.3f} +- {bound:.3f} of the weights is dropped; {cause}"
        )


@needs("evaluation_draws_nothing")
def copies_are_equal(subject: Subject) -> None:
    """State-dict round trip, deep copy and pickle give the same output bit for bit, and share nothing

    Build two cores under different seeds, `second.load_state_dict(first.state_dict())`, and compare `vars(first)` with
    `vars(second)`.
    """
    for where, core in subject.cores():
        with torch.no_grad():
            for parameter in core.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        inputs = draw(core, 31, Mask())
        expected = core(*inputs, mask=Mask())
        fresh = subject.core(causal=core.context.causal, seed=1234)
        fresh.load_state_dict(core.state_dict())
        advice = (
            "make what is drawn a parameter or a persistent buffer, or draw it from a generator with a seed of its own"
        )
        close(f"{where}: a fresh core with this state dict", fresh(*inputs, mask=Mask()), expected, 0.0, advice)
        other = copy.deepcopy(core)
        outside = "hold no reference to tensors outside the module"
        close(f"{where}: a deep copy", other(*inputs, mask=Mask()), expected, 0.0, outside)
        originals = {tensor.data_ptr() for tensor in core.state_dict().values()}
        if shared := [name for name, own in other.state_dict().items() if own.numel() and own.data_ptr() in originals]:
            raise Failed(
                f"{where}: a deep copy shares {shared[0]} with the original; keep tensors as parameters or buffers"
            )
        restored = type(core).__new__(type(core))
        try:
            state = pickle.loads(pickle.dumps(vars(core)))  # the state alone: a class of your file has no address
            restored.__setstate__(state)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise Failed(
                f"{where}: pickling failed with {error}; keep lambdas, local functions and generators off self"
            ) from error
        close(f"{where}: a pickled core", restored(*inputs, mask=Mask()), expected, 0.0, advice)


@needs("every_length")
def compiles(subject: Subject) -> None:
    """torch.compile(fullgraph=True) gives the same output and gradients to 1e-10, with padding and global tokens

    `TORCH_LOGS=graph_breaks` shows the line that breaks the graph: `.item()`, `bool(tensor)`, shapes that depend on
        values.
    """
    n = 31
    for where, core in subject.cores():
        what, given = list(masks(core, n))[-1]  # the richest
        inputs = draw(core, n, Mask(**given))
        expected = core(*inputs, mask=Mask(**given))

        def run(*tensors: Tensor | None, core: AttentionCore = core, given: Any = given) -> Tensor:
            return core(*tensors, mask=Mask(**given))

        torch._dynamo.reset()
        try:
            with _importable(type(core)):
                out = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)(*inputs)
            compiled = (out, *gradients(out, live(inputs), again=False))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise Failed(
                f"{where}{what}, n = {n}: {reason}; forward must be one graph: no value of a tensor in Python, no "
                "shape that depends on one"
            ) from error
        finally:
            torch._dynamo.reset()
        for tensor, wanted in zip(compiled, (expected, *gradients(expected, live(inputs))), strict=True):
            advice = "write into no tensor that is used again"
            close(f"{where}{what}, n = {n}: the compiled output or a gradient", tensor, wanted, 1e-10, advice)


@contextmanager
def _importable(cls: type[AttentionCore]) -> Iterator[None]:
    """Inside the block the module of a class can be imported, which the compiler does.

    A file that was run is in no place where it could be found.
    """
    absent = cls.__module__ not in sys.modules
    if absent:
        sys.modules[cls.__module__] = types.ModuleType(cls.__module__)
        vars(sys.modules[cls.__module__]).update(cls.forward.__globals__)
    try:
        yield
    finally:
        if absent:
            del sys.modules[cls.__module__]


@contextmanager
def _autocast_on(device: str) -> Iterator[None]:
    """Inside the block `torch.autocast(q.device.type, ...)` can be written for a device that has none, as meta."""
    plain = torch.autocast.__init__

    def of(self: Any, device_type: str, *arguments: Any, **options: Any) -> None:
        plain(self, "cpu" if device_type == device == "meta" else device_type, *arguments, **options)

    with mock.patch.object(torch.autocast, "__init__", of):
        yield


@needs("every_length")
def devices(subject: Subject) -> None:
    """Everything is made on the device of the inputs: it runs on meta, and on CUDA where there is one

    Search the file for torch.arange, zeros, ones, full, tensor and eye without `device=q.device`.
    """
    names = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
    for where, core in subject.cores():
        n, valid = 31, padding(31)
        for device in names:
            # on meta no kind can know how many global tokens there are
            is_global = some_global(n) & valid if subject.cls.knows_globals() and device != "meta" else None
            mask = Mask(valid.to(device), None if is_global is None else is_global.to(device))
            inputs = [
                None if x is None else x.detach().to(device).requires_grad_()
                for x in draw(core, n, Mask(valid, is_global))
            ]
            try:
                with _autocast_on(device):
                    out = subject.core(causal=core.context.causal).to(device)(*inputs, mask=mask)
                    grads = gradients(out, live(inputs))
            except (RuntimeError, NotImplementedError) as error:
                reason = f"{where}, on {device}: {' '.join(str(error).split())[:300].rstrip('.!')}"
                raise Failed(f"{reason}; make every tensor with device=q.device") from error
            if out.device.type != device:
                raise Failed(
                    f"{where}: the output for inputs on {device} is on {out.device}; make every tensor with "
                    "device=q.device"
                )
            if device == "cuda":
                on_cpu = draw(core, n, Mask(valid, is_global))
                expected = core(*on_cpu, mask=Mask(valid, is_global))
                for found, wanted in zip((out, *grads), (expected, *gradients(expected, live(on_cpu))), strict=True):
                    advice = "do the same arithmetic on every device"
                    close(f"{where}: output or gradient on CUDA", found.cpu(), wanted, 1e-10, advice)
