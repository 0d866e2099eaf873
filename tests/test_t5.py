"""T5, T5 v1.1 and mT5 agree with transformers: outputs, losses, gradients and generated texts.

transformers computes the mean of an RMSNorm in float32 whatever the dtype is. Once converted, its norms are therefore
written out in float64 here, and the two agree to 1e-10; as they are, to 1e-4 of a gradient.
"""

import random

import pytest
import torch
import transformers
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5

import effzoo
from effzoo import convert
from effzoo.convert.layouts import LAYOUTS
from effzoo.errors import ConversionError

VOCAB, N, M = 37, 13, 7
KINDS = ("t5", "t5 v1.1", "mt5")
NAMES = {"t5": "T5", "t5 v1.1": "T5", "mt5": "MT5"}


def their_config(kind, draw, **more):
    own = {"t5": {"feed_forward_proj": draw.choice(("relu", "gelu_new", "silu"))}, "mt5": {}}.get(
        kind, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    )
    return getattr(transformers, f"{NAMES[kind]}Config")(**{
        "vocab_size": VOCAB, "d_model": draw.choice((12, 16)), "d_kv": draw.choice((4, 6)),
        "d_ff": draw.choice((12, 20)), "num_layers": 2, "num_decoder_layers": draw.choice((1, 2)),
        "num_heads": draw.choice((1, 2, 3)), "relative_attention_num_buckets": draw.choice((8, 12)),
        "relative_attention_max_distance": draw.choice((9, 20)), "dropout_rate": 0.0, "decoder_start_token_id": 0,
        "pad_token_id": 0, **own, **more,
    })  # fmt: skip


def drawn(kind, config, body=False):
    name = f"{NAMES[kind]}{'Model' if body else 'ForConditionalGeneration'}"
    model = getattr(transformers, name)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(2, VOCAB, (3, N), generator=draw), torch.randint(2, VOCAB, (3, M), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 5:] = 0, 0
    labels[1, 4:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def exact(monkeypatch):
    """Their norms in the dtype of their input."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def write_out():
        monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", norm)
        monkeypatch.setattr(modeling_mt5.MT5LayerNorm, "forward", norm)

    return write_out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_losses_and_gradients_equal_those_of_transformers_and_back(kind, seed, exact):
    torch.manual_seed(seed)
    theirs = drawn(kind, their_config(kind, random.Random(seed)))
    ours, given = convert.from_transformers(theirs), batch(seed)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=1e-4, atol=1e-4)
    again = convert.to_transformers(ours)
    assert type(again) is type(theirs) and torch.equal(again(**given).logits, theirs(**given).logits)
    said, meant = again.config.to_diff_dict(), theirs.config.to_diff_dict()
    assert {key: said.get(key) for key in meant} == meant
    exact()
    there, here = theirs(**given), ours(**given)
    for a, b in ((there.logits, here.logits), (there.loss, here.loss)):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
    there.loss.backward()
    here.loss.backward()
    mine, compared = dict(ours.named_parameters()), 0
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for rule in LAYOUTS[ours.config.layout].rules(ours.config, "seq2seq_lm", "seq2seq_lm"):
        if (key := rule.key("weight")) in gradients:
            torch.testing.assert_close(mine[f"{rule.ours[0]}.weight"].grad, gradients[key], rtol=0, atol=1e-10)
            compared += 1
    assert compared == len(gradients)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 1.5, "min_new_tokens": 4}])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_that_of_transformers(kind, options, exact):
    torch.manual_seed(3)
    theirs = drawn(kind, their_config(kind, random.Random(3), num_decoder_layers=2))
    ours, (ids, mask, _) = convert.from_transformers(theirs), batch().values()
    exact()
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=10, **options)
    for use_cache in (True, False):
        found = effzoo.generate(ours, ids, mask, max_new_tokens=10, use_cache=use_cache, **options)
        assert torch.equal(found, expected)


def test_a_body_a_folder_and_other_sizes(tmp_path):
    torch.manual_seed(4)
    theirs = drawn("t5", their_config("t5", random.Random(4)), body=True)
    given = batch()
    given["decoder_input_ids"] = given.pop("labels").clamp(min=0)
    ours = convert.from_transformers(theirs)
    torch.testing.assert_close(ours(**given).last_hidden_state, theirs(**given)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(convert.to_transformers(ours)(**given)[0], theirs(**given)[0])
    theirs.save_pretrained(tmp_path)
    read = effzoo.build(pretrained=tmp_path, dtype="auto", attention="longformer[window=64]", max_length=2048).eval()
    torch.testing.assert_close(read(**given).last_hidden_state, ours(**given).last_hidden_state, rtol=0, atol=1e-10)
    assert read.config.max_length == 2048 and ours.config.max_length == 512


def test_a_head_of_its_own_is_read_and_not_written():
    torch.manual_seed(5)
    theirs = drawn("t5 v1.1", their_config("t5 v1.1", random.Random(5)))
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    ours = convert.from_transformers(theirs)
    assert not ours.config.tied
    torch.testing.assert_close(ours(**batch()).logits, theirs(**batch()).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConversionError, match="transformers ties the head of a T5"):
        convert.to_transformers(ours)


def test_one_dropout_and_no_other_field():
    config = their_config("t5", random.Random(6), dropout_rate=0.2)
    ours = convert.from_transformers(transformers.T5ForConditionalGeneration(config))
    made = ours.config
    assert made.dropout == made.attention_dropout == made.activation_dropout == made.final_dropout == 0.2
    places = [module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout)]
    # embeddings, the end and two or three sub-layers' of each stack, and hidden units
    assert set(places) == {0.2} and len(places) == 2 * 2 + 2 * (made.layers + made.stacks["j"])
    other = effzoo.build("t5", task="seq2seq_lm", layers=1, dim=8, heads=1, head_dim=8, mlp=8, vocab=9, dropout=0.3)
    with pytest.raises(ConversionError, match="has one dropout, got dropout=0.3 and attention_dropout=0.1"):
        convert.to_transformers(other)
    with pytest.raises(ConversionError, match="no gated exact gelu"):
        sizes = {"layers": 1, "dim": 8, "heads": 1, "head_dim": 8, "mlp": 8, "vocab": 9, "activation": "gelu"}
        convert.to_transformers(effzoo.build("t5", task="seq2seq_lm", gated=True, **sizes))
    strange = transformers.T5Config(**their_config("t5", random.Random(6)).to_dict() | {"strange": 3})
    with pytest.raises(ConversionError, match="strange=3"):
        convert.from_transformers(transformers.T5ForConditionalGeneration(strange))
