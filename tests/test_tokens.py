"""`tokens` trains chosen rows of the token table and nothing else: held to the dense table with these rows replaced,
forward and backward."""

import copy
import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import load, load_file, save

import effzoo
from effzoo.errors import AdapterError, OptionError, TargetError
from effzoo.peft import attached, delta
from effzoo.peft.attach import base_tensors
from effzoo.peft.manifest import read_manifest

SIZES = {
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "mlp": 32,
    "vocab": 53,
    "max_length": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
CHOSEN = [0, 5, 6, 7, 40]
CASES = [
    ("gpt2", "causal_lm", {}, ""),
    ("bert", "masked_lm", {}, ""),
    ("albert", "masked_lm", {"embedding_dim": 8}, ""),
    ("llama", "causal_lm", {"tied": False, "kv_heads": 1}, ""),
    ("llama", "causal_lm", {"tied": False, "kv_heads": 1}, ", targets=(embed.token, lm.out)"),
    ("llama", "causal_lm", {"tied": False, "kv_heads": 1}, ", targets=lm.out"),
    ("bert", "classification", {}, ""),
]


def built(name="gpt2", task="causal_lm", **changes):
    model = effzoo.build(name, task=task, **{**SIZES, **changes}).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(task="causal_lm", vocab=53):
    x = torch.randint(0, vocab, (3, 12), generator=torch.Generator().manual_seed(3))
    x[:, 3], x[:, 7] = 5, 40
    return {"input_ids": x, "labels": torch.tensor([0, 1, 0]) if task == "classification" else x}


def moved(model, seed=5):
    """The model with every adapter tensor moved away from its start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key and parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model


@pytest.mark.parametrize(("name", "task", "choices", "targets"), CASES)
def test_it_computes_what_a_table_with_these_rows_does_forward_and_backward(name, task, choices, targets):
    base = built(name, task, **choices)
    model = moved(effzoo.attach(copy.deepcopy(base), f"tokens[ids=0+5-7+40{targets}]"))
    dense = copy.deepcopy(base).requires_grad_(True)
    own = {key: value for key, value in model.named_parameters() if "tokens" in key}
    pairs = {key.split(".adapters.")[0] + ".weight": value for key, value in own.items()}
    for key, rows in pairs.items():
        assert rows.shape == (5, dense.get_parameter(key).shape[1])
        with torch.no_grad():
            dense.get_parameter(key)[CHOSEN] = rows
    head = {key: value for key, value in model.named_parameters() if ".adapters." in key and "tokens" not in key}
    for key, value in head.items():
        with torch.no_grad():
            dense.get_parameter(key.split(".adapters.")[0] + "." + key.rpartition("own_")[2]).copy_(value)
    ours, theirs = model(**batch(task)), dense(**batch(task))
    assert torch.allclose(ours.logits, theirs.logits, rtol=0, atol=1e-12)
    ours.loss.backward(), theirs.loss.backward()
    assert pairs
    for key, rows in pairs.items():
        assert (
            torch.allclose(rows.grad, dense.get_parameter(key).grad[CHOSEN], rtol=0, atol=1e-12)
            and rows.grad.abs().max() > 0
        )
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if ".adapters." not in key)


@pytest.mark.parametrize("tied", [True, False])
def test_other_rows_are_bit_equal_after_weight_decay_and_merging(tied, tmp_path):
    base = built("llama", tied=tied, kv_heads=1).float()
    table = base.embeddings.token.weight.detach().clone()
    model = effzoo.attach(copy.deepcopy(base), "tokens[ids=(5, 6, 7)]")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert torch.equal(model.embeddings.token.weight, table)
    trained = model.embeddings.token.adapters["default"]["tokens"].trained.detach().clone()
    before = model(**batch()).logits
    assert (trained != table[5:8]).all()
    change = delta(model)["embeddings.token.weight"]
    assert (
        not change[:5].any()
        and not change[8:].any()
        and torch.equal(change[5:8], trained.double() - table[5:8].double())
    )
    account = effzoo.account(model)
    assert (account.trainable, account.stored, account.changed, account.rank) == (48, 51, 48, 3)
    effzoo.save_adapter(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert {key.rpartition(".")[2]: tuple(x.shape) for key, x in load_file(file).items()} == {
        "ids": (3,),
        "rows": (3, 16),
    }
    assert torch.equal(effzoo.load_adapter(copy.deepcopy(base), tmp_path)(**batch()).logits, before)
    effzoo.merge(model)
    assert torch.equal(model.embeddings.token.weight[5:8], trained)
    assert torch.equal(model.embeddings.token.weight[:5], table[:5]) and torch.equal(
        model.embeddings.token.weight[8:], table[8:]
    )
    assert torch.allclose(model(**batch()).logits, before, atol=1e-6)
    effzoo.unmerge(model)
    assert torch.equal(model.embeddings.token.weight, table) and torch.equal(model(**batch()).logits, before)


def test_rows_of_a_batch_have_their_own_tokens():
    model = built("bert", "token_classification")
    for seed, (name, spec) in enumerate({"a": "tokens[ids=3-7]", "b": "tokens[ids=5+40-43]"}.items()):
        moved(effzoo.attach(model, spec, name=name), seed)
    x = batch()["input_ids"]
    alone = {name: effzoo.activate(model, name)(x).logits for name in ("a", "b")}
    found = effzoo.activate(model, rows=["b", "a", "b"])(x).logits
    assert torch.allclose(found, torch.stack([alone["b"][0], alone["a"][1], alone["b"][2]]), atol=1e-12)


def test_two_adapters_add_up_in_combine_and_follow_each_other_in_a_stack():
    model = built()
    for seed, (name, spec) in enumerate({"a": "tokens[ids=3-7]", "b": "tokens[ids=5+40]"}.items()):
        moved(effzoo.attach(model, spec, name=name), seed)
    one, two = (delta(model, name)["embeddings.token.weight"] for name in ("a", "b"))
    table = model.embeddings.token.weight.detach()
    effzoo.combine(model, {"a": 0.5, "b": 0.25}, name="both")
    assert torch.allclose(delta(model, "both")["embeddings.token.weight"], 0.5 * one + 0.25 * two, atol=1e-12)
    effzoo.activate(model, "a", "b")
    expected = table + one
    expected[[5, 40]] = (table + two)[[5, 40]]
    assert torch.allclose(model.embeddings.token.composed_weight(), expected, atol=1e-12)


def test_new_rows_are_those_that_were_added_and_the_file_names_them(tmp_path):
    base = effzoo.resize_vocabulary(built(), 60)
    model = moved(effzoo.attach(copy.deepcopy(base), "lora[rank=2]|tokens[ids=new]"))
    assert attached(model)["default"].spec == "lora[rank=2]|tokens[ids=53-59]"
    assert model.embeddings.token.adapters["default"]["tokens"].trained.shape == (7, 16)
    effzoo.save_adapter(model, tmp_path)
    other = built(vocab=60)
    other.load_state_dict(base_tensors(base))  # which does not know that rows were added
    assert torch.equal(effzoo.load_adapter(other, tmp_path)(**batch(vocab=60)).logits, model(**batch(vocab=60)).logits)
    with pytest.raises(OptionError, match="resize_vocabulary"):
        effzoo.attach(built(), "tokens[ids=new]")
    grown = effzoo.resize_vocabulary(copy.deepcopy(model), 64)
    assert torch.allclose(grown(**batch(vocab=60)).logits[..., :60], model(**batch(vocab=60)).logits, atol=1e-9)


def test_an_adapter_with_the_new_rows_loads_on_the_base_whatever_its_new_rows_are(tmp_path):
    """Its file holds them; those of the base, which are drawn, do not count. Every other row does."""
    base = built(task="causal_lm")
    model = moved(effzoo.attach(effzoo.resize_vocabulary(copy.deepcopy(base), 60, seed=3), "lora|tokens[ids=new]"))
    effzoo.save_adapter(model, tmp_path)
    with pytest.raises(
        AdapterError,
        match=r"vocab: 60 in the file, 53 in this model; give the model its tokens first: "
        r"effzoo.resize_vocabulary\(model, 60\)",
    ):
        effzoo.load_adapter(copy.deepcopy(base), tmp_path)
    again = effzoo.load_adapter(effzoo.resize_vocabulary(copy.deepcopy(base), 60, init="normal"), tmp_path)
    x = batch(vocab=60)["input_ids"]
    assert torch.equal(again(x).logits, model(x).logits)
    effzoo.peft.files.swap_weights(again, tmp_path)
    with torch.no_grad():
        other = effzoo.resize_vocabulary(copy.deepcopy(base), 60)
        other.embeddings.token.weight[52] += 1
    with pytest.raises(AdapterError, match=r"embeddings.token.weight: .* without rows 53-59 in the file"):
        effzoo.load_adapter(other, tmp_path)
    manifest = read_manifest(tmp_path)
    tensors = effzoo.peft.files.fingerprint(other, embeddings={"embeddings.token.weight": "52-59"}).tensors
    forged = dataclasses.replace(manifest, fingerprint=dataclasses.replace(manifest.fingerprint, tensors=tensors))
    (tmp_path / "adapter.json").write_bytes(forged.written())
    with pytest.raises(
        AdapterError, match="brings tokens 53-59 of embeddings.token.weight, and its manifest has no hash of 52-59"
    ):
        effzoo.load_adapter(other, tmp_path)


def test_an_adapter_with_new_rows_loads_on_a_wider_base_of_the_same_weights(tmp_path):
    base = effzoo.resize_vocabulary(built().to(torch.bfloat16), 60)
    model = moved(effzoo.attach(copy.deepcopy(base), "tokens[ids=new]"))
    assert model.embeddings.token.adapters["default"]["tokens"].trained.dtype == torch.float32
    effzoo.save_adapter(model, tmp_path)
    wide = copy.deepcopy(base).float()
    x = batch(vocab=60)["input_ids"]
    loaded = effzoo.load_adapter(copy.deepcopy(wide), tmp_path, rounded_base=True)
    assert torch.allclose(loaded(x).logits, model(x).logits.float(), atol=0.05, rtol=0.05)
    wide.embeddings.token.weight.data[52] += 1
    with pytest.raises(AdapterError, match="embeddings.token.weight"):
        effzoo.load_adapter(wide, tmp_path, rounded_base=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_scale_takes_part_of_the_way_to_the_trained_rows(tied):
    model = moved(effzoo.attach(built("llama", tied=tied, kv_heads=1), "tokens[ids=5-7]"))
    table, trained = model.embeddings.token.weight, model.embeddings.token.adapters["default"]["tokens"].trained
    effzoo.activate(model, "default", scale=0.25)
    found = model.embeddings.token(torch.tensor([5, 6, 7, 9]))
    assert torch.allclose(found[:3], table[5:8] + 0.25 * (trained - table[5:8]), atol=1e-12) and torch.equal(
        found[3], table[9]
    )


def test_an_adapter_of_before_refuses_a_resized_base_with_advice(tmp_path):
    base = built()
    effzoo.save_adapter(effzoo.attach(copy.deepcopy(base), "lora"), tmp_path)
    with pytest.raises(
        AdapterError,
        match="vocab: 53 in the file, 60 in this model; load it into the model that it was trained on, and call",
    ):
        effzoo.load_adapter(effzoo.resize_vocabulary(base, 60), tmp_path)


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (5, [5]),
        ((7, 5), [5, 7]),
        ("5-7", [5, 6, 7]),
        ("5-7+9", [5, 6, 7, 9]),
        (["9", "5-6"], [5, 6, 9]),
        (None, list(range(53))),
        ("52", [52]),
    ],
)
def test_tokens_are_named_by_number_and_range(ids, numbers):
    model = effzoo.attach(built(), {"name": "tokens", "ids": ids})
    module = model.embeddings.token.adapters["default"]["tokens"]
    assert module.ids.tolist() == numbers and torch.equal(module.trained, model.embeddings.token.weight[numbers])


@pytest.mark.parametrize(
    "ids",
    [
        53,
        "50-53",
        -1,
        "7-5",
        "a",
        "5-",
        "-5",
        "",
        (),
        (5, 5),
        "3-7+5",
        True,
        1.0,
        10**30,
        f"0-{10**12}",
        "9" * 10_000,
        "5+" * 10_000,
        "²",
        "5--7",
    ],
)
def test_wrong_tokens_are_refused_and_change_nothing(ids):
    model = built()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match="tokens"):
        effzoo.attach(model, {"name": "tokens", "ids": ids})
    assert not attached(model) and all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_sites_have_no_tokens():
    with pytest.raises(TargetError, match="tied to embed.token"):
        effzoo.attach(built(), "tokens[ids=5, targets=lm.out]")
    with pytest.raises(TargetError, match="is not made of tokens"):
        effzoo.attach(built(), "tokens[ids=5, targets=embed.position]")


def test_a_file_of_other_tokens_is_refused(tmp_path):
    base = built()
    effzoo.save_adapter(moved(effzoo.attach(copy.deepcopy(base), "tokens[ids=5-7]")), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    manifest = read_manifest(tmp_path)
    for ids in ([5, 6, 60], [7, 6, 5], [-1, 5, 6]):
        content = save(
            {key: torch.tensor(ids) if key.endswith(".ids") else x for key, x in load(file.read_bytes()).items()}
        )
        file.write_bytes(content)
        forged = dataclasses.replace(manifest, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        (tmp_path / "adapter.json").write_bytes(forged.written())
        with pytest.raises(AdapterError, match="the spec says 5-7"):
            effzoo.load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.slow
def test_a_compiled_model_looks_up_the_trained_rows():
    model = moved(effzoo.attach(built("llama", tied=False, kv_heads=1), "tokens[ids=5-7+40]"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = batch()["input_ids"]
    assert torch.equal(compiled(ids).logits, model(ids).logits)
