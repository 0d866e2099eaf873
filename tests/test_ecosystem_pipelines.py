"""Pipelines of transformers over folders and models of effzoo: what they say is what the model computes."""

import copy

import numpy as np
import pytest
import torch
from test_ecosystem_trainers import WORDS, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

import effzoo
import effzoo.transformers
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.lookup import Ahead, drafted
from effzoo.transformers import wrap

SMALL = {"layers": 2, "dim": 32, "heads": 4, "mlp": 48, "vocab": 60, "max_length": 64, "pad_token": 0}
TEXT = "w3 w7 w9 w1 w30"


def built(task, name="bert", **more):
    torch.manual_seed(0)
    model = effzoo.build(name, task=task, **(SMALL | {"kv_heads": 0} | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def words():
    made = tokenizer()
    made.add_special_tokens({"mask_token": "x", "sep_token": "y", "cls_token": "y"})
    return made


def ways(task, model, folder, tok=None, **given):
    """The pipeline of a folder, and that of a model that is there."""
    tok = tok or words()
    effzoo.save(model, folder, tokenizer=tok, **given)
    return [pipeline(task, model=str(folder)), pipeline(task, model=wrap(model), tokenizer=tok)]


def ids(text=TEXT):
    return words()(text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_text_classification(tmp_path):
    model = built("classification", num_labels=3, attention="longformer[window=4]")
    expected = model(ids()).logits.softmax(-1)[0]
    for number, pipe in enumerate(ways("text-classification", model, tmp_path, labels=["a", "b", "c"])):
        found = {entry["label"]: entry["score"] for entry in pipe(TEXT, top_k=None)}
        names = ["a", "b", "c"] if number == 0 else list(pipe.model.config.id2label.values())
        np.testing.assert_allclose([found[name] for name in names], expected, rtol=1e-5)
        assert len(pipe([TEXT, "w4"], batch_size=2)) == 2


@torch.no_grad()
def test_text_classification_of_numbers_and_of_several_labels_is_that_of_transformers(tmp_path):
    for number, labels in ((1, [0.5]), (3, [[0.0, 1.0, 1.0]])):
        model = built("classification", num_labels=number, types=2)
        theirs = effzoo.convert.to_transformers(model).eval()
        for one in (model, theirs):
            one(ids(), labels=torch.tensor(labels))
        wanted = pipeline("text-classification", model=theirs, tokenizer=words())(TEXT, top_k=None)
        for pipe in ways("text-classification", model, tmp_path / str(number)):
            found = [entry["score"] for entry in pipe(TEXT, top_k=None)]
            np.testing.assert_allclose(found, [entry["score"] for entry in wanted], rtol=1e-5)


@torch.no_grad()
def test_fill_mask(tmp_path):
    model = built("masked_lm")
    expected = model(ids("w3 x w9")).logits[0, 1].softmax(-1).topk(5)
    for pipe in ways("fill-mask", model, tmp_path):
        found = pipe("w3 x w9")
        assert [entry["token"] for entry in found] == expected.indices.tolist()
        np.testing.assert_allclose([entry["score"] for entry in found], expected.values, rtol=1e-5)


@torch.no_grad()
def test_feature_extraction(tmp_path):
    model = built("features")
    for pipe in ways("feature-extraction", model, tmp_path):
        np.testing.assert_allclose(pipe(TEXT), model(ids()).last_hidden_state, rtol=1e-5, atol=1e-6)
    effzoo.save(built("classification"), tmp_path / "other", tokenizer=words())
    pipe = pipeline("feature-extraction", model=str(tmp_path / "other"))
    np.testing.assert_allclose(pipe(TEXT), built("classification")(ids()).last_hidden_state, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_token_classification(tmp_path):
    model = built("token_classification", num_labels=4)
    best = model(ids()).logits.softmax(-1)[0].max(-1)
    for pipe in ways("token-classification", model, tmp_path):
        found = pipe(TEXT, ignore_labels=[])
        assert [entry["entity"] for entry in found] == [f"LABEL_{number}" for number in best.indices.tolist()]
        np.testing.assert_allclose([entry["score"] for entry in found], best.values, rtol=1e-5)


def test_text_generation(tmp_path):
    model = built("causal_lm", "gpt2", attention="longformer[window=8]")
    prompt = tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    expected = effzoo.generate(model, prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for pipe in ways("text-generation", model, tmp_path, tokenizer()):
        settings = GenerationConfig(max_new_tokens=12, do_sample=False)
        found = pipe(TEXT, generation_config=settings, return_tensors=True)
        assert found[0]["generated_token_ids"] == expected[0].tolist()
        assert pipe(TEXT, generation_config=settings)[0]["generated_text"].startswith(TEXT)
        assert len(pipe([TEXT, "w4"], max_new_tokens=3, batch_size=2)) == 2


class Seen(BaseStreamer):
    """What a streamer is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def decoder():
    """A decoder that goes on with what it has seen: prompt lookup is then right in part."""
    model = built("causal_lm", "llama")
    return model, tokenizer()(" ".join(WORDS[:6] * 3), return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("attention", ["full", "longformer[window=8]", "local[chunk=4]", "blockwise[blocks=2]"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_lookup_gives_the_text_of_greedy_decoding(attention, use_cache, monkeypatch):
    model = built("causal_lm", "gpt2", attention=attention, peft="prompt[length=2]")
    _, prompt = decoder()
    calls = []
    called = Ahead._called
    monkeypatch.setattr(Ahead, "_called", lambda self, *given: calls.append(given[1]) or called(self, *given))
    plain = wrap(model).generate(prompt, max_new_tokens=20, eos_token_id=None, use_cache=use_cache)
    drafted = wrap(model).generate(
        prompt, max_new_tokens=20, eos_token_id=None, prompt_lookup_num_tokens=3, use_cache=use_cache
    )
    assert torch.equal(plain, drafted) and len(calls) < 20, "some of the drafts were right"
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    for options in ({"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.2}):
        texts = []
        for draft in ({}, {"prompt_lookup_num_tokens": 4}):
            torch.manual_seed(5)
            texts.append(effzoo.generate(model, prompt, mask, max_new_tokens=25, eos_token_id=None, **options, **draft))
        assert torch.equal(*texts), options
    with pytest.raises(IncompatibleError, match="attention 'lsh' lets them change"):
        wrap(built("causal_lm", "gpt2", attention="lsh[chunk=4]")).generate(prompt, prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="one prompt at a time"):
        wrap(model).generate(prompt.repeat(2, 1), prompt_lookup_num_tokens=3)


def test_a_draft_is_what_followed_the_last_tokens():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 5, 1, 2]])
    assert drafted(ids, 3, 2).tolist() == [[5, 1, 2]] and drafted(ids, 1, 2).tolist() == [[5]]
    assert drafted(torch.tensor([[1, 2, 3]]), 3, 2).shape == (1, 0) and drafted(ids[:, :1], 3, 2).shape == (1, 0)
    assert drafted(torch.tensor([[7, 7]]), 3, 2).tolist() == [[7]]


def test_streamers_stop_strings_and_beams_as_in_transformers():
    model, prompt = decoder()
    outer, theirs = wrap(model), effzoo.convert.to_transformers(model)
    theirs.generation_config = copy.deepcopy(outer.generation_config)
    for given in (
        {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.5}, {"num_beams": 2, "early_stopping": True},
    ):  # fmt: skip
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 9, "pad_token_id": 0} | given
        assert torch.equal(outer.generate(prompt, **options), theirs.generate(prompt, **options)), given
    torch.manual_seed(1)
    mine = outer.generate(prompt, do_sample=True, top_p=0.9, max_new_tokens=12, eos_token_id=None)
    torch.manual_seed(1)
    assert torch.equal(mine, theirs.generate(prompt, do_sample=True, top_p=0.9, max_new_tokens=12, eos_token_id=None))
    whole = outer.generate(prompt, max_new_tokens=12, eos_token_id=None, do_sample=False)
    for given in ({}, {"prompt_lookup_num_tokens": 2}):
        streamer = Seen()
        outer.generate(prompt, max_new_tokens=12, eos_token_id=None, do_sample=False, streamer=streamer, **given)
        assert streamer.tokens == whole[0].tolist() and streamer.ended
    with pytest.raises(OptionError, match="it drafts tokens ahead"):
        outer.generate(prompt, assistant_model=theirs)


def test_a_stop_string_ends_the_text():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=plain)
    model = built("causal_lm", "gpt2", vocab=256)
    prompt = tok("a text", return_tensors="pt")["input_ids"]
    given = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False, "suppress_tokens": list(range(97, 256))}
    whole = wrap(model).generate(prompt, **given)
    stop = tok.decode(whole[0, prompt.shape[1] : prompt.shape[1] + 3])[-1]
    cut = wrap(model).generate(prompt, stop_strings=[stop], tokenizer=tok, **given)
    assert cut.shape[1] <= prompt.shape[1] + 3 and torch.equal(cut, whole[:, : cut.shape[1]])
    assert tok.decode(cut[0]).endswith(stop)
