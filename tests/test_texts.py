"""Where a text ends, and how a model is asked to continue one, survive every conversion, and `generate` starts from
them."""

import logging

import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.errors import OptionError

SIZES = {"vocab_size": 53, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.5}
SETTINGS = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 7,
    "repetition_penalty": 1.2,
    "max_new_tokens": 9,
}


def theirs(generation=None, **tokens):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, **{"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0} | tokens)
    ).eval()
    model.generation_config.update(**generation or {})
    return model


@pytest.mark.parametrize(
    ("generation", "tokens"),
    [
        (SETTINGS, {}),
        ({}, {"eos_token_id": list(range(20, 45)), "pad_token_id": None}),
        ({"eos_token_id": [7, 9, 30], "pad_token_id": 3}, {"eos_token_id": 5}),
        (
            {"forced_eos_token_id": 4, "max_new_tokens": 5, "do_sample": True, "top_k": 0, "top_p": 0.9},
            {"eos_token_id": None},
        ),
        ({"num_beams": 3, "length_penalty": 0.3, "suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [8]}, {}),
    ],
)
def test_generation_is_that_of_the_converted_model_and_comes_back(generation, tokens, tmp_path):
    """From a live model and from its folder: the same text from the same random state, here and in the model given
    back."""
    model, ids = theirs(generation, **tokens), torch.randint(10, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    texts = []
    for source in (model, tmp_path):
        ours = convert.from_transformers(source)
        back = convert.to_transformers(ours)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            assert getattr(back.config, name) == getattr(model.config, name)
            assert getattr(back.generation_config, name) == getattr(model.generation_config, name)
        assert back.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
        for step in (model.generate, lambda ids, **options: effzoo.generate(ours, ids), back.generate):  # noqa: B023
            torch.manual_seed(5)
            texts.append(step(ids, attention_mask=torch.ones_like(ids)))
    assert all(torch.equal(texts[0], text) for text in texts)


def test_other_tasks_and_heads_keep_the_tokens():
    config = transformers.RobertaConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, bos_token_id=4, eos_token_id=[5, 6], pad_token_id=1,
    )  # fmt: skip
    ours = convert.from_transformers(transformers.RobertaForSequenceClassification(config))
    assert (ours.config.bos_token, ours.config.eos_token) == (4, (5, 6))
    back = convert.to_transformers(ours).config
    assert (back.bos_token_id, back.eos_token_id) == (4, [5, 6])


def test_weights_loaded_into_a_zoo_model_bring_their_texts_along_unless_given(caplog):
    model = theirs(SETTINGS, eos_token_id=[7, 9])
    sizes = {"dim": 16, "layers": 1, "heads": 2, "mlp": 64, "vocab": 53, "max_length": 40}
    ours = effzoo.build("gpt2", task="causal_lm", pretrained=model, **sizes)
    assert (ours.config.eos_token, ours.config.bos_token, ours.config.pad_token) == ((7, 9), 1, 0)
    with caplog.at_level(logging.INFO, logger="effzoo.generate"):
        effzoo.generate(ours, torch.ones(1, 3, dtype=torch.long), top_k=5)
    assert "temperature=0.7" in caplog.text and "top_k" not in caplog.text
    given = effzoo.build("gpt2", task="causal_lm", pretrained=model, eos_token=11, generation={}, **sizes)
    assert (given.config.eos_token, given.config.generation) == (11, {})
    assert effzoo.build("gpt2").config.eos_token == 50256
    assert effzoo.build("llama", **{**sizes, "kv_heads": 1, "eos_token": [3, 4]}).config.eos_token == (3, 4)


def test_adapters_swaps_and_new_rows_leave_the_texts_as_they_are(tmp_path):
    ours = convert.from_transformers(theirs(SETTINGS, eos_token_id=[7, 9]))
    effzoo.attach(ours, "lora[rank=2]")
    effzoo.save_adapter(ours, tmp_path)
    fresh = effzoo.load_adapter(convert.from_transformers(theirs(SETTINGS, eos_token_id=[7, 9])), tmp_path)
    effzoo.merge(ours, "default", undo=False)
    generation = ours.config.generation
    effzoo.swap_attention(ours, "longformer[window=4]")
    effzoo.resize_vocabulary(ours, 60)
    for model in (fresh, ours):
        assert model.config.eos_token == (7, 9) and model.config.generation == generation and generation["top_k"] == 7


def test_settings_that_have_no_meaning_here_are_named(tiny):
    ids = torch.ones(1, 3, dtype=torch.long)
    model = effzoo.build(
        "gpt2",
        task="causal_lm",
        **tiny,
        generation={"penalty_alpha": 0.6, "cache_implementation": "hybrid", "max_length": 10**6},
    )
    with pytest.raises(
        OptionError, match=r"generation settings have penalty_alpha=0.6.*penalty_alpha=None goes on without"
    ):
        effzoo.generate(model, ids)
    assert effzoo.generate(model, ids, penalty_alpha=None, max_new_tokens=2).shape == (1, 5)
    assert effzoo.generate(model, ids, penalty_alpha=None, eos_token_id=None).shape == (1, model.config.max_length)
