"""ListOps at small scale: every attention kind in the same small encoder, several seeds, beside what Long Range Arena
published at full scale.

    python benchmarks/listops.py                     # every kind x 3 seeds, some minutes each on one core;
    results/listops.json python benchmarks/listops.py --kinds full lsh --seeds 0 --steps 500

Expressions of depth 4 and at most 64 tokens instead of depth 10 and 2,000: chance is 10 %. Rows that are there are not
computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import effzoo
from effzoo.tasks import ListOps
from effzoo.tasks.listops import VOCABULARY

RESULTS = Path(__file__).parent / "results" / "listops.json"
SPECS = {  # options that suit sequences of 65 positions
    "full": "full", "blockwise": "blockwise[blocks=2]", "longformer": "longformer[window=16]",
    "local": "local[chunk=8]",
    "lsh": "lsh[rounds=4,chunk=8]", "linformer": "linformer[k=16]", "perceiver": "perceiver[latents=16]",
}  # fmt: skip
# Tay et al. 2020, table 1
PUBLISHED = {"full": 36.37, "longformer": 35.63, "linformer": 35.70, "lsh": 37.27, "local": 15.82}


def run(kind: str, seed: int, settings: dict[str, int]) -> dict[str, object]:
    """Train and test one kind from one seed."""
    task = ListOps(depth=4, arguments=4, shortest=5, longest=settings["longest"])
    data = task.examples(settings["train"] + settings["test"], seed=0)
    train, test = [x[: settings["train"]] for x in data], [x[settings["train"] :] for x in data]
    torch.manual_seed(seed)
    model = effzoo.build(
        "bert", attention=SPECS.get(kind, kind),
        task="classification", num_labels=10, layers=2, dim=settings["dim"], heads=4, mlp=2 * settings["dim"],
        vocab=len(VOCABULARY), max_length=settings["longest"] + 1, dropout=0.0, attention_dropout=0.0, norm="pre",
        types=0, pad_token=0,
    )  # fmt: skip
    steps, warm = settings["steps"], max(1, settings["steps"] // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm, (steps - step) / (0.5 * steps) + 0.02)
    )
    draw, started, tokens = torch.Generator().manual_seed(seed), time.perf_counter(), 0
    model.train()
    for step in range(steps):
        ids, mask, labels = _batch(train, settings["batch"], draw)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += int(mask.sum())
        if step % 250 == 0:
            print(
                f"  {kind}, seed {seed}: step {step} of {steps}, loss {float(loss.detach()):.3f}",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        parts = [
            model(ids, attention_mask=mask).logits.argmax(-1) == labels
            for ids, mask, labels in zip(*(x.split(500) for x in test), strict=True)
        ]
    accuracy = 100 * float(torch.cat(parts).double().mean())
    return {"accuracy": round(accuracy, 2), "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds)}


def _batch(data: list[torch.Tensor], size: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    rows = torch.randint(len(data[0]), (size,), generator=draw)
    return tuple(x[rows] for x in data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"steps": 1000, "batch": 64, "train": 20_000, "test": 2_000, "dim": 64, "longest": 64}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="*", default=effzoo.attention.names(), choices=effzoo.attention.names())
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {name: getattr(arguments, name) for name in defaults}
    found = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            spec = SPECS.get(kind, kind)
            if any((row["attention"], row["seed"], row["settings"]) == (spec, seed, settings) for row in found):
                continue
            row = {
                "kind": kind,
                "attention": spec,
                "seed": seed,
                "settings": settings,
                "torch": torch.__version__,
                **run(kind, seed, settings),
            }
            found.append(row)
            arguments.results.write_text(json.dumps(found, indent=1) + "\n")
            print(row, flush=True)
    print(table([row for row in found if row["settings"] == settings]))
    return 0


def tracked_table(results: list[dict]) -> str:  # type: ignore[type-arg]
    """The tracked results with their settings."""
    settings = results[0]["settings"]
    return f"{', '.join(f'{name} {value}' for name, value in settings.items())}:\n\n{table(results)}"


def table(rows: list[dict]) -> str:  # type: ignore[type-arg]
    """Markdown: mean and range over seeds."""
    lines = [
        "| attention | accuracy, mean (lowest to highest) | seeds | tokens/s | Long Range Arena, full scale |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        values = [row["accuracy"] for row in own]
        speed = statistics.median(row["tokens_per_second"] for row in own)
        published = PUBLISHED.get(kind, "")
        lines.append(
            f"| {kind} | {statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}) | "
            f"{len(own)} | {speed:,.0f} | {published} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
