"""Whole models: sizes, inputs that do not fit, padding, prompts, tasks, checkpointing."""

import pytest
import torch

import effzoo
from effzoo.errors import IncompatibleError, InputError, OptionError, UnknownNameError


def ids(*shape):
    return torch.randint(2, 53, shape)


@pytest.fixture
def model(tiny):
    return effzoo.build("bert", task="classification", num_labels=3, **tiny).eval()


PUBLISHED = {"bert": 109_482_240, "roberta": 124_645_632, "gpt2": 124_439_808, "longformer": 148_659_456, "minilm": 22_713_216}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_zoo_entries_have_the_published_number_of_parameters(name):
    """Counts of the models as published by transformers (BertModel with pooler, and so on)."""
    with torch.device("meta"):
        model = effzoo.build(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert set(PUBLISHED) == set(effzoo.models())


def test_the_line_the_project_exists_for():
    model = effzoo.build("longformer", peft="lora", layers=1)
    assert [core.name for core in model.cores()] == ["longformer"] and list(effzoo.attached(model)) == ["default"]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("longfromer",), UnknownNameError, r"unknown model 'longfromer'; did you mean 'longformer'\? Known: bert, gpt2"),
        (("bert", {"dims": 8}), OptionError, r"model 'bert' has no size 'dims'; did you mean 'dim'\?"),
        (("bert", {"layers": "six"}), OptionError, "size 'layers' of model 'bert' takes int, got 'six'"),
        (("bert", {"heads": 5}), OptionError, "dim 768 does not divide into 5 heads; try heads="),
        (("bert", {"layers": 0}), OptionError, "layers is at least 1"),
        (("bert", {"dropout": 1.5}), OptionError, r"dropout is in \[0, 1\)"),
        (("bert", {"activation": "swoosh"}), OptionError, "activation is one of gelu"),
        (("bert", {"task": "clasification"}), OptionError, "task is one of features, classification"),
        (("bert", {"task": "causal_lm"}), IncompatibleError, "bert is an encoder, so task='causal_lm' makes no sense; try task='masked_lm'"),
        (("gpt2", {"task": "masked_lm"}), IncompatibleError, "gpt2 is a decoder"),
        (("bert", {"attention": "fulll"}), UnknownNameError, "did you mean 'full'"),
        (("bert", {"attention": ("full",) * 3}), OptionError, "3 attention specs for 12 layers"),
    ],
)
def test_build_says_what_it_cannot_build(arguments, error, said):
    with pytest.raises(error, match=said):
        effzoo.build(arguments[0], **(arguments[1] if len(arguments) > 1 else {}))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": ids(2, 5), "inputs_embeds": torch.zeros(2, 5, 16)}, "not both"),
        ({"input_ids": ids(5)}, r"integer tensor \[batch, n\], got torch.int64 of shape \(5,\)"),
        ({"input_ids": torch.zeros(2, 5)}, r"got torch.float32 of shape \(2, 5\)"),
        ({"input_ids": ids(2, 0)}, "the sequence is empty"),
        ({"input_ids": ids(2, 65)}, "65 tokens do not fit into max_length 64; truncate to 64, or build the model with max_length=65"),
        ({"input_ids": torch.full((1, 3), 53)}, r"input_ids are in \[0, 53\), got 53 to 53; is this the model's tokenizer"),
        ({"input_ids": torch.full((1, 3), -1)}, r"input_ids are in \[0, 53\)"),
        ({"inputs_embeds": torch.zeros(2, 5, 8)}, r"\[batch, n, 16\], got torch.float32 of shape \(2, 5, 8\)"),
        ({"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 6)}, r"attention_mask has shape \(2, 6\), the input needs \(2, 5\)"),
        ({"input_ids": ids(2, 5), "attention_mask": torch.full((2, 5), 2)}, "attention_mask holds 0 and 1"),
        ({"input_ids": ids(2, 5), "global_attention_mask": torch.ones(5)}, "global_attention_mask has shape"),
        ({"input_ids": ids(2, 5), "token_type_ids": torch.full((2, 5), 2)}, r"token_type_ids are in \[0, 2\)"),
        ({"input_ids": ids(2, 5), "position_ids": torch.full((2, 5), 64)}, r"position_ids are in \[0, 63\], got 64"),
        ({"input_ids": ids(2, 5), "position_ids": torch.zeros(2, 5)}, "position_ids is an integer tensor"),
        ({"input_ids": ids(2, 5), "labels": torch.tensor([0, 3])}, r"labels are in \[0, 3\) or -100, got 0 to 3; check num_labels"),
        ({"input_ids": ids(2, 5), "labels": torch.zeros(2)}, r"labels are integers of shape \(2,\)"),
        ({"input_ids": ids(2, 5), "labels": torch.zeros(2, 5, dtype=torch.long)}, r"labels are integers of shape \(2,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_numbers(model, inputs, said):
    with pytest.raises(InputError, match=said):
        model(**inputs)


def test_prompt_rows_count_towards_the_length(model):
    effzoo.attach(model, "prompt[length=10]")
    with pytest.raises(InputError, match="60 tokens and 10 prompt rows do not fit into max_length 64; truncate to 54"):
        model(ids(1, 60))


def test_features_have_no_loss(tiny):
    with pytest.raises(InputError, match="task 'features' has no loss"):
        effzoo.build("bert", **tiny)(ids(1, 3), labels=torch.tensor([0]))


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "longformer", "minilm"])
@pytest.mark.parametrize("spec", [None, "prompt[length=2]|prefix[length=3]|lora|ia3|houlsby"])
def test_what_stands_under_padding_changes_nothing(tiny, name, spec):
    """Right padding: other ids under the mask leave logits and pooled logits equal; a row alone, without padding, gives the same."""
    for task in ("classification", "token_classification"):
        model = effzoo.build(name, task=task, num_labels=3, peft=spec, **tiny).double().eval()
        tokens = ids(2, 11)
        mask = torch.ones_like(tokens)
        mask[1, 6:], tokens[1, 6:] = 0, 1
        out = model(tokens, mask).logits
        alone = model(tokens[1:, :6]).logits
        if name not in ("roberta", "longformer"):  # their positions follow the pad token, so other ids there are other positions
            changed = tokens.clone()
            changed[1, 6:] = 40
            other = model(changed, mask).logits
            real = mask.bool() if task == "token_classification" else slice(None)
            assert torch.allclose(other[real], out[real], rtol=0, atol=1e-12)
        assert torch.allclose(out[1:, :6] if task == "token_classification" else out[1:], alone, rtol=0, atol=1e-12)


def test_longformer_classifies_with_the_first_token_global_by_default(tiny):
    model = effzoo.build("longformer", task="classification", attention="longformer[window=2]", **tiny).eval()
    tokens, first = ids(2, 11), torch.zeros(2, 11)
    first[:, 0] = 1
    assert torch.equal(model(tokens).logits, model(tokens, global_attention_mask=first).logits)
    assert not torch.allclose(model(tokens).logits, model(tokens, global_attention_mask=torch.zeros(2, 11)).logits)


def test_losses_are_the_textbook_ones(tiny):
    labels = torch.tensor([2, 0])
    model = effzoo.build("bert", task="classification", num_labels=3, **tiny).eval()
    out = model(ids(2, 5), labels=labels)
    assert torch.allclose(out.loss, -out.logits.log_softmax(-1)[torch.arange(2), labels].mean())
    several = model(ids(2, 5), labels=torch.tensor([[1.0, 0, 1], [0, 0, 0]]))
    sign = torch.tensor([[1.0, -1, 1], [-1, -1, -1]])
    assert torch.allclose(several.loss, -torch.nn.functional.logsigmoid(sign * several.logits).mean())
    number = effzoo.build("bert", task="classification", num_labels=1, **tiny).eval()(ids(2, 5), labels=torch.tensor([0.5, 2.0]))
    assert torch.allclose(number.loss, ((number.logits[:, 0] - torch.tensor([0.5, 2.0])) ** 2).mean())
    tokens = ids(2, 5)
    shifted = tokens.clone()
    shifted[0, 3] = -100
    causal = effzoo.build("gpt2", task="causal_lm", **tiny).eval()(tokens, labels=shifted)
    logs = causal.logits.log_softmax(-1)
    terms = [logs[b, t, tokens[b, t + 1]] for b in range(2) for t in range(4) if shifted[b, t + 1] != -100]
    assert torch.allclose(causal.loss, -torch.stack(terms).mean())


def test_labels_that_do_not_count_give_loss_zero_not_nan(tiny):
    out = effzoo.build("bert", task="masked_lm", **tiny)(ids(2, 5), labels=torch.full((2, 5), -100))
    assert out.loss == 0


@pytest.mark.parametrize("name", ["gpt2", "minilm", "bert"])
def test_pooling_reads_the_last_the_mean_and_the_first_token(tiny, name):
    model = effzoo.build(name, task="classification", **tiny).double().eval()
    tokens, mask = ids(2, 7), torch.ones(2, 7)
    mask[1, 4:] = 0
    out = model(tokens, mask)
    hidden = out.last_hidden_state
    pooled = {"gpt2": hidden[[0, 1], [6, 3]], "minilm": torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)]), "bert": hidden[:, 0]}[name]
    x = model.head.dense(pooled).tanh() if name == "bert" else pooled
    assert torch.allclose(out.logits, model.head.out(x), atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "longformer"])
def test_checkpointed_activations_give_the_same_gradients_with_frozen_embeddings(tiny, name):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = effzoo.build(name, task="classification", peft="lora|prefix|houlsby", **tiny).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(torch.arange(2, 22).reshape(2, 10), labels=torch.tensor([0, 1])).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, found[1][key]) for key, grad in found[0].items() if grad is not None)
    assert [key for key, grad in found[0].items() if grad is None] == [key for key, grad in found[1].items() if grad is None]


def test_the_backend_is_chosen_by_name(tiny):
    fused, plain = (effzoo.build("bert", backend=backend, **tiny).eval() for backend in ("sdpa", "reference"))
    plain.load_state_dict(fused.state_dict())
    tokens = ids(2, 9)
    assert torch.allclose(fused(tokens).last_hidden_state, plain(tokens).last_hidden_state, atol=1e-5)
    with pytest.raises(OptionError, match="'sdpa' cannot run here: attention dropout 0.1"):
        effzoo.build("bert", **{**tiny, "backend": "sdpa", "attention_dropout": 0.1}).train()(tokens)


def test_output_reads_as_dict_and_by_attribute(model):
    out = model(ids(1, 4))
    assert list(out) == ["logits", "last_hidden_state"] and out.loss is None and out.logits is out["logits"]
    with pytest.raises(AttributeError, match="the output has no 'logit'"):
        _ = out.logit
