"""`effzoo finetune`: data, model, training and the account of it, in one command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.logging import RichHandler

from effzoo.arguments import number, number_or_none, whole, whole_or_none
from effzoo.cli import reading
from effzoo.cli.own import File, loaded
from effzoo.cli.show import Attention
from effzoo.cli.terminal import app, console, heading, pairs, say
from effzoo.errors import DataError, IncompatibleError, OptionError, listing
from effzoo.folder.description import is_folder, read_description
from effzoo.folder.saving import write
from effzoo.sites import prompt_length
from effzoo.spec import parse_one
from effzoo.writing import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

    from effzoo.architectures import Transformer
    from effzoo.train import Result


@app.command()
def finetune(
    command: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A model of the zoo, a TOML file of your own, or a folder of a saved model.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A .csv, .tsv, .jsonl, .parquet, .txt or .conll file, a folder with train, dev and test, or a "
            "data set on the hub."
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
        str | None,
        typer.Option(help="Data to evaluate on; default: the validation part, or else a share, see --holdout."),
    ] = None,
    evaluation_part: Annotated[
        str | None, typer.Option(help="Part to evaluate on, of --evaluation or of --data; default: validation.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of the data that is kept for evaluation.")] = 0.1,
    task: Annotated[str, typer.Option(help=", ".join(reading.TASKS) + ".")] = "classification",
    text: reading.Text = None,
    text_pair: reading.TextPair = None,
    label: reading.Label = None,
    label_separator: reading.LabelSeparator = None,
    subset: reading.Subset = None,
    part: reading.Part = None,
    columns: reading.Columns = None,
    separator: reading.Separator = None,
    quoting: reading.Quoting = None,
    format: reading.Format = None,
    encoding: reading.Encoding = "utf-8",
    by: reading.By = "line",
    stride: Annotated[
        int | None, typer.Option(help="Tokens that two windows of a long context share (question_answering).")
    ] = None,
    every_piece: Annotated[
        bool, typer.Option("--every-piece", help="Every token of a word has its tag, not only the first.")
    ] = False,
    packing: Annotated[
        bool, typer.Option("--packing", help="Join short texts into long rows, in which they do not see each other.")
    ] = False,
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
        Path | None, typer.Option(help="Learn beside the labels from another model: the folder of a saved one.")
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
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Leave the adapter alone in --output, not the whole model as well.")
    ] = False,
    file: File = None,
) -> None:
    """Fine-tune a model on texts, by default to classify them, and save the adapter.

    The labels are read from the data. Run the same command with --resume to continue after an interruption.

    Example:  effzoo finetune minilm --pretrained own --data news.csv --peft "lora\\[rank=8]" --output runs/news

    --output is then a folder that effzoo predict, effzoo.load and --teacher take.
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

    command.with_resource(loaded(file))
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
    kind = reading.task_of(task)
    given = reading.Options.of(
        text, text_pair, label, subset, label_separator=label_separator, columns=columns, separator=separator,
        quoting=quoting, format=format, encoding=encoding, by=by,
    )  # fmt: skip
    _check_of_task(task, stride, every_piece, packing)
    train = reading.table(data, task, part, given)
    if kind == "question_answering" and "answers" not in train.column_names:
        raise DataError(f"the questions of {data} have no answers, so there is nothing to learn")
    labels = texts.names(train) if kind.endswith("classification") else None
    if labels is None and task == "classification":
        raise OptionError(
            f"the labels of {data} are numbers with a fraction, such as {train['label'][0]!r}, and --task "
            "classification tells names apart; give --task regression, or write the labels as names or whole numbers"
            if "label" in train.column_names
            else f"{data} has no column of labels; name it with --label. Columns read: {listing(train.column_names)}."
        )
    if labels is not None and len(labels) == 1:
        raise DataError(f"{data}: all labels are {labels[0]!r}, so there is nothing to tell apart")
    entry: str | None = model
    if Path(model).is_dir():
        entry, pretrained = None, model
    reused = is_folder(pretrained)
    if reused and peft != "none" and (there := read_description(Path(str(pretrained))).adapters):
        raise OptionError(
            f"{pretrained} holds adapters ({listing(there)}), and --peft {peft} would be another beside them; give "
            "--peft none to train on, or effzoo.merge or effzoo.detach them, and effzoo.save it in another folder"
        )
    settings: Any = _sizes_of(str(pretrained), kind) if entry is None or reused else effzoo.zoo.config(model)
    if labels is not None and reused:
        known = read_description(Path(str(pretrained))).label_names
        if set(known) == set(labels) and list(known) != labels:  # the head's own order
            labels = list(known)
            train = reading.aligned(train, labels, data)
    train, held_out = _parts(train, data, task, part, evaluation, evaluation_part, holdout, seed, given)
    words = texts.tokenizer_of(tokenizer or (pretrained if pretrained not in (None, "own") else settings))
    same: dict[str, Any] = {"task": kind, "pretrained": True if pretrained == "own" else pretrained}
    if kind.endswith("classification"):
        same["num_labels"] = 1 if labels is None else len(labels)
    longest = max_length or min(settings.max_length, 512)
    if not reused or longest > settings.max_length:  # a saved model keeps its positions where they are enough
        same["max_length"] = longest
    torch.manual_seed(seed)
    built = effzoo.build(entry, attention=attention, peft=None if peft == "none" else peft, **same)
    if teacher is None and (distillation or teacher_attention):
        raise OptionError(
            "--distillation and --teacher-attention are about a teacher; give --teacher, the --output "
            "folder of an earlier run"
        )
    taught: dict[str, Any] = {}
    if teacher is not None:
        taught["teacher"] = _teacher(teacher, teacher_attention, entry, same, seed)
        taught["distillation"] = parse_one(f"distillation[{distillation}]").options
    if pretrained is None:
        say("note: no --pretrained, so the weights start at random")
    limit = min(longest, built.config.max_length) - prompt_length(built)
    if labels is not None and len(labels) == built.num_labels:
        built.label_names = tuple(labels)
    how = {"task": kind, "seed": seed, **_of_task(kind, train, built, stride, every_piece)}
    tokens = [reading.tokens(part, words, limit, built, how) for part in (train, held_out)]
    measured = reading.metrics_for(task, held_out, tokens[1], labels)
    say(
        heading(f"{model} with {peft} on {data}"),
        _sizes(train, held_out, tokens, labels, limit, "rows" in how.values() or "stride" in how),
    )
    from effzoo.train.progress import Bar

    result = effzoo.finetune(
        built, reading.plain(tokens[0]), evaluate=reading.plain(tokens[1]), output_dir=output, epochs=epochs,
        batch_size=batch_size, metrics=measured, packing=packing,
        learning_rate=learning_rate, precision=cast(Any, precision), seed=seed, resume=resume, progress=False,
        recompute=cast(Any, "blocks" if gradient_checkpointing else recompute), callbacks=[Bar(console())],
        optimisation=Optimisation(calibration_batches=calibration_batches), saving=Saving(overwrite=overwrite),
        **taught,
    )  # fmt: skip
    if result.adapter is None:
        words.save_pretrained(output)
    elif not adapter_only:
        try:
            write(built, output, tokenizer=words, metrics=result.metrics)
        except IncompatibleError as error:  # the adapter is there
            say(f"note: the whole model is not written: {error}")
            adapter_only = True
    _report(result, built, output, not adapter_only)


def _check_of_task(task: str, stride: int | None, every_piece: bool, packing: bool) -> None:
    """OptionError for an option that has no meaning for a task."""
    whole_or_none("--stride", stride, least=0)
    wrong = {
        "--stride": stride is not None and task != "question_answering",
        "--every-piece": every_piece and task != "token_classification",
        "--packing": packing and task not in ("causal_lm", "masked_lm", "token_classification"),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise OptionError(f"{name} has no meaning for --task {task}; leave it out")


def _of_task(kind: str, train: Dataset, model: Transformer, stride: int | None, every_piece: bool) -> dict[str, Any]:
    """How a task's data becomes tokens."""
    if kind == "question_answering":
        knows_globals = any(core.knows_globals() for core in model.cores())
        return {"stride": stride, "offsets": True, "global_question": knows_globals}
    if kind == "token_classification":
        return {"every_piece": every_piece}
    return {"overflow": "rows"} if kind.endswith("_lm") and "messages" not in train.column_names else {}


def _teacher(folder: Path, attention: str | None, entry: str | None, same: dict[str, Any], seed: int) -> Transformer:
    """The model of a saved folder, or of the --output folder of a run that left its adapter or weights alone."""
    import torch

    import effzoo
    from effzoo.tensors import names_of
    from effzoo.train import checkpoints

    if is_folder(folder):
        if attention is not None:
            raise OptionError(f"--teacher {folder} says its attention itself; leave --teacher-attention out")
        whole_model: Transformer = effzoo.load(folder)
        return whole_model
    torch.manual_seed(seed)
    model = effzoo.build(entry, attention=attention, **same)
    if (folder / checkpoints.ADAPTER).is_dir():
        return effzoo.load_adapter(model, folder / checkpoints.ADAPTER)
    if not any((folder / name).is_file() for name in names_of()):
        raise OptionError(
            f"--teacher {folder} holds no saved model, and neither {checkpoints.ADAPTER} nor {checkpoints.WEIGHTS}; "
            "give the --output folder of a finished run"
        )
    checkpoints.load_weights(model, folder)
    return model


def _sizes_of(folder: str, task: str) -> Any:
    """The configuration of a saved model, or of a checkpoint of transformers."""
    if is_folder(folder):
        return read_description(Path(folder)).config
    from effzoo.convert.source import encodes, open_source

    return open_source(folder, task, encoder=encodes(task)).config


def _parts(
    train: Dataset, source: str, task: str, part: str | None, evaluation: str | None, evaluation_part: str | None,
    holdout: float, seed: int, options: reading.Options,
) -> tuple[Dataset, Dataset]:  # fmt: skip
    """The examples to train and to evaluate on, with the same numbers for the same labels."""
    from effzoo import data as texts

    if evaluation is None and evaluation_part is None and part in (None, "train"):
        there = texts.parts(source, subset=options.subset, format=options.file["format"])
        evaluation_part = "validation" if "validation" in there else None
    if evaluation is None and evaluation_part is None:
        divided = texts.split(train, {"train": 1 - holdout, "test": holdout}, seed=seed)
        return divided["train"], divided["test"]
    options = options if evaluation is None else options.elsewhere()
    other = reading.table(evaluation or source, task, evaluation_part, options)
    named = f"{evaluation or source}{f' ({evaluation_part})' if evaluation_part else ''}"
    if task == "question_answering" and "answers" not in other.column_names:
        raise DataError(f"the questions of {named} have no answers, so nothing can be measured")
    return train, reading.aligned(other, texts.names(train), named)


def _sizes(
    train: Dataset, held_out: Dataset, tokens: list[Dataset], labels: list[str] | None, limit: int, overflow: bool
) -> str:
    named = "" if labels is None else f", {len(labels)} labels: {', '.join(labels[:12])}{', ...' * (len(labels) > 12)}"
    rows = ["" if len(a) == len(b) else f" ({len(b):,} rows)" for a, b in zip((train, held_out), tokens, strict=True)]
    full = 0 if overflow else sum(len(ids) == limit for ids in tokens[0]["input_ids"])
    cut = f"; {full:,} texts fill them all, and what is longer was cut" if full else ""
    return (
        f"{len(train):,} texts{rows[0]} to train on, {len(held_out):,}{rows[1]} to evaluate on, up to {limit:,} "
        f"tokens{named}{cut}"
    )


def _report(result: Result, model: Transformer, output: Path, whole: bool) -> None:
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
    if whole or result.adapter is None:
        say(f"model    {output}, for effzoo predict, generate or embed, and effzoo.load")
