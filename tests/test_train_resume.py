"""A checkpoint is resumed by the run that wrote it, and by no other; a damaged one is found before anything is read of
it."""

import json
import random
import shutil

import datasets
import pytest
import torch
from support import finetune

import effzoo
from effzoo.errors import AdapterError, TrainingError
from effzoo.train import checkpoints

ROWS = [{"input_ids": [2 + i, 3, 4, 5 + i % 3], "labels": i % 3} for i in range(16)]
SETTINGS = {"max_steps": 4, "batch_size": 4, "save_every": 2, "keep": None, "learning_rate": 1e-2, "progress": False}


def classifier(tiny, name="bert", **options):
    torch.manual_seed(0)
    return effzoo.build(
        name, **{**tiny, "layers": 1, "task": "classification", "num_labels": 3, "peft": "lora", **options}
    )


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folders of runs that were interrupted after two of four steps, by the model."""
    kept = {}

    def of(name, tiny, **options):
        key = name, *sorted(map(str, options.items()))
        if key not in kept:
            kept[key] = tmp_path_factory.mktemp(name)
            finetune(classifier(tiny, name, **options), ROWS, output_dir=kept[key], **SETTINGS)
            shutil.rmtree(kept[key] / "checkpoint-4")
            shutil.rmtree(kept[key] / "adapter", ignore_errors=True)
            (kept[key] / "model.safetensors").unlink(missing_ok=True)
        return kept[key]

    return of


@pytest.fixture
def interrupted(half, tiny, tmp_path):
    def copy(name="bert", **options):
        return shutil.copytree(half(name, tiny, **options), tmp_path / "run")

    return copy


def resume(model, folder, rows=ROWS, **given):
    return finetune(model, rows, output_dir=folder, resume=True, **{**SETTINGS, **given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "model: heads was 2 and is now 4"),
        ({"activation": "relu"}, "model: activation was 'gelu' and is now 'relu'"),
        ({"eps": 1e-3}, "model: eps was 1e-12 and is now 0.001"),
        ({"attention": "local[chunk=2]"}, "model: attention of layer 0 was 'full' and is now 'local'"),
        ({"dropout": 0.5}, r"model: dropout of .* was 0\.0 and is now 0\.5"),
        ({"attention_dropout": 0.25}, r"model: dropout of .*core was 0\.0 and is now 0\.25"),
        ({"peft": "lora[alpha=2]"}, "adapters was .* and is now .*alpha=2"),
        ({"peft": "lora[dropout=0.1]"}, r"adapters was .* and is now .*dropout=0\.1"),
    ],
)
@pytest.mark.parametrize("peft", ["lora", None])
def test_another_model_is_named_with_both_values(tiny, interrupted, options, message, peft):
    if "peft" in options and peft is None:
        message = "rates was|adapters was|dtypes|dropout"
    with pytest.raises(TrainingError, match=f"belongs to another run: .*{message}"):
        resume(classifier(tiny, **{"peft": peft, **options}), interrupted(peft=peft))


@pytest.mark.parametrize(
    ("name", "before", "options", "message"),
    [
        ("longformer", {}, {"attention": "longformer[window=4]"}, "window was 512 and is now 4"),
        (
            "bert",
            {"attention": "lsh[chunk=4]"},
            {"attention": "lsh[chunk=4, seed=7]"},
            "model: attention of layer 0, seed was 0 and is now 7",
        ),
        ("gpt2", {}, {"pooling": "mean"}, "model: pooling was 'last' and is now 'mean'"),
    ],
)
def test_another_kind_of_model_is_named_too(tiny, interrupted, name, before, options, message):
    with pytest.raises(TrainingError, match=message):
        resume(classifier(tiny, name, **options), interrupted(name, **before))


def test_a_frozen_tensor_that_differs_is_found_with_and_without_adapters(tiny, tmp_path):
    def partly(change):
        model = classifier(tiny, peft=None)
        model.embeddings.requires_grad_(False)
        with torch.no_grad():
            model.embeddings.token.weight[7] += change
        return model

    finetune(partly(0.0), ROWS, output_dir=tmp_path, **SETTINGS)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(TrainingError, match=r"model: embeddings.token.weight was 'float32\[53, 16\] \w+' and is now"):
        resume(partly(1.0), tmp_path)
    assert resume(partly(0.0), tmp_path).steps == 4


def changed(index, **columns):
    return [{**row, **(columns if at == index else {})} for at, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    "rows",
    [
        changed(15, labels=1), changed(0, input_ids=[2, 3, 4, 6]), changed(3, input_ids=[5, 3, 4]), ROWS[1:] + ROWS[:1],
        [{**row, "attention_mask": [1, 1, 1, 0]} for row in ROWS],
        [{**row, "labels": 2 - row["labels"]} for row in ROWS],
    ],
)  # fmt: skip
def test_other_data_is_refused(tiny, interrupted, rows):
    with pytest.raises(
        TrainingError,
        match=r"data was '\w+' and is now '\w+' \(hashes of all rows: the rows of train are not those of that run\)",
    ):
        resume(classifier(tiny), interrupted(), rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_decay": 0.5}, "weight_decay was 0.01 and is now 0.5"),
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is now 0.02"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"schedule": "cosine"}, "schedule was 'linear' and is now 'cosine'"),
        ({"warmup": 2}, "warmup was 0.06 and is now 2"),
        ({"clip": None}, "clip was 1.0 and is now None"),
        ({"precision": "bfloat16"}, "precision was 'float32' and is now 'bfloat16'"),
        ({"batch_size": 2}, "batch_size was 4 and is now 2"),
        ({"gradient_accumulation": 2}, "gradient_accumulation was 1 and is now 2"),
        ({"group_by_length": True}, "group_by_length was False and is now True"),
        ({"max_steps": 6}, r"steps was 4 and is now 6 \(the schedule spans all steps; to train longer"),
        ({"evaluate": ROWS, "best": "loss"}, "evaluation was None and is now"),
        (
            {
                "collator": lambda rows: {
                    "input_ids": torch.tensor([[2]] * len(rows)),
                    "labels": torch.tensor([0] * len(rows)),
                }
            },
            "collator was None",
        ),
    ],
)
def test_every_setting_that_changes_a_number_is_compared(tiny, interrupted, given, message):
    with pytest.raises(TrainingError, match=message):
        resume(classifier(tiny), interrupted(), **given)


def test_what_changes_no_number_may_change(tiny, interrupted, tmp_path):
    straight = finetune(classifier(tiny), ROWS, output_dir=tmp_path / "straight", **SETTINGS)
    free = {
        "save_every": 1, "keep": 1, "eval_batch_size": 3, "evaluate": ROWS[:3], "evaluate_every": None,
        "num_workers": 0, "recompute": "nothing", "batch_size": 2, "gradient_accumulation": 2,
    }  # fmt: skip
    moved = shutil.move(interrupted(), tmp_path / "elsewhere")
    model = classifier(tiny)
    again = resume(model, moved, datasets.Dataset.from_list(ROWS), **free)
    assert again.steps == 4 and again.metrics["train_loss"] == pytest.approx(straight.metrics["train_loss"], rel=1e-6)
    fresh = effzoo.load_adapter(classifier(tiny, peft=None), straight.adapter)
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_rows_that_are_read_when_asked_for_are_resumed_with_a_warning(tiny, tmp_path, caplog):
    class Lazy:
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, index):
            return ROWS[index]

    finetune(classifier(tiny), Lazy(), output_dir=tmp_path, **SETTINGS)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert resume(classifier(tiny), tmp_path, Lazy()).steps == 4
    assert "whether they are those of the earlier run is not known" in caplog.text
    told = Lazy()
    told.fingerprint = "rows of today"
    with pytest.raises(TrainingError, match="data was None and is now 'rows of today'"):
        resume(classifier(tiny), tmp_path, told)


def damage(file, how, draw):
    """Change a file as a bad disk, a full one or a careless hand would."""
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        content = content[: draw.randrange(len(content))]
    elif how == "more":
        content += bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    elif how == "zeros":
        at = draw.randrange(len(content))
        size = min(len(content) - at, 64)
        if not any(content[at : at + size]):
            content += b"\0"
        content[at : at + size] = bytes(size)
    elif how == "other":
        content = bytearray(
            draw.choice([b"", b"{}", b"[]", b"null", b"[" * 9999, b'{"step": 2}', b'{"files": 3}', b"\xff\xfe"])
        )
    file.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(tiny, half, tmp_path):
    draw, source = random.Random(0), half("bert", tiny) / "checkpoint-2"
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"run.json", "state.json", "state.safetensors", "history.json", "sums.json"}
    checkpoints.check_whole(source)
    for number, file in enumerate([file for file in files for _ in range(12)]):
        copy = shutil.copytree(source, tmp_path / str(number) / "checkpoint-2")
        damage(copy / file, how := draw.choice(["flip", "cut", "more", "zeros", "other"]), draw)
        if (copy / file).read_bytes() == (source / file).read_bytes():
            continue
        with pytest.raises(TrainingError, match="is not a whole checkpoint"):
            checkpoints.check_whole(copy)
        assert how
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "name", ["run.json", "state.json", "state.safetensors", "history.json", "sums.json", "adapter"]
)
def test_resuming_says_what_is_damaged_and_where_else_to_go_on(tiny, interrupted, name):
    folder = interrupted()
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    sums = json.loads((folder / "checkpoint-3" / "sums.json").read_text())
    with pytest.raises(
        TrainingError,
        match=r"checkpoint-3 is not a whole checkpoint: sums.json is damaged .*; remove it to resume from checkpoint-2",
    ):
        resume(classifier(tiny), folder)
    shutil.rmtree(folder / "checkpoint-3")
    file = (
        next((folder / "checkpoint-2" / name).glob("*.safetensors"))
        if name == "adapter"
        else folder / "checkpoint-2" / name
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(TrainingError, match=f"{file.name} (has changed|is damaged).*; there is no earlier one; Saving"):
        resume(classifier(tiny), folder)
    file.unlink()
    with pytest.raises(TrainingError, match=f"{file.name} is missing"):
        resume(classifier(tiny), folder)
    assert sums["step"] == 2


def test_the_best_checkpoint_is_looked_at_before_it_is_loaded(tiny, tmp_path):
    from transformers import TrainerCallback

    class Damage(TrainerCallback):
        def on_train_end(self, args, state, control, **_):
            for file in tmp_path.glob("checkpoint-*/adapter/*.safetensors"):
                damage(file, "flip", random.Random(0))

    with pytest.raises(TrainingError, match="is not a whole checkpoint: adapter/"):
        finetune(
            classifier(tiny), ROWS, evaluate=ROWS, best="loss", output_dir=tmp_path, callbacks=[Damage()], **SETTINGS
        )


def test_an_adapter_of_another_base_is_still_named_by_its_tensor(tiny, interrupted):
    model = classifier(tiny)
    with torch.no_grad():
        model.embeddings.token.weight[0] += 1
    with pytest.raises(AdapterError, match="embeddings.token.weight"):
        resume(model, interrupted())
