"""`transformers.Trainer` with exact losses over processes, exact evaluation, and checkpoints that are whole or absent.

What differs from Trainer, and why:
- The loss of a step is the mean over all counted labels of the global batch (all processes, all accumulated batches);
  Trainer counts labels without the shift of a causal language model that it does not know, and means over batches
  elsewhere.
- An evaluation loss is the mean over all counted labels; Trainer's is the mean of batch means. Only logits leave the
  model.
- Batches come from `batches.Order`; Trainer repeats examples to fill the last batch when several processes share it.
- Checkpoints are `checkpoints.writing`: without pickle, renamed when whole. Trainer writes under the final name.
- Methods take part (`effzoo/peft/training.py`): stages with an optimizer, a wrapped model and learning rates of their
  own, schedules, penalties.
- A teacher may take part (`teaching`): it adds to the loss of the labels, and the parts are logged.
- Every step is looked at: which trained tensors get a gradient (`gradients`), and whether losses and weights are
  numbers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, get_scheduler
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from effzoo.architectures import Transformer
from effzoo.checked import IGNORED
from effzoo.errors import TrainingError, did_you_mean, listing
from effzoo.peft import training
from effzoo.train import checkpoints
from effzoo.train.batches import COUNTED, Loader
from effzoo.train.gradients import Gradients, check_finite, nothing_reached
from effzoo.train.randomness import random_state, set_random_state
from effzoo.train.stages import CurrentModel, StageSpan, parameter_groups
from effzoo.train.teaching import Teaching

_STATE = "trainer_state.json"  # the name that Trainer reads


class Supervised(nn.Module):
    """A model as Trainer sees it: labelled inputs -> (loss,) or (loss, penalty) in training, (loss, logits) otherwise.

    All that has a gradient is computed here, because this is what several processes wrap; a teacher is no part of it.
    Trainer and accelerate write to what they are given (`config.use_cache`, `forward` under mixed precision), so they
    are given this.
    """

    accepts_loss_kwargs = True  # the loss is already a share of the global mean, so Trainer must not divide it again

    def __init__(self, model: Transformer, teaching: Teaching | None = None):
        super().__init__()
        self.model, self.teaching = model, teaching

    def forward(self, penalised: bool = False, **inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.training:
            output = self.model(**inputs)
            return output.loss, output.logits
        loss = training.supervised(self.model, inputs) if self.teaching is None else self.teaching(self.model, inputs)
        if not penalised:
            return (loss,)
        with torch.autocast(loss.device.type, enabled=False):  # of the weights, which stay as they are
            penalty = training.penalty(self.model)
        return (loss,) if penalty is None else (loss, penalty)


class Rhythm(TrainerCallback):
    """Log at checkpoints, evaluations and ends of stages: a resumed run averages its losses over the same steps.

    taught: how many steps, from the first, learn from a teacher.
    gradients: looks at those of each step.
    """

    def __init__(self, best: str | None, seed: int, stages: Sequence[StageSpan], taught: int, gradients: Gradients):
        self.best, self.seed, self.gradients = best, seed, gradients
        self.ends = {taught, stages[-1].end, *(span.end for span in stages if span.stage.name)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index:  # Trainer seeds all processes alike, and dropout would then be the same in each
            torch.manual_seed(self.seed + args.process_index)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.gradients.look()
        untouched = self.gradients.untouched()
        if self.gradients.steps == 1 and untouched.none and not args.process_index:
            sentence = str(replace(untouched, zero={}, undecided={}))
            logging.getLogger("effzoo").warning("after the first step, %s", sentence)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or (control.should_evaluate and self.best is not None)
        control.should_log = (
            control.should_log or control.should_save or control.should_evaluate or state.global_step in self.ends
        )


class ExactTrainer(Trainer):
    """Trainer as the module says.

    loaders: of training and, where there is one, evaluation.
    metrics: the user's, called with the logits and labels of an evaluation.
    run: the record that a checkpoint must share to be resumed.
    learning_rate: None for each method's own.
    first_final_step: the first step whose checkpoint can be the best one.
    keep: how many checkpoints stay; None for all.
    best: the metric by which a checkpoint is kept besides.
    """

    loss_is_scaled_for_ga = True
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Transformer,
        args: Any,
        loaders: list[Loader],
        *,
        metrics: Any,
        callbacks: list[Any],
        run: dict[str, Any],
        stages: Sequence[StageSpan],
        learning_rate: float | None,
        first_final_step: int,
        keep: int | None,
        best: str | None,
        progress: bool,
        teaching: Teaching | None = None,
    ):
        self.loaders, self.user_metrics, self.run, self.keep, self.best = loaders, metrics, run, keep, best
        self.stages, self.span = stages, stages[0]
        self.learning_rate, self.first_final_step = learning_rate, first_final_step
        self.batches_left = 0  # of the step, the one that runs not counted
        self.resumed_from: str | None = None
        # the parts of the loss since the last log
        self.teaching, self.taught, self.steps_taught = teaching, dict[str, Tensor](), 0
        train, *evaluate = (loader.dataset for loader in loaders)
        self.gradients = Gradients()
        taught = 0 if teaching is None else teaching.steps_of(args.max_steps)
        callbacks = [*callbacks, Rhythm(best, args.seed, stages, taught, self.gradients)]
        super().__init__(
            Supervised(model, teaching),
            args,
            train_dataset=train,
            eval_dataset=evaluate[0] if evaluate else None,
            callbacks=callbacks,
        )
        self.subject = model
        if not progress:
            self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Loader:
        return self.loaders[0]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        return self.loaders[1]

    def start(self, batches: Any) -> None:
        """Calibrate and begin the first stage: every process sees the same batches and draws the same numbers."""
        training.calibrate(self.subject, batches)
        training.begin(self.subject, self.span.stage)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = {name.removeprefix("model.") for name in self.get_decay_parameter_names(self.model)}
            rates = training.learning_rates(self.subject, self.learning_rate)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = make(parameter_groups(self.subject, decayed, rates, rate, decay), **options)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warmup and decline over the stage."""
        warmup, steps = self.span.warmup, self.span.steps
        self.lr_scheduler = get_scheduler(
            self.args.lr_scheduler_type, self.optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        model, loader = self._wrap(max_steps, train_dataloader, resume_from_checkpoint)
        self.current = CurrentModel(model)
        return self.current, loader

    def _wrap(self, *arguments: Any) -> tuple[nn.Module, Any]:
        """The model as Trainer wraps it, with optimizer and schedule made, and the loader."""
        prepare: Any = super()._prepare_for_training
        model, loader = prepare(*arguments)
        self.gradients.begin(self.subject)
        return model, loader

    def _enter(self, span: StageSpan) -> None:
        """Begin a stage. Its parameters may be others: they get a new optimizer, and in several processes a new
        wrapper."""
        training.begin(self.subject, span.stage)
        self.span, self.optimizer = span, None
        self.model = self.model_wrapped = Supervised(self.subject, self.teaching)
        self.accelerator.free_memory()  # forget the optimizer and the wrapper of the stage before
        self.current.inner, _ = self._wrap(self.args.max_steps, self.loaders[0], None)

    def _rejoin(self, checkpoint: Path) -> None:
        """Bring the adapters to the stage of a checkpoint, and fill them; at a boundary the next has not begun."""
        for span in self.stages:
            if span.start < checkpoints.step_of(checkpoint):
                training.begin(self.subject, span.stage)
                self.span = span
        checkpoints.load_weights(self.subject, checkpoint)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step in this process, and the counted labels of the step in all processes."""
        # before the collator runs, which may draw random numbers (masked language models)
        self._load_rng_state(self.resumed_from)
        step = self.state.global_step
        if step == self.span.end:
            self._enter(next(span for span in self.stages if span.start == step))
        training.schedule(self.subject, (step - self.span.start) / self.span.steps)
        if self.teaching is not None:
            self.teaching.active = step < self.teaching.steps_of(self.args.max_steps)
            self.steps_taught += 1
        batches = list(islice(epoch_iterator, num_batches))
        self.batches_left = len(batches)
        count = torch.stack([batch[COUNTED] for batch in batches]).sum()
        return batches, self.accelerator.gather(count.to(device)).sum().clamp(min=1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the mean over the step, times the processes, as their gradients and losses are averaged.

        The penalty, the same in all processes, comes with the last batch of the step, so that it counts once.
        """
        count = inputs.pop(COUNTED)
        self.batches_left -= 1
        loss, *penalty = model(penalised=self.batches_left == 0, **inputs)
        part_of_mean = count * self.accelerator.num_processes / num_items_in_batch
        for name, value in {} if self.teaching is None else self.teaching.parts.items():
            self.taught[name] = self.taught.get(name, 0.0) + value * part_of_mean
        share = loss * part_of_mean
        if not share.requires_grad and not penalty:
            trained = [name for name, parameter in self.subject.named_parameters() if parameter.requires_grad]
            raise TrainingError(nothing_reached(trained))
        return share + penalty[0] if penalty else share

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all counted labels, accuracy or perplexity, and the user's metrics, over all processes."""
        model = self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = torch.zeros(4, dtype=torch.float64)  # losses, counted labels, hits, labels that can be hit
        answers: list[tuple[int, Any, Any]] = []  # number of the example, logits, labels
        for indices, batch in zip(dataloader.order, dataloader, strict=True):
            if indices:  # else a batch to keep in step with other processes, which evaluation need not be
                batch = self._prepare_inputs(batch)
                counted = int(batch.pop(COUNTED))
                with torch.no_grad():
                    loss, logits = model(**batch)
                hits, scored = _hits(logits, batch["labels"], self.subject)
                sums += torch.tensor([loss.item() * counted, counted, hits, scored], dtype=torch.float64)
                if self.user_metrics is not None:
                    answers += zip(indices, logits.float().cpu().numpy(), batch["labels"].cpu().numpy(), strict=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        values = self._metrics(torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(dim=0).tolist())
        if self.user_metrics is not None:
            values |= self.user_metrics(_prediction(gather_object(answers)))
        named = {
            key if key.startswith(metric_key_prefix) else f"{metric_key_prefix}_{key}": float(value)
            for key, value in values.items()
        }
        return EvalLoopOutput(
            predictions=np.empty(0), label_ids=None, metrics=named, num_samples=len(dataloader.dataset)
        )

    def _metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean loss, with accuracy where labels can be hit, and perplexity for a language model."""
        total, count, hits, scored = sums
        loss = total / max(count, 1)
        if scored:
            return {"loss": loss, "accuracy": hits / scored}
        if self.subject.task.endswith("_lm"):
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {"loss": loss}

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, with the name of the stage. Raises TrainingError at a loss that is no number: later steps are lost."""
        if self.span.stage.name and any(key == "loss" or key.startswith("eval_") for key in logs):
            logs["stage"] = self.span.stage.name
        if "loss" in logs and self.teaching is not None:
            means = {
                name: self.accelerator.gather(value.reshape(1)).mean().item() / self.steps_taught
                for name, value in self.taught.items()
            }
            logs |= {f"loss_{name}": value for name, value in means.items()}
            self.taught, self.steps_taught = {}, 0
        super().log(logs, start_time)
        for key, what in (("loss", "loss"), ("eval_loss", "loss of the evaluation")):
            if not math.isfinite(logs.get(key, 0.0)):
                rate = f" with learning rate {logs['learning_rate']:.2g}" if "learning_rate" in logs else ""
                raise TrainingError(
                    f"the {what} is {logs[key]} at step {self.state.global_step}{rate}; {self.advice()}"
                )
        if "eval_loss" in logs and self.best is not None and f"eval_{self.best}" not in logs:
            measured = [key for key in logs if not key.endswith(("_runtime", "_per_second"))]
            names = [key.removeprefix("eval_") for key in measured if key.startswith("eval_")]
            raise TrainingError(
                f"best={self.best!r} is no metric of the evaluation{did_you_mean(self.best, names)} "
                f"Metrics: {listing(names)}."
            )

    def advice(self) -> str:
        """What to do when a number is not finite, and from where the run can go on."""
        saved = checkpoints.whole(Path(str(self.args.output_dir)))
        kept = f"; {saved[-1].name} holds what was learned before" if saved else ""
        return f"try a lower learning rate, a longer warmup, or precision='float32'{kept}"

    def restore(self, checkpoint: Path) -> None:
        """Take the weights and the history of a run that has taken its last step."""
        self._rejoin(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / _STATE))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self.subject, self.state.global_step, self.advice())
        random_states = gather_object([random_state(self.args.device)])
        if self.args.should_save:
            directory = Path(str(self.args.output_dir))
            with checkpoints.writing(directory, self.state.global_step) as folder:
                checkpoints.save_weights(self.subject, folder)
                scaler = getattr(self.accelerator, "scaler", None)
                checkpoints.write_state(
                    folder,
                    {
                        "parameters": self._parameter_names(),
                        "optimizer": self.optimizer.state_dict(),
                        "scheduler": self.lr_scheduler.state_dict(),
                        "scaler": scaler.state_dict() if scaler is not None else None,
                        "random": random_states,
                    },
                )
                self.state.save_to_json(str(folder / _STATE))
                (folder / checkpoints.RUN).write_text(json.dumps(self.run, indent=1))
            best = self.best and checkpoints.best_of(
                directory, self.state.log_history, self.best, self.first_final_step
            )
            checkpoints.rotate(directory, self.keep, best or None)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._rejoin(Path(resume_from_checkpoint))
        self.resumed_from = resume_from_checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = checkpoints.read_state(Path(checkpoint))
        if state["parameters"] != self._parameter_names():
            different = sorted(set(state["parameters"]) ^ set(self._parameter_names())) or ["their order"]
            raise TrainingError(
                f"{checkpoint} trained other parameters than this run would; the first difference is {different[0]}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Read with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.resumed_from is None:  # nothing to resume, or done before
            return
        self.resumed_from = None
        states = checkpoints.read_state(Path(checkpoint))["random"]
        if len(states) == self.accelerator.num_processes:  # else the run continues with fresh dropout, as finetune says
            set_random_state(states[self.accelerator.process_index], self.args.device)

    def _get_learning_rate(self) -> float:
        """For the log: the largest, where tensors have their own."""
        return max(self.lr_scheduler.get_last_lr())

    def _parameter_names(self) -> list[str]:
        names = {id(parameter): name for name, parameter in self.subject.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]


def _hits(logits: Tensor, labels: Tensor, model: Transformer) -> tuple[int, int]:
    """How many counted labels the largest logit hits, and of how many.

    (0, 0) for language models, regression and several labels at once.
    """
    one_of_many = not labels.is_floating_point() and labels.shape == logits.shape[:-1] and model.num_labels > 1
    if not one_of_many or model.task.endswith("_lm"):
        return 0, 0
    counted = labels != IGNORED
    return int(((logits.argmax(dim=-1) == labels) & counted).sum()), int(counted.sum())


def _prediction(answers: list[tuple[int, Any, Any]]) -> EvalPrediction:
    """Logits and labels in the order of the data; sequences of unequal length are padded with -100."""
    answers = sorted(answers, key=lambda answer: answer[0])
    return EvalPrediction(
        predictions=_stack([logits for _, logits, _ in answers]), label_ids=_stack([labels for *_, labels in answers])
    )


def _stack(arrays: list[Any]) -> Any:
    shape = np.max([array.shape for array in arrays], axis=0)
    stacked: Any = np.full((len(arrays), *shape), IGNORED, dtype=arrays[0].dtype)
    for number, array in enumerate(arrays):
        stacked[(number, *map(slice, array.shape))] = array
    return stacked
