"""Swapping the attention of a model that has weights: what is kept is the very same, copies are copies, and the report
says it all."""

import pytest
import torch

import effzoo
from effzoo.errors import AdapterError, IncompatibleError, OptionError
from effzoo.peft.accounting import account


def ids(n=17):
    return torch.randint(53, (2, n))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("attention", [*effzoo.attention.names()])
def test_every_tensor_is_kept_copied_new_or_dropped(attention, tiny):
    """The report accounts for every attention tensor, and what it says holds bit for bit; everything else is
    untouched."""
    model = effzoo.build("bert", **tiny).double()
    before = snapshot(model)
    report = effzoo.swap_attention(model, attention)
    after = model.state_dict()
    ours = {key for key in after if ".attn." in key}
    assert ours == {*report.kept, *report.copied, *report.new} and len(ours) == len(report.kept) + len(
        report.copied
    ) + len(report.new)
    assert set(report.dropped) == {key for key in before if key not in after}
    assert all(torch.equal(after[key], before[key]) for key in report.kept)
    assert all(torch.equal(after[new], before[old]) for new, old in report.copied.items())
    assert all(torch.equal(after[key], before[key]) for key in before if ".attn." not in key)
    assert all(value.dtype == torch.float64 for value in after.values() if value.is_floating_point())
    assert model.config.attention == attention and all(core.name == attention for core in model.cores())
    fresh = effzoo.build("bert", **tiny, attention=attention).double()
    fresh.load_state_dict(after)  # the swapped model is a model of that attention
    x = ids()
    assert torch.equal(model.eval()(x).last_hidden_state, fresh.eval()(x).last_hidden_state)


def test_swapping_there_and_back_is_bit_exact(tiny):
    model = effzoo.build("bert", **tiny).eval()
    x, expected = ids(), snapshot(model)
    hidden = model(x).last_hidden_state
    for attention in ("longformer[window=4]", "linformer[k=8]", "full"):
        effzoo.swap_attention(model, attention)
    assert torch.equal(model(x).last_hidden_state, hidden) and snapshot(model).keys() == expected.keys()


def test_a_window_over_everything_and_global_rows_start_as_the_full_attention_they_come_from(tiny):
    """Longformer's global projections are copies, so that a token made global computes what full attention computes."""
    model = effzoo.build("bert", **tiny).double().eval()
    x = ids()
    expected = model(x).last_hidden_state
    effzoo.swap_attention(model, "longformer[window=2]")
    everything = model(x, global_attention_mask=torch.ones_like(x)).last_hidden_state
    assert (everything - expected).abs().max() < 1e-12
    effzoo.swap_attention(model, "longformer[window=64]")
    assert (model(x).last_hidden_state - expected).abs().max() < 1e-12


def test_linformer_starts_as_the_mean_over_segments(tiny):
    """E = F = mean over segments: attention over the segment means of keys and values."""
    model = effzoo.build("bert", **tiny | {"layers": 1}).double().eval()
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    attn = model.blocks[0].attn
    mask = effzoo.attention.Mask()
    q, k, v = (attn.project(name, x, mask) for name in "qkv")
    effzoo.swap_attention(model, "linformer[k=8]")
    means = [t.unflatten(2, (8, 8)).mean(dim=3) for t in (k, v)]
    expected = effzoo.attention.reference.dense(q, *means, torch.ones(64, 8, dtype=torch.bool))
    found = model.blocks[0].attn(x, mask)
    assert (found - attn.o(expected.transpose(1, 2).flatten(2))).abs().max() < 1e-12


def test_a_swapped_model_takes_adapters_and_trains(tiny):
    model = effzoo.build("bert", task="classification", **tiny)
    effzoo.swap_attention(model, "lsh[chunk=8]")
    effzoo.attach(model, "lora[targets=(attn.qk,attn.v,attn.o)]|prefix[length=2]")
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads) and account(model).trainable > 0


def test_per_layer_specs_and_frozen_weights_are_honoured(tiny):
    model = effzoo.build("bert", **tiny)
    model.requires_grad_(False)
    report = effzoo.swap_attention(model, ("full", "longformer[window=4]"))
    assert [core.name for core in model.cores()] == ["full", "longformer"]
    assert not any(p.requires_grad for p in model.parameters())
    text = str(report)
    assert "attention is now full | longformer[window=4]" in text and "attn.q_global.weight from q.weight" in text


def test_what_cannot_be_swapped_says_so_and_changes_nothing(tiny):
    model = effzoo.build("gpt2", task="causal_lm", **tiny)
    before = snapshot(model)
    with pytest.raises(IncompatibleError, match="'linformer' cannot be causal"):
        effzoo.swap_attention(model, "linformer")
    with pytest.raises(OptionError, match="3 attention specs for 2 layers"):
        effzoo.swap_attention(model, ("full",) * 3)
    effzoo.attach(model, "lora")
    with pytest.raises(AdapterError, match="merge or detach them, and attach anew"):
        effzoo.swap_attention(model, "longformer")
    effzoo.detach(model, "default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(IncompatibleError, match="got Linear"):
        effzoo.swap_attention(torch.nn.Linear(2, 2), "full")
