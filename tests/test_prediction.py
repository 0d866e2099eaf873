"""Predictions: operations and bytes that can be counted otherwise, launches, crossovers, and rows that hold them."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effzoo
from effzoo.attention import AttentionCore, Mask, register
from effzoo.measure import Case, Scaling
from effzoo.measure import rows as files
from effzoo.measure.cards import CARDS, Card
from effzoo.measure.finetuning import Finetuning
from effzoo.measure.page import crossover_table
from effzoo.measure.prediction import (
    Launches,
    against_full,
    crossover,
    launched,
    launches,
    predict,
    predict_step,
    steps,
)

H100 = CARDS["H100"]
SLOW = Card("slow", 1e3, 1e3, 1e3, 1.0, "a test")


def counted(case):
    """Operations of products in a forward pass in plain PyTorch."""
    layer = case.layer().eval()
    layer.core.context = dataclasses.replace(layer.core.context, backend="reference")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(case.input(), Mask())
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "kind",
    [
        "full",
        "linformer[k=8]",
        "perceiver[latents=8]",
        "blockwise[blocks=4]",
        "linear",
        "performer[features=6]",
        "nystromformer[landmarks=8]",
    ],
)
def test_operations_are_those_that_run(kind):
    case = Case(kind, "forward", 64, 32, 4, batch=3)
    assert sum(step.times * step.operations for step in steps(case)) == pytest.approx(counted(case), rel=0.02)


def test_operations_of_a_window_are_its_pairs():
    case = Case("longformer[window=8]", "forward", 64, 32, 4, batch=3)
    (found,) = [step for step in steps(case) if step.name == "attention"]
    assert found.operations == 4 * 3 * 32 * (64 * 9 - 2 * (4 + 3 + 2 + 1))


def test_a_training_step_costs_three_times_the_products_of_a_forward_pass():
    forward, train = (steps(Case("full", mode, 64, 32, 4)) for mode in ("forward", "train"))
    products = [sum(s.times * s.operations for s in found if "project" in s.name) for found in (forward, train)]
    attended = [sum(s.times * s.operations for s in found if "attention" in s.name) for found in (forward, train)]
    assert products[1] == 3 * products[0] and attended[1] == 3.5 * attended[0]


def test_decoding_reads_weights_and_what_the_cache_keeps():
    found = {
        kind: steps(Case(kind, "decode", 64, 32, 4, batch=3))[-1]
        for kind in ("full", "longformer[window=8]", "local[chunk=8]", "streaming[window=8, sinks=3]")
    }
    assert [found[kind].bytes for kind in found] == [3 * kept * 2 * 32 * 4 for kept in (64, 5, 16, 11)]


def test_a_prediction_is_the_slower_of_device_and_host():
    case = Case("full", "forward", 16, 8, 2)
    found = predict(case, SLOW, launches=3)
    assert found.host_seconds == 3.0 and found.seconds == found.device_seconds > 3.0
    assert found.device_seconds == pytest.approx(sum(s.times * max(s.operations, s.bytes) for s in steps(case)) / 1e3)
    assert predict(case, H100, launches=10**6).seconds == 5.0
    with effzoo.scope():

        @register("mine")
        class Mine(AttentionCore):
            """Neither a predicate nor one of ours."""

            def forward(self, q, k, v, *, mask, memory=None):
                return v

        assert predict(dataclasses.replace(case, attention="mine"), H100) is None


def test_launches_are_operators_that_compute():
    x = torch.ones(4, 4)
    with Launches() as found:
        x.t()[1:].add_(1).sum()
        torch.empty(3)
    assert found.count == 2 and launched(lambda: x + 1) == 1
    assert launches("full", "forward", 32, 2) <= launches("full", "train", 32, 2)


def test_a_step_of_a_model_is_products_attention_and_the_optimizer():
    layer = Case("full", "train", 16, 8, 2, batch=2)
    common = {"layers": 3, "matrices": 1000, "saved": 0, "trainable": 0}
    frozen, whole = (predict_step(layer, H100, causal=False, trained=t, **common) for t in (0, 1000))
    assert whole.operations - frozen.operations == 2 * 32 * 1000
    causal = predict_step(layer, H100, causal=True, trained=0, **common)
    assert frozen.operations - causal.operations == 3 * 3.5 * 4 * 2 * 8 * 16**2 / 2
    assert (
        predict_step(layer, H100, causal=False, trained=0, **{**common, "trainable": 100}).bytes - frozen.bytes == 2800
    )


def test_crossovers_are_printed_from_rows():
    suite = Scaling(dim=2048, heads=16, tokens=4096, dtype="bfloat16")
    rows = against_full(
        ["full", "local[chunk=8]", "linformer[k=8]"], ["forward", "decode"], [64, 128], suite.case, H100
    )
    assert {row["ratio"] for row in rows if row["attention"] == "full"} == {1.0} and not any(
        row["mode"] == "decode" for row in rows if row["attention"].startswith("linformer")
    )
    made = [
        {"attention": "a", "mode": "train", "n": n, "ratio": ratio}
        for n, ratio in ((1, 0.5), (2, 1.0), (4, 0.9), (8, 0.1))
    ]
    assert crossover(made, "a", "train") == 4 and crossover(made[:2], "a", "train") is None
    assert crossover_table(made) == [["attention", "train, faster from", "train, of full at 8"], ["`a`", "4", "0.100"]]
    assert crossover_table(rows)[2][2] == "cannot"


@pytest.mark.slow
def test_rows_have_a_prediction_beside_the_time(tmp_path, monkeypatch):
    for module in ("prediction", "finetuning"):
        monkeypatch.setattr(f"effzoo.measure.{module}.of_device", lambda device: SLOW)
    (row,) = Scaling(("full",), (16,), ("forward",), dim=8, heads=2, seconds=0.0).run(tmp_path / "scaling.jsonl")
    assert row["predicted"]["device_seconds"] == predict(Case("full", "forward", 16, 8, 2), SLOW).device_seconds
    assert row["roofline"] == row["predicted"]["device_seconds"] / row["seconds"]
    sizes = {"layers": 1, "dim": 8, "heads": 2, "mlp": 16, "vocab": 50}
    (row,) = Finetuning(("full",), ("full",), 16, 1, seconds=0.0, sizes=sizes).run(tmp_path / "finetune.jsonl")
    assert row["predicted"]["operations"] > 6 * 16 * (4 * 8 * 8 + 2 * 8 * 16) and json.dumps(
        files.read(tmp_path / "finetune.jsonl", "finetune")
    )
