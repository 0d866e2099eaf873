"""Several documents in a row of a decoder, by position ids that start again: each is computed as it is alone, in every
kind of attention."""

import functools

import pytest
import torch
import transformers
from support import small

import effzoo
from effzoo import convert
from effzoo.architectures.packing import documents_by_id
from effzoo.checks.peft import Subject as Method
from effzoo.errors import EffzooError, IncompatibleError, InputError
from effzoo.packing import joined
from effzoo.train.batches import Pad
from effzoo.train.form import accepted

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


ROWS = ((10, 3, 6), (4, 8), (12,), (1, 1, 2))


@functools.cache
def spec_of(method):
    return method and str(Method.of(method).spec)


def packed_and_alone(tiny, causal, attention="full", method=None, name=None, training=False, **more):
    """(loss, logits of tokens, gradients) of packed rows, and of the same documents in a padded batch."""
    torch.manual_seed(0)
    task = more.pop("task", "causal_lm" if causal else "token_classification")
    name = name or ("gpt2" if causal else "roberta")
    model = effzoo.build(name, attention=attention, task=task, **{**tiny, "num_labels": 5, "max_length": 32, **more})
    if method is not None:
        effzoo.attach(model, method)
    model = model.double().train(training)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    columns = {"input_ids": (2, 53), "labels": (0, 5)}
    if any(core.knows_globals() for core in model.cores()):
        columns["global_attention_mask"] = (0, 2)
    documents = [
        {name: torch.randint(*bounds, (n,)).tolist() for name, bounds in columns.items()} for row in ROWS for n in row
    ]
    if causal:
        documents = [{**document, "labels": document["input_ids"]} for document in documents]
    parts = iter(documents)
    rows = [joined([(number, next(parts)) for number in row], task) for row in ROWS]
    pad, found = Pad(task, model.config.pad_token, accepted(model)), []
    for examples in (rows, documents):
        model.zero_grad()
        batch = pad(examples)
        out = model(**batch)
        out.loss.backward()
        inside = batch.get("document_ids", batch["attention_mask"]) > 0
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.detach(), out.logits[inside].detach(), gradients))
    return found


def assert_packed_is_alone(packed, alone):
    assert alone[1].abs().max() > 1e-3
    assert (packed[0] - alone[0]).abs() < 1e-12 * (1 + alone[0].abs())
    assert (packed[1] - alone[1]).abs().max() < 1e-11 * (1 + alone[1].abs().max())
    assert packed[2].keys() == alone[2].keys() and packed[2]
    largest = max(gradient.abs().max() for gradient in alone[2].values())
    for name, gradient in alone[2].items():
        assert (packed[2][name] - gradient).abs().max() < 1e-10 * largest, name


SOME = [None, "lora", "prefix", "prompt", "houlsby", "pals", "ladder", "unipelt"]


def has_meaning(method, attention, causal):
    """Adapters for convolutions, those that would look ahead in a decoder, and a classifier's head have none here."""
    ahead = effzoo.attention.get(attention).not_causal or method in ("pals", "unipelt", "head")
    return method != "residual_adapter" and not (causal and ahead)


CELLS = [
    pytest.param(method, attention, causal, marks=[] if method in SOME else [pytest.mark.slow])
    for causal in (False, True)
    for attention in effzoo.attention.names()
    for method in [None, *effzoo.peft.names()]
    if has_meaning(method, attention, causal)
]


@pytest.mark.parametrize(("method", "attention", "causal"), CELLS)
def test_packed_rows_have_the_loss_and_the_gradients_of_their_documents(tiny, method, attention, causal):
    assert_packed_is_alone(*packed_and_alone(tiny, causal, small(attention), spec_of(method)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("more", [
    {"residual": "reversible", "norm": "pre", "tied": False, "attention": "lsh[chunk=4]"},
    {"share_layers": 1, "attention": "lsh[chunk=4]"},
    {"attention": ("local[chunk=4]", "lsh[chunk=4, stable=true]")},
    {"experts": 2, "router": "switch[capacity=1.0]"},
    {"experts": 2, "router": "switch[capacity=1.0]", "training": True},
    {"method": "routed[of='houlsby[bottleneck=2]', experts=2, level=example]"},
    {"method": "routed[of='lora[targets=attn.q]', experts=2]", "training": True},
    {"method": "prompt[length=2]|prefix[length=3]|lora", "attention": "longformer[window=4]"},
    {"training": True, "positions": "sinusoidal"},
])  # fmt: skip
def test_documents_stay_apart_in_packed_rows_of_every_architecture(tiny, causal, more):
    if causal and "level=example" in more.get("method", ""):
        with pytest.raises(IncompatibleError, match="later"):
            packed_and_alone(tiny, causal, **more)
        return
    assert_packed_is_alone(*packed_and_alone(tiny, causal, **more))


@pytest.mark.parametrize(("name", "causal", "more"), [
    ("llama", True, {"kv_heads": 1, "head_dim": 8}), ("bert", False, {}), ("bert", False, {"task": "masked_lm"}),
    ("modernbert", False, {"pad_token": 0}), ("albert", False, {"embedding_dim": 8}),
    ("longformer", False, {"attention": "longformer[window=4]"}), ("gpt2", True, {"method": "ladder"}),
])  # fmt: skip
def test_packed_rows_of_models_of_the_zoo(tiny, name, causal, more):
    assert_packed_is_alone(*packed_and_alone(tiny, causal, name=name, **more))


@pytest.mark.parametrize("level", ["blocks", "hidden"])
def test_recomputing_packed_rows_keeps_every_choice(tiny, level, monkeypatch):
    build = effzoo.build

    def recomputing(*arguments, **options):
        model = build(*arguments, **options)
        model.recompute = level
        return model

    monkeypatch.setattr(effzoo, "build", recomputing)
    assert_packed_is_alone(*packed_and_alone(tiny, True, "lsh[chunk=4]", "lora", training=True))


def test_padding_between_and_before_documents_belongs_to_none(tiny):
    model = build("gpt2", "full", tiny)
    ids = torch.randint(2, 53, (2, 9))
    numbers = torch.tensor([[0, 0, 1, 1, 1, 0, 7, 7, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    found = model(ids, document_ids=numbers).last_hidden_state
    assert found.isfinite().all()
    for part in (slice(2, 5), slice(6, 8)):
        assert torch.allclose(found[0, part], model(ids[:1, part]).last_hidden_state[0], rtol=0, atol=1e-11)
    assert torch.allclose(
        model(ids[:, 2:5], document_ids=torch.ones(2, 3, dtype=torch.long)).last_hidden_state,
        model(ids[:, 2:5]).last_hidden_state, rtol=0, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize(("numbers", "said"), [
    ([[1, 1, 2.0]], "document_ids is an integer tensor, got torch.float32"),
    ([[1, 1]], r"document_ids has shape \(1, 2\), the input needs \(1, 3\)"),
    ([[1, -1, 1]], r"document_ids are in 0 \(padding\), 1, 2, ..., got -1"),
])  # fmt: skip
def test_document_ids_are_numbers_from_one(tiny, numbers, said):
    with pytest.raises(InputError, match=said):
        build("bert", "full", tiny)(torch.tensor([[2, 3, 4]]), document_ids=torch.tensor(numbers))


def test_few_documents_are_padded_to_a_longer_one(tiny):
    """What attention computes beside the tokens themselves, in rows of 512 of short documents."""
    lengths = torch.randint(5, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    numbers = torch.arange(1, 301).repeat_interleave(torch.tensor(lengths))
    _, documents = documents_by_id(numbers[None])
    sizes = [group.index.numel() for group in documents.like.groups]
    assert sum(sizes) < 1.25 * len(numbers) < 2 * len(numbers) < documents.rows.groups[0].index.numel() * 1.2
    assert len(sizes) <= 12
