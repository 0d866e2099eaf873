"""Layers that share a block: the model of separate layers with equal weights, for every attention, in training,
decoding and on disk."""

import copy
import dataclasses

import pytest
import safetensors.torch
import torch
from support import labelled, small

import effzoo
from effzoo.architectures import transformer
from effzoo.attention.core import Cache
from effzoo.blocks.reversible import two_streams
from effzoo.errors import AdapterError, ConversionError, IncompatibleError, IncompatiblePeft, OptionError, TargetError
from effzoo.sites import sites

CACHED = [kind for kind in effzoo.attention.names() if effzoo.attention.get(kind).decodes()]


@pytest.fixture
def build(tiny):
    def made(name="bert", **options):
        torch.manual_seed(0)
        return effzoo.build(name, **{**tiny, "layers": 4, "task": "classification", "num_labels": 3, **options})

    return made


def spread(shared, **options):
    """The same network with a block for each layer, whose weights are copies."""
    config = dataclasses.replace(shared.config, share_layers=0)
    model = type(shared)(config, shared.task, shared.num_labels)
    each = config.layers // len(shared.blocks)
    state = {key: value for key, value in shared.state_dict().items() if not key.startswith("blocks.")}
    for layer in range(config.layers):
        own = shared.blocks[layer // each].state_dict()
        state |= {f"blocks.{layer}.{key}": value for key, value in own.items()}
    model.load_state_dict(state)
    for core, block in zip(
        model.cores(), (shared.blocks[layer // each] for layer in range(config.layers)), strict=True
    ):
        for (name, buffer), (_, same) in zip(core.named_buffers(), block.attn.core.named_buffers(), strict=True):
            assert buffer.shape == same.shape, name
            buffer.copy_(same)
    return model.to(next(shared.parameters()).dtype)


def grown(model):
    """Weights large enough for layers to differ in what they do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.double()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_sharing_is_separate_layers_with_equal_weights(build, kind, groups):
    model = grown(build(attention=small(kind), share_layers=groups)).eval()
    twin, batch = spread(model).eval(), labelled()
    assert len(model.blocks) == groups and len(twin.blocks) == 4
    one, other = model(**batch), twin(**batch)
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=0, atol=1e-10)
    one.loss.backward()
    other.loss.backward()
    summed = {}
    for name, parameter in twin.named_parameters():
        parts = name.split(".")
        if parts[0] == "blocks":
            name = ".".join(["blocks", str(int(parts[1]) * groups // 4), *parts[2:]])
        if parameter.grad is not None:
            summed[name] = summed.get(name, 0) + parameter.grad
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == summed.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", effzoo.attention.names())
@pytest.mark.parametrize("how", ["checkpointing", "reversible", "recompute"])
def test_what_is_computed_again_is_the_same_again(build, kind, how, monkeypatch):
    """Also where a kind makes discrete choices, which each layer has to remember by itself."""
    options = {"residual": "reversible", "norm": "pre"} if how == "reversible" else {}
    model = grown(build(attention=small(kind), share_layers=2, dropout=0.2, peft="lora[rank=2]", **options)).train()
    gradients, batch = [], labelled()
    for again in (False, True):
        model.zero_grad()
        model.recompute = {"checkpointing": "blocks", "recompute": "hidden"}.get(how, "nothing") if again else "nothing"
        torch.manual_seed(4)
        with monkeypatch.context() as plain:
            if not again:
                plain.setattr(transformer, "reversible", two_streams)  # autograd alone
            model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert gradients[0] and len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_each_layer_has_a_cache_of_its_own(build, kind, residual):
    options = {"tied": False} if residual == "reversible" else {}
    spec = "lsh[rounds=2, chunk=4, buckets=4, stable=true]" if kind == "lsh" else small(kind)
    model = build("gpt2", task="causal_lm", attention=spec, share_layers=2, residual=residual, **options)
    model = grown(model).eval()
    ids, cache = torch.randint(2, 53, (2, 11)), Cache()
    whole = model(ids).logits
    steps = [
        model(ids[:, :5], cache=cache).logits,
        *(model(ids[:, t : t + 1], cache=cache).logits for t in range(5, 11)),
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-9)
    assert set(cache.states) == {0, 1, 2, 3}
    if kind == "full":
        beams = effzoo.generate(model, ids, max_new_tokens=3, num_beams=2)
        assert torch.equal(beams, effzoo.generate(model, ids, max_new_tokens=3, num_beams=2, use_cache=False))


def test_parameters_are_counted_stored_and_hashed_once(build, tmp_path):
    model, plain = build(share_layers=1), build()
    block = sum(p.numel() for p in plain.blocks[0].parameters())
    assert (
        effzoo.account(plain).total - effzoo.account(model).total
        == 3 * block
        == effzoo.account(plain).trainable - effzoo.account(model).trainable
    )
    assert not [key for key in model.state_dict() if key.startswith("blocks.1")]
    data = [{"input_ids": [3 + i, 4, 5 + i], "label": i % 3} for i in range(6)]
    result = effzoo.finetune(model, data, output_dir=tmp_path, max_steps=2, learning_rate=1e-2, progress=False)
    assert set(safetensors.torch.load_file(result.weights)) == set(model.state_dict())
    fresh = build(share_layers=1)
    fresh.load_state_dict(safetensors.torch.load_file(result.weights))
    assert torch.equal(fresh.eval()(**labelled()).logits, model.eval()(**labelled()).logits)


def test_adapters_hang_on_the_block_and_act_in_each_of_its_layers(build, tmp_path):
    model = grown(build(share_layers=2, peft="lora[rank=2]|prefix[length=2]", task="classification")).eval()
    lora = [path for path, role in effzoo.attached(model)["default"].places["lora"]]
    assert sorted(lora) == ["blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v"]
    before = model(**labelled()).logits
    effzoo.save_adapter(model, tmp_path)
    effzoo.detach(model, "default")
    bare = model(**labelled()).logits
    effzoo.load_adapter(model, tmp_path)
    assert torch.equal(model(**labelled()).logits, before) and not torch.equal(bare, before)
    one = copy.deepcopy(model)
    effzoo.detach(one, "default")
    effzoo.attach(one, "ia3@1")
    assert {site.layer for _, site in sites(one) if site.active and site.layer is not None} == {1}
    with pytest.raises(TargetError, match=r"layers \[3\] do not exist; this model has 2"):
        effzoo.attach(one, "lora@3", name="b")
    merged = build(share_layers=2, peft="lora[rank=2]").double().eval()
    with torch.no_grad():
        [p.add_(0.1) for p in merged.parameters() if p.requires_grad]
    before = merged(**labelled()).logits
    torch.testing.assert_close(effzoo.merge(merged)(**labelled()).logits, before, rtol=0, atol=1e-10)


def test_adapters_know_whether_layers_share(build, tmp_path):
    effzoo.save_adapter(build(share_layers=2, peft="lora"), tmp_path)
    for wrong in (build(), build(share_layers=1)):
        with pytest.raises(AdapterError, match="another base"):
            effzoo.load_adapter(wrong, tmp_path)


def test_what_no_head_reads_is_left_out_without_changing_the_loss(build):
    model, batch = grown(build(share_layers=2, peft="lora")).train(), labelled()
    whole = model(**batch).loss
    model.only_what_is_read = True
    torch.testing.assert_close(model(**batch).loss, whole, rtol=0, atol=1e-12)


def test_another_attention_and_a_plan(build):
    model = build(share_layers=2)
    q = model.blocks[1].attn.q
    effzoo.swap_attention(model, "longformer[window=(4, 8)]")
    assert model.blocks[1].attn.q is q and [core.reach for core in model.cores()] == [2, 4]
    model(**labelled()).loss.backward()
    assert (
        effzoo.plan(build(share_layers=1), batch=2, length=9).weights < effzoo.plan(build(), batch=2, length=9).weights
    )
    alike = [effzoo.plan(build(share_layers=share), batch=2, length=9).activations for share in (1, 0)]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("task", ["classification", "masked_lm", "token_classification"])
def test_narrow_embeddings_go_through_one_linear_layer(build, task):
    model = grown(build(embedding_dim=6, task=task)).eval()
    table, layer = model.embeddings.token, model.embeddings.project
    assert table.embedding_dim == model.embeddings.position.embedding_dim == 6 and layer.role == "embed.project"
    ids = torch.tensor([[5, 6, 7]])
    rows = table.weight[ids] + model.embeddings.position.weight[:3] + model.embeddings.token_type.weight[0]
    x = (
        torch.nn.functional.layer_norm(rows, (6,), model.embeddings.norm.weight, model.embeddings.norm.bias, 1e-12)
        @ layer.weight.T
        + layer.bias
    )
    torch.testing.assert_close(model.embeddings(ids)[0], x, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(inputs_embeds=table(ids)).logits, model(ids).logits, rtol=0, atol=1e-12)
    if task == "masked_lm":
        assert model.head.dense.weight.shape == (6, 16) and model(ids).logits.shape == (1, 3, 53)
    effzoo.attach(model, "prompt[length=2]|lora[rank=2]")
    assert model(ids).last_hidden_state.shape == (1, 3, 16)
    with pytest.raises(effzoo.errors.InputError, match=r"\[batch, n, 6\]"):
        model(inputs_embeds=torch.zeros(1, 3, 16))


def test_what_cannot_share_is_refused_with_the_reason(build):
    with pytest.raises(OptionError, match="share_layers 3 does not divide the 4 layers; try share_layers=2"):
        build(share_layers=3)
    with pytest.raises(
        OptionError, match=r"layers 0 and 1 share a block, but have the attentions full and local\[chunk=4\]"
    ):
        build(attention=("full", "local[chunk=4]", "full", "full"), share_layers=2)
    assert len(build(attention=("full", "full", "local[chunk=4]", "local[chunk=4]"), share_layers=2).blocks) == 2
    with pytest.raises(OptionError, match="layers 0 and 1 share a block, but differ in rotary"):
        build("llama", kv_heads=0, task="classification", rotary_theta=(1e4, 1e5, 1e4, 1e4), share_layers=2)
    with pytest.raises(OptionError, match="first_norm"):
        build(norm="pre", first_norm=False, share_layers=1)
    with pytest.raises(IncompatiblePeft, match="whose layers share blocks"):
        build(share_layers=2, peft="ladder")
    with pytest.raises(ConversionError, match="no counterpart for share_layers=2"):
        effzoo.convert.to_transformers(build(share_layers=2))
    theirs = effzoo.convert.to_transformers(build())
    with pytest.raises(ConversionError, match="share_layers is 2 in the model and 0"):
        effzoo.convert.load_pretrained(build(share_layers=2), theirs)


def test_albert_goes_there_and_back(build, tmp_path):
    """Parity of every head on drawn weights is in test_parity."""
    model = grown(build("albert", layers=4, share_layers=2, embedding_dim=6, task="masked_lm")).float().eval()
    theirs = effzoo.convert.to_transformers(model)
    theirs.save_pretrained(tmp_path)
    back = effzoo.convert.from_transformers(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(back(ids).logits, model(ids).logits)
    same = {
        name: getattr(model.config, name)
        for name in ("dim", "layers", "heads", "mlp", "vocab", "share_layers", "embedding_dim")
    }
    long = effzoo.build(
        "albert",
        pretrained=tmp_path,
        attention="longformer[window=4]",
        task="classification",
        max_length=100,
        peft="lora",
        **same,
    )
    assert torch.equal(long.blocks[1].mlp.up.weight, model.blocks[1].mlp.up.weight) and long(
        input_ids=torch.full((1, 90), 5)
    ).logits.shape == (1, 2)


def test_blocks_that_were_cut_away_are_not_replaced_by_others(tiny):
    model = effzoo.build("bert", **tiny)
    model.blocks = model.blocks[:1]
    with pytest.raises(IncompatibleError, match="build one with layers=1"):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_layers_have_a_dropout_of_attention_weights_each_unless_they_share_a_block(tiny):
    sizes = {**tiny, "layers": 3, "attention_dropout": (0.5, 0.0, 0.25)}
    model = effzoo.build("bert", **sizes).train()
    assert [core.dropout for core in model.cores()] == [0.5, 0.0, 0.25]
    assert effzoo.build("bert", **{**sizes, "attention_dropout": (0.5, 0.5, 0.5)}).config.attention_dropout == 0.5
    effzoo.swap_attention(model, "linformer[k=4]")
    assert [core.dropout for core in model.cores()] == [0.5, 0.0, 0.25]
    with pytest.raises(OptionError, match="layers 0 and 1 share a block, but differ in attention_dropout"):
        effzoo.build("bert", **sizes, share_layers=1)
    with pytest.raises(OptionError, match="2 values of attention_dropout for 3 layers"):
        effzoo.build("bert", **{**sizes, "attention_dropout": (0.5, 0.0)})
    with pytest.raises(OptionError, match=r"attention_dropout is in \[0, 1\)"):
        effzoo.build("bert", **{**sizes, "attention_dropout": (0.5, 0.0, 1.0)})
    with pytest.raises(
        ConversionError,
        match=r"bert of transformers has one attention_dropout for all layers, got \(0\.5, 0\.0, 0\.25\)",
    ):
        effzoo.convert.to_transformers(effzoo.build("bert", **sizes))
