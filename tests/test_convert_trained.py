"""Which tensors are trainable goes along with a model that is converted, in both directions, tensor by tensor."""

import pytest
import torch
import transformers
from support import small
from test_convert import CLASSES, HEADS, theirs, zoo
from test_parity_reformer import theirs as reformer

from effzoo import convert
from effzoo.convert.layouts import LAYOUTS
from effzoo.errors import ConversionError

FUSED = {  # of which one tensor of theirs is several of ours
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": (
            "blocks.0.attn.q.weight",
            "blocks.0.attn.k.weight",
            "blocks.0.attn.v.weight",
        )
    },
    "modernbert": {
        "model.layers.0.attn.Wqkv.weight": (
            "blocks.0.attn.q.weight",
            "blocks.0.attn.k.weight",
            "blocks.0.attn.v.weight",
        )
    },
}


def flags(model):
    return {key: p.requires_grad for key, p in model.named_parameters(remove_duplicate=False)}


def every_other(model):
    """Freeze every second tensor."""
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 2 == 1)
    return model


@HEADS
def test_theirs_to_ours_and_back(family, task, name):
    model = every_other(theirs(family, name, num_labels=2 if name.endswith("QuestionAnswering") else 3))
    unread = LAYOUTS[family].unread
    for key, p in model.named_parameters():
        p.requires_grad_(key in unread or p.requires_grad)  # ours has no such tensors
    ours = convert.from_transformers(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen > 0 and sum(p.numel() for p in ours.parameters() if not p.requires_grad) == frozen
    assert flags(convert.to_transformers(ours)) == flags(model)


@pytest.mark.parametrize(
    "name", ["ReformerModelWithLMHead", "PerceiverForMaskedLM", "PerceiverForSequenceClassification"]
)
def test_reformers_and_perceivers_too(name):
    sizes = {
        "vocab_size": 41, "d_model": 8, "d_latents": 8, "num_latents": 4, "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": 16,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    model = (
        reformer(name, "mixed")
        if "Reformer" in name
        else getattr(transformers, name)(transformers.PerceiverConfig(**sizes)).eval()
    )
    every_other(model)
    if "lm_head.decoder.bias" in flags(model):  # from 5.24 on, of which there is one here
        model.lm_head.bias.requires_grad_(model.lm_head.decoder.bias.requires_grad)
    ours = convert.from_transformers(model)
    assert 0 < sum(p.requires_grad for p in ours.parameters()) < len(list(ours.parameters()))
    assert flags(convert.to_transformers(ours)) == flags(model)


@pytest.mark.parametrize("family", FUSED)
def test_parts_of_one_tensor_learn_as_it_does(family):
    name = next(name for known, task, name in CLASSES if known == family and task in ("causal_lm", "masked_lm"))
    model = theirs(family, name)
    for key, parts in FUSED[family].items():
        model.get_parameter(key).requires_grad_(False)
        ours = convert.from_transformers(model)
        assert {part for part, flag in flags(ours).items() if not flag} == set(parts)
        ours.get_parameter(parts[1]).requires_grad_(True)
        with pytest.raises(
            ConversionError, match=rf"of which {parts[0]}, {parts[2]} is frozen .* and {parts[1]} is not: freeze all"
        ):
            convert.to_transformers(ours)


def test_copies_learn_as_what_they_are_copied_from_and_what_is_new_learns():
    model = theirs("bert")
    model.requires_grad_(False)
    model.encoder.layer[1].attention.self.query.requires_grad_(True)
    ours = convert.from_transformers(model, task="classification", attention="longformer[window=4]")
    told = flags(ours)
    assert (
        not told["blocks.0.attn.q_global.weight"]
        and told["blocks.1.attn.q_global.weight"]
        and not told["blocks.1.attn.v_global.weight"]
    )
    assert {key for key, flag in told.items() if flag and not key.startswith("head.out")} == {
        f"blocks.1.attn.{q}.{parameter}" for q in ("q", "q_global") for parameter in ("weight", "bias")
    }
    assert told["head.out.weight"]
    compressed = flags(convert.from_transformers(model, attention=small("linformer")))
    assert {key for key, flag in compressed.items() if flag and ".q." not in key} == {
        key for key in compressed if ".attn.core." in key
    }
    model.encoder.layer[0].output.requires_grad_(True)
    experts = {
        key
        for key, flag in flags(convert.from_transformers(model, experts=2, router="soft")).items()
        if flag and "mlp" in key
    }
    assert experts == {
        key for key in experts if "mlp.router" in key or "blocks.0.mlp_norm" in key or "blocks.0.mlp.experts" in key
    }
    assert {f"blocks.0.mlp.experts.{number}.down.weight" for number in range(2)} < experts


def test_a_tied_table_is_one_tensor_and_copies_of_it_have_to_agree(tmp_path):
    model = theirs("gpt2", "GPT2LMHeadModel")
    model.transformer.wte.weight.requires_grad_(False)
    ours = convert.from_transformers(model)
    back = convert.to_transformers(ours)
    assert not ours.embeddings.token.weight.requires_grad and back.lm_head.weight is back.transformer.wte.weight
    assert flags(back) == flags(model) and not flags(back)["lm_head.weight"]
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    with pytest.raises(
        ConversionError, match="lm_head.weight and transformer.wte.weight, which hold the same, one is frozen"
    ):
        convert.from_transformers(model)


def test_loading_into_a_model_leaves_what_it_trains(tiny):
    model = zoo("bert", tiny)
    source = convert.to_transformers(every_other(zoo("bert", tiny)))
    model.embeddings.token.weight.requires_grad_(False)
    before = flags(model)
    convert.load_pretrained(model, source)
    assert flags(model) == before and flags(source) != flags(convert.to_transformers(model))
