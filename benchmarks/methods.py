"""Every fine-tuning method on one task: MiniLM with Longformer attention on sentences of film reviews, at one budget of
trained parameters.

    python benchmarks/methods.py --data sentence_polarity.zip        # rows that are there are not computed again
    python benchmarks/methods.py --data sentence_polarity.zip --methods lora prefix --seeds 0

The data are those of Pang & Lee 2005 (one sentence a line in `rt-polarity.pos` and `rt-polarity.neg`), as a zip file or
a folder. Each run is a process of its own, so that its peak memory is its own; seconds are those of the processor,
which other processes disturb less than the clock. Where a method has a size to set, it is set to what trains as many
parameters as the budget allows, task head not counted; the learning rate is the method's own, the same recipe for all.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

import effzoo
from effzoo import data
from effzoo.lab.fit import fit
from effzoo.measure.rows import commit
from effzoo.spec import parse

RESULTS = Path(__file__).parent / "results" / "methods.json"
BUDGET = 147_456  # LoRA of rank 8 on q, v and their global twins
# these with several seeds
MAIN = ("head", "full", "bitfit", "lora", "dora", "houlsby", "parallel", "ia3", "prefix", "prompt")
SPECS = {  # where the defaults do not suit the budget or the length of a sentence
    "prompt": "prompt[length=20]", "deep_prompt": "deep_prompt[length=32]",
    "intrinsic": "intrinsic[dim=1000]", "said": "said[dim=1000]", "last": "last[count=1]",
    "mam": "mam[form=flat, length=8]", "unipelt": "unipelt[length=4, rank=2]",
    "s4": "s4", "lt_sft": "lt_sft[keep=0.0058]", "diff": "diff[keep=0.0058]",
    "union": "prefix[length=16]|lora[rank=4]",
}  # fmt: skip
ELSEWHERE = ("residual_adapter",)  # for convolutions
SETTINGS = {"train": 800, "test": 1000, "epochs": 2, "batch": 16, "length": 48, "window": 16}


def sentences(source: Path) -> tuple[list[str], list[int]]:
    """Texts and labels, in a fixed random order."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(("rt-polarity.neg", "rt-polarity.pos")):
        if source.is_dir():
            content = (source / name).read_bytes()
        else:
            with zipfile.ZipFile(source) as archive:
                content = archive.read(next(member for member in archive.namelist() if member.endswith(name)))
        lines = [line.strip() for line in content.decode("latin-1").splitlines() if line.strip()]
        texts += lines
        labels += [label] * len(lines)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order], [labels[i] for i in order]


def build(settings: dict[str, int], seed: int) -> effzoo.architectures.Transformer:
    torch.manual_seed(seed)
    return effzoo.build(
        "minilm", attention=f"longformer[window={settings['window']}]", task="classification", num_labels=2,
        pretrained=True, max_length=512, pooling="mean", attention_dropout=0.0,
    )  # fmt: skip


def spec_of(method: str, model: torch.nn.Module, budget: int) -> str:
    """The method's spec within the budget; a method without a size, or whose size is given, stays as it is."""
    given = parse(SPECS.get(method, method))
    size = effzoo.peft.get(given[0].name).size
    if len(given) > 1 or not size or size in given[0].options or method == "s4":
        return SPECS.get(method, method)
    return str(effzoo.peft.within(model, given[0], budget))


def batches(
    rows: list[int], encoded: dict[str, torch.Tensor], labels: torch.Tensor, size: int
) -> list[dict[str, torch.Tensor]]:
    """Batches cut to their longest sentence."""
    made = []
    for start in range(0, len(rows), size):
        chosen = torch.tensor(rows[start : start + size])
        longest = int(encoded["attention_mask"][chosen].sum(dim=1).max())
        made.append({key: value[chosen, :longest] for key, value in encoded.items()} | {"labels": labels[chosen]})
    return made


def parts(count: int, settings: dict[str, int], validate: bool) -> tuple[list[int], list[int]]:
    """The sentences to train on and those to count on: the first ones, and the last ones; for choosing defaults, those
    before the last ones."""
    end = count - settings["test"] * validate
    return list(range(settings["train"])), list(range(end - settings["test"], end))


def run(
    method: str, seed: int, settings: dict[str, int], source: Path, budget: int, validate: bool
) -> dict[str, object]:
    """Train one method from one seed, and count its hits."""
    texts, names = sentences(source)
    train, test = parts(len(texts), settings, validate)
    model = build(settings, seed)
    tokenizer = data.tokenizer_of(model)
    tokens = tokenizer(texts, truncation=True, max_length=settings["length"], padding="max_length", return_tensors="pt")
    encoded = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    labels = torch.tensor(names)
    spec = spec_of(method, model, budget)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    effzoo.attach(model, spec)
    account = effzoo.account(model)
    saved = saved_bytes(model, batches(train[: settings["batch"]], encoded, labels, settings["batch"])[0])
    steps = settings["epochs"] * -(-len(train) // settings["batch"])
    calibration = batches(train[: 4 * settings["batch"]], encoded, labels, settings["batch"])
    torch.manual_seed(seed)
    started = time.process_time()
    drawn = stream(train, encoded, labels, settings, seed)
    fit(model, drawn, steps, bfloat16=True, calibration=calibration)
    seconds = time.process_time() - started
    final = effzoo.account(model)
    hits = 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches(
            sorted(test, key=encoded["attention_mask"].sum(dim=1).tolist().__getitem__), encoded, labels, 100
        ):
            hits += int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum())
    head = sum(parameter.numel() for parameter in model.head.parameters() if not parameter.requires_grad)
    return {
        "spec": spec, "accuracy": round(100 * hits / len(test), 2), "trainable": account.trainable - head,
        "stored_bytes": final.stored_bytes,
        "changed": final.changed, "rank": final.rank, "total": account.total, "steps": steps,
        "seconds": round(seconds, 1),
        "peak_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "saved_mib": round(saved / 2**20, 1), "commit": commit(),
    }  # fmt: skip


def stream(
    train: list[int], encoded: dict[str, torch.Tensor], labels: torch.Tensor, settings: dict[str, int], seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of all epochs, in an order that the seed draws."""
    draw = torch.Generator().manual_seed(seed)
    lengths = encoded["attention_mask"].sum(dim=1).tolist()
    for _ in range(settings["epochs"]):
        order = [train[i] for i in torch.randperm(len(train), generator=draw)]
        yield from batches(by_length(order, lengths, settings["batch"], draw), encoded, labels, settings["batch"])


def by_length(rows: list[int], lengths: list[int], batch: int, draw: torch.Generator) -> list[int]:
    """Batches of similar lengths in random order: each ten batches are sorted among themselves, then the batches are
    shuffled."""
    chunks = [
        sorted(rows[start : start + 10 * batch], key=lengths.__getitem__) for start in range(0, len(rows), 10 * batch)
    ]
    whole = [chunk[start : start + batch] for chunk in chunks for start in range(0, len(chunk), batch)]
    return [row for i in torch.randperm(len(whole), generator=draw) for row in whole[i]]


def saved_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """What autograd keeps of one batch for the backward pass, without the parameters; each storage once."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = effzoo.peft.loss(model.train(), **batch)
    del loss
    return sum(kept.values())


def tracked_table(results: dict) -> str:
    """The tracked results as Markdown."""
    rows: dict[str, list[dict]] = {}
    for key, row in results["rows"].items():
        rows.setdefault(key.rsplit(" seed ", 1)[0], []).append(row)
    lines = [
        "| method | accuracy | trained | stored bytes | changed | rank | CPU seconds | peak MiB | saved MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    order = sorted(rows, key=lambda name: -statistics.mean(row["accuracy"] for row in rows[name]))
    for name in order:
        of_spec = rows[name]
        accuracy = statistics.mean(row["accuracy"] for row in of_spec)
        spread = f" ± {statistics.stdev(row['accuracy'] for row in of_spec):.1f}" if len(of_spec) > 1 else ""
        first = of_spec[0]
        changed = "-" if first["changed"] is None else f"{100 * first['changed'] / first['total']:.2f} %"
        rank = "-" if first["rank"] is None else first["rank"]
        spec = first["spec"].replace("|", "\\|")  # a bar would end the cell
        lines.append(
            f"| `{spec}` | {accuracy:.1f}{spread} | {first['trainable']:,} | {first['stored_bytes']:,} | {changed} | "
            f"{rank} | {statistics.median(row['seconds'] for row in of_spec):.0f} | "
            f"{statistics.median(row['peak_mib'] for row in of_spec):.0f} | {first['saved_mib']} |"
        )
    settings = results["settings"]
    about = ", ".join(f"{name} {value:,}" for name, value in settings.items())
    seeds = max(map(len, rows.values()))
    commits = ", ".join(sorted({row["commit"] for row in results["rows"].values()}))
    spread_of = f"± is the standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return "\n".join([*lines, "", f"{about}; {spread_of}; {results['machine']}; commit {commits}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the main methods; the others have the first one"
    )
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--validate",
        action="store_true",
        help="count on other sentences than those of the table; defaults are chosen on these",
    )
    parser.add_argument(
        "--one", action="store_true", help="run one method and one seed in this process and print the row"
    )
    given = parser.parse_args()
    if given.validate and given.results == RESULTS:
        parser.error(
            "--validate is for choosing, and its rows do not belong into the table; give --results another name"
        )
    torch.set_num_threads(given.threads)
    settings = {name: getattr(given, name) for name in SETTINGS}
    if given.one:
        print(json.dumps(run(given.methods[0], given.seeds[0], settings, given.data, given.budget, given.validate)))
        return 0
    results = json.loads(given.results.read_text()) if given.results.exists() else {}
    if results.get("settings") not in (None, settings):
        print(f"{given.results} was made with other settings; give --results another name", file=sys.stderr)
        return 2
    results = {
        "settings": settings,
        "budget": given.budget,
        "machine": f"{platform.machine()}, {given.jobs} processes at a time with {given.threads} thread(s) each, "
        f"torch {torch.__version__}, bfloat16",
        "rows": results.get("rows", {}),
        "failed": {},
    }
    methods = given.methods or [
        *MAIN,
        *(name for name in [*SPECS, *effzoo.peft.names()] if name not in (*MAIN, *ELSEWHERE)),
    ]
    wanted = [
        (method, seed) for number, seed in enumerate(given.seeds) for method in dict.fromkeys(methods)
        if f"{method} seed {seed}" not in results["rows"] and (number == 0 or method in MAIN)
    ]  # fmt: skip
    options = [f"--{name}={value}" for name, value in settings.items()] + [
        f"--budget={given.budget}",
        f"--threads={given.threads}",
    ]
    options += ["--validate"] * given.validate

    def start(method: str, seed: int) -> tuple[str, subprocess.CompletedProcess[str]]:
        command = [
            sys.executable,
            __file__,
            "--one",
            "--methods",
            method,
            "--seeds",
            str(seed),
            "--data",
            str(given.data),
            *options,
        ]
        return f"{method} seed {seed}", subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        for future in as_completed([pool.submit(start, *job) for job in wanted]):
            key, done = future.result()
            if done.returncode:
                results["failed"][key] = (
                    done.stderr.strip().splitlines()[-1] if done.stderr.strip() else (f"exit code {done.returncode}")
                )
            else:
                results["rows"][key] = json.loads(done.stdout.strip().splitlines()[-1])
            print(key, results["rows"].get(key) or results["failed"][key], file=sys.stderr, flush=True)
            given.results.write_text(json.dumps(results, indent=1) + "\n")
    print(tracked_table(results))
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
