"""The demo's own steps on a tiny random model: splits, what is kept of the frozen layers, intervals, the report."""

import gzip
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import effzoo
from effzoo import data

LONGFORMER = "longformer[window=4]"
SIZES = {"layers": 2, "dim": 16, "heads": 2, "mlp": 32, "dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parent.parent / "scripts/demo.py")
    module = sys.modules["demo"] = importlib.util.module_from_spec(spec)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reviews(demo):
    return data.load_text(demo.REVIEWS)


def tiny(kind, length):
    torch.manual_seed(0)
    model = effzoo.build(
        "minilm", attention=kind, task="classification", pooling="mean", max_length=length, **SIZES
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_documents_are_whole_and_small_with_their_licence_beside_them(demo, reviews):
    assert Counter(reviews["label"]) == {0: 1000, 1: 1000} and data.names(reviews) == ["neg", "pos"]
    assert len({text.strip() for text in reviews["text"]}) == 2000  # none is in a split twice
    assert demo.REVIEWS.stat().st_size < 5e6
    said = (demo.REVIEWS.parent / "README.md").read_text()
    assert all(x in said for x in ("Attribution 4.0", "Pang", "2004", "movie_reviews.py", "nltk_data"))
    first = json.loads(gzip.decompress(demo.REVIEWS.read_bytes()).splitlines()[0])
    assert first["label"] == "neg" and first["text"].startswith("plot : two teen couples")


def test_each_split_draws_training_and_test_documents_anew(demo, reviews):
    drawn = demo.draw(reviews, {"train": 80, "test": 40}, 3, 7)
    assert drawn == demo.draw(reviews, {"train": 80, "test": 40}, 3, 7)
    for train, test in drawn:
        assert len({*train}) == 80 and len({*test}) == 40 and not {*train} & {*test}
        for part in (train, test):
            assert sum(i < 1000 for i in part) == len(part) / 2  # the first 1,000 are negative
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]
    with pytest.raises(effzoo.EffzooError, match="need 2100, there are 2000"):
        demo.draw(reviews, {"train": 2000, "test": 100}, 2, 0)


def test_the_interval_of_a_difference_is_that_of_a_hand_computed_example(demo):
    """Of 1, 2, 6: mean 3, variance 7; t with 2 degrees of freedom is 4.302653; half = 4.302653 sqrt((1/3 + 1/2) 7)."""
    found = demo.interval([1.0, 2.0, 6.0], train=800, test=400)
    half = 4.302653 * math.sqrt(35 / 6)
    assert found == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
    assert demo.interval([2.0, 2.0], 800, 400) == (2, 2, 2)
    with pytest.raises(SystemExit, match="at least 2 splits, got 1"):
        demo.interval([1.0], 800, 400)


def test_differences_are_those_of_the_same_split(demo):
    counts = {demo.TFIDF: ([5, 6], [7, 8]), demo.FROZEN: ([5, 5], [6, 8]), demo.TUNED: ([4, 6], [7, 9])}
    rows = [
        demo.Row(name, "full", n, of_length[i], 10, 1, 1.0)
        for i, n in enumerate((128, 2048))
        for name, of_length in counts.items()
    ]
    found = demo.differences(rows, {"train": 20, "test": 10})
    assert np.allclose([x["values"] for x in found], [[30, 30], [10, 30], [20, 20], [10, 10]])
    assert "excludes 0" in demo.verdict(found[0]) and "+30.0 (+30.0 to +30.0) points" in demo.verdict(found[0])
    assert "holds 0: these splits do not tell them apart" in demo.verdict(found[1])


@pytest.mark.parametrize("kind", ["full", LONGFORMER])
def test_the_last_layer_goes_on_from_what_was_kept_as_the_whole_model_does(demo, kind):
    model = tiny(kind, 64)
    ids = [torch.randint(1000, 2000, (n,)).tolist() for n in (9, 30, 17)]
    kept, features = demo.read(model, ids, "float32")
    upper = demo.last_layer(model).eval()
    assert [x.shape for x in kept] == [(9, 16), (30, 16), (17, 16)] and len(upper.blocks) == 1
    for tokens, state, mean in zip(ids, kept, features, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([tokens])).last_hidden_state
            again = upper(inputs_embeds=state[None].float()).last_hidden_state
        assert torch.allclose(again, alone, atol=1e-2) and alone.std() > 0.5  # kept in float16
        assert torch.allclose(mean, alone[0].mean(dim=0), atol=1e-4)


def test_fine_tuning_starts_with_the_function_of_the_regression(demo):
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    labels = (features[:, 0] > features[:, 1]).numpy()
    scaler = StandardScaler().fit(features.numpy())
    fitted = LogisticRegression().fit(scaler.transform(features.numpy()), labels)
    model = effzoo.attach(demo.last_layer(tiny("full", 64)), demo.PEFT)
    demo.start_head(model, scaler, fitted)
    with torch.no_grad():
        logits = model.head.out(features)
    z = torch.from_numpy(fitted.decision_function(scaler.transform(features.numpy()))).float()
    assert torch.allclose(logits[:, 1] - logits[:, 0], z, atol=1e-4) and z.abs().max() > 1


def test_the_job_on_a_tiny_model(demo, reviews, tmp_path, capsys):
    few = reviews.select([*range(20), *range(1000, 1020)])
    sizes = {"train": 20, "test": 10}
    results = demo.compare(few, tiny, {16: "full", 32: LONGFORMER}, sizes, 2, 0, "float32", tmp_path)
    rows = [(row["method"], row["tokens"]) for row in results["rows"]]
    assert rows == [(name, n) for n in (16, 32) for name in (demo.TFIDF, demo.FROZEN, demo.TUNED)]
    assert all(len(row["correct"]) == 2 and 0 <= max(row["correct"]) <= 10 for row in results["rows"])
    short, long = (np.array(results["rows"][i]["correct"]) for i in (2, 5))
    assert results["differences"][0]["values"] == pytest.approx([*(100 * (long - short) / 10)])
    assert results["longer"] == {16: 1.0}
    assert (tmp_path / "32/adapter/adapter.json").is_file()
    demo.show(json.loads(json.dumps(results)))
    assert "bit for bit" in (told := capsys.readouterr().out) and "CPU seconds" in told
    page = demo.report(json.loads(json.dumps(results)))
    assert "95 % interval" in page and page.count("<li>") == 4 and "trainable" in page
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,', page)) == 2
