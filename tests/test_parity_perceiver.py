"""Perceivers agree with transformers and with perceiver-pytorch on the same random weights: outputs, losses and
gradients of the inputs.

Everything runs in float64 and agrees to 1e-10. All parameters are drawn at random, biases and norms included, so that
no two tensors can be swapped unnoticed.
"""

import json
import random

import pytest
import torch
from perceiver_pytorch import Perceiver as PublicPerceiver
from transformers import (
    PerceiverConfig,
    PerceiverForImageClassificationFourier,
    PerceiverForMaskedLM,
    PerceiverForSequenceClassification,
    PerceiverModel,
)
from transformers.models.perceiver.modeling_perceiver import PerceiverTextPreprocessor, generate_fourier_features

import effzoo
from effzoo import convert
from effzoo.architectures.perceiver_inputs import fourier
from effzoo.errors import ConversionError

VOCAB, LABELS, LENGTH, BATCH = 31, 3, 11, 3
SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH + 4,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": LABELS,
}


def draw_config(seed):
    """Tiny drawn sizes: widths of queries and values given or derived, heads, repeats of the block, activation, query
    residual."""
    draw = random.Random(seed)
    dim = draw.choice((8, 16))
    channels = draw.choice((8, 16, 24))
    widths = draw.choice(
        ({}, {"qk_channels": 4, "v_channels": dim}, {"cross_attention_shape_for_attention": "q"}, {"v_channels": dim})
    )
    return PerceiverConfig(
        **SIZES,
        **widths,
        d_model=channels,
        d_latents=dim,
        num_latents=draw.choice((1, 5)),
        num_blocks=draw.choice((1, 3)),
        num_self_attends_per_block=draw.choice((1, 2)),
        num_self_attention_heads=draw.choice((1, 4)),
        num_cross_attention_heads=draw.choice((1, 2, 4)),
        self_attention_widening_factor=draw.choice((1, 2)),
        cross_attention_widening_factor=draw.choice((1, 3)),
        hidden_act=draw.choice(("gelu", "relu", "gelu_new")),
        use_query_residual=draw.choice((True, False)),
    )


def drawn(model):
    """Every parameter drawn: norms around 1, the rest around 0."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.3)
    return model.double().eval()


def build_theirs(name, seed):
    config = draw_config(seed)
    if name == "masked_lm":
        return drawn(PerceiverForMaskedLM(config))
    if name == "classification":
        return drawn(PerceiverForSequenceClassification(config))
    return drawn(
        PerceiverModel(config, input_preprocessor=PerceiverTextPreprocessor(config) if name == "features" else None)
    )


KINDS = pytest.mark.parametrize("name", ["features", "array", "masked_lm", "classification"])


def batch():
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row, padding in enumerate((0, 3, 6)):
        mask[row, LENGTH - padding :] = 0
    return ids, mask


def assert_equal(actual, expected, tolerance=1e-10):
    size = expected.abs().max().item()
    assert size > 1e3 * tolerance, f"too small to tell anything: {size}"
    assert (actual - expected).abs().max().item() < tolerance * max(1.0, size)


def gradient(embedding, out):
    """Of a random mixture of the output with respect to the rows of an embedding."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), embedding, retain_graph=True)[0]


@pytest.mark.cover()
@KINDS
@pytest.mark.parametrize("seed", range(6))
def test_outputs_losses_and_gradients_equal_those_of_transformers(name, seed):
    torch.manual_seed(seed)
    theirs = build_theirs(name, seed)
    ours = convert.from_transformers(theirs)
    ids, mask = batch()
    if name == "array":
        x = torch.randn(BATCH, LENGTH, theirs.config.d_model, dtype=torch.float64, requires_grad=True)
        expected = theirs(inputs=x, attention_mask=mask).last_hidden_state
        actual = ours(inputs_embeds=x, attention_mask=mask).last_hidden_state
        assert_equal(actual, expected)
        assert_equal(gradient(x, actual), gradient(x, expected))
        assert gradient(x, actual)[1, LENGTH - 3 :].abs().max() == 0
        return
    labels = {
        "masked_lm": ids.masked_fill(mask == 0, -100),
        "classification": torch.randint(LABELS, (BATCH,)),
        "features": None,
    }[name]
    if name == "masked_lm":  # theirs decodes every position there is, so the labels have to cover them
        padded = torch.nn.functional.pad(labels, (0, theirs.config.max_position_embeddings - LENGTH), value=-100)
        expected = theirs(input_ids=ids, attention_mask=mask, labels=padded)
    else:
        expected = theirs(
            **({"inputs": ids} if name == "features" else {"input_ids": ids, "labels": labels}), attention_mask=mask
        )
    actual = ours(input_ids=ids, attention_mask=mask, labels=labels)
    key = "last_hidden_state" if name == "features" else "logits"
    e, a = expected[key], actual[key]
    e = e[:, :LENGTH] if name == "masked_lm" else e
    assert_equal(a, e)
    table = (theirs if name == "features" else theirs.perceiver).input_preprocessor.embeddings.weight
    assert_equal(gradient(ours.embeddings.token.weight, a), gradient(table, e))
    if labels is not None:
        assert abs(actual.loss.item() - expected.loss.item()) < 1e-10
        assert_equal(gradient(ours.embeddings.token.weight, actual.loss), gradient(table, expected.loss))


def test_language_perceiver_has_the_published_widths_and_equals_transformers_at_full_width():
    """Two layers of the published shape; the count of all 26 is in test_perceiver."""
    config = PerceiverConfig(
        qk_channels=256, v_channels=1280, num_self_attends_per_block=2, attention_probs_dropout_prob=0.0
    )
    theirs = PerceiverForMaskedLM(config).double().eval()
    ours = effzoo.build("perceiver-io", task="masked_lm", layers=2, attention_dropout=0.0).double().eval()
    convert.load_pretrained(ours, theirs)
    ids = torch.randint(6, 262, (1, 40))
    assert_equal(ours(ids).logits, theirs(input_ids=ids).logits[:, :40])


def test_pixels_equal_the_fourier_classifier_of_transformers(monkeypatch):
    """Theirs computes the positions in float32 whatever the dtype is, which moves the logits by 1e-5; here in
    float64."""
    exact = torch.linspace

    def linspace(start, end, steps, dtype=None, device=None):
        return exact(start, end, steps, dtype=torch.float64, device=device)

    monkeypatch.setattr(torch, "linspace", linspace)
    config = PerceiverConfig(
        **SIZES,
        d_latents=16,
        num_latents=5,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
    )
    theirs = drawn(PerceiverForImageClassificationFourier(config))
    ours = convert.from_transformers(theirs)
    pixels, labels = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0])
    expected = theirs(inputs=pixels, labels=labels)
    actual = ours(inputs_embeds=pixels.permute(0, 2, 3, 1), labels=labels)
    assert_equal(actual.logits, expected.logits)
    assert_equal(gradient(pixels, actual.logits), gradient(pixels, expected.logits))
    back = convert.to_transformers(ours)
    assert type(back) is type(theirs) and all(
        value.equal(back.state_dict()[key]) for key, value in theirs.state_dict().items()
    )


@pytest.mark.parametrize(
    ("axes", "resolution", "bands"),
    [((5,), (9,), 3), ((4, 7), (8, 8), 2), ((2, 3, 4), (2, 6, 5), 1), ((1, 3), (4, 4), 4)],
)
def test_fourier_features_equal_those_of_transformers(axes, resolution, bands):
    grid = torch.meshgrid(*[torch.linspace(-1, 1, size, dtype=torch.float64) for size in axes], indexing="ij")
    p = torch.stack(grid, dim=-1).flatten(0, -2)[None]
    torch.set_default_dtype(torch.float64)
    try:
        expected = generate_fourier_features(p, bands, resolution)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(fourier(axes, resolution, bands), expected, atol=1e-12, rtol=0)


# --- conversion


@pytest.mark.cover()
@KINDS
@pytest.mark.parametrize("seed", range(6))
def test_there_and_back_is_the_identity_live_and_from_a_folder(name, seed, tmp_path):
    theirs = build_theirs(name, seed).float()
    theirs.save_pretrained(tmp_path)
    live, from_folder = convert.from_transformers(theirs), convert.from_transformers(tmp_path)
    assert live.task == from_folder.task and live.config == from_folder.config
    back = convert.to_transformers(from_folder)
    assert type(back) is type(theirs)
    before, after = theirs.state_dict(), back.state_dict()
    assert set(before) == set(after) and all(before[key].equal(after[key]) for key in before)
    again = convert.from_transformers(back)
    assert again.config == live.config
    assert set(again.state_dict()) == set(live.state_dict())
    assert all(value.equal(live.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("task", ["features", "classification", "masked_lm"])
def test_a_model_of_the_zoo_loads_what_it_wrote(task, tiny, tmp_path):
    sizes = {**tiny, "channels": 16, "latents": 5, "head_dim": 4, "value_dim": 8, "cross_heads": 2,
             "cross_head_dim": 4, "cross_value_dim": 8,
             "decoder_value_dim": 2}  # fmt: skip
    model = effzoo.build("perceiver-io", task=task, num_labels=4, **sizes).eval()
    convert.to_transformers(model).save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = effzoo.build("perceiver-io", task=task, num_labels=4, pretrained=tmp_path, **sizes).eval()
    ids = torch.randint(53, (2, 9))
    for key, value in model(ids).items():
        assert other(ids)[key].equal(value)


def test_longer_inputs_repeat_the_positions_and_the_queries():
    theirs = build_theirs("masked_lm", 0)
    ours = convert.from_transformers(theirs, max_length=2 * (LENGTH + 4) + 3)
    table = theirs.perceiver.input_preprocessor.position_embeddings.weight
    queries = theirs.perceiver.decoder.output_position_encodings.position_embeddings
    for mine, given in ((ours.embeddings.position.weight, table), (ours.decoder.queries.weight, queries)):
        assert all(mine[row].equal(given[row % (LENGTH + 4)]) for row in range(len(mine)))
    ids, mask = batch()
    assert_equal(ours(ids, mask).logits, theirs(input_ids=ids, attention_mask=mask).logits[:, :LENGTH])


def test_a_new_head_takes_the_body_and_labelling_tokens_the_decoder_too():
    theirs = build_theirs("masked_lm", 3)
    pooled = convert.from_transformers(theirs, task="classification", num_labels=5)
    assert pooled.latents.weight.equal(theirs.perceiver.embeddings.latents) and pooled.head.out.weight.shape[0] == 5
    labels = convert.from_transformers(theirs, task="token_classification", num_labels=5)
    assert labels.decoder.queries.weight.equal(theirs.perceiver.decoder.output_position_encodings.position_embeddings)
    assert labels.head.out.weight.std() < 0.1


@pytest.mark.parametrize(("changes", "said"), [
    ({"cross_attends": 2}, "no counterpart for cross_attends=2"),
    ({"gated": True}, "no counterpart for gated=True"),
    ({"attention": "linformer[k=2]"}, "no counterpart for attention="),
    ({"mlp": 20}, "a mlp that dim 16 divides, got 20"),
    ({"value_dim": 4}, "values as wide as the latents, 16"),
    ({"decoder_residual": True}, "no counterpart for decoder_residual=True"),
    ({"positions": "none"}, "transformers has no Perceiver for task 'masked_lm'"),
])  # fmt: skip
def test_what_transformers_cannot_say_is_refused(changes, said, tiny):
    sizes = {
        **tiny,
        "channels": 16,
        "latents": 5,
        "head_dim": 4,
        "value_dim": 8,
        "cross_heads": 2,
        "cross_head_dim": 4,
        "cross_value_dim": 8,
    }
    sizes = {**sizes, "decoder_value_dim": 2, "mlp": 16, **changes}
    with pytest.raises(ConversionError, match=said):
        convert.to_transformers(effzoo.build("perceiver-io", task="masked_lm", **sizes))


def test_a_source_that_does_not_fit_is_refused_and_changes_nothing(tiny):
    model = effzoo.build("perceiver-io", task="masked_lm", **tiny)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ConversionError,
        match=r"channels is 768 in the model and \d+ in PerceiverForMaskedLM; build the model with channels=",
    ):
        convert.load_pretrained(model, build_theirs("masked_lm", 0))
    with pytest.raises(ConversionError, match="is no Perceiver; give one of PerceiverForMaskedLM"):
        convert.load_pretrained(model, torch.nn.Linear(2, 2))
    broken = build_theirs("masked_lm", 0)
    broken.perceiver.embeddings.latents.data[0, 0] = float("nan")
    with pytest.raises(ConversionError, match=r"NaN or infinity in perceiver.embeddings.latents \(1 of"):
        convert.from_transformers(broken)
    assert all(value.equal(model.state_dict()[key]) for key, value in before.items())


# --- repeated cross-attention and weight tying: perceiver-pytorch


def copied(theirs, ours):
    """Put the weights of perceiver-pytorch into ours; its positions stand (sin, cos, p) per axis, ours p, sin, cos over
    all axes."""
    config = ours.config
    order = column_order(config)

    def linear(mine, weight, bias=None):
        mine.weight.copy_(weight)
        if mine.bias is not None:
            mine.bias.copy_(bias)

    def sublayers(norm, attn, mlp_norm, mlp, their_attn, their_ff, columns=None):
        linear(norm, their_attn.norm.weight, their_attn.norm.bias)
        k, v = their_attn.fn.to_kv.weight.chunk(2)
        linear(attn.q, their_attn.fn.to_q.weight)
        linear(attn.k, k if columns is None else k[:, columns])
        linear(attn.v, v if columns is None else v[:, columns])
        linear(attn.o, their_attn.fn.to_out.weight, their_attn.fn.to_out.bias)
        linear(mlp_norm, their_ff.norm.weight, their_ff.norm.bias)
        first, last = their_ff.fn.net[0], their_ff.fn.net[2]
        # the second half passes through gelu
        (up, gate), (up_bias, gate_bias) = first.weight.chunk(2), first.bias.chunk(2)
        linear(mlp.up, up, up_bias)
        linear(mlp.gate, gate, gate_bias)
        linear(mlp.down, last.weight, last.bias)

    with torch.no_grad():
        ours.latents.weight.copy_(theirs.latents)
        for step, layer in enumerate(theirs.layers):
            cross = ours.cross[config.cross_schedule()[step]]
            sublayers(cross.norm, cross.attn, cross.mlp_norm, cross.mlp, layer.cross_attn, layer.cross_ff, order)
            linear(
                cross.source_norm,
                layer.cross_attn.norm_context.weight[order],
                layer.cross_attn.norm_context.bias[order],
            )
            start = config.block_schedule()[step] * config.layers
            for block, (attn, ff) in zip(ours.blocks[start : start + config.layers], layer.self_attns, strict=True):
                sublayers(block.attn_norm, block.attn, block.mlp_norm, block.mlp, attn, ff)
        linear(ours.head.norm, theirs.to_logits[1].weight, theirs.to_logits[1].bias)
        linear(ours.head.out, theirs.to_logits[2].weight, theirs.to_logits[2].bias)


def column_order(config):
    """For each of our input columns, its place in theirs."""
    axes, bands = len(config.grid), config.bands
    if not bands:
        return list(range(config.channels))
    start = [config.channels + axis * (2 * bands + 1) for axis in range(axes)]
    places = [s + 2 * bands for s in start]
    sines = [s + band for s in start for band in range(bands)]
    cosines = [s + bands + band for s in start for band in range(bands)]
    return [*range(config.channels), *places, *sines, *cosines]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("repeats", "layers", "axes", "encoded"),
    [(3, 2, (4, 5), True), (2, 1, (7,), True), (1, 1, (2, 3, 2), True), (4, 1, (6,), False)],
)
def test_repeats_and_tying_equal_perceiver_pytorch(tied, repeats, layers, axes, encoded):
    theirs = PublicPerceiver(
        num_freq_bands=3,
        depth=repeats,
        max_freq=8.0,
        input_channels=4,
        input_axis=len(axes),
        num_latents=5,
        latent_dim=12,
        cross_heads=2,
        latent_heads=3,
        cross_dim_head=5,
        latent_dim_head=4,
        num_classes=LABELS,
        weight_tie_layers=tied,
        self_per_cross_attn=layers,
        fourier_encode_data=encoded,
    )
    drawn(theirs)
    share = "all_but_first" if tied else "none"
    ours = effzoo.build(
        "perceiver", task="classification", num_labels=LABELS, channels=4, grid=(8,) * len(axes),
        positions="fourier" if encoded else "none",
        bands=3 * encoded, latents=5, dim=12, layers=layers, heads=3, head_dim=4, mlp=48, cross_attends=repeats,
        share_cross=share,
        share_blocks=share, cross_heads=2, cross_head_dim=5, gated=True, attn_bias=False, head_norm=True,
        attention_dropout=0.0,
    ).double().eval()  # fmt: skip
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    copied(theirs, ours)
    x = torch.randn(2, *axes, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, *axes) < 0.7
    mask[:, 0] = True
    for given in (None, mask):
        expected, actual = theirs(x, mask=given), ours(inputs_embeds=x, attention_mask=given).logits
        assert_equal(actual, expected)
        assert_equal(gradient(x, actual), gradient(x, expected))


def test_a_folder_that_names_no_class_says_so(tmp_path):
    config = PerceiverConfig(
        vocab_size=41, d_model=8, d_latents=8, num_latents=4, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2, max_position_embeddings=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    PerceiverForMaskedLM(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    for named in ({}, {"architectures": None}, {"architectures": []}):
        file.write_text(json.dumps({key: value for key, value in written.items() if key != "architectures"} | named))
        with pytest.raises(
            ConversionError,
            match=r'does not say of which class it was saved; add "architectures".*PerceiverForMaskedLM',
        ):
            convert.from_transformers(tmp_path)
    file.write_text(json.dumps(written))
    assert convert.from_transformers(tmp_path).task == "masked_lm"
