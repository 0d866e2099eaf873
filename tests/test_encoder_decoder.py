"""Encoder-decoders: equal to BART of transformers in float64 (outputs, losses, gradients, generation), and what
adapters, files, training and other functions make of two stacks."""

import random

import pytest
import torch
import transformers
from support import small

import effzoo
from effzoo import convert
from effzoo.attention.core import Cache
from effzoo.checks.peft import Subject as Method
from effzoo.errors import (
    ConversionError,
    IncompatibleError,
    IncompatiblePeft,
    InputError,
    OptionError,
    TargetError,
    TrainingError,
)
from effzoo.sites import sites

VOCAB, N, M = 37, 13, 7
SIZES = {"layers": 2, "dim": 16, "heads": 2, "mlp": 24, "vocab": VOCAB, "max_length": 40}


def bart_config(draw, **more):
    heads = draw.choice((1, 2, 4))
    return transformers.BartConfig(**{
        "vocab_size": VOCAB, "d_model": 8 * heads, "encoder_layers": draw.choice((1, 2)),
        "decoder_layers": draw.choice((1, 2, 3)), "encoder_attention_heads": heads,
        "decoder_attention_heads": draw.choice((heads, 2 * heads)), "encoder_ffn_dim": draw.choice((12, 20)),
        "decoder_ffn_dim": draw.choice((12, 16)), "max_position_embeddings": 24,
        "activation_function": draw.choice(("gelu", "relu", "gelu_new")), "dropout": 0.0,
        "activation_dropout": draw.choice((0.0, 0.2)),
        "pad_token_id": draw.choice((0, 1, 5)), "bos_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": draw.choice((2, 3)), **more,
    })  # fmt: skip


def drawn(cls, config, width=0.3):
    """A model of transformers in float64 with every parameter drawn: matrices and biases around 0, norms around 1."""
    model = cls(config).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if key.endswith("weight") and parameter.ndim == 1 else 0.0, width)
        for _, buffer in model.named_buffers():
            buffer.normal_()
    return model


def batch(seed=0, rows=3):
    """Sources and targets of unequal lengths; the second source is padded in front."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCAB, (rows, N), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 5:] = 0, 0
    labels = torch.randint(6, VOCAB, (rows, M), generator=draw)
    labels[1, 4:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def built(task="seq2seq_lm", seed=0, **more):
    torch.manual_seed(seed)
    model = effzoo.build("bart", task=task, **(SIZES | more)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("seed", range(4))
def test_outputs_losses_and_gradients_equal_those_of_transformers_and_back(seed):
    torch.manual_seed(seed)
    theirs = drawn(transformers.BartForConditionalGeneration, bart_config(random.Random(seed)))
    ours = convert.from_transformers(theirs)
    given = batch(seed)
    there, here = theirs(**given), ours(**given)
    for a, b in ((there.logits, here.logits), (there.loss, here.loss)):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
    counts = given["attention_mask"].bool()  # at padding each computes something
    torch.testing.assert_close(
        here.encoder_last_hidden_state[counts], there.encoder_last_hidden_state[counts], rtol=0, atol=1e-10
    )
    there.loss.backward()
    here.loss.backward()
    rules = convert.layouts.LAYOUTS["bart"].rules(ours.config, "seq2seq_lm", "seq2seq_lm")
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    mine = dict(ours.named_parameters())
    compared = 0
    for rule in rules:
        for parameter in rule.parameters:
            if rule.key(parameter) in gradients:
                torch.testing.assert_close(
                    mine[f"{rule.ours[0]}.{parameter}"].grad, gradients[rule.key(parameter)], rtol=0, atol=1e-10
                )
                compared += 1
    assert compared == len(gradients)
    assert not mine["head.out.bias"].requires_grad, "a buffer there"
    again = convert.to_transformers(ours)
    assert type(again) is type(theirs) and torch.equal(again(**given).logits, there.logits)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in again.state_dict().items())
    said, meant = again.config.to_diff_dict(), theirs.config.to_diff_dict()
    assert {key: said.get(key) for key in meant} == meant


def test_a_body_converts_both_ways_and_takes_a_head():
    torch.manual_seed(1)
    theirs = drawn(transformers.BartModel, bart_config(random.Random(1)))
    ours = convert.from_transformers(theirs)
    given = batch()
    given["decoder_input_ids"] = given.pop("labels").clamp(min=0)
    torch.testing.assert_close(ours(**given).last_hidden_state, theirs(**given).last_hidden_state, rtol=0, atol=1e-10)
    assert torch.equal(convert.to_transformers(ours)(**given)[0], theirs(**given)[0])
    headed = convert.from_transformers(theirs, task="seq2seq_lm")
    hidden = ours(**given).last_hidden_state
    torch.testing.assert_close(headed(**given).logits, hidden @ theirs.shared.weight.T, rtol=0, atol=1e-10)


def test_a_folder_of_transformers_is_read_with_other_lengths_and_another_attention(tmp_path):
    torch.manual_seed(2)
    theirs = drawn(transformers.BartForConditionalGeneration, bart_config(random.Random(2), pad_token_id=1))
    theirs.save_pretrained(tmp_path)
    assert torch.equal(effzoo.build(pretrained=tmp_path, dtype="auto").eval()(**batch()).logits,
                       convert.from_transformers(theirs)(**batch()).logits)  # fmt: skip
    longer = effzoo.build(pretrained=tmp_path, dtype="auto", max_length=50, attention="longformer[window=64]").eval()
    table = longer.encoder.embeddings.position.weight
    assert len(table) == 52 and torch.equal(table[26:30], table[2:6])
    assert torch.equal(longer.decoder.embeddings.position.weight[26:30], longer.decoder.embeddings.position.weight[2:6])
    wide = longer(**batch()).logits  # a window over everything, without global tokens: full attention
    torch.testing.assert_close(wide, theirs(**batch()).logits, rtol=0, atol=1e-10)
    core = longer.encoder.blocks[0].attn
    assert torch.equal(core.q_global.weight, core.q.weight)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"scale_embedding": True}, "scale_embedding=True has no counterpart"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1 has no counterpart"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False has no counterpart"),
        ({"activation_function": "tanh"}, "activation 'tanh' has no counterpart"),
    ],
)
def test_fields_that_are_not_followed_are_refused(more, told):
    model = transformers.BartForConditionalGeneration(bart_config(random.Random(3), **more))
    with pytest.raises(ConversionError, match=told):
        convert.from_transformers(model)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 2, "forced_bos_token_id": 9, "forced_eos_token_id": 2},
        {"num_beams": 2, "repetition_penalty": 1.3, "min_new_tokens": 5},
    ],
)  # fmt: skip
def test_generation_equals_that_of_transformers_with_a_cache_and_without(options):
    torch.manual_seed(7)
    config = bart_config(random.Random(7), forced_eos_token_id=None, pad_token_id=1)
    theirs = drawn(transformers.BartForConditionalGeneration, config)
    ours, (ids, mask, _) = convert.from_transformers(theirs), batch().values()
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
    assert len({tuple(row) for row in expected.tolist()}) > 1, "rows that say the same compare little"
    for use_cache in (True, False):
        found = effzoo.generate(ours, ids, mask, max_new_tokens=12, use_cache=use_cache, **options)
        assert torch.equal(found, expected)
    wrapped = effzoo.transformers.wrap(ours)
    assert torch.equal(wrapped.generate(ids, attention_mask=mask, max_new_tokens=12, **options), expected)


@pytest.mark.parametrize("kind", ["full", "longformer[window=4]", "local[chunk=4]", "blockwise[blocks=2,block=4]"])
def test_a_decoder_writes_the_same_in_steps(kind):
    """Logits with a cache of self- and cross-attention equal those of the whole target, with adapters in both."""
    model = built(decoder_attention=kind, attention="longformer[window=4]", decoder_layers=1)
    effzoo.attach(
        model, "lora[targets=(attn.q, cross.k, cross.v)]|prefix[targets=(attn.memory, cross.memory), init=normal]"
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.normal_(0, 0.3)
    model.double().eval()
    ids, mask, labels = batch().values()
    target = model.shifted(labels)
    with torch.no_grad():
        whole = model(ids, mask, target)
        cache, parts = Cache(), []
        for piece in target.split([1, 2, 1, 3], dim=1):
            states = whole.encoder_last_hidden_state
            parts.append(model(None, mask, piece, encoder_outputs=states, cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, rtol=0, atol=1e-10)
    assert sorted(cache.sources) == [2] and cache.sources[2]["k"].shape[2] == N


@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_padding_of_both_sides_changes_nothing(kind):
    """A row gives what it gives alone, whatever stands behind its source and its target."""
    model = built(attention=small(kind))
    draw = torch.Generator().manual_seed(5)
    source, target = (torch.randint(6, VOCAB, (1, n), generator=draw) for n in (9, 5))
    longer = {name: torch.cat([x, torch.full((1, 4), 8)], dim=1) for name, x in (("s", source), ("t", target))}
    alone = model(source, decoder_input_ids=target).logits
    masks = [(torch.arange(n) < kept).long()[None] for n, kept in ((13, 9), (9, 5))]
    padded = model(longer["s"], masks[0], longer["t"], masks[1]).logits[:, :5]
    # of blockwise, blocks follow the length of the example; of linformer, E and F do not see padding
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-10)


def test_encoder_outputs_are_used_again_and_gradients_reach_the_source():
    model, given = built(peft="prompt[length=3]"), batch()
    whole = model(**given)
    states = model.encode(given["input_ids"], given["attention_mask"])
    assert states.shape == (3, 3 + N, 16), "the states of the prompt, which the decoder reads"
    for outputs in (states, (states, None), whole):
        again = model(None, given["attention_mask"], labels=given["labels"], encoder_outputs=outputs)
        assert torch.equal(again.logits, whole.logits)
    whole.loss.backward()
    prompt = next(p for key, p in model.named_parameters() if ".adapters." in key)
    assert prompt.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"labels": None}, InputError, "the decoder has nothing to read; give labels, or decoder_input_ids"),
        ({"labels": torch.zeros(3, 4)}, InputError, "labels are integers"),
        ({"decoder_input_ids": torch.full((3, 4), 99)}, InputError, "decoder_input_ids"),
        ({"decoder_input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": None}, InputError, "rows and the target"),
        ({"encoder_outputs": torch.zeros(3, N, 16)}, InputError, "give one of the two"),
        ({"input_ids": None, "encoder_outputs": torch.zeros(3, N, 8)}, InputError, r"states \[batch, n, 16\]"),
        ({"input_ids": None, "encoder_outputs": torch.zeros(3, N + 2, 16)}, InputError, "attention_mask has shape"),
        ({"decoder_input_ids": torch.zeros(3, 4, dtype=torch.long), "decoder_inputs_embeds": torch.zeros(3, 4, 16)},
         InputError, "not both"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(given, error, told):
    with pytest.raises(error, match=told):
        built()(**(batch() | given))


def test_what_an_encoder_decoder_has_not_is_refused_with_a_sentence(tmp_path):
    for sizes, told in (
        ({"residual": "reversible", "norm": "pre"}, "residual='plain'.*two streams"), ({"experts": 2}, "experts=0"),
        ({"share_layers": 1}, "share_layers=0"), ({"types": 2}, "types=0"),
    ):  # fmt: skip
        with pytest.raises(IncompatibleError, match=told):
            built(**sizes)
    for kind in ("linformer", "perceiver"):
        with pytest.raises(IncompatibleError, match="cannot be causal"):
            built(decoder_attention=kind)
    with pytest.raises(IncompatibleError, match="has no head for task='classification'"):
        effzoo.build("bart", task="classification", **SIZES)
    with pytest.raises(IncompatibleError, match="is for an encoder-decoder"):
        effzoo.build("bert", task="seq2seq_lm", **SIZES)
    model = built()
    for spec, told in (
        ("ladder", "Side sites, of which there are none"), ("unipelt", "predicted from later ones"),
        ("pals", "cache of its own"),
        ("routed[of=lora, experts=2, scope=model, level=example]", "source and target are two examples"),
    ):  # fmt: skip
        with pytest.raises(IncompatiblePeft, match=told):
            effzoo.attach(model, spec)
    for spec in ("unipelt[layers=(0, 1)]", "pals[layers=(0, 1)]"):  # of the encoder
        effzoo.detach(effzoo.attach(model, spec), "default")
    with pytest.raises(TargetError, match=r"'cross.q' is in none of the layers \[0\], but in \[2, 3\]"):
        effzoo.attach(model, "lora[targets=(attn.q, cross.q), layers=0]")
    with pytest.raises(InputError, match="the decoder of an encoder-decoder reads a source"):
        model.decoder(inputs_embeds=torch.zeros(1, 2, 16).double())
    with pytest.raises(IncompatibleError, match="not split over processes"):
        effzoo.sharding.shard(model)
    with pytest.raises(IncompatibleError, match="computed on one device"):
        effzoo.placing.placed(built("features"), {"encoder": "cpu", "decoder": "meta", "head": "cpu"})
    with pytest.raises(OptionError, match="prompt_lookup_num_tokens looks up"):
        effzoo.generate(model, batch()["input_ids"], prompt_lookup_num_tokens=2)
    with pytest.raises(OptionError, match="encoder_no_repeat_ngram_size of an encoder-decoder"):
        effzoo.generate(model, batch()["input_ids"], encoder_no_repeat_ngram_size=2)
    rows = [{"input_ids": [7, 8, 9], "labels": [9, 8]}, {"input_ids": [7, 8], "labels": [8, 7, 2]}]
    tuned = effzoo.attach(built().float(), "lora")
    for more, told in (
        ({"packing": True}, "a target reads all sources of its row"),
        ({"teacher": built().float()}, "batches without labels"),
    ):  # fmt: skip
        with pytest.raises(IncompatibleError, match=told):
            effzoo.finetune(tuned, train=rows, output_dir=tmp_path, progress=False, **more)
    with pytest.raises(IncompatibleError, match="embed pools the states of one text"):
        effzoo.embed(built().float(), rows)
    with pytest.raises(TrainingError, match="has no loss to train"):
        effzoo.finetune(effzoo.build("bart", **SIZES), train=[], output_dir=tmp_path)


METHODS = (
    "lora[targets=(cross.q, cross.k, cross.v, cross.o)]", "prefix[targets=(attn.memory, cross.memory)]",
    "houlsby[targets=(attn.branch, cross.branch, mlp.branch)]", "ia3[targets=(cross.k, cross.v)]",
)  # fmt: skip


@pytest.mark.parametrize("spec", METHODS)
def test_cross_attention_takes_methods(spec, tmp_path):
    """Attached to cross-attention a method trains there, is a file that loads, and comes off without a trace."""
    model, given = built(), batch()
    before = model(**given).logits
    effzoo.attach(model, spec)
    effzoo.peft.calibrate(model, [given])
    places = {path for path, site in sites(model) if list(site.hung())}
    assert any(".cross" in path for path in places) and {path.partition(".")[0] for path in places} <= {
        "encoder",
        "decoder",
    }
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(**given).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    again = effzoo.load_adapter(built(), effzoo.save_adapter(model, tmp_path))
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert torch.equal(effzoo.detach(model, "default")(**given).logits, before)


def test_a_prefix_of_cross_attention_starts_from_the_source():
    """Its keys are those that the layer makes of the encoder's states."""
    model, given = built(decoder_layers=1), batch()
    effzoo.attach(model, "prefix[targets=cross.memory, length=4]")
    effzoo.peft.calibrate(model, [given])
    effzoo.activate(model)
    states = model.encode(given["input_ids"][:1], given["attention_mask"][:1])
    cross = model.decoder.blocks[0].cross
    keys, _ = cross.keys_values(states[0, :4])
    (module,) = cross.memory.hung("default")
    torch.testing.assert_close(module.keys.double(), keys, rtol=0, atol=1e-6)


BLOCKS = (
    {"norm": "pre"}, {"norm": "branch", "norm_kind": "rms"}, {"norm": "sandwich", "norm_kind": "rms_plus_one"},
    {"qk_norm": "joint"}, {"qk_norm": True, "score_dim": 3.0, "kv_heads": 1}, {"score_cap": 2.0, "gated": True},
    {"positions": "rotary", "rotary_fraction": 0.5}, {"scale_embeddings": True, "tied": False, "logit_cap": 3.0},
)  # fmt: skip


@pytest.mark.parametrize("slots", BLOCKS, ids=str)
def test_blocks_of_any_slots_have_cross_attention_that_learns_and_decode_in_steps(slots):
    model = built(**slots)
    given = batch()
    model(**given).loss.backward()
    assert all(bool(p.grad.any()) for key, p in model.named_parameters() if not key.endswith("attn.k.bias"))
    target = model.shifted(given["labels"])
    with torch.no_grad():
        whole, cache = model(given["input_ids"], given["attention_mask"], target), Cache()
        states = whole.encoder_last_hidden_state
        parts = [
            model(None, given["attention_mask"], piece, encoder_outputs=states, cache=cache).logits
            for piece in target.split([1, 2, 4], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, rtol=0, atol=1e-10)


def test_levels_of_recomputing_give_the_same_gradients():
    found = {}
    for level in ("nothing", "hidden", "blocks"):
        model = built(attention="lsh[chunk=4]").train()
        model.recompute = level
        torch.manual_seed(6)
        model(**batch()).loss.backward()
        found[level] = [p.grad for p in model.parameters()]
        assert model.decoder.recompute == level
    for level in ("hidden", "blocks"):
        for a, b in zip(found["nothing"], found[level], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_attention_is_swapped_in_the_encoder_and_the_decoder():
    model, given = built(), batch()
    before = model(**given).logits
    swap = effzoo.swap_attention(model, "longformer[window=64]", decoder_attention=["full", "local[chunk=8]"])
    assert [core.name for core in model.cores()] == ["longformer", "longformer", "full", "local"]
    torch.testing.assert_close(model(**given).logits, before, rtol=0, atol=1e-10)
    assert swap.copied["encoder.blocks.1.attn.q_global.weight"] == "encoder.blocks.1.attn.q.weight"
    assert (
        model.config.attention == "longformer[window=64]"
        and model.decoder.config.attention == model.config.decoder_attention
    )
    with pytest.raises(IncompatibleError, match="cannot be causal"):
        effzoo.swap_attention(model, "full", decoder_attention="linformer")
    assert [core.name for core in model.cores()] == ["longformer", "longformer", "full", "local"]


@pytest.mark.slow
def test_it_learns_to_copy_backwards(tmp_path):
    """Toy task: the target is the source reversed; a file of the trained model writes it."""
    torch.manual_seed(0)
    draw = random.Random(0)

    def example():
        source = [draw.randint(6, 15) for _ in range(draw.randint(3, 6))]
        return {"input_ids": source, "labels": [*source[::-1], 2]}

    model = effzoo.build(
        "bart", task="seq2seq_lm", **SIZES | {"dim": 32, "heads": 4, "mlp": 64, "vocab": 16, "dropout": 0.0}
    )
    train, test = [example() for _ in range(600)], [example() for _ in range(40)]
    effzoo.finetune(model, train=train, output_dir=tmp_path / "run", epochs=25, batch_size=32, learning_rate=3e-3)
    effzoo.save(model, tmp_path / "model")
    model = effzoo.load(tmp_path / "model")
    right = 0
    for row in test:
        found = effzoo.generate(model, torch.tensor([row["input_ids"]]), max_new_tokens=8)[0, 1:].tolist()
        right += found[: len(row["labels"])] == row["labels"]
    assert right >= 36


@pytest.mark.parametrize("method", [name for name in effzoo.peft.names() if name != "residual_adapter"])
def test_with_every_method_the_decoder_sees_no_later_token(method):
    """Logits at t and the states of the source stay, whatever the target says after t."""
    try:
        model = effzoo.attach(built(), str(Method.of(method).spec))
    except (IncompatiblePeft, TargetError):
        return  # which the matrix tracks
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ids, mask, labels = batch().values()
    target = model.shifted(labels)
    later = target.clone()
    later[:, 4:] = 33
    a, b = (model.eval()(ids, mask, x) for x in (target, later))
    torch.testing.assert_close(a.logits[:, :4], b.logits[:, :4], rtol=0, atol=1e-12)
    assert not torch.equal(a.logits[:, 4:], b.logits[:, 4:])
    assert torch.equal(a.encoder_last_hidden_state, b.encoder_last_hidden_state)
