"""Checkpoints are read tensor by tensor into place: to the bits of the way over the whole model of transformers, with
its refusals, and in no more memory than the model takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from test_convert import CLASSES, theirs
from test_convert_genuine import perceiver, reformer

import effzoo
from effzoo import convert
from effzoo.convert import pretrained
from effzoo.errors import ConversionError, OptionError
from effzoo.undrawn import Undrawn

INDEX = "model.safetensors.index.json"
ALBERT = {
    "vocab_size": 41, "embedding_size": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 22, "classifier_dropout_prob": 0.0,
}  # fmt: skip
SIZES = {"layers": 2, "dim": 8, "heads": 2, "mlp": 12, "vocab": 41, "max_length": 20}
LLAMA = SIZES | {
    "kv_heads": 1, "head_dim": 6, "max_length": 22, "pad_token": 0, "eps": 1e-6, "tied": False,
    "rotary_theta": 500.0,
    "rotary_scaling": {"type": "linear", "factor": 2.0},
}  # fmt: skip
QUANTISED = ("LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "AlbertForMaskedLM", "PerceiverForMaskedLM")


def made(name):
    """A model of transformers with drawn parameters."""
    if name in ("ReformerForMaskedLM", "ReformerModelWithLMHead"):
        return reformer(getattr(transformers, name), is_decoder=name.endswith("LMHead")).eval()
    if name == "PerceiverForMaskedLM":
        return perceiver()
    if name.startswith("Albert"):
        return getattr(transformers, name)(transformers.AlbertConfig(**ALBERT)).eval()
    return theirs(next(family for family, _, known in CLASSES if known == name), name)


def saved(model, folder, sharded=True):
    model.save_pretrained(folder, max_shard_size="2kB" if sharded else "1GB")
    return folder


class Ways:
    """Loads by both ways, and asserts that the new one had the numbers from the files and the other did not."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.read = monkeypatch, []
        rows_of = pretrained.StoredTensor.blocks
        monkeypatch.setattr(
            pretrained.StoredTensor, "blocks", lambda one, *rows: (self.read.append(one.name), rows_of(one, *rows))[1]
        )

    def __call__(self, load):
        torch.manual_seed(3)
        new = load()
        assert self.read, "transformers loaded the model"
        with self.monkeypatch.context() as patch:
            patch.setattr(pretrained, "_unread", lambda *_: None)
            self.read.clear()
            torch.manual_seed(3)
            old = load()
            assert not self.read
        assert new.state_dict().keys() == old.state_dict().keys()
        for (key, one), other in zip(new.state_dict().items(), old.state_dict().values(), strict=True):
            assert one.dtype == other.dtype and one.device == other.device and one.equal(other), key
        assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in old.parameters()]
        assert (new.config, new.training) == (old.config, old.training)
        return new


@pytest.fixture
def both(monkeypatch):
    return Ways(monkeypatch)


EXPERTS = [name for family, _, name in CLASSES if family == "mixtral"]  # their files name experts one by one
NAMES = [
    *(name for _, _, name in CLASSES if name not in EXPERTS),
    "AlbertForMaskedLM", "AlbertForSequenceClassification", "ReformerForMaskedLM",
    "ReformerModelWithLMHead", "PerceiverForMaskedLM",
]  # fmt: skip


@pytest.mark.cover()
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_read_to_the_same_bits(name, sharded, half, both, tmp_path):
    model = made(name).to(torch.bfloat16 if half else torch.float32)
    saved(model, tmp_path, sharded)
    assert (tmp_path / INDEX).exists() == sharded
    # transformers holds the axial positions of a Reformer in float32 whatever the file has; we take what the file has
    load = convert.from_transformers
    ours = load(tmp_path) if half and name.startswith("Reformer") else both(lambda: load(tmp_path))
    live = convert.from_transformers(model).state_dict()
    assert all(value.equal(live[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("name", EXPERTS)
def test_files_that_name_experts_one_by_one_are_read_by_transformers(name, tmp_path):
    model = made(name)
    ours = convert.from_transformers(saved(model, tmp_path)).state_dict()
    live = convert.from_transformers(model).state_dict()
    assert ours.keys() == live.keys() and all(value.equal(live[key]) for key, value in ours.items())


CHANGES = {
    "attention": ("bert", {"attention": "linformer[k=4]"}),
    "windows": ("roberta", {"attention": "longformer[window=4]", "types": 2, "eps": 1e-12}),
    "longer": ("roberta", {"attention": "longformer[window=4]", "types": 2, "eps": 1e-12, "max_length": 57}),
    "shorter": ("gpt2", {"max_length": 7, "pad_token": 0}),
    "experts": ("bert", {"experts": 3}),
    "classes": ("bert", {"task": "classification", "num_labels": 3}),
    "untied": ("gpt2", {"task": "causal_lm", "tied": False, "pad_token": 0}),
    "bfloat16": ("gpt2", {"dtype": torch.bfloat16, "pad_token": 0}),
    "float64 by name": ("bert", {"dtype": "float64", "attention": "linformer[k=4]"}),
    "auto": ("bert", {"dtype": "auto", "task": "classification"}),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_build_changes_is_changed_alike(change, half, both, tmp_path):
    family, sizes = CHANGES[change]
    name = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}.get(family)
    source = theirs(family, name).to(torch.bfloat16 if half else torch.float32)
    saved(source, tmp_path)
    model = both(lambda: effzoo.build(family, **{**SIZES, **sizes}, pretrained=tmp_path))
    given = sizes.get("dtype")
    expected = {None: torch.float32, "auto": source.dtype, "float64": torch.float64}.get(given, given)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_dtype_is_taken_by_from_transformers_as_well(tied, dtype, both, tmp_path):
    source = theirs("llama", "LlamaForCausalLM", tie_word_embeddings=tied).to(torch.bfloat16)
    saved(source, tmp_path)
    model = both(lambda: convert.from_transformers(tmp_path, dtype=dtype))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype or torch.bfloat16}
    again = convert.from_transformers(source, dtype=dtype)
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_dtype_is_refused(tmp_path):
    saved(theirs("bert"), tmp_path)
    for load in (lambda dtype: convert.from_transformers(tmp_path, dtype=dtype),
                 lambda dtype: effzoo.build("bert", **SIZES, pretrained=tmp_path, dtype=dtype),
                 lambda dtype: effzoo.build("bert", **SIZES, dtype=dtype)):  # fmt: skip
        for dtype in ("int8", "wide", torch.int64):
            with pytest.raises(OptionError, match="dtype is a floating-point type"):
                load(dtype)
    assert effzoo.build("bert", **SIZES, dtype="float16").embeddings.token.weight.dtype == torch.float16


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_base_that_is_quantised_while_it_is_read_is_the_one_quantised_after(name, bits, tmp_path):
    from support import SMALL

    model = made(name)
    saved(model, tmp_path)
    ours = convert.from_transformers(model)
    if name.startswith("Perceiver"):
        sizes = {key: getattr(ours.config, key) for key in (*SMALL["perceiver-io"], "channels", "blocks_per_cross",
            "cross_heads", "cross_mlp", "cross_head_dim", "cross_value_dim", "query_dim", "decoder_mlp",
            "decoder_value_dim", "pad_token")}  # fmt: skip
        entry = "perceiver-io"
    else:
        entry = ours.config.layout
        sizes = (
            LLAMA
            if entry == "llama"
            else SIZES | ({"embedding_dim": 6, "share_layers": 1} if entry == "albert" else {})
        )
        sizes = sizes | {"pad_token": ours.config.pad_token, "max_length": ours.config.max_length}
    build = lambda **more: effzoo.build(entry, **sizes, task=ours.task, pretrained=tmp_path, **more)  # noqa: E731
    dense = build()
    effzoo.quantise(dense, bits)
    model = build(quantise=bits)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(value.equal(dense.state_dict()[key]) for key, value in model.state_dict().items())
    assert any(key.endswith(".codes") for key in model.state_dict())
    whole = dense.state_dict()
    effzoo.save(build(), tmp_path / "ours")
    for folder in (tmp_path, tmp_path / "ours"):  # without a name, in the layout of transformers and in ours
        nameless = effzoo.build(pretrained=folder, quantise=bits).state_dict()
        assert nameless.keys() == whole.keys() and all(value.equal(whole[key]) for key, value in nameless.items())
    trained = build(quantise=bits, peft="lora[rank=2]")
    assert effzoo.account(trained).trainable > 0


def test_a_base_is_quantised_without_weights_to_read_as_well():
    torch.manual_seed(0)
    model = effzoo.build("bert", **SIZES, quantise=4)
    torch.manual_seed(0)
    dense = effzoo.build("bert", **SIZES)
    effzoo.quantise(dense, 4)
    assert all(value.equal(dense.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(OptionError, match="bits is 8"):
        effzoo.build("bert", **SIZES, quantise=3)


# --- faults


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


@pytest.mark.parametrize("fault", ["gone", "cut", "no header"])
def test_a_shard_that_is_missing_or_damaged_is_named_with_a_tensor(fault, tmp_path):
    saved(theirs("bert"), tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    shard = shard_of(tmp_path, name)
    if fault == "gone":
        shard.unlink()
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[:-5] if fault == "cut" else b"\xff" * 8 + content[8:])
    for load in (convert.from_transformers, lambda folder: effzoo.build("bert", **SIZES, pretrained=folder)):
        with pytest.raises(ConversionError) as caught:
            load(tmp_path)
        assert shard.name in str(caught.value) and "encoder.layer.1." in str(caught.value)


@pytest.mark.parametrize("used", [True, False])
def test_nan_in_a_file_is_refused_and_a_model_stays_as_it_was(used, tmp_path):
    """Also where the tensor is of a head that is not wanted."""
    source = theirs("bert", "BertForMaskedLM")
    name = "bert.encoder.layer.1.output.dense.bias" if used else "cls.predictions.transform.LayerNorm.bias"
    with torch.no_grad():
        source.get_parameter(name)[3] = torch.nan
    saved(source, tmp_path)
    model = effzoo.build("bert", **SIZES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = rf"has NaN or infinity in {name} \(1 of \d+ entries\)"
    for load in (convert.from_transformers, lambda folder: convert.from_transformers(folder, task="features"),
                 lambda folder: effzoo.build("bert", **SIZES, pretrained=folder),
                 lambda folder: convert.load_pretrained(model, folder)):  # fmt: skip
        with pytest.raises(ConversionError, match=message):
            load(tmp_path)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_what_transformers_translates_is_read_as_before(tmp_path):
    """Names of older versions, pickled files, and a head that no file has."""
    source = theirs("bert", "BertForMaskedLM")
    wanted = convert.from_transformers(source).state_dict()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for kind in ("older", "pickled", "headless"):
        folder = saved(source, tmp_path / kind, sharded=False)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        if kind == "older":
            for new, name in old.items():
                tensors = {key.replace(new, name): value for key, value in tensors.items()}
        if kind == "headless":
            tensors = {key: value for key, value in tensors.items() if key.startswith("bert.")}
            config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForMultipleChoice"]}
            (folder / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if kind == "pickled":
            (folder / "model.safetensors").unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        body = {key: value for key, value in wanted.items() if kind != "headless" or not key.startswith("head.")}
        model = effzoo.build("bert", **SIZES | {"max_length": 22}, task="masked_lm", pretrained=folder).state_dict()
        assert [key for key, value in body.items() if not value.equal(model[key])] == [], kind


def test_tied_names_with_other_numbers_are_refused_as_before(tmp_path):
    source = theirs("gpt2", "GPT2LMHeadModel")
    saved(source, tmp_path, sharded=False)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    table = tensors["transformer.wte.weight"]
    for head, fine in ((table.clone(), True), (table + 1, False)):
        safetensors.torch.save_file(
            tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        if fine:
            assert convert.from_transformers(tmp_path).embeddings.token.weight.equal(table)
            continue
        with pytest.raises(ConversionError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
            convert.from_transformers(tmp_path)


# --- what is not drawn


def test_only_what_nothing_is_written_into_is_drawn(tmp_path):
    """A head of another task starts as in any model; of the rest no number is drawn."""
    saved(theirs("bert"), tmp_path)
    torch.manual_seed(5)
    model = effzoo.build("bert", **SIZES, task="classification", num_labels=3, pretrained=tmp_path)
    torch.manual_seed(5)
    assert model.head.out.weight.equal(torch.empty(3, 8).normal_(0, 0.02)) and not model.head.out.bias.any()


def test_a_parameter_that_an_operation_reads_is_drawn_first():
    with Undrawn() as undrawn:
        linear, norm = torch.nn.Linear(40, 30), torch.nn.LayerNorm(30)
        assert all(undrawn.holds(tensor) for tensor in (*linear.parameters(), *norm.parameters()))
        with torch.no_grad():
            torch.nn.init.trunc_normal_(linear.weight, std=0.5)
            doubled = 2 * norm.weight
            linear.bias[3] = 7
    assert not any(undrawn.holds(tensor) for tensor in (*linear.parameters(), norm.weight))
    assert doubled.eq(2).all() and norm.weight.eq(1).all() and undrawn.holds(norm.bias)
    assert 0.4 < linear.weight.std() < 0.6 and linear.bias[3] == 7 and linear.bias[:3].abs().max() < 0.16
    undrawn.draw(norm.bias)
    assert norm.bias.eq(0).all() and not undrawn.holds(norm.bias)


# --- memory, in a process of its own

CHILD = """
import resource, sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers, effzoo, effzoo.convert, effzoo.convert.importing
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
source, more = sys.argv[1], eval(sys.argv[2])
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
effzoo.convert.from_transformers(sys.argv[3])  # what is imported on the way
before = most()
sizes = dict(layers=6, dim=512, heads=8, kv_heads=0, mlp=1536, vocab=8000, max_length=64, rotary_theta=10000.0)
if more is None:
    model = effzoo.convert.from_transformers(source)
elif "name" in more:
    del more["name"]
    model = effzoo.build(pretrained=source, **more)
else:
    model = effzoo.build("llama", **sizes, rotary_scaling=None, task="causal_lm", tied=False, pretrained=source, **more)
held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(held, most() - before, max(tensor.nbytes for tensor in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 100 MB with an untied head, as a folder that is a fetched hub id, and a tiny one."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "hub" / "models--some--one" / "snapshots" / "abc"
    sizes = {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
             "intermediate_size": 1536, "vocab_size": 8000, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
             "head_dim": 64, "tie_word_embeddings": False}  # fmt: skip
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder, max_shard_size="40MB")
    refs = home / "hub" / "models--some--one" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    tiny = transformers.LlamaConfig(**{**sizes, "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 50})
    transformers.LlamaForCausalLM(tiny).save_pretrained(home / "tiny")
    return home, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["from", "build", "half", "hub", "4 bits", "8 bits", "4 bits, no name", "4 bits, no name, ours"]
)
def test_loading_takes_no_more_memory_than_the_model(case, large):
    """Over the whole model of transformers it was 2.0 and 2.3 times the model, and 3.2 of one in bfloat16."""
    home, folder = large
    more = {"from": None, "hub": None, "half": {"dtype": "bfloat16"}}.get(case, {})
    more = {"quantise": int(case[0])} if "bits" in case else more
    more = more | {"name": None} if "no name" in case else more
    source = "some/one" if case == "hub" else str(folder)
    if case.endswith("ours"):
        source = str(effzoo.save(effzoo.load(folder), home / "ours"))
    environment = {"PYTHONPATH": str(Path(effzoo.__file__).parent.parent), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, repr(more), str(home / "tiny")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    held, grown, largest = map(int, done.stdout.split())
    assert held > 3e7
    assert grown < 1.35 * held + (largest if "bits" in case else 0)
