"""The fingerprint of a model: equal for equal functions, and different, by name, for any other function of the same
tensors."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import effzoo
from effzoo.architectures import Config, PerceiverConfig
from effzoo.architectures.function import COUNTS, SEPARATE, WITHOUT_EFFECT
from effzoo.errors import AdapterError
from effzoo.peft.fingerprint import Fingerprint, difference, fingerprint
from effzoo.sites import LayerNorm, Linear

SIZES = {"layers": 2, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50, "max_length": 64}
PERCEIVER = {
    "channels": 16,
    "latents": 8,
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "mlp": 16,
    "max_length": 32,
    "vocab": 20,
    "head_dim": 0,
    "value_dim": 0,
}
PERCEIVER |= {
    "cross_heads": 2,
    "cross_head_dim": 8,
    "cross_value_dim": 8,
    "decoder_heads": 2,
    "decoder_head_dim": 0,
    "decoder_value_dim": 0,
}


def made(name="bert", **given):
    torch.manual_seed(0)
    return effzoo.build(name, **{**(PERCEIVER if name.startswith("perceiver") else SIZES), **given}).eval()


def read_back(found: Fingerprint) -> Fingerprint:
    """As a file gives it."""
    return Fingerprint(**json.loads(json.dumps(dataclasses.asdict(found))))


@pytest.mark.parametrize("config", [Config, PerceiverConfig])
def test_every_field_of_a_config_is_decided(config):
    for field in dataclasses.fields(config):
        assert sum(field.name in decided for decided in (WITHOUT_EFFECT, SEPARATE, COUNTS)) == 1, (
            f"decide {field.name} in architectures/function.py"
        )


OTHERS = [
    ({}, {"heads": 4}, "heads: 2 in the file, 4 in this model"),
    ({}, {"activation": "relu"}, "activation: gelu in the file, relu in this model"),
    ({}, {"eps": 0.1}, "eps: 1e-12 in the file, 0.1 in this model"),
    ({}, {"attention": "local[chunk=4]"}, "attention of layer 0: full in the file, local in this model"),
    ({}, {"attention": ("full", "blockwise")}, "attention of layer 1: full in the file, blockwise in this model"),
    (
        {"attention": "lsh[chunk=4]"},
        {"attention": "lsh[chunk=4, seed=1]"},
        "attention of layer 0, seed: 0 in the file, 1 in this model",
    ),
    (
        {"attention": "longformer[window=8]"},
        {"attention": "longformer[window=16]"},
        "attention of layer 0, window: 8 in the file, 16 in this model",
    ),
    ({"norm_kind": "rms"}, {}, "norm_kind: rms in the file, layer in this model"),
    (
        {"norm": "pre"},
        {"norm": "pre", "residual": "reversible"},
        "residual: plain in the file, reversible in this model",
    ),
    ({"experts": 2}, {"experts": 2, "router": "top_k[k=1]"}, "router: switch in the file, top_k in this model"),
    (
        {"experts": 2},
        {"experts": 2, "router": "switch[capacity=0.5]"},
        "router, capacity: 1.25 in the file, 0.5 in this model",
    ),
    (
        {"positions": "rotary"},
        {"positions": "rotary", "rotary_theta": 100.0},
        "rotary_theta: 10000.0 in the file, 100.0 in this model",
    ),
    ({"share_layers": 1}, {"share_layers": 1, "layers": 4}, "layers: 2 in the file, 4 in this model"),
    (
        {"task": "classification"},
        {"task": "classification", "pooling": "mean"},
        "pooling: first in the file, mean in this model",
    ),
    (
        {"task": "classification"},
        {"task": "classification", "head_activation": "relu"},
        "head_activation: tanh in the file, relu in this model",
    ),
    ({"task": "masked_lm"}, {"task": "masked_lm", "tied": False}, "tied: True in the file, False in this model"),
    (
        {"position_offset": 2, "pad_token": 0},
        {"position_offset": 2, "pad_token": 1},
        "pad_token: 0 in the file, 1 in this model",
    ),
]


@pytest.mark.parametrize(("one", "other", "words"), OTHERS, ids=[str(other) + str(one) for one, other, _ in OTHERS])
def test_another_function_is_named_with_both_values(one, other, words):
    assert difference(read_back(fingerprint(made(**one))), fingerprint(made(**one))) is None
    assert difference(read_back(fingerprint(made(**one))), fingerprint(made(**other))) == words


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("perceiver-io", {"cross_residual": False}, "cross_residual: True in the file, False in this model"),
        (
            "perceiver-io",
            {"attention": "local[chunk=4]"},
            "attention of layer 0: full in the file, local in this model",
        ),
        ("perceiver-io", {"eps": 0.1}, "eps: 1e-05 in the file, 0.1 in this model"),
        (
            "perceiver-io",
            {"cross_heads": 1, "cross_head_dim": 16, "cross_value_dim": 16},
            "cross_heads: 2 in the file, 1 in this model",
        ),
    ],
)
def test_perceivers_are_told_apart(name, other, words):
    assert difference(read_back(fingerprint(made(name))), fingerprint(made(name))) is None
    assert difference(read_back(fingerprint(made(name))), fingerprint(made(name, **other))) == words


@pytest.mark.parametrize(
    "other",
    [
        {"dropout": 0.5, "attention_dropout": 0.3}, {"backend": "reference"}, {"mlp_chunk": 3}, {"head_dim": 8},
        {"kv_heads": 2}, {"share_layers": 2},
        {"embed_norm": True}, {"attention": ["full", "full"]}, {"head_activation": "relu"},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_no_output_changes_no_fingerprint(other):
    one, two, ids = made(), made(**other), torch.arange(20)[None]
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(
        two(input_ids=ids).last_hidden_state, one(input_ids=ids).last_hidden_state, rtol=1e-5, atol=1e-5
    )
    assert difference(fingerprint(one), fingerprint(two)) is None
    assert fingerprint(one).digest == fingerprint(two).digest


def test_a_longer_limit_is_no_other_function_where_positions_are_turned():
    one, two = (made("llama", kv_heads=2, max_length=n, task="causal_lm") for n in (16, 64))
    ids = torch.arange(10)[None]
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)
    assert difference(fingerprint(one), fingerprint(two)) is None
    one, two = (
        made("llama", kv_heads=2, max_length=n, attention="lsh[chunk=4]", task="causal_lm") for n in (16, 64)
    )  # as many buckets as are needed
    assert difference(fingerprint(one), fingerprint(two)) == "max_length: 16 in the file, 64 in this model"


def test_swapped_quantised_and_altered_models_are_others():
    plain = fingerprint(made())
    swapped = made()
    effzoo.swap_attention(swapped, "lsh[chunk=4]")
    assert difference(plain, fingerprint(swapped)) == "attention of layer 0: full in the file, lsh in this model"
    quantised = made()
    effzoo.quantise(quantised, bits=8)
    assert difference(plain, fingerprint(quantised)) == (
        "blocks.0.attn.q: Linear in the file, QuantisedLinear in this model"
    )
    altered = made()
    altered.blocks[0].mlp.activation = torch.relu
    assert difference(plain, fingerprint(altered)) == "blocks.0.mlp.activation: gelu in the file, relu in this model"
    narrower, pooled = made(attention="longformer[window=8]"), made(task="classification")
    # what was made of an option, and what was taken from a config
    narrower.blocks[0].attn.core.reach, pooled.head.pooling = 1, "mean"
    found = difference(fingerprint(made(attention="longformer[window=8]")), fingerprint(narrower))
    assert found == "blocks.0.attn.core.reach: 4 in the file, 1 in this model"
    assert difference(fingerprint(made(task="classification")), fingerprint(pooled)) == (
        "head.pooling: first in the file, mean in this model"
    )
    hashed = made(attention="lsh[chunk=4]")
    before = fingerprint(hashed)
    hashed.blocks[1].attn.core.resample(7)  # the rotations are in no state dict
    assert difference(before, fingerprint(hashed)).startswith("blocks.1.attn.core.rotations: float32[")
    moved = made()
    moved.embeddings.token.weight.data[3, 3] += 1e-3
    assert difference(plain, fingerprint(moved)).startswith("embeddings.token.weight: float32[50, 16] ")
    assert "bfloat16[50, 16]" in difference(plain, fingerprint(made().bfloat16()))


def test_a_model_of_ones_own_is_known_by_its_modules():
    def own(eps=1e-5, act=None):
        torch.manual_seed(0)
        return nn.Sequential(Linear(4, 4, role="in"), act or nn.GELU(), LayerNorm(4, eps=eps, role="norm"))

    assert difference(fingerprint(own()), fingerprint(own())) is None
    assert difference(fingerprint(own()), fingerprint(own(eps=0.1))) == "2.eps: 1e-05 in the file, 0.1 in this model"
    assert difference(fingerprint(own()), fingerprint(own(act=nn.ReLU()))) == "1: GELU in the file, ReLU in this model"
    assert "approximate: none in the file, tanh" in difference(
        fingerprint(own()), fingerprint(own(act=nn.GELU("tanh")))
    )


@pytest.mark.parametrize(
    "attention", ["full", "lsh[chunk=4]", "longformer[window=8]", "linformer[k=8]", "blockwise", "local[chunk=4]"]
)
def test_running_learning_and_merging_leave_the_fingerprint_alone(attention):
    model, ids = made(attention=attention, task="classification", experts=2, router="top_k"), torch.arange(1, 33)[None]
    before = fingerprint(model)
    model.train()(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    model.eval()(input_ids=ids[:, :17])
    effzoo.attach(model, "lora")
    effzoo.merge(model, "default")
    effzoo.unmerge(model)
    effzoo.detach(model, "default")
    assert difference(before, fingerprint(model)) is None


def test_adapters_and_trainers_leave_the_fingerprint_alone():
    model = made(task="classification")
    before = fingerprint(model)
    effzoo.attach(model, "lora|prompt[length=2]")
    model.train()
    model.is_loaded_by_a_trainer, model.recompute = True, "blocks"
    assert difference(before, fingerprint(model)) is None
    with pytest.raises(AdapterError, match="got dict"):
        fingerprint({"no": "module"})


def test_what_releases_have_added_is_no_fact_of_a_model_that_does_without():
    """Files of adapters that were written before name no such fact, and still load."""
    sizes = {"layers": 1, "dim": 16, "heads": 2, "mlp": 24, "vocab": 30, "max_length": 16, "kv_heads": 0}
    model = effzoo.build("llama", rotary_scaling={"type": "linear", "factor": 2.0}, **sizes)
    facts = fingerprint(model).facts
    added = (
        "rotary_fraction", "score_dim", "score_cap", "logit_cap", "scale_embeddings", "expert_mlp", "mlp_out_bias",
    )  # fmt: skip
    assert not [name for name in facts if name.rpartition(".")[2] in (*added, "scale")]
    assert not [name for name in facts if ".stream" in name or name == "blocks.0.reads"]
    assert facts["blocks.0.attn"] == "Attention" and facts["embedding_dim"] == 16
    assert set(facts["blocks.0.attn.rotary"]) == {"head_dim", "theta", "scaling"}
    assert "score_cap" not in facts["blocks.0.attn.core.context"]
    more = {"score_cap": 2.0, "scale_embeddings": True, "rotary_fraction": 0.5, "score_dim": 3.0}
    other = fingerprint(effzoo.build("llama", rotary_scaling=None, **sizes, **more)).facts
    assert all(other[name] == value for name, value in more.items())
    assert other["blocks.0.attn.rotary"]["fraction"] == 0.5 and other["embeddings.token.scale"] == 4.0
