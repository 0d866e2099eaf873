"""Training a selection of the model's own parameters: which are trained, what they cost, and what autograd no longer
stores."""

import pytest
import torch

import effzoo
from effzoo.errors import OptionError, TargetError
from effzoo.peft import training
from effzoo.sites import sites

D, MLP, LABELS, VOCAB, LENGTH = 16, 32, 3, 53, 64
HEAD = D * LABELS + LABELS
BLOCK = 4 * (D * D + D) + 2 * D * MLP + MLP + D + 4 * D
EMBEDDINGS = VOCAB * D + LENGTH * D + 2 * D + 2 * D
BIASES = 4 * D + MLP + D + 2 * D  # of a block


def build(tiny, peft=None, layers=4, name="minilm", task="classification", **more):
    return effzoo.build(name, peft=peft, task=task, num_labels=LABELS, **{**tiny, "layers": layers, **more}).double()


def batch(model, n=13):
    return {"input_ids": torch.randint(2, VOCAB, (3, n), generator=torch.Generator().manual_seed(1))}


def saved(model, out):
    """How many numbers autograd stores for the backward pass, beside parameters and buffers: `out` runs the model; a
    storage counts once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = out()  # keeps the graph, and so every stored tensor, alive while it is counted
    assert result.requires_grad
    return sum(seen.values())


def saved_in_training(model):
    return saved(model, lambda: model.train()(**batch(model)).logits.sum())


def trained(model):
    """Trained tensors as site path and tensor name."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {(name.split(".adapters.")[0], name.rsplit(".own_", 1)[1]) for name in names}


COUNTS = [
    ("last", 4, 2 * BLOCK + HEAD),
    ("last[count=1]", 4, BLOCK + HEAD),
    ("freeze", 4, BLOCK + HEAD),
    ("freeze", 6, 2 * BLOCK + HEAD),  # floor(0.75 * 6) = 4 are frozen
    ("freeze[first=3]", 4, BLOCK + HEAD),
    ("freeze[first=0]", 4, 4 * BLOCK + HEAD),
    ("freeze[first=4]", 4, HEAD),
    ("full", 4, EMBEDDINGS + 4 * BLOCK + HEAD),
    ("select[targets=(attn.o, mlp.norm), layers=(0, -1)]", 4, 2 * (D * D + D + 2 * D) + HEAD),
    ("norms", 4, 2 * D + 4 * 4 * D + HEAD),
    ("norms[targets=attn.norm]", 4, 4 * 2 * D + HEAD),
    ("bitfit", 4, D + 4 * BIASES + HEAD),
    ("bitfit[group=strong]", 4, 4 * (D + MLP) + HEAD),
    ("bitfit[group=query]", 4, 4 * D + HEAD),
    ("bitfit[group=key]", 4, 4 * D + HEAD),
    ("bitfit[group=(query, value)]", 4, 4 * 2 * D + HEAD),
    ("bitfit[group=output]", 4, 4 * 2 * D + HEAD),
    ("bitfit[group=intermediate]", 4, 4 * MLP + HEAD),
    ("bitfit[group=norms]", 4, 4 * 2 * D + HEAD),
    ("bitfit[group=(attention_norm, output_norm)]", 4, 4 * 2 * D + HEAD),
    ("bitfit[targets=attn.v, layers=0]", 4, D + HEAD),
]


@pytest.mark.parametrize(("spec", "layers", "count"), COUNTS)
def test_trainable_and_changed_parameters_are_the_closed_form(tiny, spec, layers, count):
    account = effzoo.account(build(tiny, spec, layers, head_dense=False))
    assert account.trainable == account.stored == account.changed == count


def test_last_and_freeze_name_the_same_blocks(tiny):
    assert (
        trained(build(tiny, "last[count=1]"))
        == trained(build(tiny, "freeze[first=3]"))
        == trained(build(tiny, "freeze"))
    )


def test_what_lies_behind_the_last_block_is_trained_and_what_lies_before_the_first_is_not(tiny):
    paths = {path for path, _ in trained(build(tiny, "last[count=1]", name="gpt2"))}
    assert (
        "final_norm" in paths
        and "head.out" in paths
        and not any("embeddings" in path or "blocks.2" in path for path in paths)
    )


def test_the_groups_of_bitfit_make_up_the_whole_and_strong_is_half_of_it(tiny):
    """Without the norm of the embeddings; the paper counts half of all biases for the two strong ones at mlp = 4
    dim."""
    groups = ("query", "key", "value", "output", "intermediate", "norms")
    parts = [trained(build(tiny, f"bitfit[group={group}]", task="features")) for group in groups]
    whole = trained(build(tiny, "bitfit", task="features"))
    assert sum(map(len, parts)) == len(set().union(*parts)) and set().union(*parts) == whole - {
        ("embeddings.norm", "bias")
    }
    wide = {
        group: effzoo.account(build(tiny, f"bitfit[group={group}]", task="features", mlp=4 * D)).trainable
        for group in ("all", "strong")
    }
    assert 0.4 < wide["strong"] / wide["all"] < 0.5


def test_bitfit_groups_take_the_projections_of_global_tokens_and_the_shared_ones_of_lsh(tiny):
    model = build(tiny, "bitfit[group=query]", attention="longformer[window=4]", task="features", layers=1)
    assert {path for path, _ in trained(model)} == {"blocks.0.attn.q", "blocks.0.attn.q_global"}
    model = build(tiny, "bitfit[group=query]", attention="lsh", task="features", layers=1)
    assert {path for path, _ in trained(model)} == {"blocks.0.attn.qk"}


@pytest.mark.parametrize("residual", ["plain", "reversible"])
@pytest.mark.parametrize("attention", ["full", "longformer[window=4]"])
@pytest.mark.parametrize("spec", ["freeze[first=3]", "last[count=1]"])
def test_frozen_first_layers_store_no_activations(tiny, residual, attention, spec):
    """As many numbers are stored as in a model that has the upper layer alone."""
    more = {"name": "gpt2", "attention": attention, "residual": residual}
    upper = saved_in_training(build(tiny, "freeze[first=0]", layers=1, **more))
    assert saved_in_training(build(tiny, spec, layers=4, **more)) == upper > 0
    if residual == "plain":
        assert saved_in_training(build(tiny, "freeze[first=2]", layers=4, **more)) > upper


def test_the_head_alone_stores_only_what_it_reads_itself(tiny):
    model = build(tiny, "head", head_dense=False, pooling="mean")
    assert saved_in_training(model) <= 3 * 13 * D + 3 * D  # hidden states at most, and their mean


@pytest.mark.parametrize("name", ["minilm", "gpt2"])
@pytest.mark.parametrize("attention", ["full", "longformer[window=4]"])
def test_bitfit_stores_no_input_of_a_linear_layer(tiny, name, attention):
    """Exactly what backpropagation to the input through a frozen network stores, in which no weight and no bias asks
    for a gradient."""
    model, n = build(tiny, name=name, attention=attention, task="features"), 13
    model.requires_grad_(False).train()
    embeds = torch.randn(3, n, D, dtype=torch.float64, requires_grad=True)
    frozen = saved(model, lambda: model(inputs_embeds=embeds).last_hidden_state.sum())
    model.requires_grad_(True)
    everything = saved(model, lambda: model(inputs_embeds=embeds).last_hidden_state.sum())
    effzoo.attach(model, "bitfit")
    biases = saved(model, lambda: model(inputs_embeds=embeds.detach()).last_hidden_state.sum())
    lowest = saved(model, lambda: model(inputs_embeds=embeds).last_hidden_state.sum())
    assert biases <= lowest == frozen < everything
    # of q, k, v; of o or up; of down: at least these are stored when weights are trained
    linear_inputs = 4 * 3 * n * (2 * D + MLP)
    assert everything - frozen >= linear_inputs - 4 * 3 * n * D


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("last[count=5]", OptionError, "count=5 blocks, but this model has 4"),
        ("last[count=0]", OptionError, "count is at least 1"),
        ("freeze[first=5]", OptionError, "first=5 blocks, but this model has 4"),
        ("freeze[first=1.5]", OptionError, "first is in \\[0, 1\\), got 1.5"),
        ("freeze[first=-1]", OptionError, "got -1"),
        ("bitfit[group=keys]", OptionError, "group is one or several of all, strong, query"),
        ("bitfit[group=query, targets=attn.k]", OptionError, "not both"),
        ("norms[targets=attn.q]", TargetError, "norms hangs on Norm sites"),
        ("select[targets=attn.nope]", TargetError, "matches no role"),
    ],
)
def test_each_bad_selection_has_its_own_sentence(tiny, spec, error, said):
    with pytest.raises(error, match=said):
        build(tiny, spec)


def test_a_model_without_biases_is_told_to_train_its_norms(tiny):
    model = build(tiny, name="llama", kv_heads=1)
    with pytest.raises(
        TargetError, match="none has a bias .*; models without biases can train their norms instead: 'norms'"
    ):
        effzoo.attach(model, "bitfit")
    effzoo.attach(model, "norms")
    assert effzoo.account(model).trainable == (2 * 4 + 1) * D + sum(
        p.numel() for path, s in sites(model) if path == "head.out" for p in s.base().values()
    )


@pytest.mark.parametrize(
    ("spec", "rate"),
    [
        ("full", 5e-5),
        ("last", 5e-5),
        ("freeze", 5e-5),
        ("freeze[first=4]", 1e-3),
        ("norms", 1e-3),
        ("bitfit", 1e-3),
        ("head", 1e-3),
    ],
)
def test_the_default_learning_rate_is_that_of_the_method_and_heads_beside_it_have_their_own(tiny, spec, rate):
    rates = training.learning_rates(build(tiny, spec))
    own = {value for key, value in rates.items() if "head." not in key}
    assert (own or {1e-3}) == {rate}
    assert {value for key, value in rates.items() if "head." in key} == {1e-3}
