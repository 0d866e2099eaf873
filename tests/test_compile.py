"""Whole models under torch.compile(fullgraph=True) compute what they compute without, forward and backward, with
padding, prefix and global tokens.

`aot_eager` traces everything and generates no code, so it is quick; one model goes through the code generator too,
    because that has been wrong where tracing was right (see `merge` in attention/kernel.py).
"""

import pytest
import torch

import effzoo
from effzoo import checked
from effzoo.errors import InputError

CASES = [("bert", kind) for kind in effzoo.attention.names()] + [
    ("gpt2", "longformer"),
    ("llama", "full"),
    ("modernbert", None),
]


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
        name,
        task="token_classification",
        peft="prefix[length=3]|lora",
        **({"attention": attention} if attention else {}),
        **sizes,
        **more,
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = {
        "input_ids": torch.randint(53, (2, 33)),
        "attention_mask": (torch.arange(33) < torch.tensor([33, 20])[:, None]).long(),
    }
    if any(core.knows_globals() for core in model.cores()):
        inputs["global_attention_mask"] = torch.zeros(2, 33, dtype=torch.long)
        inputs["global_attention_mask"][[0, 0, 1], [0, 5, 3]] = 1
    return model.double(), inputs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_traced_model_is_the_model(name, attention, tiny):
    (logits, grads), (expected, wanted) = both(*case(name, attention, tiny), "aot_eager")
    assert (logits - expected).abs().max() < 1e-10 and grads.keys() == wanted.keys()
    for key, grad in wanted.items():
        assert (grads[key] - grad).abs().max() < 1e-10, key


@pytest.mark.slow
def test_generated_code_computes_the_model(tiny):
    """Two layers of Longformer with globals, prefix and LoRA: four parts merged, twice."""
    (logits, grads), (expected, wanted) = both(*case("longformer", "longformer[window=8]", tiny), "inductor")
    assert (logits - expected).abs().max() < 1e-10
    for key, grad in wanted.items():
        assert (grads[key] - grad).abs().max() < 1e-10, key


@pytest.mark.slow
def test_prompt_rows_and_the_first_token_need_no_room_among_the_global_tokens_of_a_batch(tiny):
    model = effzoo.build(
        "longformer",
        attention="longformer[window=8, max_globals=2]",
        peft="prompt[length=5]",
        task="classification",
        **tiny,
    )
    (logits, grads), (expected, wanted) = both(model.double(), {"input_ids": torch.arange(24).view(2, 12)}, "aot_eager")
    assert (logits - expected).abs().max() < 1e-10 and grads.keys() == wanted.keys()


@pytest.mark.slow
def test_more_global_tokens_than_there_is_room_for_are_refused_in_compiled_code(tiny):
    model = torch.compile(
        effzoo.build("longformer", attention="longformer[window=8, max_globals=2]", **tiny),
        fullgraph=True,
        backend="eager",
    )
    ids, marked = torch.arange(24).view(2, 12), torch.zeros(2, 12, dtype=torch.long)
    marked[0, :2] = 1
    model(input_ids=ids, global_attention_mask=marked)
    with pytest.raises(InputError, match="more than 2 global tokens"):
        model(input_ids=ids, global_attention_mask=marked | (ids == 5))


# --- values of inputs: refused in compiled code as they are without it; each model is compiled once, and values alone
#     differ from case to case


def inputs(**wrong):
    """Everything that a model takes, with some values out of range in the last row."""
    ids = torch.arange(24).view(2, 12)
    right = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2,
        "position_ids": torch.arange(12)[None].repeat(2, 1),
        "global_attention_mask": (ids % 12 == 0).long(), "labels": torch.where(ids % 5 == 0, -100, ids % 3),
    }  # fmt: skip
    for name, value in wrong.items():
        right[name][1, 7:] = value
    return right


WRONG = [
    ("attention_mask", -10000, "attention_mask holds 0 and 1 .* from -10000 to 1"),
    ("attention_mask", 2, "attention_mask holds 0 and 1 .* from 1 to 2"),
    ("global_attention_mask", 3, "global_attention_mask holds 0 and 1"),
    ("position_ids", 64, r"position_ids are in \[0, 63\], got 0 to 64"),
    ("position_ids", -1, r"position_ids are in \[0, 63\], got -1"),
    ("token_type_ids", 2, r"token_type_ids are in \[0, 2\), got 0 to 2"),
    ("input_ids", 53, r"input_ids are in \[0, 53\), got 0 to 53; is this the model's tokenizer"),
    ("labels", 3, r"labels are in \[0, 3\) or -100, got 0 to 3; check num_labels"),
    ("labels", -1, "labels are in .* got -1 to 2"),
]  # fmt: skip


@pytest.mark.slow
def test_values_out_of_range_are_refused_compiled_or_not(tiny):
    """Checks are not left out as having no effect, and break no graph, also where a gradient is wanted."""
    model = effzoo.build(
        "bert", attention="longformer[window=4]", task="token_classification", num_labels=3, **{**tiny, "layers": 1}
    ).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(**inputs()), model(**inputs())
    assert torch.allclose(out.loss, expected.loss, rtol=0, atol=1e-6)
    out.loss.backward()
    for run in (model, compiled):
        for name, value, said in WRONG:
            with pytest.raises(InputError, match=said):
                run(**inputs(**{name: value}))
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_perceiver_refuses_the_same(tiny):
    sizes = {"channels": 8, "latents": 8, "head_dim": 8, "value_dim": 8, "cross_heads": 1}
    model = effzoo.build("perceiver-io", task="token_classification", num_labels=3, **{**tiny, "layers": 1}, **sizes)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def given(**wrong):
        return {
            key: value
            for key, value in inputs(**wrong).items()
            if key not in ("token_type_ids", "global_attention_mask")
        }

    assert torch.allclose(compiled(**given()).loss, model(**given()).loss, rtol=0, atol=1e-6)
    for run in (model, compiled):
        for name, value, said in WRONG:
            if name in given():
                with pytest.raises(InputError, match=said):
                    run(**given(**{name: value}))
    torch._dynamo.reset()


BERT = {"name": "bert", "task": "classification", "num_labels": 1}
PERCEIVER = {
    "name": "perceiver-io",
    "task": "token_classification",
    "channels": 8,
    "latents": 8,
    "head_dim": 8,
    "value_dim": 8,
    "cross_heads": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "later"),
    [
        (BERT, {"position_ids": torch.arange(12).expand(2, -1), "labels": torch.rand(2)}),
        (PERCEIVER, {"output_positions": torch.arange(24).view(2, 12)}),
    ],
)
def test_an_input_that_comes_after_several_lengths_fits_their_symbolic_sizes(sizes, later, tiny):
    model = effzoo.build(**{**tiny, "layers": 1}, **sizes).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.randint(53, (2, 12))
    compiled(ids[:1, :9])
    compiled(ids[:, :10])
    assert torch.allclose(compiled(ids, **later).logits, model(ids, **later).logits, rtol=0, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(("mask", "said"), [
    (torch.tensor([[0.0, 0.0, -1e4]]), "mask holds 0 and 1"),
    (torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.bfloat16), "mask holds 0 and 1"),
    (torch.zeros(2, 3), "attention_mask is torch.float32 and 0 everywhere, which marks no token"),
    (torch.tensor([[1.0, torch.nan]]), "mask holds 0 and 1"),
    (torch.tensor([[1.0, 0.5]]), "mask holds 0 and 1"),
    (torch.tensor([[1, 255]], dtype=torch.uint8), "mask holds 0 and 1"),
])  # fmt: skip
def test_masks_that_are_added_to_scores_are_not_taken_for_marks(mask, said):
    def seen(mask):
        return checked.marks(mask, "attention_mask") & True

    for run in (seen, torch.compile(seen, fullgraph=True, backend="eager")):
        with pytest.raises(InputError, match=said):
            run(mask)
        for dtype in (torch.bool, mask.dtype):
            right = (torch.arange(mask.numel()).view(mask.shape) % 2 == 0).to(dtype)
            assert run(right).equal(right.bool())
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 12, 12), (2, 1), (12,)])
def test_masks_of_pairs_are_refused(shape, tiny):
    model = effzoo.build("bert", **tiny)
    with pytest.raises(InputError, match=r"attention_mask has shape .*, the input needs \(2, 12\)"):
        model(torch.arange(24).view(2, 12), attention_mask=torch.ones(shape))
