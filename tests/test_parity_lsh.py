"""The Reformer's layers against transformers, and bucket mask and duplicate correction against reformer-pytorch: same
weights, same rotations."""

import logging

import pytest
import torch
from reformer_pytorch.reformer_pytorch import LSHAttention
from torch.nn import functional as F
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention, ReformerLayer

import effzoo
from effzoo.attention import Context, Mask
from effzoo.blocks import Block, Slots
from effzoo.spec import parse_one

logging.getLogger("transformers").setLevel(logging.ERROR)  # it announces the number of buckets that it chose
HEADS, WIDTH, DIM = 2, 8, 12


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def their_config(**changed):
    defaults = {
        "hidden_size": DIM, "num_attention_heads": HEADS, "attention_head_size": WIDTH, "hash_seed": 5,
        "num_buckets": 4, "num_hashes": 1,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "lsh_attention_probs_dropout_prob": 0.0,
        "is_decoder": False,
        "local_attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "max_position_embeddings": 64,
    }  # fmt: skip
    return ReformerConfig(**{**defaults, **changed})


def their_rotations(config, dtype=torch.float64):
    """What HF draws: it seeds torch's generator before it hashes, then [heads, head_dim, rounds, buckets / 2]."""
    buckets = [config.num_buckets] if isinstance(config.num_buckets, int) else config.num_buckets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.hash_seed)
        drawn = torch.randn(
            config.num_attention_heads, config.attention_head_size, config.num_hashes, sum(buckets) // 2, dtype=dtype
        )
    return drawn.permute(2, 0, 1, 3)


def our_core(spec, config, **changed):
    spec = {"circular": True, **spec}
    context = Context(
        heads=config.num_attention_heads,
        head_dim=config.attention_head_size,
        causal=config.is_decoder,
        max_length=64,
        **changed,
    )
    core = effzoo.attention.create(spec, context)
    if core.name == "lsh":
        core.rotate_by(their_rotations(config))
    return core


def lsh_spec(config):
    return {
        "name": "lsh", "chunk": config.lsh_attn_chunk_length, "rounds": config.num_hashes,
        "buckets": config.num_buckets,
        "look_back": config.lsh_num_chunks_before, "look_forward": config.lsh_num_chunks_after,
    }  # fmt: skip


def local_spec(config):
    return {
        "name": "local", "chunk": config.local_attn_chunk_length,
        "look_back": config.local_num_chunks_before, "look_forward": config.local_num_chunks_after,
    }  # fmt: skip


def split(x):
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def assert_agree(ours, theirs, inputs, valid=None, tolerance=1e-10):
    """Outputs and gradients of the inputs at tokens: what stands at padding has no meaning in either."""
    direction = random(77, *ours.shape)
    if valid is not None:
        direction = direction * valid.unsqueeze(-1)
    mine, other = (torch.autograd.grad(out, inputs, direction, retain_graph=True) for out in (ours, theirs))
    here = torch.ones_like(ours[..., 0]).bool() if valid is None else valid
    assert theirs[here].abs().max() > 0.1 and (ours - theirs)[here].abs().max() < tolerance
    for x, y in zip(mine, other, strict=True):
        assert y.abs().max() > 0.1 and (x - y).abs().max() < tolerance


LSH_CASES = [
    {},
    {"num_hashes": 3},
    {"num_hashes": 3, "num_buckets": [2, 4]},
    {"num_hashes": 2, "num_buckets": [2, 2, 4], "lsh_num_chunks_before": 0},
    {"num_hashes": 2, "lsh_num_chunks_before": 1, "lsh_num_chunks_after": 1},
    {"num_hashes": 4, "num_buckets": 8, "lsh_num_chunks_before": 2, "lsh_num_chunks_after": 1},
    {"lsh_attn_chunk_length": 32},
    {"lsh_attn_chunk_length": 8, "num_buckets": 2, "num_hashes": 2},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", LSH_CASES, ids=str)
def test_lsh_equals_transformers(case, padded, causal):
    config = their_config(is_decoder=causal, **case)
    layer = LSHSelfAttention(config, layer_idx=0).double().eval()
    x = random(1, 3, 32, DIM).requires_grad_()
    valid = torch.arange(32) < torch.tensor([32, 21, 6])[:, None] if padded else None
    theirs = layer(x, attention_mask=valid).hidden_states
    core = our_core(lsh_spec(config), config)
    ours = joined(core(split(layer.query_key(x)), split(layer.value(x)), mask=Mask(valid)))
    assert_agree(ours, theirs, [x, layer.query_key.weight, layer.value.weight], valid)


def test_padding_between_tokens_is_sorted_as_in_transformers():
    config = their_config(num_hashes=2)
    layer = LSHSelfAttention(config, layer_idx=0).double().eval()
    x = random(1, 3, 32, DIM).requires_grad_()
    valid = torch.rand(3, 32, generator=torch.Generator().manual_seed(3)) < 0.6
    theirs = layer(x, attention_mask=valid).hidden_states
    core = our_core(lsh_spec(config), config)
    assert_agree(joined(core(split(layer.query_key(x)), split(layer.value(x)), mask=Mask(valid))), theirs, [x], valid)


@pytest.mark.parametrize("n", [32, 64])
def test_the_automatic_number_of_buckets_is_that_of_transformers_at_full_length(n):
    for chunk in (2, 4, 16):
        config = their_config(num_buckets=None, lsh_attn_chunk_length=chunk, max_position_embeddings=n)
        LSHSelfAttention(config, layer_idx=0)(torch.randn(1, n, DIM))
        theirs = (config.num_buckets,) if isinstance(config.num_buckets, int) else tuple(config.num_buckets)
        assert (
            effzoo.attention.create(f"lsh[chunk={chunk}]", Context(heads=2, head_dim=4, max_length=n)).factors == theirs
        )


def test_transformers_looks_back_in_a_ring_and_we_do_so_only_when_asked():
    """The last chunk is seen from the first in HF; without `circular` it is not."""
    config = their_config()
    layer = LSHSelfAttention(config, layer_idx=0).double().eval()
    x = random(1, 1, 32, DIM)
    theirs = layer(x).hidden_states
    core = our_core({**lsh_spec(config), "circular": False}, config)
    off = (joined(core(split(layer.query_key(x)), split(layer.value(x)), mask=Mask())) - theirs).abs().amax(
        dim=(0, 2)
    ) > 1e-10
    first = core._buckets(split(layer.query_key(x)), Mask()).sort(dim=-1, stable=True).indices[..., :4].flatten()
    assert set(off.nonzero().flatten().tolist()) <= set(first.tolist()) and off.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("before, after", [(1, 0), (0, 0), (1, 1), (2, 3)])
@pytest.mark.parametrize("chunk", [4, 32])
def test_local_equals_transformers(chunk, before, after, padded, causal):
    config = their_config(
        local_attn_chunk_length=chunk, local_num_chunks_before=before, local_num_chunks_after=after, is_decoder=causal
    )
    layer = LocalSelfAttention(config, layer_idx=0).double().eval()
    x = random(1, 3, 32, DIM).requires_grad_()
    valid = torch.arange(32) < torch.tensor([32, 21, 27])[:, None] if padded else None
    theirs = layer(x, attention_mask=valid).hidden_states
    core = our_core(local_spec(config), config)
    ours = joined(core(*(split(linear(x)) for linear in (layer.query, layer.key, layer.value)), mask=Mask(valid)))
    # HF spreads a row that sees nothing over masked keys, ours is 0
    sees = core.pattern(32, Mask(valid)).any(dim=-1)[:, 0].expand(3, -1)
    assert_agree(
        ours,
        theirs,
        [x, layer.query.weight, layer.key.weight, layer.value.weight],
        sees if valid is None else sees & valid,
    )


INTEGRATION = {
    "lsh_layer_forward": {"attn_layers": ["lsh"], "lsh_num_chunks_before": 0, "is_decoder": False},
    "lsh_layer_forward_complex": {"attn_layers": ["lsh"], "lsh_num_chunks_before": 0, "num_buckets": [2, 4]},
    "local_layer_forward": {"attn_layers": ["local"], "local_num_chunks_before": 0, "is_decoder": False},
    "local_layer_forward_complex": {"attn_layers": ["local"], "local_num_chunks_before": 0},
    "lsh_model_layer": {"attn_layers": ["lsh"], "num_buckets": [2, 4]},
    "local_model_layer": {"attn_layers": ["local"]},
    "lm_model_lsh_layer": {"attn_layers": ["lsh"], "num_buckets": [2, 4], "is_decoder": False},
    "lsh_lm_model_grad_layer": {"attn_layers": ["lsh"], "num_buckets": [2, 4], "num_hashes": 6},
}


@pytest.mark.parametrize("n", [4, 32])
@pytest.mark.parametrize("case", INTEGRATION)
def test_the_integration_cases_of_transformers_give_the_same_whole_layer(case, n):
    """HF's layer as its tests build it (seed 0, hash_seed 0, sizes of its test file), our block with its weights: both
    streams, float64."""
    changed = {
        "attn_layers": ["lsh"],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "is_decoder": True,
        **INTEGRATION[case],
    }
    sizes = {
        "hidden_size": 16,
        "feed_forward_size": 32,
        "hidden_act": "gelu",
        "hash_seed": 0,
        "num_buckets": 2,
        "max_position_embeddings": 32,
    }
    axial = {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [8, 8]}
    config = their_config(**{**sizes, **axial, **changed})
    torch.manual_seed(0)
    layer = ReformerLayer(config, 0).double().eval()
    kind = lsh_spec(config) if config.attn_layers == ["lsh"] else local_spec(config)
    spec = parse_one({"circular": True, **kind})
    context = Context(heads=2, head_dim=8, causal=config.is_decoder, max_length=32)
    block = (
        Block(Slots(dim=16, mlp=32, norm="pre", eps=1e-12, attn_bias=False, attn_out_bias=False), spec, context)
        .double()
        .eval()
    )
    theirs, attn = layer.attention.self_attention, block.attn
    pairs = {"qk": "query_key", "q": "query", "k": "key", "v": "value"}
    for mine, other in (
        *((getattr(attn, name), getattr(theirs, pairs[name])) for name in attn.core.projections),
        (attn.o, layer.attention.output.dense),
        (block.attn_norm, layer.attention.layer_norm),
        (block.mlp_norm, layer.feed_forward.layer_norm),
        (block.mlp.up, layer.feed_forward.dense.dense),
        (block.mlp.down, layer.feed_forward.output.dense),
    ):
        torch.nn.init.normal_(other.weight, std=0.5)
        mine.load_state_dict(other.state_dict())
    if attn.core.name == "lsh":
        attn.core.rotate_by(their_rotations(config))
    first, second = (random(i, 2, n, 16).requires_grad_() for i in (1, 2))
    valid = (
        (torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.7) | (torch.arange(n) == 0)
        if "complex" in case
        else None
    )
    # without gradient: its parts give that
    whole = layer(prev_attn_output=first, hidden_states=second, attention_mask=valid)
    their_y1 = first + layer.attention(second, attention_mask=valid).hidden_states
    their_y2 = second + layer.feed_forward(their_y1)
    assert torch.equal(whole.attn_output, their_y1) and torch.equal(whole.hidden_states, their_y2)
    y1 = first + block.attend(block.attn_norm(second), Mask(valid))
    y2 = second + block.feed(block.mlp_norm(y1), Mask(valid))
    assert_agree(y1, their_y1, [first, second], valid)
    assert_agree(y2, their_y2, [first, second], valid)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds, chunk", [(1, 4), (3, 4), (4, 8), (2, 16)])
@pytest.mark.parametrize("once", [False, True])
def test_bucket_mask_and_duplicate_correction_equal_reformer_pytorch(once, rounds, chunk, causal, monkeypatch):
    """It divides logits by sqrt(d) more, so ours gets qk / sqrt(d); its key norm gets our epsilon, so that 1e-10 can be
    asked.

    It takes the logarithm of N in float32, so 1e-6 with the correction. Without the bucket mask it counts pairs across
    the ring as N = 0 and adds log(1e9) to their logits, so duplicate correction is compared under the bucket mask.
    """
    monkeypatch.setattr(F, "normalize", lambda x, p, dim: x * ((x * x).mean(-1, keepdim=True) + 8e-6).rsqrt() / 8**0.5)
    qk, v = (random(i, 3, 32, 8).requires_grad_() for i in (1, 2))
    module = LSHAttention(
        bucket_size=chunk, n_hashes=rounds, causal=causal, attend_across_buckets=False,
        allow_duplicate_attention=not once
    ).eval()  # fmt: skip
    torch.manual_seed(9)
    theirs = module(qk, v)[0]
    torch.manual_seed(9)
    drawn = torch.randn(1, 8, rounds, 32 // chunk // 2, dtype=torch.float64).permute(2, 0, 1, 3)
    spec = {
        "name": "lsh",
        "rounds": rounds,
        "chunk": chunk,
        "buckets": 32 // chunk,
        "within_buckets": True,
        "count_once": once,
        "circular": True,
    }
    core = effzoo.attention.create(spec, Context(heads=1, head_dim=8, causal=causal))
    core.rotate_by(drawn)
    ours = core(qk[:, None] / 8**0.5, v[:, None], mask=Mask())[:, 0]
    assert_agree(ours, theirs, [qk, v], tolerance=1e-6 if once else 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_across_buckets_equals_reformer_pytorch(causal, monkeypatch):
    monkeypatch.setattr(F, "normalize", lambda x, p, dim: x * ((x * x).mean(-1, keepdim=True) + 8e-6).rsqrt() / 8**0.5)
    qk, v = (random(i, 3, 32, 8).requires_grad_() for i in (1, 2))
    torch.manual_seed(9)
    theirs = LSHAttention(bucket_size=4, n_hashes=3, causal=causal)(qk, v)[0]
    torch.manual_seed(9)
    core = effzoo.attention.create(
        "lsh[rounds=3,chunk=4,buckets=8,circular=true]", Context(heads=1, head_dim=8, causal=causal)
    )
    core.rotate_by(torch.randn(1, 8, 3, 4, dtype=torch.float64).permute(2, 0, 1, 3))
    assert_agree(core(qk[:, None] / 8**0.5, v[:, None], mask=Mask())[:, 0], theirs, [qk, v])
