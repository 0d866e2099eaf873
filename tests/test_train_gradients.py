"""Every trained tensor gets a gradient, or is named: what the loss does not reach never moves."""

import logging

import pytest
import torch
from support import finetune
from torch import nn

import effzoo
from effzoo.errors import TrainingError
from effzoo.peft.unread import trained_unread
from effzoo.train.gradients import Gradients, Untouched, patterns

CLASSES = [{"input_ids": [2 + i, 3, 4, 5, 6], "labels": i % 3} for i in range(6)]
TOKENS = [{"input_ids": (ids := [2 + i, 3, 4, 5, 6]), "labels": ids} for i in range(6)]


def run(tiny, folder, name, task, attention, rows, peft="lora", **given):
    sizes = {**tiny, **({"kv_heads": 1} if name == "llama" else {})}
    model = effzoo.build(name, **{**sizes, "task": task, "num_labels": 3, "attention": attention, "peft": peft})
    return model, finetune(
        model,
        rows,
        output_dir=folder,
        progress=False,
        save_every=None,
        **{"max_steps": 3, "learning_rate": 1e-2, "warmup": 0, **given},
    )


def moved(model, before):
    """The oracle: which trained tensors are other numbers than before."""
    return {
        key for key, value in model.named_parameters() if value.requires_grad and not torch.equal(value, before[key])
    }


@pytest.mark.cover()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("peft", ["lora", "ia3", "norms", "prefix"])
def test_a_decoder_without_global_tokens_has_nothing_that_waits_for_them(tiny, tmp_path, name, peft):
    model, result = run(tiny, tmp_path, name, "causal_lm", "longformer[window=4]", TOKENS, peft)
    assert not [key for key, _ in model.named_parameters() if "_global" in key]
    assert not result.untouched and str(result.untouched) == "every trained tensor got a gradient"


def test_a_perceiver_has_no_global_projections_unless_asked(tiny):
    sizes = {"dim": 16, "layers": 1, "heads": 2, "mlp": 16, "vocab": 53, "max_length": 32}
    asked = effzoo.build("perceiver-io", **sizes, attention="longformer[window=2, global_projections=true]")
    model = effzoo.build("perceiver-io", **sizes, attention="longformer[window=2]")
    assert [key for key in asked.state_dict() if "_global" in key] and not [
        key for key in model.state_dict() if "_global" in key
    ]


def test_global_projections_that_were_asked_for_and_get_nothing_are_named(tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="effzoo"):
        model, result = run(
            tiny, tmp_path, "gpt2", "causal_lm", "longformer[window=4, global_projections=true]", TOKENS, "lora[rank=2]"
        )
    assert {key.split(".")[3] for key in result.untouched.none} == {"q_global", "v_global"} and len(
        result.untouched.none
    ) == 8
    numbers = sum(p.numel() for key, p in model.named_parameters() if "_global" in key and p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"8 of 16 trained tensors ({numbers} of {total} numbers, 50 %)"
    said = (
        f"{share} got no gradient: blocks.*.attn.q_global.lora.A, blocks.*.attn.q_global.lora.B, blocks.*.attn.v_global"
    )
    assert str(result.untouched).startswith(said) and not result.untouched.zero
    assert [record.getMessage() for record in caplog.records if said in record.getMessage()] == [
        f"after the first step, {result.untouched}", f"in 3 steps, {result.untouched}",
    ]  # fmt: skip


def test_status_shows_what_the_last_training_did_not_reach(tiny, tmp_path):
    model, result = run(tiny, tmp_path, "gpt2", "causal_lm", "longformer[window=4, global_projections=true]", TOKENS)
    assert effzoo.status(model).untouched == dict.fromkeys(result.untouched.none, "no gradient")
    assert "untouched  8 trainable tensors got no gradient" in str(effzoo.status(model))
    effzoo.detach(model, "default")
    assert effzoo.status(model).untouched == {}


def test_with_global_tokens_the_same_model_leaves_nothing_out(tiny, tmp_path):
    rows = [{**row, "global_attention_mask": [1, 0, 0, 0, 0]} for row in TOKENS]
    _, result = run(tiny, tmp_path, "gpt2", "causal_lm", "longformer[window=4, global_projections=true]", rows)
    assert not result.untouched


def test_the_last_local_projections_of_a_classifier_that_reads_a_global_token_are_named(tiny, tmp_path):
    torch.manual_seed(0)
    model = effzoo.build(
        "longformer",
        **{**tiny, "attention": "longformer[window=4]", "task": "classification", "num_labels": 3, "peft": "lora"},
    )
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    result = finetune(
        model,
        CLASSES,
        output_dir=tmp_path,
        progress=False,
        save_every=None,
        max_steps=3,
        weight_decay=0.0,
        learning_rate=1e-2,
    )
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    named = {**result.untouched.none, **result.untouched.zero}
    assert named.keys() == trained - moved(model, before), "those named are those that have not moved"
    assert {key.split(".adapters")[0] for key in named} == {"blocks.1.attn.q", "blocks.1.attn.v"}


def test_the_first_factor_of_lora_with_a_gradient_of_zero_at_first_is_no_fault(tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="effzoo"):
        model, result = run(tiny, tmp_path, "bert", "classification", "full", CLASSES)
    assert not result.untouched and "gradient" not in caplog.text and effzoo.status(model).untouched == {}


@pytest.mark.cover()
@pytest.mark.parametrize("peft", ["lora", "pfeiffer", "krona", "llama_adapter", "dora", "parallel"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_waits_for_the_first_update_of_another_is_not_said_to_be_untouched(tiny, tmp_path, caplog, peft, steps):
    """The rate is 0 in the first of two steps, so in both the second factor is zero; what the run was too short for
    moves in a longer one."""
    with caplog.at_level(logging.WARNING, logger="effzoo"):
        model, result = run(
            tiny,
            tmp_path / "short",
            "bert",
            "classification",
            "full",
            CLASSES,
            peft,
            max_steps=steps,
            warmup=min(1, steps - 1),
        )
    assert not result.untouched and effzoo.status(model).untouched == {} and "gradient" not in caplog.text
    _, longer = run(tiny, tmp_path / "long", "bert", "classification", "full", CLASSES, peft, max_steps=5, warmup=1)
    assert not longer.untouched and not longer.untouched.undecided
    if peft == "lora":
        assert {key.rpartition(".")[2] for key in result.untouched.undecided} == ({"A"} if steps < 3 else set())
        assert (
            ("4 of 12 trained tensors" in str(result.untouched))
            == ("too short to tell" in str(result.untouched))
            == (steps < 3)
        )


def test_what_waits_for_two_others_in_a_row_is_judged_when_both_have_moved():
    """y = a (b (c x)) with a gate each: c waits for b, b waits for a, and d for nobody."""
    a, b, c, d = (nn.Parameter(torch.full((1,), value)) for value in (0.0, 0.0, 2.0, 3.0))
    model = nn.ParameterDict({"a": a, "b": b, "c": c, "d": d})
    gradients = Gradients()
    gradients.begin(model)
    told = []
    for rate in (0.0, 1.0, 0.0, 1.0, 1.0):
        model.zero_grad()
        loss = (1 + a) * 0 + a + (a * b) + (a * b * c) + 0 * d
        loss.backward()
        gradients.look()
        told.append((set(gradients.untouched().zero), set(gradients.untouched().undecided)))
        with torch.no_grad():
            for p in (a, b, c, d):
                p.sub_(rate * p.grad)
    waiting = [{"b", "c", "d"}, {"b", "c", "d"}, {"c", "d"}, {"c", "d"}]
    assert told == [*((set(), names) for names in waiting), ({"d"}, set())]


def test_a_gradient_of_zero_throughout_is_told_apart_from_none(tiny, tmp_path):
    """Token 52 never comes: its row has a gradient of zero. Types are never looked at: they have one."""
    model = effzoo.build("bert", **{**tiny, "task": "classification", "num_labels": 3})
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.blocks[1].mlp.up.requires_grad_(True)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.zero_()
    result = finetune(model, CLASSES, output_dir=tmp_path, progress=False, save_every=None, max_steps=3)
    assert (
        set(result.untouched.zero) == {"blocks.1.mlp.up.weight", "blocks.1.mlp.up.bias"} and not result.untouched.none
    )
    assert "got a gradient of zero in every step: blocks.*.mlp.up.weight, blocks.*.mlp.up.bias" in str(result.untouched)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_when_nothing_that_is_trained_gets_a_gradient_it_is_an_error(tiny, tmp_path, accumulation):
    with pytest.raises(
        TrainingError, match=r"depends on nothing that is trained: blocks.\*.attn.q_global.lora.A, .* got no gradient"
    ):
        run(
            tiny, tmp_path, "gpt2", "causal_lm", "longformer[window=4, global_projections=true]", TOKENS,
            "lora[targets=attn.*_global]", gradient_accumulation=accumulation,
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.safetensors"))


def test_gradients_of_zero_alone_are_an_error_at_the_end(tiny, tmp_path):
    model = effzoo.build("bert", **{**tiny, "task": "classification", "num_labels": 3})
    model.requires_grad_(False)
    model.blocks[1].mlp.up.requires_grad_(True)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.zero_()
    with pytest.raises(TrainingError, match="got a gradient of zero in every step: .*; nothing was learned in 2 steps"):
        finetune(model, CLASSES, output_dir=tmp_path, progress=False, max_steps=2, save_every=None)


def test_the_watch_forgets_a_tensor_once_it_has_a_gradient_and_takes_in_those_of_a_later_stage():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    gradients = Gradients()
    gradients.begin(model)
    assert not gradients.untouched()
    model.weight.grad = torch.zeros(2, 2)
    gradients.look()
    assert set(gradients.untouched().zero) == {"weight"}
    model.bias.requires_grad_(True)
    gradients.begin(model)
    model.weight.grad = torch.eye(2)
    gradients.look()
    assert gradients.untouched() == Untouched({"bias": 2}, {}, {"weight": 4, "bias": 2})
    assert str(gradients.untouched()) == "1 of 2 trained tensors (2 of 6 numbers, 33.3 %) got no gradient: bias"
    gradients.check_moved()


def test_names_are_shown_as_patterns():
    names = [f"blocks.{i}.attn.{p}.adapters.default.lora.A" for i in range(3) for p in "qkvo"] + [
        f"x{i}" for i in range(4)
    ]
    assert patterns(names) == (
        "blocks.*.attn.q.lora.A, blocks.*.attn.k.lora.A, blocks.*.attn.v.lora.A, "
        "blocks.*.attn.o.lora.A, x0, x1 and 2 more"
    )


@pytest.mark.cover()
@pytest.mark.parametrize(
    ("name", "task", "attention", "peft"),
    [
        ("longformer", "classification", "longformer[window=4]", "lora"),
        ("longformer", "masked_lm", "longformer[window=4]", "lora"),
        ("longformer", "masked_lm", "longformer[window=4, global_projections=false]", "lora"),
        ("longformer", "masked_lm", "longformer[window=4]", "prompt[length=2]|lora"),
        ("bert", "token_classification", "longformer[window=4]", "ia3"),
        ("gpt2", "causal_lm", "longformer[window=4, global_projections=true]", "lora"),
        ("gpt2", "causal_lm", "longformer[window=4]", "lora"),
        ("bert", "classification", "full", "lora"),
        ("bert", "classification", ("longformer[window=4]", "full"), "lora"),
        ("longformer", "classification", "longformer[window=4]", None),
    ],
)
def test_account_and_attach_say_before_what_a_training_finds(tiny, tmp_path, name, task, attention, peft, caplog):
    rows = (
        CLASSES
        if task == "classification"
        else [{**row, "labels": [label % 3 for label in row["labels"]]} for row in TOKENS]
    )
    with caplog.at_level(logging.INFO, logger="effzoo"):
        model, result = run(tiny, tmp_path, name, task, attention, rows, peft, max_steps=2)
    told = effzoo.account(model).unread
    missed = {
        key
        for key in {**result.untouched.none, **result.untouched.zero}
        if ".attn." in key and not key.endswith("k.bias")
    }
    before = trained_unread(model)
    assert {key for key in before if not key.endswith("k.bias")} == missed and len(told) <= 1, (
        "a key's bias has no gradient by mathematics"
    )
    assert list(told.values()) == [(len(before), sum(numbers for _, numbers in before.values()))][: len(told)]
    assert ("attach: some of what" in caplog.text) == bool(missed and peft)
    assert ("unread " in str(effzoo.account(model))) == bool(missed)
