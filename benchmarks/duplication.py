"""Reformer's duplication task at small scale: trained with full / 4 / 2 / 1 rounds of hashing, evaluated with full / 8
/ 4 / 2 / 1 (table 2).

    python benchmarks/duplication.py                 # some minutes per row on one core; results/duplication.json
    python benchmarks/duplication.py --word 63 --symbols 63 --batch 32 --steps 1500   # easier: all rows above 95 %

One causal layer with shared queries and keys; hashes are drawn anew at every step of training, so that no model can
adapt to one draw.
"full" is the same kind with one chunk. Rows that are there with the same settings are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import effzoo
from effzoo.tasks import duplication

RESULTS = Path(__file__).parent / "results" / "duplication.json"
TRAINED, EVALUATED = ("full", "4", "2", "1"), ("full", "8", "4", "2", "1")
PUBLISHED = {
    "full": (100, 94.8, 92.5, 76.9, 52.5),
    "4": (0.8, 100, 99.9, 99.4, 91.9),
    "2": (0.8, 100, 99.9, 98.1, 86.8),
    "1": (0.8, 99.9, 99.6, 94.8, 77.9),
}  # per cent, Kitaev et al. 2020, table 2: |w| = 511, 127 symbols, 150,000 steps, chance 0.8


def build(rounds: str, settings: dict[str, int]) -> effzoo.architectures.Transformer:  # type: ignore[name-defined]
    """The model with full attention, or with so many rounds of hashing; weights of the one fit the other."""
    length = 2 * (settings["word"] + 1)
    full = f"lsh[rounds=1,chunk={length},buckets=2]"
    hashed = f"lsh[rounds={rounds},chunk={settings['chunk']},buckets={2 * length // settings['chunk']}]"
    return effzoo.build(
        "gpt2", attention=full if rounds == "full" else hashed, task="causal_lm", layers=1, dim=settings["dim"],
        heads=settings["heads"],
        mlp=settings["dim"], vocab=settings["symbols"] + 1, max_length=length, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def rehash(model: torch.nn.Module, seed: int) -> None:
    for core in model.cores():  # type: ignore[operator, union-attr]
        core.resample(seed)


def train(rounds: str, settings: dict[str, int], seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    torch.manual_seed(seed)
    model, draw = build(rounds, settings).train(), torch.Generator().manual_seed(seed)
    steps, warm = settings["steps"], settings["steps"] // 20
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"] / 1e4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm, (steps - step) / (0.3 * steps) + 0.05)
    )
    losses = []
    for step in range(steps):
        ids, labels = duplication(settings["batch"], settings["word"], settings["symbols"], draw)
        rehash(model, step)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 250 == 0:
            print(
                f"  trained with {rounds}, seed {seed}: step {step} of {steps}, loss {losses[-1]:.3f}",
                file=sys.stderr,
                flush=True,
            )
    return model.state_dict(), losses


@torch.no_grad()
def accuracy(state: dict[str, torch.Tensor], rounds: str, settings: dict[str, int]) -> float:
    """Per cent of symbols of the second word, over sequences and hashes that training never saw."""
    model = build(rounds, settings).eval()
    model.load_state_dict(state)
    draw, right, total = torch.Generator().manual_seed(10**6), 0, 0
    for step in range(10):
        ids, labels = duplication(128, settings["word"], settings["symbols"], draw)
        rehash(model, 10**6 + step)
        found, wanted = model(ids).logits[:, :-1].argmax(dim=-1), labels[:, 1:]
        right += int(((found == wanted) & (wanted != -100)).sum())
        total += int((wanted != -100).sum())
    return 100 * right / total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"word": 127, "symbols": 127, "dim": 64, "heads": 4, "chunk": 8, "batch": 16, "steps": 1000, "rate": 20}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="in units of 1e-4" if name == "rate" else None)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--rows", nargs="*", default=list(TRAINED), choices=TRAINED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {name: getattr(arguments, name) for name in defaults}
    found = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    for seed in arguments.seeds:
        for rounds in arguments.rows:
            if any((row["trained"], row["seed"], row["settings"]) == (rounds, seed, settings) for row in found):
                continue
            started = time.perf_counter()
            state, losses = train(rounds, settings, seed)
            row = {"trained": rounds, "seed": seed, "settings": settings, "torch": torch.__version__}
            row |= {"accuracy": {other: round(accuracy(state, other, settings), 2) for other in EVALUATED}}
            row |= {
                "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
                "seconds": round(time.perf_counter() - started, 1),
            }
            found.append(row)
            arguments.results.write_text(json.dumps(found, indent=1) + "\n")
            print(row, flush=True)
    print(table([row for row in found if row["settings"] == settings], settings))
    return 0


def tracked_table(results: list[dict]) -> str:  # type: ignore[type-arg]
    """One table for every setting in the tracked results."""
    parts = []
    for settings in [json.loads(text) for text in dict.fromkeys(json.dumps(row["settings"]) for row in results)]:
        rows = [row for row in results if row["settings"] == settings]
        said = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "rate")
        parts.append(
            f"{said}; {len({row['seed'] for row in rows})} seed(s), learning rate "
            f"{settings['rate'] / 1e4:g}:\n\n{table(rows, settings)}"
        )
    return "\n\n".join(parts)


def table(rows: list[dict], settings: dict[str, int]) -> str:  # type: ignore[type-arg]
    """Markdown: mean over seeds, with the published value (of a far larger task) in brackets."""
    lines = [f"| trained with, evaluated with | {' | '.join(EVALUATED)} |", "|---|" + "---|" * len(EVALUATED)]
    for rounds in TRAINED:
        of_row = [row["accuracy"] for row in rows if row["trained"] == rounds]
        if of_row:
            means = [sum(row[other] for row in of_row) / len(of_row) for other in EVALUATED]
            cells = (f"{mean:.1f} ({published})" for mean, published in zip(means, PUBLISHED[rounds], strict=True))
            lines.append(f"| {rounds} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            f"\nchance here {100 / settings['symbols']:.1f} %; in brackets Kitaev et al. 2020, "
            "table 2 (|w| = 511, chance 0.8 %)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
