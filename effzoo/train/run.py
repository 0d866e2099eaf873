"""`finetune`: train a model, or only its active adapters, on tokenised examples."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from effzoo.architectures import Transformer
from effzoo.errors import OptionError
from effzoo.peft.attach import acting
from effzoo.peft.state import noted, transition
from effzoo.peft.training import finish, first_final_step, hooked, learning, learning_rates
from effzoo.recompute import Level, check_level, spare
from effzoo.sites import unwrap
from effzoo.train import checkpoints
from effzoo.train.batches import Counting, First, Loader, Order, Pad
from effzoo.train.distillation import PARTS, Distillation
from effzoo.train.examples import Collated, Examples, Raw, accepted, examples, fits_teacher, sized
from effzoo.train.gradients import Untouched, check_finite
from effzoo.train.parts import parts, used
from effzoo.train.preconditions import (
    SCHEDULES,
    check_dtypes,
    check_model,
    check_precision,
    check_processes,
    check_trainable,
    on_cpu,
    rejoin,
    starting_point,
)
from effzoo.train.record import adapters, name_of, of_model
from effzoo.train.settings import (
    LARGEST,
    callbacks_of,
    called,
    flag,
    folder,
    number,
    number_or_none,
    one_of,
    warmup_of,
    whole,
    whole_or_none,
)
from effzoo.train.settings import steps as steps_of
from effzoo.train.teaching import Teaching, fingerprint

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from effzoo.train.trainer import ExactTrainer

_LOGGED = ("step", "epoch", "stage", "loss", *(f"loss_{part}" for part in PARTS), "learning_rate", "grad_norm")
_SPEED = ("_runtime", "_per_second", "_preparation_time")  # ends of the names of Trainer's own measurements


@dataclass(frozen=True)
class Result:
    """What a run gave.

    metrics: the last evaluation (the best one's when `best` was given) and train_loss, the mean over all steps.
    history: one entry per logged step: step, epoch, loss (mean since the entry before), learning_rate (the largest),
        grad_norm, eval_*, and stage, to which the steps since the entry before belong, when the methods train in
        stages; with a teacher also the parts of the loss without their weights, loss_labels, loss_logits, ....
    seconds: of this call.
    peak_memory: bytes; what the allocator held on CUDA during the call, elsewhere the resident set of this process
        since it started.
    last, best: checkpoints.
    weights: the adapter's folder (several adapters: a folder that holds one each), or model.safetensors when all
        parameters were trained.
    untouched: the trained tensors that got no gradient in this call, or only zeros; false when there is none, and as
        text a sentence with their share, and with what the run was too short to tell.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    seconds: float
    peak_memory: int
    last: Path | None
    best: Path | None
    weights: Path
    untouched: Untouched = field(default_factory=Untouched)

    @property
    def adapter(self) -> Path | None:
        """The folder for `load_adapter`, when an adapter was trained."""
        return self.weights if self.weights.name == checkpoints.ADAPTER else None


def finetune(
    model: Transformer,
    train: Any,
    *,
    evaluate: Any = None,
    output_dir: str | Path,
    epochs: float = 3.0,
    max_steps: int | None = None,
    batch_size: int = 8,
    eval_batch_size: int | None = None,
    gradient_accumulation: int = 1,
    learning_rate: float | None = None,
    teacher: Transformer | None = None,
    distillation: Distillation | Mapping[str, Any] | None = None,
    weight_decay: float = 0.01,
    warmup: float | int = 0.06,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    clip: float | None = 1.0,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    calibration_batches: int = 8,
    seed: int = 0,
    evaluate_every: int | Literal["epoch"] | None = "epoch",
    save_every: int | Literal["epoch"] | None = "epoch",
    keep: int | None = 2,
    best: str | None = None,
    log_every: int = 10,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    gradient_checkpointing: bool = False,
    recompute: Level = "hidden",
    group_by_length: bool = False,
    num_workers: int = 0,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    metrics: Callable[[Any], Mapping[str, float]] | None = None,
) -> Result:
    """Train the active adapters of a model, or all its parameters when it has none, with AdamW; write checkpoints and
    the result to output_dir.

    train, evaluate: tokenised examples, as a `datasets.Dataset`, a list of mappings or any map-style data set:
        input_ids, labels (or label), optionally attention_mask, token_type_ids, global_attention_mask. Rows are
        padded to the longest of their batch. epochs, or max_steps: how long.
    eval_batch_size: None is batch_size.
    batch_size: examples per process and forward pass. An optimizer step sees batch_size * gradient_accumulation *
        processes examples; its loss is the mean over all their labels, however they are spread.
    learning_rate: None is each method's own (`effzoo.peft.learning_rates(model)`), and 5e-5 for all parameters; a
        given one is multiplied by the factors that a method has for some of its tensors.
    warmup: steps (int) or a share of all steps (float below 1), then the schedule.
    clip: the largest norm of the gradient, None for no limit.
    teacher: a trained model with the same task, labels and vocabulary, from which the model learns beside its
        labels.
    distillation: how (`effzoo.train.Distillation`, or a mapping such as `{"logits": 0.9, "labels": 0.1,
        "temperature": 2.0}`). The teacher is put in evaluation mode on the device of the training, and is neither
        trained nor saved. Evaluations measure the labels' loss alone.
    calibration_batches: how many batches of batch_size training examples methods see that choose by looking at data
        (FISH masks, ...), before the first step; the same in every process.
    precision: of the forward pass; weights stay as they are.
    evaluate_every, save_every: optimizer steps, "epoch", or None. Both also happen at the end, unless save_every is
        None.
    keep: how many checkpoints stay (None: all).
    best: the evaluation metric ("loss", "accuracy", ...) by which a best checkpoint is kept besides, and loaded at
        the end; each evaluation then writes a checkpoint. What training has not brought to its final form (an
        earlier stage, a network that is not pruned yet) is not among them.
    resume: continue from the newest checkpoint in output_dir, if there is one, to the same losses. The model's
        function with its dropouts, the rows of train and every setting that changes a number must be those of that
        run, its steps too (the schedule spans them all). Free are progress, keep, save_every, evaluate_every,
        log_every, eval_batch_size, num_workers, gradient_checkpointing, recompute, callbacks and, without `best`,
        whether there is an evaluation; output_dir may be moved. Of data whose rows are read only when asked for, its
        length and an attribute `fingerprint` are compared; of a collator, its name.
    overwrite: remove the checkpoints of an earlier run.
    recompute: what is computed again for the backward pass instead of kept, to the same bits: "nothing"; "hidden",
        outputs of norms and activations and hidden units of frozen feed-forwards; "blocks", all but the input of
        each block. gradient_checkpointing=True is "blocks". Of the last block, only the positions are computed that
        the head reads.
    group_by_length: batches of similar lengths, to save padding.
    collator: list of examples -> batch, instead of padding.
    callbacks: of transformers (their `model` holds this one as `.model`).
    metrics: called with `(logits, labels)` of the whole evaluation (a transformers.EvalPrediction), returns numbers
        by name. Loss, and accuracy (classification) or perplexity (language models), are computed in any case;
        without `metrics` no logits are kept.

    Methods take part as in the loop of `effzoo/peft/training.py`. Stages share all steps, and in each the optimizer,
    the warmup and the schedule start anew; an adapter that is in one already, as `load_adapter` gave it, goes on there.
    At the end the adapter is finished: checkpoints hold it as it was before, and are resumed with a freshly attached
    one, or with the one that was given then. Trained once more, a finished adapter keeps what it has chosen, and what
    is left is trained in one stage.

    Several processes: start the script with `accelerate launch`; without GPUs as
    `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train.py`, because with `--cpu` accelerate
        1.15 starts a single process whatever --num_processes says. They need one file system. Sets the global random
        seed, and
    leaves the model on the device where it was trained. With another number of processes, batch_size or
    gradient_accumulation, while their product stays, a run resumes with the same batches, but other dropout masks.

    A trained tensor that the loss does not reach is named, after the first step and at the end, with its share of what
    is trained.

    Raises InputError (data that the model cannot read or would read wrongly), OptionError, IncompatibleError (a
        precision that cannot run here), TrainingError (nothing to train, nothing that is trained has a gradient, a
        checkpoint of another run, a loss or a weight that is not a number), AdapterError.
    """
    model = unwrap(model)
    check_trainable(model)
    epochs = number("epochs", epochs, "a positive number", lambda x: x > 0)
    max_steps, keep = whole_or_none("max_steps", max_steps, least=1), whole_or_none("keep", keep, least=1)
    batch_size = whole("batch_size", batch_size, least=1)
    eval_batch_size = whole_or_none("eval_batch_size", eval_batch_size, least=1) or batch_size
    gradient_accumulation = whole("gradient_accumulation", gradient_accumulation, least=1)
    calibration_batches = whole("calibration_batches", calibration_batches, least=1)
    log_every = whole("log_every", log_every, least=1)
    num_workers = whole("num_workers", num_workers, least=0, most=1024)
    seed = whole("seed", seed, least=0, most=2**32 - 1)
    learning_rate = number_or_none(
        "learning_rate", learning_rate, "a number above 0, or None for each method's own", lambda x: x > 0
    )
    weight_decay = number("weight_decay", weight_decay, "a number of at least 0", lambda x: x >= 0)
    clip = number_or_none(
        "clip", clip, "the largest norm of the gradient, above 0, or None for no limit", lambda x: x > 0
    )
    warmup, schedule = warmup_of(warmup), one_of("schedule", schedule, SCHEDULES)  # type: ignore[assignment]
    evaluate_every, save_every = steps_of("evaluate_every", evaluate_every), steps_of("save_every", save_every)  # type: ignore[assignment]
    for name, given in (
        ("resume", resume),
        ("overwrite", overwrite),
        ("progress", progress),
        ("group_by_length", group_by_length),
    ):
        flag(name, given)
    flag("gradient_checkpointing", gradient_checkpointing)
    collator, metrics, callbacks = called("collator", collator), called("metrics", metrics), callbacks_of(callbacks)
    output_dir = folder("output_dir", output_dir)
    check_precision(model, precision)
    check_dtypes(model)
    check_level(recompute if isinstance(recompute, str) else repr(recompute))
    if best is not None and not isinstance(best, str):
        raise OptionError(f"best is the name of a metric, such as 'loss', or None, got {best!r}")
    if best is not None and evaluate is None:
        raise OptionError(f"best={best!r} needs evaluations to choose by; give evaluate")
    if distillation is not None and teacher is None:
        raise OptionError("distillation says how a model learns from a teacher, and there is none; give teacher")
    if teacher is not None:
        check_model(teacher, "teacher")
    teaching = None if teacher is None else Teaching(model, teacher, Distillation.of(distillation))
    data = _prepare(train, model, "train", collator)
    lengths = data.lengths
    if teacher is not None and lengths is not None:
        fits_teacher(lengths, teacher)
    held_out = None if evaluate is None else _prepare(evaluate, model, "evaluate", collator)
    if group_by_length and lengths is None:
        raise OptionError(
            "group_by_length needs the length of every example; give a list or a datasets.Dataset, and no collator"
        )

    from accelerate import PartialState  # these import transformers, which takes seconds
    from transformers import TrainingArguments

    from effzoo.train.trainer import ExactTrainer

    here = PartialState(cpu=on_cpu())
    index, processes = here.process_index, here.num_processes
    check_processes(processes)
    steps_per_epoch = math.ceil(len(data) / (batch_size * gradient_accumulation * processes))
    total = max_steps or math.ceil(epochs * steps_per_epoch)
    if total > LARGEST:
        raise OptionError(
            f"epochs={epochs!r} of {steps_per_epoch:,} steps are more than {LARGEST:,} steps; train shorter"
        )
    # a refused run leaves the adapters in the stage that they were in
    with transition(model, *acting(model)) if resume else nullcontext():
        if resume:
            rejoin(model, output_dir)
        if learning_rate is None and not acting(model):
            learning_rate = 5e-5
        planned = parts(model, total, warmup)
        run = {
            "adapters": adapters(model), "examples": len(data), "steps": total, "seed": seed,
            "processes": processes, "batch_size": batch_size, "gradient_accumulation": gradient_accumulation,
            "group_by_length": group_by_length,
            **used(model, learning_rate), "weight_decay": weight_decay, "warmup": warmup, "schedule": schedule,
            "clip": clip, "precision": precision,
            "collator": name_of(collator), "data": data.digest,
            "evaluation": None if held_out is None else held_out.digest, "best": best, "model": of_model(model),
            "distillation": None if teaching is None else {**asdict(teaching.settings),
            "teacher": fingerprint(teaching.teacher)},
        }  # fmt: skip
        if any(part.stage.name for part in planned):
            run["stages"] = {part.stage.name: part.steps for part in planned}
        if any(hooked(model, "calibrate")):
            run["calibration_batches"] = calibration_batches
        largest = max(learning_rates(model, learning_rate).values(), default=learning_rate or 0.0)
        if weight_decay >= 1 and largest * weight_decay >= 1:
            raise OptionError(
                f"weight_decay={weight_decay:g} at learning rate {largest:g} takes all of every weight in one step; "
                f"give less than {1 / largest:g}"
            )
        start = starting_point(output_dir, run, resume, overwrite)
    save_steps, eval_steps = (steps_per_epoch if every == "epoch" else every for every in (save_every, evaluate_every))
    arguments = TrainingArguments(
        output_dir=str(output_dir), use_cpu=on_cpu(), bf16=precision == "bfloat16", fp16=precision == "float16",
        seed=seed, max_steps=total,
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=largest, weight_decay=weight_decay, lr_scheduler_type=SCHEDULES[schedule],
        max_grad_norm=clip or 0.0,
        warmup_steps=planned[0].warmup, logging_steps=log_every, logging_nan_inf_filter=False,
        eval_strategy="no" if held_out is None else "steps", eval_steps=eval_steps or total,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or total, disable_tqdm=not progress, report_to="none", ddp_find_unused_parameters=True,
        label_names=["labels"],
    )  # fmt: skip
    # several GPUs are for several processes; Trainer would else use DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    pin_memory = arguments.device.type == "cuda"
    collate = (
        Pad(model.task, model.config.pad_token, accepted(model))
        if collator is None
        else Collated(collator, accepted(model), "train")
    )
    order = Order(
        len(data),
        batch_size,
        process=index,
        processes=processes,
        seed=seed,
        lengths=lengths if group_by_length else None,
    )
    loaders = [Loader(data, order, Counting(collate, model.task, model.num_labels, data[0]), num_workers, pin_memory)]
    if held_out is not None:
        order = Order(len(held_out), eval_batch_size, process=index, processes=processes, lengths=held_out.lengths)
        loaders.append(
            Loader(
                held_out, order, Counting(collate, model.task, model.num_labels, held_out[0]), num_workers, pin_memory
            )
        )
    if arguments.should_save:
        checkpoints.clean(output_dir)
        for earlier in checkpoints.whole(output_dir) if start is None else ():
            checkpoints.remove(earlier)
    if teaching is not None:
        teaching.teacher.to(arguments.device)
    trainer = ExactTrainer(
        model, arguments, loaders, metrics=metrics, callbacks=callbacks, run=run, parts=planned,
        learning_rate=learning_rate,
        settled=first_final_step(model, total), keep=keep, best=best, progress=progress, teaching=teaching,
    )  # fmt: skip
    alone = Order(len(data), batch_size, seed=seed, lengths=lengths if group_by_length else None)
    first = First(data, alone, collate, calibration_batches, arguments.device)
    return _train(trainer, model, output_dir, start, first, "blocks" if gradient_checkpointing else recompute)


def _prepare(data: Any, model: Transformer, what: str, collator: Any) -> Examples | Raw:
    if collator is None:
        return examples(data, model, what)
    sized(data, what)
    Collated(collator, accepted(model), what)([data[0]])
    return Raw(data)


def _train(
    trainer: ExactTrainer, model: Transformer, directory: Path, start: Path | None, first: First, level: Level
) -> Result:
    """Train from a checkpoint or from the beginning, finish, write the result, and leave the model in the modes that it
    came in."""
    clock, training, cuda = time.monotonic(), model.training, trainer.args.device.type == "cuda"
    before: dict[str, Any] = {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        # Trainer would take one step more
        if start is not None and checkpoints.step_of(start) >= trainer.args.max_steps:
            trainer.restore(start)
        else:
            if start is None:
                trainer.start(first)
            # not before: methods that look at the data see all positions
            before = spare(model, "blocks" if model.recompute == "blocks" else level)
            if trainer.teaching is not None and trainer.teaching.settings.inside:
                model.only_what_is_read = False  # the teacher looks at all positions of the last block as well
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        model.train(training)
        for name, value in before.items():
            setattr(model, name, value)
    trainer.gradients.check_moved()
    untouched = trainer.gradients.untouched()
    if trainer.gradients.steps:
        noted(model, untouched.reasons())
    if untouched and trainer.args.should_save:
        logging.getLogger("effzoo").warning("in %d steps, %s", trainer.gradients.steps, untouched)
    history = _history(trainer.state.log_history)
    best = None if trainer.best is None else checkpoints.best_of(directory, history, trainer.best, trainer.settled)
    if best is not None:
        checkpoints.check_whole(best)
        checkpoints.load_weights(model, best)
    check_finite(model, trainer.state.global_step, trainer.advice())
    if trained := learning(model):  # an adapter that acts beside them as it is stays so
        finish(model, *trained)
    if trainer.args.should_save:
        checkpoints.save_weights(model, directory)
    trainer.accelerator.wait_for_everyone()
    final = [
        entry
        for entry in history
        if "eval_loss" in entry and (best is None or entry["step"] == checkpoints.step_of(best))
    ]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Result(
        metrics={key: value for key, value in (final or [{}])[-1].items() if key.startswith("eval_")}
        | {"train_loss": _mean_loss(history)},
        history=history,
        steps=trainer.state.global_step,
        seconds=time.monotonic() - clock,
        peak_memory=torch.cuda.max_memory_allocated() if cuda else resident,
        last=next(reversed(checkpoints.whole(directory)), None),
        best=best,
        weights=directory / (checkpoints.ADAPTER if acting(model) else checkpoints.WEIGHTS),
        untouched=untouched,
    )


def _history(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log with one entry per step, without its measurements of speed."""
    entries: dict[int, dict[str, Any]] = {}
    for log in logs:
        kept = {
            key: value
            for key, value in log.items()
            if key in _LOGGED or (key.startswith("eval_") and not key.endswith(_SPEED))
        }
        if kept.keys() - {"step", "epoch", "stage"}:
            entries.setdefault(log["step"], {"step": log["step"]}).update(kept)
    return list(entries.values())


def _mean_loss(history: list[dict[str, Any]]) -> float:
    """The mean over all steps; each entry's loss is the mean since the entry before."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / max(before, 1)
