"""What loading takes: the resident memory of a process beyond what it had, as a multiple of the weights.

    python benchmarks/loading.py          # a Llama shape of 455 MiB; prints the table of docs/howto/save-and-share.md

A random checkpoint is written in float32 and in bfloat16, by transformers (in shards of 100 MB) and by `effzoo.save`.
Each way of loading it runs in a process of its own, in turns, three times; the median counts. Every weight is read
once, so that pages that only stand in a mapped file are there as well.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import effzoo
from effzoo.measure.worker import forget_peak, resident_peak

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "loading-cpu.json"
WAYS = {  # name: the folder it reads ("theirs" or "ours"), and how
    "transformers, AutoModelForCausalLM.from_pretrained": ("theirs", "auto"),
    "effzoo.build(pretrained=folder)": ("theirs", "build"),
    "effzoo.load(folder)": ("ours", "load"),
    "AutoModelForCausalLM.from_pretrained, a folder of effzoo.save": ("ours", "auto"),
    "effzoo.build(pretrained=folder, quantise=4)": ("theirs", "quantise"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(folder: Path) -> None:
    """The checkpoints."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16, intermediate_size=2816,
        vocab_size=16000, max_position_embeddings=512, rms_norm_eps=1e-5, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    for name, dtype in DTYPES.items():
        theirs = transformers.LlamaForCausalLM(config).to(dtype)
        theirs.save_pretrained(folder / f"theirs-{name}", max_shard_size="100MB")
        effzoo.save(effzoo.load(folder / f"theirs-{name}"), folder / f"ours-{name}")


def load(way: str, folder: Path) -> dict[str, float]:
    """Mebibytes of the weights, and by how many this process grew while it loaded them."""
    import effzoo.convert
    import effzoo.transformers

    torch.set_num_threads(1)
    _, how = WAYS[way]
    before = forget_peak()
    if how == "auto":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    elif how == "load":
        model = effzoo.load(folder)
    else:
        model = effzoo.build(pretrained=folder, dtype="auto", quantise=4 if how == "quantise" else None)
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.sum()
    grown = resident_peak() - before
    return {"weights": sum(x.numel() * x.element_size() for x in tensors) / 2**20, "grown": grown / 2**20}


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(load(sys.argv[1], Path(sys.argv[2]))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        measured: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(3):
            for way, (kind, _) in WAYS.items():
                for dtype in DTYPES:
                    command = [sys.executable, __file__, way, f"{made}/{kind}-{dtype}"]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    measured.setdefault((way, dtype), []).append(json.loads(said.splitlines()[-1]))
        for (way, dtype), each in measured.items():
            grown = statistics.median(row["grown"] for row in each)
            rows.append({"way": way, "dtype": dtype, "weights": each[0]["weights"], "grown": grown})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    print("| loading | dtype | weights | the process grows by | times |\n|---|---|---|---|---|")
    for row in rows:
        ratio = row["grown"] / row["weights"]
        print(f"| {row['way']} | {row['dtype']} | {row['weights']:.0f} MiB | {row['grown']:.0f} MiB | {ratio:.2f} |")


if __name__ == "__main__":
    main()
