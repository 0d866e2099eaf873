"""Adapters by name: targets, several side by side, files, and each error."""

import copy
import hashlib
import json

import pytest
import safetensors.torch
import torch

import effzoo
from effzoo.errors import AdapterError, OptionError, TargetError, UnknownNameError
from effzoo.peft import roles
from effzoo.sites import PeftModule, sites


@pytest.fixture
def model(tiny):
    return effzoo.build("bert", task="classification", num_labels=3, **tiny).eval()


@pytest.fixture
def ids():
    return torch.randint(2, 53, (2, 9))


def shake(model, name):
    """Move an adapter's parameters away from their initial values."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_adapters_side_by_side_do_not_influence_each_other(model, ids):
    base = model(ids).logits
    shake(effzoo.attach(model, "lora", name="a"), "a")
    only_a = model(ids).logits
    shake(effzoo.attach(model, "prefix|ia3", name="b"), "b")
    only_b = model(ids).logits
    assert not torch.allclose(only_a, only_b)
    assert torch.equal(effzoo.activate(model, "a")(ids).logits, only_a)
    assert torch.equal(effzoo.activate(model, "b")(ids).logits, only_b)
    assert torch.equal(effzoo.activate(model)(ids).logits, base)
    trainable = {key for key, p in effzoo.activate(model, "a").named_parameters() if p.requires_grad}
    assert trainable and all(".adapters.a." in key for key in trainable)
    assert torch.equal(effzoo.detach(model, "a")(ids).logits, base)  # a was active; b stays, inactive
    assert torch.equal(effzoo.activate(model, "b")(ids).logits, only_b)


def test_two_adapters_active_at_once_act_one_after_the_other(model):
    shake(effzoo.attach(model, "lora", name="a"), "a")
    shake(effzoo.attach(model, "lora", name="b"), "b")
    effzoo.activate(model, "a", "b")
    q, x = model.blocks[0].attn.q, torch.randn(4, 16)
    a, b = (q.adapters[name]["lora"] for name in "ab")
    assert torch.allclose(q(x), x @ (q.weight + a.B @ a.A + b.B @ b.A).T + q.bias, atol=1e-5)


def test_detaching_restores_the_output_the_keys_and_what_was_trainable(model, ids):
    model.embeddings.position.requires_grad_(False)
    keys, trainable, base = list(model.state_dict()), [p.requires_grad for p in model.parameters()], model(ids).logits
    shake(effzoo.attach(model, "full", name="a"), "a")
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    effzoo.detach(model, "a")
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(model(ids).logits, base)


def test_a_failed_attach_leaves_the_model_as_it_was(model):
    before = list(model.state_dict())
    with pytest.raises(TargetError):
        effzoo.attach(model, "ia3|lora[targets=attn.nope]")
    assert (
        list(model.state_dict()) == before
        and all(p.requires_grad for p in model.parameters())
        and not effzoo.attached(model)
    )


def test_roles_name_every_site(model, tiny):
    assert roles(model)["attn.q"] == 2 and roles(model)["head.out"] == 1 and "attn.q_global" not in roles(model)
    assert roles(effzoo.build("longformer", **tiny))["attn.q_global"] == 2


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        (
            "lora[targets=attn.qq]",
            TargetError,
            r"target 'attn.qq' matches no role; did you mean 'attn.q'\? Roles: .*attn.k",
        ),
        ("lora[targets=(attn.q, attn.nope)]", TargetError, "target 'attn.nope' matches no role"),
        ("lora[layers=2]", TargetError, r"layers \[2\] do not exist; this model has 2 \(0 to 1, or -2 to -1\)"),
        ("lora[targets=attn.norm]", TargetError, "lora hangs on Linear or Embedding or Conv2d sites"),
        ("bitfit[targets=embed.token]", TargetError, "none of the 1 sites has anything to adapt"),
        ("lora|lora[rank=2]", OptionError, "two 'lora' modules on 'attn.q'; give the two specs disjoint targets"),
        ("lora[targets=()]", TargetError, "must not be empty"),
        ("lorra", UnknownNameError, "did you mean 'lora'"),
    ],
)
def test_each_bad_target_has_its_own_sentence(model, spec, error, said):
    with pytest.raises(error, match=said):
        effzoo.attach(model, spec)


def test_a_target_that_matches_only_some_layers_is_an_error(tiny):
    model = effzoo.build("bert", **{**tiny, "attention": ("full", "longformer[window=4]")})
    with pytest.raises(TargetError, match=r"'attn.q_global' matches only some layers, not \[0\]; give layers=\(1,\)"):
        effzoo.attach(model, "lora[targets=attn.q_global]")
    effzoo.attach(model, "lora[targets=attn.q_global, layers=1]")
    assert effzoo.attached(model)["default"].places["lora"] == [("blocks.1.attn.q_global", "attn.q_global")]


@pytest.mark.parametrize("name", ["a.b", "", "items", "1st", "class name"])
def test_an_adapter_name_is_an_identifier(model, name):
    with pytest.raises(AdapterError, match="Python identifier"):
        effzoo.attach(model, "lora", name=name)


def test_names_are_unique_and_known(model):
    effzoo.attach(model, "lora")
    with pytest.raises(AdapterError, match="'default' is attached already"):
        effzoo.attach(model, "ia3")
    for act in (effzoo.detach, effzoo.merge, effzoo.activate, lambda m, n: effzoo.save_adapter(m, "nowhere", name=n)):
        with pytest.raises(UnknownNameError, match=r"unknown adapter 'defualt'; did you mean 'default'\?"):
            act(model, "defualt")


def test_merge_refuses_nan_and_what_is_no_change_of_a_weight_and_changes_nothing(model, ids):
    effzoo.attach(model, "lora", name="a")
    with torch.no_grad():
        model.blocks[1].attn.v.adapters["a"]["lora"].B[3, 2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        AdapterError, match=r"NaN or infinity into blocks.1.attn.v.weight \(16 of 256 entries\); the model is unchanged"
    ):
        effzoo.merge(model, "a")
    effzoo.attach(model, "prompt", name="b")
    with pytest.raises(
        AdapterError,
        match="embeddings.token cannot be merged: PromptTokens is not a change of a weight; keep it attached",
    ):
        effzoo.merge(model, "b")
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if "attn.v.adapters" not in key)


# files


@pytest.fixture
def saved(tiny, ids, tmp_path):
    """A trained-looking adapter on disk, the base it belongs to, and what the two compute."""
    base = effzoo.build("bert", task="classification", num_labels=3, **tiny).eval()
    model = shake(effzoo.attach(copy.deepcopy(base), "lora[rank=2]|prefix[length=3]", name="task_a"), "task_a")
    return base, effzoo.save_adapter(model, tmp_path / "adapter", name="task_a"), model(ids).logits


def test_loading_restores_the_outputs_under_any_name_and_head(saved, ids, tiny):
    base, folder, expected = saved
    assert torch.equal(effzoo.load_adapter(copy.deepcopy(base), folder)(ids).logits, expected)
    renamed = effzoo.load_adapter(copy.deepcopy(base), folder, name="other")
    assert torch.equal(renamed(ids).logits, expected) and list(effzoo.attached(renamed)) == ["other"]
    torch.nn.init.normal_(base.head.out.weight)  # another fresh head: the adapter brings its own
    assert torch.equal(effzoo.load_adapter(base, folder)(ids).logits, expected)


def test_the_folder_holds_json_and_safetensors_only_and_is_replaced_whole(saved):
    base, folder, _ = saved
    first = sorted(p.name for p in folder.iterdir())
    assert len(first) == 2 and first[1] == "adapter.json" and first[0].endswith(".safetensors")
    effzoo.save_adapter(shake(effzoo.load_adapter(base, folder), "task_a"), folder, name="task_a")
    assert sorted(p.name for p in folder.iterdir()) != first and len(list(folder.iterdir())) == 2


def test_another_base_is_refused_by_its_first_different_tensor(saved, tiny):
    base, folder, _ = saved
    with torch.no_grad():
        base.blocks[1].mlp.up.weight[0, 0] += 1e-3
    with pytest.raises(
        AdapterError,
        match=r"another base \('bert'\): blocks.1.mlp.up.weight: float32\[\d+, 16\] \w+ in the file, float32",
    ):
        effzoo.load_adapter(base, folder)
    with pytest.raises(AdapterError, match="another base"):
        effzoo.load_adapter(
            effzoo.build("bert", task="classification", num_labels=3, attention="longformer", **tiny), folder
        )
    assert not effzoo.attached(base)


def test_a_base_with_another_number_of_labels_takes_the_adapters_head(saved, ids, tiny):
    base, folder, expected = saved
    other = effzoo.build("bert", task="classification", num_labels=5, **tiny).eval()
    other.load_state_dict({k: v for k, v in base.state_dict().items() if not k.startswith("head.out")}, strict=False)
    assert torch.equal(effzoo.load_adapter(other, folder)(ids).logits, expected)


def damage(folder, kind):
    tensors, manifest = next(folder.glob("*.safetensors")), folder / "adapter.json"
    content = json.loads(manifest.read_text())
    if kind == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif kind == "altered":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(bytes(data))
    elif kind == "tensors gone":
        tensors.unlink()
    elif kind == "manifest gone":
        manifest.unlink()
    elif kind == "manifest cut":
        manifest.write_text(manifest.read_text()[:50])
    elif kind == "manifest key gone":
        del content["sha256"]
        manifest.write_text(sealed(content))
    elif kind == "other format":
        manifest.write_text(json.dumps({**content, "format": 99}))
    elif kind == "other spec":
        content["peft"][0]["rank"] = 3
        manifest.write_text(json.dumps(content))
    elif kind == "other spec, sealed":
        content["peft"][0]["rank"] = 3
        manifest.write_text(sealed(content))
    elif kind in ("key missing", "key too many"):
        held = safetensors.torch.load_file(tensors)
        if kind == "key missing":
            held.pop(sorted(held)[0])
        else:
            held["blocks.0.attn.q.adapters.lora.C"] = torch.zeros(1)
        data = safetensors.torch.save(held)
        tensors.write_bytes(data)
        manifest.write_text(sealed({**content, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}))


def sealed(content):
    """A manifest whose own hash fits what it says."""
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**rest, "manifest_sha256": digest})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "truncated or altered"),
        ("altered", "truncated or altered"),
        ("tensors gone", "which is missing; copy the whole directory"),
        ("manifest gone", "adapter.json is missing"),
        ("manifest cut", "is not a manifest that save_adapter wrote"),
        ("manifest key gone", "KeyError: 'sha256'"),
        ("other format", "has format 99, this version of effzoo reads 1 and 2"),
        ("other spec", "adapter.json is truncated or altered"),
        ("other spec, sealed", r"has shape \(2, 16\) .* this model needs \(3, 16\)"),
        ("key missing", "does not fit its own spec: .* is missing in the file"),
        ("key too many", "lora.C is one too many in the file"),
    ],
)
def test_damaged_files_are_refused_and_the_model_stays_as_it_was(saved, kind, said):
    base, folder, _ = saved
    damage(folder, kind)
    before = list(base.state_dict())
    with pytest.raises(AdapterError, match=said):
        effzoo.load_adapter(base, folder)
    assert list(base.state_dict()) == before and all(p.requires_grad for p in base.parameters())


def test_a_hook_that_is_set_later_on_an_object_or_its_class_acts(model, ids):
    class Late(PeftModule):
        pass

    effzoo.attach(model, "lora")
    site = next(site for _, site in sites(model) if site.role == "attn.q")
    module = Late()
    site.hang("default", "late", module)
    outs = [model(ids).last_hidden_state]
    module.after = lambda x, y, context: y + 1
    outs.append(model(ids).last_hidden_state)
    del module.after
    Late.after = lambda self, x, y, context: 2 * y
    outs.append(model(ids).last_hidden_state)
    assert (
        not torch.allclose(outs[0], outs[1])
        and not torch.allclose(outs[0], outs[2])
        and not torch.allclose(outs[1], outs[2])
    )
