"""The main job: a real BERT, its attention swapped for Longformer, LoRA attached, fine-tuned on long news documents.

MiniLM's weights and BBC News come from the package index (the `demo` extra); nothing is downloaded while this runs. Two
baselines run beside it: a linear head on frozen features, and the same base, recipe and LoRA with full attention on the
first 128 tokens.

Both fine-tuned models start with the head of the first baseline, so that LoRA does not have to move the features before
a head reads them (linear probing, then fine-tuning: Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import html
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

import effzoo
from effzoo import data, plots
from effzoo.lab.fit import bfloat16_is_faster
from effzoo.lab.texts import news as bbc_news
from effzoo.train import Saving
from effzoo.writing import replace_file

SHORT, LONG, WINDOW = 128, 1024, 256
PEFT = "lora[rank=8]"
SIZES = {"dropout": 0.0, "attention_dropout": 0.0}  # attention without dropout runs in the fused kernel
RECIPE: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "group_by_length": True}
RHYTHM: dict[str, Any] = {"log_every": 10, "evaluate_every": 94, "eval_batch_size": 16}
SPLIT = {"train": 0.7, "validation": 0.1, "test": 0.2}
Head = tuple[torch.Tensor, torch.Tensor]
console = Console()


@dataclass
class Row:
    """One line of the comparison."""

    name: str
    tokens: int
    correct: int
    test: int
    trainable: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.test

    @property
    def interval(self) -> float:
        """Half of the 95 % interval of a share (normal approximation)."""
        return 1.96 * (self.accuracy * (1 - self.accuracy) / self.test) ** 0.5


def main(
    output: Annotated[Path, typer.Option(help="Where adapter, results.json and report.html go.")] = Path("runs/demo"),
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where this machine multiplies faster in it.")
    ] = "auto",
    seed: Annotated[
        int, typer.Option(help="Of the LoRA matrices, the head and the order of the batches; the split is fixed.")
    ] = 0,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write the results here (the README's figures: benchmarks/results/demo.json)."),
    ] = None,
) -> None:
    """Fine-tune MiniLM with Longformer attention and LoRA on long BBC News documents, and compare with two
    baselines."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.monotonic()
    precision = faster_precision() if precision == "auto" else precision
    console.rule("BBC News")
    parts, classes = news()
    texts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    console.print(f"{texts} documents, {len(classes)} classes; forward passes in {precision}")
    tokenizer = data.tokenizer_of(build(SHORT))
    short, long = ({name: tokens(part, tokenizer, length) for name, part in parts.items()} for length in (SHORT, LONG))

    rows, histories = [], {}
    console.rule(f"Baseline 1: a linear head on frozen features of the first {SHORT} tokens")
    row, start_head = frozen(short, precision)
    rows.append(row)
    console.rule(f"Baseline 2: full attention, LoRA, the first {SHORT} tokens")
    name = f"full attention, {SHORT} tokens"
    _, row, histories[name] = tuned(
        "full attention, LoRA", short, SHORT, "full", start_head, output / "short", precision, seed
    )
    rows.append(row)
    console.rule(f"Longformer attention (window {WINDOW}), LoRA, {LONG} tokens")
    name, attention = f"Longformer, {LONG} tokens", f"longformer[window={WINDOW}]"
    model, row, histories[name] = tuned(
        "Longformer attention, LoRA", long, LONG, attention, start_head, output / "long", precision, seed
    )
    rows.append(row)

    console.rule("Adapter: saved, loaded into a fresh base, compared")
    folder = effzoo.save_adapter(model, output / "adapter")
    fresh = effzoo.load_adapter(build(LONG, attention), folder)
    before, after = (effzoo.predict(m, long["validation"], precision=precision) for m in (model, fresh))
    if not torch.equal(before, after):
        raise SystemExit(
            f"the loaded adapter predicts differently on {int((before != after).any(dim=1).sum())} of "
            f"{len(before)} documents"
        )
    console.print(f"the loaded adapter gives the same logits, bit for bit, on all {len(before)} validation documents")

    account = effzoo.account(model)
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    results = {
        "rows": [asdict(row) for row in rows],
        "account": {
            "trainable": account.trainable,
            "total": account.total,
            "percent": account.percent,
            "bytes_on_disk": on_disk,
            "text": str(account),
        },
        "longer_than_512": share_longer(long["test"], 512),
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": peak_memory(),
        "precision": precision,
        "settings": {
            "peft": PEFT,
            "attention": attention,
            "split": {k: len(v) for k, v in parts.items()},
            "seed": seed,
            **RECIPE,
            **RHYTHM,
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
    }
    for path in (output / "results.json", *([record] if record else [])):
        replace_file(path, (json.dumps(results, indent=1) + "\n").encode())
    replace_file(output / "report.html", report(results, rows, histories, attention).encode())
    show(results, rows)
    console.print(f"\nreport: {output / 'report.html'}   results: {output / 'results.json'}   adapter: {folder}")


def news() -> tuple[dict[str, Any], list[str]]:
    """BBC News, stratified into train, validation and test; a text that occurs twice is kept once, or it could be in
    train and test."""
    try:
        folder = bbc_news()
    except effzoo.EffzooError as missing:
        raise SystemExit(str(missing)) from None
    everything = data.load_text(folder, encoding=("utf-8", "latin-1"))
    seen: set[str] = set()
    first = [i for i, text in enumerate(everything["text"]) if not (text.strip() in seen or seen.add(text.strip()))]
    console.print(
        f"{len(everything)} documents, {len(everything) - len(first)} of them repeat another word for word "
        "and are left out"
    )
    return data.split(everything.select(first), SPLIT, seed=0), data.names(everything) or []


def build(length: int, attention: str = "full", task: str = "classification") -> Any:
    """MiniLM with its real weights."""
    return effzoo.build(
        "minilm", attention=attention, task=task, num_labels=5, pretrained=True, max_length=max(length, 512), **SIZES
    )


def tokens(part: Any, tokenizer: Any, length: int) -> Any:
    return data.tokenise(part, tokenizer, length)


def frozen(parts: dict[str, Any], precision: str) -> tuple[Row, Head]:
    """Logistic regression on the mean of the last hidden states: its one constant is chosen on the validation
    documents.

    Returned beside the result: the head at constant 1, whose loss is not yet so near 0 that nothing is left to learn.
    """
    start = time.monotonic()
    model = build(SHORT, task="features")
    features = {name: effzoo.predict(model, part, precision=precision).numpy() for name, part in parts.items()}
    heads = {
        c: LogisticRegression(C=c, max_iter=3000).fit(features["train"], parts["train"]["labels"])
        for c in (0.1, 1, 10, 100)
    }
    best = max(heads.values(), key=lambda head: head.score(features["validation"], parts["validation"]["labels"]))
    correct = int((best.predict(features["test"]) == parts["test"]["labels"]).sum())
    row = Row(
        "frozen features, linear head",
        SHORT,
        correct,
        len(parts["test"]),
        best.coef_.size + len(best.intercept_),
        time.monotonic() - start,
    )
    console.print(said(row))
    return row, (torch.from_numpy(heads[1].coef_), torch.from_numpy(heads[1].intercept_))


def tuned(
    name: str, parts: dict[str, Any], length: int, attention: str, head: Head, output: Path, precision: str, seed: int
) -> tuple[Any, Row, Any]:
    """Fine-tune with LoRA and count the correct test documents."""
    start = time.monotonic()
    torch.manual_seed(seed)
    model = effzoo.attach(build(length, attention), PEFT)
    head_copy = model.head.out.of("default")["head"]  # the adapter's copy of the task head
    with torch.no_grad():
        head_copy.own_weight.copy_(head[0])
        head_copy.own_bias.copy_(head[1])
    console.print(str(effzoo.account(model)), highlight=False)
    options = {"output_dir": output, "precision": precision, "seed": seed, **RECIPE}
    saving = Saving(overwrite=True, **RHYTHM)
    result = effzoo.finetune(model, parts["train"], evaluate=parts["validation"], saving=saving, **options)
    predicted = effzoo.predict(model, parts["test"], precision=precision).argmax(dim=1)
    correct = int((predicted == torch.tensor(parts["test"]["labels"])).sum())
    row = Row(name, length, correct, len(parts["test"]), effzoo.account(model).trainable, time.monotonic() - start)
    console.print(said(row))
    return model, row, result.history


def said(row: Row) -> str:
    return f"test accuracy {100 * row.accuracy:.2f} % ({row.correct} of {row.test}), {row.seconds:.0f} s"


def faster_precision() -> str:
    """bfloat16 where its matrix products are faster on this machine, measured now; else float32."""
    return "bfloat16" if bfloat16_is_faster() else "float32"


def share_longer(part: Any, length: int) -> float:
    """The share of documents with more than `length` tokens."""
    return sum(len(ids) > length for ids in part["input_ids"]) / len(part)


def peak_memory() -> int:
    """The largest resident set of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(results: dict[str, Any], rows: list[Row]) -> None:
    table = Table(title="Accuracy on the held-out test documents")
    for column in ("", "tokens", "test accuracy", "correct", "trainable", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        accuracy = f"{100 * row.accuracy:.2f} ± {100 * row.interval:.2f} %"
        table.add_row(
            row.name,
            f"{row.tokens:,}",
            accuracy,
            f"{row.correct} / {row.test}",
            f"{row.trainable:,}",
            f"{row.seconds:.0f}",
        )
    console.print(table)
    account = results["account"]
    console.print(
        f"LoRA and head: {account['trainable']:,} of {account['total']:,} parameters"
        f" ({account['percent']:.3f} %), {account['bytes_on_disk']:,} bytes on disk"
    )
    console.print(
        f"whole job {results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**30:.2f} "
        f"GiB, {results['precision']}"
    )


def report(results: dict[str, Any], rows: list[Row], histories: dict[str, Any], attention: str) -> str:
    """One page: the comparison, learning curves, the account, and the attention pattern drawn from the code that
    ran."""
    import base64

    def picture(figure: Any, alt: str) -> str:
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(plots.png_bytes(figure)).decode()}">'

    lines = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.tokens:,}</td>"
        f"<td>{100 * row.accuracy:.2f} ± {100 * row.interval:.2f} %</td><td>{row.correct} / {row.test}</td>"
        f"<td>{row.trainable:,}</td><td>{row.seconds:.0f}</td></tr>"
        for row in rows
    )
    account, settings = results["account"], results["settings"]
    facts = {
        "documents": ", ".join(f"{n} {name}" for name, n in settings["split"].items()) + " (fixed, stratified, "
        "duplicates left out)",
        "longer than 512 tokens": f"{100 * results['longer_than_512']:.0f} % of the test documents; 512 is what BERT "
        "reads at most",
        "trainable": f"{account['trainable']:,} of {account['total']:,} parameters ({account['percent']:.3f} %)",
        "adapter on disk": f"{account['bytes_on_disk']:,} bytes; loaded into a fresh base it gives the same logits, "
        "bit for bit",
        "whole job": f"{results['seconds']:.0f} s, at most {results['peak_memory_bytes'] / 2**30:.2f} GiB, forward "
        f"passes in {results['precision']}",
        "machine": results["machine"],
        "recipe": ", ".join(f"{key} {value}" for key, value in {"peft": PEFT, **RECIPE, **RHYTHM}.items()),
    }
    listed = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    curves = picture(plots.learning_curves(histories), "loss and validation accuracy over steps")
    pattern = picture(plots.pattern_figure(attention, LONG, is_global=(0,)), "which query sees which key")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>effzoo demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ padding: .4rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }} tr:last-child td {{ font-weight: 600 }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem }}
dt {{ color: #666 }} dd {{ margin: 0 }}
img {{ max-width: 100% }} .half {{ max-width: 26rem; display: block; margin: auto }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto }}
</style>
<h1>MiniLM on long news: Longformer attention and LoRA</h1>
<p>BBC News in five classes. The interval is 95 % of a binomial share over the test documents:
differences within it say little.</p>
<table><tr><th></th><th>tokens read</th><th>test accuracy</th><th>correct</th>
<th>trainable</th><th>seconds</th></tr>{lines}</table>
<h2>Learning curves</h2>
<p>Both start with the head of the first row, so the loss is low from the first step.</p>{curves}
<h2>Attention</h2><p>Window {WINDOW} over {LONG} positions with one global token,
drawn from the pattern that the kernel is tested against.</p>
<div class="half">{pattern}</div>
<h2>Account</h2><dl>{listed}</dl><pre>{html.escape(account["text"])}</pre>
</html>
"""


if __name__ == "__main__":
    typer.run(main)
