"""Drawn damage to adapter folders: what loads is the saved adapter to the bit, what does not is a sentence, and the
model is then as it was.

    EFFZOO_DAMAGED=3000 python -m pytest tests/test_damaged_files.py -s

draws so many of each kind of folder, and prints what became of them; without the variable 150 of each are drawn. The
kinds: our own format, files for peft that effzoo wrote, which know each other, and files that peft wrote, which hold no
hash: of these nothing can prove that a number in them is the one that was saved, but that they are finite, of the
shapes of the model, and as many as the config names.
"""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
from collections import Counter

import pytest
import safetensors.torch
import torch

import effzoo
from effzoo.errors import EffzooError
from effzoo.peft.stored import stored_tensors

DRAWN = int(os.environ.get("EFFZOO_DAMAGED", "150"))
SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 30, "max_length": 24, "task": "classification"}
SPECS = (
    "lora[rank=2]",
    "ia3|prefix[length=2]",
    "lora[rank=2, targets=head.out]",
    "fish[keep=0.1]",
    "diff",
    "far",
    "dora[rank=2]|bitfit[targets=mlp.*]",
)
PEFT_SPECS = ("lora[rank=2]", "ia3", "dora[rank=2]", "krona[shape=(4, 4)]")
HUGE = (10**7, 10**8, 10**12, 10**30, 1e308, -1, 0, 2**63)
OTHER_TYPES = (None, True, 3, -2.5, "text", [], [1, "a"], {}, {"a": 1}, "../../x", 10**40)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return effzoo.build("bert", **SIZES).eval()


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """For each kind, folders as {name: bytes} with the tensors that they hold."""
    found = {"effzoo": [], "peft": [], "peft's own": []}
    for kind, specs in (("effzoo", SPECS), ("peft", PEFT_SPECS), ("peft's own", PEFT_SPECS)):
        format = "effzoo" if kind == "effzoo" else "peft"
        for number, spec in enumerate(specs):
            model = effzoo.attach(copy.deepcopy(base), spec, name="saved")
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.3)
            if spec == "far":
                effzoo.peft.finish(model, "saved")
            folder = effzoo.save_adapter(
                model, tmp_path_factory.mktemp("saved") / str(number), name="saved", format=format
            )
            if kind == "peft's own":
                held = safetensors.torch.load_file(folder / "adapter_model.safetensors")
                safetensors.torch.save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            found[kind].append((files, {key: value.clone() for key, value in stored_tensors(model, "saved").items()}))
    return found


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def put(value, path, new):
    if not path:
        return new
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if new is LookupError:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return value


def sealed(content):
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**rest, "manifest_sha256": digest}).encode()


def flipped(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(draw, data):
    at = draw.randrange(len(data))
    return draw.choice(
        (
            data[:at],
            data[at:],
            data[:at] + data[at + draw.randrange(1, 60) :],
            data[:at] + draw.randbytes(7) + data[at:],
            b"",
        )
    )


def json_damage(draw, content):
    """Another value at a drawn place, or none."""
    path = draw.choice([path for path in places(content) if path])
    new = draw.choice((draw.choice(OTHER_TYPES), draw.choice(HUGE), LookupError))
    return put(json.loads(json.dumps(content)), path, new)


def text_damage(draw, text):
    """What `json` would take, or choke on: a key twice, deep nesting, NaN, a number of 5,000 digits."""
    start = text.index(b"{") + 1
    inner = draw.choice(
        (
            b'"format": 1, ',
            b'"peft_type": "IA3", ',
            b'"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", ",
            b'"x": NaN, ',
            b'"x": ' + b"9" * 5000 + b", ",
        )
    )
    return text[:start] + inner + text[start:]


def tensor_damage(draw, data):
    """Other tensors in a file that is whole: swapped, of another dtype or shape, missing, too many, not finite."""
    held = safetensors.torch.load(data)
    with_metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__")
    key, other = draw.choice(sorted(held)), draw.choice(sorted(held))
    kind = draw.choice(("swap", "dtype", "shape", "gone", "more", "rename", "nan", "large"))
    if kind == "swap":
        held[key], held[other] = held[other], held[key]
    elif kind == "dtype":
        held[key] = held[key].to(
            draw.choice((torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64))
        )
    elif kind == "shape":
        held[key] = draw.choice(
            (
                held[key].flatten(),
                held[key][:1],
                held[key].unsqueeze(0),
                torch.zeros(0),
                torch.cat([held[key], held[key]]),
            )
        )
    elif kind == "gone":
        del held[key]
    elif kind == "more":
        held[f"{key}.more"] = torch.zeros(2)
    elif kind == "rename":
        held[key.replace("lora", "dora").replace("0", "7") + "_"] = held.pop(key)
    elif held[key].numel():
        held[key] = held[key].clone()
        held[key].view(-1)[0] = (
            draw.choice((float("nan"), float("inf"), -float("inf"))) if held[key].is_floating_point() else 3
        )
    return safetensors.torch.save({k: v.clone().contiguous() for k, v in held.items()}, with_metadata)


def header_damage(draw, data):
    """Another header: a length that is too large, offsets that overlap or lie outside, shapes that do not fit."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if draw.random() < 0.3:
        return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1))) + data[8:]
    text = json.dumps(json_damage(draw, header)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def damaged(draw, files, others, manifest, format):
    """(files, whether whoever did it has written hashes that fit). Without, what is loaded has to be what was saved."""
    files, tensors = dict(files), next(name for name in files if name != manifest)
    content = json.loads(files[manifest])
    kind = draw.choice(
        (
            "flip",
            "flip",
            "flip tensors",
            "cut",
            "cut tensors",
            "json",
            "json",
            "text",
            "tensors",
            "tensors",
            "header",
            "mixed",
            "place",
        )
    )
    seal = draw.random() < 0.5
    if kind == "flip":
        files[manifest] = flipped(draw, files[manifest])
    elif kind == "flip tensors":
        files[tensors] = flipped(draw, files[tensors])
    elif kind == "cut":
        files[manifest] = cut(draw, files[manifest])
    elif kind == "cut tensors":
        files[tensors] = cut(draw, files[tensors])
    elif kind == "json":
        new = json_damage(draw, content)
        files[manifest] = sealed(new) if seal and format == "effzoo" else json.dumps(new).encode()
        return files, seal and format == "effzoo"
    elif kind == "text":
        files[manifest] = text_damage(draw, files[manifest])
    elif kind in ("tensors", "header"):
        files[tensors] = (
            tensor_damage(draw, files[tensors]) if kind == "tensors" else header_damage(draw, files[tensors])
        )
        if seal and format == "effzoo":
            digest = hashlib.sha256(files[tensors]).hexdigest()
            files[manifest] = sealed({**content, "sha256": digest, "size": len(files[tensors])})
            return files, True
    elif kind == "mixed":  # the manifest of one adapter beside the tensors of another
        theirs = draw.choice(others)
        name = next(name for name in theirs if name != manifest)
        files[tensors] = theirs[name]
    else:
        name = draw.choice((manifest, tensors))
        files[name] = draw.choice((LookupError, IsADirectoryError, "loop", "zero", "elsewhere"))
    return files, False


def written(files, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if content is IsADirectoryError:
            (folder / name).mkdir()
        elif content == "loop":
            (folder / name).symlink_to(folder / name)
        elif content == "zero":
            (folder / name).symlink_to("/dev/zero")
        elif content == "elsewhere":
            (folder / name).symlink_to("/etc/hostname")
        elif content is not LookupError:
            (folder / name).write_bytes(content)


def state_of(model):
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "trainable": {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        "modes": {path: module.training for path, module in model.named_modules()},
        "attached": list(effzoo.attached(model)),
        "active": effzoo.peft.attach.active(model) if hasattr(effzoo.peft.attach, "active") else None,
        "random": torch.get_rng_state(),
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key])
        if isinstance(value, torch.Tensor)
        else same(value, other[key])
        if isinstance(value, dict)
        else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", ["effzoo", "peft", "peft's own"])
def test_damaged_folders_load_exactly_or_not_at_all(format, base, saved, tmp_path):
    model, folders = copy.deepcopy(base), saved[format]
    manifest = "adapter.json" if format == "effzoo" else "adapter_config.json"
    effzoo.attach(model, "lora[rank=1]", name="there")
    before, became = state_of(model), Counter()
    for number in range(DRAWN):
        draw = random.Random(f"{format} {number}")
        files, tensors = draw.choice(folders)
        new, resealed = damaged(draw, files, [other for other, _ in folders if other is not files], manifest, format)
        written(new, tmp_path / "folder")
        try:
            effzoo.load_adapter(model, tmp_path / "folder", name="loaded")
        except EffzooError as error:
            assert "\n\n" not in str(error) and len(str(error)) < 2000, number
            became["refused"] += 1
        else:
            held = stored_tensors(model, "loaded")
            if resealed:
                said = safetensors.torch.load_file(
                    tmp_path / "folder" / next(name for name in files if name != manifest)
                )
                assert held.keys() == said.keys() and all(
                    torch.equal(value, said[key].to(value)) for key, value in held.items()
                ), number
                became["loaded as its own hashes say"] += 1
            elif format == "peft's own":
                assert held.keys() >= tensors.keys() - {key for key in tensors if ".head." in key}, number
                assert all(
                    torch.isfinite(value).all() and value.shape == tensors.get(key, value).shape
                    for key, value in held.items()
                ), number
                became["loaded, and nothing proves what"] += 1
            else:
                equal = held.keys() == tensors.keys() and all(
                    torch.equal(value, tensors[key]) for key, value in held.items()
                )
                assert equal, f"{format} {number} loaded something else"
                became["loaded as it was saved"] += 1
            effzoo.detach(model, "loaded")
            effzoo.activate(model, "there")
            torch.set_rng_state(before["random"])
        assert same(state_of(model), before), f"{format} {number} changed the model"
    print(f"{format}: {DRAWN} damaged folders, {dict(became)}")
    assert became["refused"] > DRAWN / 2
