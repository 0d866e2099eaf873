"""The question answering head: its loss by definition and as in transformers, padding, training, and files."""

import pytest
import torch
import transformers
from support import finetune

import effzoo
from effzoo import convert
from effzoo.convert.layouts import LAYOUTS
from effzoo.errors import EffzooError, IncompatibleError, InputError

SIZES = dict(layers=2, dim=16, heads=2, mlp=24, vocab=41, max_length=32, dropout=0.0, attention_dropout=0.0)
FAMILIES = {
    "bert": {}, "roberta": {}, "albert": {"embedding_dim": 8}, "longformer": {"attention": "longformer[window=8]"},
    "gpt2": {}, "llama": {"kv_heads": 1}, "mistral": {"attention": "full", "kv_heads": 1}, "qwen3": {"kv_heads": 1},
    "modernbert": {"attention": "full", "pad_token": 0, "rotary_theta": 10_000.0},
    "reformer": {"axial_shape": (4, 8), "axial_dims": (6, 10), "attention": "local[chunk=4, circular=true]"},
}  # fmt: skip


def made(name="bert", **more):
    torch.manual_seed(0)
    return effzoo.build(name, task="question_answering", **SIZES, **FAMILIES[name], **more).eval()


def ids(rows=3, length=12):
    return torch.randint(5, 41, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [name for name in FAMILIES if "question_answering" in LAYOUTS[name].classes])
def test_logits_and_loss_are_those_of_transformers_and_the_model_comes_back(family):
    ours = made(family)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.2, 0.3)
    theirs = convert.to_transformers(ours).eval()
    assert type(theirs).__name__ == LAYOUTS[family].classes["question_answering"]
    tokens, labels = ids(), torch.tensor([[0, 3], [5, 5], [2, 11]])
    more = {"global_attention_mask": (tokens < 12).long()} if family == "longformer" else {}
    out = ours(tokens, labels=labels, **more)
    other = theirs(tokens, start_positions=labels[:, 0], end_positions=labels[:, 1], **more)
    logits = torch.stack([other.start_logits, other.end_logits], dim=-1)
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, other.loss, atol=1e-5, rtol=1e-5)
    again = convert.from_transformers(theirs)
    assert again.task == "question_answering" and again.num_labels == 2
    assert torch.equal(again(tokens, **more).logits, out.logits)


def test_a_body_of_transformers_gets_a_head_for_answers():
    config = transformers.BertConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=5
    )
    model = convert.from_transformers(transformers.BertModel(config), task="question_answering")
    assert model(ids()).logits.shape == (3, 12, 2)


def test_the_loss_is_its_definition_and_does_not_see_padding():
    model = made().double()
    tokens, mask = ids(), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    labels = torch.tensor([[0, 3], [6, -100], [-100, -100]])
    out = model(tokens, attention_mask=mask, labels=labels)
    total, count = 0.0, 0
    for row in range(3):
        alone = model(tokens[row : row + 1, : int(mask[row].sum())]).logits[0]
        torch.testing.assert_close(out.logits[row, : len(alone)], alone, atol=1e-12, rtol=0)
        for which, label in enumerate(labels[row].tolist()):
            if label != -100:
                total, count = total - alone[:, which].log_softmax(0)[label], count + 1
    assert count == 3
    torch.testing.assert_close(out.loss, total / count, atol=1e-12, rtol=0)
    assert (out.logits[1, 7:] == torch.finfo(torch.float64).min).all()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), r"integers of shape \(3, 2\), the first and the last token of each answer"),
        (torch.tensor([[0, 1]] * 3).float(), r"integers of shape \(3, 2\)"),
        (torch.tensor([[0, 1], [2, 12], [0, 0]]), r"\[0, 12\) or -100, got 0 to 12; they are tokens of the example"),
    ],
)
def test_labels_that_are_no_answers_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        made()(ids(), labels=labels)


def test_what_has_no_answers_is_refused():
    with pytest.raises(InputError, match="two outputs for each token"):
        made(num_labels=3)
    with pytest.raises(IncompatibleError, match="no head for task='question_answering'"):
        effzoo.build("perceiver-io", task="question_answering")
    with pytest.raises(EffzooError, match="two outputs; leave num_labels out"):
        effzoo.attach(made(), "lora", name="b", num_labels=3)


def rows(count=24):
    """The answer runs from the token 7 to the token 9."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (1,), generator=draw))
        tokens = torch.randint(10, 41, (length,), generator=draw)
        start = int(torch.randint(0, length - 2, (1,), generator=draw))
        end = int(torch.randint(start + 1, length, (1,), generator=draw))
        tokens[start], tokens[end] = 7, 9
        found.append({"input_ids": tokens.tolist(), "labels": [start, end]})
    return found


def test_answers_are_learnt_measured_and_kept(tmp_path):
    model = made(peft="lora").train()
    result = finetune(
        model, rows(), evaluate=rows(), output_dir=tmp_path, epochs=25, batch_size=8, learning_rate=2e-2, progress=False
    )
    assert result.metrics["eval_accuracy"] > 0.9, result.metrics
    effzoo.save(model, tmp_path / "whole")
    again = effzoo.load(tmp_path / "whole")
    assert again.task == "question_answering" and torch.equal(again(ids()).logits, model.eval()(ids()).logits)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "example 1 has a label of shape|two integers"),
        ([1.0, 2.0], "two integers, the first and the last token"),
        ([0, 4], r"example 1 has the label \[0, 4\], its tokens are 0 to 3"),
    ],
)
def test_rows_without_an_answer_of_their_own_are_named(tmp_path, label, message):
    data = [{"input_ids": [5, 6, 7, 8], "labels": [1, 2]}, {"input_ids": [5, 6, 7, 8], "labels": label}]
    with pytest.raises(InputError, match=message):
        finetune(made(peft="lora"), data, output_dir=tmp_path, max_steps=1, progress=False)


def test_a_teacher_gives_distributions_over_tokens(tmp_path):
    teacher = made()
    model = made(peft="lora").train()
    finetune(
        model, rows(8), output_dir=tmp_path, max_steps=2, batch_size=3, teacher=teacher, progress=False,
        distillation={"logits": 1.0, "labels": 0.0}, learning_rate=1e-2,
    )  # fmt: skip
    from effzoo.train.distillation import soft_target_loss

    a, b = model.eval()(ids()).logits, teacher(ids()).logits
    want = (b.softmax(1) * (b.log_softmax(1) - a.log_softmax(1))).sum(1).mean()
    got = soft_target_loss(a.transpose(1, 2), b.transpose(1, 2), torch.zeros(3, 2, dtype=torch.long))
    torch.testing.assert_close(got, want)
