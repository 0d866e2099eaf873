"""What is made again for the backward pass is the same to the last bit, and less is kept."""

import copy

import pytest
import torch
from torch.nn import functional as F

import effzoo
from effzoo.errors import OptionError
from effzoo.recompute import check_level, follows, made_again, recompute

SPECS = (
    "full",
    "lora",
    "lora[targets=(attn.q, mlp.up, mlp.down), dropout=0.3]",
    "bitfit",
    "ia3",
    "houlsby",
    "prefix[length=2]",
    "dora",
    "adamix",
    "ladder",
    "norms",
)
SHAPES = {
    "post": {},
    "pre": {"norm": "pre"},
    "gated": {"norm": "pre", "norm_kind": "rms", "gated": True},
    "chunked": {"mlp_chunk": 4},
}
BATCH = {"input_ids": torch.arange(5, 31).view(2, 13), "labels": torch.tensor([0, 1])}


def kept(run):
    """The result, and bytes that autograd keeps of it, each storage once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return out, sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def gradients(model, again, autocast=False):
    model.recompute = again
    own = sum(p.untyped_storage().nbytes() for p in model.parameters())
    torch.manual_seed(5)  # dropout
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, size = kept(lambda: model(**BATCH).loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, trained, allow_unused=True), size - own


@pytest.mark.cover()
@pytest.mark.parametrize(
    ("level", "autocast"), [("hidden", False), ("hidden", True), ("blocks", False), ("blocks", True)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_bit_identical_and_less_is_kept(tiny, spec, shape, level, autocast):
    sizes = {**tiny, **SHAPES[shape], "mlp": 64, "dropout": 0.1}
    model = effzoo.build("bert", peft=spec, task="classification", num_labels=2, **sizes).train()
    loss, plain, whole = gradients(model, "nothing", autocast)
    other, again, less = gradients(model, level, autocast)
    assert torch.equal(loss, other)
    for one, two in zip(plain, again, strict=True):
        assert one is two is None or torch.equal(one, two)
    assert less < whole or spec == "ladder" or "dropout" in spec  # of its own inputs


def test_hidden_units_are_not_kept(tiny):
    """Of the feed-forward nothing as wide as its hidden units stays."""
    model = effzoo.build(
        "bert", peft="lora", task="classification", num_labels=2, **{**tiny, "mlp": 160, "layers": 3}
    ).train()
    model.recompute = "hidden"
    shapes = []

    def pack(tensor):
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**BATCH)
    assert shapes and not any(160 in shape and 13 in shape for shape in shapes)


def test_a_second_backward_pass_and_a_deep_copy_work(tiny):
    model = effzoo.build("bert", peft="lora", task="classification", num_labels=2, **tiny).train()
    model.recompute = "hidden"
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**BATCH).loss
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, trained), strict=True):
        assert torch.equal(one, two)
    copy.deepcopy(model)(**BATCH).loss.backward()


def test_a_parameter_that_was_stepped_before_the_backward_pass_is_told(tiny):
    model = effzoo.build("bert", peft="bitfit", task="classification", num_labels=2, **tiny).train()
    model.recompute = "hidden"
    loss = model(**BATCH).loss
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    with pytest.raises(
        RuntimeError, match="was modified between the forward and the backward pass|modified by an inplace operation"
    ):
        loss.backward()


def test_a_tensor_that_was_changed_in_place_is_kept_as_it_is():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    with recompute():
        with made_again():
            y = F.silu(x)
        y.mul_(2)
        out = (y * w).sum()
    out.backward()
    assert torch.allclose(w.grad, 2 * F.silu(x).sum(dim=0))


def test_views_of_what_is_made_again_are_the_same_views():
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6)
    with recompute():
        with made_again(products=True):
            y = F.linear(x, w)
        parts = y.view(4, 2, 3).transpose(0, 1)
        loss = (parts[1] * parts[0].exp()).sum()
    expected = F.linear(x, w).view(4, 2, 3).transpose(0, 1)
    (wanted,) = torch.autograd.grad((expected[1] * expected[0].exp()).sum(), x)
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


def test_nothing_is_held_when_no_one_needs_it():
    """What a tensor was made of is let go with it."""
    import weakref

    with recompute():
        x = torch.randn(5, requires_grad=True).clone()
        with made_again(products=True):
            y = follows(x.neg(), torch.neg, x)
        gone = weakref.ref(x)
        del x, y
        with made_again():
            F.gelu(torch.randn(2, requires_grad=True))
        assert gone() is None


def test_hooks_outside_are_given_what_is_really_kept():
    x = torch.randn(7, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t), recompute():
        with made_again():
            y = F.gelu(x)
        z = (y * torch.randn(3, 7)).sum()
    assert torch.Size([3, 7]) in seen
    z.backward()
    assert x.grad is not None


def test_gradient_checkpointing_is_a_level(tiny):
    """What users of transformers write, and what said the same before."""
    for name in ("bert", "perceiver-io"):
        sizes = {
            key: value
            for key, value in tiny.items()
            if name == "bert" or key in ("dim", "heads", "mlp", "vocab", "max_length")
        }
        model = effzoo.build(name, task="classification", **sizes)
        model.recompute = "hidden"
        model.gradient_checkpointing_disable()
        assert model.recompute == "hidden" and not model.checkpointing
        model.gradient_checkpointing_enable()
        assert model.recompute == "blocks" and model.checkpointing
        model.gradient_checkpointing_disable()
        assert model.recompute == "nothing"
        with pytest.raises(
            OptionError, match="checkpointing is one level of recompute now: model.recompute = 'blocks'"
        ):
            model.checkpointing = True
    with pytest.raises(OptionError, match="'projections' is no longer one of its levels; 'blocks' stores less"):
        check_level("projections")


def inside(level, run):
    with recompute(level), made_again():
        return run()


def test_what_is_kept_anyway_is_not_kept_twice():
    """relu keeps its own result; a product keeps the factor that the gradient of the other one needs, and a slice is
    less than the whole."""
    x, w = torch.randn(50, 40, requires_grad=True), torch.randn(50, 40, requires_grad=True)
    for run in (
        lambda: F.relu(x * 2).square(),
        lambda: (x.exp() * w.exp()).square(),
        lambda: (x * 2).index_select(1, torch.arange(3)).square(),
    ):
        sizes = []
        for level in ("nothing", "hidden"):
            sizes.append(kept(lambda run=run, level=level: inside(level, run))[1])
        assert sizes[1] <= sizes[0]
