"""Measuring on a device: what does not fit, devices that are not there, a file for each card, and what is counted
instead of planned."""

import gc
import json
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import effzoo
from effzoo.attention import Context, Mask, create
from effzoo.cli import app
from effzoo.errors import IncompatibleError, InputError, OptionError, UnknownNameError
from effzoo.measure import Peak, Scaling, cards, peak
from effzoo.measure import rows as files
from effzoo.measure.finetuning import Finetuning, Step
from effzoo.measure.pairs import TOGETHER, pairs
from effzoo.measure.timing import fitting, interleaved
from tests import gpu_double

SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50}
NO_ROOM = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def gpu(monkeypatch):
    gpu_double.pretend(monkeypatch.setattr)
    for each in (cards.machine, cards.versions):
        each.cache_clear()
    yield gpu_double.NAME
    for each in (cards.machine, cards.versions):
        each.cache_clear()


def limited(most, alive):
    """Makers of passes that hold a tensor each, while no more than `most` of them may be alive."""

    def make():
        held = torch.zeros(10)
        alive.append(weakref.ref(held))

        def run():
            gc.collect()
            if sum(one() is not None for one in alive) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return held + 1

        return run

    return make


@pytest.mark.slow
def test_what_does_not_fit_together_runs_alone_with_nothing_left_alive():
    alive = []
    times, alone = fitting({name: limited(1, alive) for name in "abc"}, seconds=0.0)
    assert alone and list(times) == ["a", "b", "c"]
    times, alone = fitting({name: limited(3, []) for name in "a"}, seconds=0.0)
    assert not alone and list(times) == ["a"]


def test_a_case_that_fits_nowhere_is_left_out_and_the_others_are_not():
    tried = []

    def never():
        tried.append(1)
        raise NO_ROOM

    times, alone = fitting({"a": lambda: lambda: None, "too large": never, "b": lambda: lambda: None}, seconds=0.0)
    assert alone and list(times) == ["a", "b"] and len(tried) == 2
    assert fitting({"too large": never}, seconds=0.0) == ({}, True)

    def broken():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fitting({"a": broken}, seconds=0.0)


@pytest.mark.slow
def test_suites_write_down_what_does_not_fit_and_go_on(tmp_path, monkeypatch):
    calls = []

    def failing(cases, **given):
        calls.append(list(cases))
        if len(cases) > 1 or "local" in cases or "lora" in cases:
            raise NO_ROOM
        return interleaved(cases, **given)

    monkeypatch.setattr("effzoo.measure.timing.interleaved", failing)
    for module in ("scaling", "finetuning"):
        monkeypatch.setattr(f"effzoo.measure.{module}.peak", lambda case, limit=None: Peak(1, 0.0))
    suite = Scaling(("full", "local", "blockwise"), (32, 64), ("forward",), dim=16, heads=2, seconds=0.0)
    found = suite.run(tmp_path / "scaling.jsonl")
    assert [(row["attention"], "seconds" in row) for row in found] == 2 * [
        ("full", True),
        ("local", False),
        ("blockwise", True),
    ]
    assert all(row["alone"] for row in found[:3]) and found[1]["failed"] == "out of memory"
    assert (
        found[4]["failed"] == "out of memory at n = 32" and files.read(tmp_path / "scaling.jsonl", "scaling") == found
    )
    monkeypatch.setattr("effzoo.measure.finetuning.SIZES", SIZES)
    full, lora = Finetuning(("full",), ("full", "lora"), length=16, batch=2, seconds=0.0).run(
        tmp_path / "finetune.jsonl"
    )
    assert full["seconds"] > 0 and lora["failed"] == "out of memory" and lora["saved"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("full", "full"), ("longformer[window=8]", "lora"), ("lsh[chunk=8]", "prefix"), ("linformer[k=4]", "ladder")],
)
def test_what_a_step_keeps_is_counted_and_equals_what_is_planned(kind, method, precision):
    step = Step(kind, method, 32, 2, sizes={**SIZES, "layers": 2}, precision=precision)
    how = {"precision": "autocast" if precision == "bfloat16" else "plain", "recompute": "hidden"}
    assert step.kept() == dict(effzoo.plan("bert", method, batch=2, length=32, **how, **step.choices()).activations)


KINDS = [
    "full",
    "blockwise",
    "blockwise[blocks=3]",
    "longformer[window=8]",
    "longformer[window=4, dilation=(1, 3, 1, 3)]",
    "local[chunk=4]",
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "blockwise[block=8, blocks=8]"])
def test_pairs_are_those_of_the_definition(kind, causal):
    core = create(
        kind,
        Context(heads=4, head_dim=8, causal=causal and "blocks=3" not in kind and kind != "blockwise", max_length=64),
    )
    for n in (1, 7, 37, 64):
        whole = core.pattern(n, Mask()).expand(1, 4, n, n)
        assert pairs(core, n) == whole.sum() / 4
    assert pairs(core, 64, rows=32) == pytest.approx(pairs(core, 64), rel=0.1)


def test_pairs_of_hashing_are_slots_and_compressed_kinds_have_none():
    context = Context(heads=2, head_dim=8, max_length=64)
    assert pairs(create("lsh[rounds=3, chunk=8]", context), 64) == 3 * 64 * 16
    with pytest.raises(IncompatibleError, match="'linformer' sees no pairs"):
        pairs(create("linformer[k=4]", context), 64)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["blockwise", "longformer[window=64]", "local[chunk=64]"])
def test_counting_pairs_makes_nothing_of_the_size_of_all_pairs(kind):
    core = create(kind, Context(heads=8, head_dim=8, max_length=32768))
    with Largest() as largest:
        found = pairs(core, 32768, rows=128)
    assert largest.bytes <= 8 * TOGETHER and found < 0.51 * 32768**2


def test_a_device_that_is_not_there_is_said_with_what_to_try(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        OptionError, match=r"built without CUDA; install a build of torch for CUDA, or measure on the CPU"
    ):
        Scaling(device="cuda").run(tmp_path / "rows.jsonl")
    with pytest.raises(OptionError, match="built without CUDA"):
        Finetuning(device="cuda").run(tmp_path / "rows.jsonl")
    with pytest.raises(OptionError, match="a device is cpu, cuda or cuda:1, got 'gpu'"):
        cards.need("gpu")
    done = CliRunner().invoke(app, ["bench", "scaling", "--device", "cuda", "--out", str(tmp_path)])
    assert (
        done.exit_code
        and "built without CUDA" in " ".join((done.output + (done.stderr or "")).split())
        and not list(tmp_path.iterdir())
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(OptionError, match=r"is built for CUDA 13.0, and sees no GPU; look at nvidia-smi"):
        cards.need("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cards.need("cuda:1")
    with pytest.raises(OptionError, match="there are 2 GPUs, the last one is cuda:1"):
        cards.need("cuda:2")
    cards.need("cpu")


def test_a_script_says_it_too(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    run = effzoo_script("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "peers", "--device", "cuda"])
    with pytest.raises(SystemExit):
        run.main()
    assert "built without CUDA" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked",
    [["scaling", "--tiny"], ["gpu", "--report", "x"], ["peers", "--card", "A100"], ["predict", "--device", "cuda"]],
)
def test_an_option_of_another_suite_is_refused(asked, monkeypatch, capsys):
    run = effzoo_script("run")
    monkeypatch.setattr(sys, "argv", ["run.py", *asked])
    with pytest.raises(SystemExit):
        run.main()
    assert f"unrecognized arguments: {asked[1]}" in capsys.readouterr().err


def test_a_peer_is_compared_in_float32_timed_in_another_dtype_and_named_where_it_is_missing(monkeypatch):
    peers = effzoo_script("peers")
    row = peers.measure("torch SDPA, full attention", 24, 0.0, dtype="bfloat16", batch=2)
    assert row["dtype"] == "bfloat16" and row["batch"] == 2 and row["ratio"] > 0 and "plain_ratio" not in row
    monkeypatch.setattr(peers, "differs", lambda pair: f"seen in {pair.input.dtype}")
    assert peers.measure("torch SDPA, full attention", 24, 0.0, dtype="bfloat16")["failed"] == "seen in torch.float32"
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "is not installed" in peers.measure("xformers, full attention", 24, 0.0)["failed"]
    assert peers.FUSED.keys() <= peers.of_device("cuda").keys() and peers.of_device("cpu") == peers.PEERS
    assert "flex" not in repr(peers.UNFUSED).lower() and "HF Longformer, window 512" in peers.UNFUSED
    table = effzoo_script("run").peers_table([row, {"peer": "x", "n": 8, "failed": "no"}])
    assert len({len(line) for line in table}) == 1 and len(table[0]) == 8
    assert len(effzoo_script("run").peers_table([row | {"plain_ratio": 0.5}])[0]) == 9


def test_beside_an_unfused_rival_ours_runs_in_plain_pytorch_too():
    peers = effzoo_script("peers")
    module, seen = peers.layer("full", 8), []
    peers.plainly(module, lambda: seen.append(module.core.context.backend))()
    assert seen == ["reference"] and module.core.context.backend == "auto"


def effzoo_script(name):
    """A script of the benchmarks."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def test_a_row_on_a_gpu_says_card_capability_cuda_driver_and_triton_and_has_a_file_of_its_own(gpu, tmp_path):
    made = files.made({"suite": "scaling", "seconds": 1.0}, "cuda")
    assert made["machine"] == gpu
    assert made["versions"].keys() == {"python", "torch", "cuda", "driver", "triton", "capability", "memory"}
    assert (
        made["versions"]["cuda"] == "13.0"
        and made["versions"]["capability"] == "9.0"
        and made["versions"]["memory"] == "80 GiB"
    )
    assert cards.file_name("cuda") == "nvidia-h100-80gb-hbm3-a-double" and cards.file_name("cpu") == "cpu"
    row = {name: 1 for name in files.SUITES["scaling"]} | {"suite": "scaling"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "machine": "NVIDIA A100"}) + "\n")
    with pytest.raises(InputError, match="has rows of NVIDIA A100, and this is NVIDIA H100 80GB HBM3"):
        files.read(tmp_path / "rows.jsonl", "scaling", "cuda")
    files.read(tmp_path / "rows.jsonl", "scaling")


def test_times_of_a_simulated_device_are_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert files.made({"suite": "scaling", "peak_bytes": 1}, "cuda")["machine"] == gpu
    with pytest.raises(
        OptionError, match="simulated on the CPU, so its times mean nothing: ratio, seconds are not written"
    ):
        files.made({"suite": "scaling", "seconds": 1.0, "ratio": 1.0}, "cuda")


@dataclass(frozen=True)
class Pass:
    """What `peak` takes, on a double of a GPU."""

    calls: list
    fails: str = ""
    device: str = "cuda"

    def runner(self):
        def run():
            self.calls.append(1)
            if self.fails:
                raise RuntimeError(self.fails)
            sum(range(20_000))

        return run


@pytest.mark.slow
def test_a_pass_on_a_gpu_is_timed_after_its_kernels_are_compiled_and_longest_counts(gpu):
    calls = []
    found = peak(Pass(calls))
    assert found.bytes == 1 and found.seconds > 0 and len(calls) == 2
    peak(Pass(calls), limit=0.0)
    assert len(calls) == 3, "no second pass after one that takes too long"
    assert peak(Pass([], "Triton Error [CUDA]: invalid\nargument")).failed == (
        "RuntimeError: Triton Error [CUDA]: invalid"
    )
    assert peak(Pass([], "DefaultCPUAllocator: can't allocate memory")).failed == "out of memory"


def test_a_batch_holds_as_many_tokens_at_every_length():
    suite = Scaling(tokens=4096)
    assert [suite.case("full", "train", n).batch for n in (512, 4096, 16384)] == [8, 1, 1]


def test_cards_are_found_by_their_name():
    assert cards.card("NVIDIA H100 80GB HBM3") is cards.CARDS["H100"] is cards.card("h100")
    assert cards.card("NVIDIA A100-SXM4-80GB").bandwidth == 2.039e12 and cards.card("B200").rate("bfloat16") == 2250e12
    with pytest.raises(UnknownNameError, match="A100, B200, H100, H200"):
        cards.card("RTX 4090")
