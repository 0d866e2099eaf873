"""Several documents in a row of a decoder, by position ids that start again: each is computed as it is alone, in every
kind of attention."""

import pytest
import torch
import transformers
from support import small

import effzoo
from effzoo import convert
from effzoo.errors import EffzooError, IncompatibleError, InputError

CAUSAL = [small(kind) for kind in effzoo.attention.names() if not effzoo.attention.get(kind).not_causal] + [
    "lsh[chunk=4, stable=true]"
]
LENGTHS = ((10, 3, 11), (24,))


def build(name, attention, tiny, **more):
    sizes = {"kv_heads": 1, "head_dim": 8} if name == "llama" else {}
    model = effzoo.build(name, attention=attention, **tiny | sizes | more).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model


def packed():
    ids = torch.randint(2, 53, (2, 24))
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    return ids, positions


def alone(model, ids, **more):
    found = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        ends = torch.tensor(lengths).cumsum(0)
        found.append(
            torch.cat(
                [
                    model(row[end - length : end][None], **more).last_hidden_state
                    for end, length in zip(ends, lengths, strict=True)
                ],
                1,
            )
        )
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", CAUSAL)
def test_each_document_is_computed_as_it_is_alone_forward_and_backward(name, attention, tiny):
    model = build(name, attention, tiny, task="causal_lm")
    ids, positions = packed()
    found, expected = model(ids, position_ids=positions).last_hidden_state, alone(model, ids)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
    weight = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((out * weight).sum(), list(model.blocks.parameters()), allow_unused=True)
        for out in (found, expected)
    ]
    largest = max(grad.abs().max() for grad in grads[1] if grad is not None)
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None) and (one is None or (one - other).abs().max() < 1e-11 * largest)


@pytest.mark.parametrize(
    "more",
    [
        {"residual": "reversible", "norm": "pre", "tied": False},
        {"share_layers": 1},
        {"peft": "prefix[length=3]|lora"},
        {"peft": "ladder"},
    ],
)
def test_documents_stay_apart_whatever_the_residual_the_sharing_and_the_method(more, tiny):
    model = build("gpt2", "full", tiny, **more)
    ids, positions = packed()
    assert torch.allclose(model(ids, position_ids=positions).last_hidden_state, alone(model, ids), rtol=0, atol=1e-10)


def test_a_document_does_not_see_another(tiny):
    model = build("llama", "full", tiny)
    ids, positions = packed()
    other = ids.clone()
    other[0, :10] = 7
    one, two = (model(tokens, position_ids=positions).last_hidden_state for tokens in (ids, other))
    assert one[0, 10:].equal(two[0, 10:]) and not torch.allclose(one[0, :10], two[0, :10])


def test_beside_a_mask_position_ids_are_positions_only_as_in_transformers_and_it_is_said(caplog):
    hf = theirs("Llama")
    torch.nn.init.normal_(hf.get_input_embeddings().weight)
    model, (ids, positions) = convert.from_transformers(hf).eval(), packed()
    mask = torch.ones_like(ids)
    for again in (True, False):
        caplog.clear()
        given = positions if again else positions + 1
        with torch.no_grad():
            expected = hf(ids, attention_mask=mask, position_ids=given, use_cache=False).last_hidden_state
            found = model(ids, mask, position_ids=given).last_hidden_state
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        assert ("leave attention_mask out to keep them apart" in caplog.text) == again


def test_a_padded_row_is_one_document_wherever_its_padding_stands(tiny):
    model = build("llama", "full", tiny)
    ids = torch.randint(2, 53, (1, 9))
    mask = torch.ones(1, 12, dtype=torch.long)
    expected = model(ids).last_hidden_state
    for places, positions in (
        ((0, 1, 2), [0, 0, 0, *range(9)]), ((0, 1, 2), [1, 1, 1, *range(9)]), ((9, 10, 11), [*range(9), 0, 0, 0]),
        ((4, 5, 6), [0, 1, 2, 3, 0, 0, 0, 4, 5, 6, 7, 8]),
    ):  # fmt: skip
        own = mask.clone()
        own[0, list(places)] = 0
        tokens = torch.zeros(1, 12, dtype=torch.long)
        tokens[own.bool()] = ids[0]
        found = model(tokens, own, position_ids=torch.tensor([positions])).last_hidden_state[own.bool()]
        assert torch.allclose(found, expected[0], rtol=0, atol=1e-11)
    gap = mask.clone()
    gap[0, 4:7] = 0
    assert model(tokens, gap, position_ids=torch.arange(12)[None]).last_hidden_state.equal(
        model(tokens, gap).last_hidden_state
    )


def theirs(name):
    sizes = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8,
             "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
             "eos_token_id": None}  # fmt: skip
    more = {
        "Mistral": {"sliding_window": 4},
        "Qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    }
    if name == "GPT2":
        return transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        ).eval()
    cls, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    return cls(config(**sizes | more.get(name, {}))).eval()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "GPT2"])
@pytest.mark.parametrize("kind", ["again", "gap", "down", "alike"])
def test_documents_start_where_they_do_in_transformers(name, kind):
    hf = theirs(name)
    torch.nn.init.normal_(hf.get_input_embeddings().weight)
    ids, positions = packed()
    if kind != "again":
        positions = {
            "gap": torch.cat([torch.arange(9), torch.arange(20, 35)]), "down": torch.arange(24).flip(0),
            "alike": torch.full((24,), 3),
        }[kind].expand(2, -1)  # fmt: skip
    with torch.no_grad():
        expected = hf(ids, position_ids=positions, use_cache=False).last_hidden_state
        found = convert.from_transformers(hf).eval()(ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("more", "attention", "inputs", "said"), [
    ({"task": "classification"}, "full", {},
    "a classification head labels whole rows; give each document a row of its own"),
    ({"peft": "prompt[length=3]"}, "full", {}, "but 3 prompt tokens stand before the first alone"),
    ({}, "local[chunk=4, circular=true]", {}, "attention 'local' with circular=true computes a short one otherwise"),
    ({}, "full", {"positions": -1}, r"position_ids are in \[0, 63\], got -1"),
    ({}, "full", {"positions": 70}, r"position_ids are in \[0, 63\], got 0 to 70"),
    ({}, "full", {"positions": 1.5}, "position_ids is an integer tensor, got torch.float32"),
    ({}, "full", {"positions": True}, "position_ids is an integer tensor, got torch.bool"),
])  # fmt: skip
def test_what_has_no_meaning_for_several_documents_is_refused(more, attention, inputs, said, tiny):
    model = build("llama", attention, tiny, **more)
    ids, positions = packed()
    if "positions" in inputs:
        given = torch.as_tensor(inputs["positions"])
        positions = positions.to(given.dtype)
        positions[0, 5] = given
    with pytest.raises((InputError, IncompatibleError), match=said):
        model(ids, position_ids=positions)


def test_a_cache_and_rows_with_adapters_of_their_own_hold_one_document_each(tiny):
    from effzoo.attention.core import Cache

    model = build("llama", "full", tiny)
    ids, positions = packed()
    with pytest.raises(InputError, match="but a cache holds one for each row"):
        model(ids, position_ids=positions, cache=Cache())
    for name in ("a", "b"):
        effzoo.attach(model, "lora", name=name)
    effzoo.activate(model, rows=["a", "b"])
    with pytest.raises(EffzooError, match="rows"):
        model.double()(ids, position_ids=positions)


def test_an_encoder_takes_any_position_ids_as_rows_of_its_table(tiny):
    model = build("bert", "full", tiny)
    ids, positions = packed()
    hf = convert.to_transformers(model)
    assert torch.allclose(
        model(ids, position_ids=positions).last_hidden_state,
        hf(ids, position_ids=positions).last_hidden_state,
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.slow
def test_compiled_code_takes_one_document_and_refuses_several(tiny):
    model = build("llama", "full", {**tiny, "layers": 1})
    ids, positions = packed()
    run = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(
            run(ids, position_ids=positions[1:].repeat(2, 1)).last_hidden_state,
            model(ids).last_hidden_state,
            rtol=0,
            atol=1e-10,
        )
        with pytest.raises(
            InputError, match="position_ids start again, and compiled code has no rows for several documents"
        ):
            run(ids, position_ids=positions)
    torch._dynamo.reset()
