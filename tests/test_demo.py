"""The demo's own steps, without its training: the split, the head that fine-tuning starts from, the report."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import effzoo


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parent.parent / "scripts/demo.py")
    module = sys.modules["demo"] = importlib.util.module_from_spec(spec)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_the_split_is_fixed_stratified_and_shares_no_text(demo):
    (parts, classes), (again, _) = demo.news(), demo.news()
    texts = {name: {text.strip() for text in part["text"]} for name, part in parts.items()}
    assert [part["text"] for part in parts.values()] == [part["text"] for part in again.values()]
    assert len(set.union(*texts.values())) == sum(len(part) for part in parts.values()) == 2127 and len(classes) == 5
    whole = Counter(label for part in parts.values() for label in part["label"])
    for name, part in parts.items():
        for label, count in Counter(part["label"]).items():
            assert abs(count - demo.SPLIT[name] * whole[label]) <= 1


def test_the_longformer_model_starts_from_the_real_weights_and_loads_its_adapter(demo, tmp_path):
    """An adapter saved by one model and loaded into a freshly built base gives the same logits, which full attention
    gives too on short input."""
    ids = torch.randint(1000, 2000, (2, 100))
    model = effzoo.attach(demo.build(demo.LONG, f"longformer[window={demo.WINDOW}]"), demo.PEFT).eval()
    full = demo.build(demo.SHORT).eval()
    with torch.no_grad():
        full.head.out.weight.copy_(model.head.out.weight)
        full.head.out.bias.copy_(model.head.out.bias)
        same = model(ids, global_attention_mask=torch.zeros(2, 100)).logits  # the window of 256 sees all 100 tokens
        assert torch.allclose(same, full(ids).logits, atol=1e-4) and same.abs().max() > 1e-2
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.01 * torch.randn_like(parameter))
        fresh = effzoo.load_adapter(
            demo.build(demo.LONG, f"longformer[window={demo.WINDOW}]"), effzoo.save_adapter(model, tmp_path)
        ).eval()
        assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_the_report_shows_every_row_both_pictures_and_escapes_text(demo):
    rows = [demo.Row("a <b>", 128, 90, 100, 1234, 5.0), demo.Row("c", 1024, 97, 100, 99, 6.0)]
    history = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 0.5, "eval_loss": 0.4, "eval_accuracy": 0.9}]
    account = {"trainable": 10, "total": 1000, "percent": 1.0, "bytes_on_disk": 77, "text": "x < y"}
    results = {
        "rows": [],
        "account": account,
        "longer_than_512": 0.5,
        "seconds": 9.0,
        "peak_memory_bytes": 2**30,
        "precision": "float32",
    }
    results |= {"settings": {"split": {"train": 1, "test": 2}}, "machine": "m"}
    page = demo.report(results, rows, {"one": history}, "longformer[window=256]")
    assert "a &lt;b&gt;" in page and "90.00 ± 5.88 %" in page and "97 / 100" in page and "x &lt; y" in page
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,', page)) == 2
