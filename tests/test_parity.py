"""Every family and every head agrees with transformers: outputs, losses, and gradients with respect to the embedded
tokens.

Tiny models of BERT, ALBERT, RoBERTa and GPT-2 run in float64 and agree to 1e-10. The others run in float32 and agree to
1e-5: whatever the dtype is, transformers computes the softmax of Longformer and LED in float32 (in float64 its mask
value, cast to float32, becomes -inf and the gradients NaN), the mean of an RMSNorm (Llama, Mistral, Qwen3), and
rotations (ModernBERT). All their
parameters are drawn at random, biases and norms included, so that no two tensors can be swapped unnoticed. Only
positions that hold tokens are compared: transformers computes something at padding, and we something else.
"""

import random

import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.convert.layouts import LAYOUTS

VOCAB, LABELS, LENGTH, BATCH = 37, 3, 13, 3
EXACT = ("bert", "albert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "big_bird", "gpt2")
GEMMAS = ("gemma2", "gemma3_text")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "mixtral", "qwen3_moe", *GEMMAS)
ROTARY = ("nomic_bert", "gte", "jina_embeddings_v3")
CAUSAL = ("gpt2", *LLAMAS)
FAMILY_NAMES = (
    "bert", "albert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", *ROTARY, "longformer",
    "big_bird", "gpt2", *LLAMAS, "eurobert", "modernbert", "led",
)  # fmt: skip
CLASSES = [(family, task, name) for family in FAMILY_NAMES for task, name in LAYOUTS[family].classes.items()]
HEADS = pytest.mark.parametrize(("family", "task", "name"), CLASSES, ids=[name for _, _, name in CLASSES])
FAMILIES = pytest.mark.parametrize("family", FAMILY_NAMES)
CONFIGS = {
    "bert": "BertConfig", "albert": "AlbertConfig", "roberta": "RobertaConfig", "longformer": "LongformerConfig",
    "gpt2": "GPT2Config",
    "xlm-roberta": "XLMRobertaConfig", "camembert": "CamembertConfig", "distilbert": "DistilBertConfig",
    "electra": "ElectraConfig", "nomic_bert": "NomicBertConfig", "gte": "GteConfig",
    "jina_embeddings_v3": "JinaEmbeddingsV3Config", "eurobert": "EuroBertConfig",
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "phi3": "Phi3Config", "smollm3": "SmolLM3Config", "olmo2": "Olmo2Config", "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig", "mixtral": "MixtralConfig", "qwen3_moe": "Qwen3MoeConfig",
    "modernbert": "ModernBertConfig",
    "led": "LEDConfig", "big_bird": "BigBirdConfig",
}  # fmt: skip


def tolerance_of(family):
    return 1e-10 if family in EXACT else 1e-5


def draw_rotary(draw, dim=None):
    """Base and scaling, small enough for every frequency to matter within a dozen positions.

    dim: of a head, for the types that only decoders have here.
    """
    llama3 = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    types = [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, llama3]
    if dim is not None:
        factors = [1.0 + j / 4 for j in range(dim // 2)]
        types += [
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"rope_type": "longrope", "short_factor": factors, "long_factor": [2 * f for f in factors], "factor": 4.0,
             "original_max_position_embeddings": draw.choice((8, 64))},
        ]  # fmt: skip
        types += [{"rope_type": "dynamic", "factor": 1.5}] if dim > 2 else []
    return draw.choice(types) | {"rope_theta": draw.choice((100.0, 10_000.0))}


def draw_decoder(family, draw, layers, eps):
    heads = draw.choice((1, 4, 6))
    sizes = {
        "vocab_size": VOCAB, "hidden_size": heads * draw.choice((4, 8)), "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([k for k in (1, 2, 3) if heads % k == 0]),
        "intermediate_size": draw.choice((12, 20)),
        "max_position_embeddings": LENGTH + 3, "rms_norm_eps": eps, "hidden_act": draw.choice(("silu", "gelu")),
        "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None, "num_labels": LABELS,
        "tie_word_embeddings": draw.choice((True, False)),
        "head_dim": draw.choice((4, 6, 8)), "classifier_dropout": 0.0,
    }  # fmt: skip
    whole = family in ("qwen2", "phi3", "smollm3", "olmo2")
    if whole:
        sizes["head_dim"] = sizes["hidden_size"] // heads
    sizes["rope_parameters"] = draw_rotary(draw, sizes["head_dim"])
    if whole:
        sizes.pop("head_dim")
    if family == "phi3":
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": draw.choice((100.0, 10_000.0))}
    if family in ("llama", "qwen3", "qwen3_moe", "eurobert", "smollm3", "olmo2", *GEMMAS):
        sizes["attention_bias"] = draw.choice((True, False))
    if family in ("llama", "eurobert", "smollm3"):
        sizes["mlp_bias"] = draw.choice((True, False))
    if family == "eurobert":
        sizes.pop("classifier_dropout")
        sizes["classifier_pooling"] = draw.choice(("bos", "mean", "late"))
    if family in ("mistral", "phi3", "mixtral"):
        sizes["sliding_window"] = draw.choice((None, 2, 5, 4096))
    if family in ("qwen2", "qwen3"):
        sizes |= {
            "use_sliding_window": draw.choice((True, False)),
            "sliding_window": 4,
            "max_window_layers": draw.choice((0, 1)),
        }
    if family == "mixtral":
        sizes |= {"num_local_experts": draw.choice((2, 5)), "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        sizes |= {
            "num_experts": 5, "num_experts_per_tok": draw.choice((2, 3)), "moe_intermediate_size": 8,
            "norm_topk_prob": draw.choice((True, False)), "decoder_sparse_step": draw.choice((1, 1, layers)),
            "use_sliding_window": draw.choice((True, False)), "sliding_window": 4,
        }  # fmt: skip
    if family == "smollm3":
        sizes |= {
            "no_rope_layers": [draw.choice((0, 1)) for _ in range(layers)],
            "use_sliding_window": draw.choice((True, False)), "sliding_window": 4,
        }  # fmt: skip
    if family in GEMMAS:
        sizes.pop("hidden_act")
        sizes |= {
            "hidden_activation": draw.choice(("gelu_pytorch_tanh", "silu")),
            "query_pre_attn_scalar": draw.choice((sizes["head_dim"], 3, 16)),
            "sliding_window": draw.choice((2, 5, 4096)),
            "layer_types": [draw.choice(("sliding_attention", "full_attention")) for _ in range(layers)],
            "final_logit_softcapping": draw.choice((None, 0.7)),
        }  # fmt: skip
    if family == "gemma2":
        sizes["attn_logit_softcapping"] = draw.choice((None, 0.5, 2.0))
    if family == "gemma3_text":
        sizes["rope_parameters"] = {
            "full_attention": draw_rotary(draw), "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }  # fmt: skip
    return getattr(transformers, CONFIGS[family])(**sizes)


def draw_modernbert(draw, dim, heads, eps):
    activation = draw.choice(("gelu", "silu", "gelu_new"))
    rope = draw_rotary(draw)
    return transformers.ModernBertConfig(
        vocab_size=VOCAB, hidden_size=dim, num_hidden_layers=4, num_attention_heads=heads,
        intermediate_size=draw.choice((12, 20)),
        max_position_embeddings=LENGTH + 3, norm_eps=eps, hidden_activation=activation,
        classifier_activation=activation,
        norm_bias=draw.choice((True, False)), attention_bias=draw.choice((True, False)),
        mlp_bias=draw.choice((True, False)),
        decoder_bias=draw.choice((True, False)), classifier_bias=draw.choice((True, False)),
        classifier_pooling=draw.choice(("cls", "mean")),
        local_attention=draw.choice((2, 5, 8, 128)), global_attn_every_n_layers=draw.choice((1, 2, 3)),
        num_labels=LABELS, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
        tie_word_embeddings=draw.choice((True, False)),
        rope_parameters={"full_attention": rope, "sliding_attention": rope | {"rope_theta": 50.0}},
    )  # fmt: skip


def draw_config(family, name, seed):
    """A tiny configuration with drawn sizes, activation and windows."""
    draw = random.Random(seed)
    heads, layers = draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    dim = heads * draw.choice((4, 8))
    eps = draw.choice((1e-5, 1e-12))
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=dim, n_layer=layers, n_head=heads, n_inner=draw.choice((None, 20)),
            n_positions=LENGTH + 3,
            layer_norm_epsilon=eps, activation_function=draw.choice(("gelu_new", "gelu", "relu")), resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0, classifier_dropout=0.0, scale_attn_weights=draw.choice((True, False)),
            scale_attn_by_inverse_layer_idx=draw.choice((True, False)),
            pad_token_id=0, bos_token_id=None, eos_token_id=None,
            num_labels=LABELS,
        )  # fmt: skip
    elif family in (*CAUSAL, "eurobert"):
        config = draw_decoder(family, draw, layers, eps)
    elif family == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=VOCAB, dim=dim, n_layers=layers, n_heads=heads, hidden_dim=draw.choice((12, 20)),
            max_position_embeddings=LENGTH + 5, activation=draw.choice(("gelu", "relu")), dropout=0.0,
            attention_dropout=0.0, qa_dropout=0.0, seq_classif_dropout=0.0, num_labels=LABELS,
        )  # fmt: skip
    elif family == "modernbert":
        config = draw_modernbert(draw, dim, heads, eps)
    elif family == "led":
        config = transformers.LEDConfig(
            vocab_size=VOCAB, d_model=dim, encoder_layers=layers, encoder_attention_heads=heads,
            encoder_ffn_dim=draw.choice((12, 20)),
            decoder_layers=1, decoder_attention_heads=heads, decoder_ffn_dim=12, max_encoder_position_embeddings=34,
            activation_function=draw.choice(("gelu", "relu")), dropout=0.0,
            attention_window=[draw.choice((4, 8, 32)) for _ in range(layers)],
        )  # fmt: skip
    else:
        # its head uses gelu whatever the config says
        lm_of_roberta = family not in ("bert", "albert", "nomic_bert", "big_bird") and name.endswith("MaskedLM")
        sizes = {
            "vocab_size": VOCAB, "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": draw.choice((12, 20)), "max_position_embeddings": LENGTH + 5,
            "type_vocab_size": draw.choice((1, 2)), "layer_norm_eps": eps, "num_labels": LABELS,
            "hidden_act": "gelu" if lm_of_roberta else draw.choice(("gelu", "gelu_new", "silu")),
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
        if family == "longformer":
            # transformers fails for a window of 2 and where one layer's window does not divide the largest; ours takes
            # any even ones it numbers the positions of its own padding as well when it is given inputs_embeds, so there
            # have to be 32
            sizes["max_position_embeddings"] = 34
            sizes["attention_window"] = [draw.choice((4, 8, 32)) for _ in range(layers)]
        if family in ROTARY:
            sizes["rope_parameters"] = draw_rotary(draw)
        if family == "electra":
            sizes["embedding_size"] = draw.choice((6, dim))
        if family == "big_bird":  # at most (5 + 2 random) blocks are computed with full attention
            random_blocks = draw.choice((1, 2, 3))
            sizes |= {"block_size": draw.choice((1, 1, 2)), "num_random_blocks": random_blocks, "sep_token_id": None}
            sizes["attention_type"] = draw.choice(("block_sparse", "block_sparse", "original_full"))
        if family == "albert":
            groups = draw.choice((1, 2, 4))
            sizes |= {
                "num_hidden_layers": 4,
                "num_hidden_groups": groups,
                "embedding_size": draw.choice((6, dim)),
                "classifier_dropout_prob": 0.0,
            }
        config = getattr(transformers, CONFIGS[family])(**sizes)
    config._attn_implementation = "eager"
    if name.endswith("QuestionAnswering"):
        config.num_labels = 2
    return config


def class_named(name):
    return next(
        layout.cls(task) for layout in LAYOUTS.values() for task, known in layout.classes.items() if known == name
    )


def drawn(name, config):
    """A model of transformers with every parameter drawn: matrices and biases around 0, norms around 1 (around 0 where
    they multiply by 1 + w).

    With norms before each sub-layer larger matrices make gradients of several hundred, in which float32 itself errs by
    1e-5.
    """
    width = 0.2 if config.model_type in (*LLAMAS, "eurobert", "modernbert") else 0.3
    dtype = torch.float64 if config.model_type in EXACT else torch.float32
    model = class_named(name)(config).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = key.endswith("weight") and parameter.ndim == 1
            parameter.normal_(1.0 if is_norm and config.model_type not in GEMMAS else 0.0, width)
    return model


def batch(family, pad, types=1, side="right"):
    """Token ids with padding of a different length in each row, and what else the family takes."""
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row, padding in enumerate((0, 3, 6)):
        mask[row, LENGTH - padding :] = 0
    mask = mask.flip(1) if side == "left" else mask
    inputs = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if family in ("bert", "roberta", "electra", *ROTARY, "longformer", "big_bird"):
        inputs["token_type_ids"] = torch.randint(types, (BATCH, LENGTH))
    if family in ("longformer", "led"):  # 1, 3 and 2 globals: neighbours within one window, and far from each other
        inputs["global_attention_mask"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        for row, positions in enumerate(((0,), (0, 4, 5), (2, 6))):
            inputs["global_attention_mask"][row, list(positions)] = 1
    return inputs


def labels_for(task, inputs):
    if task == "classification":
        return torch.randint(LABELS, (BATCH,))
    if task in ("features", "question_answering"):  # the loss of answers is in test_question_answering.py
        return None
    labels = torch.randint(LABELS if task == "token_classification" else VOCAB, (BATCH, LENGTH))
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    if task == "causal_lm":  # the first token is predicted from padding where that stands on the left
        labels[torch.arange(BATCH), inputs["attention_mask"].argmax(1)] = -100
    return labels


def run(model, embedding, inputs, labels):
    """Outputs at the tokens, the loss, and the gradient of their random mixture with respect to the embedded tokens."""
    kept = []
    hook = embedding.register_forward_hook(
        lambda _, __, y: kept.append(y.requires_grad_() if y.is_leaf else y) or y.retain_grad()
    )
    out = model(**inputs, **({} if labels is None else {"labels": labels}))
    hook.remove()
    tokens = inputs["attention_mask"].bool()
    found = {}
    if "start_logits" in out:
        out = {"logits": torch.stack([out["start_logits"], out["end_logits"]], dim=-1)}
    for name in ("logits", "last_hidden_state", "pooler_output"):
        value = out.get(name)
        if value is not None and not (name == "last_hidden_state" and "logits" in out):
            found[name] = value[tokens] if value.ndim == 3 else value
    generator = torch.Generator().manual_seed(1)
    mixture = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() for value in found.values()
    )
    if labels is not None:
        found["loss"] = out["loss"]
        mixture = mixture + out["loss"]
    mixture.backward()
    found["gradient"] = kept[0].grad[:, : tokens.shape[1]][tokens]  # transformers pads what it gives to Longformer
    return {name: value.detach() for name, value in found.items()}


def assert_agree(theirs, ours, inputs, labels, tolerance):
    """Largest difference over all results, each relative to its largest entry where that is above 1."""
    if labels is not None and ours.task == "causal_lm":
        tolerance = max(tolerance, 1e-6)  # transformers computes this loss in float32 whatever the dtype is
    expected = run(theirs, theirs.get_input_embeddings(), inputs, labels)
    actual = run(ours, ours.embeddings.token, inputs, labels)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        size = value.abs().max().item()
        assert size > 1e3 * tolerance, f"{name} is too small to tell anything: {size}"
        assert torch.isfinite(value).all()
        difference = (actual[name] - value).abs().max().item() / max(1.0, size)
        assert difference < tolerance, f"{name} differs by {difference} (largest entry {size})"


@pytest.mark.cover()
@HEADS
@pytest.mark.parametrize("seed", range(4))
def test_outputs_losses_and_gradients_equal_those_of_transformers(family, task, name, seed):
    torch.manual_seed(seed)
    theirs = drawn(name, draw_config(family, name, seed))
    ours = convert.from_transformers(theirs)
    inputs = batch(family, theirs.config.pad_token_id, getattr(theirs.config, "type_vocab_size", 1))
    assert_agree(theirs, ours, inputs, labels_for(task, inputs), tolerance_of(family))


@pytest.mark.parametrize("family", ["roberta", "longformer"])
def test_padding_that_attention_sees_has_the_position_it_has_in_transformers(family):
    name = LAYOUTS[family].classes["features"]
    theirs = drawn(name, draw_config(family, name, 1))
    ours = convert.from_transformers(theirs)
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH))
    ids[:, 4:6] = theirs.config.pad_token_id
    assert_agree(theirs, ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, tolerance_of(family))


LEFT = [(*entry, True) for entry in CLASSES if entry[0] in (*CAUSAL, "modernbert")]
# where positions are relative, none have to be given
LEFT += [(*entry[:3], False) for entry in LEFT if entry[0] != "gpt2"]


@pytest.mark.cover()
@pytest.mark.parametrize(("family", "task", "name", "with_positions"), LEFT)
def test_left_padding_equals_transformers(family, task, name, with_positions):
    config = draw_config(family, name, 5)
    if family == "modernbert":
        config.classifier_pooling = "mean"
    theirs = drawn(name, config)
    ours = convert.from_transformers(theirs)
    inputs = batch(family, 0, side="left")
    if not with_positions:
        del inputs["position_ids"]
    assert_agree(theirs, ours, inputs, labels_for(task, inputs), tolerance_of(family))


@FAMILIES
def test_inputs_embeds_and_position_ids_equal_transformers(family):
    name = LAYOUTS[family].classes["features"]
    theirs = drawn(name, draw_config(family, name, 2))
    ours = convert.from_transformers(theirs)
    inputs = batch(family, theirs.config.pad_token_id)
    del inputs["input_ids"]
    embeds = torch.randn(BATCH, LENGTH, ours.config.embed_dim, dtype=next(theirs.parameters()).dtype)
    tokens = inputs["attention_mask"].bool()
    # LED has no position_ids
    for positions in (None,) if family == "led" else (None, torch.randperm(LENGTH)[None].expand(BATCH, -1)):
        results = []
        for model in (theirs, ours):
            x = embeds.clone().requires_grad_()
            given = inputs if positions is None else {**inputs, "position_ids": positions}
            hidden = model(inputs_embeds=x, **given)["last_hidden_state"]
            (hidden[tokens] ** 3).sum().backward()
            results.append((hidden[tokens].detach(), x.grad[tokens]))
        for expected, actual in zip(*results, strict=True):
            scale = max(1.0, expected.abs().max().item())
            assert scale > 1e3 * tolerance_of(family)
            assert (expected - actual).abs().max().item() / scale < tolerance_of(family)


@pytest.mark.parametrize(("family", "name"), [("longformer", "LongformerModel"), ("led", "LEDEncoder")])
@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
def test_windows_equal_transformers_at_any_length_with_and_without_globals(family, name, length):
    theirs = drawn(name, draw_config(family, name, 3))
    ours = convert.from_transformers(theirs)
    ids = torch.randint(5, VOCAB, (2, length))
    for is_global in (
        None,
        torch.zeros(2, length, dtype=torch.long),
        (torch.rand(2, length) < 0.4).long(),
        torch.ones(2, length, dtype=torch.long),
    ):
        expected = theirs(ids, global_attention_mask=is_global).last_hidden_state
        actual = ours(ids, global_attention_mask=is_global).last_hidden_state
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_longformer_classification_makes_the_first_token_global_as_transformers_does():
    name = "LongformerForSequenceClassification"
    theirs = drawn(name, draw_config("longformer", name, 1))
    ours = convert.from_transformers(theirs)
    inputs = batch("longformer", 1)
    del inputs["global_attention_mask"]
    assert_agree(theirs, ours, inputs, labels_for("classification", inputs), 1e-5)
    local = ours(**inputs, global_attention_mask=torch.zeros(BATCH, LENGTH, dtype=torch.long)).logits
    assert (local - ours(**inputs).logits).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 3, 7, 13, 20])
@pytest.mark.parametrize("length", [1, 2, 7, 13])
def test_the_window_of_mistral_equals_transformers_at_any_length(window, length):
    config = draw_config("mistral", "MistralModel", 3)
    config.sliding_window = window
    theirs = drawn("MistralModel", config)
    ours = convert.from_transformers(theirs)
    ids = torch.randint(5, VOCAB, (2, length))
    assert_agree(theirs, ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, 1e-5)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotary_positions_far_from_the_start_equal_transformers(kind):
    """Positions up to 100,000, where frequencies that differ by rounding would turn heads visibly."""
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    more = {"default": {}, "linear": {"factor": 8.0}, "llama3": {"factor": 32.0, **frequencies},
            "yarn": {"factor": 16.0, "original_max_position_embeddings": 8192}}[kind]  # fmt: skip
    config = draw_config("llama", "LlamaModel", 0)
    config.max_position_embeddings = 131_072
    config.rope_parameters = {"rope_type": kind, "rope_theta": 500_000.0, **more}
    theirs = drawn("LlamaModel", config)
    ours = convert.from_transformers(theirs)
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH))
    positions = torch.sort(torch.randint(100_000, (BATCH, LENGTH))).values
    assert_agree(
        theirs, ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}, None, 1e-5
    )


FLOAT_LABELS = {
    "regression": (1, torch.tensor([4.0, -3.0, 2.5])),
    "several labels": (LABELS, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])),
}


@pytest.mark.parametrize(("num_labels", "labels"), FLOAT_LABELS.values(), ids=FLOAT_LABELS)
@pytest.mark.parametrize("name", [name for _, task, name in CLASSES if task == "classification"])
def test_losses_of_float_labels_equal_transformers(name, num_labels, labels):
    family = next(family for family, _, known in CLASSES if known == name)
    config = draw_config(family, name, 4)
    config.num_labels = num_labels
    theirs = drawn(name, config)
    ours = convert.from_transformers(theirs)
    inputs = batch(family, config.pad_token_id)
    assert_agree(theirs, ours, inputs, labels.to(next(theirs.parameters()).dtype), tolerance_of(family))


_DECODER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
}
BASE = {
    "distilbert": {"dropout": 0.0, "seq_classif_dropout": 0.0},
    "albert": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "classifier_dropout_prob": 0.0}, "longformer": {"attention_window": 32},
    "llama": _DECODER,
    "mistral": _DECODER | {"sliding_window": 16},
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "phi3": _DECODER | {"sliding_window": 16},
    "smollm3": _DECODER,
    "olmo2": _DECODER,
    "mixtral": _DECODER | {"num_local_experts": 4},
    "qwen3_moe": _DECODER | {"num_experts": 8, "moe_intermediate_size": 256},
    "gemma2": _DECODER | {"head_dim": 64, "query_pre_attn_scalar": 144, "sliding_window": 16},
    "gemma3_text": _DECODER | {"head_dim": 64, "sliding_window": 16},
    "modernbert": {"num_hidden_layers": 12, "local_attention": 16, "cls_token_id": None, "sep_token_id": None},
    "led": {
        "d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072,
        "decoder_layers": 1, "decoder_ffn_dim": 12,
        "decoder_attention_heads": 12, "attention_window": 32, "max_encoder_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.mark.slow
@FAMILIES
def test_base_size_equals_transformers(family):
    """12 layers, 768 wide, with the initialisation of transformers; a vocabulary of 1,000 keeps it fast."""
    layout = LAYOUTS[family]
    task = "classification" if "classification" in layout.classes else "features"
    sizes = {
        "vocab_size": 1000,
        "num_labels": LABELS,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    } | BASE.get(family, {})
    theirs = layout.cls(task)(getattr(transformers, CONFIGS[family])(**sizes)).eval()
    ours = convert.from_transformers(theirs)
    ids = torch.randint(5, 1000, (2, 77))
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    labels = torch.tensor([0, 2]) if task == "classification" else None
    assert_agree(theirs, ours, {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}, labels, 1e-5)


def test_minilm_from_the_wheel_equals_transformers_on_text():
    ours = effzoo.build("minilm", pretrained=True).eval()
    folder = convert.source_of(ours.config)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = ["A window slides over the text.", "Only a few tokens see everything, and everything sees them."]
    inputs = tokenizer(text, padding=True, return_tensors="pt")
    assert_agree(theirs, ours, dict(inputs), None, 1e-5)
