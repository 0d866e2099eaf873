"""The frame of the lab: what a run is, what it leaves behind, how it is told, and the data and the training loop of all
experiments."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import effzoo
from effzoo.cli import app
from effzoo.errors import DataError, InputError, OptionError, TrainingError, UnknownNameError
from effzoo.lab import DECKS, Claim, Experiment, Findings, Run, catalogue, get, perform
from effzoo.lab.draw import band, heat, panels
from effzoo.lab.fit import Examples, accuracy, fit, logits
from effzoo.lab.images import images
from effzoo.lab.report import page
from effzoo.lab.texts import minilm, texts
from effzoo.tasks import domains


def measured(run):
    """What is asked?"""
    figure, (axes,) = panels()
    band(axes, [1, 2], [[0.5, 1.0], [0.25, 0.75]], "runs", 0)
    run.say("half way")
    return Findings(
        tables={"numbers": [["a[k=1]", "published"], ["1.5", "1.6"]]}, figure=figure, values={"a": 1.5},
        claims=[Claim.law("it grows", (True, False)), Claim.once("it is there", True)],
        settings={"steps": run.choose(2, 20)},
        notes=["Read it so."],
    )  # fmt: skip


TRIED = Experiment("tried", (2,), "A paper 2020, table 1", "nothing", measured)


def test_a_run_leaves_a_table_a_figure_and_its_numbers(tmp_path):
    said = []
    result = perform(TRIED, Run(quick=True, seeds=(3, 4), say=said.append), tmp_path / "tried")
    assert {path.name for path in (tmp_path / "tried").iterdir()} == {"result.json", "table.md", "figure.png"}
    assert json.loads((tmp_path / "tried/result.json").read_text()) == result
    assert said == ["half way"] and result["settings"] == {"steps": 2} and result["seeds"] == [3, 4] and result["quick"]
    assert {"machine", "versions", "commit", "seconds", "cpu_seconds"} <= result.keys()
    assert (tmp_path / "tried/figure.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "tried/table.md").read_text()
    assert text == page(result)
    for part in (
        "# tried",
        "What is asked?",
        "| 1.5 | 1.6 |",
        "- NOT seen, with 1 of 2 seeds: it grows",
        "- seen, measured once: it is there",
        "Read it so.",
        "steps 2",
    ):
        assert part in text


def test_findings_that_are_no_numbers_leave_nothing_behind(tmp_path):
    def broken(run):
        found = measured(run)
        return Findings(found.tables, found.figure, found.claims, {"a": torch.ones(1)}, found.settings)

    with pytest.raises(InputError, match="got Tensor"):
        perform(Experiment("broken", (0,), "", "", broken), Run(), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_claims_say_what_their_verdict_stands_on():
    assert str(Claim.law("x", (True, True, True))) == "seen, with 3 of 3 seeds: x"
    assert str(Claim.law("x", [False, False])) == "NOT seen, with 0 of 2 seeds: x"
    assert str(Claim.law("x", False)) == "NOT seen, counted: x"
    assert str(Claim.once("x", False)) == "NOT seen, measured once: x"
    for claim in (Claim.law("x", (True, False)), Claim.law("x", True), Claim.once("x", True)):
        assert Claim.read(claim.stored()) == claim


def test_every_claim_of_an_experiment_says_what_judges_it():
    """By an interval, or as a law, or as measured once; a verdict on single numbers of seeds cannot be written."""
    for path in sorted(Path(effzoo.__file__).parent.glob("lab/experiments/*.py")):
        assert not re.search(r"\bClaim\(", path.read_text()), path.name


def test_a_run_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(OptionError, match="each once"):
        Run(seeds=(1, 1))
    with pytest.raises(OptionError, match="needs seeds"):
        Run(seeds=())
    with pytest.raises(OptionError, match="there is no"):
        Run(data=tmp_path / "none")
    with pytest.raises(UnknownNameError, match="did you mean 'spectrum'"):
        get("spectrumm")


def test_every_experiment_says_what_it_asks_and_where_it_comes_from():
    assert len(catalogue()) >= 20
    for name, one in catalogue().items():
        assert name.replace("_", "").isalnum() and one.about.endswith("?"), name
        assert one.source and set(one.decks) <= set(DECKS), name


def test_an_experiment_of_ones_own_is_named_from_a_file(tmp_path, monkeypatch):
    experiments = sys.modules["effzoo.lab.experiment"]
    monkeypatch.setattr(experiments, "_EXPERIMENTS", dict(effzoo.lab.catalogue()))
    (tmp_path / "mine.py").write_text(
        "from effzoo.lab import experiment\n\n@experiment('my_own', deck=4, source='none')\n"
        "def mine(run):\n    'What is asked here?'\n"
    )
    listed = CliRunner().invoke(app, ["lab", "--file", str(tmp_path / "mine.py")])
    assert listed.exit_code == 0 and "my_own" in listed.output and "What is asked here?" in listed.output


def test_the_command_lists_the_experiments_and_runs_one(tmp_path, monkeypatch):
    listed = CliRunner().invoke(app, ["lab"])
    assert listed.exit_code == 0
    for name, title in DECKS.items():
        assert f"Deck {name}: {title}" in listed.output
    for name in catalogue():
        assert name in listed.output
    monkeypatch.setitem(sys.modules["effzoo.lab.experiment"]._EXPERIMENTS, "tried", TRIED)
    ran = CliRunner().invoke(app, ["lab", "tried", "--quick", "--seed", "5", "--out", str(tmp_path)])
    assert (
        ran.exit_code == 0
        and "half way" in ran.output
        and "it grows" in ran.output
        and "a[k=1]" in ran.output
        and (tmp_path / "tried/result.json").exists()
    )
    assert CliRunner().invoke(app, ["lab", "unheard-of"]).exit_code != 0


def examples(count=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (count, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return Examples({"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 2)


def test_batches_are_cut_to_their_longest_example_and_streams_see_all():
    data = examples()
    assert [batch["input_ids"].shape for batch in data.at([0, 2, 4]).batches(2)] == [(2, 4), (1, 4)]
    stream, seen = data.stream(4, seed=1), []
    for _ in range(3):
        seen += next(stream)["input_ids"][:, 0].tolist()
    assert sorted(seen) == sorted(data.inputs["input_ids"][:, 0].tolist())
    first, again = data.stream(4, seed=1), data.stream(4, seed=1)
    assert all(torch.equal(next(first)["labels"], next(again)["labels"]) for _ in range(5))


@pytest.mark.parametrize("peft", [None, "lora[rank=2]", "lt_sft[keep=0.1]", "adamix[bottleneck=2]"])
def test_fit_trains_what_is_trainable_with_the_hooks_of_its_methods(tiny, peft):
    torch.manual_seed(0)
    model = effzoo.build("bert", task="classification", **tiny)
    if peft is not None:
        effzoo.attach(model, peft)
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    told = []
    losses = fit(
        model,
        examples().stream(4, 0),
        8,
        learning_rate=None if peft else 1e-3,
        bfloat16=False,
        after=lambda step, loss: told.append((step, loss)),
    )
    assert told == list(enumerate(losses, 1)) and len(losses) == 8 and not model.training
    now = dict(model.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    if peft is not None:
        hooks = effzoo.attached(model)["default"]
        assert hooks.finished == (peft != "lora[rank=2]")
    found = logits(model, examples(), size=5)
    whole = model(**examples().inputs).logits
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert accuracy(model, examples()) == float((whole.argmax(dim=-1) == examples().labels).float().mean())


def test_fit_stops_at_a_loss_that_is_no_number(tiny):
    model = effzoo.build("bert", task="classification", **tiny)
    with torch.no_grad():
        model.head.out.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not a number at step 1"):
        fit(model, examples().stream(4, 0), 3)


def test_images_are_read_from_idx_files_and_from_scikit_learn(tmp_path):
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8)
    head = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4))
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(pixels.tolist())))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (2).to_bytes(4, "big") + b"\x07\x01")
    found = images(Run(data=tmp_path))
    assert found.size == (3, 4) and found.train.labels.tolist() == [7, 1]
    torch.testing.assert_close(found.test.inputs["pixels"][1, 0, 0, 0], torch.tensor((12 / 255 - 0.1307) / 0.3081))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (3).to_bytes(4, "big") + b"\x07\x01")
    with pytest.raises(DataError, match="cut short"):
        images(Run(data=tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has neither"):
        images(Run(data=tmp_path))
    digits = images(Run(), train=100, test=None)
    assert digits.size == (8, 8) and len(digits.train) == 100 and len(digits.test) == 450
    drawn = [images(Run(), seed=seed) for seed in (1, 1, 2)]
    assert all(len(part.train) == 1347 and len(part.test) == 450 for part in drawn)
    pixels = [torch.cat([part.train.inputs["pixels"], part.test.inputs["pixels"]]) for part in drawn]
    assert pixels[0].equal(pixels[1]) and not pixels[0].equal(pixels[2])
    assert pixels[0].flatten(1).sum(dim=0).allclose(pixels[2].flatten(1).sum(dim=0), atol=1e-3)  # the same images


def test_texts_are_read_from_a_file_each_once(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "".join(f"word number {i % 9} is here,{'ab'[i % 9 % 2]}\n" for i in range(12)))
    found = texts(Run(data=path), length=8, train=4, test=3)
    assert found.names == ["a", "b"] and len(found.train) == 4 and len(found.test) == 3
    assert found.train.inputs["input_ids"].shape == (4, 8) and int(found.train.inputs["input_ids"][0, 0]) == 101
    rows = {tuple(row) for part in (found.train, found.test) for row in part.inputs["input_ids"].tolist()}
    assert len(rows) == 7
    again, other = (texts(Run(data=path), length=8, train=4, test=3, seed=seed) for seed in (0, 1))
    assert again.test.inputs["input_ids"].equal(found.test.inputs["input_ids"])
    assert not other.test.inputs["input_ids"].equal(found.test.inputs["input_ids"])
    with pytest.raises(DataError, match="9 different texts"):
        texts(Run(data=path), length=8, train=8, test=3)
    assert minilm(3, seed=1).num_labels == 3


def test_lower_layers_of_minilm_compute_what_they_do_in_the_whole():
    ids, seen = torch.randint(1000, 2000, (2, 7), generator=torch.Generator().manual_seed(0)), []
    for model in (minilm(3, seed=1), minilm(3, seed=1, layers=2)):
        model.blocks[1].register_forward_hook(lambda block, given, gave: seen.append(gave))
        model(input_ids=ids)
    assert len(model.blocks) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


def test_domains_map_symbols_in_their_own_way():
    ids, labels, domain = domains(64, 9, 5, 3, torch.Generator().manual_seed(0))
    assert (
        ids.shape == labels.shape == (64, 10)
        and bool((labels[:, 0] == -100).all())
        and torch.equal(ids[:, 0], domain + 1)
    )
    tables = {}
    for row, marks, number in zip(ids[:, 1:], labels[:, 1:], domain, strict=True):
        for symbol, label in zip(row.tolist(), marks.tolist(), strict=True):
            assert tables.setdefault((int(number), symbol), label) == label
    assert all(
        sorted(label for (d, _), label in tables.items() if d == number) == [0, 1, 2, 3, 4] for number in range(3)
    )
    other = domains(64, 9, 5, 3, torch.Generator().manual_seed(0), variant=1)
    assert torch.equal(other[0], ids) and not torch.equal(other[1], labels)
    with pytest.raises(OptionError, match="two symbols"):
        domains(1, 9, 1, 3, torch.Generator())


def test_heat_maps_leave_cells_without_a_number_empty():
    _, (axes,) = panels()
    heat(axes, [[1.0, None], [0.0, 2.0]], ["a", "b"], ["x", "y"], form="{:.1f}")
    assert sorted(text.get_text() for text in axes.texts) == ["0.0", "1.0", "2.0"]
