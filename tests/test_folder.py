"""A model saved to a folder and loaded again computes the same to the bit; files that are not as saved are refused."""

import dataclasses
import json
import os
import random
import shutil

import pytest
import tokenizers
import torch
import transformers
from support import sizes_of, small

import effzoo
from effzoo.errors import EffzooError, FileError, IncompatibleError, OptionError
from effzoo.folder import description, saving
from effzoo.peft.fingerprint import difference, fingerprint
from effzoo.sites import sites

TASKS = (
    "features",
    "classification",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
)


def built(name="bert", task="classification", seed=0, **more):
    torch.manual_seed(seed)
    labels = {} if task == "question_answering" else {"num_labels": 3}
    model = effzoo.build(name, task=task, **labels, **(sizes_of(name) | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def moved(model):
    """Adapters that change something, as after training."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def given(model):
    draw = torch.Generator().manual_seed(3)
    if getattr(model.config, "vocab", 0):
        ids = torch.randint(2, model.config.vocab, (2, 17), generator=draw)
        return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})
    dtype = next(model.parameters()).dtype
    return {"inputs_embeds": torch.randn(2, *model.config.grid, model.config.channels, generator=draw).to(dtype)}


@torch.no_grad()
def out(model):
    return model.eval()(**given(model))


def written(model):
    """config.json, without what the folder alone can know."""
    return description.Description.of_base(model).with_adapters(model, ()).written()


def check_same(model, folder):
    """Saved and loaded: the same outputs, fingerprint and config, and torch's random draws go on as before."""
    effzoo.save(model, folder)
    state = torch.get_rng_state()
    again = effzoo.load(folder)
    assert torch.equal(state, torch.get_rng_state()) and not again.training
    mine, theirs = out(model), out(again)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    assert difference(fingerprint(model), fingerprint(again)) is None
    assert written(model) == written(again)
    assert (again.task, again.own_labels, again.num_labels) == (model.task, model.own_labels, model.num_labels)
    return again


@pytest.mark.parametrize("name", effzoo.models())
def test_every_model_of_the_zoo(name, tmp_path):
    for task in TASKS:
        try:
            model = built(name, task)
        except (IncompatibleError, OptionError):
            continue
        check_same(model, tmp_path / task)


@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_every_kind_swapped_in(kind, tmp_path):
    model = built()
    effzoo.swap_attention(model, [small(kind), "full"])
    again = check_same(model, tmp_path)
    assert again.config.attention == model.config.attention


@pytest.mark.parametrize("seed", range(12))
def test_models_drawn_at_random(seed, tmp_path):
    draw = random.Random(seed)
    name = draw.choice(["bert", "gpt2", "llama", "albert", "roberta", "modernbert"])
    sizes = {"dropout": draw.choice([0.0, 0.2])}
    if name != "albert":
        sizes["attention"] = [{"name": "longformer", "window": 8}, draw.choice(["full", "local[chunk=8]", "linformer"])]
    if name not in ("albert", "modernbert"):
        sizes |= draw.choice([{}, {"experts": 2}, {"norm_kind": "rms"}, {"tied": False}, {"activation": "relu"}])
    model = built(name, draw.choice(["features", "classification", "token_classification"]), seed=seed, **sizes)
    if draw.random() < 0.5:
        effzoo.resize_vocabulary(model, 60)
    model.to(draw.choice([torch.float32, torch.float64, torch.bfloat16]))
    if draw.random() < 0.3:
        effzoo.quantise(model, draw.choice([4, 8]))
    for number, peft in enumerate(draw.sample(["lora[rank=2]", "houlsby", "prefix", "ia3", "bitfit|lora"], 2)):
        try:
            effzoo.attach(model, peft, name=f"a{number}")
        except EffzooError:
            continue
    check_same(moved(model), tmp_path)


def test_dtypes_heads_vocabularies_and_merged_adapters(tmp_path):
    for number, dtype in enumerate((torch.float64, torch.bfloat16, torch.float16)):
        again = check_same(built(attention="lsh[chunk=4]").to(dtype), tmp_path / str(number))
        assert next(again.parameters()).dtype == dtype
    mixed = built().bfloat16()
    mixed.head.float()
    assert {p.dtype for p in check_same(mixed, tmp_path / "mixed").parameters()} == {torch.bfloat16, torch.float32}
    for task, tied in (("masked_lm", True), ("masked_lm", False)):
        model = effzoo.resize_vocabulary(built(task=task, tied=tied), 64)
        again = check_same(model, tmp_path / f"lm {tied}")
        assert again.config.vocab == 64 and again.embeddings.token.added == 11
    merged = effzoo.merge(moved(effzoo.attach(built(), "lora")))
    assert not effzoo.attached(check_same(merged, tmp_path / "merged"))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(bits, tmp_path):
    model = built()
    effzoo.quantise(model, bits, targets="attn.*")
    effzoo.quantise(model, 12 - bits, targets="mlp.up")
    again = check_same(model, tmp_path)
    assert {s.bits for _, s in sites(again) if getattr(s, "bits", None)} == {4, 8}
    check_same(moved(effzoo.attach(again, "lora")), tmp_path)


def test_rotations_that_are_not_those_of_the_spec(tmp_path):
    model = built(attention="lsh[chunk=4, rounds=2]")
    for core in model.cores():
        core.resample(7)
        core.rounds = 4
    again = check_same(model, tmp_path)
    assert [core.rounds for core in again.cores()] == [4, 4]
    for core in again.cores():
        core.rounds = 2
    check_same(again, tmp_path)


def test_adapters_come_back_as_they_act(tmp_path):
    model = built()
    for name, peft in (("a", "lora[rank=2]"), ("b", "houlsby"), ("c", "prefix[length=3]")):
        effzoo.attach(model, peft, name=name)
    moved(model)
    ways = [
        lambda: effzoo.activate(model), lambda: effzoo.activate(model, "b", "a", scale={"a": 0.5}, train="b"),
        lambda: effzoo.activate(model, "a", "b", combine="average"), lambda: effzoo.activate(model, "c"),
        lambda: effzoo.activate(model, rows=["b", None]),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        way()
        again = check_same(model, tmp_path / str(number))
        assert str(effzoo.status(again)) == str(effzoo.status(model)), number
    effzoo.detach(effzoo.detach(model, "a"), "c")
    effzoo.activate(model, "b")
    check_same(model, tmp_path / "0")
    assert [path.name for path in (tmp_path / "0/adapters").iterdir()] == ["b"], "those before are gone"


def test_an_adapter_with_a_head_for_other_labels(tmp_path):
    model = moved(effzoo.attach(built(), "lora", num_labels=5))
    effzoo.save(model, tmp_path, labels=["a", "b", "c", "d", "e"])
    again = effzoo.load(tmp_path)
    assert (again.own_labels, again.num_labels, again.label_names) == (3, 5, ("a", "b", "c", "d", "e"))
    assert torch.equal(out(model).logits, out(again).logits)


def test_names_of_labels_stay_with_the_model(tmp_path):
    model = built()
    effzoo.save(model, tmp_path, labels={0: "no", 1: "yes", 2: "perhaps"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"} and config["label2id"]["perhaps"] == 2
    again = check_same(effzoo.load(tmp_path), tmp_path / "again")
    assert again.label_names == ("no", "yes", "perhaps")
    effzoo.save(model, tmp_path)
    assert effzoo.load(tmp_path).label_names == ()
    for wrong in (["a"], ["a", "a", "b"], {0: "a", 2: "b", 3: "c"}, ["a", "b", 3]):
        with pytest.raises(EffzooError, match="labels"):
            effzoo.save(model, tmp_path, labels=wrong)
    with pytest.raises(OptionError, match="classification head"):
        effzoo.save(built(task="features"), tmp_path, labels=["a"])


def test_a_dtype_that_is_wanted(tmp_path):
    model = moved(effzoo.attach(built(attention="lsh[chunk=4]"), "lora"))
    effzoo.save(model, tmp_path)
    again = effzoo.load(tmp_path, dtype="float64")
    assert {p.dtype for key, p in again.named_parameters() if ".adapters." not in key} == {torch.float64}
    assert all(torch.equal(p.float(), model.get_parameter(key)) for key, p in again.named_parameters())
    torch.testing.assert_close(out(again).logits.float(), out(model).logits)
    half = effzoo.load(tmp_path, dtype=torch.bfloat16)
    assert half.embeddings.token.weight.dtype == torch.bfloat16 and effzoo.attached(half)["default"].rounding
    with pytest.raises(OptionError, match="dtype"):
        effzoo.load(tmp_path, dtype="int8")


def test_a_model_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "LIMIT", 5_000)
    check_same(built(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    check_same(built(seed=1), tmp_path)
    assert not list(tmp_path.glob("model-*"))
    monkeypatch.setattr(saving, "LIMIT", 5_000)
    check_same(built(), tmp_path)
    shard = next(tmp_path.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(FileError, match=shard.name):
        effzoo.load(tmp_path)


def edit(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format=99), "format 99"),
        (lambda c: c.update(format="1"), "format is a number"),
        (lambda c: c.update(more=1), "'more'"),
        (lambda c: c.pop("task"), "lacks task"),
        (lambda c: c.update(task=3), "task is of type str"),
        (lambda c: c.update(task="chess"), "chess"),
        (lambda c: c["config"].pop("eps"), "lacks eps"),
        (lambda c: c["config"].update(hidden=3), "'hidden'"),
        (lambda c: c["config"].update(heads=4), "heads"),
        (lambda c: c["config"].update(eps=1e-5), "eps is 1e-12 there and 1e-05 here"),
        (lambda c: c["config"].update(heads="many"), "heads takes"),
        (lambda c: c["config"].update(dim=32), r"embeddings.token.weight is F32\[53, 16\]"),
        (lambda c: c["config"].update(layers=3), "lacks blocks.2"),
        (lambda c: c["config"].update(vocab=2**39), "free"),
        (lambda c: c["config"].update(attention="nobody"), "load_file: unknown attention 'nobody'"),
        (lambda c: c["config"].update(attention="local"), "local"),
        (lambda c: c.update(own_labels=2), "head"),
        (lambda c: c.update(id2label={"0": "a"}), "id2label"),
        (lambda c: c.update(quantised={"blocks.7": 4}), "blocks.7"),
        (lambda c: c.update(quantised={"blocks.0.attn.q": 3}), "4 or 8"),
        (lambda c: c.update(hashing={"blocks.0.attn.core": {"rounds": 2, "seed": None}}), "LSH"),
        (lambda c: c["adapters"].update(active=["b"]), "'b' is not among"),
        (lambda c: c["adapters"].update(attached=["../x"]), "identifiers"),
        (lambda c: c["adapters"].update(scales=[]), "a scale for each"),
        (lambda c: c.update(fingerprint="0"), "fingerprint.json is not the one"),
    ],
)
def test_a_config_that_is_not_as_saved_is_refused(change, says, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    edit(tmp_path / "model", change)
    with pytest.raises(FileError, match=says) as refused:
        effzoo.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(refused.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return effzoo.save(moved(effzoo.attach(built(), "lora", name="a")), folder)


def test_every_file_that_is_damaged_or_missing_is_named(saved, tmp_path):
    unread = ("README.md", "modeling_effzoo.py")
    files = [path for path in saved.rglob("*") if path.is_file() and path.name not in unread]
    assert {path.name for path in files} >= {"config.json", "fingerprint.json", "model.safetensors", "adapter.json"}
    for number, file in enumerate(files):
        for damage in ("missing", "cut", "changed"):
            folder = tmp_path / f"{number} {damage}"
            shutil.copytree(saved, folder)
            there = folder / file.relative_to(saved)
            content = there.read_bytes()
            if damage == "missing":
                there.unlink()
            else:
                there.write_bytes(content[: len(content) // 2] if damage == "cut" else changed(content))
            with pytest.raises(EffzooError) as refused:
                effzoo.load(folder)
            assert there.name in str(refused.value) or str(there.parent) in str(refused.value), (file, damage)


def changed(content):
    """One byte, in the middle of the numbers or of the text."""
    place = len(content) * 3 // 4
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_weights_of_another_model_are_refused(saved, tmp_path):
    other = effzoo.save(built(seed=5), tmp_path / "other")
    mixed = shutil.copytree(saved, tmp_path / "mixed")
    shutil.copy(other / "model.safetensors", mixed)
    with pytest.raises(FileError, match="is not the tensor that was saved"):
        effzoo.load(mixed)
    shutil.copy(other / "fingerprint.json", mixed)
    with pytest.raises(FileError, match=r"fingerprint\.json is not the one"):
        effzoo.load(mixed)


def test_saving_is_whole_or_leaves_what_was_there(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_adapter", full)
        with pytest.raises(FileError, match="No space left"):
            effzoo.save(effzoo.attach(built(seed=3), "ia3"), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(folder.glob(".staged*"))
    (folder / ".staged-killed").mkdir()
    (folder / ".staged-killed/model.safetensors").write_text("half")
    with monkeypatch.context() as patch:  # the process ends between the old files and the new ones
        replace = os.replace
        patch.setattr(os, "replace", lambda one, other: full() if ".staged-" not in str(other) else replace(one, other))
        with pytest.raises(FileError):
            effzoo.save(built(seed=3), folder)
    with pytest.raises(FileError, match="has no config.json"):
        effzoo.load(folder)
    check_same(built(seed=3), folder)
    assert not list(folder.glob(".staged*")) and (folder / "notes.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileError, match="folder of its own"):
        effzoo.save(built(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        effzoo.save(built(), tmp_path / "file")
    with pytest.raises(FileError, match="NUL"):
        effzoo.save(built(), "out\0model")
    with pytest.raises(FileError, match="there is no folder"):
        effzoo.load(tmp_path / "nothing")


def test_a_model_that_its_config_does_not_describe_is_refused(tmp_path):
    model = built()
    model.blocks[0].mlp_norm.eps = 0.1
    with pytest.raises(IncompatibleError, match=r"blocks\.0\.mlp_norm\.eps"):
        effzoo.save(model, tmp_path)
    model = built()
    model.head.out = torch.nn.Linear(16, 7)
    with pytest.raises(IncompatibleError, match=r"head\.out"):
        effzoo.save(model, tmp_path)
    with pytest.raises(IncompatibleError, match="Linear"):
        effzoo.save(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(EffzooError, match="meta"):
        effzoo.save(built().to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_the_model_is(saved, tmp_path):
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: effzoo\npipeline_tag: text-classification\n")
    assert "| a | `lora` | yes |" in text and "trainable" in text
    effzoo.save(built(), tmp_path, metrics={"eval_accuracy": 0.875})
    card = tmp_path / "README.md"
    assert "| eval_accuracy | 0.875 |" in card.read_text()
    card.write_text("my own words")
    effzoo.save(built(), tmp_path)
    assert card.read_text() == "my own words"


def test_a_tokenizer_stays_beside_the_model(tmp_path):
    vocab = {"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")
    effzoo.save(built(), tmp_path, tokenizer=words)
    effzoo.save(built(seed=1), tmp_path)
    assert effzoo.data.tokenizer_of(tmp_path)("bad good")["input_ids"] == [3, 2]
    assert isinstance(effzoo.load(tmp_path), type(built()))
    with pytest.raises(OptionError, match="tokenizer"):
        effzoo.save(built(), tmp_path, tokenizer="bert")


def test_a_checkpoint_of_transformers_needs_no_name(tmp_path):
    model = built("llama", "causal_lm")
    effzoo.convert.to_transformers(model).save_pretrained(tmp_path)
    again = effzoo.load(tmp_path)
    assert again.config.layout == "llama" and again.config.kv_heads == 1 and again.config.dim == 16
    torch.testing.assert_close(out(again).logits, out(model).logits)


def test_fields_of_a_config_are_those_of_the_format():
    """A new field needs a new format and a line in LATER; folders of the formats before take its default."""
    fields = [f.name for kind in (effzoo.architectures.Config, effzoo.architectures.PerceiverConfig)
              for f in dataclasses.fields(kind)]  # fmt: skip
    later = {name for names in description.LATER.values() for name in names}
    assert 1 + len(description.LATER) == description.FORMAT
    assert len([name for name in fields if name not in later]) == 111


def test_build_takes_a_folder(tmp_path):
    model = built(dropout=0.0)
    effzoo.save(model, tmp_path, labels=["a", "b", "c"])
    for name in ("bert", None):
        again = effzoo.build(name, pretrained=tmp_path, dropout=0.3)
        assert again.training and again.task == "classification" and again.label_names == ("a", "b", "c")
        assert {m.p for m in again.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
        assert torch.equal(out(again).logits, out(model).logits)
    swapped = effzoo.build(pretrained=str(tmp_path), attention="longformer[window=4]", peft="lora", quantise=8)
    assert swapped.config.attention == "longformer[window=4]" and effzoo.attached(swapped)
    tagged = effzoo.build("bert", pretrained=tmp_path, task="token_classification", num_labels=5)
    assert tagged.num_labels == 5 and out(tagged).logits.shape[-1] == 5 and tagged.label_names == ()
    assert torch.equal(tagged.embeddings.token.weight, model.embeddings.token.weight)
    check_same(tagged, tmp_path / "tagged")
    assert effzoo.build(pretrained=tmp_path, num_labels=4).num_labels == 4
    with pytest.raises(OptionError, match="holds the model 'bert', not 'minilm'"):
        effzoo.build("minilm", pretrained=tmp_path)
    with pytest.raises(OptionError, match="layers is 2 in"):
        effzoo.build(pretrained=tmp_path, layers=3)
    with pytest.raises(OptionError, match="needs the name"):
        effzoo.build()
    effzoo.save(effzoo.attach(model, "lora"), tmp_path)
    with pytest.raises(IncompatibleError, match="holds adapters"):
        effzoo.build(pretrained=tmp_path, task="masked_lm")
    effzoo.save(built("perceiver-io", "features"), tmp_path)
    with pytest.raises(IncompatibleError, match="decoder is that of its task"):
        effzoo.build(pretrained=tmp_path, task="masked_lm")


def test_build_takes_a_checkpoint_of_transformers_without_a_name(tmp_path):
    model = built("llama", "causal_lm")
    effzoo.convert.to_transformers(model.bfloat16()).save_pretrained(tmp_path)
    again = effzoo.build(pretrained=tmp_path, attention="local[chunk=8]", peft="ia3")
    assert again.config.kv_heads == 1 and again.training and again.embeddings.token.weight.dtype == torch.float32
    assert effzoo.build(pretrained=tmp_path, dtype="auto").embeddings.token.weight.dtype == torch.bfloat16
    assert effzoo.build(pretrained=tmp_path, task="classification", num_labels=4).num_labels == 4


def test_training_of_a_whole_model_leaves_a_folder(tmp_path, caplog):
    model, rows = built(), [{"input_ids": [3, 4, 5], "label": 1}, {"input_ids": [6, 7], "label": 2}]
    settings = {"max_steps": 2, "progress": False, "evaluate": rows}
    result = effzoo.finetune(model, rows, output_dir=tmp_path / "run", **settings)
    again = effzoo.load(result.weights.parent)
    assert torch.equal(out(again).logits, out(model).logits)
    assert "eval_accuracy" in (tmp_path / "run/README.md").read_text()
    model.blocks[0].mlp_norm.eps = 0.1  # no config says that
    result = effzoo.finetune(model, rows, output_dir=tmp_path / "other", **settings)
    assert "without their config: the model is not what" in caplog.text
    assert result.weights.is_file() and not (tmp_path / "other/config.json").exists()


@pytest.mark.parametrize(
    ("name", "n"), [("bert", 40), ("roberta", 23), ("bert", 9), ("llama", 100), ("longformer", 64)]
)
def test_a_folder_is_built_for_other_lengths(name, n, tmp_path):
    """Learned positions are repeated in order or cut; short inputs give what they gave."""
    model = built(name, "classification")
    effzoo.save(model, tmp_path / "m")
    other = effzoo.build(pretrained=tmp_path / "m", max_length=n).eval()
    ids = torch.randint(2, 50, (2, min(n, model.config.max_length) - 1))
    assert other.config.max_length == n and torch.equal(other(ids).logits, model(ids).logits)
    if n > model.config.max_length:
        other(torch.randint(2, 50, (1, n)))
    if model.embeddings.position is not None and name != "llama":
        table, before, first = (
            other.embeddings.position.weight,
            model.embeddings.position.weight,
            model.config.position_offset,
        )
        wanted = [i if i < first else first + (i - first) % (len(before) - first) for i in range(len(table))]
        assert torch.equal(table, before[wanted])
    effzoo.save(other, tmp_path / "n")
    assert torch.equal(effzoo.load(tmp_path / "n")(ids).logits, model(ids).logits)


def test_tensors_and_adapters_that_belong_to_a_length_are_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="E.* is .* for 20 positions .*: it belongs to the length"):
        effzoo.resize_positions(built("bert", "features", attention="linformer[k=4]", max_length=20), 40)
    with pytest.raises(IncompatibleError, match="the adapters default were trained with the positions that are there"):
        effzoo.resize_positions(built("bert", "features", peft="lora"), 40)
    with pytest.raises(IncompatibleError, match="takes a model of effzoo, got Linear"):
        effzoo.resize_positions(torch.nn.Linear(1, 1), 40)
