"""Trainers of TRL take a model of effzoo unchanged; TRL needs a newer accelerate than effzoo does."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_ecosystem_trainers import WORDS, assert_close, built, losses, tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import effzoo
import effzoo.transformers
from effzoo.errors import IncompatibleError
from effzoo.transformers import without_adapters, wrap


def texts(rows=16):
    draw = np.random.default_rng(1)
    return [" ".join(draw.choice(WORDS, 9 + row % 4)) for row in range(rows)]


def tuned(model, folder, **more):
    given = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none",
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 3e-3, "seed": 3,
    }  # fmt: skip
    return SFTTrainer(
        model=model, args=SFTConfig(**(given | more)), train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer(),
    )  # fmt: skip


def test_sft_has_the_losses_of_the_model_of_transformers(tmp_path):
    mine = built("causal_lm")
    theirs, wrapped = effzoo.convert.to_transformers(mine), wrap(copy.deepcopy(mine))
    runs = [losses(tuned(model, tmp_path / str(n))) for n, model in enumerate((mine, wrapped, theirs))]
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])
    assert mine.config.pad_token == 0 and mine.config.eos_token == mine.generation_config.eos_token_id[0] == 1
    smooth = [losses(tuned(model, tmp_path / "s", label_smoothing_factor=0.1)) for model in (wrapped, theirs)]
    assert_close(*smooth)


def test_sft_trains_an_adapter_on_another_attention_and_keeps_it(tmp_path):
    model = built("causal_lm", attention="longformer[window=8]", peft="lora[rank=2]")
    base = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    trainer = tuned(wrap(model), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "kept"))
    again = effzoo.load(tmp_path / "kept")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.items())
    with effzoo.disabled(again):
        assert not torch.equal(again(ids).logits, model(ids).logits)


def test_a_trainer_that_reads_the_head_is_told_of_an_adapter_on_it(tmp_path):
    model = built("causal_lm", peft="lora[rank=2, targets=lm.out]", tied=False)
    with pytest.raises(IncompatibleError, match=r"an adapter hangs on lm\.out"):
        tuned(model, tmp_path).train()
    experts = built("causal_lm", experts=2)
    with pytest.raises(IncompatibleError, match="the loss that balances its experts"):
        tuned(experts, tmp_path).train()


def preferences(rows=12):
    draw = np.random.default_rng(2)
    return Dataset.from_list([
        {"prompt": " ".join(draw.choice(WORDS, 4)), "chosen": " " + " ".join(draw.choice(WORDS, 4)),
         "rejected": " " + " ".join(draw.choice(WORDS, 5))}
        for _ in range(rows)
    ])  # fmt: skip


def test_dpo_takes_the_reference_from_disabled_adapters(tmp_path):
    """The losses are those with a copy of the base as the reference."""
    runs = []
    for number in range(2):
        base = built("causal_lm")
        model = effzoo.attach(copy.deepcopy(base), "lora[rank=4]")
        reference = without_adapters(model) if number == 0 else wrap(base)
        args = DPOConfig(
            output_dir=str(tmp_path / str(number)), max_steps=5, per_device_train_batch_size=4, report_to="none",
            use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, learning_rate=0.3, beta=2.0, seed=3,
        )  # fmt: skip
        runs.append(losses(DPOTrainer(
            model=wrap(model), ref_model=reference, args=args, train_dataset=preferences(), processing_class=tokenizer()
        )))  # fmt: skip
    assert_close(*runs)
    assert abs(runs[0][0] - math.log(2)) < 1e-3 and min(runs[0]) < 0.6, "it learns, from log 2 on"
    with pytest.raises(IncompatibleError, match="without_adapters takes a decoder"):
        without_adapters(built())
