"""Trainers of other packages take a model of effzoo unchanged, and train it to the losses of the model of transformers
that computes the same."""

import copy
import math

import lightning
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, Trainer, TrainingArguments

import effzoo
import effzoo.transformers
from effzoo.errors import OptionError
from effzoo.transformers import wrap

SMALL = {"layers": 2, "dim": 32, "heads": 4, "mlp": 48, "vocab": 60, "max_length": 64, "dropout": 0.0}
SMALL |= {"attention_dropout": 0.0}
WORDS = [f"w{number}" for number in range(50)]


def tokenizer():
    known = {word: number for number, word in enumerate(["[PAD]", "[EOS]", "[UNK]", "x", "y", *WORDS])}
    plain = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=64
    )


def built(task="classification", name=None, **more):
    torch.manual_seed(0)
    name = name or ("llama" if task == "causal_lm" else "bert")
    return effzoo.build(name, task=task, **(SMALL | {"pad_token": 0, "kv_heads": 0} | more))


def examples(task="classification", rows=16):
    draw = np.random.default_rng(0)
    table = []
    for _ in range(rows):
        ids = draw.integers(5, 55, 8).tolist()
        table.append({"input_ids": ids, "labels": ids if task == "causal_lm" else int(ids[0] > 30)})
    return table


def arguments(folder, **more):
    given = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
        "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**(given | more))


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(mine, theirs):
    assert len(mine) == len(theirs) > 1
    np.testing.assert_allclose([float(x) for x in mine], [float(x) for x in theirs], rtol=2e-4)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("given", [
    {}, {"label_smoothing_factor": 0.2},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"neftune_noise_alpha": 5.0},
], ids=["plain", "smoothed", "checkpointed", "neftune"])  # fmt: skip
def test_losses_are_those_of_the_model_of_transformers(task, given, tmp_path):
    """With a plain model, a wrapped one, and theirs."""
    mine = built(task)
    theirs = effzoo.convert.to_transformers(mine)
    wrapped = wrap(copy.deepcopy(mine))
    runs = []
    for number, model in enumerate((mine, wrapped, theirs)):
        runs.append(losses(Trainer(model, arguments(tmp_path / str(number), **given), train_dataset=examples(task))))
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])
    if "neftune_noise_alpha" in given:
        without = losses(Trainer(built(task), arguments(tmp_path), train_dataset=examples(task)))
        assert not np.allclose(runs[0], without)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_accumulated_batches_have_the_losses_of_whole_ones(task, tmp_path):
    """With a wrapped model also where the parts have different numbers of labels."""
    table = examples(task)
    for row in table[::3] if task == "causal_lm" else ():
        row["labels"] = [-100] * 6 + row["labels"][6:]
    runs = []
    for given in ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}):
        runs.append(losses(Trainer(wrap(built(task)), arguments(tmp_path, **given), train_dataset=table)))
    assert_close(*runs)
    plain = losses(Trainer(built(task), arguments(tmp_path), train_dataset=table))
    assert_close(plain, runs[0])


@pytest.mark.parametrize("outer", [False, True], ids=["plain", "wrapped"])
def test_evaluation_best_model_early_stopping_and_tensorboard(outer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = effzoo.attach(built(), "lora[rank=4]")
    model = wrap(model) if outer else model
    shapes = []

    def measured(seen):
        shapes.append((seen.predictions.shape, seen.label_ids.shape))
        return {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())}

    given = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 40}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "report_to": ["tensorboard"]}
    trainer = Trainer(
        model, arguments(tmp_path / "run", learning_rate=0.3, **given), train_dataset=examples(),
        eval_dataset=examples(rows=6), compute_metrics=measured, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert shapes[0] == ((6, 2), (6,)), "predictions are the logits alone"
    assert trainer.state.global_step < 40, "it stopped early"
    assert math.isclose(trainer.evaluate()["eval_loss"], trainer.state.best_metric, rel_tol=1e-5)
    assert list((tmp_path / "board").rglob("events*"))
    if outer:
        best = effzoo.load(trainer.state.best_model_checkpoint)
        assert list(effzoo.attached(best)) == ["default"]
        for (key, a), (other, b) in zip(best.state_dict().items(), model.state_dict().items(), strict=True):
            assert key == other and torch.equal(a, b), key


@pytest.mark.parametrize("outer", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("peft", [None, "lora[rank=2]"])
def test_a_run_resumes_to_the_same_weights(outer, peft, tmp_path):
    def run(folder, steps, resume=False):
        model = built(peft=peft) if peft else built()
        given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        trainer = Trainer(
            wrap(model) if outer else model, arguments(tmp_path / folder, **given | {"max_steps": steps}),
            train_dataset=examples(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run("whole", 6)
    run("parts", 3)
    resumed = run("parts", 6, resume=True)
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_settings_that_are_not_computed_here_are_refused(tmp_path):
    for given in ({"use_reentrant": True}, {"every_n_layers": 2}):
        with pytest.raises(OptionError, match="gradient checkpointing takes"):
            Trainer(
                built(), arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=given),
                train_dataset=examples(),
            ).train()  # fmt: skip
    with pytest.raises(OptionError, match=r"pad_token_id takes"):
        built().config.pad_token_id = "0"
    with pytest.raises(AttributeError, match="cannot assign to field"):
        built().config.layers = 3


def test_what_a_trainer_sets_stays_with_one_model():
    one, other = built("causal_lm"), built("causal_lm")
    again = effzoo.zoo.made(one.config, "causal_lm", 2)
    one.config.get_text_config().eos_token_id = [3, 4]
    one.config.use_cache = False
    assert one.config.eos_token == (3, 4) and other.config.eos_token != (3, 4) and again.config.eos_token != (3, 4)
    assert one.generation_config is wrap(one).generation_config
    assert wrap(one).config.to_dict()["model_type"] == one.config.to_dict()["model_type"] == "effzoo"
    assert wrap(one)(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 60)
    assert wrap(one).config.eos_token_id == [3, 4]
    assert one.device.type == "cpu" and one.dtype == torch.float32 and one.num_parameters() == sum(
        p.numel() for p in one.parameters()
    )  # fmt: skip
    assert repr(one).startswith("Transformer(") and one.get_input_embeddings() is one.embeddings.token
    deep = copy.deepcopy(one)
    assert wrap(deep).inner is deep and wrap(deep) is not wrap(one)


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


@pytest.mark.parametrize("outer", [False, True], ids=["plain", "wrapped"])
def test_lightning_trains_and_its_checkpoint_loads(outer, tmp_path):
    parts = [examples()[start : start + 4] for start in range(0, 16, 4)]
    batches = [{key: torch.tensor([row[key] for row in part]) for key in ("input_ids", "labels")} for part in parts]
    model = effzoo.attach(built(), "lora[rank=2]")
    mine = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=3e-3)
    expected = []
    for batch in batches:
        loss = mine.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    module = Module(wrap(model) if outer else model)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=True,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module.train(), torch.utils.data.DataLoader(batches, batch_size=None))
    np.testing.assert_allclose(module.seen, expected, rtol=1e-6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = effzoo.attach(built(), "lora[rank=2]")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt", model=wrap(other) if outer else other)
    ids = batches[0]["input_ids"]
    assert torch.equal(again.model.eval()(ids).logits, model.eval()(ids).logits)


def test_early_stopping_of_transformers_in_finetune(tmp_path):
    model = built(peft="lora[rank=2]")
    result = effzoo.finetune(
        model, examples(), evaluate=examples(rows=6), output_dir=tmp_path, progress=False, learning_rate=0.5, epochs=50,
        saving=effzoo.train.Saving(best="loss", evaluate_every=2), callbacks=[EarlyStoppingCallback(1)],
    )  # fmt: skip
    assert result.steps < 200
