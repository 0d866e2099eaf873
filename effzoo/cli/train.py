"""`effzoo finetune`: data, model, training and the account of it, in one command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.logging import RichHandler

from effzoo.cli.show import Attention
from effzoo.cli.terminal import app, console, heading, pairs, say
from effzoo.errors import DataError, OptionError
from effzoo.sites import prompt_length
from effzoo.spec import parse_one
from effzoo.train.settings import number, number_or_none, whole, whole_or_none
from effzoo.writing import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

    from effzoo.architectures import Transformer
    from effzoo.train import Result


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="A model of the zoo, or a TOML file of your own.")],
    data: Annotated[
        str,
        typer.Option(
            help="Texts with labels: a .csv, .tsv, .jsonl, .parquet or .txt file, a folder, or a data set on the hub."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the checkpoints and the learning curves.")],
    peft: Annotated[
        str,
        typer.Option(help='What is trained: "lora\\[rank=4]", "prefix|lora", ...; "none" trains all weights in place.'),
    ] = "lora",
    attention: Attention = None,
    pretrained: Annotated[
        str | None, typer.Option(help='Weights to start from: a folder, a hub id, or "own" for those of the model.')
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: where the weights come from.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Texts to evaluate on; default: a share of the data, see --holdout.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of the data that is kept for evaluation.")] = 0.1,
    text: Annotated[str | None, typer.Option(help="Column of the texts; default: found by its name.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels; default: found by its name.")] = None,
    task: Annotated[str, typer.Option(help="classification, masked_lm or causal_lm.")] = "classification",
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest sequence in tokens, prompts included; default: the model's, at most 512."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: each method's own, 5e-5 for all weights.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Learn beside the labels from a model of an earlier run: its --output folder.")
    ] = None,
    teacher_attention: Annotated[
        str | None, typer.Option(help="With which --attention the teacher was trained; default: the model's own.")
    ] = None,
    distillation: Annotated[
        str, typer.Option(help='Weights of the parts: "logits=0.5, labels=0.5, hidden=1, attention=1, temperature=2".')
    ] = "",
    calibration_batches: Annotated[
        int, typer.Option(help="Batches that methods see which choose by looking at data, before the first step.")
    ] = 8,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    recompute: Annotated[
        str, typer.Option(help="Computed again for the backward pass: nothing, hidden, or blocks (least memory).")
    ] = "hidden",
    seed: Annotated[int, typer.Option(help="Of the weights that start at random, the split and the order.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the checkpoints of an earlier run in --output.")
    ] = False,
) -> None:
    """Fine-tune a model on texts, by default to classify them, and save the adapter.

    The labels are read from the data. Run the same command with --resume to continue after an interruption.

    Example:  effzoo finetune minilm --pretrained own --data news.csv --peft "lora\\[rank=8]" --output runs/news
    """
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console(), show_time=False, show_path=False)],
    )
    import torch

    import effzoo
    from effzoo import data as texts
    from effzoo.train import Optimisation, Saving

    number("--holdout", holdout, "a share between 0 and 1", lambda x: 0 < x < 1)
    number("--epochs", epochs, "a positive number", lambda x: x > 0)
    number_or_none("--learning-rate", learning_rate, "a number above 0", lambda x: x > 0)
    whole("--seed", seed, least=0, most=2**32 - 1)
    for name, value in (
        ("--batch-size", batch_size),
        ("--calibration-batches", calibration_batches),
        ("--max-length", max_length),
    ):
        whole_or_none(name, value, least=1)
    table = texts.load_text(data, text=text, label=label)
    labels = texts.names(table)
    train, held_out = _parts(table, evaluation, holdout, seed, text, label)
    settings = effzoo.zoo.config(model)
    words = texts.tokenizer_of(tokenizer or (pretrained if pretrained not in (None, "own") else settings))
    same: dict[str, Any] = {
        "task": task, "num_labels": 2 if task != "classification" else 1 if labels is None else len(labels),
        "pretrained": True if pretrained == "own" else pretrained,
        "max_length": max_length or min(settings.max_length, 512),
    }  # fmt: skip
    torch.manual_seed(seed)
    built = effzoo.build(model, attention=attention, peft=None if peft == "none" else peft, **same)
    if teacher is None and (distillation or teacher_attention):
        raise OptionError(
            "--distillation and --teacher-attention are about a teacher; give --teacher, the --output "
            "folder of an earlier run"
        )
    taught: dict[str, Any] = {}
    if teacher is not None:
        torch.manual_seed(seed)
        taught["teacher"] = _trained(effzoo.build(model, attention=teacher_attention, **same), teacher)
        taught["distillation"] = parse_one(f"distillation[{distillation}]").options
    if pretrained is None:
        say("note: no --pretrained, so the weights start at random")
    limit = built.config.max_length - prompt_length(built)
    tokens = [texts.tokenise(part, words, limit, task=task, seed=seed) for part in (train, held_out)]
    say(heading(f"{model} with {peft} on {data}"), _sizes(train, held_out, labels, limit))
    from effzoo.cli.progress import Bar

    bar = Bar(console())
    try:
        result = effzoo.finetune(
            built, tokens[0], evaluate=tokens[1], output_dir=output, epochs=epochs, batch_size=batch_size,
            learning_rate=learning_rate, precision=cast(Any, precision), seed=seed, resume=resume, progress=False,
            recompute=cast(Any, "blocks" if gradient_checkpointing else recompute), callbacks=[bar],
            optimisation=Optimisation(calibration_batches=calibration_batches), saving=Saving(overwrite=overwrite),
            **taught,
        )  # fmt: skip
    finally:
        bar.close()
    _report(result, built, output)


def _trained(model: Transformer, folder: Path) -> Transformer:
    """A model as an earlier `effzoo finetune` left it in its --output folder."""
    import effzoo
    from effzoo.train import checkpoints

    if (folder / checkpoints.ADAPTER).is_dir():
        return effzoo.load_adapter(model, folder / checkpoints.ADAPTER)
    if not (folder / checkpoints.WEIGHTS).is_file():
        raise OptionError(
            f"--teacher {folder} holds neither {checkpoints.ADAPTER} nor {checkpoints.WEIGHTS}; give the --output "
            "folder of a finished run"
        )
    checkpoints.load_weights(model, folder)
    return model


def _parts(
    table: Dataset, evaluation: str | None, holdout: float, seed: int, text: str | None, label: str | None
) -> tuple[Dataset, Dataset]:
    """The examples to train and to evaluate on, with the same numbers for the same labels."""
    from effzoo import data as texts

    if evaluation is None:
        parts = texts.split(table, {"train": 1 - holdout, "test": holdout}, seed=seed)
        return parts["train"], parts["test"]
    other = texts.load_text(evaluation, text=text, label=label)
    known, names = texts.names(table), texts.names(other)
    if known == names:
        return table, other
    if known is None or names is None or set(names) - set(known):
        strange = sorted(set(names or ()) - set(known or ()))
        raise DataError(
            f"the labels of {evaluation} are not those of the training data: "
            f"{', '.join(strange) or 'one of the two has none'}"
        )
    return table, other.align_labels_with_mapping({name: number for number, name in enumerate(known)}, "label")


def _sizes(train: Dataset, held_out: Dataset, labels: list[str] | None, limit: int) -> str:
    named = "" if labels is None else f", {len(labels)} labels: {', '.join(labels[:12])}{', ...' * (len(labels) > 12)}"
    return f"{len(train):,} texts to train on, {len(held_out):,} to evaluate on, up to {limit:,} tokens{named}"


def _report(result: Result, model: Transformer, output: Path) -> None:
    """Metrics, account and files."""
    import effzoo
    from effzoo import plots

    lines: list[tuple[str, Any]] = [
        (name.removeprefix("eval_"), f"{value:.4g}") for name, value in result.metrics.items()
    ]
    lines += [
        ("steps", f"{result.steps:,}"),
        ("seconds", f"{result.seconds:.1f}"),
        ("peak memory", f"{result.peak_memory / 2**20:,.0f} MiB"),
    ]
    say("", heading("result"), pairs(lines), "", heading("account"), str(effzoo.account(model)), "")
    if result.untouched:
        say(f"note: {result.untouched}", "")
    if result.history:
        replace_file(output / "curves.png", plots.png_bytes(plots.learning_curves(result.history)))
        say(f"curves   {output / 'curves.png'}")
    say(f"weights  {result.weights}")
