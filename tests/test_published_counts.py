"""Numbers of trained parameters on Llama 3.2 3B, as published with `peft`'s own benchmark, from a model on the meta
device: nothing is allocated.

The numbers are `num_trainable_params` of method_comparison/MetaMathQA in huggingface/peft (Apache-2.0); the comments
say how they come about: L = 28 layers, d = 3072, f = 8192, d_kv = 8 * 128 = 1024.
"""

import pytest
import torch

import effzoo

LLAMA = {
    "layers": 28,
    "dim": 3072,
    "heads": 24,
    "kv_heads": 8,
    "head_dim": 128,
    "mlp": 8192,
    "vocab": 128256,
    "max_length": 1024,
    "tied": True,
}
MLP = "mlp.up, mlp.gate, mlp.down"
PUBLISHED = {
    "lora[rank=32]": 9_175_040,  # L r (2 d + d + d_kv)
    "lora[rank=64]": 18_350_080,
    "lora[rank=64, rslora=true]": 18_350_080,
    f"lora[rank=10, targets=({MLP})]": 9_461_760,  # 3 L r (d + f)
    "dora[rank=32]": 9_289_728,  # and a magnitude per output: + L (d + d_kv)
    "ia3": 286_720,  # L (2 d_kv + f)
    "norms[targets=(attn.norm, mlp.norm, final.norm)]": 175_104,  # (2 L + 1) d
    "prefix[length=200]": 11_468_800,  # 2 L n d_kv
    "prefix[length=50]": 2_867_200,
    "prompt[length=200]": 614_400,  # n d
    "p_tuning[length=20, hidden=3072]": 28_382_208,  # n d + d h + h + h h + h + h d + d
    # SHiRA: as many entries of q and v as LoRA of rank 32 has
    f"fish[targets=(attn.q, attn.v), keep={9_175_040 / 352_321_536!r}]": 9_175_040,
}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return effzoo.build("llama", **LLAMA)


def trained(model, spec):
    with torch.device("meta"):
        effzoo.attach(model, spec, name="one")
    try:
        return effzoo.account(model).trainable
    finally:
        effzoo.detach(model, "one")


@pytest.mark.slow
@pytest.mark.parametrize("spec", PUBLISHED)
def test_trained_parameters_are_the_published_number(model, spec):
    assert trained(model, spec) == PUBLISHED[spec]


def test_full_fine_tuning_trains_the_published_number(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_212_749_824


def test_llama_adapter_differs_from_the_published_number_by_its_gates(model):
    """`peft` has one gate per layer; the paper, and we, have one per head."""
    assert trained(model, "llama_adapter[length=100, skip=0]") == 8_601_628 - 28 + 28 * 24
