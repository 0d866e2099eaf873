"""An adapter goes to the same weights in another dtype or quantised when that is asked for, and to no others."""

import copy
import json

import pytest
import torch
from support import labelled, small

import effzoo
from effzoo.errors import AdapterError
from effzoo.peft import base_rounding
from effzoo.peft.attach import adapter_tensors, attached
from effzoo.sites import sites

REFUSED = "was trained on another base"


@pytest.fixture
def base(tiny):
    return effzoo.build("bert", task="classification", num_labels=3, **{**tiny, "layers": 1})


def to(kind):
    """A function that holds a copy of a model in another way."""

    def changed(model):
        model = copy.deepcopy(model)
        if isinstance(kind, torch.dtype):
            return model.to(kind)
        dtype, bits = kind
        effzoo.quantise(model.to(dtype), bits=bits)
        return model

    return changed


def saved(model, folder, method="lora"):
    """The adapter's folder, and its tensors; something has been learnt."""
    effzoo.attach(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    effzoo.save_adapter(model, folder)
    return folder, {key: value.clone() for key, value in adapter_tensors(model, "default").items()}


KINDS = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    (torch.float32, 8),
    (torch.float32, 4),
    (torch.bfloat16, 4),
    (torch.float16, 8),
]


@pytest.mark.slow
@pytest.mark.parametrize("theirs", KINDS, ids=str)
def test_every_rounding_of_the_same_weights_is_taken_when_asked(base, theirs, tmp_path):
    """From every kind to every other: refused with the kinds named, then taken, its tensors as they were saved and the
    model's outputs close."""
    trained = to(theirs)(base)
    folder, tensors = saved(trained, tmp_path / "a")
    with torch.no_grad():
        wanted = trained.eval()(**labelled()).logits.double()
    for ours in KINDS:
        model = to(ours)(base)
        if ours == theirs:
            effzoo.load_adapter(model, folder, rounded_base=True)
            assert attached(model)["default"].rounding is None and base_rounding(model, folder).tensors == ()
            continue
        before = {key: value.clone() for key, value in model.state_dict().items()}
        name = r"\S+" if isinstance(theirs, tuple) or isinstance(ours, tuple) else "embeddings.token.weight"
        with pytest.raises(
            AdapterError,
            match=rf"{REFUSED}.*{name} is .* in the file's base and .* here; load_adapter\(..., rounded_base=True\)",
        ):
            effzoo.load_adapter(model, folder)
        assert model.state_dict().keys() == before.keys() and not attached(model)
        effzoo.load_adapter(model, folder, rounded_base=True)
        report = attached(model)["default"].rounding
        coarse = isinstance(theirs, tuple) or isinstance(ours, tuple)
        exact = {theirs, ours} == {torch.float32, torch.float64}  # the weights were float32 before
        assert report.tensors and (report.worst == 0 if exact else 0 < report.worst < (0.2 if coarse else 0.01))
        found = adapter_tensors(model, "default")
        assert all(torch.equal(found[key].double(), value.double()) for key, value in tensors.items())
        wide = torch.float64 if torch.float64 in (theirs, ours) else torch.float32
        assert {value.dtype for value in found.values()} == {wide}
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
        with torch.no_grad():
            logits = model.eval()(**labelled()).logits.double()
        assert (logits - wanted).norm() < 0.15 * wanted.norm()


@pytest.mark.cover()
@pytest.mark.parametrize(("theirs", "ours"), [(a, b) for a in KINDS for b in KINDS if a != b], ids=str)
def test_other_weights_are_refused_however_near(base, theirs, ours, tmp_path):
    """Drawn anew, trained on by a hundredth of their size, or scaled by three thousandths."""
    folder, _ = saved(to(theirs)(base), tmp_path / "a")
    for change in ("drawn", "step", "scaled"):
        other = copy.deepcopy(base).double()
        with torch.no_grad():
            for parameter in other.parameters():
                if change == "drawn":
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
                elif change == "step":  # a step of Adam
                    parameter.add_(2e-4 * torch.randn_like(parameter).sign())
                else:
                    parameter.mul_(1.003)
        model = to(ours)(other.to(torch.float32))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(AdapterError, match=rf"{REFUSED}.*rounded or not: \S+: "):
            effzoo.load_adapter(model, folder, rounded_base=True)
        assert not attached(model) and all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_one_altered_entry_is_found_where_every_entry_is_proved(base, tmp_path):
    for theirs, ours in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ):
        folder, _ = saved(to(theirs)(base), tmp_path / f"{theirs}-{ours}")
        model = to(ours)(base)
        with torch.no_grad():
            model.blocks[0].mlp.up.weight[3, 5] += 0.01
        with pytest.raises(AdapterError, match="rounded or not: blocks.0.mlp.up.weight: "):
            effzoo.load_adapter(model, folder, rounded_base=True)


def test_the_report_says_what_rounding_costs(base, tmp_path):
    """Every entry's difference in float64, of each tensor and at most."""
    folder, _ = saved(base, tmp_path / "a")
    wide = {key: value.double() for key, value in copy.deepcopy(base).state_dict().items() if ".adapters." not in key}
    effzoo.detach(base, "default")
    model = copy.deepcopy(base).to(torch.bfloat16)
    report = base_rounding(model, folder)
    for row in report.tensors:
        narrow = model.state_dict()[row.tensor].double()
        norm = wide[row.tensor].norm()
        assert row.proved and (row.theirs, row.ours) == ("float32", "bfloat16")
        assert row.relative == pytest.approx(
            float((narrow - wide[row.tensor]).norm() / norm) if norm else 0.0, abs=1e-12
        )
    assert report.worst == max(row.relative for row in report.tensors) and 1e-4 < report.worst < 2**-8
    assert "relative difference at most" in str(report) and len(str(report).splitlines()) == 1 + len(report.tensors)
    effzoo.quantise(model, bits=4)
    estimated = {row.tensor: row for row in base_rounding(model, folder).tensors if "bits" in row.ours}
    known = dict(sites(model))
    for key, row in estimated.items():
        true = float((known[key.removesuffix(".weight")].numbers().double() - wide[key]).norm() / wide[key].norm())
        assert not row.proved and row.relative == pytest.approx(true, rel=0.5)


def test_a_quantised_base_is_known_by_what_it_was_quantised_from_and_by_its_codes(base, tmp_path):
    """QLoRA: trained on 4 bits, loaded on the dense base; every entry proved. And on the dense weights that the codes
    stand for."""
    for bits in (8, 4):
        quantised = to((torch.bfloat16, bits))(base)
        folder, _ = saved(quantised, tmp_path / str(bits))
        dense = copy.deepcopy(base).to(torch.bfloat16)
        rows = base_rounding(dense, folder).tensors
        assert rows and all(row.proved for row in rows) and {row.theirs for row in rows} == {f"{bits} bits (bfloat16)"}
        effzoo.detach(quantised, "default")
        effzoo.dequantise(quantised)
        effzoo.load_adapter(quantised, folder, rounded_base=True)
        assert attached(quantised)["default"].rounding.worst < 0.01
        with pytest.raises(AdapterError, match="rounded_base=True"):
            effzoo.peft.swap_weights(quantised, folder)
        effzoo.peft.swap_weights(quantised, folder, rounded_base=True)


@pytest.mark.parametrize("kind", ["lsh", "linformer", "perceiver", "longformer"])
def test_attention_with_weights_and_buffers_of_its_own(tiny, kind, tmp_path):
    base = effzoo.build("bert", attention=small(kind), task="classification", num_labels=3, **tiny)
    folder, _ = saved(copy.deepcopy(base), tmp_path / "a", "full[targets=attn.v]|prefix[length=3]")
    model = effzoo.load_adapter(base.to(torch.bfloat16), folder, rounded_base=True)
    assert model(**labelled()).logits.dtype == torch.bfloat16
    other = effzoo.build("bert", attention="full", task="classification", num_labels=3, **tiny).to(torch.bfloat16)
    with pytest.raises(AdapterError, match=REFUSED):
        effzoo.load_adapter(other, folder, rounded_base=True)


def test_another_function_is_another_base_in_any_dtype(base, tiny, tmp_path):
    folder, _ = saved(copy.deepcopy(base), tmp_path / "a")
    other = effzoo.build("bert", task="classification", num_labels=3, **{**tiny, "heads": 4, "layers": 1})
    other.load_state_dict(base.state_dict())
    with pytest.raises(AdapterError, match="heads"):
        effzoo.load_adapter(other.to(torch.bfloat16), folder, rounded_base=True)


def test_an_adapter_keeps_its_dtype_in_files(base, tmp_path):
    effzoo.attach(base, "lora", dtype="bfloat16")
    effzoo.save_adapter(base, tmp_path / "a")
    found = adapter_tensors(base, "default")
    effzoo.detach(base, "default")
    effzoo.load_adapter(base, tmp_path / "a")
    assert {value.dtype for value in adapter_tensors(base, "default").values()} == {torch.bfloat16}
    assert all(torch.equal(value, found[key]) for key, value in adapter_tensors(base, "default").items())


def test_a_damaged_manifest_is_refused_in_a_sentence(base, tmp_path):
    from effzoo.peft.manifest import _hash

    saved(copy.deepcopy(base), tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    good = json.loads(path.read_text())
    key = "embeddings.token.weight"
    damages = [
        {"kind": 7}, {"kind": "load"}, {"kind": "int8"}, {"shape": [2**40, 2**40]}, {"shape": "x"}, {"shape": [-1]},
        {"numbers": "!!"},
        {"numbers": 5}, {"numbers": good["base_kept"][key]["numbers"][8:]}, {"margins": "AAAA"},
        {"rounded": {"bfloat16": []}}, {"rounded": {"bfloat16": ["a", "b"]}}, {"rounded": 3},
    ]  # fmt: skip
    for damage in damages:
        bad = json.loads(json.dumps(good))
        bad["base_kept"][key] |= damage
        bad["manifest_sha256"] = _hash({k: v for k, v in bad.items() if k != "manifest_sha256"})
        path.write_text(json.dumps(bad))
        with pytest.raises(AdapterError, match="is not a manifest that save_adapter wrote"):
            effzoo.load_adapter(copy.deepcopy(base), tmp_path / "a", rounded_base=True)
    for entry in ({"base_kept": []}, {"dtype": 3}, {"dtype": "load"}):
        bad = good | entry
        bad["manifest_sha256"] = _hash({k: v for k, v in bad.items() if k != "manifest_sha256"})
        path.write_text(json.dumps(bad))
        with pytest.raises(AdapterError):
            effzoo.load_adapter(copy.deepcopy(base), tmp_path / "a")
    del good["base_kept"]
    good["manifest_sha256"] = _hash({k: v for k, v in good.items() if k != "manifest_sha256"})
    path.write_text(json.dumps(good))
    effzoo.load_adapter(copy.deepcopy(base), tmp_path / "a")
    with pytest.raises(AdapterError, match="it was saved before files could recognise rounded weights"):
        effzoo.load_adapter(copy.deepcopy(base).to(torch.bfloat16), tmp_path / "a", rounded_base=True)
