"""LED with its decoder: equal to transformers in float64 (outputs, losses, gradients, generation), both ways.

transformers computes the softmax of its encoder in float32 whatever the dtype is; here it is given that of the dtype.
"""

import random

import pytest
import torch
import transformers
from test_encoder_decoder import VOCAB, batch, drawn

import effzoo
from effzoo import convert
from effzoo.attention.core import Cache
from effzoo.convert.layouts import LAYOUTS
from effzoo.errors import ConversionError, IncompatibleError, InputError, OptionError


@pytest.fixture(autouse=True)
def softmax_of_the_dtype(monkeypatch):
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def led_config(draw, **more):
    heads, layers = draw.choice((1, 2)), draw.choice((2, 3))
    return transformers.LEDConfig(**{
        "vocab_size": VOCAB, "d_model": 8 * heads, "encoder_layers": layers, "decoder_layers": draw.choice((1, 2)),
        "encoder_attention_heads": heads, "decoder_attention_heads": draw.choice((heads, 2 * heads)),
        "encoder_ffn_dim": 12, "decoder_ffn_dim": draw.choice((12, 20)), "max_encoder_position_embeddings": 40,
        "max_decoder_position_embeddings": 24, "attention_window": [draw.choice((4, 8)) for _ in range(layers)],
        "activation_function": draw.choice(("gelu", "relu")), "dropout": 0.0, "activation_dropout": 0.2,
        "pad_token_id": draw.choice((0, 1)), "decoder_start_token_id": draw.choice((2, 3)), **more,
    })  # fmt: skip


def headed(seed, **more):
    torch.manual_seed(seed)
    return drawn(transformers.LEDForConditionalGeneration, led_config(random.Random(seed), **more))


def marked(seed):
    """A batch whose rows have one, three and no global tokens, and padding behind the tokens."""
    given = batch(seed)
    given["attention_mask"][1, :4], given["attention_mask"][1, 9:] = 1, 0
    given["global_attention_mask"] = torch.zeros_like(given["input_ids"])
    given["global_attention_mask"][0, 0] = given["global_attention_mask"][1, [0, 3, 4]] = 1
    return given


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_losses_and_gradients_equal_those_of_transformers_and_back(seed):
    theirs, given = headed(seed), marked(seed)
    ours = convert.from_transformers(theirs)
    there, here = theirs(**given), ours(**given)
    tokens = given["attention_mask"].bool()
    assert_close(here.encoder_last_hidden_state[tokens], there.encoder_last_hidden_state[tokens])
    assert_close(here.logits, there.logits)
    assert_close(here.loss, there.loss)
    there.loss.backward()
    here.loss.backward()
    mine, compared = dict(ours.named_parameters()), 0
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for rule in LAYOUTS["led_seq2seq"].rules(ours.config, "seq2seq_lm", "seq2seq_lm"):
        for parameter in rule.parameters:
            if rule.key(parameter) in gradients:
                assert_close(mine[f"{rule.ours[0]}.{parameter}"].grad, gradients[rule.key(parameter)])
                compared += 1
    assert compared == len(gradients)
    back = convert.to_transformers(ours)
    assert type(back) is type(theirs) and torch.equal(back(**given).logits, there.logits)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.state_dict().items())
    said, meant = back.config.to_diff_dict(), theirs.config.to_diff_dict()
    assert {key: said.get(key) for key in meant} == meant


@pytest.mark.parametrize("n", [1, 5, 8, 13])
def test_any_length_with_and_without_globals(n):
    theirs = headed(3)
    ours, ids = convert.from_transformers(theirs), torch.randint(6, VOCAB, (2, n))
    for marks in (None, torch.zeros_like(ids), (torch.rand(2, n) < 0.4).long(), torch.ones_like(ids)):
        given = {"input_ids": ids, "global_attention_mask": marks, "decoder_input_ids": ids[:, :4]}
        assert_close(ours(**given).logits, theirs(**given).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 2.0}, {"no_repeat_ngram_size": 2}])
def test_generation_equals_that_of_transformers_with_a_cache_and_without(options):
    theirs, given = headed(28, pad_token_id=1), marked(28)
    ours, ids = convert.from_transformers(theirs), given.pop("input_ids")
    del given["labels"]
    expected = theirs.generate(ids, **given, max_new_tokens=9, **options)
    assert len({tuple(row) for row in expected.tolist()}) > 1, "rows that say the same compare little"
    for use_cache in (True, False):
        assert torch.equal(
            effzoo.generate(ours, ids, **given, max_new_tokens=9, use_cache=use_cache, **options), expected
        )
    wrapped = effzoo.transformers.wrap(ours)
    assert torch.equal(wrapped.generate(ids, **given, max_new_tokens=9, **options), expected)
    with pytest.raises(InputError, match="of max_length 24"):  # of the target, not of the source
        effzoo.generate(ours, ids, **given, max_new_tokens=30)


def test_a_target_is_written_in_steps_as_at_once():
    ours, given = convert.from_transformers(headed(2)), marked(2)
    target = ours.shifted(given.pop("labels"))
    with torch.no_grad():
        whole, cache = ours(**given, decoder_input_ids=target), Cache()
        read = {"attention_mask": given["attention_mask"], "encoder_outputs": whole, "cache": cache}
        parts = [ours(decoder_input_ids=piece, **read).logits for piece in target.split([1, 2, 4], dim=1)]
    assert_close(torch.cat(parts, dim=1), whole.logits)


@pytest.mark.parametrize("saved", [False, True])
def test_the_task_or_the_architecture_says_whether_the_encoder_is_taken_alone(saved, tmp_path):
    theirs, given = headed(4, activation_dropout=0.0), marked(4)
    theirs.save_pretrained(tmp_path)
    source = tmp_path if saved else theirs
    expected = theirs(**given)
    del given["labels"]
    body = convert.from_transformers(source, task="features")
    assert (body.config.layout, body.config.max_length, body.config.decoder_max_length) == ("led_seq2seq", 40, 24)
    alone = convert.from_transformers(source, architecture="encoder")
    assert (alone.task, alone.config.layout, alone.config.max_length) == ("features", "led", 40)
    tokens = given["attention_mask"].bool()
    assert_close(alone(**given).last_hidden_state[tokens], expected.encoder_last_hidden_state[tokens])
    sorted_out = convert.from_transformers(source, task="classification", num_labels=3)
    assert sorted_out.config.layout == "led" and sorted_out(**given).logits.shape == (3, 3)
    with pytest.raises(OptionError, match="architecture"):
        convert.from_transformers(theirs.get_encoder(), architecture="encoder-decoder")
    with pytest.raises(IncompatibleError, match="is for an encoder-decoder"):
        convert.from_transformers(theirs.get_encoder(), task="seq2seq_lm")


def test_a_folder_is_read_by_name_and_with_other_lengths(tmp_path):
    theirs, given = headed(5, encoder_layers=2, attention_window=[4, 4]), marked(5)
    theirs.save_pretrained(tmp_path)
    read = effzoo.build(pretrained=tmp_path, dtype="auto", max_length=60, decoder_max_length=30).eval()
    assert_close(read(**given).logits, theirs(**given).logits)
    table = read.decoder.embeddings.position.weight
    assert (
        len(table) == 30 and torch.equal(table[24:], table[:6]) and len(read.encoder.embeddings.position.weight) == 60
    )
    told, of = theirs.config, read.config
    names = ("vocab", "dim", "layers", "heads", "mlp", "decoder_layers", "decoder_heads", "decoder_mlp", "activation",
        "pad_token")  # fmt: skip
    sizes = {name: getattr(of, name) for name in names} | {"attention": "longformer[window=4]", "max_length": 40}
    named = effzoo.build(
        "led-seq2seq", task="seq2seq_lm", pretrained=tmp_path, dtype="auto", **sizes, decoder_max_length=24,
        decoder_start_token=told.decoder_start_token_id,
    ).eval()  # fmt: skip
    assert_close(named(**given).logits, theirs(**given).logits)
    effzoo.save(named, tmp_path / "ours")
    assert torch.equal(effzoo.load(tmp_path / "ours").eval()(**given).logits, named(**given).logits)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1 has no counterpart"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1 has no counterpart"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False has no counterpart"),
        ({"activation_function": "tanh"}, "activation 'tanh' has no counterpart"),
    ],
)
def test_fields_that_are_not_followed_are_refused(more, told):
    with pytest.raises(ConversionError, match=told):
        convert.from_transformers(headed(3, **more))


def test_what_transformers_has_not_is_refused_on_the_way_back():
    sizes = {"layers": 2, "dim": 16, "heads": 2, "mlp": 24, "vocab": VOCAB, "max_length": 40}
    for more, told in (
        ({"attention": "full"}, "'led_seq2seq' with attention full has no counterpart"),
        ({"attention": "longformer[window=4, dilation=2]"}, "no counterpart for dilation=2"),
        ({"decoder_attention": "longformer[window=4]"}, "has full attention, and this one longformer"),
    ):
        with pytest.raises(ConversionError, match=told):
            convert.to_transformers(effzoo.build("led-seq2seq", **(sizes | more)))


def test_sizes_of_the_decoder_that_are_those_of_the_encoder_are_said_there():
    sizes = {"layers": 2, "dim": 16, "heads": 2, "mlp": 24, "vocab": VOCAB, "max_length": 40}
    for name, attention in (("led-seq2seq", "longformer[window=4]"), ("bart", "full"), ("t5", "full")):
        ours = effzoo.build(name, task="seq2seq_lm", **sizes, attention=attention).double().eval()
        theirs, given = convert.to_transformers(ours), batch()
        assert getattr(theirs.config, "num_decoder_layers" if name == "t5" else "decoder_layers") == 2
        # the norms of T5 are in float32 there
        atol = 1e-6 if name == "t5" else 1e-10
        torch.testing.assert_close(theirs(**given).logits, ours(**given).logits, rtol=0, atol=atol)
