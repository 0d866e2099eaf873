"""The GPU suite: parity of every backend first, then scaling, fine-tuning, peers and the share of the bound, within a
budget of time.

    python benchmarks/run.py gpu                     # ten minutes at most, on the GPU; rows in results/gpu/CARD/
    python benchmarks/run.py gpu --device cpu --tiny # the same code at sizes that a CPU does in a minute, rows in
    runs/gpu-tiny/

Each section has a share of the budget, and what it does not use goes to those after it. Sections are processes of their
own: a kernel that takes the device down takes its cell along and nothing else. Rows are written as they come; a second
run goes on where the first one stopped. What did not fit is listed at the end, and in summary.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bound
import peers
import torch

from effzoo.attention import Mask
from effzoo.attention.kernel import BACKENDS
from effzoo.errors import EffzooError
from effzoo.measure import Scaling, cards, prediction
from effzoo.measure import rows as files
from effzoo.measure.finetuning import METHODS, Finetuning
from effzoo.measure.layer import TOLERANCE, Case, differences, supported
from effzoo.measure.memory import reason
from effzoo.measure.timing import release

SHARES = {"rates": 0.04, "parity": 0.20, "scaling": 0.30, "finetune": 0.26, "peers": 0.15, "bound": 0.05}
GRACE = 20.0  # seconds beyond its time in which a cell may end before it is ended
KINDS = (
    "full", "blockwise", "longformer[window=512]", "local[chunk=64]", "lsh[rounds=4, chunk=64]", "linformer[k=256]",
    "perceiver[latents=256]",
)  # fmt: skip
CHECKED = (
    "full", "blockwise[block=128, blocks=8]", "longformer[window=64]", "longformer[window=32, dilation=(1, 2, 1, 2)]",
    "local[chunk=64]", "lsh[rounds=2, chunk=32]", "linformer[k=64]", "perceiver[latents=64]",
)  # fmt: skip
BASE = {"layers": 12, "dim": 768, "heads": 12, "mlp": 3072, "vocab": 30522}
LLAMA = {"layers": 16, "dim": 2048, "heads": 32, "kv_heads": 8, "mlp": 8192, "vocab": 32000}


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    parity, dtypes: length and dtypes of the check; lengths, dim, heads, tokens: of scaling; models: what is fine-tuned,
        by name and sizes.
    """

    parity: int = 421
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    lengths: tuple[int, ...] = (131072, 4096, 32768, 512, 16384, 1024, 2048, 8192, 65536)  # the most telling first
    dim: int = 2048
    heads: int = 16
    tokens: int = 131072
    dtype: str = "bfloat16"
    precision: str = "bfloat16"
    kinds: tuple[str, ...] = KINDS
    checked: tuple[str, ...] = CHECKED
    methods: tuple[str, ...] = METHODS
    models: tuple[tuple[str, dict[str, int]], ...] = (("bert", BASE), ("llama", LLAMA))
    tuned: tuple[int, ...] = (512, 4096, 32768)
    tuned_tokens: int = 32768
    peers: tuple[str, ...] | None = None
    peer_lengths: tuple[int, ...] = (1024, 4096, 16384)
    bound: int = 32768
    seconds: float = 1.0


_SMALL = {"layers": 1, "dim": 32, "heads": 2, "mlp": 32, "vocab": 50}
TINY = Sizes(
    parity=37, dtypes=("float32", "bfloat16"), lengths=(32, 16), dim=16, heads=2, tokens=32,
    kinds=("full", "longformer[window=8]", "linformer[k=4]"),
    checked=("full", "longformer[window=8]", "lsh[rounds=2, chunk=8]", "perceiver[latents=4]"),
    methods=("full", "lora"),
    models=(("bert", _SMALL), ("llama", {**_SMALL, "kv_heads": 1})), tuned=(16,), tuned_tokens=32,
    peers=("torch SDPA, full attention", "xformers, full attention"), peer_lengths=(16,), bound=64, seconds=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is measured in one go: it appends its rows to a file."""

    section: str
    name: str
    run: Callable[[Path], object]


def cells(section: str, sizes: Sizes, device: str) -> list[Cell]:
    """The cells of a section, those first that say most."""
    return {
        "rates": _rates,
        "parity": _parity,
        "scaling": _scaling,
        "finetune": _finetune,
        "peers": _peers,
        "bound": _bound,
    }[section](sizes, device)


def _rates(sizes: Sizes, device: str) -> list[Cell]:
    def run(path: Path) -> None:
        rates = [asdict(prediction.calibrated(device))]
        files.append(path, [files.made({"suite": "rates", "device": device, **card}, device) for card in rates])

    return [Cell("rates", "large products, copies, tiny operators", run)]


def _parity(sizes: Sizes, device: str) -> list[Cell]:
    def cell(backend: str, dtype: str) -> Cell:
        def run(path: Path) -> None:
            for kind in sizes.checked:
                for causal in (False, True):
                    for padded in (False, True):
                        row = compared(kind, backend, dtype, sizes.parity, device, causal, padded)
                        if row is not None:
                            files.append(path, [files.made(row, device)])

        return Cell("parity", f"{backend}, {dtype}", run)

    return [
        cell(backend, dtype)
        for dtype in sizes.dtypes
        for backend in ("auto", *(name for name in BACKENDS if name != "auto"))
    ]


def compared(
    kind: str, backend: str, dtype: str, n: int, device: str, causal: bool, padded: bool
) -> dict[str, Any] | None:
    """One backend on one kind against the definition in float64: errors of output and gradient, of their norm; None
    where the kind is not causal."""
    case = Case(kind, "decode" if causal else "train", n, 256 if n > 100 else 32, 4, 2, dtype, device)
    if causal and supported(case).startswith("cannot be causal"):
        return None
    row = {
        "suite": "parity", "attention": kind, "backend": backend, "dtype": dtype, "n": n, "causal": causal,
        "padded": padded, "device": device, "tolerance": TOLERANCE[dtype],
    }  # fmt: skip
    try:
        layer = case.layer()
        layer.core.context = replace(layer.core.context, backend=backend)
        valid = torch.arange(n, device=device) < torch.tensor([[n], [n - n // 3]], device=device) if padded else None
        row["errors"] = differences(layer, case.input(), case.input(), Mask(valid, decisions={}))
        row["right"] = all(error <= TOLERANCE[dtype] for error in row["errors"].values())
    except EffzooError as refusal:
        row["refused"] = str(refusal)
    except Exception as error:  # what it is, the row says; the others are compared all the same
        row |= {"right": False, "failed": reason(error)}
    return row


def _scaling(sizes: Sizes, device: str) -> list[Cell]:
    def cell(mode: str, n: int) -> Cell:
        suite = Scaling(
            sizes.kinds, (n,), (mode,), sizes.dim, sizes.heads, 1, sizes.dtype, device, longest=3.0,
            seconds=sizes.seconds, tokens=sizes.tokens,
        )  # fmt: skip
        return Cell("scaling", f"{mode}, n = {n:,}", suite.run)

    return [cell(mode, n) for mode in ("train", "forward", "decode") for n in sizes.lengths]


def _finetune(sizes: Sizes, device: str) -> list[Cell]:
    few = tuple(method for method in ("full", "lora") if method in sizes.methods)

    def cell(model: str, shape: dict[str, int], n: int, kind: str, methods: tuple[str, ...]) -> Cell:
        suite = Finetuning(
            (kind,), methods, n, max(1, sizes.tuned_tokens // n), precision=sizes.precision, device=device,
            seconds=sizes.seconds, model=model, sizes=shape,
        )  # fmt: skip
        return Cell("finetune", f"{model}, n = {n:,}, {kind}: {', '.join(methods)}", suite.run)

    settings = [(model, shape, kind) for model, shape in sizes.models for kind in sizes.kinds]
    short = [cell(model, shape, n, kind, few) for n in sizes.tuned for model, shape, kind in settings]
    whole = [cell(model, shape, sizes.tuned[0], "full", sizes.methods) for model, shape in sizes.models]
    rest = [
        cell(model, shape, n, kind, sizes.methods)
        for n in sizes.tuned
        for model, shape in sizes.models
        for kind in sizes.kinds[1:]
    ]
    return whole + short + rest


def _peers(sizes: Sizes, device: str) -> list[Cell]:
    def cell(name: str, n: int, batch: int) -> Cell:
        def run(path: Path) -> None:
            files.append(path, [files.made(peers.measure(name, n, sizes.seconds, device, sizes.dtype, batch), device)])

        return Cell("peers", f"{name}, n = {n:,}", run)

    names = sizes.peers or tuple(peers.of_device(device))
    lengths = {name: (512,) if peers.steps_of_models(name) else sizes.peer_lengths for name in names}
    return [cell(name, n, max(1, sizes.tuned_tokens // n)) for name in names for n in lengths[name]]


def _bound(sizes: Sizes, device: str) -> list[Cell]:
    def cell(kind: str) -> Cell:
        def run(path: Path) -> None:
            rows = bound.measure([kind], sizes.bound, 8, 64, sizes.dtype, sizes.seconds, device)
            files.append(path, [files.made(row, device) for row in rows])

        return Cell("bound", f"{kind}, n = {sizes.bound:,}", run)

    return [cell(kind) for kind in sizes.kinds if kind.startswith(("blockwise", "longformer", "lsh", "local"))]


# What has happened stands in progress.jsonl: a line when a cell begins, and one when it has ended.


def tell(folder: Path, cell: str, section: str, event: str, **more: Any) -> None:
    """Add a line. event: begun, done, failed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "progress.jsonl").open("a") as file:
        file.write(json.dumps({"section": section, "cell": cell, "event": event, **more}) + "\n")


def events(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last event of every cell."""
    path = folder / "progress.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for line in map(json.loads, lines):
        last.pop((line["section"], line["cell"]), None)  # the last one stands last
        last[line["section"], line["cell"]] = line
    return last


def perform(section: str, folder: Path, sizes: Sizes, device: str, seconds: float) -> None:
    """Run the cells of a section that have not ended, while there is time."""
    started = time.monotonic()
    known = events(folder)
    for cell in cells(section, sizes, device):
        if known.get((section, cell.name), {}).get("event", "begun") != "begun":
            continue
        if time.monotonic() - started >= seconds:
            return
        tell(folder, cell.name, section, "begun")
        began = time.monotonic()
        try:
            cell.run(folder / f"{section}.jsonl")
        except Exception as error:  # a cell, not the section; the summary lists it
            tell(folder, cell.name, section, "failed", why=reason(error))
        else:
            tell(folder, cell.name, section, "done", seconds=round(time.monotonic() - began, 2))
        release(device)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)  # a kernel that has taken the device down ends the process here


def run(folder: Path, device: str, tiny: bool, budget: float, said: Callable[[str], None] = print) -> dict[str, Any]:
    """All sections, and the summary, which is also written."""
    started, share = time.monotonic(), 0.0
    for section, own in SHARES.items():
        share += own
        until = started + budget * share
        while (left := until - time.monotonic()) > 0 and _open(section, folder, tiny, device):
            said(f"{section}: {left:.0f} s")
            _in_a_process(section, folder, device, tiny, left)
    report = summary(folder, tiny, device) | {
        "seconds": round(time.monotonic() - started, 1),
        "budget": budget,
        "machine": cards.machine(device),
    }
    (folder / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _open(section: str, folder: Path, tiny: bool, device: str) -> list[Cell]:
    known = events(folder)
    every = cells(section, TINY if tiny else Sizes(), device)
    return [cell for cell in every if known.get((section, cell.name), {}).get("event", "begun") == "begun"]


def _in_a_process(section: str, folder: Path, device: str, tiny: bool, seconds: float) -> None:
    """`perform` in a process of its own; a cell in which that ended is failed."""
    command = [
        sys.executable,
        __file__,
        section,
        "--folder",
        str(folder),
        "--device",
        device,
        "--seconds",
        str(seconds),
        *(["--tiny"] if tiny else []),
    ]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds + GRACE)
        code, last = done.returncode, (done.stderr.strip().splitlines() or [""])[-1]
        why = f"the process ended with code {code}: {last}"
    except subprocess.TimeoutExpired:
        code, why = 1, f"ended: it was still running {GRACE:.0f} s after the time of its section"
    if code == 0:
        return
    last = list(events(folder).values())[-1:]
    begun = [line["cell"] for line in last if (line["section"], line["event"]) == (section, "begun")]
    for cell in begun:
        tell(folder, cell, section, "failed", why=why)
    if not begun:  # it never came to a cell
        for cell in _open(section, folder, tiny, device):
            tell(folder, cell.name, section, "failed", why=why)


def summary(folder: Path, tiny: bool, device: str) -> dict[str, Any]:
    """For every section: how many cells are done, which failed and why, and which did not fit; and what parity says."""
    known, sections = events(folder), {}
    for section in SHARES:
        names = [cell.name for cell in cells(section, TINY if tiny else Sizes(), device)]
        lines = {name: known.get((section, name)) for name in names}
        sections[section] = {
            "done": sum(line is not None and line["event"] == "done" for line in lines.values()),
            "failed": {
                name: line["why"] for name, line in lines.items() if line is not None and line["event"] == "failed"
            },
            "left_out": [name for name, line in lines.items() if line is None or line["event"] == "begun"],
        }
    parity = files.read(folder / "parity.jsonl", "parity")
    wrong = [
        f"{row['backend']}, {row['attention']}, {row['dtype']}: {row.get('failed') or row['errors']}"
        for row in parity
        if row.get("right") is False
    ]
    refused = sorted({f"{row['backend']}, {row['dtype']}: {row['refused']}" for row in parity if "refused" in row})
    return {"sections": sections, "compared": sum("right" in row for row in parity), "wrong": wrong, "refused": refused}


def words(summary: dict[str, Any]) -> str:
    """The summary to read."""
    lines = [f"{summary['machine']}: {summary['seconds']:.0f} s of {summary['budget']:.0f} s"]
    lines.append(
        f"parity: {summary['compared']} compared with float64, {len(summary['wrong'])} wrong, "
        f"{len(summary['refused'])} reasons to refuse"
    )
    lines += [f"  wrong: {cell}" for cell in summary["wrong"]]
    for section, counts in summary["sections"].items():
        lines.append(
            f"{section}: {counts['done']} done, {len(counts['failed'])} failed, {len(counts['left_out'])} did not fit"
        )
        lines += [f"  failed: {name}: {why}" for name, why in counts["failed"].items()]
        lines += [f"  did not fit: {name}" for name in counts["left_out"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="One section of the GPU suite; python benchmarks/run.py gpu runs them all."
    )
    parser.add_argument("section", choices=list(SHARES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    cards.need(given.device)
    perform(given.section, given.folder, TINY if given.tiny else Sizes(), given.device, given.seconds)


if __name__ == "__main__":
    main()
