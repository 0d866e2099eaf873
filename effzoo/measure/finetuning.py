"""The suite `finetune`: what one training step costs under every attention kind and fine-tuning method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effzoo.peft
from effzoo import zoo
from effzoo.builder import build
from effzoo.errors import EffzooError, OptionError
from effzoo.measure import cards
from effzoo.measure import rows as files
from effzoo.measure.kept import kept
from effzoo.measure.layer import Case
from effzoo.measure.memory import OUT_OF_MEMORY, peak, reason
from effzoo.measure.prediction import of_device, predict_step
from effzoo.measure.rows import Row
from effzoo.measure.scaling import KINDS, timed
from effzoo.measure.timing import Maker, fitting, release
from effzoo.recompute import Level, save_memory

METHODS = ("full", "lora", "bitfit", "ia3", "houlsby", "parallel", "prefix", "prompt", "dora", "ladder")
SIZES = {"layers": 6, "dim": 384, "heads": 12, "mlp": 1536, "vocab": 1000}
PROMPT = 64  # positions that are left for rows in front of the input
REFERENCE = "full"  # the method that the others are compared with, in the same rounds


@dataclass(frozen=True)
class Step:
    """One training step of a classifier as `finetune` takes it: forward, backward and AdamW. precision: "float32", or
    "bfloat16" by autocast."""

    attention: str
    peft: str
    length: int = 512
    batch: int = 4
    model: str = "bert"
    dropout: float = 0.0
    precision: str = "float32"
    device: str = "cpu"
    recompute: Level = "hidden"
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise OptionError(f"precision is float32 or bfloat16, got {self.precision!r}")

    def choices(self) -> dict[str, Any]:
        """What `build` is given."""
        dropout = {"dropout": self.dropout, "attention_dropout": self.dropout}
        return {
            "attention": self.attention,
            "task": "classification",
            "num_labels": 2,
            "max_length": self.length + PROMPT,
            **dropout,
            **self.sizes,
        }

    def trained(self) -> torch.nn.Module:
        """The model with the method attached, from seed 0, made where it is used."""
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(0)
            model = build(self.model, peft=self.peft, **self.choices()).to(self.device).train()
        save_memory(model, self.recompute)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """In which precision the forward pass runs."""
        return (
            torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
            if self.precision == "bfloat16"
            else nullcontext()
        )

    def kept(self) -> dict[str, int]:
        """What autograd keeps of the forward pass, as it runs on this device: bytes by cause, as in `plan`."""
        model, inputs = self.trained(), self.inputs()

        def forward() -> Tensor:
            with self.autocast():
                return effzoo.peft.loss(model, **inputs)

        return kept(model, inputs, forward)

    def inputs(self) -> dict[str, Tensor]:
        """Token ids and labels, drawn from seed 1."""
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(5, self.sizes["vocab"], (self.batch, self.length), generator=draw)
        return {
            "input_ids": ids.to(self.device),
            "labels": torch.randint(2, (self.batch,), generator=draw).to(self.device),
        }

    def runner(self) -> Callable[[], object]:
        """What is timed: one call is one step."""
        model, inputs = self.trained(), self.inputs()
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

        def step() -> None:
            with self.autocast():
                loss = effzoo.peft.loss(model, **inputs)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step


@dataclass(frozen=True)
class Finetuning:
    """Settings of the suite. seconds: for the rounds of one attention kind."""

    kinds: Sequence[str] = KINDS
    methods: Sequence[str] = METHODS
    length: int = 512
    batch: int = 4
    dropout: float = 0.0
    precision: str = "float32"
    device: str = "cpu"
    recompute: Level = "hidden"
    seconds: float = 60.0
    model: str = "bert"
    sizes: dict[str, int] | None = None

    def step(self, kind: str, method: str) -> Step:
        return Step(
            kind, method, self.length, self.batch, self.model, self.dropout, self.precision, self.device,
            self.recompute, dict(SIZES) if self.sizes is None else self.sizes,
        )  # fmt: skip

    def run(self, path: Path, tell: Callable[[str, int, int], None] = lambda said, done, total: None) -> list[Row]:
        """Measure what the file does not hold yet, one attention kind at a time, and append it. tell: called with what
        comes, done and total."""
        cards.need(self.device)
        known = files.read(path, "finetune", self.device)
        for done, kind in enumerate(self.kinds):
            tell(kind, done, len(self.kinds))
            have = [{key: row.get(key) for key in asdict(self.step(kind, ""))} for row in known]
            steps = [step for method in self.methods if asdict(step := self.step(kind, method)) not in have]
            if not steps:
                continue
            if REFERENCE in self.methods and steps[0].peft != REFERENCE:
                steps.insert(0, self.step(kind, REFERENCE))
            new = [files.made(row, self.device) for row in self._group(steps)]
            files.append(path, new)
            known += new
        tell("done", len(self.kinds), len(self.kinds))
        return known

    def _group(self, steps: list[Step]) -> list[Row]:
        results: dict[str, Row] = {}
        ready: dict[str, Maker] = {}
        made: dict[str, tuple[Step, int, int]] = {}
        for step in steps:
            row = results[step.peft] = {"suite": "finetune", **asdict(step)}
            try:
                model = step.trained()
            except EffzooError as refusal:
                row["failed"] = f"refused: {refusal}"
                continue
            row["trainable"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            multiplied = [
                weight for weight in model.parameters() if weight.ndim == 2 and weight.shape[0] != step.sizes["vocab"]
            ]
            made[step.peft] = (
                step,
                sum(w.numel() for w in multiplied),
                sum(w.numel() for w in multiplied if w.requires_grad),
            )
            del model
            measured = peak(step)
            row["peak_bytes"], failed = measured.bytes, measured.failed
            if not failed:
                try:
                    row["saved"] = step.kept()
                except (RuntimeError, MemoryError) as error:
                    failed = reason(error)
                release(step.device)
            if failed:
                row["failed"] = failed
            else:
                ready[step.peft] = step.runner
        times, alone = fitting(ready, seconds=self.seconds, device=self.device)
        for name in ready:
            results[name] |= {"alone": True} if alone else {}
            if name not in times:
                results[name]["failed"] = OUT_OF_MEMORY
        for name, step_times in times.items():
            results[name] |= timed(step_times, times.get(REFERENCE))
            results[name]["tokens_per_second"] = self.batch * self.length / step_times.median
            results[name] |= _predicted(*made[name], results[name])
        return list(results.values())


def _predicted(step: Step, matrices: int, trained: int, row: Row) -> Row:
    """The prediction for a step, and its share of the time; nothing for kinds that are not known. matrices: numbers in
    them; trained: of these."""
    sizes, dtype = step.sizes, step.precision
    layer = Case(step.attention, "train", step.length, sizes["dim"], sizes["heads"], step.batch, dtype, step.device)
    made = predict_step(
        layer, of_device(step.device), layers=sizes["layers"], causal=zoo.config(step.model).causal, matrices=matrices,
        trained=trained, trainable=row["trainable"], saved=sum(row["saved"].values()),
    )  # fmt: skip
    return {} if made is None else {"predicted": made.row(), "roofline": made.device_seconds / row["seconds"]}
