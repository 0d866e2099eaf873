"""`finetune`: train a model, or only its active adapters, on tokenised examples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from effzoo.annotations import Range, Seed
from effzoo.architectures import Transformer
from effzoo.errors import OptionError
from effzoo.peft.attach import acting
from effzoo.peft.state import noted, transition
from effzoo.peft.training import finish, first_final_step, learning
from effzoo.recompute import Level, save_memory
from effzoo.sites import unwrap
from effzoo.train import checkpoints
from effzoo.train.batches import CalibrationBatches
from effzoo.train.distillation import Distillation
from effzoo.train.examples import Collated, Examples, Raw, examples, fits_teacher, sized
from effzoo.train.form import accepted
from effzoo.train.gradients import check_finite
from effzoo.train.preconditions import (
    check_dtypes,
    check_model,
    check_precision,
    check_processes,
    check_trainable,
    on_cpu,
    rejoin,
    starting_point,
)
from effzoo.train.result import Result, history_of, metrics_of, peak_memory
from effzoo.train.settings import (
    MOVED,
    Optimisation,
    Saving,
    Steps,
    callbacks_of,
    folder,
    moved,
    number,
    number_or_none,
)
from effzoo.train.setup import Setup
from effzoo.train.stages import stage_spans
from effzoo.train.teaching import Teaching

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from effzoo.train.trainer import ExactTrainer


@moved(MOVED)
def finetune(
    model: Transformer,
    train: Any,
    *,
    evaluate: Any = None,
    output_dir: str | Path,
    epochs: float = 3.0,
    max_steps: Steps | None = None,
    batch_size: Steps = 8,
    learning_rate: float | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    recompute: Level = "hidden",
    group_by_length: bool = False,
    num_workers: Annotated[int, Range(0, 1024)] = 0,
    seed: Seed = 0,
    resume: bool = False,
    progress: bool = True,
    teacher: Transformer | None = None,
    distillation: Distillation | Mapping[str, Any] | None = None,
    optimisation: Optimisation = Optimisation(),
    saving: Saving = Saving(),
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    metrics: Callable[[Any], Mapping[str, float]] | None = None,
) -> Result:
    """Train the active adapters of a model, or all its parameters when it has none, with AdamW.

    The loss of a step is the mean over all labels of its batch_size * gradient_accumulation * processes examples,
    however they are spread. Checkpoints and the result are written to output_dir.

    model: left on the device where it was trained, with its adapters finished (see below).
    train, evaluate: tokenised examples, as a `datasets.Dataset`, a list of mappings or any map-style data set. Columns:
        input_ids, labels (or label), optionally attention_mask, token_type_ids, global_attention_mask.
    output_dir: a folder for this run alone.
    epochs: passes over the examples.
    max_steps: optimizer steps, in place of epochs.
    batch_size: examples per process and forward pass, padded to the longest of them.
    learning_rate: None is each method's own (`effzoo.peft.learning_rates(model)`), and 5e-5 for all parameters. A given
        one is multiplied by the factors that a method has for some of its tensors.
    precision: of the forward pass; weights stay as they are.
    recompute: what is computed again for the backward pass instead of kept, to the same bits. "nothing"; "hidden", the
        outputs of norms and activations and the hidden units of frozen feed-forwards; "blocks", all but the input of
        each block (gradient checkpointing).
    group_by_length: batches of similar lengths, to save padding.
    num_workers: processes that read examples; 0 reads them in this one.
    seed: of the order and of dropout; sets the global random seed.
    resume: continue from the newest checkpoint in output_dir, if there is one, to the same losses (see below).
    progress: show a bar.
    teacher: a trained model with the same task, labels and vocabulary, from which the model learns beside its labels.
        It is put in evaluation mode on the device of the training, and is neither trained nor saved.
    distillation: how it learns, a `Distillation` or a mapping such as `{"logits": 0.9, "labels": 0.1}`. Evaluations
        measure the labels' loss alone.
    optimisation: weight decay, clipping, warmup, schedule, gradient accumulation, as an `effzoo.train.Optimisation`.
    saving: evaluations, checkpoints, log, as an `effzoo.train.Saving`.
    collator: list of examples -> batch, instead of padding.
    callbacks: of transformers; their `model` holds this one as `.model`.
    metrics: `(logits, labels)` of the whole evaluation (a transformers.EvalPrediction) -> numbers by name. Loss, and
        accuracy (classification) or perplexity (language models), are computed in any case; without `metrics` no logits
        are kept.

    Methods take part as in the loop of `effzoo/peft/training.py`. Stages share all steps, and in each the optimizer,
    the warmup and the schedule start anew. At the end the adapter is finished: checkpoints hold it as it was before,
    and are resumed with a freshly attached one, or with the one that was given then. Trained once more, a finished
    adapter keeps what it has chosen, and what is left is trained in one stage.

    A run is resumed with the same model, dropouts, examples and settings, its number of steps among them. Free are
    progress, recompute, num_workers, callbacks, the place of output_dir, all of `saving` but best, and, without best,
    evaluate. Of data whose rows are read only when asked for, its length and an attribute `fingerprint` are compared;
    of a collator, its name.

    Several processes: start the script with `accelerate launch`; without GPUs as `ACCELERATE_USE_CPU=true accelerate
    launch --multi_gpu --num_processes 2 train.py` (with `--cpu`, accelerate 1.15 starts a single process). They need
    one file system. While the product of processes, batch_size and gradient_accumulation stays, a run resumes with the
    same batches, but other dropout masks.

    A trained tensor that the loss does not reach is named, after the first step and at the end, with its share of what
    is trained.

    Raises InputError (data that the model cannot read or would read wrongly), OptionError, IncompatibleError (a
        precision that cannot run here), TrainingError (nothing to train, nothing that is trained has a gradient, a
        checkpoint of another run, a loss or a weight that is not a number), AdapterError.
    """
    model = unwrap(model)
    check_trainable(model)
    epochs = number("epochs", epochs, "a positive number", lambda x: x > 0)
    learning_rate = number_or_none(
        "learning_rate", learning_rate, "a number above 0, or None for each method's own", lambda x: x > 0
    )
    if learning_rate is None and not acting(model):
        learning_rate = 5e-5
    output_dir, callbacks = folder("output_dir", output_dir), callbacks_of(callbacks)
    check_precision(model, precision)
    check_dtypes(model)
    if saving.best is not None and evaluate is None:
        raise OptionError(f"best={saving.best!r} needs evaluations to choose by; give evaluate")
    data = _examples(train, model, "train", collator)
    held_out = None if evaluate is None else _examples(evaluate, model, "evaluate", collator)
    if group_by_length and data.lengths is None:
        raise OptionError(
            "group_by_length needs the length of every example; give a list or a datasets.Dataset, and no collator"
        )
    teaching = _teaching(model, teacher, distillation, data.lengths)

    from accelerate import PartialState  # these import transformers, which takes seconds

    from effzoo.train.trainer import ExactTrainer

    here = PartialState(cpu=on_cpu())
    check_processes(here.num_processes)
    setup = Setup(
        model, data, held_out, output_dir, epochs, max_steps, batch_size, learning_rate, precision, group_by_length,
        num_workers, seed, progress, teaching, optimisation, saving, collator, here.num_processes, here.process_index,
    )  # fmt: skip
    steps = setup.steps
    # a refused run leaves the adapters in the stage that they were in
    with transition(model, *acting(model)) if resume else nullcontext():
        if resume:
            rejoin(model, output_dir)
        stages = stage_spans(model, steps, optimisation.warmup)
        record = setup.record(stages)
        setup.check_decay()
        start = starting_point(output_dir, record, resume, saving.overwrite)
    arguments = setup.arguments(stages)
    if arguments.should_save:
        checkpoints.clean(output_dir)
        for earlier in checkpoints.whole(output_dir) if start is None else ():
            checkpoints.remove(earlier)
    trainer = ExactTrainer(
        model, arguments, setup.loaders(arguments.device), metrics=metrics, callbacks=callbacks, run=record,
        stages=stages, learning_rate=learning_rate, first_final_step=first_final_step(model, steps), keep=saving.keep,
        best=saving.best, progress=progress, teaching=teaching,
    )  # fmt: skip
    return _train(trainer, start, setup.first_batches(arguments.device), recompute)


def _examples(data: Any, model: Transformer, what: str, collator: Any) -> Examples | Raw:
    """The examples of a run, checked; with a collator, its batch of the first one."""
    if collator is None:
        return examples(data, model, what)
    sized(data, what)
    Collated(collator, accepted(model), what)([data[0]])
    return Raw(data)


def _teaching(model: Transformer, teacher: Any, distillation: Any, lengths: Sequence[int] | None) -> Teaching | None:
    """The teacher and how the model learns from it; None without one."""
    if teacher is None:
        if distillation is not None:
            raise OptionError("distillation says how a model learns from a teacher, and there is none; give teacher")
        return None
    check_model(teacher, "teacher")
    teaching = Teaching(model, teacher, Distillation.of(distillation))
    if lengths is not None:
        fits_teacher(lengths, teacher)
    return teaching


def _train(trainer: ExactTrainer, start: Path | None, first: CalibrationBatches, level: Level) -> Result:
    """Train from a checkpoint or from the beginning, finish, and write the result."""
    clock, model, directory = time.monotonic(), trainer.subject, Path(str(trainer.args.output_dir))
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _steps(trainer, start, first, level)
    trainer.gradients.check_moved()
    untouched = trainer.gradients.untouched()
    if trainer.gradients.steps:
        noted(model, untouched.reasons())
    if untouched and trainer.args.should_save:
        logging.getLogger("effzoo").warning("in %d steps, %s", trainer.gradients.steps, untouched)
    history = history_of(trainer.state.log_history)
    best = None
    if trainer.best is not None:
        best = checkpoints.best_of(directory, history, trainer.best, trainer.first_final_step)
    if best is not None:
        checkpoints.check_whole(best)
        checkpoints.load_weights(model, best)
    check_finite(model, trainer.state.global_step, trainer.advice())
    if trained := learning(model):  # an adapter that acts beside them as it is stays so
        finish(model, *trained)
    if trainer.args.should_save:
        checkpoints.save_weights(model, directory)
    trainer.accelerator.wait_for_everyone()
    return Result(
        metrics=metrics_of(history, None if best is None else checkpoints.step_of(best)),
        history=history,
        steps=trainer.state.global_step,
        seconds=time.monotonic() - clock,
        peak_memory=peak_memory(trainer.args.device),
        last=next(reversed(checkpoints.whole(directory)), None),
        best=best,
        weights=directory / (checkpoints.ADAPTER if acting(model) else checkpoints.WEIGHTS),
        untouched=untouched,
    )


def _steps(trainer: ExactTrainer, start: Path | None, first: CalibrationBatches, level: Level) -> None:
    """Take the steps that are left, and leave the model in the modes that it came in."""
    model, before = trainer.subject, dict[str, Any]()
    training = model.training
    if trainer.teaching is not None:
        trainer.teaching.teacher.to(trainer.args.device)
    try:
        # Trainer would take one step more
        if start is not None and checkpoints.step_of(start) >= trainer.args.max_steps:
            trainer.restore(start)
            return
        if start is None:
            trainer.start(first)
        # not before: methods that look at the data see all positions
        before = save_memory(model, "blocks" if model.recompute == "blocks" else level)
        if trainer.teaching is not None and trainer.teaching.settings.inside:
            model.only_what_is_read = False  # the teacher looks at all positions of the last block as well
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        model.train(training)
        for name, value in before.items():
            setattr(model, name, value)
