"""What has to hold before a run starts: something to train, a precision that runs here, an output folder that fits."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from effzoo.architectures import AnyModel
from effzoo.devices import on_cpu
from effzoo.errors import IncompatibleError, OptionError, TrainingError, listing
from effzoo.peft.attach import acting, attached
from effzoo.peft.manifest import MANIFEST
from effzoo.peft.training import finish, later, of_training, restart, said
from effzoo.peft.training_hooks import uses
from effzoo.sites import sites
from effzoo.train import checkpoints
from effzoo.train.record import differences

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def check_trainable(model: AnyModel) -> None:
    """TrainingError for a task without a loss, for nothing to train, and for parameters that no file would keep."""
    check_model(model)
    if model.task == "features":
        raise TrainingError(
            "a model with task='features' has no loss to train; build it with task='classification' or another task"
        )
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = attached(model)
    if not trainable:
        hint = "effzoo.attach(model, 'lora'), or model.requires_grad_(True)"
        if names:
            hint = f"effzoo.activate(model, {', '.join(map(repr, names))})"
        raise TrainingError(f"nothing to train: no parameter of the model requires a gradient; try {hint}")
    outside = [name for name in trainable if ".adapters." not in f".{name}"]
    if acting(model) and outside:
        raise TrainingError(
            f"{len(outside)} parameters outside the active adapters are trainable ({outside[0]}, ...), but only "
            "adapters are saved; freeze them, or name them in the spec with the methods 'full' or 'bitfit'"
        )


def check_model(model: Any, what: str = "model") -> None:
    """OptionError for what `effzoo.build` did not make: its task, its inputs and its loss are not known here."""
    if isinstance(model, AnyModel):
        return
    accepted = f"{what} is a model of effzoo, as effzoo.build or effzoo.convert.from_transformers returns it"
    if not isinstance(model, torch.nn.Module):
        raise OptionError(
            f"{accepted}, got {model!r:.80} ({type(model).__name__}); try effzoo.build('bert', task='classification')"
        )
    count = len(list(sites(model)))
    if count:
        advice = (
            "train it in a loop of your own, in which effzoo.peft.begin, schedule, penalty and finish do the "
            "methods' part (effzoo/peft/training.py)"
        )
    else:
        advice = "train what effzoo.convert.from_transformers(model) returns, or the model of effzoo.build"
    raise OptionError(
        f"{accepted}, got {type(model).__name__!r}, a module with {count} of effzoo's sites, whose task and inputs "
        f"are not known; {advice}"
    )


def check_precision(model: torch.nn.Module, precision: str) -> None:
    """IncompatibleError for a precision that cannot run here, or that accelerate was launched without."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" and launched != PRECISIONS[precision]:
        named = {value: key for key, value in PRECISIONS.items()}.get(launched, launched)
        raise IncompatibleError(
            f"accelerate was launched with mixed precision {launched!r}, finetune got "
            f"{precision!r}; give precision={named!r}"
        )
    on_cuda = torch.cuda.is_available() and not on_cpu()
    if precision == "float16" and not on_cuda:
        raise IncompatibleError(
            "precision='float16' scales its loss on a CUDA device, and there is none here; try precision='bfloat16'"
        )
    if precision == "bfloat16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise IncompatibleError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16; try precision='float16' or 'float32'"
        )


def check_dtypes(model: torch.nn.Module) -> None:
    """IncompatibleError for trained tensors in half precision, where small updates are rounded away.

    In bfloat16 those are updates below a 512th of a weight. An adapter that was attached with dtype=torch.bfloat16 is
    meant to be so; nothing can be trained in float16.
    """
    meant = [f".adapters.{name}." for name, attachment in attached(model).items() if attachment.dtype == torch.bfloat16]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        kind = str(parameter.dtype).removeprefix("torch.")
        if ".adapters." not in f".{name}":
            advice = f"call model.float() and give precision={kind!r}, or attach an adapter, which is float32"
        elif kind == "float16":
            advice = "call effzoo.peft.recast(model), which makes adapters float32"
        elif any(adapter in f".{name}" for adapter in meant):
            continue
        else:
            advice = (
                "call effzoo.peft.recast(model), which makes adapters float32, or attach with dtype='bfloat16' "
                "if that is meant"
            )
        raise IncompatibleError(f"{name} is trained in {kind}, where small updates vanish; {advice}")


def check_processes(seen: int) -> None:
    """TrainingError when a launcher started other processes than accelerate sees: each would train alone, into the
    same files."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != seen:
        raise TrainingError(
            f"the launcher started {launched} processes, but accelerate sees {seen}, so that each would train alone; "
            "start as many as there are devices, or set ACCELERATE_USE_CPU=true"
        )


def starting_point(directory: Path, run: dict[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to continue from, None for the beginning.

    Raises TrainingError for one that another run wrote, or that would be mixed with this one.
    """
    saved = checkpoints.whole(directory)
    if not saved or (overwrite and not resume):
        return None
    newest = saved[-1]
    if not resume:
        raise TrainingError(
            f"{directory} holds {len(saved)} checkpoints of an earlier run (the newest is {newest.name}); "
            "resume=True continues it, Saving(overwrite=True) removes them, or give another output_dir"
        )
    checkpoints.check_whole(newest)
    earlier = json.loads((newest / checkpoints.RUN).read_text())
    different = differences(earlier, json.loads(json.dumps(run)))
    if different:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise TrainingError(
            f"{newest} belongs to another run: {different[0]}{more}. Give the same, or "
            "Saving(overwrite=True) with resume=False."
        )
    if run["data"] is None:
        logging.getLogger("effzoo").warning(
            "the rows of train are read when they are asked for, so whether they are those of the earlier run is not "
            "known; give the data set an attribute `fingerprint`, a text that changes with its rows"
        )
    return newest


def rejoin(model: AnyModel, directory: Path) -> None:
    """Bring the active adapters to the state in which they were when the run in this directory began.

    The stage, and whether an adapter is finished, decide in which stages the run trains.

    Raises TrainingError for a damaged checkpoint, and for an adapter that has lost what the run needs.
    """
    newest = next(reversed(checkpoints.whole(directory)), None)
    if newest is not None:
        checkpoints.check_whole(newest)
    for name, folder in {} if newest is None else checkpoints.adapters(model, newest).items():
        attachment = attached(model)[name]
        try:
            content = json.loads((folder / MANIFEST).read_text())
            was_finished, begun = bool(content.get("finished", False)), dict(content.get("begun") or {})
        except (OSError, ValueError, AttributeError):
            continue  # no adapter, or a damaged one: whoever loads it says so
        if ahead := later(attachment, begun):
            raise TrainingError(
                f"{newest} is in {said(begun)}, but the adapter {name!r} of this model is in {said(ahead)} already, "
                "and has dropped what the run needs; build the model and attach the adapter anew to resume, or give "
                "another output_dir to train what is left"
            )
        if was_finished:
            finish(model, name)
        elif attachment.finished:
            changed = [method.name for method in of_training(attachment) if method.stages or uses(method, "finish")]
            if changed:
                raise TrainingError(
                    f"{newest} is in the middle of its training, but the adapter {name!r} of this model is finished: "
                    f"{listing(changed)} dropped what training needs; build the model and attach the adapter anew to "
                    "resume, or give another output_dir to train what is left"
                )
            attachment.finished = False
    if newest is not None:
        stages = json.loads((newest / checkpoints.RUN).read_text()).get("stages", ())
        for first in list(stages)[:1]:
            restart(model, first)
