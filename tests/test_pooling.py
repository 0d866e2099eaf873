"""Classifiers of decoders read the last token that is not padding: by its id, as in transformers, and by the mask."""

import pytest
import torch
import transformers

import effzoo
from effzoo import convert

PAD = 2
SIZES = {"vocab_size": 53, "num_labels": 3, "pad_token_id": PAD, "eos_token_id": PAD, "bos_token_id": None}
OF_LLAMA = {
    **SIZES,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
}
FAMILIES = {
    "GPT2": {**SIZES, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5},
    "Llama": OF_LLAMA, "Mistral": OF_LLAMA, "Qwen3": {**OF_LLAMA, "head_dim": 8},
}  # fmt: skip


def model_of(family, **more):
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **more})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def texts():
    """Right-padded ids; a padding id inside a text."""
    ids = torch.randint(5, 53, (3, 8))
    ids[1, 5:] = ids[2, 3:] = ids[0, 4] = PAD
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_position_that_is_read_is_that_of_transformers(family):
    """Without a mask, with one, one under which a text ends in eos = padding, and padding in front."""
    theirs, ids = model_of(family), texts()
    ours, left = convert.from_transformers(theirs), ids.flip(1)
    ends_in_eos = (ids != PAD).long()
    ends_in_eos[1, 5] = 1
    for only in (False, True):
        ours.only_what_is_read = only
        for x, mask in [
            (ids, None),
            (ids, (ids != PAD).long()),
            (ids, ends_in_eos),
            (ids[:1, :4], None),
            (left, (left != PAD).long()),
        ]:
            with torch.no_grad():
                assert torch.allclose(
                    theirs(x, attention_mask=mask).logits, ours(x, attention_mask=mask).logits, rtol=0, atol=2e-5
                )


def test_without_ids_or_without_a_padding_id_the_mask_alone_says_it():
    theirs, ids = model_of("GPT2"), texts()
    mask = torch.arange(8) < torch.tensor([8, 5, 3])[:, None]
    ours, embeds = convert.from_transformers(theirs), theirs.transformer.wte(ids)
    with torch.no_grad():
        assert torch.allclose(theirs(inputs_embeds=embeds).logits, ours(inputs_embeds=embeds).logits, rtol=0, atol=1e-5)
        expected = torch.cat(
            [ours(inputs_embeds=embeds[row : row + 1, :n]).logits for row, n in enumerate(mask.sum(1).tolist())]
        )
        assert torch.allclose(ours(inputs_embeds=embeds, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
        without = model_of("GPT2", pad_token_id=None)
        bare = convert.from_transformers(without)
        assert torch.allclose(without(ids[:1]).logits, bare(ids[:1]).logits, rtol=0, atol=1e-5)
        alone = torch.cat([bare(ids[row : row + 1, :n]).logits for row, n in enumerate(mask.sum(1).tolist())])
        assert torch.allclose(bare(ids, attention_mask=mask).logits, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"peft": "prompt[length=3]|prefix[length=2]"}, {"attention": "local[chunk=4]", "residual": "reversible"}]
)
def test_a_padded_text_gives_what_it_gives_alone(sizes, tiny):
    """Behind trained rows and in both streams of a reversible model; a text that ends in the padding's id is read
    before it."""
    model = (
        effzoo.build("gpt2", task="classification", num_labels=3, pad_token=PAD, **{**tiny, **sizes}).double().eval()
    )
    ids = torch.randint(5, 53, (1, 4))
    longer = torch.nn.functional.pad(ids, (0, 5), value=PAD)
    with torch.no_grad():
        expected = model(ids).logits
        for mask in (None, (longer != PAD).long(), (torch.arange(9) < 5).long()[None]):
            assert torch.allclose(model(longer, attention_mask=mask).logits, expected, rtol=0, atol=1e-12)
    encoder = effzoo.build("bert", task="classification", pooling="last", pad_token=PAD, **tiny).double().eval()
    assert not torch.allclose(encoder(longer).logits, encoder(ids).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_late_pooling_is_the_mean_of_what_the_dense_layer_makes_of_each_token(padded, tiny):
    model = effzoo.build("bert", task="classification", pooling="late", head_norm=True, **tiny).double().eval()
    ids, labels = torch.randint(1, 53, (3, 8)), torch.tensor([0, 1, 1])
    mask = torch.arange(8) < torch.tensor([8, 5, 3] if padded else [8, 8, 8])[:, None]
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    head, x = model.head, out.last_hidden_state
    means = [
        head.norm(torch.tanh(x[i, row] @ head.dense.weight.T + head.dense.bias)).mean(0) for i, row in enumerate(mask)
    ]
    expected = torch.stack(means) @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(out.logits, expected, rtol=1e-10, atol=1e-10)
    loss = torch.nn.functional.cross_entropy(expected, labels)
    for mine, right in zip(
        *(
            torch.autograd.grad(x, list(model.parameters())[:-1], retain_graph=True, allow_unused=True)
            for x in (out.loss, loss)
        ),
        strict=True,
    ):
        assert (mine is None) == (right is None)
        assert mine is None or torch.allclose(mine, right, rtol=1e-9, atol=1e-12)
