"""Generation: with and without a cache the same text and the same logits, in every strategy, and as transformers generates with the same weights."""

import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.errors import IncompatibleError, InputError, OptionError

KINDS = ["full", "longformer[window=6]", "longformer[window=4,dilation=(1,2)]", "local[chunk=4]", "lsh[chunk=4,stable=true]"]
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
        vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours, (ids, mask) = convert.from_transformers(theirs), prompts()
    options = {"max_new_tokens": 20, "eos_token_id": 7, "pad_token_id": 0, **STRATEGIES[strategy]}
    assert torch.equal(effzoo.generate(ours, ids, mask, **options), theirs.generate(ids, attention_mask=mask, **options))


def test_global_tokens_of_the_prompt_and_prompts_and_prefixes_act(tiny):
    ids, mask = prompts()
    is_global = torch.zeros_like(ids)
    is_global[:, 5] = 1
    model = effzoo.attach(build(tiny, "longformer[window=4]"), "prefix[length=3]|prompt[length=2]")
    outs = [effzoo.generate(model, ids, mask, global_attention_mask=is_global, use_cache=cache, max_new_tokens=10) for cache in (True, False)]
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
    with pytest.raises(IncompatibleError, match="'blockwise' keeps no cache for decoding; generate with use_cache=False"):
        effzoo.generate(build(tiny, "blockwise"), ids)
    model = build(tiny)
    with pytest.raises(InputError, match="pad prompts at the front"):
        effzoo.generate(model, ids, mask.flip(1))
    with pytest.raises(InputError, match="55 positions are left of max_length 64; set max_new_tokens=55"):
        effzoo.generate(model, ids, mask, max_new_tokens=100)
    with pytest.raises(OptionError, match="no option 'temprature'"):
        effzoo.generate(model, ids, mask, temprature=0.5)
