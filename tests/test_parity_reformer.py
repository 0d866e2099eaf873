"""Reformer the model agrees with transformers on the same weights and rotations: outputs, and gradients, both ways, in
float64.

Lengths divide by all chunks: transformers pads others in evaluation, and its ring of chunks then looks at that padding.
Its gradients are compared at one layer of attention and one of feed-forward each being differentiated by autograd in
both.
"""

import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.architectures.transformer import attention_specs
from effzoo.convert.reformer import REFORMER
from effzoo.errors import ConversionError

BASE = {
    "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 32,
    "axial_pos_shape": [4, 8],
    "axial_pos_embds_dim": [6, 10], "max_position_embeddings": 32, "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4, "num_buckets": 4,
    "num_hashes": 2, "hash_seed": 0, "hidden_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
CASES = {
    "local": {"attn_layers": ["local", "local"]},
    "lsh": {"attn_layers": ["lsh", "lsh"]},
    "mixed": {"attn_layers": ["local", "lsh", "local", "lsh"], "num_buckets": [2, 4], "num_hashes": 3},
    "looking ahead": {
        "attn_layers": ["lsh", "local"],
        "lsh_num_chunks_after": 1,
        "local_num_chunks_after": 1,
        "is_decoder": False,
    },
    "learned positions": {"attn_layers": ["lsh", "local"], "axial_pos_embds": False},
    "chunked feed-forward": {"attn_layers": ["lsh", "local"], "chunk_size_feed_forward": 4},
}
HEADS = {
    "features": "ReformerModel",
    "causal_lm": "ReformerModelWithLMHead",
    "masked_lm": "ReformerForMaskedLM",
    "classification": "ReformerForSequenceClassification",
}
SMALL = {  # sizes of a model of the zoo that those of `theirs` fit
    "dim": 16, "heads": 2, "head_dim": 8, "layers": 2, "mlp": 32, "vocab": 50, "max_length": 32, "axial_shape": (4, 8),
    "axial_dims": (6, 10),
}  # fmt: skip


def theirs(name, case, **more):
    causal = {"is_decoder": name != "ReformerForMaskedLM"} | CASES[case] | more
    if name == "ReformerModelWithLMHead":
        causal["is_decoder"] = True
    model = getattr(transformers, name)(transformers.ReformerConfig(**BASE | causal)).double().eval()
    for key, parameter in model.named_parameters():
        if key == "lm_head.bias":  # transformers keeps this bias but does not add it; see the test below
            torch.nn.init.zeros_(parameter)
        else:
            is_norm = "layer_norm.weight" in key
            torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.3)
    return model


def batch():
    ids = torch.randint(1, 50, (2, 16))
    mask = torch.arange(16) < torch.tensor([16, 11])[:, None]
    return ids * mask, mask


@pytest.mark.parametrize(
    ("case", "task"), [(c, t) for c in CASES for t in HEADS if c != "looking ahead" or t != "causal_lm"]
)
def test_outputs_equal_those_of_transformers(case, task):
    hf = theirs(HEADS[task], case)
    ours = convert.from_transformers(hf)
    ids, mask = batch()
    with torch.no_grad():
        expected, found = hf(ids, attention_mask=mask), ours(ids, attention_mask=mask.long())
    name = "last_hidden_state" if task == "features" else "logits"
    a, b = getattr(expected, name), getattr(found, name)
    if task != "classification":
        a, b = a[mask], b[mask]
    assert a.abs().max() > 0.1 and (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("case", ["local", "lsh", "mixed"])
def test_gradients_equal_those_of_transformers_in_training(case):
    """Theirs through its own reversible function, ours through ours: every parameter, dropout 0, without padding (it is
    not allowed there)."""
    hf = theirs("ReformerModelWithLMHead", case).train()
    hf.config.axial_pos_shape = [4, 8]
    ours = convert.from_transformers(hf).train()
    ids = torch.randint(1, 50, (2, 32))
    for model in (hf, ours):
        model(input_ids=ids).logits.square().mean().backward()  # their language-model loss is computed in float32
    names = dict(hf.named_parameters())
    state = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(state.get(name, torch.zeros_like(p)))
    gradients = convert.to_transformers(ours).state_dict()
    checked = 0
    for key, parameter in names.items():
        # ours adds what 5.23 does not
        if parameter.grad is not None and key not in ("lm_head.bias", "lm_head.decoder.bias"):
            assert (gradients[key] - parameter.grad).abs().max() < 1e-9, key
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("task", HEADS)
def test_conversion_is_bit_exact_both_ways_and_from_a_folder(task, tmp_path):
    # transformers makes axial positions in float32 and reads others into these
    hf = theirs(HEADS[task], "mixed").float()
    hf.save_pretrained(tmp_path)
    for source in (hf, tmp_path):
        again = convert.to_transformers(convert.from_transformers(source))
        state = again.state_dict()
        assert state.keys() == hf.state_dict().keys()
        # from 5.24 on, where the decoder's bias is added in its place
        unused = {"lm_head.bias"} if "lm_head.decoder.bias" in state else set()
        for key in state.keys() - unused:
            assert torch.equal(state[key], hf.state_dict()[key]), key
    for name in (
        "attn_layers",
        "num_buckets",
        "num_hashes",
        "axial_pos_shape",
        "is_decoder",
        "chunk_size_feed_forward",
    ):
        assert getattr(again.config, name) == getattr(hf.config, name), name


def test_the_bias_of_the_language_model_head_is_added_here():
    """Transformers keeps `lm_head.bias`, with which the published weights were trained, and leaves it out of the
    logits; from 5.24 on it adds the bias of the decoder instead, which then is ours."""
    hf = theirs("ReformerModelWithLMHead", "local")
    torch.nn.init.normal_(hf.lm_head.bias)
    ids, _ = batch()
    of_decoder = hf.lm_head.decoder.bias
    with torch.no_grad():
        expected = hf(ids).logits + (hf.lm_head.bias if of_decoder is None else 0)
        assert torch.allclose(convert.from_transformers(hf)(ids).logits, expected, rtol=0, atol=1e-10)


def test_a_language_model_saved_before_its_decoder_had_a_bias_keeps_its_own(tmp_path):
    """A file without `lm_head.decoder.bias` holds the trained bias under `lm_head.bias`, whatever the version that
    reads it."""
    import safetensors.torch

    hf = theirs("ReformerModelWithLMHead", "local").float()
    torch.nn.init.normal_(hf.lm_head.bias)
    hf.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.decoder.bias", None)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = convert.from_transformers(tmp_path)
    assert ours.head.out.bias.equal(hf.lm_head.bias)
    state = convert.to_transformers(ours).state_dict()
    assert all(
        value.equal(hf.lm_head.bias) for key, value in state.items() if key in ("lm_head.bias", "lm_head.decoder.bias")
    )


# what the config.json of the two published models say
PUBLISHED = {
    "reformer": {
        "attention_head_size": 64, "attn_layers": ["local", "lsh"] * 3, "axial_pos_embds_dim": [64, 192],
        "axial_pos_shape": [512, 1024],
        "feed_forward_size": 512, "hidden_dropout_prob": 0.05, "hidden_size": 256,
        "local_attention_probs_dropout_prob": 0.05,
        "lsh_attention_probs_dropout_prob": 0.0, "local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64,
        "max_position_embeddings": 524288,
        "num_attention_heads": 2, "num_buckets": [64, 128], "num_hashes": 1, "vocab_size": 320,
    },
    "reformer-enwik8": {
        "attention_head_size": 128, "attn_layers": ["local", "local", "lsh", "local"] * 3,
        "axial_pos_embds_dim": [256, 768],
        "axial_pos_shape": [128, 512], "feed_forward_size": 4096, "hidden_dropout_prob": 0.2, "hidden_size": 1024,
        "local_attention_probs_dropout_prob": 0.2, "lsh_attention_probs_dropout_prob": 0.1,
        "local_attn_chunk_length": 128,
        "lsh_attn_chunk_length": 256, "max_position_embeddings": 65536, "num_attention_heads": 8, "num_buckets": 512,
        "num_hashes": 4, "vocab_size": 258,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_zoo_entries_say_what_the_published_configurations_say(name):
    theirs = transformers.ReformerConfig(
        is_decoder=True, hidden_act="relu", pad_token_id=0, axial_pos_embds=True, **PUBLISHED[name]
    )
    read, ours = REFORMER.config(theirs, "causal_lm"), effzoo.zoo.config(name)
    kept = [key for key in vars(ours) if key not in ("name", "hub", "paper", "attention", "pooling", "head_dense")]
    assert {key: getattr(read, key) for key in kept} == {key: getattr(ours, key) for key in kept}
    for one, other in zip(attention_specs(read), attention_specs(ours), strict=True):
        defaults = {option.name: option.default for option in effzoo.registry.attention.options(one.name)} | {
            "circular": True
        }
        assert (one.name, defaults | one.options) == (other.name, defaults | other.options)


def test_the_published_reformer_is_filled_with_weights_of_its_layout():
    """With other sizes, but the two dropouts that differ."""
    sizes = {
        "attn_layers": ["local", "lsh"],
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.05,
    }
    hf = theirs("ReformerModelWithLMHead", "local", **sizes)
    tiny = SMALL
    for more in ({}, {"attention_dropout": 0.0}):
        model = effzoo.build("reformer", task="causal_lm", pretrained=hf, **tiny, **more)
        assert model.embeddings.token.weight.equal(hf.reformer.embeddings.word_embeddings.weight.float())
        wanted = [0.0, 0.0] if more else [0.05, 0.0]
        assert [core.dropout for core in model.train().cores()] == wanted


def test_each_attention_has_its_own_dropout_both_ways():
    dropouts = {"lsh_attention_probs_dropout_prob": 0.1, "local_attention_probs_dropout_prob": 0.3}
    ours = convert.from_transformers(theirs("ReformerModel", "mixed", **dropouts)).train()
    assert ours.config.attention_dropout == (0.3, 0.1, 0.3, 0.1) and [core.dropout for core in ours.cores()] == [
        0.3,
        0.1,
        0.3,
        0.1,
    ]
    there = convert.to_transformers(ours)
    assert {key: getattr(there.config, key) for key in dropouts} == dropouts
    assert [layer.attention.self_attention.dropout for layer in there.encoder.layers] == [0.3, 0.1, 0.3, 0.1]
    one = convert.from_transformers(theirs("ReformerModel", "lsh", **dropouts))
    assert one.config.attention_dropout == 0.1
    other = effzoo.build(
        "reformer", dim=16, heads=2, layers=2, mlp=32, vocab=50, max_length=32, axial_shape=(4, 8), axial_dims=(6, 10),
        head_dim=8, attention="lsh[chunk=4,circular=true]", attention_dropout=(0.1, 0.2),
    )  # fmt: skip
    with pytest.raises(
        ConversionError, match=r"same options and attention_dropout in all layers of one kind.*attention_dropout=0\.2"
    ):
        convert.to_transformers(other)


def test_zoo_reformers_load_published_layouts_and_take_peft(tmp_path):
    hf = theirs("ReformerModelWithLMHead", "mixed", attn_layers=["local", "lsh"])
    hf.float().save_pretrained(tmp_path)
    sizes = SMALL
    model = effzoo.build(
        "reformer",
        task="causal_lm",
        pretrained=tmp_path,
        peft="lora[targets=(attn.q*,attn.v)]",
        attention=("local[chunk=4]", "lsh[chunk=4]"),
        **sizes,
    )
    ids = torch.randint(1, 50, (2, 13))
    model.train()(ids, labels=ids).loss.backward()
    silent = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not silent and sum(p.requires_grad for p in model.parameters()) == 2 * (2 + 2)


def test_what_has_no_counterpart_says_so():
    model = convert.from_transformers(
        theirs("ReformerModel", "lsh"), attention="lsh[circular=true,within_buckets=true]"
    )
    with pytest.raises(ConversionError, match="no counterpart for within_buckets=True"):
        convert.to_transformers(model)


@pytest.mark.parametrize("case", ["lsh", "mixed"])
def test_the_seed_of_the_rotations_is_given_back_and_where_there_is_none_it_is_said(case, caplog):
    ours = convert.from_transformers(theirs("ReformerModelWithLMHead", case, hash_seed=5))
    ids, mask = batch()
    back = convert.to_transformers(ours)
    assert back.config.hash_seed == 5 and not caplog.records
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask.long()).logits[mask]
        found = back(ids, attention_mask=mask).logits[mask]
    difference = ours.head.out.bias if back.lm_head.decoder.bias is None else 0  # which 5.23 does not add
    assert (found + difference - expected).abs().max() < 1e-10
    for change in (
        lambda model: next(core for core in model.cores() if hasattr(core, "rounds")).resample(5),
        lambda model: model.float(),
    ):
        model = convert.from_transformers(theirs("ReformerModelWithLMHead", case, hash_seed=5))
        change(model)
        caplog.clear()
        assert convert.to_transformers(model).config.hash_seed is None  # of no seed, and drawn in another dtype
        assert "no hash_seed of transformers gives the rotations of this model" in caplog.text
