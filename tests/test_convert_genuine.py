"""A model of transformers that computes something else than its class and its configuration say is refused, with the
place and what to do."""

import functools
import logging
import types

import pytest
import torch
import transformers
from torch import nn

from effzoo import convert
from effzoo.errors import ConversionError

LLAMA = {
    "vocab_size": 41, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BERT = {
    "vocab_size": 41,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
}
PERCEIVER = {"vocab_size": 41, "d_latents": 16, "d_model": 24, "num_latents": 6, "num_self_attends_per_block": 2,
             "num_self_attention_heads": 2,
             "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16,
             "max_position_embeddings": 32}  # fmt: skip


def llama(cls=transformers.LlamaModel, **more):
    return cls(transformers.LlamaConfig(**LLAMA | more)).eval()


def bert(cls=transformers.BertModel, **more):
    return cls(transformers.BertConfig(**BERT | more)).eval()


def perceiver():
    return transformers.PerceiverForMaskedLM(transformers.PerceiverConfig(**PERCEIVER)).eval()


class LlamaBiModel(transformers.LlamaModel):
    """As llm2vec has one."""

    def forward(self, input_ids=None, attention_mask=None, **more):
        n = input_ids.shape[1]
        return super().forward(input_ids, attention_mask=torch.zeros(len(input_ids), 1, n, n), **more)


class Quiet(transformers.BertForMaskedLM):
    pass


class Other(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return x


def doubled(module, inputs, output):
    return 2 * output


def louder(module, inputs):
    return (inputs[0] * 2,)


def replace(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return change


def attribute(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def method(model):
    inner = model.layers[0].mlp
    inner.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, inner)


def wrapped(model):
    inner = model.encoder.layer[1].output
    inner.forward = functools.partial(doubled_output, inner)


def doubled_output(module, hidden_states, input_tensor):
    return 2 * type(module).forward(module, hidden_states, input_tensor)


def hidden_method(model):
    model.embeddings.create_position_ids = model.embeddings.position_ids
    model.get_input_embeddings = lambda: None


class Doubling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, kinds, given=(), named=None):
        out = super().__torch_function__(function, kinds, given, named or {})
        return 2 * out if function is nn.functional.linear else out


def held_as(change):
    return lambda model: setattr(
        model.pooler.dense, "weight", nn.Parameter(change(model.pooler.dense.weight.data), requires_grad=False)
    )


CHANGES = {
    "another module": (llama, replace("layers.0.mlp", Other),
    r"layers\.0\.mlp is a Other of test_convert_genuine, and what that computes"),
    "a subclass of a layer": (bert, replace("embeddings.LayerNorm", lambda _: OtherNorm(8)),
    r"embeddings\.LayerNorm is a OtherNorm"), "another class with the same tensors": (
        llama, replace("norm", lambda _: nn.RMSNorm(8)),
        r"norm is a RMSNorm where its configuration makes a LlamaRMSNorm"),
    "another activation": (llama, replace("layers.1.mlp.act_fn", lambda _: nn.ReLU()),
    r"layers\.1\.mlp\.act_fn is a ReLU where .* makes a SiLU"),
    "another eps": (llama, attribute("layers.1.input_layernorm", "variance_epsilon", 0.1),
    r"has variance_epsilon=0\.1 where its"),
    "another scale": (llama, attribute("layers.0.self_attn", "scaling", 1.0), r"layers\.0\.self_attn has scaling=1\.0"),
    "one layer sees ahead": (llama, attribute("layers.0.self_attn", "is_causal", False),
    r"has is_causal=False where its configuration makes True"), "a configuration that was changed": (
        llama, attribute("", "config", transformers.LlamaConfig(**LLAMA | {"rms_norm_eps": 0.1})),
        "a configuration of its own"),
    "a field that was changed": (bert, lambda model: setattr(model.config, "hidden_act", "relu"), "intermediate"),
    "an extra tensor": (
        functools.partial(llama, transformers.LlamaForCausalLM), replace("lm_head", lambda _: nn.Linear(8, 41)),
        "lm_head has a tensor bias where"),
    "other positions": (bert, lambda model: model.embeddings.position_ids.copy_(torch.arange(31, -1, -1)),
    r"position_ids was changed"),
    "other segments": (bert, lambda model: model.embeddings.token_type_ids.fill_(1), r"token_type_ids was changed"),
    "an extra module": (bert, lambda model: model.encoder.layer[0].add_module("extra", nn.Dropout(0.1)),
    "makes no such module"),
    "a hook": (llama, lambda model: model.layers[1].register_forward_hook(doubled),
    r"layers\.1 has the forward hook doubled, .* remove it"),
    "a hook before": (bert, lambda model: model.encoder.register_forward_pre_hook(louder),
    "encoder has the forward hook louder"),
    "a hook on a perceiver": (perceiver, lambda model: model.perceiver.encoder.register_forward_hook(doubled),
    "forward hook doubled"), "a hook on gradients": (
        llama, lambda model: model.layers[1].mlp.register_full_backward_hook(print),
        r"layers\.1\.mlp has the hook print on its .* remove"),
    "a hook before gradients": (bert, lambda model: model.pooler.register_full_backward_pre_hook(print),
    "pooler has the hook .* on its gradients"),
    "a hook on a tensor": (llama, lambda model: model.norm.weight.register_hook(print),
    r"norm\.weight has the hook print on its gradients"), "a hook after accumulation": (
        perceiver, lambda model: model.perceiver.embeddings.latents.register_post_accumulate_grad_hook(print),
        r"latents has the hook print on its"),
    "a lost bias": (bert, attribute("encoder.layer.0.attention.self.query", "bias", None),
    r"self\.query has no tensor bias where"), "a quantised tensor": (
        llama, lambda model: setattr(model.norm, "weight", nn.Parameter(model.norm.weight.data.as_subclass(Doubling))),
        r"norm\.weight is a Doubling of test_convert_genuine, a tensor that may compute in its own way"),
    "a tensor in float8": (bert, held_as(lambda data: data.to(torch.float8_e4m3fn)),
    r"dense\.weight has the dtype torch\.float8_e4m3fn"),
    "a tensor in int8": (bert, held_as(lambda data: data.to(torch.int8)),
    r"pooler\.dense\.weight has the dtype torch\.int8"),
    "a complex tensor": (bert, held_as(lambda data: data.to(torch.complex64)),
    r"pooler\.dense\.weight has the dtype torch\.complex64"),
    "a sparse tensor": (bert, held_as(lambda data: data.to_sparse()),
    r"pooler\.dense\.weight has the dtype torch\.float32 \(torch\.sparse_coo\)"),
    "one part in another mode": (bert, lambda model: model.embeddings.dropout.train(),
    r"dropout is in train mode and the model in eval"),
    "a method": (llama, method, r"layers\.0\.mlp has a method forward of its own"),
    "a partial": (bert, wrapped, r"layer\.1\.output has a method forward of its own"),
    "a method of the model": (bert, hidden_method, r"the model has a method get_input_embeddings of its own"),
    "a perceiver's part": (perceiver, replace("perceiver.encoder.self_attends.0.mlp", Other), r"mlp is a Other"),
    "a perceiver's activation": (
        perceiver, replace("perceiver.encoder.self_attends.0.mlp.intermediate_act_fn", lambda _: nn.ReLU()),
        "is a ReLU where"),
}  # fmt: skip


@pytest.mark.cover()
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_in_a_live_model_is_found(name):
    make, change, said = CHANGES[name]
    model = make()
    convert.from_transformers(model)
    change(model)
    with pytest.raises(ConversionError, match=said):
        convert.from_transformers(model)
    with pytest.raises(ConversionError, match=said):
        convert.load_pretrained(convert.from_transformers(make()), model)


@pytest.mark.parametrize(("make", "cls"), [(llama, LlamaBiModel), (bert, Quiet)])
def test_a_subclass_is_not_taken_for_its_parent(make, cls):
    with pytest.raises(
        ConversionError,
        match=rf"{cls.__name__} of test_convert_genuine is a subclass of \w+ and may compute something else",
    ):
        convert.from_transformers(make(cls))


def test_a_subclass_of_a_perceiver_and_of_a_configuration_are_refused_too():
    class Mine(transformers.PerceiverForMaskedLM):
        pass

    class MyConfig(transformers.LlamaConfig):
        pass

    with pytest.raises(ConversionError, match="Mine of .* is a subclass of PerceiverForMaskedLM"):
        convert.from_transformers(Mine(transformers.PerceiverConfig(**PERCEIVER)))
    with pytest.raises(ConversionError, match="a configuration of class MyConfig"):
        convert.from_transformers(transformers.LlamaModel(MyConfig(**LLAMA)))


def test_a_forward_that_was_put_on_a_class_is_found(monkeypatch):
    """As libraries of faster kernels do."""
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * before(self, x))
    with pytest.raises(
        ConversionError,
        match=r"layers\.0\.mlp: LlamaMLP\.forward was replaced by one of test_convert_genuine; undo that",
    ):
        convert.from_transformers(llama())


@pytest.mark.parametrize("where", ["a function of its file", "another method"])
def test_other_code_that_was_put_into_the_place_of_theirs_is_found(where, monkeypatch):
    from transformers.models.llama import modeling_llama

    def mine(*given, **more):
        raise AssertionError

    if where == "another method":
        monkeypatch.setattr(modeling_llama.LlamaModel, "get_input_embeddings", mine)
    else:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", mine)
    with pytest.raises(ConversionError, match=r"\w+ was replaced by one of test_convert_genuine; undo that"):
        convert.from_transformers(llama())


def test_a_hook_on_all_modules_is_found_before_a_model_is_taken():
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        with pytest.raises(ConversionError, match="the hook doubled is on every module of this process; remove it"):
            convert.from_transformers(llama())
    finally:
        handle.remove()
    convert.from_transformers(llama())


@pytest.mark.parametrize("make", [llama, bert, perceiver])
def test_tensors_are_read_past_hooks_on_state_dicts(make):
    """They change what is saved, not what is computed."""
    source = make()
    expected = {key: tensor.clone() for key, tensor in convert.from_transformers(source).state_dict().items()}
    source._register_state_dict_hook(
        lambda module, state, prefix, local: {key: 2 * value for key, value in state.items()}
    )
    assert all(tensor.equal(expected[key]) for key, tensor in convert.from_transformers(source).state_dict().items())


def test_attention_functions_of_ones_own_are_refused_by_name():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def mine(*given, **more):
        return sdpa_attention_forward(*given, **more)

    transformers.AttentionInterface.register("effzoo_test", mine)
    transformers.AttentionMaskInterface.register("effzoo_test", transformers.masking_utils.sdpa_mask)
    model = llama()
    model.set_attn_implementation("effzoo_test")
    with pytest.raises(
        ConversionError,
        match=r"attn_implementation='effzoo_test', a function of test_convert_genuine that "
        r".*set_attn_implementation\('sdpa'\)",
    ):
        convert.from_transformers(model)
    model.set_attn_implementation("sdpa")
    convert.from_transformers(model)


def test_adapters_of_peft_are_refused_with_what_to_do():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"])
    said = "is a .* of peft: adapters are attached; merge them"
    with pytest.raises(ConversionError, match=said):
        convert.from_transformers(peft.get_peft_model(llama(), config))
    model = llama()
    peft.inject_adapter_in_model(config, model)  # what add_adapter does
    with pytest.raises(ConversionError, match=r"layers\.0\.self_attn\.q_proj " + said):
        convert.from_transformers(model)
    learned = peft.get_peft_model(
        llama(transformers.LlamaForCausalLM), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ConversionError, match=said):
        convert.from_transformers(learned)
    merged = peft.get_peft_model(llama(), config).merge_and_unload()
    convert.from_transformers(merged)


def test_quantised_layers_are_named():
    class Linear4bit(nn.Linear):
        pass

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    model = llama()
    replace("layers.1.self_attn.k_proj", lambda old: Linear4bit(8, 4, bias=False))(model)
    with pytest.raises(
        ConversionError,
        match=r"layers\.1\.self_attn\.k_proj is a Linear4bit of bitsandbytes: its weights are quantised; .* dequantize",
    ):
        convert.from_transformers(model)


def test_weights_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ConversionError, match="is on the device meta and holds no numbers"):
        convert.from_transformers(model)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_that_compute_the_same_are_seen_through(wrap):
    model = llama()
    ids = torch.randint(1, 41, (2, 9))
    ours = convert.from_transformers(wrap(model)).eval()
    torch.testing.assert_close(ours(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_what_training_and_transformers_itself_put_on_a_model_is_no_matter(caplog):
    model = bert(transformers.BertForSequenceClassification).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(torch.randint(1, 41, (2, 9)), output_hidden_states=True, output_attentions=True)
    convert.from_transformers(model)
    assert not [record for record in caplog.records if record.name.startswith("effzoo")]


def test_a_dropout_that_was_switched_off_by_hand_is_said(caplog):
    model = bert()
    model.encoder.layer[0].output.dropout.p = 0.0
    with caplog.at_level(logging.WARNING, "effzoo.convert"):
        convert.from_transformers(model)
    assert any(
        "output.dropout.p is 0.0 and 0.1 in its configuration, which is taken (1 such places)" in message
        for message in caplog.messages
    )


@pytest.mark.parametrize("seen", ["live", "folder"])
def test_a_head_that_was_untied_by_hand_is_refused(seen, tmp_path):
    model = bert(transformers.BertForMaskedLM)
    model.cls.predictions.decoder.weight = nn.Parameter(torch.randn(41, 8))
    if seen == "folder":
        model.config.tie_word_embeddings = False
        model.save_pretrained(tmp_path)
    with pytest.raises(
        ConversionError,
        match=r"cls\.predictions\.decoder\.weight differs from bert\.embeddings\.word_embeddings\.weight",
    ):
        convert.from_transformers(tmp_path if seen == "folder" else model)


def test_tensors_that_were_tied_by_hand_are_refused():
    """Trained further, the two would move apart here."""
    model = llama(transformers.LlamaForCausalLM, tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConversionError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor"):
        convert.from_transformers(model)
    model = bert()
    model.encoder.layer[1] = model.encoder.layer[0]
    with pytest.raises(ConversionError, match="are one tensor"):
        convert.from_transformers(model)


def test_frequencies_of_rotary_positions_that_were_changed_by_hand_are_refused():
    model = llama()
    model.rotary_emb.inv_freq *= 2
    with pytest.raises(ConversionError, match=r"rotary_emb\.inv_freq .* configuration"):
        convert.from_transformers(model)


def test_converting_leaves_the_source_alone():
    model = bert()
    config, before = model.config.to_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    convert.from_transformers(model, attention="linformer[k=4]")
    assert model.config.to_dict() == config and all(
        value.equal(before[key]) for key, value in model.state_dict().items()
    )


def reformer(cls, **more):
    config = transformers.ReformerConfig(
        vocab_size=41, hidden_size=8, num_attention_heads=2, attention_head_size=4, feed_forward_size=12,
        axial_pos_shape=[4, 8],
        axial_pos_embds_dim=[2, 6], max_position_embeddings=32, lsh_attn_chunk_length=4, local_attn_chunk_length=4,
        num_buckets=4, hash_seed=0, attn_layers=["local", "lsh"], **more,
    )  # fmt: skip
    return cls(config)


@pytest.mark.parametrize("n", [50, 33])
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_reformer_whose_vocabulary_was_resized_computes_the_same_here(task, n, caplog, tmp_path):
    """Its resizing loses the bias of the head, or makes it and the decoder's one; neither is a reason to refuse it."""
    name = {"causal_lm": "ReformerModelWithLMHead", "masked_lm": "ReformerForMaskedLM"}[task]
    source = reformer(getattr(transformers, name), is_decoder=task == "causal_lm").double().eval()
    if source.lm_head.decoder.bias is not None:
        nn.init.normal_(source.lm_head.decoder.bias)
    source.resize_token_embeddings(n, mean_resizing=False)
    lost = source.lm_head.bias is None
    ids = torch.randint(1, 33, (2, 32))
    with torch.no_grad():
        expected = source(ids).logits
        sources = [source]
        if lost:  # the other version cannot save it
            source.save_pretrained(tmp_path)
            sources.append(tmp_path)
        for given in sources:
            ours = convert.from_transformers(given).eval()
            torch.testing.assert_close(ours(ids).logits, expected)
            assert len(ours.head.out.bias) == n
    assert sum("lm_head.bias is gone" in message for message in caplog.messages) == (2 if lost else 0)


def test_a_reformer_that_was_trained_is_converted():
    model = reformer(transformers.ReformerModelWithLMHead, is_decoder=True).train()
    model(torch.arange(32)[None]).logits.sum().backward()
    assert model.reformer.encoder.layers[0].attention_seed is not None
    torch.testing.assert_close(
        convert.from_transformers(model).embeddings.token.weight, model.reformer.embeddings.word_embeddings.weight
    )
