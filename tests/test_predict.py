"""`predict`: the model's own logits, in the order of the examples, whatever their lengths."""

import pytest
import torch

import effzoo
from effzoo.errors import InputError


def examples():
    return [{"input_ids": torch.randint(2, 53, (n,)).tolist(), "labels": 0} for n in (5, 30, 1, 12, 30, 7)]


@pytest.mark.parametrize("name", ["minilm", "gpt2", "longformer"])
def test_each_row_is_what_the_model_says_of_that_example_alone(tiny, name):
    model = effzoo.build(name, task="classification", num_labels=3, peft="prompt[length=2]|lora", **tiny)
    rows = examples()
    found = effzoo.predict(model, rows, batch_size=4, progress=False)
    assert model.training and found.dtype == torch.float32
    model.eval()
    for row, logits in zip(rows, found, strict=True):
        assert torch.allclose(model(torch.tensor([row["input_ids"]])).logits[0], logits, atol=1e-5)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_batches_are_of_like_lengths(tiny, given):
    """Ids or embeddings: the short ones are not padded to the long ones."""
    model, shapes = effzoo.build("minilm", task="classification", **tiny), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    rows = [torch.randint(2, 53, (n,)) if given == "input_ids" else torch.randn(n, tiny["dim"]) for n in (3, 9, 3, 9)]
    effzoo.predict(model, [{given: row} for row in rows], batch_size=2, progress=False)
    assert shapes == [(2, 3), (2, 9)]


def test_features_are_the_mean_over_the_tokens(tiny):
    model, rows = effzoo.build("bert", **tiny).eval(), examples()
    for row, feature in zip(rows, effzoo.predict(model, rows, progress=False), strict=True):
        assert torch.allclose(model(torch.tensor([row["input_ids"]])).last_hidden_state[0].mean(0), feature, atol=1e-5)


def test_what_cannot_be_predicted_is_said(tiny):
    with pytest.raises(InputError, match="not 'causal_lm'; call the model itself"):
        effzoo.predict(effzoo.build("gpt2", task="causal_lm", **tiny), examples())
    with pytest.raises(InputError, match="examples is empty"):
        effzoo.predict(effzoo.build("bert", **tiny), [])
    with pytest.raises(InputError, match="65 tokens do not fit"):
        effzoo.predict(effzoo.build("bert", **tiny), [{"input_ids": [2] * 65}], progress=False)


@pytest.mark.parametrize("task", ["classification", "features"])
def test_a_perceiver_predicts_from_padded_examples_what_it_gives_alone(task):
    """Its features are latents, which have no padding."""
    model = effzoo.build("perceiver-io", task=task, dim=16, layers=1, heads=2, mlp=16, vocab=53, max_length=32).eval()
    examples = [{"input_ids": torch.randint(1, 53, (n,)).tolist(), "attention_mask": [1] * n} for n in (9, 4, 7)]
    found = effzoo.predict(model, examples, batch_size=3, progress=False)
    for row, example in zip(found, examples, strict=True):
        out = model(**{name: torch.tensor([value]) for name, value in example.items()})
        alone = out.logits[0] if task == "classification" else out.last_hidden_state[0].mean(dim=0)
        assert torch.allclose(row, alone, atol=1e-5)
