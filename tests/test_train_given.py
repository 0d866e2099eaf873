"""What is no model of ours is refused with what was given, what is taken and what to try; the loop that the sentence
names trains it."""

import pytest
import torch
from torch import nn

import effzoo
from effzoo.errors import OptionError
from effzoo.peft import training
from effzoo.sites import Linear

ROWS = [{"input_ids": [2, 3], "labels": 0}]


class Sites(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Linear(4, 8, role="mlp.up", layer=0), Linear(8, 4, role="mlp.down", layer=0)

    def forward(self, x):
        return self.down(self.up(x).relu())


def refusals(model, folder):
    for call in (lambda: effzoo.finetune(model, ROWS, output_dir=folder), lambda: effzoo.predict(model, ROWS)):
        with pytest.raises(OptionError) as caught:
            call()
        yield str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("peft", [None, "lora[targets=mlp.*]", "far"])
def test_a_module_of_sites_is_told_the_loop_that_trains_it(tmp_path, peft):
    model = Sites() if peft is None else effzoo.attach(Sites(), peft)
    for said in refusals(model, tmp_path):
        assert (
            "model is a model of effzoo, as effzoo.build or effzoo.convert.from_transformers returns it, got 'Sites'"
        ) in said
        assert (
            "a module with 2 of effzoo's sites" in said
            and "train it in a loop of your own" in said
            and "effzoo.peft.begin" in said
        )
    if peft is None:
        return
    x, losses = torch.randn(16, 4), []
    for stage, steps in training.timetable(model, 20):
        training.begin(model, stage)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(steps):
            training.schedule(model, step / steps)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    training.finish(model)
    assert losses[-1] < losses[0]


def test_a_module_without_sites_is_told_to_convert_or_build(tmp_path):
    for said in refusals(nn.Linear(2, 2), tmp_path):
        assert "got 'Linear', a module with 0 of effzoo's sites" in said and said.endswith(
            "train what effzoo.convert.from_transformers(model) returns, or the model of effzoo.build"
        )


def test_a_teacher_that_is_no_model_is_named_as_such(tiny, tmp_path):
    model = effzoo.build("bert", **{**tiny, "task": "classification", "num_labels": 3, "peft": "lora"})
    with pytest.raises(
        OptionError, match="^teacher is a model of effzoo, .* got 'Sites', a module with 2 of effzoo's sites"
    ):
        effzoo.finetune(model, ROWS, output_dir=tmp_path, teacher=Sites())
