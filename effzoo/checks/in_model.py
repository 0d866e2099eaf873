"""What an attention kind must hold inside a model: every hook of fine-tuning works through it, also checkpointed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from effzoo.checks.models import TinyModel, last_block_at_two_positions, silent, train
from effzoo.checks.runner import Check, Failed, NotApplicable, close, needs
from effzoo.checks.subject import Subject
from effzoo.peft import attach

METHODS = {
    "lora": "lora[rank=4]", "prefix": "prefix[length=4]", "prompt": "prompt[length=4]",
    "houlsby": "houlsby[bottleneck=4]", "ia3": "ia3", "bitfit": "bitfit",
}  # fmt: skip


def cases(subject: Subject) -> Iterator[TinyModel]:
    """The kind in an encoder and, where it can be causal, in a decoder."""
    for architecture in ("bert",) if subject.cls.not_causal else ("bert", "gpt2"):
        yield TinyModel(architecture, str(subject.spec), subject.cls.knows_globals())


def _trains(method: str, spec: str) -> Check:
    @needs("every_length")
    def check(subject: Subject) -> None:
        if method == "prefix" and not subject.cls.takes_memory():
            raise NotApplicable("the kind takes no memory")
        for case in cases(subject):
            for checkpointing in (False, True):
                model = attach(case.model(), spec)
                if checkpointing:
                    model.gradient_checkpointing_enable()
                if wrong := silent(model, train(model, case.batch())):
                    under = " under gradient checkpointing" if checkpointing else ""
                    raise Failed(
                        f"{case}, {method}{under}: {wrong}; does the output depend on every projection, differentiably?"
                    )

    check.__name__ = f"trains_{method}"
    check.__doc__ = (
        f"In models {method} trains: every tensor gets a finite gradient, none is 0, also under checkpointing\n\n"
        "Call loss.backward() once and print the gradients of the tensor that the reason names and of those behind it."
    )
    return check


@needs("every_length")
def checkpointing_is_exact(subject: Subject) -> None:
    """Gradient checkpointing gives the same gradients, dropout included

    Count the calls of forward on `self` and print what differs in the second one: state, random numbers of a generator
    of your own.
    """
    for case in cases(subject):
        gradients = []
        for checkpointing in (False, True):
            model = case.model(dropout=0.1).train()
            model.recompute = "blocks" if checkpointing else "nothing"
            torch.manual_seed(11)
            model(**case.batch()).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        for name, grad in gradients[0].items():
            again = gradients[1].get(name)
            if again is None:
                raise Failed(f"{case}: {name} has a gradient without checkpointing and none with it")
            advice = "a forward pass that runs twice must compute the same: keep no state in it"
            close(f"{case}: the gradient of {name}", again, grad, 1e-12, advice)


@needs("every_length")
def positions_computed_alone(subject: Subject) -> None:
    """Computed at a few positions alone, the output is that of `forward` there

    The last block leaves out what a classification head does not read: compare `forward_at` and `forward` at a query.
    """
    for case in cases(subject):
        alone, among = last_block_at_two_positions(case.model(), case.batch())
        advice = "`forward_at` is `forward` at the positions `wanted`; without it all are computed"
        close(f"{case}: the output at a few positions", alone, among, 1e-10, advice)


CHECKS: tuple[Check, ...] = (
    *(_trains(method, spec) for method, spec in METHODS.items()),
    checkpointing_is_exact,
    positions_computed_alone,
)
