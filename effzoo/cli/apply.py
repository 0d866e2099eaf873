"""`effzoo predict`, `effzoo generate` and `effzoo embed`: a saved model at work."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effzoo.arguments import number_or_none, whole, whole_or_none
from effzoo.cli import reading
from effzoo.cli.terminal import app, say
from effzoo.errors import EffzooError, IncompatibleError, OptionError
from effzoo.folder.description import is_folder
from effzoo.sites import prompt_length
from effzoo.writing import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

Folder = Annotated[
    str, typer.Argument(help="A folder of a saved model: --output of effzoo finetune, of effzoo.save, or a checkpoint.")
]
Data = Annotated[str, typer.Option(help="A file, a folder or a data set on the hub, as for effzoo finetune.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or hub id; default: that of the model.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the model's, at most 512.")]
BatchSize = Annotated[int, typer.Option(help="Rows at a time.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


@app.command()
def predict(
    folder: Folder,
    data: Data,
    output: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl file; default: lines of JSON on the standard output.")
    ] = None,
    multi_label: Annotated[
        bool,
        typer.Option(
            "--multi-label",
            help="Several labels may hold: those with a probability above 1/2. A model that was trained so says it "
            "itself.",
        ),
    ] = False,
    tokenizer: Tokenizer = None,
    text: reading.Text = None,
    text_pair: reading.TextPair = None,
    subset: reading.Subset = None,
    part: reading.Part = None,
    columns: reading.Columns = None,
    separator: reading.Separator = None,
    quoting: reading.Quoting = None,
    format: reading.Format = None,
    encoding: reading.Encoding = "utf-8",
    by: reading.By = "line",
    max_length: MaxLength = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that two windows of a long context share.")] = None,
    may_lack: Annotated[
        bool, typer.Option("--may-lack", help="A question may have no answer, as in SQuAD 2; then the answer is empty.")
    ] = False,
    batch_size: BatchSize = 16,
    precision: Precision = "float32",
) -> None:
    """Say what a saved model says of each row of a file: labels, numbers, tags or answers.

    One row for each of the data, in its order: label and probability; value (regression); words and tags (in a .csv one
    line a word); or id, question, answer and score. Labels in the data are not read.

    Example:  effzoo predict runs/news --data new.csv --output labels.csv
    """
    import effzoo
    from effzoo.architectures.heads import known_problem

    _check_output(output)
    whole_or_none("--stride", stride, least=0)
    model, words, limit = _opened(folder, tokenizer, max_length, batch_size)
    if model.task not in ("classification", "token_classification", "question_answering"):
        other = {"causal_lm": "effzoo generate", "features": "effzoo embed"}.get(
            model.task, "a pipeline of transformers"
        )
        raise IncompatibleError(f"{folder} is a model for {model.task}, which has no labels; use {other}")
    options = reading.Options.of(
        text, text_pair, None, subset, columns=columns, separator=separator, quoting=quoting, format=format,
        encoding=encoding, by=by,
    )  # fmt: skip
    known = known_problem(model)
    if multi_label and (model.task != "classification" or known not in (None, "multi_label_classification")):
        raise OptionError(
            f"--multi-label is for several labels of a text, and {folder} has {'one' if known else 'none'}"
        )
    for name, is_given in (("--stride", stride is not None), ("--may-lack", may_lack)):
        if is_given and model.task != "question_answering":
            raise OptionError(f"{name} is about questions, and {folder} is a model for {model.task}")
    table = _table(data, model, part, options)
    how: dict[str, Any] = {"task": "features"}
    if model.task != "classification":
        how = {"task": model.task, "offsets": True}
    if model.task == "question_answering":
        how |= {"stride": stride, "global_question": any(core.knows_globals() for core in model.cores())}
    tokens = reading.tokens(table, words, limit, model, how)
    if model.task == "classification":
        _tell_cut(tokens, limit)
    logits = effzoo.predict(
        model, reading.plain(tokens), batch_size=batch_size, precision=precision, progress=output is not None  # type: ignore[arg-type]
    )  # fmt: skip
    names = model.label_names if len(model.label_names) == model.num_labels else _their_names(folder, model.num_labels)
    if model.task == "classification":
        rows = _labels(table, logits, names, multi_label or known == "multi_label_classification")
    elif model.task == "token_classification":
        rows = _tags(table, tokens, logits, names, output)
    else:
        rows = _answers(table, tokens, logits, may_lack)
    _write(list(rows), output)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="The text to continue, or with --chat what the user says.")],
    chat: Annotated[bool, typer.Option("--chat", help="Write the prompt with the tokenizer's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the message of the system.")] = None,
    tokenizer: Tokenizer = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most so many tokens; default: 64, or as many as the model has room for.")
    ] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Draw tokens; default: as the model's settings say.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this mass.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Width of a beam search.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Divides logits of tokens that were there.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="No n tokens twice.")] = None,
    num_return_sequences: Annotated[int, typer.Option(help="So many texts.")] = 1,
    stop: Annotated[str | None, typer.Option(help="End behind this text.")] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep keys and values.")] = True,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Continue a text with a saved decoder.

    The options are those of transformers' GenerationConfig; what is not given is as the model's settings say.

    Example:  effzoo generate runs/novel --prompt "Call me" --max-new-tokens 40 --do-sample --top-p 0.9
    """
    import torch

    import effzoo

    whole("--num-return-sequences", num_return_sequences, least=1)
    whole_or_none("--max-new-tokens", max_new_tokens, least=1)
    whole("--seed", seed, least=0, most=2**32 - 1)
    for named, count, least in (
        ("--top-k", top_k, 0), ("--num-beams", num_beams, 1), ("--no-repeat-ngram-size", no_repeat_ngram_size, 0)
    ):  # fmt: skip
        whole_or_none(named, count, least=least)
    for named, factor in (("--temperature", temperature), ("--repetition-penalty", repetition_penalty)):
        number_or_none(named, factor, "a number above 0", lambda x: x > 0)
    number_or_none("--top-p", top_p, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
    if system is not None and not chat:
        raise OptionError("--system is a message of a conversation; give --chat beside it")
    model, words, _ = _opened(folder, tokenizer, None, 1)
    settings: dict[str, Any] = getattr(model.config, "generation", None) or {}
    draws = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
    if not (settings.get("do_sample") if do_sample is None else do_sample):
        for name, value in draws.items():
            if value is not None:
                raise OptionError(f"{name} is about tokens that are drawn; give --do-sample beside it")
    said = prompt
    if chat:
        messages = ([] if system is None else [{"role": "system", "content": system}]) + [
            {"role": "user", "content": prompt}
        ]
        if getattr(words, "chat_template", None) is None:
            raise OptionError(f"the tokenizer of {folder} has no chat template; leave --chat out")
        said = str(words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = words(said, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.shape[1]:
        raise OptionError("--prompt is empty; give at least one token")
    if max_new_tokens is None and settings.get("max_new_tokens") is None:
        room = model.config.max_length - prompt_length(model) - ids.shape[1]
        max_new_tokens = max(1, min(64, room))
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "num_beams": num_beams, "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "num_return_sequences": num_return_sequences if num_return_sequences > 1 else None,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    if stop is not None:
        options |= {"stop_strings": [stop], "tokenizer": words}
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    try:
        found = effzoo.generate(model, ids.to(device), use_cache=cache, **options)
    except ValueError as error:
        if stop is None or isinstance(error, EffzooError):
            raise
        raise OptionError(
            f"transformers finds no stop texts with the tokenizer of {folder} ({error}); leave --stop out"
        ) from error
    for row in found:
        new = words.decode(row[ids.shape[1] :], skip_special_tokens=True)
        say(new if chat else prompt + new)


@app.command()
def embed(
    folder: Folder,
    data: Data,
    output: Annotated[Path, typer.Option(help="A .npy file, which numpy.load reads: \\[rows, dim] in float32.")],
    pooling: Annotated[str, typer.Option(help="mean, cls (the first token) or last.")] = "mean",
    normalise: Annotated[bool, typer.Option("--normalise", help="Vectors of length 1.")] = False,
    tokenizer: Tokenizer = None,
    text: reading.Text = None,
    text_pair: reading.TextPair = None,
    subset: reading.Subset = None,
    part: reading.Part = None,
    columns: reading.Columns = None,
    separator: reading.Separator = None,
    quoting: reading.Quoting = None,
    format: reading.Format = None,
    encoding: reading.Encoding = "utf-8",
    by: reading.By = "line",
    max_length: MaxLength = None,
    batch_size: BatchSize = 16,
    precision: Precision = "float32",
) -> None:
    """Write a vector for each text.

    It is the mean of the last hidden states, the first or the last one.

    Example:  effzoo embed minilm-folder --data texts.txt --output vectors.npy --normalise
    """
    import numpy as np

    import effzoo
    from effzoo.data.texts import load_texts

    if output.suffix != ".npy":
        raise OptionError(f"--output is a .npy file, got {output}")
    kinds = {"mean": "mean", "cls": "first", "first": "first", "last": "last"}
    if pooling not in kinds:
        raise OptionError(f"--pooling is mean, cls or last, got {pooling!r}")
    model, words, limit = _opened(folder, tokenizer, max_length, batch_size)
    options = reading.Options.of(
        text, text_pair, None, subset, columns=columns, separator=separator, quoting=quoting, format=format,
        encoding=encoding, by=by,
    )  # fmt: skip
    table = load_texts(
        data, text=options.text, text_pair=options.text_pair, part=part, subset=options.subset, **options.file
    )
    tokens = reading.tokens(table, words, limit, model, {"task": "features"})
    _tell_cut(tokens, limit)
    vectors = effzoo.embed(
        model, tokens, pooling=kinds[pooling], normalise=normalise, batch_size=batch_size, precision=precision  # type: ignore[arg-type]
    )  # fmt: skip
    sink = io.BytesIO()
    np.save(sink, vectors.numpy())
    replace_file(output, sink.getvalue())
    say(f"vectors  {output}, {len(vectors):,} x {vectors.shape[1]:,}")


def _opened(folder: str, tokenizer: str | None, max_length: int | None, batch_size: int) -> tuple[Any, Any, int]:
    """The model, its tokenizer, and the most tokens of a text."""
    import effzoo
    from effzoo import data

    whole_or_none("--max-length", max_length, least=1)
    whole("--batch-size", batch_size, least=1)
    if Path(folder).is_dir() and not is_folder(folder) and (Path(folder) / "adapter").is_dir():
        raise OptionError(
            f"{folder} holds an adapter without its model; run effzoo finetune without --adapter-only, or load the "
            "adapter on its base and keep both with effzoo.save"
        )
    model = effzoo.load(folder)
    words = data.tokenizer_of(tokenizer or folder)
    most = model.config.max_length - prompt_length(model)
    if max_length is not None and max_length > most:
        raise OptionError(f"--max-length {max_length} is more than the {most} tokens that {folder} reads")
    return model, words, min(max_length or 512, most)


def _tell_cut(tokens: Dataset, limit: int) -> None:
    full = sum(len(ids) == limit for ids in tokens["input_ids"])
    if full:
        typer.echo(f"note: {full:,} texts fill all {limit:,} tokens, and what is longer was cut", err=True)


def _table(source: str, model: Any, part: str | None, options: reading.Options) -> Dataset:
    from effzoo import data
    from effzoo.data.texts import load_texts

    shared: dict[str, Any] = {"part": part, "subset": options.subset}
    if model.task == "token_classification":
        table = data.load_tags(
            source, words=options.text, format=options.file["format"], encoding=options.file["encoding"], **shared
        )
        return table.select_columns(["words"])
    if model.task == "question_answering":
        table = data.load_questions(source, encoding=options.file["encoding"], **shared)
        return table.select_columns(["id", "question", "context"])
    return load_texts(source, text=options.text, text_pair=options.text_pair, **shared, **options.file)


def _labels(table: Dataset, logits: Any, names: Sequence[str], several: bool) -> Iterator[dict[str, Any]]:
    texts = {name: table[name] for name in table.column_names}
    for row, scores in enumerate(logits):
        given = {name: values[row] for name, values in texts.items()}
        if len(scores) == 1:
            yield given | {"value": round(float(scores[0]), 6)}
        elif several:
            shares = scores.sigmoid().tolist()
            held = [name for name, share in zip(names, shares, strict=True) if share > 0.5]
            chances = {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
            yield given | {"labels": held, "probabilities": chances}
        else:
            shares = scores.softmax(-1)
            best = int(shares.argmax())
            yield given | {"label": names[best], "probability": round(float(shares[best]), 6)}


def _tags(
    table: Dataset, tokens: Dataset, logits: Any, names: Sequence[str], output: Path | None
) -> Iterator[dict[str, Any]]:
    from effzoo import data

    tags = data.tags_of(table, tokens, [scores.numpy() for scores in logits], names)
    lost = sum(tag is None for row in tags for tag in row)
    if lost:
        typer.echo(
            f"note: {lost:,} words are beyond the longest sequence and have no tag; raise --max-length", err=True
        )
    for row, (words, found) in enumerate(zip(table["words"], tags, strict=True)):
        if output is not None and output.suffix == ".csv":
            for word, tag in zip(words, found, strict=True):
                yield {"row": row, "word": word, "tag": tag or ""}
        else:
            yield {"words": words, "tags": found}


def _answers(table: Dataset, tokens: Dataset, logits: Any, may_lack: bool) -> Iterator[dict[str, Any]]:
    from effzoo import data

    answers = data.answers_of(table, tokens, [scores.numpy() for scores in logits], may_lack=may_lack)
    for row, answer in zip(table, answers, strict=True):
        yield {
            "id": row["id"], "question": row["question"], "answer": answer.text, "start": answer.start,
            "score": round(answer.score, 4),
        }  # fmt: skip


def _their_names(folder: str, count: int) -> Sequence[str]:
    """Names of labels in the config of a checkpoint of transformers; numbers where there are none."""
    try:
        said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        names = [str(said[str(number)]) for number in range(count)]
    except (OSError, ValueError, KeyError, AttributeError):
        return [str(number) for number in range(count)]
    return names


def _check_output(output: Path | None) -> None:
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise OptionError(f"--output is a .csv or .jsonl file, got {output}")


def _write(rows: list[dict[str, Any]], output: Path | None) -> None:
    if output is not None and output.suffix == ".csv":
        sink = io.StringIO(newline="")
        table = csv.DictWriter(sink, list(rows[0]))
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        content = sink.getvalue()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        typer.echo(content, nl=False)
        return
    replace_file(output, content.encode())
    say(f"predictions  {output}, {len(rows):,} rows")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "|".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
