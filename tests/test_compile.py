"""Whole models under torch.compile(fullgraph=True) compute what they compute without, forward and backward, with padding, prefix and global tokens.

`aot_eager` traces everything and generates no code, so it is quick; one model goes through the code generator too, because that has been
wrong where tracing was right (see `merge` in attention/kernel.py).
"""

import pytest
import torch

import effzoo

CASES = [("bert", kind) for kind in effzoo.attention.names()] + [("gpt2", "longformer"), ("llama", "full"), ("modernbert", None)]


def both(model, inputs, backend):
    """Logits and gradients, compiled and not."""
    found = []
    for run in (torch.compile(model, fullgraph=True, backend=backend, dynamic=False), model):
        model.zero_grad()
        logits = run(**inputs).logits
        logits.square().mean().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch._dynamo.reset()
    return found


def case(name, attention, tiny, **more):
    sizes = tiny | ({"kv_heads": 1} if name == "llama" else {}) | ({"mlp": 24} if name == "modernbert" else {})
    model = effzoo.build(
        name, task="token_classification", peft="prefix[length=3]|lora", **({"attention": attention} if attention else {}), **sizes, **more
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = {"input_ids": torch.randint(53, (2, 33)), "attention_mask": (torch.arange(33) < torch.tensor([33, 20])[:, None]).long()}
    if any(core.supports_global for core in model.cores()):
        inputs["global_attention_mask"] = torch.zeros(2, 33, dtype=torch.long)
        inputs["global_attention_mask"][[0, 0, 1], [0, 5, 3]] = 1
    return model.double(), inputs


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_traced_model_is_the_model(name, attention, tiny):
    (logits, grads), (expected, wanted) = both(*case(name, attention, tiny), "aot_eager")
    assert (logits - expected).abs().max() < 1e-10 and grads.keys() == wanted.keys()
    for key, grad in wanted.items():
        assert (grads[key] - grad).abs().max() < 1e-10, key


def test_generated_code_computes_the_model(tiny):
    """Two layers of Longformer with globals, prefix and LoRA: four parts merged, twice."""
    (logits, grads), (expected, wanted) = both(*case("longformer", "longformer[window=8]", tiny), "inductor")
    assert (logits - expected).abs().max() < 1e-10
    for key, grad in wanted.items():
        assert (grads[key] - grad).abs().max() < 1e-10, key
