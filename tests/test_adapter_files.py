"""Adapters on disk: they load exactly or not at all, and whoever writes, reads, fails or dies when, the old one or the
new one is there."""

import copy
import errno
import hashlib
import json
import logging
import os
import resource
import signal

import pytest
import safetensors.torch
import torch
from torch import nn

import effzoo
from effzoo.errors import AdapterError, EffzooError, FileError, UnknownNameError
from effzoo.peft import files, training
from effzoo.peft.stored import stored_tensors
from effzoo.writing import replace_file, replace_files

SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 30, "max_length": 24}
IDS = torch.arange(10)[None]


def made(task="classification", seed=0, **given):
    torch.manual_seed(seed)
    return effzoo.build(given.pop("name", "bert"), task=task, **{**SIZES, **given}).eval()


def trained(model, spec="lora[rank=2]", value=None, name="default"):
    """The model with an adapter of drawn (or constant) content."""
    effzoo.attach(model, spec, name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5) if value is None else parameter.fill_(value)
    return model.eval()


def content(folder):
    """Which constant the adapter in a folder was filled with."""
    return (
        stored_tensors(effzoo.load_adapter(made("features"), folder), "default")["blocks.0.attn.q.adapters.lora.B"]
        .unique()
        .tolist()
    )


def sealed(manifest):
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**rest, "manifest_sha256": digest})


# the head


ON_HEADS = [
    "lora",
    "bitfit",
    "dora",
    "diff",
    "fish[keep=0.5]",
    "lt_sft",
    "full",
    "krona",
    "magnitude",
    "supermask",
    "head",
]


@pytest.mark.parametrize("task", ["classification", "token_classification"])
@pytest.mark.parametrize("method", ON_HEADS)
def test_an_adapter_on_the_head_gives_its_outputs_or_is_refused_by_the_heads_name(method, task, tmp_path, caplog):
    name, bracket, options = method.partition("[")
    spec = f"{name}[{options.rstrip(']')}{', ' if bracket else ''}targets=head.out]"
    model = trained(made(task), spec)
    effzoo.save_adapter(model, tmp_path)
    assert ("changes head.out and does not hold it" in caplog.text) == (name not in ("full", "head"))
    expected = model(input_ids=IDS).logits
    assert torch.equal(effzoo.load_adapter(made(task), tmp_path).eval()(input_ids=IDS).logits, expected)
    other = made(task)
    nn.init.normal_(other.head.out.weight)
    brings = name in ("full", "head")
    try:
        loaded = effzoo.load_adapter(other, tmp_path).eval()(input_ids=IDS).logits
    except AdapterError as error:
        assert "head.out.weight: float32[2, 16] " in str(error) and "this head" in str(error)
        assert not effzoo.attached(other)
    else:
        assert torch.equal(loaded, expected) and brings


def test_a_head_that_no_method_touches_is_the_adapters_own(tmp_path):
    model = trained(made())
    effzoo.save_adapter(model, tmp_path)
    other = made()
    nn.init.normal_(other.head.out.weight)
    nn.init.normal_(other.head.dense.weight)
    assert torch.equal(effzoo.load_adapter(other, tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    part = trained(made(), "lora[targets=head.out]")  # of the other layer of the head, the adapter has a copy
    effzoo.save_adapter(part, tmp_path)
    other = made()
    nn.init.normal_(other.head.dense.weight)
    assert torch.equal(effzoo.load_adapter(other, tmp_path)(input_ids=IDS).logits, part(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("task", "key", "given"),
    [("masked_lm", "lm.out", {"tied": False}), ("masked_lm", "lm.dense", {}), ("features", "pooler", {})],
)
def test_language_model_heads_and_poolers_are_the_bases(task, key, given, tmp_path):
    effzoo.save_adapter(trained(made(task, **given)), tmp_path)
    effzoo.load_adapter(made(task, **given), tmp_path)
    other = made(task, **given)
    (module,) = (module for module in other.modules() if getattr(module, "role", None) == key)
    nn.init.normal_(module.weight)
    with pytest.raises(AdapterError, match=r"another base \('bert'\): head\.\w+\.weight: float32"):
        effzoo.load_adapter(other, tmp_path)


def test_the_decoder_of_a_perceiver_is_the_adapters_own_where_it_classifies_and_the_bases_where_it_models_language(
    tmp_path,
):
    sizes = {
        "channels": 16,
        "latents": 4,
        "max_length": 24,
        "cross_heads": 2,
        "cross_head_dim": 8,
        "cross_value_dim": 8,
        "head_dim": 0,
        "value_dim": 0,
    }
    sizes |= {"decoder_heads": 2, "decoder_head_dim": 0, "decoder_value_dim": 0, "name": "perceiver-io"}
    for task, own in (("classification", True), ("masked_lm", False)):
        model = trained(made(task, **sizes))
        effzoo.save_adapter(model, tmp_path)
        other = made(task, **sizes)
        nn.init.normal_(other.decoder.queries.weight)
        if own:
            assert torch.equal(effzoo.load_adapter(other, tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)
        else:
            with pytest.raises(AdapterError, match="decoder.queries.weight: float32"):
                effzoo.load_adapter(other, tmp_path)


@pytest.mark.parametrize("method", ["far", "lt_sft", "diff", "magnitude", "supermask"])
def test_experts_that_choose_are_stored_as_what_they_chose(method, tmp_path):
    targets = "" if method == "far" else "[targets=attn.*]"
    spec = f"routed[of='{method}{targets}', experts=2]"
    model = trained(made(), spec)
    for stage, _ in training.timetable(model, 4):
        training.begin(model, stage)
        training.schedule(model, 0.9)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.5)
    training.finish(model.eval())
    effzoo.save_adapter(model, tmp_path)
    loaded = effzoo.load_adapter(made(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


# the function of the base


@pytest.mark.parametrize(
    "given",
    [{"heads": 4}, {"activation": "relu"}, {"eps": 0.1}, {"attention": "local[chunk=4]"}, {"attention": "blockwise"}],
    ids=str,
)
def test_the_same_tensors_with_another_function_are_another_base(given, tmp_path):
    effzoo.save_adapter(trained(made()), tmp_path)
    other = made(**given)
    with pytest.raises(AdapterError, match=f"another base .*{next(iter(given))}.* in the file, .* in this model"):
        effzoo.load_adapter(other, tmp_path)
    assert not effzoo.attached(other)


def test_dropout_the_backend_and_chunks_are_no_other_base(tmp_path):
    model = trained(made())
    effzoo.save_adapter(model, tmp_path)
    other = effzoo.load_adapter(made(dropout=0.5, backend="reference", mlp_chunk=4), tmp_path).eval()
    torch.testing.assert_close(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_swapped_or_quantised_base_needs_the_same_swap_and_the_same_codes(tmp_path):
    def prepared(swap, bits):
        model = made("features")
        if swap:
            effzoo.swap_attention(model, "lsh[chunk=4, seed=3]")
        if bits:
            effzoo.quantise(model, bits)
        return model

    every = [(swap, bits) for swap in (False, True) for bits in (None, 8, 4)]
    for one in every:
        effzoo.save_adapter(trained(prepared(*one)), tmp_path)
        for other in every:
            if one == other:
                effzoo.load_adapter(prepared(*other), tmp_path)
                continue
            with pytest.raises(AdapterError, match="another base"):
                effzoo.load_adapter(prepared(*other), tmp_path)


# format 1


def format_1(model, folder, name="default"):
    """What effzoo wrote before the fingerprint: hashes of the base's tensors but the head's, no hash of the
    manifest."""
    data = safetensors.torch.save(stored_tensors(model, name))
    digest = hashlib.sha256(data).hexdigest()
    hashes = {}
    for key, value in model.state_dict().items():
        if ".adapters." not in key and not key.startswith("head."):
            written = f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes()
            hashes[key] = hashlib.sha256(written).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    (folder / f"adapter-{digest[:16]}.safetensors").write_bytes(data)
    manifest = {
        "format": 1,
        "name": name,
        "peft": [{"name": "lora", "rank": 2}],
        "finished": False,
        "base": "bert",
        "base_hashes": hashes,
    }
    manifest |= {"tensors": f"adapter-{digest[:16]}.safetensors", "sha256": digest}
    (folder / "adapter.json").write_text(json.dumps(manifest))


def test_format_1_is_loaded_when_told_so_with_what_it_cannot_prove(tmp_path, caplog):
    model = trained(made())
    format_1(model, tmp_path)
    with pytest.raises(
        AdapterError, match=r"format 1, which cannot prove the base's heads, activation, eps, .* trust_base=True"
    ):
        effzoo.load_adapter(made(), tmp_path)
    with caplog.at_level(logging.WARNING, logger="effzoo"):
        loaded = effzoo.load_adapter(made(), tmp_path, trust_base=True)
    assert "nothing proves its heads, activation, eps" in caplog.text
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    effzoo.save_adapter(loaded, tmp_path)  # as format 2, which needs no trust
    assert json.loads((tmp_path / "adapter.json").read_text())["format"] == 2
    assert torch.equal(effzoo.load_adapter(made(), tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_format_1_is_refused_for_what_it_does_carry(tmp_path):
    format_1(trained(made()), tmp_path)
    other = made()
    nn.init.normal_(other.blocks[0].mlp.up.weight)
    with pytest.raises(AdapterError, match="another base .*blocks.0.mlp.up.weight"):
        effzoo.load_adapter(other, tmp_path, trust_base=True)
    tensors = next(tmp_path.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterError, match="truncated or altered"):
        effzoo.load_adapter(made(), tmp_path, trust_base=True)


# saving


@pytest.mark.parametrize("format", ["effzoo", "peft"])
def test_what_others_keep_in_the_folder_stays(format, tmp_path):
    for name in (
        "adapter-from-alice.safetensors",
        "adapter-0123456789abcdef.safetensors",
        "notes.txt",
        ".adapter.json.partial",
        "model.partial",
    ):
        (tmp_path / name).write_text("mine")
    for value in (1.0, 2.0, 2.0, 3.0):
        effzoo.save_adapter(trained(made("features"), value=value), tmp_path, format=format)
    assert sum(path.read_bytes() == b"mine" for path in tmp_path.iterdir()) == 5 and len(list(tmp_path.iterdir())) == 7
    assert content(tmp_path) == [3.0]


@pytest.mark.parametrize("format", ["effzoo", "peft"])
def test_symbolic_links_are_replaced_and_never_written_through(format, tmp_path):
    folder, precious = tmp_path / "folder", tmp_path / "precious"
    precious.write_text("mine")
    effzoo.save_adapter(trained(made("features"), value=1.0), folder, format=format)
    for path in list(folder.iterdir()):
        path.unlink()
        path.symlink_to(precious)
    effzoo.save_adapter(trained(made("features"), value=1.0), folder, format=format)
    assert (
        precious.read_text() == "mine"
        and content(folder) == [1.0]
        and not any(path.is_symlink() for path in folder.iterdir())
    )


WRITES = ("open", "fsync", "replace", "unlink")  # of `os`, which saving calls


def at_call(monkeypatch, number, act):
    """Do something instead of the call with this number, of those that change files; the number of calls so far."""
    calls = []

    def counted(real):
        def call(path, *rest, **named):
            if real is not os.open or (rest[:1] and rest[0] & os.O_CREAT):
                calls.append(path)
                if len(calls) == number:
                    act()
            return real(path, *rest, **named)

        return call

    for name in WRITES:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("format", ["effzoo", "peft"])
@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_save_that_fails_leaves_the_old_adapter_and_nothing_else(format, problem, tmp_path):
    folder, number, failed = tmp_path / "folder", 0, 0
    before = effzoo.save_adapter(trained(made("features"), value=1.0), folder, format=format)
    old, model = {path.name for path in before.iterdir()}, trained(made("features"), value=2.0)

    def fail():
        raise OSError(problem, os.strerror(problem))

    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, number, fail)
            try:
                effzoo.save_adapter(model, folder, format=format)
            except FileError as error:
                assert os.strerror(problem) in str(error) and str(folder) in str(error) and error.errno == problem
                failed += 1
            if len(calls) < number:
                break
        assert content(folder) in ([1.0], [2.0])
        assert not [path for path in folder.iterdir() if path.name.endswith(".partial")], f"call {number} left a file"
        if content(folder) == [1.0]:
            assert {path.name for path in folder.iterdir()} >= old
        effzoo.save_adapter(trained(made("features"), value=1.0), folder, format=format)
        assert {path.name for path in folder.iterdir()} == old
    assert failed >= 6


@pytest.mark.slow
@pytest.mark.parametrize("format", ["effzoo", "peft"])
@pytest.mark.parametrize("spec", ["lora[rank=2]", "lora[rank=2, alpha=7.0]"])
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(format, spec, tmp_path):
    folder, number, seen = tmp_path / "folder", 0, set()
    new = trained(made("features"), spec, value=2.0)
    old = trained(made("features"), value=1.0)
    while True:
        number += 1
        effzoo.save_adapter(old, folder, format=format)
        child = os.fork()
        if child == 0:
            try:
                at_call(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                effzoo.save_adapter(new, folder, format=format)
            finally:
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        loaded = effzoo.load_adapter(made("features"), folder, name="default")
        (value,) = stored_tensors(loaded, "default")["blocks.0.attn.q.adapters.lora.B"].unique().tolist()
        expected = old if value == 1.0 else new
        assert torch.equal(loaded(input_ids=IDS).last_hidden_state, expected(input_ids=IDS).last_hidden_state)
        seen.add(value)
    assert seen == {1.0, 2.0} and number > 6
    effzoo.save_adapter(old, folder, format=format)
    assert len(list(folder.iterdir())) == 2  # the next save has cleared what the killed ones left


@pytest.mark.parametrize("format", ["effzoo", "peft"])
def test_several_writers_and_a_reader_see_whole_adapters_at_every_moment(format, tmp_path):
    folder, stop = tmp_path / "folder", tmp_path / "stop"

    def writer(value):
        model = trained(made("features"), f"lora[rank=2, alpha={value}]", value=value)
        while not stop.exists():
            effzoo.save_adapter(model, folder, format=format)

    effzoo.save_adapter(trained(made("features"), "lora[rank=2, alpha=1.0]", value=1.0), folder, format=format)
    children = []
    for value in (1.0, 2.0, 3.0):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                writer(value)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    seen = []
    try:
        while len(seen) < 10 or (len(set(seen)) == 1 and len(seen) < 200):
            loaded = effzoo.load_adapter(made("features"), folder, name="default")
            (value,) = stored_tensors(loaded, "default")["blocks.0.attn.q.adapters.lora.B"].unique().tolist()
            assert loaded.blocks[0].attn.q.adapters["default"]["lora"].scale == value / 2  # the spec of these tensors
            seen.append(value)
    finally:
        stop.touch()
        status = [os.waitpid(child, 0)[1] for child in children]
    assert status == [0, 0, 0] and len(set(seen)) > 1
    assert len(list(folder.iterdir())) == 2
    assert content(folder) in ([1.0], [2.0], [3.0])


@pytest.mark.parametrize("format", ["effzoo", "peft"])
def test_a_file_that_the_system_does_not_let_grow_is_a_sentence(format, tmp_path):
    effzoo.save_adapter(trained(made("features"), value=1.0), tmp_path, format=format)
    model, child = trained(made("features"), value=2.0), os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            effzoo.save_adapter(model, tmp_path, format=format)
        except FileError as error:
            status = 0 if "File too large" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert content(tmp_path) == [1.0] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_saved_nor_loaded(wrong, tmp_path, monkeypatch):
    effzoo.save_adapter(trained(made("features"), value=1.0), tmp_path)
    with pytest.raises(AdapterError, match=r"blocks.0.attn.q.adapters.lora.A has NaN or infinity in it"):
        effzoo.save_adapter(trained(made("features"), value=wrong), tmp_path)
    assert content(tmp_path) == [1.0]
    data = safetensors.torch.save(
        {key: value * wrong for key, value in safetensors.torch.load_file(next(tmp_path.glob("*.safetensors"))).items()}
    )
    next(tmp_path.glob("*.safetensors")).write_bytes(data)
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(
        sealed({**manifest, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
    )
    with pytest.raises(AdapterError, match="has NaN or infinity in it"):
        effzoo.load_adapter(made("features"), tmp_path)


def test_what_is_in_the_way_is_said_in_a_sentence(tmp_path):
    model = trained(made("features"))
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for format in ("effzoo", "peft"):
            with pytest.raises(FileError, match=f"cannot write {folder}: "):
                effzoo.save_adapter(model, folder, format=format)
        with pytest.raises(AdapterError, match="adapter.json is missing"):
            effzoo.load_adapter(made("features"), folder)
    (tmp_path / "taken" / "adapter.json").mkdir(parents=True)
    with pytest.raises(FileError, match="adapter.json is a folder, where a file is to be written"):
        effzoo.save_adapter(model, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["adapter.json"]


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    replace_files(tmp_path, {"a": b"1", "b": b"1"})

    def broken(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FileError, match="No space left"):
        replace_files(tmp_path, {"a": b"2", "b": broken})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"1"}
    replace_file(tmp_path / "new" / "c", lambda path: path.write_bytes(b"3"))
    assert (tmp_path / "new" / "c").read_bytes() == b"3"


# what anybody may have written


def test_a_spec_that_asks_for_more_than_the_file_holds_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    effzoo.save_adapter(trained(made()), tmp_path)
    manifest, model = json.loads((tmp_path / "adapter.json").read_text()), made()
    monkeypatch.setattr(files, "attach", lambda *_, **__: pytest.fail("the adapter was made"))
    bombs = [
        [{"name": "lora", "rank": 10**7}],
        [{"name": "lora", "rank": 10**12}],
        [{"name": "prefix", "length": 10**9}],
    ]
    bombs += [
        [{"name": "routed", "of": "lora", "experts": 10**6}],
        [{"name": "houlsby", "bottleneck": 10**8}],
        [{"name": "lora"}] * 1000,
    ]
    for finished in (False, True):
        for bomb in bombs:
            (tmp_path / "adapter.json").write_text(sealed({**manifest, "peft": bomb, "finished": finished}))
            with pytest.raises(EffzooError):
                effzoo.load_adapter(model, tmp_path)
    assert not effzoo.attached(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tensors": "../../x"}, "tensors names a file of this folder"),
        ({"tensors": "/etc/passwd"}, "tensors names a file of this folder"),
        ({"tensors": "adapter-0123456789abcdef.safetensors"}, "which is missing; copy the whole directory"),
        ({"name": "not an identifier"}, "an adapter name is a Python identifier"),
        ({"name": "keys"}, "an adapter name is a Python identifier that torch does not use"),
        ({"name": 3}, "name is of type str, got 3"),
        ({"finished": "no"}, "finished is of type bool"),
        ({"peft": []}, "peft is a list of specs with names"),
        ({"peft": [{"name": "nothing"}]}, "unknown"),
        ({"base_fingerprint": {"facts": [], "tensors": {}}}, "facts is of type dict"),
        ({"size": True}, "size is of type int"),
        ({"format": "2"}, "format is a number"),
        ({"format": 3}, "has format 3, this version of effzoo reads 1 and 2"),
    ],
    ids=str,
)
def test_a_manifest_with_hashes_that_fit_is_not_trusted_either(change, said, tmp_path):
    effzoo.save_adapter(trained(made()), tmp_path)
    manifest, model = json.loads((tmp_path / "adapter.json").read_text()), made()
    (tmp_path / "adapter.json").write_text(sealed({**manifest, **change}))
    with pytest.raises(EffzooError, match=said):
        effzoo.load_adapter(model, tmp_path)
    assert not effzoo.attached(model)


def test_a_file_without_the_hash_of_the_head_that_it_changes_is_refused(tmp_path):
    effzoo.save_adapter(trained(made(), "lora[targets=head.out]"), tmp_path)
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    del manifest["base_fingerprint"]["tensors"]["head.out.weight"]
    (tmp_path / "adapter.json").write_text(sealed(manifest))
    with pytest.raises(AdapterError, match="changes head.out.weight, of which its manifest has no hash"):
        effzoo.load_adapter(made(), tmp_path)


def test_a_manifest_of_any_size_and_kind_is_a_sentence(tmp_path):
    effzoo.save_adapter(trained(made()), tmp_path)
    path = tmp_path / "adapter.json"
    text = path.read_text()
    for name in ("adapter.json", "adapter_config.json"):
        (tmp_path / "adapter.json").unlink(missing_ok=True)
        for content in (
            "[" * 10**6,
            text[:-1] + ', "name": "again"}',
            '{"format": NaN}',
            "[]",
            "3",
            "",
            '{"format": ' + "9" * 5000 + "}",
            '{"format": 1e999}',
        ):
            (tmp_path / name).write_text(content)
            with pytest.raises(
                AdapterError, match="is not a manifest that save_adapter wrote|is not a config that peft wrote"
            ):
                effzoo.load_adapter(made(), tmp_path)
        (tmp_path / name).write_bytes(b"\xff\xfe{}")
        with pytest.raises(AdapterError, match="is not a"):
            effzoo.load_adapter(made(), tmp_path)
        os.truncate(tmp_path / name, 2**30)
        with pytest.raises(AdapterError, match="it has 1,073,741,824 bytes, and 67,108,864 are the most that are read"):
            effzoo.load_adapter(made(), tmp_path)


def test_tensors_that_grow_without_end_are_not_read(tmp_path):
    effzoo.save_adapter(trained(made()), tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    size = tensors.stat().st_size
    os.truncate(tensors, 2**34)
    with pytest.raises(AdapterError, match=f"17179869184 bytes, the manifest says {size}"):
        effzoo.load_adapter(made(), tmp_path)
    tensors.unlink()
    os.mkfifo(tensors)
    with pytest.raises(AdapterError, match="truncated or altered|is no file"):
        effzoo.load_adapter(made(), tmp_path)


def test_a_refused_load_leaves_another_adapter_as_it_was(tmp_path):
    other = trained(made(pooling="mean"))
    effzoo.save_adapter(other, tmp_path)
    model = trained(made(), name="mine")
    before, random = model(input_ids=IDS).logits, torch.get_rng_state()
    with pytest.raises(AdapterError, match="pooling: mean in the file, first in this model"):
        effzoo.load_adapter(model, tmp_path, name="mean")
    effzoo.save_adapter(trained(made()), tmp_path)
    torch.set_rng_state(random)
    for name in ("mine", "keys", "no name", ""):
        with pytest.raises(AdapterError):
            effzoo.load_adapter(model, tmp_path, name=name)
    assert torch.equal(model(input_ids=IDS).logits, before) and list(effzoo.attached(model)) == ["mine"]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad == (".adapters.mine." in key) for key, p in model.named_parameters())


@pytest.mark.parametrize("act", ["save", "load"])
def test_a_wrong_type_is_a_sentence(act, tmp_path):
    model, base = trained(made()), made()
    effzoo.save_adapter(model, tmp_path)

    def call(model, *given, **named):
        return (
            effzoo.save_adapter(model, *given, **named)
            if act == "save"
            else effzoo.load_adapter(base if model is None else model, *given, **named)
        )

    subject = model if act == "save" else None
    for directory in (None, 3, b"bytes", []):
        with pytest.raises(EffzooError, match=f"directory takes str or Path, got .*{type(directory).__name__}"):
            call(subject, directory)
    for directory in ("x" * 300, "x/" * 3000):
        with pytest.raises(AdapterError, match="cannot be a folder of an adapter: File name too long"):
            call(subject, directory)
    for directory in ("", "a\0b"):
        with pytest.raises(AdapterError, match="directory is a path with at least one character and no NUL"):
            call(subject, directory)
    for name in (3, b"default", ["default"]):
        with pytest.raises(EffzooError, match="name takes str"):
            call(subject, tmp_path, name=name)
    for wrong in ({}, "bert", 3):
        with pytest.raises(EffzooError, match="model takes"):
            call(wrong, tmp_path)
    if act == "save":
        for format in (None, 3, []):
            with pytest.raises(EffzooError, match="format takes str"):
                effzoo.save_adapter(model, tmp_path, format=format)
        with pytest.raises(UnknownNameError, match="unknown adapter format 'onnx'"):
            effzoo.save_adapter(model, tmp_path, format="onnx")
    assert not effzoo.attached(base)


def test_an_adapter_loads_beside_one_whose_batch_is_remembered(tmp_path):
    """The copy of shapes that is made first copies no activations, which could not be copied."""
    effzoo.save_adapter(trained(made()), tmp_path)
    model = effzoo.attach(made(), "routed[of='lora[rank=2]', experts=2]", name="routed").train()
    model(input_ids=IDS, labels=torch.tensor([1])).loss.backward()
    effzoo.load_adapter(model, tmp_path, name="second")
    assert list(effzoo.attached(model)) == ["routed", "second"]


def test_rehearsing_needs_no_copy_of_what_the_model_holds():
    from effzoo.peft.rehearsal import skeleton

    model = trained(made())
    shapes = skeleton(model)
    assert all(tensor.is_meta for tensor in (*shapes.parameters(), *shapes.buffers()))
    assert {key: value.shape for key, value in shapes.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert copy.deepcopy(model).state_dict().keys() == shapes.state_dict().keys()


def test_adapters_are_saved_from_and_loaded_into_the_model_inside_a_wrapper(tmp_path):
    model = trained(made())
    effzoo.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    other = made()
    effzoo.load_adapter(nn.DataParallel(other), tmp_path)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
