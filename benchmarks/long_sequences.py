"""How far each kind goes on one machine: one attention layer at n = 262,144 and 1,048,576 forward, and at 65,536
forward and backward.

    python benchmarks/long_sequences.py            # every case below, each in a process of its own;
    results/long_sequences.json python benchmarks/long_sequences.py --only lsh --forward 65536 --train 16384

Peak memory is the largest resident size of the process, torch included (a process that computes nothing is listed
first). A kind passes below 20 GiB. Results that are there are not computed again (--again does).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "long_sequences.json"
LIMIT_GIB = 20
# every kind whose cost is below n^2, and blockwise with blocks of fixed length; full attention for comparison
CASES = {
    "nothing": "nothing",
    "longformer": "longformer[window=512]",
    "longformer dilated": "longformer[window=512,dilation=(1,4)]",
    "longformer causal": "longformer[window=512]",
    "linformer": "linformer[k=256]",
    "linformer mean": "linformer[k=256,projection='mean']",
    "perceiver": "perceiver[latents=256]",
    "lsh": "lsh[rounds=4,chunk=64]",
    "lsh causal": "lsh[rounds=4,chunk=64]",
    "local": "local[chunk=64]",
    "blockwise": "blockwise[blocks=512]",
}


def measure(name: str, n: int, train: bool) -> dict[str, object]:
    """One case in this process."""
    import torch

    from effzoo.attention import Context, Mask
    from effzoo.blocks.attention import Attention
    from effzoo.spec import parse_one

    torch.manual_seed(0)
    started = time.perf_counter()
    checksum = 0.0
    if name != "nothing":
        context = Context(heads=2, head_dim=32, causal="causal" in name, max_length=n)
        layer = Attention(64, parse_one(CASES[name]), context)
        valid = torch.ones(1, n, dtype=torch.bool)
        valid[0, n - 7 :] = False
        is_global = None
        if layer.core.knows_globals():
            is_global = torch.zeros(1, n, dtype=torch.bool)
            is_global[0, :4] = True
        x = torch.randn(1, n, 64, requires_grad=train)
        started = time.perf_counter()
        with torch.set_grad_enabled(train):
            out = layer(x, Mask(valid, is_global))
            checksum = float(out.detach().abs().mean())
            if train:
                out.square().mean().backward()
                checksum = float(x.grad.abs().mean())
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "checksum": checksum,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", type=int, nargs="*", default=[262_144, 1_048_576])
    parser.add_argument("--train", type=int, default=65_536)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, n, train = arguments.case
        print(json.dumps(measure(name, int(n), train == "train")))
        return 0
    import torch

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    results["machine"] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dim": 64,
        "heads": 2,
    }
    for name in arguments.only:
        for n, mode in [*((n, "forward") for n in arguments.forward), (arguments.train, "train")]:
            known = [row for row in results["rows"] if (row["case"], row["n"], row["mode"]) == (name, n, mode)]
            if known and not arguments.again:
                continue
            run = subprocess.run(
                [sys.executable, __file__, "--case", name, str(n), mode], capture_output=True, text=True
            )
            row = {"case": name, "spec": CASES[name], "n": n, "mode": mode}
            if run.returncode == 0:
                row |= json.loads(run.stdout.splitlines()[-1])
            else:
                row["error"] = (run.stderr.strip().splitlines() or [f"killed with {-run.returncode}"])[-1]
            results["rows"] = [old for old in results["rows"] if old not in known] + [row]
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(row, flush=True)
    print(table(results["rows"]))
    return int(any("error" in row or row["peak_gib"] > LIMIT_GIB for row in results["rows"]))


def tracked_table(results: dict) -> str:
    """The table of the tracked results, and the machine."""
    machine = results["machine"]
    said = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; the first rows are a "
        "process that computes nothing"
    )
    return f"{table(results['rows'])}\n\n{said}. Other work ran beside these: the seconds are an order of magnitude."


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    lines = ["| attention | n | | seconds | peak GiB |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['seconds']} | {row['peak_gib']}" if "error" not in row else f"{row['error']} | "
        lines.append(
            f"| {row['spec']}{' causal' * ('causal' in str(row['case']))} | {row['n']:,} | {row['mode']} | {figures} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
