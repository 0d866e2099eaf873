"""The main job: the same LoRA fine-tuning of a real BERT on the first 128, 512 and 2,048 tokens of long reviews.

MiniLM's weights come from the package index (the `demo` extra), the reviews with the checkout (`data/README.md`);
nothing is downloaded while this runs. Beside the fine-tuned model, on the same documents and tokens: TF-IDF and the
frozen features of the model, each with a logistic regression.

- The base is MiniLM's first three layers: what they say of a review, averaged, tells positive from negative better than
  what all six say. LoRA trains the third; what goes into it is computed once for each length and kept.
- Fine-tuning starts with the head that the frozen features got (linear probing, then fine-tuning: Kumar et al. 2022,
  arXiv:2202.10054).
- Each split draws the documents to train and to test on anew, the same for every length and method. The interval of a
  difference is that of the corrected resampled t test (Nadeau and Bengio 2003, Inference for the generalization error),
  which counts that splits share documents.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import datasets
import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import effzoo
from effzoo import data, plots
from effzoo.architectures import Transformer
from effzoo.architectures.heads import pool
from effzoo.lab.fit import bfloat16_is_faster
from effzoo.train import Saving
from effzoo.writing import replace_file

REVIEWS = Path(__file__).parent.parent / "data/movie_reviews.jsonl.gz"
WINDOW = 128
ATTENTION = {128: "full", 512: "full", 2048: f"longformer[window={WINDOW}]"}
LAYERS = 3  # of MiniLM's six; all but the last of them are frozen
PEFT = "lora[rank=8]"
SIZES = {"dropout": 0.0, "attention_dropout": 0.0}  # attention without dropout runs in the fused kernel
RECIPE: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "group_by_length": True}
SPLIT = {"train": 600, "test": 300}
TFIDF, FROZEN, TUNED = "TF-IDF", "frozen features", "fine-tuned, LoRA"
CONSTANTS = {TFIDF: (0.1, 1, 10, 100), FROZEN: (0.001, 0.01, 0.1, 1)}
console = Console()
Base = Callable[[str, int], Transformer]


@dataclass
class Row:
    """One method at one length.

    correct: of the `test` documents of each split.
    trainable: numbers that are trained, in the last split.
    seconds: of all splits.
    """

    method: str
    attention: str
    tokens: int
    correct: list[int]
    test: int
    trainable: int
    seconds: float

    @property
    def accuracies(self) -> list[float]:
        """In percent, one for each split."""
        return [100 * correct / self.test for correct in self.correct]

    @property
    def accuracy(self) -> float:
        """In percent, the mean over the splits."""
        return sum(self.accuracies) / len(self.accuracies)


class Interval(NamedTuple):
    """A mean difference over splits, in percentage points, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def main(
    output: Annotated[Path, typer.Option(help="Where adapters, results.json and report.html go.")] = Path("runs/demo"),
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where this machine multiplies faster in it.")
    ] = "auto",
    splits: Annotated[int, typer.Option(min=2, help="How often the documents are drawn anew.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the first split and its training; the next ones count on.")] = 0,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write the results here (the README's figures: benchmarks/results/demo.json)."),
    ] = None,
) -> None:
    """Fine-tune MiniLM with LoRA on the first 128, 512 and 2,048 tokens of long reviews, and compare."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    datasets.disable_progress_bars()
    try:
        precision = ("bfloat16" if bfloat16_is_faster() else "float32") if precision == "auto" else precision
        results = compare(data.load_text(REVIEWS), minilm, ATTENTION, SPLIT, splits, seed, precision, output)
    except effzoo.EffzooError as problem:
        raise SystemExit(str(problem)) from None
    for path in (output / "results.json", *([record] if record else [])):
        replace_file(path, (json.dumps(results, indent=1) + "\n").encode())
    replace_file(output / "report.html", report(results).encode())
    show(results)
    console.print(f"\nreport: {output / 'report.html'}   results: {output / 'results.json'}")


def compare(
    reviews: Any, base: Base, attention: Mapping[int, str], sizes: Mapping[str, int], splits: int, seed: int,
    precision: str, output: Path,
) -> dict[str, Any]:  # fmt: skip
    """Every method on every length and split, and the differences.

    base: a model of an attention and a length, whose layers but the last are frozen.
    attention: of each length.
    sizes: documents of a split, "train" and "test".
    """
    start, cpu, rows = time.monotonic(), time.process_time(), list[Row]()
    drawn = draw(reviews, sizes, splits, seed)
    tokenizer = data.tokenizer_of(base("full", min(attention)))
    for length, kind in attention.items():
        console.rule(escape(f"the first {length:,} tokens, {kind} attention"))
        tokens = data.tokenise(reviews, tokenizer, length)
        task = None  # what the length before kept goes first
        task = AtLength(base(kind, length), tokens, length, kind, precision, output / f"{length}")
        rows += task.rows(drawn, seed)
    task.check_adapter(drawn[-1][1][:50])
    return {
        "rows": [asdict(row) for row in rows],
        "differences": differences(rows, sizes),
        "account": str(effzoo.account(task.model)),
        "longer": {n: sum(len(x) > n for x in task.ids) / len(task.ids) for n in [*attention][:-1]},
        "documents": len(reviews),
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_bytes": peak_memory(),
        "precision": precision,
        "settings": {"peft": PEFT, "layers": LAYERS, "split": dict(sizes), "splits": splits, "seed": seed, **RECIPE},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[1]:.1f}, Python {platform.python_version()}, torch {torch.__version__}",
    }


def draw(reviews: Any, sizes: Mapping[str, int], splits: int, seed: int) -> list[list[list[int]]]:
    """The numbers of the documents to train and to test on in each split, with the same share of each label."""
    numbered = reviews.add_column("number", range(len(reviews)))
    drawn = [data.split(numbered, sizes, seed=seed + number) for number in range(splits)]
    return [[list(parts[name]["number"]) for name in ("train", "test")] for parts in drawn]


class AtLength:
    """The documents cut to one length, what the frozen layers say of them, and the methods.

    ids: tokens of each document.
    kept: what goes into the last layer, float16[tokens, dim] of each document.
    features: what comes out of it, the mean over the tokens, [documents, dim].
    model: the last that was fine-tuned.
    """

    def __init__(self, base: Transformer, tokens: Any, length: int, kind: str, precision: str, output: Path):
        self.base, self.length, self.kind, self.precision, self.output = base, length, kind, precision, output
        self.ids, self.labels = list(tokens["input_ids"]), np.array(tokens["labels"])
        begun = time.monotonic()
        self.kept, self.features = read(base, self.ids, precision)
        said = f"{sum(map(len, self.ids)):,} tokens, {time.monotonic() - begun:.0f} s"
        console.print(f"read once by the frozen layers: {said}")

    def rows(self, drawn: Sequence[Sequence[Sequence[int]]], seed: int) -> list[Row]:
        """Each method on each split."""
        kinds = {TFIDF: "", FROZEN: self.kind, TUNED: self.kind}
        rows = {name: Row(name, kind, self.length, [], len(drawn[0][1]), 0, 0.0) for name, kind in kinds.items()}
        for number, (train, test) in enumerate(drawn):
            features = self.features.numpy()
            for name, inputs in ((TFIDF, self.ids), (FROZEN, features)):
                begun = time.monotonic()
                with threadpool_limits(1):  # small products, at whose ends several threads wait for each other
                    fitted = regression(name).fit([inputs[i] for i in train], self.labels[train])
                predicted = fitted.predict([inputs[i] for i in test])
                self._count(rows[name], test, predicted, fitted[1].best_estimator_.coef_.size + 1, begun)
            begun = time.monotonic()
            self._tune(train, fitted, seed + number)
            predicted = self._predict(self.model, test).argmax(dim=1).numpy()
            self._count(rows[TUNED], test, predicted, effzoo.account(self.model).trainable, begun)
            said = ", ".join(f"{row.method} {row.accuracies[-1]:.1f} %" for row in rows.values())
            console.print(f"split {number + 1}: {said}; {time.monotonic() - begun:.0f} s")
        return [*rows.values()]

    def _count(self, row: Row, test: Sequence[int], predicted: Any, trainable: int, begun: float) -> None:
        row.correct.append(int((predicted == self.labels[test]).sum()))
        row.trainable, row.seconds = trainable, row.seconds + time.monotonic() - begun

    def _examples(self, documents: Sequence[int]) -> list[dict[str, Any]]:
        return [{"inputs_embeds": self.kept[i].float(), "labels": int(self.labels[i])} for i in documents]

    def _predict(self, model: Transformer, documents: Sequence[int]) -> Tensor:
        return effzoo.predict(model, self._examples(documents), precision=self.precision, progress=False)

    def _tune(self, train: Sequence[int], fitted: Any, seed: int) -> None:
        """Train LoRA on the last layer, from the head of the frozen features on."""
        torch.manual_seed(seed)
        self.model = effzoo.attach(last_layer(self.base), PEFT)
        start_head(self.model, fitted[0], fitted[1].best_estimator_)
        effzoo.finetune(
            self.model, self._examples(train), output_dir=self.output, precision=self.precision, seed=seed,
            recompute="nothing", progress=False,
            saving=Saving(evaluate_every=None, save_every=None, overwrite=True), **RECIPE,
        )  # fmt: skip

    def check_adapter(self, documents: Sequence[int]) -> None:
        """The last adapter, saved and loaded into a fresh model, predicts the same, bit for bit."""
        fresh = effzoo.load_adapter(last_layer(self.base), effzoo.save_adapter(self.model, self.output / "adapter"))
        before, after = (self._predict(model, documents) for model in (self.model, fresh))
        if not torch.equal(before, after):
            raise SystemExit(
                f"the loaded adapter predicts differently on {int((before != after).any(dim=1).sum())} documents"
            )
        console.print(
            f"the adapter, saved and loaded, gives the same logits, bit for bit, on {len(documents)} documents"
        )


def minilm(kind: str, length: int) -> Transformer:
    """The first layers of MiniLM with their real weights, and that attention."""
    options: dict[str, Any] = {"attention": kind, "max_length": max(length, 512), "pooling": "mean", **SIZES}
    whole = effzoo.build("minilm", task="classification", pretrained=True, **options)
    model = effzoo.build("minilm", task="classification", layers=LAYERS, **options)
    model.load_state_dict({name: x for name, x in whole.state_dict().items() if name in model.state_dict()})
    return model.eval()


def last_layer(base: Transformer) -> Transformer:
    """The last layer of a base as a model that reads what goes into it (`inputs_embeds`), with a fresh head."""
    config = dataclasses.replace(base.config, layers=1, positions="none", types=0, embed_norm=False)
    model = Transformer(config, "classification", base.num_labels)
    model.blocks[0].load_state_dict(base.blocks[-1].state_dict())
    return model


@torch.no_grad()
def read(base: Transformer, ids: Sequence[Sequence[int]], precision: str) -> tuple[list[Tensor], Tensor]:
    """What goes into the last layer of each document, and the mean of what comes out; batches of like lengths."""
    kept, features = [torch.empty(0)] * len(ids), torch.empty(len(ids), base.config.dim)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), 8):
        chosen = order[at : at + 8]
        tokens = pad_sequence([torch.tensor(ids[i]) for i in chosen], batch_first=True)
        mask = pad_sequence([torch.ones(len(ids[i])) for i in chosen], batch_first=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            states = base(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        features[chosen] = pool(states[-1].float(), mask.bool(), "mean")
        for i, state in zip(chosen, states[-2], strict=True):
            kept[i] = state[: len(ids[i])].half()
    return kept, features


def regression(method: str) -> Pipeline:
    """A logistic regression, whose one constant is chosen by cross-validation within the documents to train on."""
    first = StandardScaler() if method == FROZEN else TfidfVectorizer(analyzer=list, sublinear_tf=True, min_df=2)
    return make_pipeline(first, GridSearchCV(LogisticRegression(max_iter=1000), {"C": CONSTANTS[method]}, cv=5))


def start_head(model: Transformer, scaler: StandardScaler, fitted: LogisticRegression) -> None:
    """The adapter's copy of the head gets the function of the regression: logits -z / 2 and z / 2, as
    softmax(-z / 2, z / 2) = sigmoid(z)."""
    weight = fitted.coef_[0] / scaler.scale_
    bias = fitted.intercept_[0] - weight @ scaler.mean_
    signs = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    head = model.head.out.of("default")["head"]
    with torch.no_grad():
        head.own_weight.copy_(signs[:, None] * torch.from_numpy(weight))
        head.own_bias.copy_(signs * bias)


def interval(values: Sequence[float], train: int, test: int) -> Interval:
    """mean +- t sqrt((1 / S + test / train) s^2), t the 97.5 % quantile of Student's distribution with S - 1 degrees.

    values: a difference on each of S splits; s^2 is their variance.
    train, test: documents of a split. Without test / train the interval would be that of S samples that share none.

    Nadeau and Bengio 2003, Inference for the generalization error, Machine Learning 52: the corrected resampled t test.
    """
    if len(values) < 2:
        raise SystemExit(f"an interval needs the differences of at least 2 splits, got {len(values)}; give --splits 5")
    mean, count = statistics.fmean(values), len(values)
    half = stats.t.ppf(0.975, count - 1) * math.sqrt((1 / count + test / train) * statistics.variance(values))
    return Interval(mean, mean - half, mean + half)


def differences(rows: Sequence[Row], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The longest input less the shortest, by each method; and what fine-tuning adds to frozen features at the longest.

    The first is what the job is for.
    """
    short, long = ({row.method: row for row in rows if row.tokens == n} for n in (rows[0].tokens, rows[-1].tokens))
    pairs = [
        (f"{name}, {rows[-1].tokens:,} tokens", long[name], f"{rows[0].tokens:,} tokens", short[name])
        for name in (TUNED, FROZEN, TFIDF)
    ]
    pairs.append((f"{TUNED}, {rows[-1].tokens:,} tokens", long[TUNED], FROZEN, long[FROZEN]))
    made = []
    for what, more, against, less in pairs:
        values = [a - b for a, b in zip(more.accuracies, less.accuracies, strict=True)]
        found = interval(values, sizes["train"], sizes["test"])
        made.append({"what": what, "against": against, "values": values, **found._asdict()})
    return made


def verdict(difference: Mapping[str, Any]) -> str:
    """Whether the interval of a difference excludes 0, in a sentence."""
    found = Interval(difference["mean"], difference["low"], difference["high"])
    said = f"{difference['what']} against {difference['against']}: {found} points"
    if found.low <= 0 <= found.high:
        return f"{said}; the interval holds 0: these splits do not tell them apart"
    return f"{said}; the interval excludes 0"


def peak_memory() -> int:
    """The largest resident set of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    return [Row(**row) for row in results["rows"]]


def show(results: Mapping[str, Any]) -> None:
    splits = results["settings"]["splits"]
    table = Table(title=f"Accuracy on held-out reviews, mean (lowest to highest) of {splits} splits, %")
    for column in ("", "tokens", "accuracy", "trainable", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows_of(results):
        table.add_row(row.method, f"{row.tokens:,}", spread(row), f"{row.trainable:,}", f"{row.seconds:.0f}")
    console.print(table)
    for difference in results["differences"]:
        console.print(verdict(difference), highlight=False)
    console.print(
        f"whole job {results['seconds']:.0f} s ({results['cpu_seconds']:.0f} CPU seconds), peak memory "
        f"{results['peak_memory_bytes'] / 2**30:.2f} GiB, {results['precision']}"
    )


def spread(row: Row) -> str:
    """The mean over the splits, with the lowest and the highest."""
    return f"{row.accuracy:.1f} ({min(row.accuracies):.1f} to {max(row.accuracies):.1f})"


def figure(results: Mapping[str, Any]) -> Any:
    """Accuracy against tokens, a line for each method and a point for each split."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4), layout="constrained")
    axes = drawing.add_subplot()
    rows = rows_of(results)
    beside = ((TUNED, "-", 1.04), (FROZEN, "--", 1.0), (TFIDF, ":", 0.96))  # so that points do not cover each other
    for (name, style, shift), colour in zip(beside, plots.LINES, strict=False):
        places = {shift * row.tokens: row for row in rows if row.method == name}
        axes.plot([*places], [row.accuracy for row in places.values()], style, color=colour, label=name)
        for place, row in places.items():
            axes.plot([place] * len(row.correct), row.accuracies, "o", color=colour, alpha=0.5, markersize=4)
    tokens = sorted({row.tokens for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.set(xlabel="tokens read", ylabel="test accuracy, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing


def report(results: Mapping[str, Any]) -> str:
    """One page: the comparison with its figure, the attention pattern drawn from the code that ran, and the account."""

    def picture(drawn: Any, alt: str) -> str:
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(plots.png_bytes(drawn)).decode()}">'

    rows, settings = rows_of(results), results["settings"]
    lines = "".join(
        f"<tr><td>{html.escape(row.method)}</td><td>{row.tokens:,}</td><td>{spread(row)}</td>"
        f"<td>{row.trainable:,}</td><td>{row.seconds:.0f}</td></tr>"
        for row in rows
    )
    facts = {
        "documents": f"{results['documents']:,}; each of {settings['splits']} splits draws "
        + " and ".join(f"{count:,} to {name}" for name, count in settings["split"].items()),
        "longer than": ", ".join(f"{int(n):,} tokens: {100 * share:.0f} %" for n, share in results["longer"].items()),
        "whole job": f"{results['seconds']:.0f} s, {results['cpu_seconds']:.0f} CPU seconds, at most "
        f"{results['peak_memory_bytes'] / 2**30:.2f} GiB, forward passes in {results['precision']}",
        "machine": results["machine"],
        "recipe": ", ".join(f"{key} {settings[key]}" for key in ("peft", "layers", "seed", *RECIPE)),
    }
    listed = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    told = "".join(f"<li>{html.escape(verdict(difference))}</li>" for difference in results["differences"])
    longest = rows[-1]
    pattern = picture(
        plots.pattern_figure(longest.attention, longest.tokens, is_global=(0,)), "which query sees which key"
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>effzoo demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ padding: .4rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem }}
dt {{ color: #666 }} dd {{ margin: 0 }}
img {{ max-width: 100% }} .half {{ max-width: 26rem; display: block; margin: auto }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto }}
</style>
<h1>Long reviews: what the later tokens are worth</h1>
<p>Films liked or not (movie_reviews: Pang and Lee 2004, CC BY 4.0). The same documents, method and number of steps at
each length; accuracy is the mean over splits, with the lowest and the highest.</p>
<table><tr><th></th><th>tokens read</th><th>test accuracy, %</th><th>trainable</th><th>seconds</th></tr>{lines}</table>
<p>Differences in percentage points, with the 95 % interval over splits (corrected resampled t test):</p><ul>{told}</ul>
{picture(figure(results), "accuracy against tokens")}
<h2>Attention</h2><p>{html.escape(longest.attention)} over {longest.tokens:,} positions with one global token,
drawn from the pattern that the kernel is tested against.</p>
<div class="half">{pattern}</div>
<h2>Account</h2><p>Of the last layer, which is trained; the layers before it are frozen.</p>
<dl>{listed}</dl><pre>{html.escape(results["account"])}</pre>
</html>
"""


if __name__ == "__main__":
    typer.run(main)
