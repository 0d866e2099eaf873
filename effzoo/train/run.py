"""`finetune`: train a model, or only its active adapters, on tokenised examples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from effzoo.annotations import Count, Range, Seed
from effzoo.architectures import EncoderDecoder, Transformer
from effzoo.arguments import folder, number, number_or_none
from effzoo.errors import EffzooError, IncompatibleError, OptionError, listing
from effzoo.folder.saving import write
from effzoo.packing import PackedStream, check_task, packed
from effzoo.peft.attach import acting
from effzoo.peft.state import noted, transition
from effzoo.peft.training import consistency, finish, learning
from effzoo.recompute import Level, save_memory
from effzoo.sites import unwrap
from effzoo.train import checkpoints
from effzoo.train.distillation import Distillation
from effzoo.train.examples import (
    Collated,
    Examples,
    Raw,
    examples,
    fits_teacher,
    most_tokens,
    sized,
    streamed,
    tokens_of,
)
from effzoo.train.form import accepted
from effzoo.train.gradients import check_finite
from effzoo.train.preconditions import (
    check_dtypes,
    check_model,
    check_precision,
    check_processes,
    check_trainable,
    rejoin,
    starting_point,
)
from effzoo.train.record import check_alike, of_process
from effzoo.train.result import Result, metrics_of, peak_memory
from effzoo.train.schedules import check_steps
from effzoo.train.settings import MOVED, Optimisation, Saving, Steps, moved
from effzoo.train.setup import Setup
from effzoo.train.stages import stage_spans
from effzoo.train.streams import Checked, Stream, is_stream
from effzoo.train.teaching import Teaching

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from effzoo.train.callbacks import Callback
    from effzoo.train.loop import Loop


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
    packing: bool = False,
    num_workers: Annotated[int, Range(0, 1024)] = 0,
    seed: Seed = 0,
    resume: bool = False,
    progress: bool = True,
    sequence_ranks: Count = 1,
    teacher: Transformer | None = None,
    distillation: Distillation | Mapping[str, Any] | None = None,
    optimisation: Optimisation = Optimisation(),
    saving: Saving = Saving(),
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback | TrainerCallback] = (),
    metrics: Callable[[Any], Mapping[str, float]] | None = None,
) -> Result:
    """Train the active adapters of a model, or all its parameters when it has none, with AdamW.

    The loss of a step is the mean over all labels of its batch_size * gradient_accumulation * processes examples,
    however they are spread. Checkpoints and the result are written to output_dir.

    model: left on the device where it was trained, with its adapters finished (see below).
    train, evaluate: tokenised examples, as a `datasets.Dataset`, a list of mappings or any map-style data set, or a
        stream: an iterable that can be read again, such as a `datasets.IterableDataset`. Columns: input_ids, labels (or
        label), optionally attention_mask, token_type_ids, global_attention_mask.
    output_dir: a folder for this run alone.
    epochs: passes over the examples.
    max_steps: optimizer steps, in place of epochs; a stream, whose length nobody knows, needs it.
    batch_size: examples per process and forward pass, padded to the longest of them.
    learning_rate: None is each method's own (`effzoo.peft.learning_rates(model)`), and 5e-5 for all parameters. A given
        one is multiplied by the factors that a method has for some of its tensors.
    precision: of the forward pass; weights stay as they are.
    recompute: what is computed again for the backward pass instead of kept, to the same bits. "nothing"; "hidden", the
        outputs of norms and activations and the hidden units of frozen feed-forwards; "blocks", all but the input of
        each block (gradient checkpointing).
    group_by_length: batches of similar lengths, to save padding.
    packing: join short examples of train into rows as long as the model reads, in which they do not see each other
        (`effzoo.data.pack`); batch_size then counts rows. Losses are means over the same labels.
    num_workers: processes that read examples; 0 reads them in this one.
    seed: of the order and of dropout; sets the global random seed.
    resume: continue from the newest checkpoint in output_dir, if there is one, to the same losses (see below).
    progress: show a bar.
    sequence_ranks: processes that compute each sequence together, with a slice of its positions each
        (`effzoo.parallel.OverRanks`); the others share the batches, as all do with 1. The count of processes is a
        multiple of it.
    teacher: a trained model with the same task, labels and vocabulary, from which the model learns beside its labels.
        It is put in evaluation mode on the device of the training, and is neither trained nor saved.
    distillation: how it learns, a `Distillation` or a mapping such as `{"logits": 0.9, "labels": 0.1}`. Evaluations
        measure the labels' loss alone.
    optimisation: weight decay, clipping, warmup, schedule, gradient accumulation, as an `effzoo.train.Optimisation`.
    saving: evaluations, checkpoints, log, as an `effzoo.train.Saving`.
    collator: list of examples -> batch, instead of padding.
    callbacks: told of the run, as an `effzoo.train.Callback` or a transformers.TrainerCallback, instances or classes.
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
    of a collator, its name. A stream is read in its own order, once more for each pass, with `set_epoch(pass)` where it
    has it; a resumed run reads and leaves out what was trained on. It has to give the same examples again.

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
    output_dir, told = folder("output_dir", output_dir), _callbacks(callbacks, progress)
    check_precision(model, precision)
    check_dtypes(model)
    if saving.best is not None and evaluate is None:
        raise OptionError(f"best={saving.best!r} needs evaluations to choose by; give evaluate")
    data = _examples(train, model, "train", collator)
    held_out = None if evaluate is None else _examples(evaluate, model, "evaluate", collator)
    columns = getattr(getattr(data, "form", None), "columns", ())
    if sequence_ranks > 1 and (packing or "document_ids" in columns):
        raise IncompatibleError(
            "packed documents are not computed over ranks; give each a row of its own, or sequence_ranks=1"
        )
    if sequence_ranks > 1 and model.task == "question_answering":
        raise IncompatibleError(
            "an answer is a distribution over the whole sequence, of which a process has a part; sequence_ranks=1"
        )
    if packing:
        data = _packed(data, model, seed, collator)
    _check_streams(data, held_out, max_steps, num_workers)
    if group_by_length and data.lengths is None:
        raise OptionError(
            "group_by_length needs the length of every example; give a list or a datasets.Dataset, and no collator"
        )
    teaching = _teaching(model, teacher, distillation, data.lengths)
    if sequence_ranks > 1 and (teaching is not None or consistency(model)):
        what = "a teacher" if teaching is not None else "the divergence of two forward passes"
        raise IncompatibleError(f"{what} compares whole sequences, of which a process has a part; sequence_ranks=1")
    if sequence_ranks > 1 and metrics is not None and model.task != "classification":
        raise IncompatibleError(
            "metrics reads the logits of whole sequences, of which a process has a part; leave it out, or "
            "sequence_ranks=1"
        )
    if packing and teaching is not None and teaching.settings.inside:
        raise IncompatibleError(
            f"packing does not go with a distillation of {listing(teaching.settings.inside)} states, which are "
            "compared by the rows of the batch; distil the logits alone, or leave packing out"
        )

    from effzoo.train.loop import Loop  # imports transformers, which takes seconds
    from effzoo.train.processes import Processes

    processes = Processes(saving, output_dir, sequence_ranks)
    check_processes(processes.number)
    setup = Setup(
        model, data, held_out, output_dir, epochs, max_steps, batch_size, learning_rate, precision, group_by_length,
        packing, num_workers, seed, teaching, optimisation, saving, collator, processes.batch_sharers,
        processes.share,
    )  # fmt: skip
    # a refused run leaves the adapters in the stage that they were in
    with transition(model, *acting(model)) if resume else nullcontext():
        if resume:
            rejoin(model, output_dir)
        stages = stage_spans(model, setup.steps, optimisation.warmup)
        record = setup.record(stages)
        setup.check_decay()
        for span in stages:
            check_steps(
                optimisation.schedule, optimisation.schedule_options, setup.largest_rate, span.warmup, span.steps
            )
        start = starting_point(output_dir, record, resume, saving.overwrite)
    if processes.number > 1:
        check_alike(processes.gathered(of_process(model, record)))
    loop = Loop(setup, processes, stages, record, told, metrics)
    return _train(loop, start, recompute)


def _callbacks(given: Any, progress: bool) -> list[Callback]:
    from effzoo.train.callbacks import of_user

    if not progress:
        return of_user(given)
    from effzoo.train.progress import Bar

    return [*of_user(given), Bar()]


def _examples(data: Any, model: Transformer, what: str, collator: Any) -> Examples | Raw | Stream:
    """The examples of a run, checked; with a collator, its batch of the first one."""
    if collator is None:
        return streamed(data, model, what) if is_stream(data) else examples(data, model, what)
    if is_stream(data):
        stream = Stream(data, what)
        Collated(collator, accepted(model), what)([stream.first])
        return stream
    sized(data, what)
    Collated(collator, accepted(model), what)([data[0]])
    return Raw(data)


def _packed(data: Any, model: Transformer, seed: int, collator: Any) -> Any:
    """Checked examples as rows of several."""
    if collator is not None:
        raise OptionError("packing joins tokenised examples, and the collator is given rows; call effzoo.data.pack")
    if isinstance(model, EncoderDecoder):
        raise IncompatibleError(
            "packing needs documents that stay apart, and by cross-attention a target reads all sources of its row; "
            "leave it out (group_by_length=True saves padding)"
        )
    if not isinstance(model, Transformer):
        raise IncompatibleError(
            f"packing needs documents that stay apart, and the latents of a {type(model).__name__} read the whole row"
        )
    check_task(model.task)
    length = most_tokens(model)
    if isinstance(data, Stream):
        return Stream(PackedStream(Checked(data), length, model.task, seed, window=2000), "train")
    lengths = data.lengths or [tokens_of(data[number]) for number in range(len(data))]
    rows = packed(data, lengths, length, model.task, seed)
    logging.getLogger("effzoo").info("packing: %s", rows)
    return rows


def _check_streams(train: Any, evaluate: Any, max_steps: int | None, num_workers: int) -> None:
    """Raise OptionError for what nobody can do with examples that are read one after another."""
    if isinstance(train, Stream) and max_steps is None:
        raise OptionError("train is a stream, of which nobody knows the length; give max_steps in place of epochs")
    if num_workers and (isinstance(train, Stream) or isinstance(evaluate, Stream)):
        raise OptionError(
            f"num_workers={num_workers} is for data with a length: a stream gives other examples in a worker "
            "(`datasets` shuffles anew there), so the losses would depend on it; leave it 0"
        )


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


def _train(loop: Loop, start: Path | None, level: Level) -> Result:
    """Train from a checkpoint or from the beginning, finish, and write the result."""
    clock, model, directory = time.monotonic(), loop.model, loop.setup.output_dir
    if loop.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _steps(loop, start, level)
    loop.gradients.check_moved()
    untouched = loop.gradients.untouched()
    if loop.gradients.steps:
        noted(model, untouched.reasons())
    if untouched and loop.main:
        logging.getLogger("effzoo").warning("in %d steps, %s", loop.gradients.steps, untouched)
    best = loop.measured.best()
    if best is not None:
        checkpoints.check_whole(best)
        checkpoints.load_weights(model, best)
    elif loop.saving.best is not None and loop.main:
        logging.getLogger("effzoo").warning(
            "best=%r was a number in no evaluation that counts, so the last weights stay", loop.saving.best
        )
    check_finite(model, loop.step, loop.measured.advice())
    if trained := learning(model):  # an adapter that acts beside them as it is stays so
        finish(model, *trained)
    metrics = metrics_of(loop.history, None if best is None else checkpoints.step_of(best))
    if loop.main or loop.processes.sharded:
        _save(model, directory, metrics)
    loop.processes.wait()
    loop.processes.end_group_at_exit()
    return Result(
        metrics=metrics,
        history=loop.history,
        steps=loop.step,
        seconds=time.monotonic() - clock,
        peak_memory=peak_memory(loop.device),
        last=next(reversed(checkpoints.whole(directory)), None),
        best=best,
        weights=checkpoints.weights_in(model, directory),
        untouched=untouched,
    )


def _save(model: Transformer, directory: Path, metrics: Mapping[str, float]) -> None:
    """Write the active adapters, or the whole model as a folder for `effzoo.load`."""
    if not acting(model):
        try:
            write(model, directory, metrics=metrics)
            return
        except EffzooError as error:  # what was trained is kept in any case
            logging.getLogger("effzoo").warning(
                "%s: the weights are written without their config: %s", directory, error
            )
    checkpoints.save_weights(model, directory)


def _steps(loop: Loop, start: Path | None, level: Level) -> None:
    """Take the steps that are left, and leave the model in the modes that it came in."""
    from effzoo.train.state import begin  # imports transformers, which takes seconds

    model, training = loop.model, loop.model.training
    before = dict[str, Any]()
    try:
        begin(loop, start)
        # not before: methods that look at the data see all positions
        before = save_memory(model, "blocks" if model.recompute == "blocks" else level)
        if loop.teaching is not None and loop.teaching.settings.inside:
            model.only_what_is_read = False  # the teacher looks at all positions of the last block as well
        loop.train()
    finally:
        for callback in loop.callbacks:
            callback.close()
        loop.processes.end_tracking()
        model.train(training)
        for name, value in before.items():
            setattr(model, name, value)
