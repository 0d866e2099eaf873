"""The band of a sliding window: its tiles against the definition, and the gradients of overlapping keys against the law
of adjoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effzoo.attention import band as module
from effzoo.attention import reference
from effzoo.attention.band import Predicate, Window, cut
from effzoo.attention.kernel import attend
from effzoo.attention.part import Part
from effzoo.attention.tiles import Tiles
from tests.doubles import calls, on

SHAPES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 300),
        "left": st.integers(0, 90),
        "right": st.integers(0, 90),
        "dilation": st.integers(1, 3),
        "batch": st.integers(1, 3),
    }
)


def built(n: int, left: int, right: int, dilation: int) -> tuple[Tiles, Predicate]:
    """The tiles of a window, also of one that sees everything, and its predicate."""

    def predicate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        gap = query - key
        return (gap <= max(left, 1) * dilation) & (gap >= -right * dilation) & (gap % dilation == 0)

    band = Window(max(left, 1), right, dilation).cut(n, False, predicate)
    return band or Tiles(n, cut(n, min(n, 32), lambda query, queries: (query - n, query + 2 * n), predicate)), predicate


def definition(band: Tiles, predicate: Predicate) -> torch.Tensor:
    place = torch.arange(band.n)
    return predicate(place[:, None], place[None])


def added(band: Tiles, x: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of x, of which the tiles' keys have these gradients."""
    return band.key_gradients(x, x, ((grad, grad) for grad in gradients))[0]


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 3))
def test_tiles_hold_the_pairs_of_the_definition(shape, seed):
    batch = shape.pop("batch")
    band, predicate = built(**shape)
    held = torch.rand(batch, band.n, generator=torch.Generator().manual_seed(seed)) < 0.7 if seed else None
    wanted = definition(band, predicate).expand(batch, band.n, band.n) & (
        torch.ones(batch, 1, band.n, dtype=torch.bool) if held is None else held[:, None, :]
    )
    place = torch.arange(1, band.n + 1).expand(batch, 1, band.n).unsqueeze(-1)  # 0 stands for what fills up
    found = torch.zeros(batch, band.n + 1, band.n + 1, dtype=torch.int)
    places = place.float()
    tiles = band.tiles(places, places, places, [held])
    for (query, key, _, bias, _), run in zip(tiles, band.runs, strict=True):
        of = torch.arange(batch).repeat_interleave(len(query) // batch)[:, None, None]
        seen = torch.ones(query.shape[0], query.shape[2], key.shape[2], dtype=torch.int)
        found[of, query[:, 0].long(), key[:, 0].long().transpose(1, 2)] += (
            seen if bias is None else seen * (bias[:, 0] == 0)
        )
        assert query.shape[2] == run.queries.length and key.shape[2] == run.keys.length
    assert torch.equal(found[:, 1:, 1:], wanted.int())
    assert not found[:, 1:, 0].any()


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_rows_go_there_and_back_and_gradients_of_keys_are_the_adjoint(shape):
    batch = shape.pop("batch")
    band, _ = built(**shape)
    x = torch.randn(batch, 2, band.n, 3, dtype=torch.float64)
    assert torch.equal(band.join(list(band.split(x))), x)
    keys = [run.keys.take(band._dense(x)) for run in band.runs]
    gradients = [torch.randn_like(key) for key in keys]
    there = sum((key * y).sum() for key, y in zip(keys, gradients, strict=True))
    torch.testing.assert_close(there, (x * added(band, x, gradients)).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.cover()
@pytest.mark.parametrize("backend", ["flash", "blocks", "reference", "efficient"])
@pytest.mark.parametrize("together", [64, 1024])
@pytest.mark.parametrize(
    "shape", [(257, 40, 40, 1), (200, 33, 0, 1), (250, 20, 20, 3), (31, 200, 200, 1), (700, 300, 5, 1)]
)
def test_attention_over_a_band_is_its_definition_forward_and_backward(backend, together, shape, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", together)
    band, predicate = built(*shape)
    q, k, v, direction = (torch.randn(2, 3, band.n, 4, dtype=torch.float64) for _ in range(4))
    held = torch.rand(2, band.n) < 0.8
    with on(backend) as name:
        for of_keys in (None, held):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attend(Part(*leaves, tiling=band, inputs=[of_keys]), backend=name)
            allowed = (
                definition(band, predicate)[None, None]
                if of_keys is None
                else definition(band, predicate) & of_keys[:, None, None, :]
            )
            twins = [x.clone().requires_grad_() for x in (q, k, v)]
            wanted = reference.dense(*twins, allowed)
            torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
            for mine, theirs in zip(
                torch.autograd.grad(out, leaves, direction), torch.autograd.grad(wanted, twins, direction), strict=True
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_nothing_of_the_tiles_is_kept():
    (band, _), kept = built(512, 64, 64, 1), {}
    q, k, v = (torch.randn(1, 2, 512, 8, requires_grad=True) for _ in range(3))

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(Part(q, k, v, tiling=band, inputs=[None]))
    masks = {id(run.allowed): run.allowed.numel() for run in band.runs if run.allowed is not None}
    of_size_n = 4 * q.numel() * 4 + q.numel() // 8 * 4  # q, k, v, out and log-sum-exp, of 4 bytes
    assert sum(kept.values()) == of_size_n
    assert masks and all(size <= 64 * 192 for size in masks.values()) and len(band.runs) == 3


@pytest.mark.parametrize("shape", [(257, 40, 40, 1), (200, 33, 0, 1), (90, 5, 60, 1)])
def test_the_flash_operators_take_a_window_as_one_tile(shape):
    band, predicate = built(*shape)
    leaves = [torch.randn(2, 3, band.n, 4, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    wide = torch.ones(band.n, 7, dtype=torch.bool)
    q, k, v, more_k, more_v = leaves
    memory = more_k[:, :, :7], more_v[:, :, :7]
    wanted = reference.dense(
        q, torch.cat([k, memory[0]], 2), torch.cat([v, memory[1]], 2), torch.cat([definition(band, predicate), wide], 1)
    )
    with on("flash on CUDA") as name:
        out = attend(Part(q, k, v, tiling=band, inputs=[None]), Part(q, *memory), backend=name)
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
        direction = torch.randn_like(out)
        for mine, theirs in zip(
            torch.autograd.grad(out, leaves, direction), torch.autograd.grad(wanted, leaves, direction), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert calls == ["flash forward with a window", "flash forward", "flash backward", "flash backward"]
