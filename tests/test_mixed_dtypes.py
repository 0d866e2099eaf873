"""Models whose tensors are held in several dtypes: converted tensor by tensor, and computed rightly."""

import copy

import pytest
import torch
import transformers
from support import labelled, small
from test_convert import class_named, their_config

import effzoo
from effzoo import convert

FAMILIES = {
    "bert": ("BertForSequenceClassification", ("LayerNorm", "classifier")),
    "roberta": ("RobertaForTokenClassification", ("LayerNorm",)),
    "longformer": ("LongformerModel", ("LayerNorm", "query_global")),
    "gpt2": ("GPT2LMHeadModel", ("ln_", "wpe")),
    "llama": ("LlamaForCausalLM", ("norm",)),
    "qwen3": ("Qwen3ForCausalLM", ("norm", "lm_head")),
    "modernbert": ("ModernBertModel", ("norm", "embeddings")),
}


def mixed(model, parts, half=torch.bfloat16):
    """The model in half precision, but the tensors of these names, which hold numbers that are none of that dtype."""
    model = model.to(half)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.data = parameter.data.float() + 1e-4 * torch.randn(parameter.shape)
    return model


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def theirs(family):
    name, parts = FAMILIES[family]
    torch.manual_seed(0)
    cls = class_named(name)
    return mixed(cls(their_config(family)), parts).eval(), cls


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_keeps_its_dtype_both_ways_and_through_folders(family, tmp_path):
    model, cls = theirs(family)
    kinds = {str(tensor.dtype) for tensor in model.state_dict().values()}
    assert len(kinds) == 2
    ours = convert.from_transformers(model)
    assert {str(p.dtype) for p in ours.parameters()} == kinds
    back = convert.to_transformers(ours)
    assert type(back) is cls and same(model.state_dict(), back.state_dict())
    back.save_pretrained(tmp_path, max_shard_size="2kB" if family == "bert" else "1GB")
    again = convert.from_transformers(tmp_path)
    assert same(ours.state_dict(), again.state_dict())
    before = copy.deepcopy(ours.state_dict())
    effzoo.attach(again, "lora|norms" if family != "longformer" else "lora")
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
    effzoo.detach(again, "default")
    assert same(before, again.state_dict())


def test_a_perceiver_too(tmp_path):
    config = transformers.PerceiverConfig(
        vocab_size=41, d_model=8, d_latents=8, num_latents=4, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2, max_position_embeddings=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = mixed(transformers.PerceiverForSequenceClassification(config), ("layernorm", "latents")).eval()
    ours = convert.from_transformers(model)
    assert same(model.state_dict(), convert.to_transformers(ours).state_dict())
    model.save_pretrained(tmp_path)
    assert same(ours.state_dict(), convert.from_transformers(tmp_path).state_dict())
    out = ours(input_ids=torch.randint(0, 41, (2, 7)))
    assert bool(out.logits.isfinite().all())


def test_a_tied_table_stays_tied_in_its_own_dtype():
    model = mixed(class_named("GPT2LMHeadModel")(their_config("gpt2")), ("wte",)).eval()
    back = convert.to_transformers(convert.from_transformers(model))
    assert back.lm_head.weight is back.transformer.wte.weight and back.lm_head.weight.dtype == torch.float32
    assert same(model.state_dict(), back.state_dict())


def test_norms_in_float32_compute_as_in_transformers():
    """BERT with float32 norms in bfloat16: the same numbers to the rounding of bfloat16, from both."""
    model, _ = theirs("bert")
    model.classifier.to(torch.bfloat16)  # transformers multiplies one dtype with one
    ids = torch.randint(1, 41, (3, 9))
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = convert.from_transformers(model)(input_ids=ids).logits
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert (found.float() - wanted.float()).abs().max() < 4 * 2**-8 * wanted.float().abs().max()


PARTS = [
    ("norm",), ("head",), ("norm", "head", "attn.o"), ("embeddings.token",), ("embeddings.position",),
    ("mlp.down", "bias"), ("router",), ("core",),
]  # fmt: skip


@pytest.mark.cover()
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts))
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "perceiver-io", "experts"])
def test_mixed_blocks_compute_what_float64_does(tiny, name, parts):
    """Forward and backward, with methods and without; the residual stream has the dtype of the token table."""
    sizes = {"task": "classification", "num_labels": 3, **tiny}
    latents = {
        "layers": 2,
        "dim": 16,
        "latents": 5,
        "heads": 2,
        "mlp": 16,
        "vocab": 53,
        "max_length": 64,
        "head_dim": 8,
        "value_dim": 8,
    }
    more = {"llama": {"kv_heads": 1, "head_dim": 8}, "bert": {"attention": small("linformer")}}.get(name, {})
    if name == "perceiver-io":
        model = effzoo.build(name, task="classification", num_labels=3, dropout=0.0, attention_dropout=0.0, **latents)
    elif name == "experts":
        model = effzoo.build("bert", experts=2, router="soft", **sizes)
    else:
        model = effzoo.build(name, **sizes, **more)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at a real start, so that attention is far from uniform
            if parameter.ndim > 1:
                parameter.mul_(8)
    model = mixed(model, parts)
    exact = copy.deepcopy(model).double().eval()
    batch = labelled()
    with torch.no_grad():
        wanted = exact(**batch)
        found = model.eval()(**batch)
    stream = next(
        p.dtype for key, p in model.named_parameters() if key in ("embeddings.token.weight", "inputs.token.weight")
    )
    if name != "perceiver-io":
        assert found.logits.dtype == stream
    assert (found.logits.double() - wanted.logits).norm() < 0.05 * wanted.logits.norm()
    for method in (None, "lora", "full", "prefix", "houlsby"):
        trained = copy.deepcopy(model) if method is None else effzoo.attach(copy.deepcopy(model), method)
        trained.train()(**batch).loss.backward()
        gradients = [(p, p.grad) for p in trained.parameters() if p.requires_grad and p.grad is not None]
        assert gradients and all(g.dtype == p.dtype and bool(g.isfinite().all()) for p, g in gradients)


def test_float32_embeddings_go_into_a_half_model(tiny):
    """`inputs_embeds` in float32 give the stream their dtype, as a float32 table does."""
    model = effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16)
    embeds = torch.randn(2, 7, 16)
    with torch.no_grad():
        found = model(inputs_embeds=embeds).logits
        wanted = copy.deepcopy(model).double()(inputs_embeds=embeds.double()).logits
    assert found.dtype == torch.float32 and (found - wanted).norm() < 1e-4 * wanted.norm()
