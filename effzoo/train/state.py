"""How a run begins, from nothing or from a checkpoint, and how its checkpoints are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from effzoo.errors import TrainingError
from effzoo.peft import training
from effzoo.train import checkpoints
from effzoo.train.gradients import check_finite
from effzoo.train.randomness import random_state, set_random_state
from effzoo.train.record import name_of

if TYPE_CHECKING:
    from effzoo.train.loop import Loop


def begin(loop: Loop, start: Path | None) -> None:
    """Calibrate and begin the first stage, or take everything from a checkpoint."""
    setup, model, processes = loop.setup, loop.model, loop.processes
    if loop.saving.trackers:
        processes.begin_tracking(setup.output_dir.name, loop.record)
    set_seed(setup.seed)
    if loop.teaching is not None:
        loop.teaching.teacher.to(loop.device)
    if start is None and any(training.hooked(model, "calibrate")):
        model.to(loop.device)  # all processes see the same batches and draw the same numbers
        training.calibrate(model, setup.first_batches(loop.device))
    processes.place(model)
    if start is None:
        loop.enter(loop.span)
    if processes.index:
        torch.manual_seed(setup.seed + processes.index)  # dropout differs between processes
    if start is not None:
        _resume(loop, start)


def save(loop: Loop) -> Path:
    """Write a checkpoint, and remove those that do not stay. Raises TrainingError for a weight that is no number."""
    check_finite(loop.model, loop.step, loop.measured.advice())
    directory, state = loop.setup.output_dir, _state(loop)
    kept = {"history": loop.history, "callbacks": [[name_of(type(each)), each.state()] for each in loop.callbacks]}
    if loop.main:
        with checkpoints.writing(directory, loop.step) as folder:
            checkpoints.save_weights(loop.model, folder)
            checkpoints.write_state(folder, state)
            (folder / checkpoints.HISTORY).write_text(json.dumps(kept))
            (folder / checkpoints.RUN).write_text(json.dumps(loop.record, indent=1))
        checkpoints.rotate(directory, loop.saving.keep, loop.measured.best())
    elif loop.processes.sharded:  # whose rows the first process writes
        checkpoints.save_weights(loop.model, directory)
        checkpoints.write_state(directory, state, first=False)
    loop.processes.wait()
    return checkpoints.named(directory, loop.step)


def _resume(loop: Loop, checkpoint: Path) -> None:
    """Take the weights, the optimizer, the history, the place in the data and the random state of a checkpoint.

    Raises TrainingError where it trained other parameters.
    """
    loop.step = checkpoints.step_of(checkpoint)
    for span in loop.stages:  # at a boundary the next stage has not begun
        if span.start < loop.step:
            training.begin(loop.model, span.stage)
            loop.span = span
    checkpoints.load_weights(loop.model, checkpoint)
    loop.enter(loop.span)
    kept = checkpoints.read_history(checkpoint)
    loop.measured.go_on(loop.step, kept["history"])
    states = list(kept["callbacks"])
    for callback in loop.callbacks:  # they may be others
        if found := next((pair for pair in states if pair[0] == name_of(type(callback))), None):
            states.remove(found)
            callback.load(found[1])
    parameters = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    state, names = checkpoints.read_state(checkpoint, parameters), _parameter_names(loop)
    if state["parameters"] != names:
        different = sorted(set(state["parameters"]) ^ set(names)) or ["their order"]
        raise TrainingError(
            f"{checkpoint} trained other parameters than this run would; the first difference is {different[0]}"
        )
    loop.batches.go_to(*state["read"])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.schedule.load_state_dict(state["scheduler"])
    loop.scaler.load_state_dict(state["scaler"])
    if len(state["random"]) == loop.processes.number:  # else the run goes on with fresh dropout, as finetune says
        set_random_state(state["random"][loop.processes.index], loop.device)


def _state(loop: Loop) -> dict[str, Any]:
    return {
        "parameters": _parameter_names(loop),
        "read": (loop.batches.epoch, loop.batches.done),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.schedule.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "random": loop.processes.gathered(random_state(loop.device)),
    }


def _parameter_names(loop: Loop) -> list[str]:
    names = {id(parameter): name for name, parameter in loop.model.named_parameters()}
    return [names[id(parameter)] for group in loop.optimizer.param_groups for parameter in group["params"]]
