"""Write the figures of the READMEs from the tracked results: python scripts/readme.py. A test holds the two in step."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

from effzoo.measure import rows
from effzoo.measure.figures import against_length
from effzoo.measure.page import finetune_table, markdown, scaling_table
from effzoo.plots import png_bytes

ROOT = Path(__file__).parent.parent


def demo_table(results: dict) -> str:
    """The demo's comparison as Markdown."""
    lines = ["| | tokens read | test accuracy | correct | trainable | seconds |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        share = row["correct"] / row["test"]
        interval = 1.96 * (share * (1 - share) / row["test"]) ** 0.5
        lines.append(
            f"| {row['name']} | {row['tokens']:,} | {100 * share:.2f} ± {100 * interval:.2f} % | {row['correct']} / {row['test']} "
            f"| {row['trainable']:,} | {row['seconds']:.0f} |"
        )
    account, settings = results["account"], results["settings"]
    documents = ", ".join(f"{count:,} {name}" for name, count in settings["split"].items())
    return "\n".join(
        [
            "MiniLM (6 layers, 384 wide) on BBC News in five classes, one run of `./scripts/demo` on CPU; "
            "± is a 95 % binomial interval, and the rows differ by less:",
            "",
            *lines,
            "",
            f"{documents} documents, each text once; {100 * results['longer_than_512']:.0f} % of the test documents are longer than 512 tokens. "
            f"LoRA and head: {account['trainable']:,} of {account['total']:,} parameters ({account['percent']:.3f} %), "
            f"{account['bytes_on_disk']:,} bytes on disk. The whole job took {results['seconds']:.0f} s and at most "
            f"{results['peak_memory_bytes'] / 2**30:.2f} GiB, with forward passes in {results['precision']} "
            f"({results['machine']}).",
        ]
    )


def matrix_table(cells: list[dict]) -> str:
    """Methods x attention kinds, a mark for each architecture, and the refusals by reason."""
    marks = {"works": "+", "refused": "-", "fails": "X"}
    methods, kinds, architectures = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("method", "attention", "architecture"))
    found = {(cell["method"], cell["attention"], cell["architecture"]): cell["status"] for cell in cells}
    rows: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        row = tuple("".join(marks[found[method, kind, each]] for each in architectures) for kind in kinds)
        rows.setdefault(row, []).append(f"`{method}`")
    lines = [f"| method | {' | '.join(f'`{kind}`' for kind in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for row, names in sorted(rows.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(row)} |")
    reasons: dict[str, list[dict]] = {}
    for cell in cells:
        if cell["status"] == "refused":
            reasons.setdefault(cell["reason"], []).append(cell)
    refused = [f"- {len(group)}: {reason}" for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1]))]
    tried = f"{len(cells):,} combinations; + works, - is refused, X fails. The refusals:"
    return "\n".join([*lines, "", tried, "", *refused])


def speed_tables(device: str) -> str:
    """Milliseconds of a layer of each kind in training against the length, and the same computation by others."""
    scaling = rows.read(ROOT / f"benchmarks/results/scaling-{device}.jsonl")
    peers = rows.read(ROOT / f"benchmarks/results/peers-{device}.jsonl")
    return "\n".join(
        [
            f"One layer, forward and backward, d = {scaling[0]['dim']}, {scaling[0]['heads']} heads, batch {scaling[0]['batch']}, "
            f"{scaling[0]['dtype']}: milliseconds (in times of full attention, the median over rounds in turns).",
            "",
            markdown(scaling_table(scaling, "train")),
            "",
            "| time | peak memory |\n|---|---|",
            f"| ![time against length](benchmarks/results/scaling-{device}-time.png) | ![memory](benchmarks/results/scaling-{device}-memory.png) |",
            "",
            "The same computation by others, forward and backward, from the same weights, in turns (median and quartiles of the ratio):",
            "",
            markdown(load("run").peers_table(peers)),
            "",
            _made([*scaling, *peers]),
        ]
    )


def more_speed_tables(device: str) -> str:
    """Forward passes and decoding, the share of the bound, and training steps of every method."""
    scaling, bound, steps = (rows.read(ROOT / f"benchmarks/results/{suite}-{device}.jsonl") for suite in ("scaling", "bound", "finetune"))
    sizes = steps[0]["sizes"]
    return "\n".join(
        [
            "`scaling`, a forward pass, milliseconds (in times of full attention):",
            "",
            markdown(scaling_table(scaling, "forward")),
            "",
            "`scaling`, the next token of a causal layer with a cache:",
            "",
            markdown(scaling_table(scaling, "decode")),
            "",
            "`bound`, attention alone, forward and backward: share of the bound = time of full attention x share of pairs / own time.",
            "",
            markdown(load("run").bound_table(bound)),
            "",
            f"`finetune`, a step of a BERT of {sizes['layers']} layers, {sizes['dim']} wide, on {steps[0]['batch']} x {steps[0]['length']} tokens:",
            "",
            markdown(finetune_table(steps)),
            "",
            _made([*scaling, *bound, *steps]),
        ]
    )


def _made(found: list[rows.Row]) -> str:
    """On what, and from which commits."""
    return "; ".join(sorted({f"{row['machine']}, torch {row['versions']['torch']}, commit {row['commit']}" for row in found}))


def figures(device: str) -> None:
    """The two figures of the README."""
    scaling = rows.read(ROOT / f"benchmarks/results/scaling-{device}.jsonl")
    for name, what in (("time", "seconds"), ("memory", "peak_bytes")):
        (ROOT / f"benchmarks/results/scaling-{device}-{name}.png").write_bytes(png_bytes(against_length(scaling, "train", what)))


def load(name: str) -> ModuleType:
    """A script of the benchmarks."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def rendered(readme: str) -> str:
    """The README with its figures written anew."""
    results = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    readme = _between(readme, "speed", speed_tables("cpu"))
    readme = _between(readme, "matrix", matrix_table(json.loads((ROOT / "benchmarks/results/matrix.json").read_text())))
    return _between(readme, "demo", demo_table(results))


def rendered_benchmarks(readme: str) -> str:
    """The README of the benchmarks with the tables that the scripts make of their results."""
    for name in ("methods", "methods_longer", "long_sequences", "duplication", "listops"):
        script = load(name.removesuffix("_longer"))
        readme = _between(readme, name, script.tracked_table(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())))
    return _between(readme, "speed", more_speed_tables("cpu"))


def _between(text: str, name: str, table: str) -> str:
    return re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: f"<!-- {name} -->\n{table}\n<!-- /{name} -->", text, flags=re.DOTALL)


if __name__ == "__main__":
    figures("cpu")
    for path, render in ((ROOT / "README.md", rendered), (ROOT / "benchmarks/README.md", rendered_benchmarks)):
        path.write_text(render(path.read_text()))
