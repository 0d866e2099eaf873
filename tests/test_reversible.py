"""Reversible residuals: the same gradients as the plain twin, also where adapters alone are trained, and no activation
kept per block."""

import pytest
import torch

import effzoo
from effzoo.architectures import transformer
from effzoo.blocks.reversible import two_streams
from effzoo.errors import IncompatibleError, OptionError

SIZES = {"dim": 16, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}


def build(attention="full", peft=None, layers=3, dropout=0.1, name="gpt2", **more):
    torch.manual_seed(3)
    sizes = SIZES | {
        "norm": "pre",
        "residual": "reversible",
        "tied": False,
        "layers": layers,
        "dropout": dropout,
        "attention_dropout": dropout,
    }
    model = effzoo.build(
        name, attention=attention, task="token_classification", num_labels=3, peft=peft, **sizes | more
    ).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def batch():
    mask = torch.arange(13) < torch.tensor([13, 7])[:, None]
    return {
        "input_ids": torch.randint(53, (2, 13)),
        "attention_mask": mask.long(),
        "labels": torch.randint(3, (2, 13)).masked_fill(~mask, -100),
    }


def gradients(model, inputs, plain, monkeypatch, seed=11):
    """Loss and gradients of every trainable parameter; `plain` takes the twin that stores everything."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(transformer, "reversible", two_streams)
        torch.manual_seed(seed)
        loss = model(**inputs).loss
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return loss, grads


@pytest.mark.parametrize(
    "peft",
    [None, "lora[rank=2]", "prefix[length=3]", "houlsby[bottleneck=4]", "ia3", "prompt[length=2]|bitfit", "full"],
)
@pytest.mark.parametrize(
    ("name", "attention"), [("gpt2", "full"), ("gpt2", "longformer[window=4]"), ("bert", "longformer[window=4]")]
)
def test_gradients_equal_those_of_the_plain_twin_with_dropout(peft, name, attention, monkeypatch):
    """Also with frozen embeddings under LoRA alone, where the input of the blocks needs no gradient."""
    model, inputs = build(attention, peft, name=name), batch()
    (loss, found), (expected_loss, expected) = (gradients(model, inputs, plain, monkeypatch) for plain in (False, True))
    assert abs(loss - expected_loss) < 1e-12
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    for key, got, want in zip(trained, found, expected, strict=True):
        assert (got is None) == (want is None), key
        if want is not None:
            assert (got - want).abs().max() < 1e-9, key
    largest = max(float(want.abs().max()) for want in expected if want is not None)
    assert largest > 1e-3  # the comparison is not one of zeros


def test_gradients_equal_those_of_the_plain_twin_under_autocast(monkeypatch):
    """Sub-layers in bfloat16, streams in float32: what is computed again is what was computed, up to rounding of the
    reconstructed stream."""
    model, inputs = build().float(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (_, found), (_, expected) = (gradients(model, inputs, plain, monkeypatch) for plain in (False, True))
    for got, want in zip(found, expected, strict=True):
        if want is not None:
            # bfloat16 has 8 bits: a stream off by 1e-7 can round the other way
            assert (got - want).norm() <= 0.02 * want.norm() + 1e-6


def test_the_definition_is_that_of_two_streams():
    """y1 = x1 + attn(norm(x2)), y2 = x2 + mlp(norm(y1)), written out for one block."""
    model = build(layers=1, dropout=0.0).eval()
    x, block = torch.randn(2, 5, 16, dtype=torch.float64), model.blocks[0]
    mask = effzoo.attention.Mask()
    first = x + block.attn(block.attn_norm(x), mask)
    second = x + block.mlp(block.mlp_norm(first))
    hidden = model.final_norm(torch.cat([first, second], dim=-1))
    out = model(inputs_embeds=x - model.embeddings.position.weight[:5])
    assert torch.allclose(out.last_hidden_state, hidden, rtol=0, atol=1e-12) and hidden.shape[-1] == 32


@pytest.mark.parametrize("peft", [None, "lora[rank=2]"])
def test_saved_activations_do_not_grow_with_depth(peft):
    """What autograd keeps for the backward pass, counted in elements without parameters: the same for 2 layers and for
    8."""
    counts = []
    for layers in (2, 8):
        model, inputs = build(peft=peft, layers=layers), batch()
        own, kept = {p.data_ptr() for p in model.parameters()}, {}

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**inputs).loss
        counts.append(sum(size for pointer, size in kept.items() if pointer not in own))
        loss.backward()
    assert counts[0] == counts[1] > 0


def test_a_trainable_tensor_from_outside_is_an_error_not_a_lost_gradient():
    model = build(layers=1)
    outside = torch.randn(16, dtype=torch.float64, requires_grad=True)
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output + outside)
    with pytest.raises(IncompatibleError, match="no parameter of its own, so its gradient would be lost"):
        model(**batch()).loss.backward()


def test_two_steps_of_training_equal_those_of_the_plain_twin(monkeypatch):
    """With an optimiser between the passes; states of the random generator are taken anew each time."""
    weights = []
    for plain in (False, True):
        model = build(peft="lora[rank=2]")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(2)
        inputs = batch()
        for step in range(2):
            _, grads = gradients(model, inputs, plain, monkeypatch, seed=step)
            for parameter, grad in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
                parameter.grad = grad
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-12


def test_evaluation_and_decoding_need_no_graph():
    model, inputs = build().eval(), batch()
    with torch.no_grad():
        assert model(**inputs).logits.shape == (2, 13, 3)


def test_reversible_blocks_are_pre_norm_and_their_head_is_not_tied():
    with pytest.raises(OptionError, match="norm='pre'"):
        effzoo.build("bert", residual="reversible", **SIZES)
    with pytest.raises(IncompatibleError, match="build the model with tied=False|use tied=False"):
        effzoo.build("gpt2", residual="reversible", task="causal_lm", **SIZES)


def _rank(rank: int, folder: str) -> None:
    """One of two processes: half of the batch each, gradients averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(build(peft="lora[rank=2]|prefix[length=2]", dropout=0.0))
    torch.manual_seed(7)
    inputs = {"input_ids": torch.randint(53, (4, 13)), "labels": torch.randint(3, (4, 13))}
    for _ in range(2):  # twice: the reducer must be ready again
        model.zero_grad()
        model(**{key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}).loss.backward()
    if rank == 0:
        torch.save(
            {name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}, f"{folder}/gradients.pt"
        )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_equal_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    model = build(peft="lora[rank=2]|prefix[length=2]", dropout=0.0)
    torch.manual_seed(7)
    model(input_ids=torch.randint(53, (4, 13)), labels=torch.randint(3, (4, 13))).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() < 1e-9, name
