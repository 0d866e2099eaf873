"""Adapters in the files of the `peft` package, both ways: what one library has trained computes the same in the other.

Models and adapters are drawn at random, in float64, with numbers that float32 holds too (peft keeps some tensors in
float32). Where peft computes in float64 the two agree to 1e-10. `there` also proves that peft has found every tensor of
the file and no other.
"""

import copy
import inspect
import json
import re
import shutil
import subprocess
import sys
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.errors import AdapterError, UnknownNameError
from effzoo.peft.attach import adapter_tensors
from effzoo.peft.parameter.adalora import Triplets

LAYERS, DIM, MLP, VOCAB, LENGTH, LABELS = 3, 12, 20, 41, 9, 3
# SINGLE: where transformers or peft computes norms, angles or a softmax in float32 whatever the model is in
EXACT, SINGLE = 1e-10, 1e-5
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def drawn(model):
    model = model.double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = key.endswith("weight") and parameter.ndim == 1
            parameter.normal_(1.0 if is_norm else 0.0, 0.4)
    return model


def of_bert(cls, **fields):
    return drawn(
        cls(
            cls.config_class(
                vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=2,
                intermediate_size=MLP, max_position_embeddings=24, num_labels=LABELS, **fields,
            )
        )
    )  # fmt: skip


def gpt2(cls=transformers.GPT2LMHeadModel):
    return drawn(
        cls(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=DIM, n_layer=LAYERS, n_head=2, n_inner=MLP, n_positions=24, bos_token_id=None,
                eos_token_id=None, pad_token_id=0, num_labels=LABELS,
            )
        )
    )  # fmt: skip


def of_llama(cls=transformers.LlamaForCausalLM, kv_heads=1, **fields):
    return of_bert(cls, num_key_value_heads=kv_heads, pad_token_id=0, bos_token_id=None, eos_token_id=None, **fields)


def modernbert():
    return of_bert(
        transformers.ModernBertForSequenceClassification, local_attention=4, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )  # fmt: skip


MODELS = {
    "bert": lambda: of_bert(transformers.BertForSequenceClassification),
    "bert-tokens": lambda: of_bert(transformers.BertForTokenClassification),
    "bert-lm": lambda: of_bert(transformers.BertForMaskedLM),
    "roberta": lambda: of_bert(transformers.RobertaForSequenceClassification, pad_token_id=1),
    "longformer": lambda: of_bert(transformers.LongformerForSequenceClassification, attention_window=4, pad_token_id=1),
    "modernbert": modernbert,
    "gpt2": gpt2,
    "gpt2-cls": lambda: gpt2(transformers.GPT2ForSequenceClassification),
    "gpt2-tokens": lambda: gpt2(transformers.GPT2ForTokenClassification),
    "llama": of_llama,
    "tied": lambda: of_llama(tie_word_embeddings=True),
    "llama-cls": lambda: of_llama(transformers.LlamaForSequenceClassification),
    "qwen3": lambda: of_llama(transformers.Qwen3ForCausalLM, head_dim=8),
    "roberta-tokens": lambda: of_bert(transformers.RobertaForTokenClassification, pad_token_id=1),
    "llama-heads": lambda: of_llama(kv_heads=2),
    "mistral": lambda: of_llama(transformers.MistralForCausalLM, sliding_window=4),
}
WHOLE = {"gpt2-cls", "llama-cls"}  # classifiers that peft's prompts let read the last position, padding or not


def tolerance(name, method=""):
    if "fourier" in method.lower():
        return SINGLE  # peft composes the change in float32
    return EXACT if name.startswith(("bert", "roberta", "gpt2")) else SINGLE


def inputs(name):
    ids = torch.randint(5, VOCAB, (3, LENGTH))
    mask = torch.ones_like(ids)
    if name not in WHOLE:
        mask[1, 6:] = mask[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask} | (
        {"global_attention_mask": (ids % 4 == 0).long() * mask} if name == "longformer" else {}
    )


def logits(model, batch, rows=0, **more):
    """The logits at tokens; `rows` of a prompt are cut off."""
    with torch.no_grad():
        out = model(**batch, **more).logits
    return out if out.ndim == 2 else out[:, rows:][batch["attention_mask"].bool()]


def assert_close(actual, expected, within=EXACT):
    scale = expected.abs().max().item()
    assert scale > 1e-3, "too small to tell anything"
    assert (actual - expected).abs().max().item() < within * max(1.0, scale)


def in_float32(model, names):
    """Draw the parameters, of which float32 holds every digit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names(name, parameter):
                parameter.copy_(
                    (0.3 + 0.5 * torch.randn(parameter.shape)).float() if parameter.numel() > 1 else torch.tensor(0.37)
                )
    return model


def attached(base, spec):
    """A model of ours with the weights of `base` and a drawn adapter."""
    model = effzoo.attach(convert.from_transformers(base), spec)
    in_float32(model, lambda name, p: p.requires_grad)
    for block in model.blocks:
        for module in block.attn.memory.adapters["default"].values() if "default" in block.attn.memory.adapters else ():
            if hasattr(module, "gate") and module.gate is not None:
                module.gate.data = torch.full_like(module.gate, 0.62)
    for module in model.modules():
        if isinstance(module, Triplets):
            module.mask[1:3] = False
    effzoo.peft.finish(model)
    return model.eval()


def loaded_by_peft(base, folder):
    """peft's model; every tensor of the file is found in it unchanged, and it has no other of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|Unexpected keyword|no effect|matched no).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    held, stored = peft.get_peft_model_state_dict(theirs), safetensors.torch.load_file(folder / WEIGHTS)
    assert not set(stored) - set(held)  # biases and tables of the base may join them
    assert all("bias" in key or key.endswith("base_layer.weight") for key in set(held) - set(stored))
    for key, value in stored.items():
        assert torch.equal(held[key], value.to(held[key])), key
    return theirs.double().eval()


def of_peft(base, config, folder):
    """An adapter that peft has made, drawn and saved, with peft's model of it."""
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double()
    in_float32(theirs, lambda name, p: p.requires_grad and "ranknum" not in name).eval()  # AdaLoRA: not in the file
    theirs.save_pretrained(folder)
    return theirs


LORA = [
    ("bert", "lora[rank=4, alpha=6]"),
    ("bert", "lora[rank={attn.q: 2, attn.v: 5, mlp.up: 3}, alpha={attn.q: 2, attn.v: 7, mlp.up: 1}]"),
    ("bert", "lora[rank=4, alpha=6, rslora=true, layers=(0, 2), targets=(attn.o, mlp.down)]"),
    ("bert", "lora[rank=3, targets=(embed.token, embed.position, attn.q)]"),
    ("bert", "lora[rank=3, init=pissa, alpha=5]"),
    ("bert", "lora[rank=3, init=olora, rslora=true, dropout=0.1]"),
    ("bert-tokens", "lora"),
    ("bert-lm", "lora[targets=(attn.v, lm.dense)]"),
    ("roberta", "lora[targets=(attn.k, attn.o), rank=2]|norms"),
    ("longformer", "lora[rank=2]"),
    ("longformer", "lora[rank=3, targets=attn.q_global]|bitfit[group=value]"),
    ("modernbert", "lora[rank={attn.q: 2, attn.v: 4, mlp.gate: 3}]"),
    ("gpt2", "lora[rank=3, alpha=4]"),
    ("gpt2", "lora[rank={attn.k: 2, attn.v: 3, attn.o: 4, mlp.down: 1}, alpha={attn.k: 3, *: 2}]"),
    ("gpt2-cls", "lora[rank=3, init=pissa, rslora=true, targets=(attn.q, attn.k, attn.v, mlp.up)]"),
    ("llama", "lora[rank=2, targets=(attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.down)]"),
    ("llama-cls", "lora[rank=2]|full[targets=mlp.up, layers=1]"),
    ("bert", "lora|bitfit"),
    ("bert", "lora[targets=attn.q]|bitfit[targets=attn.q]"),
    ("gpt2", "lora[targets=attn.q]|bitfit[targets=(attn.v, mlp.up, attn.norm)]"),
    ("bert", "dora[rank=3, alpha=5]"),
    ("gpt2", "dora[rank={attn.q: 2, attn.v: 3, mlp.up: 1}, alpha=2]"),
    ("bert", "ia3"),
    ("gpt2-tokens", "ia3"),
    ("longformer", "ia3"),
    ("llama", "ia3[targets=(attn.k, mlp.down), layers=(1, 2)]"),
    ("gpt2", "lora[targets=(attn.q, lm.out), rank=3, alpha=5]"),  # the head alone, the table it is tied to stays
    ("gpt2", "lora[targets=(attn.v, embed.token), rank=3, alpha=5]"),  # both, as with ensure_weight_tying
    ("gpt2", "lora[targets=(attn.v, embed.token, lm.out), rank=3, tied=false]"),  # each its own
    ("bert-lm", "lora[targets=(attn.v, embed.token, lm.out), rank=2, rslora=true, tied=false]"),
    ("tied", "lora[rank={attn.q: 2, embed.token: 3}, alpha={attn.q: 1, embed.token: 5}]"),
    ("tied", "lora[targets=(attn.q, lm.out)]|norms"),
    ("tied", "lora|full[targets=embed.token]"),
    ("gpt2", "lora|full[targets=embed.token]"),
    ("llama", "lora|full[targets=(embed.token, lm.out)]"),
    ("tied", "lora|tokens[ids=3-5+9]"),
    ("gpt2", "lora|tokens[ids=3-5+9]"),
    ("bert", "lora|tokens[ids=7-40]"),
    ("llama", "lora|tokens[ids=7-40]"),
    ("llama", "lora|tokens[ids=7-40]|tokens[ids=1-20, targets=lm.out]"),
    ("tied", "tokens[ids=3-5+9]"),
    ("gpt2", "tokens[ids=3-30]"),
    ("llama", "tokens[ids=3-30]"),
    ("llama", "tokens[ids=3-30, targets=(embed.token, lm.out)]"),
    ("bert", "norms"),
    ("llama", "norms"),
    ("gpt2-cls", "norms[targets=(attn.norm, final.norm)]"),
    ("bert", "krona"),
    ("llama", "krona[shape=(2, 2), scale=0.7, targets=(attn.q, mlp.up)]"),
    ("bert", "loha[rank=3, alpha=6]"),
    ("llama", "loha[rank=2, targets=(attn.q, mlp.up), layers=1]"),
    ("bert", "vera[rank=5, seed=3]"),
    ("llama", "vera[rank=4, targets=(attn.q, mlp.up, mlp.down)]"),
    ("bert", "fourierft[frequencies=7, scale=30.0, seed=2]"),
    ("llama", "fourierft[frequencies=9, targets=(attn.v, mlp.down)]"),
    ("bert", "oft[block=4]"),
    ("llama", "hra[rank=4, targets=(attn.q, mlp.down)]"),
    ("bert", "miss[rank=3]"),
    ("bert", "boft[block=4, factors=1]"),
    ("llama", "boft[block=6, factors=1, targets=(attn.v, mlp.gate)]"),
    ("bert", "vblora[rank=3, vectors=7]"),
    ("llama", "vblora[rank=2, vectors=5, length=4, k=3, targets=(attn.q, mlp.up, mlp.down)]"),
    ("bert", "adalora[rank=4, scale=0.7]"),
    ("llama", "adalora[rank=3, targets=(attn.q, mlp.down), layers=(0, 2)]"),
]  # fmt: skip


RESCALED = [LORA[13], LORA[21]]  # several scales in one module of theirs, which has one


@pytest.mark.parametrize("name, spec", LORA, ids=[f"{name}-{spec}" for name, spec in LORA])
def test_an_adapter_from_here_gives_the_same_logits_in_peft_and_read_again_here(name, spec, tmp_path):
    base = MODELS[name]()
    ours, batch = attached(base, spec), inputs(name)
    expected = logits(ours, batch)
    effzoo.save_adapter(ours, tmp_path, format="peft")
    theirs = loaded_by_peft(base, tmp_path)
    assert_close(logits(theirs, batch), expected, tolerance(name, spec))
    assert (logits(base, batch) - expected).abs().max() > 1e-3, "the adapter changes nothing"
    again = effzoo.load_adapter(convert.from_transformers(base), tmp_path, name="again")
    assert_close(logits(again, batch), expected)
    if "init" not in spec and (name, spec) not in RESCALED:
        before, after = adapter_tensors(ours, "default"), adapter_tensors(again, "again")
        assert {re.sub(r"adapters\.default", "adapters.again", key) for key in before} == set(after)
        for key, value in before.items():
            assert torch.equal(after[key.replace("adapters.default", "adapters.again")], value), key
    effzoo.save_adapter(again, tmp_path / "twice", name="again", format="peft")
    for key, value in safetensors.torch.load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / "twice" / WEIGHTS)[key], value), key


FEEDFORWARD = r".*\.layer\.\d+\.output\.dense"
PEFT = [
    ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"])),
    (
        "bert",
        peft.LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=r".*\.layer\.[02]\..*dense",
            rank_pattern={"layer.0.output.dense": 2}, alpha_pattern={"intermediate.dense": 3},
        ),
    ),
    ("bert", peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear", exclude_modules=["key"])),
    ("bert", peft.LoraConfig(r=3, target_modules=["query", "word_embeddings"], layers_to_transform=[1],
    bias="lora_only")), ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"], bias="all")),
    ("bert-lm", peft.LoraConfig(r=3, target_modules=["query"], bias="all")),
    ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"], modules_to_save=["bert.pooler.dense",
    "LayerNorm"])),
    ("roberta", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "key"], use_dora=True)),
    ("longformer", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "query_global", "value_global"])),
    ("modernbert", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["Wqkv", "Wi"])),
    ("gpt2", peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["c_attn"], fan_in_fan_out=True)),
    ("gpt2-cls", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
    use_dora=True, bias="all")),
    ("llama", peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "lm_head", "embed_tokens"])),
    ("llama-cls", peft.LoraConfig(task_type="SEQ_CLS", r=3, init_lora_weights="gaussian", target_modules="all-linear")),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"])),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens", "lm_head"], rank_pattern={"lm_head": 2})),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)),
    ("tied", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens"], ensure_weight_tying=True,
    use_rslora=True)),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
    ensure_weight_tying=True)), ("gpt2", peft.LoraConfig(r=3, target_modules=["lm_head", "wte"], fan_in_fan_out=True)),
    ("bert-lm", peft.LoraConfig(r=3, target_modules=["query", "decoder", "word_embeddings"])),
    ("llama", peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[9, 3, 30])),
    ("tied", peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 3],
    "lm_head": [9, 3]})),
    ("llama", peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 3, 12],
    "lm_head": [30, 8]})),
    ("gpt2", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[9, 3, 30])),
    ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"], trainable_token_indices=[9, 3, 30])),
    ("tied", peft.TrainableTokensConfig(token_indices=[9, 3, 12])),
    ("gpt2", peft.TrainableTokensConfig(token_indices=[9, 3, 12])),
    ("llama", peft.TrainableTokensConfig(token_indices=[9, 3, 12])),
    ("llama", peft.TrainableTokensConfig(token_indices=[9, 3, 12], target_modules=["embed_tokens", "lm_head"])),
    ("llama", peft.TrainableTokensConfig(token_indices=[9, 3, 12], target_modules=["lm_head"])),
    ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM")),
    ("bert", peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])),
    ("gpt2-cls", peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=r".*\.ln_[12]")),
    ("bert", peft.IA3Config(task_type="SEQ_CLS", target_modules=rf".*\.self\.(key|value)|{FEEDFORWARD}",
    feedforward_modules=FEEDFORWARD)),
    ("bert", peft.IA3Config(task_type="SEQ_CLS")),  # by default `output.dense` also hits the output of attention
    ("gpt2-tokens", peft.IA3Config(task_type="TOKEN_CLS", fan_in_fan_out=True)),
    ("bert-tokens", peft.LoKrConfig(task_type="TOKEN_CLS", r=8, alpha=3, target_modules=["query", "dense"])),
    ("llama", peft.LoKrConfig(task_type="CAUSAL_LM", r=1, alpha=3, decompose_both=True, decompose_factor=4,
    target_modules=["q_proj", "gate_proj"])),
    ("bert", peft.LoHaConfig(task_type="SEQ_CLS", r=3, alpha=6, target_modules=["query", "dense"])),
    ("llama", peft.VeraConfig(task_type="CAUSAL_LM", r=5, save_projection=False, target_modules=["q_proj", "up_proj"])),
    ("bert", peft.FourierFTConfig(task_type="SEQ_CLS", n_frequency=9, scaling=40.0, target_modules=["query"])),
    ("llama", peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, use_cayley_neumann=False,
    target_modules=["q_proj"])),
    ("bert", peft.HRAConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])),
    ("llama", peft.MissConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])),
    ("bert", peft.BOFTConfig(task_type="SEQ_CLS", boft_block_num=3, boft_block_size=0, target_modules=["query"])),
    ("llama", peft.VBLoRAConfig(task_type="CAUSAL_LM", r=3, num_vectors=7, vector_length=4,
    target_modules=["q_proj", "up_proj"])),
    ("bert", peft.AdaLoraConfig(task_type="SEQ_CLS", init_r=4, lora_alpha=6, total_step=9,
    target_modules=["query", "dense"])),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, config", PEFT, ids=[f"{name}-{config.peft_type.value}-{i}" for i, (name, config) in enumerate(PEFT)]
)
def test_an_adapter_from_peft_gives_the_same_logits_here_and_in_peft_again(name, config, tmp_path):
    base = MODELS[name]()
    theirs, batch = of_peft(base, copy.deepcopy(config), tmp_path), inputs(name)
    expected = logits(theirs, batch)
    ours = effzoo.load_adapter(convert.from_transformers(base), tmp_path)
    assert_close(logits(ours, batch), expected, tolerance(name, config.peft_type.value))
    assert (logits(base, batch) - expected).abs().max() > 1e-3, "the adapter changes nothing"
    effzoo.save_adapter(ours, tmp_path / "back", format="peft")
    again = loaded_by_peft(base, tmp_path / "back")
    assert_close(logits(again, batch), expected, tolerance(name, config.peft_type.value))


TABLE = "embeddings.token.adapters.default"
GRADIENTS = [  # of our tensors, and of theirs
    (
        "tied", peft.LoraConfig(r=3, target_modules=["lm_head"]),
        {"head.out.adapters.default.lora.A": "lm_head.lora_A.default.weight",
        "head.out.adapters.default.lora.B": "lm_head.lora_B.default.weight"},
    ),
    ("tied", peft.LoraConfig(r=3, target_modules=["embed_tokens"]),
    {f"{TABLE}.lora.A": "embed_tokens.lora_embedding_A.default"}), (
        "tied", peft.LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True),
        {
            f"{TABLE}.lora.A": "embed_tokens.lora_embedding_A.default lm_head.lora_B.default.weight",
            f"{TABLE}.lora.B": "embed_tokens.lora_embedding_B.default lm_head.lora_A.default.weight",
        },
    ),
    (
        "tied", peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[3, 9, 30]),
        {f"{TABLE}.tokens.trained": "embed_tokens.token_adapter.trainable_tokens_delta.default"},
    ),
    ("llama", peft.TrainableTokensConfig(token_indices=[*range(5, 25)]),
    {f"{TABLE}.tokens.trained": "embed_tokens.trainable_tokens_delta.default"}),
    ("gpt2", peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_f"]), {
        "final_norm.adapters.default.norms.own_weight": "ln_f.ln_tuning_layers.default.weight",
        "final_norm.adapters.default.norms.own_bias": "ln_f.ln_tuning_layers.default.bias",
    }),
]  # fmt: skip


@pytest.mark.parametrize("name, config, pairs", GRADIENTS, ids=range(len(GRADIENTS)))
def test_what_is_trained_here_gets_the_gradients_that_it_gets_in_peft(name, config, pairs, tmp_path):
    base = MODELS[name]()
    theirs = of_peft(base, copy.deepcopy(config), tmp_path)
    theirs.requires_grad_(True)
    ours, batch = effzoo.load_adapter(convert.from_transformers(base), tmp_path), inputs(name)
    for model in (ours, theirs):
        model(**batch).logits[batch["attention_mask"].bool()].square().sum().backward()
    of_theirs = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for mine, other in pairs.items():
        found = [grad for key, grad in of_theirs.items() if key.endswith(tuple(other.split()))]
        assert len(found) == len(other.split())
        like = ours.get_parameter(mine)  # a tied head's factors are those of the table, transposed
        assert_close(like.grad, sum(grad if grad.shape == like.shape else grad.T for grad in found), tolerance(name))


INPUT = [
    ("gpt2", "prompt[length=3]", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ("gpt2-cls", "prompt[length=1]", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=1)),
    ("gpt2-tokens", "p_tuning[length=3]", peft.PromptEncoderConfig(task_type="TOKEN_CLS", num_virtual_tokens=3,
    encoder_hidden_size=5)),
    ("bert-tokens", "prompt[length=3]", peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3)),
    ("llama", "p_tuning[length=2, encoder=lstm]", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2,
    encoder_hidden_size=5)),
    ("llama-cls", "prompt[length=2]", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
    ("roberta-tokens", "prompt[length=3]", peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3)),
    ("qwen3", "prefix[length=3]", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ("gpt2", "prefix[length=4]", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    (
        "gpt2-cls",
        "prefix[length=2, form=mlp, hidden=7]",
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, prefix_projection=True,
        encoder_hidden_size=7),
    ),
    ("llama", "prefix[length=4]", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    ("llama-heads", "prefix[length=1, form=mlp, hidden=7]", peft.PrefixTuningConfig(task_type="CAUSAL_LM",
    num_virtual_tokens=1)),
    ("llama", "llama_adapter[length=3, skip=1]", peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3,
    adapter_layers=2)),
    ("mistral", "llama_adapter[length=2, skip=0]", peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2,
    adapter_layers=3)),
]  # fmt: skip
if "past_key_values" not in inspect.signature(transformers.GPT2ForSequenceClassification.forward).parameters:
    # from 5.24 on peft 0.21 takes this class for one without a cache, and refuses every prefix on it
    INPUT = [
        (name, spec, config)
        for name, spec, config in INPUT
        if (name, type(config)) != ("gpt2-cls", peft.PrefixTuningConfig)
    ]
METHODS = [f"{name}-{spec}" for name, spec, _ in INPUT]


def rows_of(spec):
    return int(spec.split("length=")[1].split(",")[0].rstrip("]"))


def shifted(name, spec):
    """peft's tokens begin behind its prefix, and learned positions know it."""
    length = rows_of(spec)
    return (
        {"position_ids": torch.arange(length, length + LENGTH)[None]}
        if "prefix" in spec and name.startswith("gpt2")
        else {}
    )


def cut(name, spec):
    """How many rows of a prompt are among peft's logits."""
    return rows_of(spec) if spec.startswith("p") and "prefix" not in spec else 0


@pytest.mark.parametrize("name, spec, config", INPUT, ids=METHODS)
def test_rows_from_here_give_the_same_logits_in_peft_and_read_again_here(name, spec, config, tmp_path):
    base, batch = MODELS[name](), inputs(name)
    ours = attached(base, spec)
    effzoo.peft.finish(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.float())
    expected = logits(ours, batch, **shifted(name, spec))
    effzoo.save_adapter(ours, tmp_path, format="peft")
    theirs = loaded_by_peft(base, tmp_path)
    assert_close(logits(theirs, batch, cut(name, spec)), expected, tolerance(name))
    assert (logits(base, batch) - expected).abs().max() > 1e-3, "the adapter changes nothing"
    again = effzoo.load_adapter(convert.from_transformers(base), tmp_path, name="again")
    # there the keys were turned, and turned back
    exact = not (name.startswith(("llama", "qwen3")) and "prefix" in spec)
    assert_close(logits(again, batch, **shifted(name, spec)), expected, EXACT if exact else SINGLE)
    before, after = adapter_tensors(ours, "default"), adapter_tensors(again, "again")
    for key, value in before.items():
        same = after[key.replace("adapters.default", "adapters.again")]
        assert (
            torch.equal(same, value)
            or (not exact and torch.allclose(same, value, atol=1e-6))
            or (key.endswith("gate") and (same - value).abs().max() < EXACT)
        )


@pytest.mark.parametrize("name, spec, config", INPUT, ids=METHODS)
def test_rows_from_peft_give_the_same_logits_here_and_in_peft_again(name, spec, config, tmp_path):
    base, batch = MODELS[name](), inputs(name)
    theirs = of_peft(base, copy.deepcopy(config), tmp_path)
    expected = logits(theirs, batch, cut(name, spec))
    ours = effzoo.load_adapter(convert.from_transformers(base), tmp_path)
    # peft computes the rows, and saves them in float32
    encoded = getattr(config, "prefix_projection", False) or config.peft_type.value == "P_TUNING"
    assert_close(logits(ours, batch, **shifted(name, spec)), expected, SINGLE if encoded else tolerance(name))
    effzoo.save_adapter(ours, tmp_path / "back", format="peft")
    assert_close(logits(loaded_by_peft(base, tmp_path / "back"), batch, cut(name, spec)), expected, SINGLE)


def saved(name, spec, folder):
    """A model of ours, its base, and the files of its adapter."""
    base = MODELS[name]()
    ours = attached(base, spec)
    effzoo.save_adapter(ours, folder, format="peft")
    return base, ours


def fresh(base):
    return convert.from_transformers(base)


def edited(folder, tensors=None, header=None, **config):
    """Change the files of an adapter, and leave no hash: tensors by a function, the header, fields of the config."""
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as content:
        metadata = content.metadata()
    if "effzoo" in metadata:
        metadata["effzoo"] = json.dumps({"parts": json.loads(metadata["effzoo"])["parts"]})
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    if tensors is not None:
        tensors(stored)
    safetensors.torch.save_file(stored, folder / WEIGHTS, metadata if header is None else header)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))


# peft's olora fails on Conv1D
@pytest.mark.parametrize("name, start", [("bert", "pissa"), ("gpt2", "pissa"), ("bert", "olora")])
def test_a_start_from_factors_that_peft_has_converted_is_read_as_twice_the_rank(name, start, tmp_path):
    """peft finds the factors in float32, and in no other precision."""
    base, batch = MODELS[name]().float(), inputs(name)
    target = {"bert": "query", "gpt2": "c_attn"}[name]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[target], init_lora_weights=start, fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as peft's guide has it, to save the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    in_float32(theirs, lambda key, p: p.requires_grad and "lora_B" in key)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(
        AdapterError,
        match=f"init_lora_weights='{start}' has changed the base.*path_initial_model_for_weight_conversion",
    ):
        effzoo.load_adapter(fresh(base), tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(logits(effzoo.load_adapter(fresh(base), tmp_path / "converted"), batch), expected, SINGLE)


@pytest.mark.parametrize(
    "spec", ["lora[rank=3]", "dora[rank=3, targets=(attn.k, mlp.down)]", "ia3", "lora|bitfit[targets=attn.v]"]
)
def test_a_fused_module_without_our_header_is_read_as_an_adapter_on_each_of_its_parts(spec, tmp_path):
    """As after further training in peft, which keeps no header."""
    base, ours = saved("gpt2", spec, tmp_path)
    batch = inputs("gpt2")
    edited(tmp_path, header={"format": "pt"})
    again = effzoo.load_adapter(fresh(base), tmp_path)
    assert {"q", "k", "v"} == {part for part in "qkvo" if len(getattr(again.blocks[0].attn, part).adapters)}
    assert_close(logits(again, batch), logits(ours, batch))


def test_a_low_rank_on_some_of_the_parts_of_a_fused_module_is_block_diagonal(tmp_path):
    saved("gpt2", "lora[rank={attn.q: 2, attn.v: 3}]", tmp_path)
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS)
    A, B = (stored[f"base_model.model.transformer.h.1.attn.c_attn.lora_{half}.weight"] for half in "AB")
    assert A.shape == (5, DIM) and B.shape == (3 * DIM, 5)
    assert not B[:DIM, 2:].any() and not B[DIM : 2 * DIM].any() and not B[2 * DIM :, :2].any()


def test_factors_of_lokr_are_full_when_peft_makes_them_from_the_config_of_krona(tmp_path):
    """Shapes that `decompose_factor` gives; others are refused."""
    base, _ = saved("bert", "krona[shape=(2, 2), targets=(attn.q, mlp.up)]", tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["decompose_factor"] == 2
    ours = attached(base, "krona[shape=(6, 4)]")
    with pytest.raises(AdapterError, match=r"decompose_factor, and none gives \(6, 4\).*leave shape out"):
        effzoo.save_adapter(ours, tmp_path / "other", format="peft")
    assert not (tmp_path / "other").exists()


def test_training_goes_on_alike_in_both_libraries_from_one_file(tmp_path):
    base = of_bert(
        transformers.BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    ours = attached(base, "lora[rank=2, targets=(attn.q, mlp.up)]")
    effzoo.save_adapter(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).double().train()
    batch, labels = inputs("bert"), torch.tensor([0, 2, 1])
    for model in (ours.train(), theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
    pooler = theirs.base_model.model.bert.pooler
    assert hasattr(pooler.dense, "modules_to_save")  # BERT's pooler is part of our head, and so it trains in both
    assert_close(logits(theirs.eval(), batch), logits(ours.eval(), batch))
    theirs.save_pretrained(tmp_path / "trained")
    assert_close(logits(effzoo.load_adapter(fresh(base), tmp_path / "trained"), batch), logits(ours, batch))


def test_the_twin_that_is_exported_from_here_takes_the_adapter(tmp_path):
    base = MODELS["llama"]()
    ours = attached(base, "lora[targets=(attn.q, attn.v, lm.out)]")
    effzoo.save_adapter(ours, tmp_path, format="peft")
    twin = convert.to_transformers(fresh(base))
    batch = inputs("llama")
    assert_close(logits(loaded_by_peft(twin, tmp_path), batch), logits(ours, batch), SINGLE)


def test_a_scale_of_the_attention_output_that_no_vector_can_take_up_is_refused(tmp_path):
    base = MODELS["bert"]()
    config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    of_peft(base, config, tmp_path)
    with pytest.raises(
        AdapterError, match=r"blocks\.0\.attn\.v has no vector to take it up; name the modules by their full paths"
    ):
        effzoo.load_adapter(fresh(base), tmp_path)


REFUSED = [
    ("bert", "houlsby", "houlsby on blocks.0.*no counterpart in the format of peft, which takes lora"),
    ("bert", "lora|ia3[targets=mlp.down]", "exactly one method of its own, and this one has LORA, IA3"),
    ("bert", "lora|dora[targets=attn.k]", "one use_dora for a whole adapter"),
    ("bert", "lora[targets=attn.q]|ia3[targets=attn.q]", "has two methods, lora and ia3"),
    ("bert", "lora[targets=attn.q, dropout=0.1]|lora[targets=attn.v]", "one lora_dropout for a whole adapter"),
    ("bert", "lora[init=loftq]", "lora on blocks.0.attn.q has no counterpart"),
    ("bert", "bitfit", "only trains weights that the model has already"),
    ("bert", "ia3|bitfit", "biases travel in peft with LoRA only"),
    ("bert", "lora|full[targets=attn.q]", "trained as a whole and adapted besides"),
    ("bert-lm", "lora[targets=embed.token]", "the language-model head is tied to this table"),
    ("bert", "prompt", "the head reads the first token .* in effzoo, and in peft the prompt counts"),
    ("bert", "prefix", "hands a prefix over as a cache, which bert has none of"),
    ("longformer", "p_tuning", "on attention 'longformer': in effzoo every query sees them"),
    ("mistral", "prompt", "fall out of a window like any other"),
    ("mistral", "prefix", "fall out of a window like any other"),
    ("bert-lm", "prompt", "peft leaves prompts and prefixes out when a model is run for masked_lm"),
    ("bert-lm", "lora|full[targets=embed.token]", "the language-model head is tied to this table"),
    (
        "gpt2",
        "lora[targets=(embed.token, lm.out)]",
        "changes the table and the tied head, and the head is adapted besides",
    ),
    (
        "gpt2",
        "lora[targets=lm.out]|full[targets=embed.token]",
        "trained as a whole, and the head that is tied to it adapted besides",
    ),
    ("gpt2", "ia3|full[targets=embed.token]", "peft ties trained modules with LoRA only, not with IA3"),
    ("gpt2", "ia3|tokens[ids=5]", "trained tokens travel in peft with LoRA, or alone, not with IA3"),
    ("bert", "tokens[ids=5]", "peft does not save the head .bert.pooler.dense, classifier. with TRAINABLE_TOKENS"),
    ("bert-lm", "lora|tokens[ids=7]", "head.out multiplies by, and peft then leaves out that head's bias"),
    ("bert-lm", "tokens[ids=7]", "head.out multiplies by, and peft then leaves out that head's bias"),
    ("bert", "norms|bitfit[targets=mlp.up]", "only trains weights that the model has already"),
    ("gpt2", "prefix[layers=(0, 1)]", "one in every layer, this adapter has none in blocks.2"),
    ("gpt2", "prefix[softmax=own]", "shares the softmax"),
    ("gpt2", "llama_adapter", "llama and mistral only, not for gpt2 .there peft adds"),
    ("llama", "llama_adapter[layers=0]", "peft adapts the uppermost layers"),
    ("llama-cls", "llama_adapter", "peft does not save the head .score. with ADAPTION_PROMPT"),
    ("gpt2", "krona", "LoKr of peft adapts linear layers, and transformer.h.0.attn.c_attn"),
    ("gpt2", "prompt|full[targets=final.norm]", "with PROMPT_TUNING peft saves the heads classifier and score"),
]


@pytest.mark.parametrize("name, spec, message", REFUSED, ids=[f"{name}-{spec}" for name, spec, _ in REFUSED])
def test_what_peft_cannot_say_is_refused_with_a_sentence_and_nothing_is_written(name, spec, message, tmp_path):
    ours = attached(MODELS[name](), spec)
    with pytest.raises(AdapterError, match=message):
        effzoo.save_adapter(ours, tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()


def test_gates_that_differ_by_head_are_refused(tmp_path):
    ours = attached(MODELS["llama"](), "llama_adapter[skip=0]")
    with torch.no_grad():
        ours.blocks[1].attn.memory.adapters["default"]["llama_adapter"].gate[0] += 1e-3
    with pytest.raises(AdapterError, match="blocks.1.attn.memory has a gate for each head .*peft has one for all"):
        effzoo.save_adapter(ours, tmp_path, format="peft")


def test_a_gate_of_peft_beyond_the_range_of_tanh_is_refused(tmp_path):
    base, _ = saved("llama", "llama_adapter[length=2, skip=2]", tmp_path)
    edited(tmp_path, lambda stored: stored.update({key: torch.tensor([1.2]) for key in stored if "gate" in key}))
    with pytest.raises(AdapterError, match=r"adaption_gate is 1\.2; our gates are tanh"):
        effzoo.load_adapter(fresh(base), tmp_path)


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"
STRICT = [
    (lambda t: t.pop(f"{QUERY}.lora_B.weight"), {}, f"{QUERY[17:]}.lora_B.weight is missing"),
    (
        lambda t: [t.pop(f"{QUERY}.lora_{half}.weight") for half in "AB"],
        {},
        "config names bert.encoder.layer.1.attention.self.query",
    ),
    (
        lambda t: t.update({"base_model.model.bert.encoder.layer.9.x.lora_A.weight": torch.ones(2, 2)}),
        {},
        "no module 'bert.encoder.layer.9.x'",
    ),
    (
        lambda t: t.update({"base_model.model.bert.other.weight": torch.ones(2, 2)}),
        {},
        "bert.other.weight is one too many",
    ),
    (
        lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(8, 5)}),
        {},
        r"lora_A.weight has shape \(8, 5\), this model needs \(8, 12\)",
    ),
    (lambda t: t.update({"base_model.model.classifier.weight": torch.ones(3, 11)}), {}, "classifier.weight has shape"),
    (
        lambda t: t.update({"base_model.model.classifier.weight": torch.ones(4, 12)}),
        {},
        "head has 3 and 4 outputs, this model's 3",
    ),
    (None, {"r": 4}, "has rank 8 in the file and 4 in its config"),
    (None, {"peft_type": "POLY"}, "type 'POLY', which effzoo cannot read; it reads LORA"),
    (None, {"lora_bias": True}, "LORA with lora_bias=True has no counterpart"),
    (None, {"layer_replication": [[0, 2]]}, "layer_replication"),
    (None, {"use_qalora": True}, "use_qalora"),
    (None, {"init_lora_weights": "pissa"}, "has changed the base"),
    (
        None,
        {"target_modules": ["query", "value", "key"]},
        "attention.self.key .target_modules., and the file has no tensor",
    ),
]


@pytest.mark.parametrize("tensors, config, message", STRICT, ids=[message[:40] for *_, message in STRICT])
def test_files_that_do_not_fit_are_refused_and_leave_the_model_as_it_was(tensors, config, message, tmp_path):
    base, _ = saved("bert", "lora", tmp_path)
    edited(tmp_path, tensors, **config)
    model = fresh(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        effzoo.load_adapter(model, tmp_path)
    after = model.state_dict()
    assert set(before) == set(after) and all(torch.equal(value, after[key]) for key, value in before.items())
    assert not effzoo.attached(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "parts, message",
    [
        ([8, 8, 8], r"rank 16 in the file, whose header gives ranks"),
        ([0, 8, 8], "lora_B is block-diagonal, and it is not"),
        ([8, 8], "which stacks 3"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(parts, message, tmp_path):
    base, _ = saved("gpt2", "lora[layers=0]", tmp_path)
    edited(tmp_path, header={"format": "pt", "effzoo": json.dumps({"parts": {"transformer.h.0.attn.c_attn": parts}})})
    with pytest.raises(AdapterError, match=message):
        effzoo.load_adapter(fresh(base), tmp_path)


def test_the_lengths_of_dora_tell_another_base(tmp_path):
    """For parts of a fused module without adapter; elsewhere a file of peft cannot prove its base."""
    saved("gpt2", "dora[targets=attn.q]", tmp_path)
    with pytest.raises(
        AdapterError, match="the lengths of blocks.0.attn.k, which has no adapter, are those of another base"
    ):
        effzoo.load_adapter(fresh(MODELS["gpt2"]()), tmp_path)


def test_broken_or_pickled_files_are_refused(tmp_path):
    base, _ = saved("bert", "lora", tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-9])
    with pytest.raises(AdapterError, match="no whole safetensors file"):
        effzoo.load_adapter(fresh(base), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="adapter_model.bin is a pickle, which effzoo does not open"):
        effzoo.load_adapter(fresh(base), tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(AdapterError, match="no peft_type"):
        effzoo.load_adapter(fresh(base), tmp_path)


def test_a_folder_holds_one_adapter_in_one_format(tmp_path):
    base, ours = saved("bert", "lora", tmp_path / "a")
    with pytest.raises(
        AdapterError, match="in the format of peft .adapter_config.json.; give this one a directory of its own"
    ):
        effzoo.save_adapter(ours, tmp_path / "a")
    effzoo.save_adapter(ours, tmp_path / "b")
    assert (
        sorted(path.suffix for path in (tmp_path / "b").iterdir()) == [".json", ".safetensors"]
        and (tmp_path / "b" / "adapter.json").is_file()
    )
    with pytest.raises(AdapterError, match="in the format of effzoo"):
        effzoo.save_adapter(ours, tmp_path / "b", format="peft")
    shutil.copy(tmp_path / "a" / CONFIG, tmp_path / "b")
    with pytest.raises(AdapterError, match="holds two adapters"):
        effzoo.load_adapter(fresh(base), tmp_path / "b")
    with pytest.raises(UnknownNameError, match="unknown adapter format 'pefd'; did you mean 'peft'"):
        effzoo.save_adapter(ours, tmp_path / "c", format="pefd")


def test_models_without_a_twin_are_refused(tmp_path):
    perceiver = effzoo.attach(effzoo.build("perceiver", task="classification", num_labels=2), "lora")
    with pytest.raises(AdapterError, match="not for Perceiver"):
        effzoo.save_adapter(perceiver, tmp_path / "a", format="peft")
    sizes = {"dim": 16, "heads": 2, "layers": 2, "mlp": 20, "vocab": 30, "max_length": 32}
    model = effzoo.build("bert", attention="linformer[k=8]", peft="lora", task="classification", num_labels=2, **sizes)
    with pytest.raises(effzoo.EffzooError, match="no counterpart in transformers"):
        effzoo.save_adapter(model, tmp_path / "b", format="peft")


@pytest.mark.slow
def test_importing_effzoo_imports_neither_library(tmp_path):
    code = "import sys, effzoo; print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("spec", ["p_tuning[length=3]", "ipt[length=3]", "prefix[length=2, form=mlp]"])
def test_rows_that_a_network_still_makes_are_written_as_they_are(spec, tmp_path):
    base = MODELS["gpt2"]()
    ours, batch = attached(base, spec), inputs("gpt2")
    effzoo.save_adapter(ours, tmp_path, format="peft")
    again = effzoo.load_adapter(fresh(base), tmp_path)
    assert_close(logits(again, batch), logits(ours, batch))
    loaded_by_peft(base, tmp_path)


def test_peft_leaves_learned_positions_behind_a_prefix_and_a_warning_says_so(tmp_path, caplog):
    base, ours = saved("gpt2", "prefix[length=4]", tmp_path)
    assert "give position_ids that begin there" in caplog.text
    batch = inputs("gpt2")
    assert (logits(loaded_by_peft(base, tmp_path), batch) - logits(ours, batch)).abs().max() > 1e-3


def test_one_of_several_adapters_is_saved_and_loaded_beside_others(tmp_path):
    base, batch = MODELS["bert"](), inputs("bert")
    ours = attached(base, "lora")
    expected = logits(ours, batch)
    effzoo.attach(ours, "houlsby", name="other")
    effzoo.save_adapter(ours, tmp_path, name="default", format="peft")
    assert_close(logits(loaded_by_peft(base, tmp_path), batch), expected)
    effzoo.load_adapter(ours, tmp_path, name="third")
    effzoo.activate(ours, "third")
    assert_close(logits(ours, batch), expected)


def bare_bert():
    return of_bert(transformers.BertModel)


def led():
    return drawn(
        transformers.LEDModel(
            transformers.LEDConfig(
                vocab_size=VOCAB, d_model=DIM, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=MLP,
                decoder_layers=1,
                decoder_attention_heads=2, decoder_ffn_dim=MLP, max_encoder_position_embeddings=24, attention_window=4,
            )
        )
    ).encoder  # fmt: skip


def reformer():
    return drawn(
        transformers.ReformerModel(
            transformers.ReformerConfig(
                vocab_size=VOCAB, hidden_size=DIM, attention_head_size=6, num_attention_heads=2, feed_forward_size=MLP,
                attn_layers=["local", "lsh"],
                axial_pos_embds=False, max_position_embeddings=32, local_attn_chunk_length=4, lsh_attn_chunk_length=4,
                num_buckets=2, num_hashes=1,
                is_decoder=False, hash_seed=1, lsh_attention_probs_dropout_prob=0.0,
                local_attention_probs_dropout_prob=0.0,
            )
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, spec",
    [
        (bare_bert, "lora[rank=2, targets=(attn.q, mlp.up, pooler)]"),
        (bare_bert, "ia3"),
        (led, "lora[rank=2, targets=(attn.q*, attn.o)]|bitfit[group=strong]"),
        (reformer, "lora[rank=2, targets=(attn.v, attn.o, mlp.up)]"),
    ],
    ids=["bert-lora", "bert-ia3", "led-lora", "reformer-lora"],
)
def test_bodies_without_a_task_take_adapters_too(make, spec, tmp_path):
    base = make()
    ids = torch.randint(5, VOCAB, (2, 8))
    ours = attached(base, spec)
    effzoo.save_adapter(ours, tmp_path, format="peft")
    with torch.no_grad():
        expected = ours(ids).last_hidden_state
        assert_close(
            loaded_by_peft(base, tmp_path)(input_ids=ids).last_hidden_state,
            expected,
            EXACT if make is bare_bert else SINGLE,
        )
        assert_close(effzoo.load_adapter(fresh(base), tmp_path)(ids).last_hidden_state, expected)


def test_transformers_reads_the_last_position_behind_a_prompt_and_a_warning_says_so(tmp_path, caplog):
    base, ours = saved("gpt2-cls", "prompt[length=2]", tmp_path)
    assert "reads the last position, padding or not" in caplog.text
    batch = inputs("gpt2")  # the first row is whole, the others are padded
    apart = (logits(loaded_by_peft(base, tmp_path), batch) - logits(ours, batch)).abs().amax(dim=1)
    assert apart[0] < EXACT and apart[1:].min() > 1e-3


@pytest.mark.parametrize("spec", ["lora[rank=8, alpha=8]", "krona[scale=1.0]"])
def test_what_a_config_leaves_out_stands_at_the_defaults_of_peft(spec, tmp_path):
    base, ours = saved("bert", spec, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    kept = ("peft_type", "target_modules", "task_type", "modules_to_save")
    edited(tmp_path)  # the hash says that all of the config is there
    (tmp_path / CONFIG).write_text(json.dumps({key: config[key] for key in kept}))
    batch = inputs("bert")
    assert_close(logits(loaded_by_peft(base, tmp_path), batch), logits(ours, batch))
    assert_close(logits(effzoo.load_adapter(fresh(base), tmp_path), batch), logits(ours, batch))


def test_a_module_of_which_a_parameter_is_missing_is_refused_and_nothing_stays_attached(tmp_path):
    base, _ = saved("bert", "lora|norms", tmp_path)
    edited(
        tmp_path,
        lambda stored: stored.pop("base_model.model.bert.encoder.layer.1.output.LayerNorm.bias"),
        modules_to_save=None,
    )
    model = fresh(base)
    keys = set(model.state_dict())
    with pytest.raises(AdapterError, match="blocks.1.mlp_norm: own_bias of norms is missing in the file"):
        effzoo.load_adapter(model, tmp_path)
    assert not effzoo.attached(model) and set(model.state_dict()) == keys
