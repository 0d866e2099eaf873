"""Capped scores, c tanh(s / c) (Gemma 2, arXiv:2408.00118, section 2): every backend that has them equals the
definition, forward and backward, and the others refuse."""

import pytest
import torch

import effzoo
from effzoo.attention import Cache, Part, attend, choose
from effzoo.attention.core import Context, Mask
from effzoo.attention.dropped import Weights
from effzoo.attention.part import Tile
from effzoo.blocks.attention import Attention
from effzoo.errors import IncompatibleError, OptionError
from effzoo.registry import attention as registry
from effzoo.spec import parse_one

CAP = 0.8
KINDS = (
    "full",
    "longformer[window=6]",
    "longformer[window=4, dilation=(1, 2)]",
    "local[chunk=4]",
    "blockwise[blocks=2]",
    "streaming[window=3, sinks=2]",
)


def written_out(q, k, v, allowed):
    """softmax(c tanh(q k^T / (c sqrt(d)))) v, in plain torch."""
    scores = CAP * torch.tanh(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 / CAP)
    weights = torch.exp(scores.masked_fill(~allowed, float("-inf")))
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300) @ v


def core_of(spec, causal, **more):
    more = {"score_cap": CAP, "heads": 2, "head_dim": 5, "causal": causal, "max_length": 32} | more
    return registry.create(parse_one(spec), Context(**more))


def inputs(core, n=13, batch=2, dtype=torch.float64):
    """Large enough that the cap matters; every projection the kind takes."""
    drawn = [2 * torch.randn(batch, 2, n, 5, dtype=dtype) for _ in core.projections]
    return [x.requires_grad_() for x in drawn]


def padded(n=13):
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, n - 4 :] = False
    return Mask(valid)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "blocks", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_formula_forward_and_backward(kind, backend, causal, padding):
    torch.manual_seed(0)
    core, mask = core_of(kind, causal, backend=backend), padded() if padding else Mask()
    q, k, v = projected = inputs(core)[:3]
    allowed = core.pattern(13, mask).expand(2, 2, 13, 13)
    given = [*projected, *inputs(core)[3:]]
    kept = allowed.any(dim=-1)[..., None] if mask.valid is None else mask.valid[:, None, :, None]
    results = []
    for out in (core(*given, mask=mask), core.dense(*given, mask=mask), written_out(q, k, v, allowed)):
        results.append([out * kept, *torch.autograd.grad((out * kept).pow(3).sum(), (q, k, v))])
    for found in results[:2]:
        for mine, expected in zip(found, results[2], strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)
    plain = core_of(kind, causal, score_cap=0.0)(*given, mask=mask) * kept
    assert (plain - results[2][0]).abs().max() > 1e-3


def test_global_tokens_and_a_memory_are_capped_as_well():
    torch.manual_seed(1)
    core = core_of("longformer[window=4]", False)
    is_global = torch.zeros(2, 13, dtype=torch.bool)
    is_global[0, 3] = is_global[1, 0] = True
    mask, projected = Mask(is_global=is_global), inputs(core)
    memory = tuple(torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    found, expected = core(*projected, mask=mask, memory=memory), core.dense(*projected, mask=mask, memory=memory)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    of_each = [torch.autograd.grad(out.pow(2).sum(), [*projected, *memory]) for out in (found, expected)]
    for mine, theirs in zip(*of_each, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_flex_caps_below_its_block_mask_and_below_a_bias():
    torch.manual_seed(2)
    for kind in ("full", "longformer[window=4, global_projections=false]"):
        core = core_of(kind, True, backend="flex", head_dim=16)
        q, k, v = (2 * torch.randn(2, 2, 13, 16) for _ in range(3))
        with torch.no_grad():
            torch.testing.assert_close(
                core(q, k, v, mask=padded()), core.dense(q, k, v, mask=padded()), rtol=1e-5, atol=1e-5
            )
    bias = torch.randn(2, 1, 13, 13)
    with torch.no_grad():
        found = attend(Part(q, k, v, bias, cap=CAP), backend="flex")
        torch.testing.assert_close(
            found, attend(Part(q, k, v, bias, cap=CAP), backend="reference"), rtol=1e-5, atol=1e-5
        )


def test_dropped_weights_have_the_gradient_of_the_capped_formula():
    """The mask of the weights is drawn from a seed, so numbers show the derivative."""
    torch.manual_seed(3)
    kernel = Weights(0.3, 5, None, CAP)
    q, k, v = (2 * torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 1, 1, 7, dtype=torch.float64)
    out, lse = kernel.forward(Tile(q, k, v, bias, False), 0)
    grad = torch.randn_like(out)
    found = kernel.backward(Tile(q, k, v, bias, False), 0, grad, out, lse)
    for number, x in enumerate((q, k, v)):
        for place in [(0, 0, 2, 1), (0, 1, 6, 3)]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = x.clone()
                moved[place] += step
                given = [moved if i == number else y for i, y in enumerate((q, k, v))]
                ends.append((kernel.forward(Tile(*given, bias, False), 0)[0] * grad).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - found[number][place]) < 1e-7


def test_which_backend_takes_a_cap_and_which_does_not():
    part = Part(*(torch.randn(1, 2, 6, 4) for _ in range(3)), cap=CAP)
    name, why = choose((part,), 0.0)
    assert name == "blocks" and "not 'flash': it has no cap of the scores, and score_cap is 0.8" in why
    with pytest.raises(
        OptionError, match=r"'flash' cannot run here: it has no cap of the scores, and score_cap is 0\.8"
    ):
        attend(part, backend="flash")
    with pytest.raises(IncompatibleError, match="'linformer' has no cap of its scores"):
        effzoo.build("bert", attention="linformer[k=4]", score_cap=1.0, layers=1, dim=8, heads=2, mlp=8, max_length=16)
    with pytest.raises(IncompatibleError, match="one projection for queries and keys"):
        Attention(8, parse_one("lsh[chunk=4]"), Context(heads=2, head_dim=4, max_length=16), score_dim=2.0)
    with pytest.raises(IncompatibleError, match="'linear' divides q . k by nothing, got score_dim=2"):
        Attention(8, parse_one("linear"), Context(heads=2, head_dim=4, max_length=16), score_dim=2.0)


@pytest.mark.parametrize("attention", ["full", "longformer[window=4, global_projections=false]"])
def test_decoding_compiled_code_and_shown_weights_are_those_of_the_model(attention):
    torch.manual_seed(4)
    sizes = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 1, "mlp": 8, "vocab": 19, "max_length": 32, "head_dim": 8}
    model = effzoo.build(
        "gemma2", task="causal_lm", attention=attention, score_cap=0.3, score_dim=3.0, pad_token=0, **sizes
    )
    for parameter in model.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    ids = torch.randint(1, 19, (2, 11))
    with torch.no_grad():
        whole, cache = model(ids, output_attentions=True), Cache()
        steps = [
            model(ids[:, :5], cache=cache).logits,
            *(model(ids[:, n : n + 1], cache=cache).logits for n in range(5, 11)),
        ]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, atol=1e-5, rtol=1e-4)
    assert whole.logits.abs().max() <= 30.0
    x = torch.randn(2, 11, 16)
    mask = Mask(position_ids=torch.arange(11)[None])
    layer = model.blocks[0].attn
    q, k, v = (layer.project(name, x, mask) for name in "qkv")
    weights = whole.attentions[0]
    # with scores in [-c, c] no weight is more than exp(2 c) times another that the query sees
    seen = weights > 0
    ratio = weights.amax(dim=-1) / weights.masked_fill(~seen, 2.0).amin(dim=-1)
    assert ratio.max() <= 2.7183 ** (2 * 0.3) + 1e-4
    scores = 0.3 * torch.tanh(q @ k.mT / 8**0.5 / 0.3)
    allowed = layer.core.pattern(11, mask)
    expected = layer.o((scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "longformer[window=4, global_projections=false]"])
def test_compiled_code_caps_forward_and_backward(kind):
    torch.manual_seed(5)
    core, mask = core_of(kind, True), padded()
    projected = inputs(core)[:3]
    compiled = torch.compile(lambda q, k, v: core(q, k, v, mask=mask), fullgraph=True)
    found, expected = compiled(*projected), core.dense(*projected, mask=mask)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    of_each = [torch.autograd.grad(out[0].pow(2).sum(), projected) for out in (found, expected)]
    for mine, theirs in zip(*of_each, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
