"""Measurements run in turns, are resumable, and time nothing that computes something else; what they say is arithmetic
on their rows."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import effzoo
from effzoo.attention import AttentionCore, register
from effzoo.cli import app
from effzoo.errors import InputError, OptionError
from effzoo.measure import Case, Scaling, Times, crossovers, figures, interleaved, peak, ratio, report, scaling, wrong
from effzoo.measure import rows as files
from effzoo.measure.finetuning import Finetuning, Step
from effzoo.measure.layer import MODES, supported
from effzoo.measure.page import finetune_table, markdown, page, scaling_table
from effzoo.spec import parse_one

SMALL = {"dim": 16, "heads": 2}
KINDS = [
    "full",
    "blockwise",
    "longformer[window=8]",
    "local[chunk=4]",
    "lsh[rounds=2, chunk=8]",
    "linformer[k=4]",
    "perceiver[latents=4]",
    "linear",
    "performer[features=6]",
    "nystromformer[landmarks=4, conv=3]",
    "streaming[window=4, sinks=2]",
    "bigbird[block=3, random=1]",
    "dilated[segments=(4, 16), dilations=(1, 2)]",
]


def quick(**more):
    return Scaling(
        **{
            "kinds": ("full", "longformer[window=8]"),
            "lengths": (16, 32),
            "modes": ("forward",),
            "seconds": 0.0,
            **SMALL,
            **more,
        }
    )


def test_cases_run_in_turns_after_the_warm_up():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warm_up=2)
    assert "".join(calls) == "ab" * 5
    assert all(len(each.seconds) == 3 for each in times.values())


def test_rounds_end_when_the_time_is_over_but_not_before_the_least():
    calls = []
    times = interleaved({"a": lambda: calls.append(1)}, rounds=50, least=4, seconds=0.0, warm_up=0)
    assert len(calls) == len(times["a"].seconds) == 4
    with pytest.raises(OptionError, match="rounds is at least `least`"):
        interleaved({}, rounds=2, least=3)


def test_a_ratio_is_the_median_over_rounds_in_which_both_ran():
    slow, fast = Times((2.0, 30.0, 6.0, 8.0)), Times((1.0, 10.0, 2.0, 2.0))
    found = ratio(slow, fast)
    assert found.median == 3.0 and found.spread == (2.75, 3.25)  # of 2, 3, 3, 4; a disturbed round counts once
    assert slow.median == 7.0 and slow.spread == (5.0, 13.5)
    assert str(found) == "3.00 (2.75 to 3.25)"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_kind_is_what_it_should_be_before_it_is_timed(kind, mode, dtype):
    case = Case(kind, mode, 37, 32, 2, batch=2, dtype=dtype)
    if reason := supported(case):
        assert mode == "decode" and reason.startswith(("keeps no cache", "cannot be causal"))
    else:
        assert wrong(case) == ""
        case.runner()()


def test_the_speed_table_has_every_kind():
    assert {parse_one(kind).name for kind in scaling.KINDS} == {*effzoo.attention.names()}


def test_decoding_gives_the_last_row_of_the_causal_layer():
    case = Case("longformer[window=8]", "decode", 21, 16, 2, dtype="float64")
    step = case.runner()
    with torch.no_grad():
        x = case.input()
        whole = case.layer()(torch.cat([x, x[:, -1:]], dim=1), effzoo.attention.Mask())
    # each call goes on from the one before
    assert torch.allclose(torch.cat([step(), step()], dim=1), whole[:, -2:], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_kind_that_differs_from_its_definition_is_not_timed(tmp_path):
    with effzoo.scope():

        @register("nearly_full")
        class NearlyFull(AttentionCore):
            """Full attention with another scale."""

            def forward(self, q, k, v, *, mask, memory=None):
                return effzoo.attention.get("full")(self.context)(1.01 * q, k, v, mask=mask, memory=memory)

            def pattern(self, n, mask):
                return effzoo.attention.get("full")(self.context).pattern(n, mask)

        found = quick(kinds=("full", "nearly_full"), lengths=(32,)).run(tmp_path / "rows.jsonl")
    right, broken = found
    assert right["seconds"] > 0 and "failed" not in right
    assert (
        "the output differs from the definition by" in broken["failed"]
        and "seconds" not in broken
        and "peak_bytes" not in broken
    )


@pytest.mark.slow
def test_a_suite_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = quick().run(path)
    assert [(row["attention"], row["n"]) for row in first] == [
        ("full", 16),
        ("longformer[window=8]", 16),
        ("full", 32),
        ("longformer[window=8]", 32),
    ]
    text = path.read_text()
    assert quick().run(path) == first and path.read_text() == text
    path.write_text("".join(text.splitlines(keepends=True)[:3]))  # killed before the last row
    again = quick().run(path)
    # with the reference, for the ratio
    assert [row["attention"] for row in again[3:]] == ["full", "longformer[window=8]"]
    assert all(row["machine"] and row["versions"]["torch"] == torch.__version__ for row in again)
    path.write_text(text + '{"half a')
    assert [row["attention"] for row in files.read(path, "scaling")] == [row["attention"] for row in first]


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_a_row_that_was_half_written_is_told_and_the_next_one_begins_a_line(tmp_path, caplog, cut):
    """A killed writer leaves a part of a line; `cut` is how much of it."""
    path = tmp_path / "rows.jsonl"
    made = [json.loads(json.dumps(row("full", n, 1.0) | {"device": "cpu"})) for n in (8, 16, 32)]
    files.append(path, made)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:cut])
    assert files.read(path, "scaling") == made[:2]
    assert "line 3 was half written and is left out; its case is measured again" in caplog.text
    caplog.clear()
    files.append(path, made[2:])
    assert files.read(path, "scaling") == made and not caplog.text, "the file is whole again"


def test_a_whole_row_without_its_end_is_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [json.loads(json.dumps(row("full", n, 1.0) | {"device": "cpu"})) for n in (8, 16)]
    files.append(path, made)
    path.write_text(path.read_text().rstrip())
    files.append(path, made[:1])
    assert files.read(path, "scaling") == [*made, made[0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,b,c", "line 1 is no JSON .*delete the line"),
        ("[1, 2]", "line 1 is no row of a suite"),
        ("null", "line 1 is no row of a suite"),
        ('{"suite": "mine"}', "line 1 is no row of a suite"),
        (
            '{"suite": "finetune", "attention": "full"}',
            "is of the suite 'finetune', not 'scaling'; give each suite a folder of its own",
        ),
        ('{"suite": "scaling", "attention": "full"}', "lacks 'mode', which every row of the suite 'scaling' has"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        quick().run(tmp_path / "rows.jsonl")


def test_a_kind_that_took_too_long_is_not_tried_at_greater_lengths(tmp_path):
    found = quick(longest=0.0, kinds=("longformer[window=8]",)).run(tmp_path / "rows.jsonl")
    assert [row["failed"] for row in found] == ["longer than 0 s", "longer than 0 s at n = 16"]


@pytest.mark.slow
def test_the_peak_of_a_pass_holds_at_least_what_it_makes_and_failures_are_told():
    n, dim = 4096, 64
    found = peak(Case("linformer[k=8]", "train", n, dim, 2))
    one = 4 * n * dim  # bytes of a float32 tensor as long as the sequence
    # x and its gradient, the upstream one, q, k, v, the heads, the output
    assert found.seconds > 0 and 6 * one < found.bytes < 60 * one
    failed = peak(Case("longformer[window=3]", "forward", 16, 16, 2))
    assert failed.bytes is None and "windows are even" in failed.failed


def row(kind, n, ratio, mode="train"):
    return {"suite": "scaling", "attention": kind, "mode": mode, "n": n, "seconds": ratio,
            "quartiles": (ratio, ratio), "ratio": ratio,
            "ratio_quartiles": (ratio, ratio), "peak_bytes": n << 20, "dim": 8, "heads": 1, "batch": 1,
            "dtype": "float32", "machine": "<abacus>", "versions": {"torch": "2"}, "commit": "abc"}  # fmt: skip


def test_the_crossover_is_the_length_from_which_on_a_kind_stays_faster():
    rows = [row("full", n, 1.0) for n in (1, 2, 4, 8)]
    rows += [row("a", n, r) for n, r in ((1, 0.9), (2, 1.1), (4, 0.9), (8, 0.5))]
    rows += [row("b", n, r) for n, r in ((1, 0.9), (2, 0.8))] + [row("c", n, r) for n, r in ((1, 0.5), (2, 1.0))]
    assert crossovers(rows) == {("a", "train"): 4, ("b", "train"): 1, ("c", "train"): None}
    table = scaling_table(rows, "train")
    assert table[0] == ["attention", "1", "2", "4", "8", "faster than full from"]
    assert [line[-1] for line in table[1:]] == ["", "4", "1", "nowhere"] and table[2][1] == "900 (0.90)"
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.mark.slow
def test_the_report_holds_tables_and_figures_and_nothing_outside_it(tmp_path):
    rows = [row(kind, n, r) for kind, r in (("full", 1.0), ("longformer", 0.5)) for n in (512, 1024, 2048)]
    text = report.write(rows, tmp_path).read_text()
    assert "&lt;abacus&gt;" in text and "<abacus>" not in text and "http" not in text
    assert text.count("<table>") == 1 and text.count("data:image/png;base64,") == 3
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "train_memory.png",
        "train_ratio.png",
        "train_time.png",
    ]
    again = [*rows, row("full", 1024, 3.0)]  # measured anew beside a kind that came later
    assert [found["ratio"] for found in figures._series(again, "seconds")["full"]] == [1.0, 3.0, 1.0]
    with pytest.raises(InputError, match="needs rows with times"):
        report.write([{"suite": "scaling", "failed": "out of memory"}], tmp_path)
    assert "&lt;b&gt;" in page("<b>", "", {})


SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50}


def test_a_training_step_moves_the_adapter_alone(monkeypatch):
    step = Step("longformer[window=8]", "lora[rank=2]", 16, 2, sizes=SIZES)
    kept = {}
    monkeypatch.setattr(
        "effzoo.measure.finetuning.Step.trained", lambda self, build=Step.trained: kept.setdefault("model", build(self))
    )
    run = step.runner()
    before = {name: tensor.clone() for name, tensor in kept["model"].state_dict().items()}
    run()
    moved = {name for name, tensor in kept["model"].state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".adapters." in name for name in moved)
    with pytest.raises(OptionError, match="float32 or bfloat16, got 'int8'"):
        dataclasses.replace(step, precision="int8")


@pytest.mark.slow
def test_the_finetune_suite_counts_saved_bytes_by_cause_and_writes_refusals_down(tmp_path, monkeypatch):
    monkeypatch.setattr("effzoo.measure.finetuning.SIZES", SIZES)
    suite = Finetuning(("full",), ("full", "lora[rank=2]", "residual_adapter"), length=16, batch=2, seconds=0.0)
    full, lora, refused = suite.run(tmp_path / "rows.jsonl")
    planned = effzoo.plan(
        "bert", "lora[rank=2]", batch=2, length=16, recompute="hidden", **Step("full", "lora[rank=2]", 16, 2).choices()
    )
    assert lora["saved"] == dict(planned.activations) and sum(lora["saved"].values()) < sum(full["saved"].values())
    assert (
        lora["trainable"] == planned.trainable
        and lora["tokens_per_second"] == 32 / lora["seconds"]
        and full["ratio"] == 1.0
    )
    assert "Conv2d" in refused["failed"] and "seconds" not in refused
    assert suite.run(tmp_path / "rows.jsonl") == [full, lora, refused]
    assert [line[1] for line in finetune_table([full, lora, refused])[1:]] == [
        "`full`",
        "`lora[rank=2]`",
        "`residual_adapter`",
    ]
    assert report.write([full, lora, refused], tmp_path).exists()


def test_bench_on_the_command_line_leaves_rows_and_a_page(tmp_path):
    sizes = [
        "--length",
        "32",
        "--dim",
        "16",
        "--heads",
        "2",
        "--seconds",
        "0",
        "--mode",
        "decode",
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(
        app, ["bench", "scaling", "--attention", "full", "--attention", "longformer[window=8]", *sizes]
    )
    assert done.exit_code == 0, done.output
    assert "decode: milliseconds" in done.output and "longformer[window=8]" in done.output and "wrote" in done.output
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2 and (tmp_path / "index.html").exists()
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["suite"] == "scaling"
