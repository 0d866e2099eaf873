"""Run a benchmark suite: python benchmarks/run.py scaling | finetune | peers | bound  [--device cuda], or gpu (see
gpu.py), or predict

Settings are in `cases.toml`; rows go to `results/SUITE-DEVICE.jsonl` (DEVICE is cpu, or the name of the GPU), a JSON
line each with machine, versions and commit, and rows that are there are not measured again. Figures and a page go to
`--report`, default `runs/bench-SUITE-DEVICE`. Packages for the
peers: the extra `bench`. `predict` computes what cards should take (effzoo/measure/prediction.py) and needs none of
    them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effzoo.errors import EffzooError
from effzoo.measure import Scaling, cards, report
from effzoo.measure import rows as files
from effzoo.measure.finetuning import Finetuning
from effzoo.measure.page import Table, crossover_table, finetune_table, markdown, scaling_table
from effzoo.measure.prediction import against_full
from effzoo.measure.rows import Row
from effzoo.writing import replace_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the suites beside this file


def peers_suite(settings: dict[str, Any], device: str, path: Path, tell: Callable[[str, int, int], None]) -> list[Row]:
    """The rows of `peers.py` that the file does not hold yet."""
    import peers

    known = files.read(path, "peers", device)
    names = peers.of_device(device)
    cases = [
        (name, n)
        for name in names
        for n in ([settings["fine_tuning_length"]] if peers.steps_of_models(name) else settings["lengths"])
    ]
    cases.append((peers.IMPORT, 0))
    for done, (name, n) in enumerate(cases):
        tell(f"{name}, n = {n:,}", done, len(cases))
        if not any((row["peer"], row["n"]) == (name, n) for row in known):
            batch = max(1, settings["tokens"] // n) if "tokens" in settings and n else None
            row = files.made(
                peers.measure(name, n, settings["seconds"], device, settings.get("dtype", "float32"), batch), device
            )
            files.append(path, [row])
            known.append(row)
    return known


def bound_suite(settings: dict[str, Any], device: str, path: Path, tell: Callable[[str, int, int], None]) -> list[Row]:
    """The rows of `bound.py`, all from the same rounds."""
    import bound

    known = files.read(path, "bound", device)
    tell(f"n = {settings['n']:,}", 0, 1)
    if {row["attention"] for row in known} != set(settings["kinds"]):
        known = [files.made(row, device) for row in bound.measure(**settings, device=device)]
        path.unlink(missing_ok=True)
        files.append(path, known)
    return known


def bound_table(rows: list[Row]) -> Table:
    """The share of the bound, and what it is made of."""
    table = [["attention", "n", "pairs, share of n^2", "ms", "full, ms", "share of the bound"]]
    for row in rows:
        low, high = row["share_quartiles"]
        times = (f"{1000 * row[key]:,.0f}" for key in ("seconds", "full_seconds"))
        table.append(
            [
                f"`{row['attention']}`",
                f"{row['n']:,}",
                f"{row['pairs']:.3f}",
                *times,
                f"{row['share']:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    return table


def peers_table(rows: list[Row]) -> Table:
    """Times of both, their ratio, that of ours in plain PyTorch beside rivals without fused attention, and the ratio of
    what autograd keeps."""
    plain = any("plain_ratio" in row for row in rows)
    head = ["peer", "n", "theirs, ms", "ours, ms", "time, ours / theirs", *(["ours unfused / theirs"] if plain else [])]
    table = [[*head, "kept by theirs, MiB", "by ours", "ours / theirs"]]
    for row in rows:
        cells = [row["peer"], f"{row['n']:,}" if row["n"] else ""]
        if "failed" in row:
            cells.append(row["failed"])
        else:
            low, high = row["ratio_quartiles"]
            kept = [row.get(f"{side}_saved") for side in ("theirs", "ours")]
            cells += [f"{1000 * row[f'{side}_seconds']:,.0f}" for side in ("theirs", "ours")] + [
                f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
            ]
            cells += [f"{row['plain_ratio']:.2f}" if "plain_ratio" in row else ""] if plain else []
            cells += [] if None in kept else [*(f"{x / 2**20:,.1f}" for x in kept), f"{kept[1] / kept[0]:.2f}"]
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    return table


def tables(suite: str, rows: list[Row]) -> list[Table]:
    """The tables of a suite."""
    if suite == "scaling":
        return [scaling_table(rows, mode) for mode in dict.fromkeys(row["mode"] for row in rows)]
    return [{"finetune": finetune_table, "peers": peers_table, "bound": bound_table}[suite](rows)]


PREDICTED = {"modes": ("forward", "train", "decode"), "lengths": tuple(2**power for power in range(8, 18))}
KINDS = (
    "full", "blockwise", "longformer[window=512]", "local[chunk=64]", "lsh[rounds=4, chunk=64]", "linformer[k=256]",
    "perceiver[latents=256]", "linear", "performer[features=256]", "nystromformer[landmarks=64]",
    "streaming[window=256, sinks=4]", "bigbird[block=64]",
    "dilated[segments=(512, 2048, 8192), dilations=(1, 4, 16)]",
)  # fmt: skip


def predict(card: cards.Card, results: Path) -> int:
    """Predict the layer of the GPU suite on a card, write the rows, print from which length on each kind is faster than
    full attention."""
    settings = tomllib.loads((HERE / "cases.toml").read_text())["scaling"]["cuda"]
    suite = Scaling(
        dim=settings["dim"], heads=settings["heads"], tokens=settings["tokens"], dtype=settings["dtype"], device="cuda"
    )
    rows = against_full(KINDS, PREDICTED["modes"], PREDICTED["lengths"], suite.case, card)
    path = results / f"predicted-{card.name.lower()}.jsonl"
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(markdown(crossover_table(rows)), f"\n\npredicted, not measured; wrote {path}")
    return 0


def gpu_suite(folder: Path, device: str, tiny: bool, seconds: float) -> int:
    """Everything on the GPU, within a budget of seconds; what failed and what did not fit is printed. Code 1 when
    parity is wrong."""
    import gpu

    summary = gpu.run(folder, device, tiny, seconds)
    print(gpu.words(summary), f"\nrows in {folder}")
    return 1 if summary["wrong"] else 0


def _parser() -> argparse.ArgumentParser:
    """Each suite takes its own options, and refuses those of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    what = {
        "scaling": "one layer of each kind against the length",
        "finetune": "a training step under each kind and method",
        "peers": "the same computation by effzoo and by others",
        "bound": "how close attention comes to what its arithmetic allows",
        "gpu": "all of it on a GPU, in ten minutes",
        "predict": "what a card should take; measures nothing",
    }
    for name, words in what.items():
        suite = suites.add_parser(name, help=words, description=words)
        suite.add_argument(
            "--results",
            type=Path,
            help="folder of the rows; default: results, with --tiny runs/gpu-tiny"
            if name == "gpu"
            else "folder of the rows; default: results",
        )
        if name == "predict":
            suite.add_argument("--card", default="H100", help=f"one of {', '.join(cards.CARDS)}; default: H100")
            continue
        suite.add_argument(
            "--device", choices=["cpu", "cuda"], default="cuda" if name == "gpu" else "cpu", help="default: %(default)s"
        )
        if name == "gpu":
            suite.add_argument("--tiny", action="store_true", help="the same code at sizes that a CPU does in a minute")
            suite.add_argument("--seconds", type=float, default=570.0, help="the budget; default: %(default)s")
            continue
        suite.add_argument("--cases", type=Path, default=HERE / "cases.toml", help="settings; default: cases.toml")
        if name in ("scaling", "finetune"):
            suite.add_argument(
                "--report", type=Path, help="folder of the figures and the page; default: runs/bench-SUITE-DEVICE"
            )
    return parser


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    try:
        if given.suite == "predict":
            return predict(cards.card(given.card), given.results or HERE / "results")
        cards.need(given.device)
    except EffzooError as error:
        parser.error(str(error))
    if given.suite == "gpu":
        folder = Path("runs/gpu-tiny") if given.tiny else HERE / "results/gpu" / cards.file_name(given.device)
        return gpu_suite(given.results or folder, given.device, given.tiny, given.seconds)
    settings = tomllib.loads(given.cases.read_text())[given.suite][given.device]
    name = cards.file_name(given.device)
    path = (given.results or HERE / "results") / f"{given.suite}-{name}.jsonl"
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), transient=True
    ) as bar:
        task = bar.add_task("")

        def tell(said: str, done: int, total: int) -> None:
            bar.update(task, description=said, completed=done, total=total)

        if given.suite in ("peers", "bound"):
            rows = (peers_suite if given.suite == "peers" else bound_suite)(settings, given.device, path, tell)
        else:
            suite = (Scaling if given.suite == "scaling" else Finetuning)(**settings, device=given.device)
            rows = suite.run(path, tell)
    for table in tables(given.suite, rows):
        print(markdown(table), end="\n\n")
    if given.suite in ("scaling", "finetune"):
        print("wrote", report.write(rows, given.report or Path(f"runs/bench-{given.suite}-{name}")), "and", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
