"""One document over several processes: a Longformer with LoRA, forward and backward, its time and memory by rank.

    python benchmarks/over_ranks.py --length 65536            # 4 ranks on the CPU (gloo), one thread each
    python benchmarks/over_ranks.py --length 1048576 --ranks 4 --window 512

Each process is given the whole document of token ids and holds the hidden states of its slice. A row of
results/over_ranks-cpu.jsonl: seconds forward and backward (of the slowest rank), the largest resident size of each
process, before the model is built and at the end, the peak that `effzoo.plan` predicts (which takes minutes at a
million tokens), bytes that each sent by the name of the exchange, and the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import effzoo
from effzoo.parallel import OverRanks, counted

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "over_ranks-cpu.jsonl"
SIZES = {"layers": 4, "dim": 64, "heads": 2, "mlp": 128, "vocab": 1000, "positions": "sinusoidal", "dropout": 0.0}


def peak_mib() -> float:
    """The largest resident size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def of_rank(rank: int, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward pass of one rank."""
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=arguments.ranks, timeout=timedelta(minutes=30)
    )
    before = peak_mib()
    torch.manual_seed(0)
    model = effzoo.build(
        "longformer", attention=f"longformer[window={arguments.window}]", peft="lora[rank=8]", task="classification",
        max_length=arguments.length, attention_dropout=0.0, **SIZES,
    ).train()  # fmt: skip
    model.recompute = "blocks"
    spread = OverRanks(model)
    ids = torch.randint(10, SIZES["vocab"], (1, arguments.length))
    with counted() as traffic:
        started = time.perf_counter()
        loss = spread(ids, labels=torch.tensor([1])).loss
        forward = time.perf_counter() - started
        loss.backward()
        spread.sum_gradients()
        seconds = time.perf_counter() - started
    squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
    row = {
        "loss": loss.item(), "gradient": sum(squares) ** 0.5, "forward": forward, "seconds": seconds,
        "before_mib": before, "peak_mib": peak_mib(), "sent": traffic.sent,
    }  # fmt: skip
    dist.destroy_process_group()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**16)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(of_rank(arguments.rank, arguments.port, arguments)))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--length", arguments.length, "--ranks", arguments.ranks, "--window", arguments.window, "--port", port]
    # what is freed goes back to the system: glibc would keep up to 32 MiB of each size for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**22)}
    command = [sys.executable, __file__, *map(str, given), "--rank"]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, env=environment)
        for rank in range(arguments.ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank has failed")
    rows = [json.loads(output) for output in outputs]
    assert len({row["loss"] for row in rows}) == 1, "the ranks disagree"
    row = {
        "length": arguments.length, "ranks": arguments.ranks, "window": arguments.window, "loss": rows[0]["loss"],
        "gradient": rows[0]["gradient"], **{name: max(row[name] for row in rows) for name in ("forward", "seconds")},
        **{name: [round(row[name], 1) for row in rows] for name in ("before_mib", "peak_mib")},
        "sent": [row["sent"] for row in rows],
    }  # fmt: skip
    planned = effzoo.plan(
        "longformer", "lora[rank=8]", attention=f"longformer[window={arguments.window}]", task="classification",
        attention_dropout=0.0, max_length=arguments.length, length=arguments.length, ranks=arguments.ranks,
        recompute="blocks", **SIZES,
    )  # fmt: skip
    row["planned_mib"] = round(planned.peak / 2**20, 1)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
