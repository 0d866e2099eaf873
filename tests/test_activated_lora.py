"""LoRA with an invocation acts from its first token on, as in peft; what stands before is computed by the base."""

import copy
import json

import peft
import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.attention import Cache
from effzoo.errors import AdapterError, EffzooError, IncompatibleError, IncompatiblePeft, InputError, OptionError
from effzoo.peft.parameter.lora_activated import ActivatedLowRank, invoked

EXACT = {"rtol": 0, "atol": 1e-10}
CALL = (7, 9)
SPEC = "lora[rank=3, alpha=5, invocation=(7, 9), targets=(attn.q, attn.k, attn.v)]"
ROWS = torch.tensor(  # once; twice, the last of which counts; not at all; at the end; in front, and its beginning again
    [
        [11, 12, 7, 9, 13, 14, 15, 16, 17],
        [7, 9, 12, 13, 7, 7, 9, 16, 17],
        [9, 7, 13, 14, 9, 15, 16, 17, 7],
        [11, 12, 13, 14, 15, 16, 17, 7, 9],
        [7, 9, 11, 13, 14, 15, 16, 17, 7],
    ]
)
STARTS = (2, 5, 9, 7, 0)


def drawn(model, deviation=0.4):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((deviation * torch.randn(parameter.shape)).float())  # of which a file holds every digit
    return model


def base():
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=23, n_embd=12, n_layer=2, n_head=2, n_inner=20, n_positions=24, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return drawn(transformers.GPT2LMHeadModel(config)).double().eval()


def ours(spec=SPEC, theirs=None, **more):
    model = effzoo.attach(convert.from_transformers(base() if theirs is None else theirs), spec, **more)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((0.4 * torch.randn(parameter.shape)).float())
    return model.eval()


def modules(model):
    return [module for module in model.modules() if isinstance(module, ActivatedLowRank)]


def gradients(model, parameters, ids, **given):
    out = model(ids, **given).logits
    torch.manual_seed(7)
    return out, torch.autograd.grad((out * torch.randn_like(out)).sum(), parameters)


@pytest.mark.parametrize("tokens", [(7,), (7, 9), (7, 7, 9), (16, 17, 7)])
def test_the_last_invocation_of_a_row_is_found_as_in_peft(tokens):
    from peft.tuners.lora.variants import calculate_alora_offsets

    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=list(tokens))
    offsets = calculate_alora_offsets({"default": config}, "default", ROWS)
    expected = torch.stack([torch.arange(9) >= 9 - (offset or 0) for offset in offsets])
    assert torch.equal(invoked(ROWS, None, tokens), expected) and expected.any() and not expected.all()


def test_files_of_either_side_give_the_same_logits_and_gradients_in_the_other(tmp_path):
    theirs = base()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
        alora_invocation_tokens=list(CALL), init_lora_weights=False,
    )  # fmt: skip
    of_peft = peft.get_peft_model(copy.deepcopy(theirs), config).double()
    with torch.no_grad():
        for parameter in of_peft.parameters():
            if parameter.requires_grad:
                parameter.copy_((0.4 * torch.randn(parameter.shape)).float())
    of_peft.eval().save_pretrained(tmp_path / "theirs")
    model = effzoo.load_adapter(convert.from_transformers(theirs), tmp_path / "theirs").eval()
    assert {module.invocation for module in modules(model)} == {CALL}
    with torch.no_grad():
        assert torch.allclose(model(ROWS).logits, of_peft(input_ids=ROWS).logits, **EXACT)

    model = ours(theirs=theirs)
    effzoo.save_adapter(model, tmp_path / "ours", format="peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["alora_invocation_tokens"] == [7, 9]
    of_peft = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours", is_trainable=True)
    of_peft = of_peft.double().eval()
    parts = [[block.attn.q, block.attn.k, block.attn.v] for block in model.blocks]
    mine = [site.of("default")["lora"] for sites in parts for site in sites]
    one, by_us = gradients(model, [p for module in mine for p in (module.A, module.B)], ROWS)
    layers = [block.attn.c_attn for block in of_peft.base_model.model.transformer.h]
    weights = [factor["default"].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    other, by_peft = gradients(of_peft, weights, ROWS)
    assert torch.allclose(one, other, **EXACT)
    for layer in range(2):  # A = [A_q; A_k; A_v] and B = diag(B_q, B_k, B_v)
        of_layer, (A, B) = by_us[6 * layer : 6 * layer + 6], by_peft[2 * layer : 2 * layer + 2]
        assert torch.allclose(torch.cat(of_layer[::2]), A, **EXACT)
        for part in range(3):
            block = B[12 * part : 12 * part + 12, 3 * part : 3 * part + 3]
            assert torch.allclose(of_layer[2 * part + 1], block, **EXACT) and block.abs().max() > 1e-3
    again = effzoo.load_adapter(convert.from_transformers(theirs), tmp_path / "ours").eval()
    assert torch.equal(again(ROWS).logits, one)


def test_keys_and_values_before_the_invocation_are_those_of_the_base_bit_by_bit():
    model, cache, of_base = ours(), Cache(), Cache()
    model(ROWS, cache=cache)
    with effzoo.disabled(model):
        model(ROWS, cache=of_base)
    for layer, state in of_base.states.items():
        of_keys = {name: tensor for name, tensor in state.items() if tensor.ndim == 4}
        assert len(of_keys) == 2
        for name, tensor in of_keys.items():
            for row, start in enumerate(STARTS):
                mine, base = cache.states[layer][name][row], tensor[row]
                assert torch.equal(mine[:, :start], base[:, :start])
                assert start == 9 or (mine[:, start:] - base[:, start:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_from_a_cache_of_the_base_equals_the_whole_pass(padded):
    """The text before the invocation is computed with the adapter off; then the invocation and what follows with it."""
    model = ours()
    ids = torch.tensor([[11, 12, 13, 14, 7, 9, 15, 16], [17, 18, 11, 12, 7, 9, 13, 14]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0 if padded else 1
    whole = model(ids, attention_mask=mask).logits
    cache, parts = Cache(), []
    with effzoo.disabled(model):
        parts.append(model(ids[:, :4], attention_mask=mask[:, :4], cache=cache).logits)
    for start, end in ((4, 6), (6, 7), (7, 8)):
        parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits)
    at = mask.bool()
    assert torch.allclose(torch.cat(parts, dim=1)[at], whole[at], **EXACT)
    assert torch.equal(
        effzoo.generate(model, ids, max_new_tokens=5), effzoo.generate(model, ids, max_new_tokens=5, use_cache=False)
    )


@pytest.mark.parametrize("order", [[1, 2, 0], [0, 0, 2], [1]])
def test_rows_of_a_cache_that_are_reordered_keep_their_invocation(order):
    """As in beam search, where the invocation of each row is elsewhere, or nowhere, and stands in the cache."""
    model, rows, cache = ours(), ROWS[:3], Cache()
    model(rows[:, :8], cache=cache)
    cache.reorder(torch.tensor(order))
    assert torch.allclose(model(rows[order][:, 8:], cache=cache).logits, model(rows[order]).logits[:, 8:], **EXACT)


def test_rows_padding_documents_and_prompts():
    """A row stands for itself: beside padding, packed with others, behind prompt tokens, with adapters by row."""
    model = ours()
    alone = [model(row[None]).logits[0] for row in ROWS]
    filled, mask = torch.cat([torch.full((5, 2), 7), ROWS, torch.full((5, 2), 9)], dim=1), torch.ones(5, 13)
    mask[:, :2] = mask[:, 11:] = 0
    places = torch.cat([torch.zeros(2), torch.arange(9), torch.zeros(2)]).long().expand(5, -1)
    padded = model(filled, attention_mask=mask, position_ids=places).logits[:, 2:11]
    assert torch.allclose(padded, torch.stack(alone), **EXACT)
    packed = model(ROWS[:2].reshape(1, 18), document_ids=torch.tensor([[1] * 9 + [2] * 9])).logits[0]
    assert torch.allclose(packed, torch.cat(alone[:2]), **EXACT)
    effzoo.activate(model, rows=["default", None, "default", None, None])
    assert torch.allclose(model(ROWS).logits[0], alone[0], **EXACT)
    with effzoo.disabled(model):
        bare = model(ROWS).logits
    assert torch.equal(model(ROWS).logits[1], bare[1]) and not torch.allclose(bare[0], alone[0], atol=1e-3)
    with_prompt = ours(f"{SPEC}|prompt[length=2]")
    cache = Cache()
    steps = [with_prompt(ROWS[:, :7], cache=cache).logits, with_prompt(ROWS[:, 7:], cache=cache).logits]
    once = [0, 1, 4]  # the invocation is whole in the first call, or nowhere
    assert torch.allclose(torch.cat(steps, dim=1)[once], with_prompt(ROWS).logits[once], **EXACT)


def test_what_has_no_meaning_is_refused(tmp_path):
    model = ours()
    with pytest.raises(AdapterError, match=r"acts from the invocation on, W \+ s B A there and W before it"):
        effzoo.merge(model)
    with pytest.raises(IncompatibleError, match="an active adapter lets them change it"):
        effzoo.generate(model, ROWS[:1], max_new_tokens=3, prompt_lookup_num_tokens=3)
    with pytest.raises(IncompatiblePeft, match="they are given some tokens, not the text"):
        sizes = {"layers": 1, "dim": 8, "heads": 2, "mlp": 8, "vocab": 23}
        effzoo.attach(effzoo.build("gpt2", **sizes, experts=2), "lora[invocation=3, targets=mlp.up]")
    with pytest.raises(InputError, match="give input_ids"):
        model(inputs_embeds=torch.randn(2, 5, 12, dtype=torch.float64))
    for spec, message in {
        "lora[invocation=()]": "invocation is empty",
        "lora[invocation=23]": r"\[0, 23\), got 23",
        "lora[invocation=3, init=pissa]": "init='pissa' starts from all tokens",
        "lora[invocation=3, targets=(attn.q, lm.out)]": "'lm.out' is none",
        "lora[invocation=3, targets=embed.token]": "'embed.token' is none",
    }.items():
        with pytest.raises(OptionError, match=message):
            ours(spec)
    with pytest.raises(IncompatiblePeft, match="a model that is no decoder"):
        effzoo.attach(effzoo.build("minilm", layers=1, dim=8, heads=2, mlp=8, vocab=23), "lora[invocation=3]")
    both = ours("lora[invocation=3, targets=attn.q]|lora[targets=attn.k]")
    with pytest.raises(AdapterError, match="one alora_invocation_tokens for a whole adapter"):
        effzoo.save_adapter(both, tmp_path / "both", format="peft")
    effzoo.save_adapter(model, tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for value in ([-1], ["a"], 7, [40]):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": value}))
        with pytest.raises(EffzooError):
            effzoo.load_adapter(convert.from_transformers(base()), tmp_path)
