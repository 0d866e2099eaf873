"""The GPU suite without a GPU: its code at tiny sizes on the CPU and on simulated CUDA, its budget, and what it does
when a process ends."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_simulated_cuda import ran

from effzoo.measure import Peak
from effzoo.measure.cards import CARDS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu

SMALL = dataclasses.replace(
    gpu.TINY, checked=("longformer[window=8]",), lengths=(16,), kinds=("full", "longformer[window=8]"),
    models=gpu.TINY.models[:1], peers=("xformers, full attention",),
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Without a process for every peak, and with given rates."""
    for module in ("scaling", "finetuning"):
        monkeypatch.setattr(f"effzoo.measure.{module}.peak", lambda case, limit=None: Peak(1, 0.0))
    monkeypatch.setattr("effzoo.measure.prediction.calibrated", lambda device: CARDS["H100"])


@pytest.mark.slow
def test_every_section_runs_at_tiny_sizes(quick, tmp_path):
    for section in gpu.SHARES:
        gpu.perform(section, tmp_path, SMALL, "cpu", 1e6)
    events = gpu.events(tmp_path)
    assert {key: line["event"] for key, line in events.items()} == {
        (s, cell.name): "done" for s in gpu.SHARES for cell in gpu.cells(s, SMALL, "cpu")
    }
    rows = {s: [json.loads(line) for line in (tmp_path / f"{s}.jsonl").read_text().splitlines()] for s in gpu.SHARES}
    assert (
        all(row["right"] for row in rows["parity"] if "refused" not in row)
        and sum("right" in row for row in rows["parity"]) > 20
    )
    assert {row["mode"] for row in rows["scaling"]} == {"forward", "train", "decode"} and all(
        row["predicted"] for row in rows["scaling"]
    )
    assert all(row["seconds"] > 0 and row["roofline"] > 0 and row["saved"] for row in rows["finetune"])
    assert [row["failed"] for row in rows["peers"]] == ["xformers is not installed"] and rows["bound"][0]["share"] > 0
    lines = (tmp_path / "progress.jsonl").read_text()
    for section in gpu.SHARES:
        gpu.perform(section, tmp_path, SMALL, "cpu", 1e6)
    assert (tmp_path / "progress.jsonl").read_text() == lines, "what is done is not done again"


def test_what_does_not_fit_is_listed_and_what_fails_is_too(tmp_path, monkeypatch):
    gpu.perform("scaling", tmp_path, SMALL, "cpu", 0.0)
    assert not list(tmp_path.iterdir())

    def broken(path):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(
        gpu,
        "cells",
        lambda section, sizes, device: [gpu.Cell(section, "a", broken), gpu.Cell(section, "b", lambda path: None)],
    )
    gpu.perform("scaling", tmp_path, SMALL, "cpu", 1e6)
    found = gpu.summary(tmp_path, True, "cpu")
    assert found["sections"]["scaling"] == {
        "done": 1,
        "failed": {"a": "RuntimeError: CUDA error: an illegal memory access"},
        "left_out": [],
    }
    assert found["sections"]["peers"] == {"done": 0, "failed": {}, "left_out": ["a", "b"]}
    said = gpu.words(found | {"machine": "a card", "seconds": 1.0, "budget": 2.0})
    assert (
        "  failed: a: RuntimeError: CUDA error" in said
        and ("peers: 0 done, 0 failed, 2 did not fit\n  did not fit: a") in said
    )


def test_a_process_that_ends_fails_its_cell_and_the_others_are_done(tmp_path, monkeypatch):
    """The first process dies in its first cell, the second hangs in its second, the third does the rest; sections that
    are over are not begun."""
    monkeypatch.setattr(
        gpu, "cells", lambda section, sizes, device: [gpu.Cell(section, name, lambda path: None) for name in "abc"]
    )
    monkeypatch.setattr(gpu, "SHARES", {"parity": 0.5, "peers": 0.5})
    monkeypatch.setattr(
        gpu.cards, "machine", lambda device: "a card"
    )  # else platform asks a process when it is asked first
    calls = []

    def process(command, timeout, **given):
        section = command[2]
        calls.append((section, timeout))
        if section == "peers":
            return SimpleNamespace(returncode=1, stderr="ImportError: no peers")
        cell = "abc"[len(calls) - 1]
        gpu.tell(tmp_path, cell, section, "begun")
        if cell == "a":
            return SimpleNamespace(returncode=-11, stderr="")
        if cell == "b":
            raise subprocess.TimeoutExpired(command, timeout)
        gpu.tell(tmp_path, cell, section, "done")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", process)
    found = gpu.run(tmp_path, "cpu", True, 600.0, said=lambda line: None)
    parity, peers = found["sections"]["parity"], found["sections"]["peers"]
    assert (
        parity["done"] == 1
        and "code -11" in parity["failed"]["a"]
        and "still running" in parity["failed"]["b"]
        and not parity["left_out"]
    )
    assert all("ImportError: no peers" in why for why in peers["failed"].values()) and len(peers["failed"]) == 3
    assert [section for section, _ in calls] == ["parity"] * 3 + ["peers"]
    assert 300 < calls[0][1] <= 300 + gpu.GRACE and 500 < calls[3][1] <= 600 + gpu.GRACE, (
        "unused time goes to the sections after it"
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == found


def test_the_shares_are_the_budget_and_every_backend_is_compared():
    assert sum(gpu.SHARES.values()) == pytest.approx(1.0)
    names = [cell.name for cell in gpu.cells("parity", gpu.Sizes(), "cuda")]
    assert {name.split(",")[0] for name in names} == set(gpu.BACKENDS) and len(names) == 3 * len(gpu.BACKENDS)
    scaling = [cell.name for cell in gpu.cells("scaling", gpu.Sizes(), "cuda")]
    assert len(scaling) == 27 and scaling[0] == "train, n = 131,072"


@pytest.mark.slow
def test_on_simulated_cuda_every_section_runs_and_its_times_are_refused():
    found = ran("suite")
    assert {section for section, *_ in found["events"]} == set(gpu.SHARES)
    assert [line for line in found["events"] if line[2] != "done"] == []
    assert not [row for row in found["rows"] if "seconds" in row or "ratio" in row] and "scaling" in found["refused"]
    assert {row["machine"] for row in found["rows"]} == {"NVIDIA H100 80GB HBM3 (a double)"}
    failed = {(row["suite"], row.get("backend", ""), row["failed"][:30]) for row in found["rows"] if "failed" in row}
    # it is compiled, for a card
    flex = {("parity", "flex", "AssertionError: all unwrapped values must be FakeTensor"[:30])}
    cannot = {
        ("scaling", "", "cannot be causal: it mixes past"[:30]),
        ("finetune", "", "refused: attention 'linformer' cannot"[:30]),
    }
    assert failed == flex | cannot | {("peers", "", "xformers is not installed")}
    assert sum(row["suite"] == "parity" and row.get("right", False) for row in found["rows"]) >= 20
