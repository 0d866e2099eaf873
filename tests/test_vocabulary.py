"""The vocabulary can grow and shrink: old tokens compute what they did, added tokens begin as in transformers, a
refusal changes nothing."""

import copy

import pytest
import torch

import effzoo
from effzoo.convert import from_transformers, to_transformers
from effzoo.errors import AdapterError, IncompatibleError, OptionError, TooLargeError
from effzoo.peft.attach import attached, base_tensors
from effzoo.sites import sites
from effzoo.vocabulary import resize_vocabulary

SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "max_length": 32, "dropout": 0.0, "attention_dropout": 0.0}
NARROW = {
    "channels": 12,
    "latents": 4,
    "head_dim": 4,
    "value_dim": 8,
    "cross_heads": 1,
    "cross_head_dim": 8,
    "cross_value_dim": 16,
}
MODELS = {
    "bert": ("masked_lm", {}),
    "albert": ("masked_lm", {"embedding_dim": 8}),
    "roberta": ("masked_lm", {"pad_token": 1, "position_offset": 2}),
    "gpt2": ("causal_lm", {}),
    "llama": ("causal_lm", {"kv_heads": 1, "tied": False}),
    "qwen3": ("causal_lm", {"kv_heads": 1, "head_dim": 8}),
    "longformer": ("classification", {"attention": "longformer[window=4]", "pad_token": 1, "position_offset": 2}),
    "reformer": ("causal_lm", {"attention": "lsh[rounds=1, chunk=8]", "axial_shape": (8, 4), "axial_dims": (8, 8)}),
    "perceiver-io": ("masked_lm", {**NARROW, "decoder_head_dim": 4, "decoder_value_dim": 4}),
}


def built(name, vocab=53, **changes):
    """A small model with weights that are large enough to tell tokens apart."""
    task, choices = MODELS[name]
    model = effzoo.build(name, **{"task": task, "vocab": vocab, **SIZES, **choices, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids(vocab=53, n=12):
    return torch.randint(3, vocab, (2, n), generator=torch.Generator().manual_seed(3))


def snapshot(model):
    """Everything that a refused call must leave alone."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: (parameter.requires_grad, id(parameter)) for key, parameter in model.named_parameters()}
    return state, flags, model.config, {**attached(model)}, model.training, torch.get_rng_state()


def same(before, after):
    assert before[0].keys() == after[0].keys() and all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1:5] == after[1:5] and torch.equal(before[5], after[5])


@pytest.mark.parametrize("name", MODELS)
def test_old_tokens_compute_what_they_did_and_new_ones_run(name):
    model = built(name)
    before, old = model(ids()), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    assert effzoo.resize_vocabulary(model, 60) is model and model.config.vocab == 60
    assert torch.equal(random, torch.get_rng_state())
    after = model(ids())
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.allclose(after.logits[..., : before.logits.shape[-1]], before.logits, atol=1e-6)
    assert after.logits.shape[-1] == (60 if model.task.endswith("_lm") else before.logits.shape[-1])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor[: len(old[key])], old[key]), key
    out = model(torch.full((1, 12), 59))
    assert torch.isfinite(out.logits).all()
    with pytest.raises(effzoo.EffzooError, match=r"\[0, 60\)"):
        model(torch.full((1, 12), 60))


@pytest.mark.parametrize(
    ("name", "vocab"), [("bert", 53), ("gpt2", 53), ("llama", 53), ("roberta", 12), ("qwen3", 12), ("llama", 9)]
)
def test_added_tokens_are_those_of_transformers(name, vocab, monkeypatch):
    """The same old weights and the same draw: fewer tokens than dimensions give the mean itself, others a draw around
    it."""
    for cls in (torch.nn.Embedding, torch.nn.Linear):  # which draw what transformers then writes over
        monkeypatch.setattr(cls, "reset_parameters", lambda module: None)
    model = built(name, vocab)
    twin = to_transformers(model)
    effzoo.resize_vocabulary(model, vocab + 5, seed=7)
    torch.manual_seed(7)
    twin.resize_token_embeddings(vocab + 5)
    back = from_transformers(twin)
    for key, tensor in back.state_dict().items():
        if key in ("embeddings.token.weight", "head.out.bias"):
            assert torch.allclose(tensor, model.state_dict()[key], rtol=0, atol=1e-6), key
        elif key != "head.out.weight":
            assert torch.equal(tensor, model.state_dict()[key]), key
    if not model.config.tied:  # transformers draws on from the state that the embedding left
        assert torch.allclose(back.head.out.weight, model.head.out.weight, rtol=0, atol=1e-6)
    assert back.config.vocab == model.config.vocab == vocab + 5
    other = to_transformers(model)
    x = ids(vocab + 5)
    assert torch.allclose(other.eval()(x).logits, model(x).logits, atol=1e-5)
    assert other.config.vocab_size == vocab + 5


def test_mean_is_the_mean_and_the_covariance_of_the_old_embeddings():
    model = built("bert", 64).double()
    effzoo.resize_vocabulary(model, 64 + 20_000)
    table = model.embeddings.token.weight.detach()
    old, new = table[:64], table[64:]
    covariance = (old - old.mean(0)).T @ (old - old.mean(0)) / 64
    found = (new - old.mean(0)).T @ (new - old.mean(0)) / 20_000 / 1e-9
    assert float((found - covariance).norm() / covariance.norm()) < 0.03
    untied = built("bert", 64, tied=False)
    effzoo.resize_vocabulary(untied, 70)
    bias = untied.head.out.bias.detach()
    assert torch.allclose(bias[64:], bias[:64].mean().expand(6), atol=1e-7) and not model.head.out.bias[64:].any()


def test_normal_embeddings_have_the_spread_of_a_new_model():
    model = effzoo.resize_vocabulary(built("gpt2"), 53 + 5_000, init="normal")
    new = model.embeddings.token.weight[53:]
    assert abs(new.std().item() - 0.02) < 2e-4 and abs(new.mean().item()) < 3e-4


def test_the_same_base_gets_the_same_tokens_and_another_seed_others():
    one, two, three = built("gpt2"), None, None
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    for model, seed in ((one, 0), (two, 0), (three, 1)):
        effzoo.resize_vocabulary(model, 60, seed=seed)
    assert torch.equal(one.embeddings.token.weight, two.embeddings.token.weight)
    assert not torch.equal(one.embeddings.token.weight, three.embeddings.token.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_requires_grad_stay(dtype):
    model = built("llama").to(dtype)
    model.embeddings.token.weight.requires_grad_(False)
    effzoo.resize_vocabulary(model, 60)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.embeddings.token.weight.requires_grad and model.head.out.weight.requires_grad
    effzoo.resize_vocabulary(effzoo.build("gpt2", vocab=53, **SIZES).to("meta"), 60)


def test_multiples_shrinking_and_the_same_size():
    model = effzoo.resize_vocabulary(built("bert"), 54, multiple_of=64)
    assert model.config.vocab == 64 and model.embeddings.token.added == 11
    before = snapshot(model)
    effzoo.resize_vocabulary(model, 64)
    same(before, snapshot(model))
    with pytest.raises(OptionError, match="shrink=True"):
        effzoo.resize_vocabulary(model, 50)
    same(before, snapshot(model))
    effzoo.resize_vocabulary(model, 50, shrink=True)
    assert model.config.vocab == 50 and model(ids(50)).logits.shape[-1] == 50 and model.embeddings.token.added == 0
    assert torch.equal(model.embeddings.token.weight, before[0]["embeddings.token.weight"][:50])


@pytest.mark.parametrize("n", [0, -1, True, 60.0, "60", None, float("nan"), 10**13, 10**30])
def test_a_number_that_is_none_changes_nothing(n):
    model = built("bert")
    before = snapshot(model)
    with pytest.raises(effzoo.EffzooError, match="resize_vocabulary"):
        effzoo.resize_vocabulary(model, n)
    with pytest.raises((OptionError, TooLargeError), match="resize_vocabulary"):
        resize_vocabulary(model, n)
    same(before, snapshot(model))


@pytest.mark.parametrize(
    "wrong", [{"multiple_of": 0}, {"multiple_of": 1.5}, {"seed": -1}, {"seed": True}, {"init": "zeros"}, {"init": 3}]
)
def test_other_wrong_options_are_refused(wrong):
    with pytest.raises(effzoo.EffzooError, match=next(iter(wrong))):
        effzoo.resize_vocabulary(built("bert"), 60, **wrong)
    with pytest.raises(OptionError, match=next(iter(wrong))):
        resize_vocabulary(built("bert"), 60, **wrong)


def test_models_without_tokens_and_quantised_heads_are_refused():
    with pytest.raises(IncompatibleError, match="arrays of numbers"):
        effzoo.resize_vocabulary(
            effzoo.build("perceiver", latents=4, dim=16, layers=1, heads=2, mlp=16, grid=(4, 4), channels=3), 60
        )
    with pytest.raises(IncompatibleError, match="Linear"):
        resize_vocabulary(torch.nn.Linear(2, 2), 60)
    model = built("llama")
    effzoo.quantise(model, 8, targets="lm.out")
    with pytest.raises(IncompatibleError, match="quantised"):
        effzoo.resize_vocabulary(model, 60)
    body = built("llama")
    effzoo.quantise(body, 4)
    before = body(ids()).logits
    effzoo.resize_vocabulary(body, 60)
    assert torch.allclose(body(ids()).logits[..., :53], before, atol=1e-6)


ADAPTERS = [
    ("bert", "lora[targets=(embed.token, lm.out), tied=false]"),
    ("gpt2", "lora"), ("gpt2", "lora[targets=embed.token]"), ("gpt2", "full"), ("gpt2", "prompt[length=2]"),
    ("gpt2", "p_tuning[length=2]"),
    ("llama", "lora[targets=(embed.token, lm.out)]"), ("llama", "lora[targets=lm.out, init=olora, rank=2]"),
    ("llama", "full"), ("bert", "bitfit[targets=lm.out]"), ("albert", "lora[targets=(embed.token, embed.project)]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spec"), ADAPTERS)
def test_adapters_stay_and_grow_along(name, spec, tmp_path):
    model = effzoo.attach(built(name), spec)
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = model(ids()).logits
    base = copy.deepcopy(model)
    effzoo.detach(base, "default")
    effzoo.resize_vocabulary(base, 60)
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    effzoo.resize_vocabulary(model, 60)
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert torch.allclose(model(ids()).logits[..., :53], before, atol=1e-6)
    model(ids(60), labels=ids(60)).loss.backward()
    assert all(
        parameter.grad.isfinite().all()
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.grad is not None
    )
    effzoo.save_adapter(model, tmp_path)
    loaded = effzoo.load_adapter(base, tmp_path)
    x = torch.randint(3, 60, (2, 12))
    assert torch.equal(loaded(x).logits, model(x).logits)
    effzoo.detach(model, "default")
    assert all(torch.equal(tensor, base_tensors(base)[key]) for key, tensor in base_tensors(model).items())


@pytest.mark.parametrize(
    "spec", ["diff[targets=embed.token]", "lora[targets=lm.out, init=loftq, rank=2]", "fish[targets=embed.token]"]
)
def test_an_adapter_that_cannot_follow_is_refused(spec):
    model = effzoo.attach(built("llama"), spec)
    before = snapshot(model)
    with pytest.raises(IncompatibleError, match="detach or merge"):
        effzoo.resize_vocabulary(model, 60)
    same(before, snapshot(model))


def test_what_is_merged_into_the_weights_must_be_taken_out_first():
    model = effzoo.attach(built("gpt2"), "lora[targets=embed.token]")
    effzoo.merge(model)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="unmerge it first"):
        effzoo.resize_vocabulary(model, 60)
    same(before, snapshot(model))
    other = effzoo.attach(built("gpt2"), "lora")
    weights = copy.deepcopy(other.state_dict())
    effzoo.merge(other)
    effzoo.resize_vocabulary(other, 60)
    effzoo.unmerge(other)
    assert all(torch.equal(tensor[: len(weights[key])], weights[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_resized_inside_inference_mode_can_learn_afterwards(name):
    model, same = built(name), built(name)
    same.load_state_dict(model.state_dict())
    effzoo.attach(model, "lora[targets=embed.token, rank=2]")
    with torch.inference_mode():
        resize_vocabulary(model, 57)
    assert not any(x.is_inference() for x in model.state_dict(keep_vars=True).values())
    model(input_ids=ids(57), labels=ids(57)).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) >= 2
    effzoo.detach(model, "default")
    expected = resize_vocabulary(same, 57).state_dict()
    assert all(torch.equal(x, expected[key]) for key, x in model.state_dict().items())


def test_generation_goes_on_and_gives_new_tokens():
    model = built("gpt2")
    before = effzoo.generate(model, ids(n=4), max_new_tokens=5)
    effzoo.resize_vocabulary(model, 60)
    assert torch.equal(effzoo.generate(model, ids(n=4), max_new_tokens=5), before)
    with torch.no_grad():
        model.embeddings.token.weight[57] *= 100
    assert effzoo.generate(model, torch.full((1, 4), 57), max_new_tokens=5).max() >= 0


def test_account_and_plan_count_the_new_tokens():
    model = built("llama")
    total, stored = effzoo.account(model).total, effzoo.plan(model, batch=1, length=8).weights
    effzoo.resize_vocabulary(model, 60)
    assert effzoo.account(model).total == total + 2 * 7 * 16
    assert effzoo.plan(model, batch=1, length=8).weights == stored + 2 * 7 * 16 * 4
    assert sum(site.base()["weight"].shape[0] == 60 for _, site in sites(model) if site.base()) == 2
