"""What a method is when it is new, and that everything it trains learns, wherever it hangs."""

from __future__ import annotations

import torch

from effzoo.checks.declared import check_docstring, check_options
from effzoo.checks.models import TinyModel, logits, silent, train
from effzoo.checks.peft.subject import (
    CASES,
    REVERSIBLE,
    Subject,
    copied,
    on_every_model,
    own_tensors,
    same,
    unless_refused,
)
from effzoo.checks.runner import Failed, close, needs
from effzoo.peft.attach import base_tensors
from effzoo.registry import peft as registry


def declares_itself(subject: Subject) -> None:
    """Options are keyword-only with a type and a default, and a docstring says what is computed

    `effzoo show NAME --file FILE` prints what the class says of itself; options are the keyword-only parameters of its
    constructor.
    """
    check_options(registry, subject.cls, leading=0)
    check_docstring(subject.cls)


@on_every_model
def attaches(subject: Subject, case: TinyModel) -> None:
    """Attaches to an encoder and a decoder, with full and with windowed attention, and runs

    `effzoo.build("bert", peft=NAME, layers=2, dim=64, heads=4, mlp=128, vocab=1000)`, and call the model on a batch.
    """
    model = subject.attached(case)
    out = logits(model, case.batch())
    close("the output", out, out, 0.0, "start the new tensors from finite values")


@needs("attaches")
@on_every_model
def starts_as_identity(subject: Subject, case: TinyModel) -> None:
    """Right after attaching the output is unchanged, or the method says that it is not

    Print what the module adds at one site: `module.after(x, y, context) - y` must be 0 at the start.
    """
    before, after = logits(case.model(), case.batch()), logits(subject.attached(case), case.batch())
    if subject.identity_at_init:
        advice = (
            "start from a change of 0, as B = 0 in LoRA: of two factors one starts at zeros, a gate at 0, a factor on "
            "the output at 1; and `after` returns y with the change, not the change alone"
        )
        close("the output right after attaching", after, before, 1e-10, advice)
    elif torch.equal(before, after):
        raise Failed(
            "identity_at_init is False, yet the output is bit-identical to the base's; look whether a hook acts at "
            "all: its name, what it returns, and the sites on which it hangs"
        )


@needs("attaches")
@on_every_model
def base_is_frozen(subject: Subject, case: TinyModel) -> None:
    """After three AdamW steps with weight decay every tensor of the base is bit-identical

    Compare `effzoo.peft.attach.base_tensors(model)` before and after a step; search the hooks for in-place writes
    (`+=`, `mul_`, `.data`).
    """
    model = subject.attached(case)
    before = copied(base_tensors(model))
    thawed = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and ".adapters." not in name
    ]
    if thawed:
        raise Failed(
            f"{thawed[0]} of the base is trainable after attaching ({len(thawed)} tensors); `make` must not "
            "touch requires_grad of the site"
        )
    train(model, case.batch())
    advice = "train tensors of your own module; return changed weights, never write into them"
    same("the base after training", base_tensors(model), before, advice)


@needs("attaches")
@on_every_model
def everything_learns(subject: Subject, case: TinyModel) -> None:
    """Every trainable tensor gets a finite gradient that is not 0 within three steps

    Call loss.backward() once and print `p.grad` of each of model.named_parameters() whose name has ".adapters.".
    """
    _learns(subject, case, checkpointing=False)


@needs("everything_learns")
@on_every_model
def learns_under_checkpointing(subject: Subject, case: TinyModel) -> None:
    """The same under gradient checkpointing

    `model.gradient_checkpointing_enable()`: every hook runs twice in a step, and must compute the same both times.
    """
    _learns(subject, case, checkpointing=True)


@needs("everything_learns")
@unless_refused
def learns_in_reversible_blocks(subject: Subject) -> None:
    """The same in reversible blocks, which compute their inputs back, above frozen embeddings

    An adapter's tensor must be a parameter of the block that uses it, or its gradient is lost.
    """
    _learns(subject, REVERSIBLE, checkpointing=False)


def _learns(subject: Subject, case: TinyModel, checkpointing: bool) -> None:
    model = subject.attached(case)
    model.recompute = "blocks" if checkpointing else "nothing"
    start = copied(own_tensors(model))
    if not any(tensor.requires_grad for tensor in own_tensors(model).values()):
        raise Failed(
            "no tensor of the method is trainable, only the task head; what is trained is an nn.Parameter of the "
            "module, and `attach` sets its requires_grad"
        )
    if wrong := silent(model, train(model, case.batch())):
        raise Failed(
            f"{wrong}; look for .detach(), .data, no_grad and .item() on its way to the output, for two factors that "
            "both start at 0, and for a tensor that no hook uses"
        )
    if all(torch.equal(start[name], tensor) for name, tensor in own_tensors(model).items()):
        raise Failed(
            "no tensor of the method moved in three steps, only the task head; give the modules parameters that are "
            "trained"
        )


@needs("everything_learns")
@unless_refused
def runs_in_half_precision(subject: Subject) -> None:
    """Under bfloat16 autocast the loss is finite and near that in full precision, and every gradient is finite

    `with torch.autocast("cpu", torch.bfloat16): model(**batch)`, and print the dtypes after each line of the hook.
    """
    case = CASES[0]
    model, batch = subject.attached(case).float(), case.batch()
    exact = float(model(**batch).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    advice = "cast trained vectors to what they meet"
    close("the loss under autocast", loss.detach().double(), torch.tensor(exact).double(), 0.1 * abs(exact), advice)
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    if broken:
        raise Failed(
            f"under autocast the gradient of {broken[0]} is not finite; compute in float32 where numbers are large"
        )
