"""Doubles of torch's CUDA attention operators for the CPU: the same signatures, layouts and demands on memory, in the
dtype of the input.

They are what the operators' sources say (aten/native/transformers/cuda): the log-sum-exp is padded to 32 rows, with
infinity, and 0 for a row without keys; strides are multiples of 8 (half precision needs 8, single 4), those of a bias
of 16; backward, `out` is read as if it were dense.
"""

import contextlib
import functools
import math
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from effzoo.attention import backends
from effzoo.attention.cuda import FlashCuda

calls = []  # names of the operators that ran


def lie(*tensors, numbers=8):
    for x in tensors:
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(
            stride % numbers == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1
        ), x.stride()
        assert x.shape[-1] % 8 == 0 or numbers == 16


def scores_of(q, k, bias, causal, scale, window=None):
    """[g, heads, rows, keys]"""
    scores = torch.einsum("gmhd,gshd->ghms", q, k) * scale
    if bias is not None:
        assert bias.dtype == q.dtype and bias.shape == scores.shape
        lie(bias, numbers=16)
        scores = scores + bias
    gap = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = torch.zeros_like(gap, dtype=torch.bool)
    if causal:
        hidden |= gap < 0
    if window is not None:
        hidden |= (gap > window[0]) | (gap < -window[1])
    return scores.masked_fill(hidden, -math.inf)


def kept(scores, dropout, seed, offset):
    """1 / (1 - p) where a weight is kept, drawn from seed and offset and nothing else."""
    if dropout == 0:
        return torch.ones_like(scores)
    draw = torch.Generator().manual_seed(zlib.crc32(f"{int(seed)} {int(offset)}".encode()))
    return (torch.rand(scores.shape, generator=draw) >= dropout).to(scores.dtype) / (1 - dropout)


def drawn():
    """Seed and offset of the default generator, which moves on; one that was just seeded stands at 0."""
    seed, state = torch.initial_seed(), torch.get_rng_state()
    fresh = torch.equal(state, torch.Generator().manual_seed(seed).get_state())
    torch.rand(1)
    return torch.tensor(seed % 2**63), torch.tensor(0 if fresh else zlib.crc32(state.numpy().tobytes()))


def softmax(scores):
    """Weights, 0 in a row without keys, and the log-sum-exp, 0 there."""
    lse = scores.logsumexp(dim=-1)
    dead = lse == -math.inf
    lse = lse.masked_fill(dead, 0.0)
    return (scores - lse[..., None]).exp(), lse


def gradients(grad, q, k, v, out, scores, lse, mask, scale):
    out = out.as_strided(
        out.shape, (out.shape[1] * out.shape[2] * out.shape[3], out.shape[2] * out.shape[3], *out.stride()[2:])
    )
    weights = (scores - lse[..., None]).exp()
    of_weights = torch.einsum("gmhe,gshe->ghms", grad, v) * mask
    delta = (grad * out).sum(-1).transpose(1, 2)
    of_scores = weights * (of_weights - delta[..., None]) * scale
    found = (
        torch.einsum("ghms,gshd->gmhd", of_scores, k), torch.einsum("ghms,gmhd->gshd", of_scores, q),
        torch.einsum("ghms,gmhe->gshe", weights * mask, grad),
    )  # fmt: skip
    return tuple(x.contiguous() for x in found)


def efficient_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    calls.append("efficient forward")
    lie(query, key, value)
    assert compute_log_sumexp
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = scores_of(q, k, attn_bias, is_causal, scale)
    weights, lse = softmax(scores)
    seed, offset = drawn() if dropout_p else (torch.tensor(0), torch.tensor(0))
    out = (
        torch.einsum("ghms,gshe->gmhe", weights * kept(scores, dropout_p, seed, offset), v).contiguous().transpose(1, 2)
    )
    return out, torch.nn.functional.pad(lse, (0, -query.shape[2] % 32), value=math.inf), seed, offset


def efficient_backward(
    grad_out_,
    query,
    key,
    value,
    attn_bias,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    dropout_p,
    grad_input_mask,
    is_causal=False,
    *,
    scale=None,
):
    calls.append("efficient backward")
    lie(query, key, value)
    rows = query.shape[2]
    assert list(grad_input_mask) == [True, True, True, False]
    assert (
        logsumexp.is_contiguous() and logsumexp.shape[2] % 32 == 0 and bool((logsumexp[..., rows:] == math.inf).all())
    )
    assert logsumexp.dtype == torch.promote_types(query.dtype, torch.float32)
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_out_, query, key, value, out))
    scores = scores_of(q, k, attn_bias, is_causal, scale)
    mask = kept(scores, dropout_p, philox_seed, philox_offset)
    found = gradients(grad, q, k, v, out, scores, logsumexp[..., :rows], mask, scale)
    return *(x.transpose(1, 2) for x in found), None


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    calls.append("flash forward" if window_size_left is None else "flash forward with a window")
    lie(query, key, value)
    assert query.shape[3] == key.shape[3] == value.shape[3] and (not is_causal or max_q == max_k)
    window = None if window_size_left is None else (window_size_left, window_size_right)
    scores = scores_of(query, key, None, is_causal, scale, window)
    weights, lse = softmax(scores)
    state = torch.stack(drawn()).view(torch.uint64) if dropout_p else torch.zeros(2, dtype=torch.uint64)
    out = torch.einsum("ghms,gshe->gmhe", weights * kept(scores, dropout_p, *state), value).contiguous()
    return out, lse, state, torch.zeros((), dtype=torch.uint64), query.new_empty(0)


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    calls.append("flash backward")
    lie(grad_out, query, key, value, out)
    assert logsumexp.is_contiguous() and rng_state.shape == (2,) and rng_state.dtype == unused.dtype == torch.uint64
    window = None if window_size_left is None else (window_size_left, window_size_right)
    scores = scores_of(query, key, None, is_causal, scale, window)
    return gradients(
        grad_out, query, key, value, out.contiguous(), scores, logsumexp, kept(scores, dropout_p, *rng_state), scale
    )


class LowerTriangularMask:
    """As in `xformers.ops`."""

    bias = None

    def add_bias(self, bias):
        made = LowerTriangularMask()
        made.bias = bias
        return made


@dataclass
class LocalAttentionFromBottomRightMask:
    """As in `xformers.ops.fmha.attn_bias`."""

    window_left: int
    window_right: int


def xformers_mask(mask):
    """Bias, triangle and window."""
    if isinstance(mask, LocalAttentionFromBottomRightMask):
        return None, False, (mask.window_left, mask.window_right)
    return (mask.bias, True, None) if isinstance(mask, LowerTriangularMask) else (mask, False, None)


def xformers_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    calls.append("xformers forward")
    lie(query, key, value)
    assert p == 0 and op is None and output_dtype is None
    bias, causal, window = xformers_mask(attn_bias)
    assert window is None or query.shape[1] == key.shape[1]  # its windows are aligned to the last key
    weights, lse = softmax(scores_of(query, key, bias, causal, scale, window))
    return torch.einsum("ghms,gshe->gmhe", weights, value).contiguous(), torch.nn.functional.pad(
        lse, (0, -query.shape[1] % 32), value=math.inf
    )


def xformers_backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    calls.append("xformers backward")
    lie(grad, output, query, key, value)
    assert (
        p == 0 and op is None and lse.shape[:-1] == (query.shape[0], query.shape[2]) and lse.shape[-1] >= query.shape[1]
    )
    scores = scores_of(query, key, *xformers_mask(attn_bias)[:2], scale, xformers_mask(attn_bias)[2])
    return gradients(
        grad, query, key, value, output, scores, lse[..., : query.shape[1]], torch.ones_like(scores), scale
    )


XFORMERS = SimpleNamespace(
    memory_efficient_attention_forward_requires_grad=xformers_forward,
    memory_efficient_attention_backward=xformers_backward,
    LowerTriangularMask=LowerTriangularMask,
    fmha=SimpleNamespace(
        attn_bias=SimpleNamespace(LocalAttentionFromBottomRightMask=LocalAttentionFromBottomRightMask)
    ),
)


@functools.cache
def registered():
    """The doubles as the operators' kernels for the CPU, which has none."""
    library = torch.library.Library("aten", "IMPL")
    for name, run in (
        ("_scaled_dot_product_efficient_attention", efficient_forward),
        ("_scaled_dot_product_efficient_attention_backward", efficient_backward),
        ("_flash_attention_forward", flash_forward), ("_flash_attention_backward", flash_backward),
    ):  # fmt: skip
        library.impl(name, run, "CPU")
    return library


@contextlib.contextmanager
def on(backend):
    """Where this backend runs: "efficient" and "flash on CUDA" and "xformers" by their doubles, in any dtype. Gives the
    name that `attend` knows."""
    with pytest.MonkeyPatch.context() as patched:
        calls.clear()
        if backend in ("efficient", "flash on CUDA"):
            registered()
        if backend == "efficient":
            patched.setitem(backends.TAKES, ("efficient", "cpu"), backends.ALL)
        if backend == "xformers":
            patched.setitem(backends.TAKES, ("xformers", "cpu"), backends.ALL)
            patched.setattr(backends.xformers, "installed", lambda: True)
            patched.setattr(backends.xformers, "ops", lambda: XFORMERS)
        if backend == "flash on CUDA":
            patched.setitem(backends.FLASH, "cpu", FlashCuda)
            patched.setattr(backends, "has_no_flash", lambda device: "")
        if backend == "flex with gradients":  # its backward pass is for CUDA; eager, it can be followed on the CPU
            patched.setattr(flex_attention, "_validate_device", lambda *given: None)
            patched.setattr(backends.flex, "obstacle", lambda parts: "")
        yield backend.split()[0]
