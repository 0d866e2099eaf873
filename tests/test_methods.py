"""Each method computes the formula of its paper, written out by hand, and trains the number of parameters that the
formula says."""

import copy

import pytest
import torch
from torch.nn import functional as F

import effzoo
from effzoo.sites import HookContext, sites

D, MLP, LAYERS, LABELS, VOCAB = 16, 32, 2, 3, 53
HEAD = D * LABELS + LABELS


def build(tiny, attention="full", peft=None, name="minilm", **more):
    """A classification model whose head is one linear layer, in float64, with every parameter away from its initial
    value."""
    model = effzoo.build(
        name,
        attention=attention,
        task="classification",
        num_labels=LABELS,
        pooling="mean",
        head_dense=False,
        **{**tiny, **more},
    ).double()
    if peft:
        effzoo.attach(model, peft)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def site(model, path):
    return dict(sites(model))[path]


def batch(n=9):
    ids = torch.randint(2, VOCAB, (3, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_lora_adds_the_scaled_product_to_the_weight(tiny):
    model = build(tiny, peft="lora[rank=4, alpha=10]")
    q, x = site(model, "blocks.0.attn.q"), torch.randn(5, D, dtype=torch.float64)
    lora = q.adapters["default"]["lora"]
    assert torch.allclose(q(x), F.linear(x, q.weight + 10 / 4 * lora.B @ lora.A, q.bias), atol=1e-12)


def test_lora_dropout_acts_on_the_input_of_a_in_training_only(tiny):
    model = build(tiny, peft="lora[dropout=0.5]")
    q, x = site(model, "blocks.0.attn.q"), torch.ones(4000, D, dtype=torch.float64)
    still = q(x)
    model.train()
    many = q(x)
    assert not torch.allclose(many[0], many[1])
    error = (many.mean(0) - still[0]).abs() / (many.std(0) / len(x) ** 0.5)
    assert error.max() < 5  # standard errors


def test_ia3_scales_keys_values_and_the_hidden_units_after_the_activation(tiny):
    model = build(tiny, peft="ia3")
    block, x = model.blocks[0], torch.randn(5, D, dtype=torch.float64)
    scale = {
        name: site(model, f"blocks.0.{name}").adapters["default"]["ia3"].scale
        for name in ("attn.k", "attn.v", "mlp.down")
    }
    assert torch.allclose(
        block.attn.k(x), scale["attn.k"] * F.linear(x, block.attn.k.weight, block.attn.k.bias), atol=1e-12
    )
    hidden = F.gelu(F.linear(x, block.mlp.up.weight, block.mlp.up.bias))
    assert torch.allclose(
        block.mlp(x), F.linear(scale["mlp.down"] * hidden, block.mlp.down.weight, block.mlp.down.bias), atol=1e-12
    )


def test_houlsby_is_a_residual_bottleneck_before_the_residual_and_norm(tiny):
    model = build(tiny, peft="houlsby[bottleneck=3, activation=relu]")
    branch, y = model.blocks[1].mlp_branch, torch.randn(5, D, dtype=torch.float64)
    module = branch.adapters["default"]["houlsby"]
    hidden = F.relu(F.linear(y, module.down.weight, module.down.bias))
    assert torch.allclose(
        branch(torch.zeros_like(y), y), y + F.linear(hidden, module.up.weight, module.up.bias), atol=1e-12
    )


def test_prefix_is_the_gated_sum_of_two_attentions(tiny):
    """(1 - lambda) Attn(q, K, V) + lambda Attn(q, P_k, P_v), lambda the softmax mass of the prefix (He et al. 2022, eq.
    5)."""
    model = build(tiny, peft="prefix[length=3]")
    attn, x = model.blocks[0].attn, torch.randn(1, 5, D, dtype=torch.float64)
    q, k, v = (attn.project(name, x, effzoo.attention.Mask()) for name in "qkv")
    (keys, values), _ = attn.memory(HookContext(x=x, keys_values=attn.keys_values))
    own, prefix = (q @ keys_.transpose(-1, -2) / (D / 2) ** 0.5 for keys_ in (k, keys[None]))
    gate = prefix.exp().sum(-1, keepdim=True) / (prefix.exp().sum(-1, keepdim=True) + own.exp().sum(-1, keepdim=True))
    expected = (1 - gate) * (own.softmax(-1) @ v) + gate * (prefix.softmax(-1) @ values[None])
    assert torch.allclose(attn.core(q, k, v, mask=effzoo.attention.Mask(), memory=(keys, values)), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["minilm", "gpt2", "roberta"])
def test_prompt_equals_the_rows_written_into_the_input(tiny, name):
    """A prompt is `inputs_embeds` with its rows in front; what comes out at the rows is cut off."""
    model = effzoo.build(name, task="token_classification", **tiny).double().eval()
    # the types of prompt tokens are those of the first token; without types nothing is left to choose
    model.embeddings.token_type = None
    prompted = effzoo.attach(copy.deepcopy(model), "prompt[length=4]")
    rows = site(prompted, "embeddings.token").adapters["default"]["prompt"].tokens
    prompted.head.out.roster = None  # the same head as the bare model
    inputs = batch()
    embeds = torch.cat([rows.expand(3, -1, -1), model.embeddings.token(inputs["input_ids"])], dim=1)
    mask = F.pad(inputs["attention_mask"], (4, 0), value=1)
    expected = model(inputs_embeds=embeds, attention_mask=mask).logits[:, 4:]
    got = prompted(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert got.shape == (3, 9, 2) and torch.allclose(got[real], expected[real], atol=1e-12)


def test_prompt_rows_are_global_in_longformer(tiny):
    """With window 2 a distant token sees the prompt only because it is global: its output depends on the prompt in one
    layer."""
    model = build({**tiny, "layers": 1}, attention="longformer[window=2]", peft="prompt[length=2]", name="minilm")
    model.task = "token_classification"  # no default global token
    rows = site(model, "embeddings.token").adapters["default"]["prompt"].tokens
    last = model(**batch()).last_hidden_state[0, -1].sum()
    assert torch.autograd.grad(last, rows)[0].abs().sum() > 1e-6


COUNTS = [
    ("head", "full", HEAD),
    (
        "full",
        "full",
        VOCAB * D + 64 * D + 2 * D + 2 * D + LAYERS * (4 * (D * D + D) + 4 * D + 2 * D * MLP + MLP + D) + HEAD,
    ),
    ("bitfit", "full", D + LAYERS * (4 * D + D + MLP + D + D) + HEAD),
    ("bitfit[targets=(attn.q*, mlp.up)]", "full", LAYERS * (D + MLP) + HEAD),
    ("lora[rank=4]", "full", LAYERS * 2 * 2 * D * 4 + HEAD),
    ("lora[rank=4]", "longformer[window=4]", LAYERS * 4 * 2 * D * 4 + HEAD),
    ("lora[rank=4, targets=attn.q, layers=(-1)]", "longformer[window=4]", 2 * D * 4 + HEAD),
    ("ia3", "full", LAYERS * (2 * D + MLP) + HEAD),
    ("prompt[length=5]", "full", 5 * D + HEAD),
    ("prefix[length=5]", "longformer[window=4]", LAYERS * 2 * 5 * D + HEAD),
    ("houlsby[bottleneck=3]", "full", LAYERS * 2 * (2 * 3 * D + 3 + D + 2 * D) + HEAD),
    ("prefix[length=5]|lora[rank=4]", "full", LAYERS * (2 * 5 * D + 4 * D * 4) + HEAD),
]


@pytest.mark.parametrize(("spec", "attention", "count"), COUNTS)
def test_trainable_parameters_are_the_closed_form(tiny, spec, attention, count):
    model = effzoo.build("minilm", attention=attention, peft=spec, task="classification", num_labels=LABELS, **tiny)
    account = effzoo.account(model)
    assert account.trainable == account.stored == count and account.stored_bytes == 4 * count
    assert sum(numbers for *_, numbers in account.by_role) == count


def test_changed_entries_and_rank_of_the_change(tiny):
    accounts = {}
    for spec in ("lora[rank=4]", "ia3", "bitfit", "houlsby", "lora[rank=4]|bitfit"):
        accounts[spec] = effzoo.account(
            effzoo.build("minilm", peft=spec, task="classification", num_labels=LABELS, **tiny)
        )
    biases = D + LAYERS * (4 * D + D + MLP + D + D)
    assert (accounts["lora[rank=4]"].changed, accounts["lora[rank=4]"].rank) == (LAYERS * 2 * D * D + HEAD, 4)
    assert (accounts["ia3"].changed, accounts["ia3"].rank) == (LAYERS * (2 * D * D + 2 * D + D * MLP) + HEAD, "full")
    assert (accounts["bitfit"].changed, accounts["bitfit"].rank) == (biases + HEAD, 0)
    assert (accounts["houlsby"].changed, accounts["houlsby"].rank) == (None, None)
    assert accounts["lora[rank=4]|bitfit"].changed == LAYERS * 2 * D * D + biases + HEAD


def test_the_rank_that_is_declared_is_the_rank_of_the_merged_change(tiny):
    model = build(tiny, peft="lora[rank=4]")
    before = site(model, "blocks.0.attn.q").weight.clone()
    effzoo.merge(model)
    assert torch.linalg.matrix_rank(site(model, "blocks.0.attn.q").weight - before) == 4


@pytest.mark.parametrize("name", ["minilm", "gpt2"])
@pytest.mark.parametrize("attention", ["full", "longformer[window=4]"])
@pytest.mark.parametrize(
    "spec",
    [
        "lora|ia3|bitfit",
        "ia3|lora",
        "bitfit|ia3[targets=(attn.q, attn.k, mlp.down)]|lora[targets=(attn.*, mlp.*)]",
        "full|lora",
    ],
)
def test_merging_a_union_computes_what_the_attached_union_computes(tiny, name, attention, spec):
    if "attn.*" in spec:
        spec = spec.replace("attn.*", "attn.q, attn.v, attn.o").replace("mlp.*", "mlp.up, mlp.down")
    model = build(tiny, attention=attention, peft=spec, name=name)
    expected = model(**batch()).logits
    effzoo.merge(model)
    assert torch.allclose(model(**batch()).logits, expected, rtol=0, atol=1e-10) and not effzoo.attached(model)
