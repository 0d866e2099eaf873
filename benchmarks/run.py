"""Run a benchmark suite: python benchmarks/run.py scaling | finetune | peers  [--device cuda]

Settings are in `cases.toml`; rows go to `results/SUITE-DEVICE.jsonl`, a JSON line each with machine, versions and commit, and rows that are
there are not measured again. Figures and a page go to `--report`, default `runs/bench-SUITE-DEVICE`. Packages for the peers: the extra `bench`.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effzoo.measure import Scaling, report
from effzoo.measure import rows as files
from effzoo.measure.finetuning import Finetuning
from effzoo.measure.page import Table, finetune_table, markdown, scaling_table
from effzoo.measure.rows import Row

HERE = Path(__file__).parent


def peers_suite(settings: dict[str, Any], device: str, path: Path, tell: Callable[[str, int, int], None]) -> list[Row]:
    """The rows of `peers.py` that the file does not hold yet."""
    sys.path.insert(0, str(HERE))
    import peers

    known = files.read(path)
    cases = [(name, n) for name in peers.PEERS for n in ([settings["fine_tuning_length"]] if "4 x n" in name else settings["lengths"])]
    for done, (name, n) in enumerate(cases):
        tell(f"{name}, n = {n:,}", done, len(cases))
        if not any((row["peer"], row["n"]) == (name, n) for row in known):
            row = files.made(peers.measure(name, n, settings["seconds"], device), device)
            files.append(path, [row])
            known.append(row)
    return known


def peers_table(rows: list[Row]) -> Table:
    """Times of both, their ratio, and the ratio of what autograd keeps."""
    table = [["peer", "n", "theirs, ms", "ours, ms", "time, ours / theirs", "kept by theirs, MiB", "by ours", "ours / theirs"]]
    for row in rows:
        if "failed" in row:
            table.append([row["peer"], f"{row['n']:,}", row["failed"], "", "", "", "", ""])
            continue
        low, high = row["ratio_quartiles"]
        theirs, ours = row["theirs_saved"], row["ours_saved"]
        table.append([
            row["peer"], f"{row['n']:,}", f"{1000 * row['theirs_seconds']:,.0f}", f"{1000 * row['ours_seconds']:,.0f}",
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{theirs / 2**20:,.1f}", f"{ours / 2**20:,.1f}", f"{ours / theirs:.2f}",
        ])  # fmt: skip
    return table


def tables(suite: str, rows: list[Row]) -> list[Table]:
    """The tables of a suite."""
    if suite == "scaling":
        return [scaling_table(rows, mode) for mode in dict.fromkeys(row["mode"] for row in rows)]
    return [finetune_table(rows) if suite == "finetune" else peers_table(rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["scaling", "finetune", "peers"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", type=Path, default=HERE / "cases.toml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    settings = tomllib.loads(given.cases.read_text())[given.suite][given.device]
    path = given.results / f"{given.suite}-{given.device}.jsonl"
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("")

        def tell(said: str, done: int, total: int) -> None:
            bar.update(task, description=said, completed=done, total=total)

        if given.suite == "peers":
            rows = peers_suite(settings, given.device, path, tell)
        else:
            suite = (Scaling if given.suite == "scaling" else Finetuning)(**settings, device=given.device)
            rows = suite.run(path, tell)
    for table in tables(given.suite, rows):
        print(markdown(table), end="\n\n")
    if given.suite != "peers":
        print("wrote", report.write(rows, given.report or Path(f"runs/bench-{given.suite}-{given.device}")), "and", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
