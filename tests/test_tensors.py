"""Tensors go into files and come back bit for bit; of several files, all are read or none, and a fault names the file
and the tensor."""

import json
import os
from functools import partial

import pytest
import safetensors.torch
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.errors import FileError, TrainingError
from effzoo.tensors import load_tensors, save_tensors, stored_tensors
from effzoo.train import checkpoints

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool)


def drawn():
    """Tensors of every dtype, one without axes, one without entries, one with a stride, and two that are one."""
    torch.manual_seed(0)
    tensors = {str(dtype): (8 * torch.randn(7, 33)).to(dtype) for dtype in DTYPES}
    table = torch.randn(40, 12)
    more = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": table.t(), "one": table, "other": table}
    return tensors | more


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (4000, 4), (1, 13)])
def test_what_is_written_is_read(limit, files, tmp_path):
    tensors = drawn()
    path = save_tensors(tmp_path, tensors, limit=limit)
    shards = [name for name in names(tmp_path) if name.endswith(".safetensors")]
    assert path.name == (WHOLE if files == 1 else INDEX) and len(shards) == files
    if files > 1:
        assert shards == [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
        content = json.loads(path.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert content["weight_map"].keys() == tensors.keys()
    found = {key: torch.ones_like(value) for key, value in tensors.items()}
    load_tensors(found, tmp_path)
    assert all(found[key].equal(value) for key, value in tensors.items())
    by_others = {key: value for name in shards for key, value in safetensors.torch.load_file(tmp_path / name).items()}
    assert by_others.keys() == tensors.keys() and all(by_others[key].equal(value) for key, value in tensors.items())


def test_rows_are_read_in_blocks(tmp_path):
    """A tensor of 36 MiB, in blocks of 1 MiB: each its rows, together all of it."""
    table = torch.arange(3 * 2**20, dtype=torch.float32).view(-1, 3).repeat(3, 1)[:, :3]
    save_tensors(tmp_path, {"table": table})
    blocks = list(stored_tensors(tmp_path)["table"].blocks())
    assert len(blocks) > 3 and max(rows.nbytes for _, rows in blocks) <= 2**20
    assert torch.cat([rows for _, rows in blocks]).equal(table)
    assert all(table[index].equal(rows) for index, rows in blocks)


def test_transformers_reads_the_files(tiny, tmp_path):
    ours = convert.to_transformers(effzoo.build("bert", **tiny))
    ours.config.save_pretrained(tmp_path)
    save_tensors(tmp_path, ours.state_dict(), limit=4000)
    assert len(names(tmp_path)) > 5
    read = transformers.BertModel.from_pretrained(tmp_path).state_dict()
    assert all(read[key].equal(value) for key, value in ours.state_dict().items())


def test_each_tensor_is_made_when_its_file_is_written(tmp_path):
    """What a sharded model gathers is gathered file by file."""
    tensors = {str(number): torch.full((8,), float(number)) for number in range(6)}
    written = []

    def gathered(tensor):
        written.append(len([name for name in names(tmp_path) if name.endswith(".partial")]))
        return tensor + 1

    save_tensors(tmp_path, tensors, limit=64, gathered=gathered)
    assert written == [1, 1, 2, 2, 3, 3]
    assert all(stored.read().equal(tensors[key] + 1) for key, stored in stored_tensors(tmp_path).items())


def test_what_was_there_before_is_gone(tmp_path):
    """Fewer files, then one, then more again: each time the folder holds the new model alone."""
    for factor, limit, files in ((1, 64, 4), (2, 100, 3), (3, 10**9, 1), (4, 64, 4)):
        tensors = {str(number): torch.full((8,), float(factor * number)) for number in range(7)}
        save_tensors(tmp_path, tensors, limit=limit)
        assert len(names(tmp_path)) == files + (files > 1)
        assert all(stored.read().equal(tensors[key]) for key, stored in stored_tensors(tmp_path).items())


@pytest.mark.parametrize("before", [64, 10**9])
@pytest.mark.parametrize("killed", range(5))
def test_several_files_are_read_together_or_not_at_all(before, killed, tmp_path, monkeypatch):
    """Killed at every rename: the folder holds the new model, or none, and never some files of each."""
    old, new = ({str(n): torch.full((8,), float(n + more)) for n in range(8)} for more in (0, 100))
    save_tensors(tmp_path, old, limit=before)
    renamed, replace = [], os.replace

    def killed_here(source, target):
        if len(renamed) == killed:
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_here)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path, new, limit=64)
    monkeypatch.undo()
    with pytest.raises(FileError, match=r"model\.safetensors is missing"):
        stored_tensors(tmp_path)
    save_tensors(tmp_path, new, limit=64)
    assert all(stored.read().equal(new[key]) for key, stored in stored_tensors(tmp_path).items())


FAULTS = {
    "shard gone": r"has no model-00002-of-00004\.safetensors, which holds 2 tensors \(2, \.\.\.\)",
    "shard empty": r"model-00002-of-00004\.safetensors is missing or damaged .* It should hold 2 and 1 others",
    "shard cut": r"model-00002-of-00004\.safetensors is missing or damaged .* It should hold 2 and 1 others",
    "another shard": r"model-00002-of-00004\.safetensors lacks 2, which it holds as .*index\.json says",
    "no index": r"model\.safetensors\.index\.json is no index of shards",
    "out of the folder": r"index\.json leads out of its folder, to .*shards lie beside their index",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_the_file_and_the_tensor(fault, tmp_path):
    tensors = {str(number): torch.full((8,), float(number)) for number in range(8)}
    save_tensors(tmp_path, tensors, limit=64)
    shard, index = tmp_path / "model-00002-of-00004.safetensors", tmp_path / INDEX
    if fault == "shard gone":
        shard.unlink()
    elif fault == "shard empty":
        shard.write_bytes(b"")
    elif fault == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif fault == "another shard":
        shard.write_bytes((tmp_path / "model-00003-of-00004.safetensors").read_bytes())
    elif fault == "no index":
        index.write_text("[")
    else:
        index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    kept = {key: torch.zeros_like(value) for key, value in tensors.items()}
    with pytest.raises(FileError, match=FAULTS[fault]):
        load_tensors(kept, tmp_path)
    assert all(value.eq(0).all() for value in kept.values())


def test_other_names_and_shapes_are_refused_and_nothing_changes(tmp_path):
    save_tensors(tmp_path, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    for wanted, message in (
        ({"a": torch.zeros(3)}, "b is one too many"),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(1)}, "c is missing"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, r"b has shape \(2, 2\) in the file and \(4,\) here"),
    ):
        with pytest.raises(FileError, match=message):
            load_tensors(wanted, tmp_path)
        assert all(value.eq(0).all() for value in wanted.values())


def test_a_trained_model_is_written_in_several_files_and_read_back(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_tensors", partial(save_tensors, limit=4000))
    model, other = (effzoo.build("gpt2", **tiny) for _ in range(2))
    assert checkpoints.save_weights(model, tmp_path) == tmp_path / INDEX and len(names(tmp_path)) > 5
    checkpoints.load_weights(other, tmp_path)
    assert all(value.equal(other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(TrainingError, match=r"does not fit this model: .* is missing"):
        checkpoints.load_weights(effzoo.build("bert", **tiny), tmp_path)
