"""Generation: with and without a cache the same text and the same logits, in every strategy, and as transformers
generates with the same weights."""

from functools import partial

import pytest
import torch
import transformers

import effzoo
from effzoo import convert, generation
from effzoo.errors import IncompatibleError, InputError, OptionError

KINDS = [
    "full",
    "longformer[window=6]",
    "longformer[window=4,dilation=(1,2)]",
    "local[chunk=4]",
    "streaming[window=4,sinks=2]",
    "lsh[chunk=4,stable=true]",
    "linear",
    "performer[features=6]",
]
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


def build(tiny, attention="full", **more):
    model = effzoo.build("gpt2", attention=attention, task="causal_lm", **tiny, **more).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)  # so that the distribution is far from uniform
    return model


def prompts():
    mask = (torch.arange(9) >= torch.tensor([0, 4, 2])[:, None]).long()
    return torch.randint(1, 53, (3, 9)) * mask, mask


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("attention", KINDS)
def test_a_cache_changes_speed_and_nothing_else(attention, strategy, tiny):
    """Logits to 1e-10 in float64, and so the same tokens, for padded prompts of different length."""
    model, (ids, mask) = build(tiny, attention), prompts()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        options = {"max_new_tokens": 15, "output_logits": True, "return_dict_in_generate": True, **STRATEGIES[strategy]}
        found.append(effzoo.generate(model, ids, mask, use_cache=use_cache, **options))
    assert torch.equal(found[0].sequences, found[1].sequences) and found[0].sequences.shape[1] == 9 + 15
    assert len(found[0].logits) == 15
    for cached, plain in zip(found[0].logits, found[1].logits, strict=True):
        assert (cached - plain).abs().max() < 1e-10
    assert not torch.equal(found[0].sequences[0], found[0].sequences[-1])


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_gpt2_generates_what_transformers_generates(strategy):
    config = transformers.GPT2Config(
        vocab_size=53,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=40,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours, (ids, mask) = convert.from_transformers(theirs), prompts()
    options = {"max_new_tokens": 20, "eos_token_id": 7, "pad_token_id": 0, **STRATEGIES[strategy]}
    assert torch.equal(
        effzoo.generate(ours, ids, mask, **options), theirs.generate(ids, attention_mask=mask, **options)
    )


class Even(transformers.LogitsProcessor):
    """Only even tokens."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, float("-inf"))


class Streamed(list):
    """Keeps what is streamed."""

    def put(self, value):
        self.append(value.tolist())

    def end(self):
        self.append("end")


OPTIONS = [
    {"do_sample": True}, {"do_sample": True, "temperature": 0.7, "top_k": 5, "num_return_sequences": 3},
    {"do_sample": True, "min_p": 0.05},
    {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.01},
    {"do_sample": True, "eta_cutoff": 0.01, "renormalize_logits": True},
    {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": -1.0, "num_return_sequences": 4},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "num_beams": 2}, {"bad_words_ids": [[5], [7, 8]]},
    {"min_new_tokens": 6, "eos_token_id": [7, 9, 11, 3]},
    {"forced_eos_token_id": 4, "max_new_tokens": 5}, {"sequence_bias": [[[3], 4.0], [[8, 9], -9.0]]},
    {"suppress_tokens": [1, 2, 3]},
    {"begin_suppress_tokens": list(range(0, 52, 2))}, {"exponential_decay_length_penalty": (2, 1.5)},
    {"remove_invalid_values": True},
    {"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 2},
    {"min_length": 15, "max_length": 18, "max_new_tokens": None},
    {"logits_processor": transformers.LogitsProcessorList([Even()]), "num_beams": 2},
    {"prefix_allowed_tokens_fn": lambda _, ids: [3, 4, int(ids[-1])]},
    {"stopping_criteria": transformers.StoppingCriteriaList([lambda ids, scores: ids[:, -1] > 25])},
    {"watermarking_config": {"bias": 3.0}},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_every_option_does_what_it_does_in_transformers(options):
    """Padded prompts, with and without a cache, and samples from the same state of the random generator."""
    config = transformers.GPT2Config(
        vocab_size=53,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=40,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.5,
    )
    theirs, (ids, mask) = transformers.GPT2LMHeadModel(config).double().eval(), prompts()
    options = {"max_new_tokens": 12, "eos_token_id": 7, "pad_token_id": 0} | options
    found = []
    for step in (
        theirs.generate,
        *(partial(effzoo.generate, convert.from_transformers(theirs), use_cache=cache) for cache in (True, False)),
    ):
        torch.manual_seed(3)
        found.append(step(ids, attention_mask=mask, **options))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_scores_streams_and_strings_are_those_of_transformers():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=53, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    ).eval()
    ours, ids = convert.from_transformers(theirs), torch.randint(1, 53, (1, 6))
    options = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    theirs.generation_config.eos_token_id = theirs.generation_config.bos_token_id = None
    expected, found = theirs.generate(ids, pad_token_id=0, **options), effzoo.generate(ours, ids, **options)
    assert torch.equal(expected.beam_indices, found.beam_indices) and torch.allclose(
        expected.sequences_scores, found.sequences_scores, atol=1e-5
    )
    for name in ("scores", "logits"):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected[name], found[name], strict=True))
    streams = Streamed(), Streamed()
    theirs.generate(ids, pad_token_id=0, max_new_tokens=4, streamer=streams[0])
    effzoo.generate(ours, ids, max_new_tokens=4, streamer=streams[1])
    assert streams[0] == streams[1] and len(streams[0]) == 6


ALONE = [
    *KINDS, "local[chunk=4,look_back=2,circular=true]", "lsh[chunk=4]", "lsh[chunk=4,circular=true,count_once=true]",
    "blockwise", "blockwise[blocks=9,block=5]",
]  # fmt: skip
MODELS = {
    "learned": {}, "sinusoidal": {"positions": "sinusoidal"},
    "axial": {"positions": "axial", "axial_shape": (8, 8), "axial_dims": (6, 10)},
    "rotary": {"positions": "rotary", "kv_heads": 1}, "reversible": {"residual": "reversible", "tied": False},
    "adapters": {"peft": "prefix[length=3]|prompt[length=2]|lora"}, "offset": {"position_offset": 2, "pad_token": 1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "model"),
    [
        *((kind, "learned") for kind in ALONE),
        *((kind, model) for kind in ALONE[2:7] for model in MODELS if model != "learned"),
    ],
)
def test_a_row_gives_what_it_gives_alone_whatever_stands_in_front(attention, model, tiny):
    """The same tokens, and the logits of the forward pass without padding to 1e-10."""
    model, (ids, mask) = build(tiny, attention, **MODELS[model]), prompts()
    ids = torch.where(mask.bool(), ids, torch.randint_like(ids, 2, 53))  # whatever the padding is
    for cache in (True, False) if next(iter(model.cores())).decodes() else (False,):
        options = {"max_new_tokens": 6, "use_cache": cache, "output_logits": True, "return_dict_in_generate": True}
        together = effzoo.generate(model, ids, mask, **options)
        beams = effzoo.generate(model, ids, mask, num_beams=2, **options)
        for row in range(len(ids)):
            own = ids[row, mask[row].bool()][None]
            alone = effzoo.generate(model, own, **options)
            of_beams = effzoo.generate(model, own, num_beams=2, **options)
            assert torch.equal(alone.sequences[0, -6:], together.sequences[row, -6:])
            assert torch.equal(of_beams.sequences[0, -6:], beams.sequences[row, -6:])
            assert all(
                torch.allclose(a[0], b[row], rtol=0, atol=1e-5)
                for a, b in zip(alone.logits, together.logits, strict=True)
            )
            with torch.no_grad():
                exact = generation.Rows(model, ids, mask, None, cache).logits(ids)[row]
                assert (exact - model.eval()(own).logits[0, -1]).abs().max() < 1e-10


def test_global_tokens_of_the_prompt_and_prompts_and_prefixes_act(tiny):
    ids, mask = prompts()
    is_global = torch.zeros_like(ids)
    is_global[:, 5] = 1
    model = effzoo.attach(build(tiny, "longformer[window=4]"), "prefix[length=3]|prompt[length=2]")
    outs = [
        effzoo.generate(model, ids, mask, global_attention_mask=is_global, use_cache=cache, max_new_tokens=10)
        for cache in (True, False)
    ]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], effzoo.generate(model, ids, mask, max_new_tokens=10))


def test_the_model_is_left_as_it_was(tiny):
    model, (ids, mask) = build(tiny).train(), prompts()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    effzoo.generate(model, ids, mask, max_new_tokens=3)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_generated_says_so(tiny):
    ids, mask = prompts()
    with pytest.raises(IncompatibleError, match="build it with task='causal_lm'"):
        effzoo.generate(effzoo.build("bert", **tiny), ids)
    with pytest.raises(IncompatibleError, match="decode with circular=false, or without a cache"):
        effzoo.generate(build(tiny, "local[chunk=4,circular=true,look_forward=1]"), ids)
    model = build(tiny)
    with pytest.raises(InputError, match="pad prompts at the front"):
        effzoo.generate(model, ids, mask.flip(1))
    with pytest.raises(
        InputError,
        match="0 positions are left of max_length 64; shorten the prompt of 64, or build with a larger max_length",
    ):
        effzoo.generate(model, torch.full((1, 64), 5), max_new_tokens=1)
    with pytest.raises(InputError, match="55 positions are left of max_length 64; set max_new_tokens=55"):
        effzoo.generate(model, ids, mask, max_new_tokens=100)
    with pytest.raises(OptionError, match="no option 'temprature'"):
        effzoo.generate(model, ids, mask, temprature=0.5)
    with pytest.raises(OptionError, match="cannot decode with temperature=-1"):
        effzoo.generate(model, ids, mask, temperature=-1.0, do_sample=True)


def test_every_option_that_transformers_knows_is_taken_or_refused_by_name(tiny):
    model, ids = build(tiny), torch.randint(1, 53, (1, 4))
    known = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")} - {"use_cache"}
    called = {
        "assistant_model",
        "custom_generate",
        "negative_prompt_ids",
        "inputs_embeds",
        "past_key_values",
        "synced_gpus",
        "generation_config",
    }
    for name in sorted((known | called) - generation.OPTIONS):
        with pytest.raises(OptionError, match=f"takes no {name}="):
            effzoo.generate(model, ids, **{name: 3})
        assert effzoo.generate(model, ids, max_new_tokens=1, **{name: None}).shape == (1, 5)
    assert known >= generation.OPTIONS


def test_text_in_float32_is_that_of_the_forward_pass_to_rounding(tiny):
    """A decoder reads its weights another way than a forward pass (effzoo.sites.dtypes.decoding): the scores differ by
    rounding alone."""
    model, (ids, _) = effzoo.build("gpt2", task="causal_lm", peft="lora[rank=2]", **tiny).eval(), prompts()
    out = effzoo.generate(
        model, ids, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    with torch.no_grad():
        expected = model(out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
        exact = model.double()(out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert (torch.stack(out.logits, dim=1) - exact).abs().max() <= 4 * (expected - exact).abs().max()
