"""Every field of every config class of peft that effzoo reads is understood, or refused when it asks for something;
none is ignored."""

import copy
import dataclasses
import json
import random
import shutil
import typing
import warnings

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import effzoo
from effzoo import convert
from effzoo.convert.peft_files.counterparts import COUNTERPARTS
from effzoo.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"vocab_size": 41, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
NONE = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **NONE, num_key_value_heads=1, tie_word_embeddings=True)
    )


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, max_position_embeddings=24))


SAMPLES = {
    "LORA": (llama, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])),
    "IA3": (bert, peft.IA3Config(target_modules=["key", "intermediate.dense"], feedforward_modules=[])),
    "LOKR": (bert, peft.LoKrConfig(r=16, target_modules=["query"])),
    "LOHA": (bert, peft.LoHaConfig(r=2, alpha=6, target_modules=["query"])),
    "VERA": (bert, peft.VeraConfig(r=3, save_projection=False, target_modules=["query"])),
    "FOURIERFT": (bert, peft.FourierFTConfig(n_frequency=9, scaling=20.0, target_modules=["query"])),
    "OFT": (bert, peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["query"])),
    "HRA": (bert, peft.HRAConfig(r=4, target_modules=["query"])),
    "MISS": (bert, peft.MissConfig(r=3, target_modules=["query"])),
    "BOFT": (bert, peft.BOFTConfig(boft_block_size=4, target_modules=["query"])),
    "VBLORA": (bert, peft.VBLoRAConfig(r=3, num_vectors=5, vector_length=4, target_modules=["query"])),
    "ADALORA": (bert, peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["query"])),
    "PROMPT_TUNING": (llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "P_TUNING": (llama, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=4)),
    "PREFIX_TUNING": (llama, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "ADAPTION_PROMPT": (llama, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)),
    "TRAINABLE_TOKENS": (llama, peft.TrainableTokensConfig(token_indices=[3, 9])),
    "LN_TUNING": (bert, peft.LNTuningConfig(target_modules=["LayerNorm"])),
}
START = "how it begins: the file holds what came of it"
HARMLESS = {  # fields that may have any value in a file, and why
    "*": {
        "task_type": "names the model", "auto_mapping": "names the model", "peft_version": "names a program",
        "base_model_name_or_path": "a label",
        "revision": "a label", "inference_mode": "about training on", "init_weights": START, "init_ia3_weights": START,
        "rank_dropout": "in training only, and a warning says so",
        "module_dropout": "in training only, and a warning says so",
        "rank_dropout_scale": "in training only, and a warning says so",
    },
    "LORA": {
        "fan_in_fan_out": "how the base is stored", "megatron_core": "means nothing without megatron_config",
        "eva_config": START, "loftq_config": START,
        "qalora_group_size": "means nothing without use_qalora", "bias": "this model has none",
        "layers_pattern": "means nothing without layers_to_transform",
    },
    "IA3": {"fan_in_fan_out": "how the base is stored"},
    "LOKR": {
        "decompose_both": "the tensors have the shapes", "decompose_factor": "the tensors have the shapes",
        "use_effective_conv2d": "for convolutions",
        "layers_pattern": "means nothing without layers_to_transform",
    },
    "LOHA": {"use_effective_conv2d": "for convolutions", "layers_pattern": "means nothing without layers_to_transform"},
    "VERA": {
        "fan_in_fan_out": "how the base is stored", "d_initial": START, "vera_dropout": "in training only",
        "layers_pattern": "means nothing without layers_to_transform",
    },
    "FOURIERFT": {
        "fan_in_fan_out": "how the base is stored", "layers_pattern": "means nothing without layers_to_transform",
    },
    "OFT": {
        "fan_in_fan_out": "how the base is stored", "eps": "means nothing without coft",
        "num_cayley_neumann_terms": "means nothing without use_cayley_neumann",
        "layers_pattern": "means nothing without layers_to_transform",
    },
    "HRA": {"layers_pattern": "means nothing without layers_to_transform"},
    "MISS": {
        "mini_r": "means nothing without init_weights='mini'", "miss_dropout": "in training only",
        "layers_pattern": "means nothing without layers_to_transform",
    },
    "BOFT": {
        "fan_in_fan_out": "how the base is stored", "boft_dropout": "in training only",
        "layers_pattern": "means nothing without layers_to_transform",
    },
    "VBLORA": {
        "fan_in_fan_out": "how the base is stored", "vblora_dropout": "in training only", "init_logits_std": START,
        "init_vector_bank_bound": START, "layers_pattern": "means nothing without layers_to_transform",
    },
    "ADALORA": {
        "fan_in_fan_out": "how the base is stored", "lora_dropout": "in training only",
        "r": "which peft does not read of it", "layers_pattern": "means nothing without layers_to_transform",
        **dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"), "in training only"),
        **dict.fromkeys(("orth_reg_weight", "total_step"), "in training only"),
        "megatron_core": "means nothing without megatron_config",
        "qalora_group_size": "means nothing without use_qalora",
    },
    "PROMPT_TUNING": {"prompt_tuning_init": START, "prompt_tuning_init_text": START, "tokenizer_name_or_path": START,
    "tokenizer_kwargs": START}, "P_TUNING": {
        "encoder_reparameterization_type": "of a network that is dropped",
        "encoder_hidden_size": "of a network that is dropped",
        "encoder_num_layers": "of a network that is dropped", "encoder_dropout": "of a network that is dropped",
    },
    "PREFIX_TUNING": {"encoder_hidden_size": "of a network that is dropped",
    "prefix_projection": "the file holds what it makes"},
}  # fmt: skip
FIELDS = [(kind, field.name) for kind in SAMPLES for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])]
OTHERS = {
    "target_modules": ["v_proj"], "modules_to_save": ["k_proj", "value"], "rank_pattern": {"q_proj": 3, "query": 3},
    "alpha_pattern": {".*": 3},
    "layers_to_transform": [0], "exclude_modules": ["q_proj", "query", "key", "LayerNorm"],
    "trainable_token_indices": [3], "token_indices": [3, 10],
    "bias": "all", "feedforward_modules": ["dense"], "init_lora_weights": "pissa", "peft_type": "POLY",
    "layers_pattern": "layers", "alora_invocation_tokens": [3],
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """{kind: (a base, the files of an adapter of peft)}."""
    found = {}
    for kind, (make, config) in SAMPLES.items():
        torch.manual_seed(0)
        base, folder = make().eval(), tmp_path_factory.mktemp(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
            theirs.save_pretrained(folder)
        found[kind] = base, folder
    return found


def copied(folder, place, change):
    """The files with another config."""
    shutil.copytree(folder, place, dirs_exist_ok=True)
    (place / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
    return place


def computed(base, folder):
    """What the adapter computes, and its spec."""
    model = effzoo.load_adapter(convert.from_transformers(base), folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits, effzoo.attached(model)["default"].spec


def other(kind, name):
    """A value of the field that is not the one in the sample, of the field's type."""
    if name in OTHERS:
        return OTHERS[name]
    said = typing.get_type_hints(PEFT_TYPE_TO_CONFIG_MAPPING[kind])[name]
    kinds = [said, *typing.get_args(said)]
    given = getattr(SAMPLES[kind][1], name)
    if bool in kinds:
        return not given
    if int in kinds:
        return 7
    if float in kinds:
        return 0.25
    if str in kinds:
        return "other"
    return {"other": 7} if dict in kinds or not any(typing.get_origin(one) is list for one in kinds) else [7]


def test_every_kind_that_is_read_has_a_sample():
    assert {kind for one in COUNTERPARTS for kind in one.peft_types} == {*SAMPLES}


@pytest.mark.cover("kind")
@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind}-{name}" for kind, name in FIELDS])
def test_a_field_is_understood_or_refused(kind, name, samples, tmp_path):
    base, folder = samples[kind]
    expected, spec = computed(base, folder)
    harmless = HARMLESS.get(kind, {}).get(name) or HARMLESS["*"].get(name)
    try:
        found, said = computed(base, copied(folder, tmp_path, {name: other(kind, name)}))
    except AdapterError:
        assert not harmless, f"{name} is refused, and would be harmless: {harmless}"
        return
    assert harmless or said != spec or not torch.equal(found, expected), (
        f"{kind} with {name}={other(kind, name)!r} is ignored"
    )
    assert not harmless or torch.equal(found, expected)


WRONG = [5, -1, 0.5, True, "x", [], ["x"], [[1]], {"a": "b"}, {"a": [1]}, "(", 10**30, [True], None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLES)
def test_a_value_of_another_type_is_refused_with_a_sentence_or_read(kind, samples, tmp_path):
    base, folder = samples[kind]
    model = convert.from_transformers(base)
    keys = {*model.state_dict()}
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind]):
        for number, value in enumerate(WRONG if field.name not in {**HARMLESS["*"], **HARMLESS.get(kind, {})} else ()):
            place = copied(folder, tmp_path / f"{field.name}{number}", {field.name: value})
            try:
                effzoo.load_adapter(model, place)
            except effzoo.EffzooError as refusal:
                assert "cannot be read (" not in str(refusal), (field.name, value, refusal)
            else:
                effzoo.detach(model, "default")
            assert {*model.state_dict()} == keys and not effzoo.attached(model)


def test_a_table_of_tokens_that_the_model_has_not_is_named(samples, tmp_path):
    base, folder = samples["LORA"]
    place = copied(folder, tmp_path / "other", {"trainable_token_indices": {"a": [1]}})
    with pytest.raises(AdapterError, match="names 'a'; this model's tables are"):
        effzoo.load_adapter(convert.from_transformers(base), place)


@pytest.mark.parametrize("kind", SAMPLES)
def test_tensors_of_other_shapes_are_refused_with_a_sentence(kind, samples, tmp_path):
    base, folder = samples[kind]
    model, draw = convert.from_transformers(base), random.Random(kind)
    stored = load_file(folder / WEIGHTS)
    changes = [
        lambda x: x.flatten(), lambda x: x[..., None], lambda x: x.sum(), lambda x: x[:0], lambda x: torch.cat([x, x]),
        lambda x: x[..., :-1],
        lambda x: x.transpose(0, -1).contiguous()[..., :1], lambda x: x.long(), lambda x: x * float("nan"),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        key = draw.choice(sorted(stored))
        if change(stored[key]).shape == stored[key].shape and torch.equal(change(stored[key]), stored[key]):
            continue  # a vector is flat
        place = copied(folder, tmp_path / str(number), {})
        save_file(stored | {key: change(stored[key]).clone()}, place / WEIGHTS)
        with pytest.raises(AdapterError) as refusal:
            effzoo.load_adapter(model, place)
        assert "cannot be read (" not in str(refusal.value), (key, refusal.value)
        assert not effzoo.attached(model)


@pytest.mark.parametrize(("kind", "name", "value"), [
    ("PROMPT_TUNING", "num_layers", 3), ("PROMPT_TUNING", "token_dim", 24), ("P_TUNING", "num_attention_heads", 4),
    ("PREFIX_TUNING", "num_attention_heads", 4), ("PREFIX_TUNING", "num_layers", 1),
])  # fmt: skip
def test_sizes_of_another_base_are_named(kind, name, value, samples, tmp_path):
    base, folder = samples[kind]
    with pytest.raises(AdapterError, match=f"{name} is {value} in the config of the file and .* another base"):
        computed(base, copied(folder, tmp_path, {name: value}))


def test_a_file_for_another_base_is_refused_with_the_first_mismatch(samples, tmp_path):
    base, folder = samples["LORA"]
    wide = llama()
    wide.resize_token_embeddings(50)
    with pytest.raises(
        AdapterError, match=r"embed_tokens.weight: .* another base.* shape \(41, 12\), this model's \(50, 12\)$"
    ):
        computed(wide, folder)
    small = copy.deepcopy(base)
    with torch.no_grad():
        small.model.embed_tokens.weight[5] += 1
    with pytest.raises(AdapterError, match=r"embed_tokens.weight: .* another base.* it has other values"):
        computed(small, folder)


def test_the_table_of_a_resized_base_brings_its_new_rows(tmp_path):
    """peft saves the whole table when the vocabulary was resized; what differs from the base is what new tokens
    have."""
    torch.manual_seed(0)
    base = llama().eval()
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(45)
    theirs = peft.get_peft_model(larger, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.nn.init.normal_(theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = convert.from_transformers(base)
    with pytest.raises(
        AdapterError,
        match=r"has 45 tokens in the file, this model has 41; call effzoo.resize_vocabulary\(model, 45\) first",
    ):
        effzoo.load_adapter(ours, tmp_path)
    effzoo.load_adapter(effzoo.resize_vocabulary(ours, 45, init="normal"), tmp_path)
    assert "|tokens[ids=41-44" in effzoo.attached(ours)["default"].spec
    x = torch.arange(33, 45)[None]
    assert torch.allclose(ours.eval()(x).logits, theirs.eval()(x).logits, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_what_peft_trains_apart_is_refused_on_a_tied_head_and_read_on_one_of_its_own(saved, tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    )
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="tied=False"):
        effzoo.load_adapter(convert.from_transformers(base), tmp_path)
    ours = convert.from_transformers(base, tied=False)
    x = torch.arange(3, 15)[None]
    assert torch.equal(ours.eval()(x).logits, convert.from_transformers(base)(x).logits)
    assert torch.allclose(effzoo.load_adapter(ours, tmp_path)(x).logits, theirs.eval()(x).logits, atol=1e-5)
