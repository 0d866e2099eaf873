"""`transformers.Trainer` with exact losses over processes, exact evaluation, and checkpoints that are whole or absent.

What differs from Trainer, and why:
- The loss of a step is the mean over all counted labels of the global batch (all processes, all accumulated batches); Trainer counts
  labels without the shift of a causal language model that it does not know, and means over batches elsewhere.
- An evaluation loss is the mean over all counted labels; Trainer's is the mean of batch means. Only logits leave the model.
- Batches come from `batches.Order`; Trainer repeats examples to fill the last batch when several processes share it.
- Checkpoints are `checkpoints.writing`: without pickle, renamed when whole. Trainer writes under the final name.
"""

from __future__ import annotations

import json
import math
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from effzoo.architectures import Transformer
from effzoo.architectures.heads import IGNORED
from effzoo.errors import TrainingError
from effzoo.train import checkpoints
from effzoo.train.batches import COUNTED, Loader

_STATE = "trainer_state.json"  # the name that Trainer reads


class Supervised(nn.Module):
    """A model as Trainer sees it: labelled inputs -> the loss in training, (loss, logits) in evaluation.

    Trainer and accelerate write to what they are given (`config.use_cache`, `forward` under mixed precision); they get this one.
    """

    accepts_loss_kwargs = True  # the loss is already a share of the global mean, so Trainer must not divide it again

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = self.model(**inputs)
        return output.loss if self.training else (output.loss, output.logits)


class Rhythm(TrainerCallback):
    """Log wherever a checkpoint or an evaluation falls, so that a resumed run averages its losses over the same steps."""

    def __init__(self, best: str | None, seed: int):
        self.best, self.seed = best, seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index:  # Trainer seeds all processes alike, and dropout would then be the same in each
            torch.manual_seed(self.seed + args.process_index)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or (control.should_evaluate and self.best is not None)
        control.should_log = control.should_log or control.should_save or control.should_evaluate


class ExactTrainer(Trainer):
    """See the module. loaders: of training and evaluation. run: the settings that a checkpoint must share to be resumed."""

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
        keep: int | None,
        best: str | None,
        progress: bool,
    ):
        self.loaders, self.user_metrics, self.run, self.keep, self.best = loaders, metrics, run, keep, best
        self.resumed_from: str | None = None
        train, *evaluate = (loader.dataset for loader in loaders)
        callbacks = [*callbacks, Rhythm(best, args.seed)]
        super().__init__(Supervised(model), args, train_dataset=train, eval_dataset=evaluate[0] if evaluate else None, callbacks=callbacks)
        self.subject = model
        if not progress:
            self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Loader:
        return self.loaders[0]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        return self.loaders[1]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step on this process, and the number of counted labels of the step over all processes."""
        self._load_rng_state(self.resumed_from)  # before the collator runs, which may draw random numbers (masked language models)
        batches = list(islice(epoch_iterator, num_batches))
        count = torch.stack([batch[COUNTED] for batch in batches]).sum()
        return batches, self.accelerator.gather(count.to(device)).sum().clamp(min=1)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """This batch's share of the mean over the step; times the processes, because their gradients and losses are averaged."""
        count = inputs.pop(COUNTED)
        return model(**inputs) * (count * self.accelerator.num_processes / num_items_in_batch)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> EvalLoopOutput:
        """The mean loss over all counted labels, accuracy or perplexity, and the user's metrics, over all processes."""
        model = self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = torch.zeros(4, dtype=torch.float64)  # losses, counted labels, hits, labels that can be hit
        rows: list[tuple[int, Any, Any]] = []
        for indices, batch in zip(dataloader.order, dataloader, strict=True):
            if indices:  # else a batch to keep in step with other processes, which evaluation need not be
                batch = self._prepare_inputs(batch)
                counted = int(batch.pop(COUNTED))
                with torch.no_grad():
                    loss, logits = model(**batch)
                sums += torch.tensor([loss.item() * counted, counted, *_score(logits, batch["labels"], self.subject)], dtype=torch.float64)
                if self.user_metrics is not None:
                    rows += zip(indices, logits.float().cpu().numpy(), batch["labels"].cpu().numpy(), strict=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total, count, hits, scored = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(dim=0).tolist()
        values = {"loss": total / max(count, 1)}
        if scored:
            values["accuracy"] = hits / scored
        elif self.subject.task.endswith("_lm"):
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
        if self.user_metrics is not None:
            values |= self.user_metrics(_prediction(gather_object(rows)))
        named = {key if key.startswith(metric_key_prefix) else f"{metric_key_prefix}_{key}": float(value) for key, value in values.items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=named, num_samples=len(dataloader.dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and stop at a loss that is no number: every later step would be lost."""
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {self.state.global_step} with learning rate {logs.get('learning_rate', 0.0):.2g}; "
                "try a lower learning rate, a longer warmup, or precision='float32'"
            )

    def restore(self, checkpoint: Path) -> None:
        """Take the weights and the history of a run that has taken its last step."""
        checkpoints.load_weights(self.subject, checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / _STATE))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        random_states = gather_object([_random_state(self.args.device)])
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
            best = self.best and checkpoints.best_of(directory, self.state.log_history, self.best)
            checkpoints.rotate(directory, self.keep, best or None)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_weights(self.subject, Path(resume_from_checkpoint))
        self.resumed_from = resume_from_checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = checkpoints.read_state(Path(checkpoint))
        if state["parameters"] != self._parameter_names():
            different = sorted(set(state["parameters"]) ^ set(self._parameter_names())) or ["their order"]
            raise TrainingError(f"{checkpoint} trained other parameters than this run would; the first difference is {different[0]}")
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
            _set_random_state(states[self.accelerator.process_index], self.args.device)

    def _parameter_names(self) -> list[str]:
        names = {id(parameter): name for name, parameter in self.subject.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]


def _score(logits: Tensor, labels: Tensor, model: Transformer) -> tuple[int, int]:
    """How many counted labels the largest logit hits, and of how many; (0, 0) for language models, regression and several labels at once."""
    if labels.is_floating_point() or labels.shape != logits.shape[:-1] or model.num_labels == 1 or model.task.endswith("_lm"):
        return 0, 0
    return int(((logits.argmax(dim=-1) == labels) & (labels != IGNORED)).sum()), int((labels != IGNORED).sum())


def _prediction(rows: list[tuple[int, Any, Any]]) -> EvalPrediction:
    """Logits and labels in the order of the data; sequences of unequal length are padded with -100."""
    rows = sorted(rows, key=lambda row: row[0])
    return EvalPrediction(predictions=_stack([row[1] for row in rows]), label_ids=_stack([row[2] for row in rows]))


def _stack(arrays: list[Any]) -> Any:
    shape = np.max([array.shape for array in arrays], axis=0)
    stacked: Any = np.full((len(arrays), *shape), IGNORED, dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        stacked[(row, *map(slice, array.shape))] = array
    return stacked


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "numpy": (kind, np.asarray(keys).tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
