"""device_map: a model on the devices that were named, and refusals of maps that leave something out."""

import pytest
import torch
from accelerate import cpu_offload

import effzoo
from effzoo.attention import Mask
from effzoo.errors import OptionError
from effzoo.placing import _by_size


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return effzoo.build("bert", **tiny | {"task": "masked_lm"}, attention="longformer[window=4]", peft="lora").eval()


def inputs():
    ids = torch.randint(1, 53, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": torch.eye(11)[:2].long()}


@pytest.mark.parametrize(
    "where",
    [
        "cpu",
        torch.device("cpu"),
        "auto",
        "sequential",
        {"": "cpu"},
        {"embeddings": "cpu", "blocks": "cpu", "final_norm": "cpu", "head": "cpu"},
    ],
)
def test_a_model_is_where_the_map_says(where, model, tmp_path):
    effzoo.save(model, tmp_path / "m")
    if isinstance(where, dict):
        where = {path: place for path, place in where.items() if path == "" or getattr(model, path) is not None}
    given = inputs()
    for again in (
        effzoo.load(tmp_path / "m", device_map=where),
        effzoo.build(pretrained=tmp_path / "m", device_map=where).eval(),
    ):
        assert {parameter.device for parameter in again.parameters()} == {torch.device("cpu")}
        assert torch.equal(again(**given).logits, model(**given).logits)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"embeddings": "cpu"}, "device_map has no device for blocks.0"),
        ({"block": "cpu", "": "cpu"}, "device_map names 'block', which is no module of the model; the first ones are"),
        ("gpu", "device_map has no device 'gpu'; name one as torch does"),
        ({"": "disk"}, "device_map has no 'disk'"),
        ("cuda:7", "device_map names cuda:7, and there are 0 CUDA devices"),
        ({}, "device_map is empty"),
        ({"": "cpu", "head": "meta"}, "the head is tied to the token embedding"),
    ],
)
def test_a_map_that_leaves_something_out_is_refused(where, says, tiny):
    with pytest.raises(OptionError, match=says):
        effzoo.build("bert", **tiny | {"task": "masked_lm"}, device_map=where)


def test_a_model_is_either_split_over_processes_or_over_devices(tmp_path):
    with pytest.raises(OptionError, match="shard='full' gives each process a device of its own"):
        effzoo.load(tmp_path, shard="full", device_map="auto")


def test_hooks_of_accelerate_bring_weights_and_inputs_together(tiny):
    """What dispatching over several devices rests on, where there is one: weights come when a module runs."""
    kind = "longformer[window=4]"
    model = effzoo.build("bert", **tiny | {"task": "classification"}, attention=kind).eval()
    given = inputs()
    wanted = model(**given).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert torch.equal(model(**given).logits, wanted)


def test_blocks_stay_whole_when_accelerate_chooses(model, monkeypatch):
    sizes = {0: 10**9, "cpu": 10**9}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: sizes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    places = _by_size(model, "sequential")
    assert set(places.values()) == {torch.device("cuda", 0)}
    assert {path for path in places if path.startswith("blocks.")} <= {"blocks.0", "blocks.1"}


def test_a_mask_on_another_device_is_the_same_mask_and_made_once():
    mask = Mask(torch.tensor([[True, False]]), most_globals=0, position_ids=torch.arange(2)[None])
    there = mask.to("meta")
    assert there.valid.device.type == there.position_ids.device.type == "meta" and there.most_globals == 0
    assert mask.to("meta") is there and mask.to("cpu") is mask
