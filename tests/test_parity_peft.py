"""LoRA, (IA)3 and prefix tuning agree with the `peft` package: outputs, and the gradients of the adapters' own
parameters.

Models and adapters are drawn at random, in float64; the two agree to 1e-10, far below the 1e-5 that float32 would
allow.
"""

import peft
import pytest
import torch
import transformers
from einops import rearrange

import effzoo
from effzoo import convert

TOLERANCE = 1e-10
LAYERS, HEADS, DIM, MLP, VOCAB, LENGTH = 3, 2, 12, 20, 41, 9


def drawn(model):
    """The model in float64 with every parameter drawn, adapters included."""
    model = model.double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = key.endswith("weight") and parameter.ndim == 1
            parameter.normal_(1.0 if is_norm else 0.0, 0.4)
    return model


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=MLP,
        max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    return drawn(transformers.BertForSequenceClassification(config))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=DIM, n_layer=LAYERS, n_head=HEADS, n_inner=MLP, n_positions=20, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return drawn(transformers.GPT2LMHeadModel(config))


def padded():
    ids = torch.randint(5, VOCAB, (3, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 4:] = 0
    return ids, mask


def close(actual, expected):
    scale = expected.abs().max().item()
    assert scale > 1e-3, "too small to tell anything"
    assert (actual - expected).abs().max().item() < TOLERANCE * max(1.0, scale)


def assert_equal_both(theirs, ours, parameters):
    """Draw the adapter, give both the same, and compare logits and gradients."""
    ours.eval()
    with torch.no_grad():
        for their, our, laid_out in parameters:
            our.normal_(0.3, 0.5)
            their.copy_(laid_out(our))
    trainable = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(parameters), "peft trains something else as well"
    ids, mask = padded()
    out = theirs(input_ids=ids, attention_mask=mask).logits
    other = ours(ids, attention_mask=mask).logits
    with theirs.disable_adapter():
        assert (theirs(input_ids=ids, attention_mask=mask).logits - out).abs().max() > 1e-3, (
            "the adapter changes nothing"
        )
    close(other, out)
    mixture = torch.randn_like(out)
    (out * mixture).sum().backward()
    (other * mixture).sum().backward()
    for their, our, laid_out in parameters:
        close(laid_out(our.grad), their.grad)


def test_lora_on_bert_equals_peft():
    base = bert()
    ours = effzoo.attach(convert.from_transformers(base), "lora[rank=4, alpha=6, targets=(attn.q, attn.v)]")
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], lora_dropout=0.0)
    ).eval()
    parameters = []
    for i in range(LAYERS):
        for role, name in (("q", "query"), ("v", "value")):
            site = getattr(ours.blocks[i].attn, role).adapters["default"]["lora"]
            layer = getattr(theirs.base_model.model.bert.encoder.layer[i].attention.self, name)
            parameters += [
                (layer.lora_A["default"].weight, site.A, torch.clone),
                (layer.lora_B["default"].weight, site.B, torch.clone),
            ]
    assert_equal_both(theirs, ours, parameters)


def test_ia3_on_bert_equals_peft():
    """peft takes regular expressions here: its suffix rule would match attention.output.dense with output.dense."""
    base = bert()
    ours = effzoo.attach(convert.from_transformers(base), "ia3")
    feedforward = r".*\.layer\.\d+\.output\.dense"
    config = peft.IA3Config(target_modules=rf".*\.self\.(key|value)|{feedforward}", feedforward_modules=feedforward)
    theirs = peft.get_peft_model(base, config).eval()
    parameters = []
    for i in range(LAYERS):
        layer = theirs.base_model.model.bert.encoder.layer[i]
        assert not hasattr(layer.attention.output.dense, "ia3_l")
        for site, target, shape in (
            (ours.blocks[i].attn.k, layer.attention.self.key, (DIM, 1)),
            (ours.blocks[i].attn.v, layer.attention.self.value, (DIM, 1)),
            (ours.blocks[i].mlp.down, layer.output.dense, (1, MLP)),
        ):
            parameters.append(
                (
                    target.ia3_l["default"],
                    site.adapters["default"]["ia3"].scale,
                    lambda x, shape=shape: x.reshape(shape),
                )
            )
    assert_equal_both(theirs, ours, parameters)


@pytest.mark.parametrize("length", [1, 5])
def test_prefix_tuning_on_gpt2_equals_peft_at_its_positions(length):
    """peft passes the prefix as past keys and values, so its tokens start at position `length`; ours stay unless
    told."""
    base = gpt2()
    ours = effzoo.attach(convert.from_transformers(base), f"prefix[length={length}]")
    theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)).eval()
    table = theirs.prompt_encoder["default"].embedding.weight  # [length, layers * (keys, values) * dim]
    memories = [block.attn.memory.adapters["default"]["prefix"] for block in ours.blocks]

    def as_table(tensors):
        return rearrange(list(tensors), "(l two) h n d -> n (l two h d)", two=2)

    with torch.no_grad():
        for memory in memories:
            memory.keys.normal_(), memory.values.normal_()
        table.data = as_table([x for memory in memories for x in (memory.keys, memory.values)])
    ids, mask = padded()
    positions = torch.arange(length, length + LENGTH)[None]
    out = theirs(input_ids=ids, attention_mask=mask).logits
    other = ours(ids, attention_mask=mask, position_ids=positions).logits
    tokens = mask.bool()
    close(other[tokens], out[tokens])
    assert (ours(ids, attention_mask=mask).logits - other)[tokens].abs().max() > 1e-3  # the shift is really there
    mixture = torch.randn_like(out[tokens])
    (out[tokens] * mixture).sum().backward()
    (other[tokens] * mixture).sum().backward()
    close(as_table([x.grad for memory in memories for x in (memory.keys, memory.values)]), table.grad)
