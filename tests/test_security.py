"""What hostile files cannot do. SECURITY.md names these tests line by line."""

import ast
import json
import re
import resource
from pathlib import Path

import pytest
import torch
import transformers

import effzoo
from effzoo import convert, data
from effzoo.errors import AdapterError, ConversionError, DataError, EffzooError, TooLargeError

ROOT = Path(__file__).parent.parent
SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50, "max_length": 32}
THEIRS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


class Runs:
    """A pickle that runs code when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def with_code(folder, marker, **config):
    """A folder whose config says that classes are in its mod.py."""
    code = "from transformers import BertConfig\nclass C(BertConfig): model_type = 'evil'\nclass T: pass\n"
    (folder / "mod.py").write_text(f"open({str(marker)!r}, 'w')\n{code}")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "architectures": ["X"], "auto_map": {"AutoConfig": "mod.C"}, **config})
    )


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that hostile code would make; anything that asks in the terminal fails."""

    def asked(*_):
        raise AssertionError("a question in the terminal")

    monkeypatch.setattr("builtins.input", asked)
    return tmp_path / "ran"


@pytest.mark.parametrize("model_type", ["evil", "bert", "perceiver"])
def test_code_of_a_checkpoint_is_not_run_and_not_asked_about(tmp_path, marker, model_type):
    auto = {"AutoConfig": "mod.C", "AutoModel": "mod.C"}
    with_code(tmp_path, marker, model_type=model_type, auto_map=auto, attn_implementation="evil/kernel", **THEIRS)
    for call in (
        lambda: convert.from_transformers(tmp_path),
        lambda: effzoo.build("bert", pretrained=tmp_path, **SIZES),
    ):
        with pytest.raises(EffzooError):
            call()
    with pytest.raises(EffzooError):
        convert.load_pretrained(
            effzoo.build("perceiver-io"), tmp_path
        ) if model_type == "perceiver" else convert.from_transformers(str(tmp_path))
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run(tmp_path, marker):
    with_code(tmp_path, marker)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["mod.T", None]}})
    )
    with pytest.raises(DataError, match="no tokenizer at"):
        data.tokenizer_of(tmp_path)
    assert not marker.exists()


def test_a_pickle_as_weights_does_not_run(tmp_path, marker):
    transformers.BertConfig(**THEIRS, architectures=["BertModel"]).save_pretrained(tmp_path)
    torch.save({"embeddings.word_embeddings.weight": Runs(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError):
        convert.from_transformers(tmp_path)
    assert not marker.exists()


def test_an_index_of_shards_leads_to_no_other_folder(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**THEIRS, architectures=["BertModel"]))
    (tmp_path / "secret").mkdir()
    model.save_pretrained(tmp_path / "secret")
    (tmp_path / "given").mkdir()
    model.config.save_pretrained(tmp_path / "given")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "../secret/model.safetensors")}
    (tmp_path / "given" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="leads out of"):
        convert.from_transformers(tmp_path / "given")


def test_a_script_beside_data_is_not_run(tmp_path, marker):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for source in (folder, str(folder), folder / "evil.py"):
        with pytest.raises(DataError):
            data.load_text(source)
    assert not marker.exists()


def lora():
    torch.manual_seed(0)
    return effzoo.build("bert", **SIZES)


@pytest.mark.parametrize("format", ["effzoo", "peft"])
def test_a_pickled_adapter_is_refused_unopened(tmp_path, marker, format):
    effzoo.save_adapter(effzoo.attach(lora(), "lora"), tmp_path, format=format)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    for name in ("adapter.bin", "adapter_model.bin", "adapter.pt", "optimizer.pt"):
        torch.save({"x": Runs(marker)}, tmp_path / name)
    with pytest.raises(AdapterError):
        effzoo.load_adapter(lora(), tmp_path)
    assert not marker.exists()


def test_an_adapter_that_names_a_huge_rank_claims_no_memory(tmp_path):
    effzoo.save_adapter(effzoo.attach(lora(), "lora"), tmp_path)
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    manifest["peft"][0]["rank"] = 10**11
    (tmp_path / "adapter.json").write_text(json.dumps(manifest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EffzooError):
        effzoo.load_adapter(lora(), tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "", "..", "a\0b", "/x", "a b", "C:x"])
def test_an_adapter_name_is_no_path(tmp_path, name):
    model = effzoo.attach(lora(), "lora")
    for call in (
        lambda: effzoo.attach(model, "lora", name=name),
        lambda: effzoo.save_adapter(model, tmp_path / "out", name=name),
        lambda: effzoo.combine(model, {"default": 1.0}, name=name),
    ):
        with pytest.raises(EffzooError):
            call()
    assert list(effzoo.attached(model)) == ["default"]


@pytest.mark.parametrize(
    "sizes",
    [{"vocab": 10**12}, {"max_length": 10**12}, {"mlp": 10**11}, {"types": 10**12},
    {"attention": "perceiver[latents=999999999999]"},
     {"peft": "lora[rank=10000000000]"},
     {"peft": "routed[of='houlsby[bottleneck=99999999999]', experts=2]"},
     {"peft": {"name": "adamix", "experts": 10_000, "bottleneck": 10**8}},
     {"task": "classification", "num_labels": 10**12}, {"layers": 10_000, "dim": 10**6, "heads": 10, "mlp": 10**6}],
    ids=str,
)  # fmt: skip
def test_sizes_above_what_the_machine_holds_are_refused_unallocated(sizes):
    with pytest.raises(TooLargeError, match=r"needs [\d,]+ bytes, and [\d,]+ are free"):
        effzoo.build("bert", **{**SIZES, **sizes})
    with torch.device("meta"):  # where nothing is allocated, counting goes on
        assert effzoo.build("bert", **{**SIZES, "vocab": 10**12}).embeddings.token.weight.shape == (10**12, 16)


def test_nothing_of_the_package_reads_pickles():
    """Outside the checks, which copy a kind's own state, there is no pickle, and torch.load opens weights only."""
    for path in (ROOT / "effzoo").rglob("*.py"):
        if path.relative_to(ROOT / "effzoo").parts[0] == "checks":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & {
                    alias.name for alias in node.names
                }, path
            if isinstance(node, ast.Call):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                called = ast.unparse(node.func)
                assert called != "torch.load" or said.get("weights_only") == "True", path
                assert (
                    not re.search(r"Auto\w+\.from_pretrained$", called) or said.get("trust_remote_code") == "False"
                ), f"{path}: {ast.unparse(node)}"
                assert called != "np.load" or said.get("allow_pickle") == "False", path


def test_each_line_of_the_security_page_names_a_test_that_exists():
    lines = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 10
    for line in lines:
        file, _, name = re.search(r"`(tests/\w+\.py)::(\w+)` \|$", line).group(0).strip("`| ").partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), line
