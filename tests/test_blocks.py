"""The slots of a block, each against its definition or a law."""

import pytest
import torch

import effzoo
from effzoo.architectures.embeddings import AxialPositions, SinusoidalPositions
from effzoo.attention import Context, Mask
from effzoo.blocks import FeedForward, Rotary
from effzoo.blocks.attention import Attention
from effzoo.blocks.positions import rotate
from effzoo.errors import IncompatibleError, OptionError
from effzoo.sites import RMSNorm
from effzoo.spec import parse_one


def layer(spec="full", heads=4, **slots):
    torch.manual_seed(1)
    return Attention(16, parse_one(spec), Context(heads=heads, head_dim=4, layer=0), **slots).double()


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 20])
@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_in_chunks_is_the_feed_forward(chunk, gated):
    torch.manual_seed(0)
    plain = FeedForward(8, 12, "gelu", 0, gated=gated).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    chunked = FeedForward(8, 12, "gelu", 0, gated=gated, chunk=chunk).double()
    chunked.load_state_dict(plain.state_dict())
    assert torch.allclose(chunked(x), plain(x), rtol=0, atol=1e-14)
    for got, want in zip(torch.autograd.grad(chunked(x).square().sum(), [x, *chunked.parameters()]),
                         torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()]),
                         strict=True):  # fmt: skip
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_a_gated_feed_forward_is_its_formula():
    mlp, x = FeedForward(8, 12, "silu", 0, gated=True).double(), torch.randn(5, 8, dtype=torch.float64)
    gate, up = x @ mlp.gate.weight.T + mlp.gate.bias, x @ mlp.up.weight.T + mlp.up.bias
    expected = (gate * gate.sigmoid() * up) @ mlp.down.weight.T + mlp.down.bias
    assert torch.allclose(mlp(x.unsqueeze(0))[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}])
def test_rotary_scores_depend_on_the_distance_alone(scaling):
    rotary = Rotary.of(8, 100.0, scaling or {})
    q, k = torch.randn(2, 8, dtype=torch.float64)
    where = torch.tensor([[3, 7, 103, 107]])
    turned = [rotate(x.expand(1, 1, 4, 8), *rotary.angles(where))[0, 0] for x in (q, k)]
    # angles are float32, as in transformers
    assert abs(turned[0][0] @ turned[1][1] - turned[0][2] @ turned[1][3]) < 1e-4
    assert abs(turned[0][0] @ turned[1][1] - q @ k) > 1e-2
    assert torch.allclose(turned[0].norm(dim=-1), q.norm().expand(4), atol=1e-6)


def test_rotary_is_multiplication_of_complex_numbers():
    rotary, x, p = Rotary(6, 50.0), torch.randn(6, dtype=torch.float64), 11
    angle = p * 50.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    expected = torch.complex(x[:3], x[3:]) * torch.polar(torch.ones_like(angle), angle)
    found = rotate(x.expand(1, 1, 1, 6), *rotary.angles(torch.tensor([[p]]))).flatten()
    assert torch.allclose(found, torch.cat([expected.real, expected.imag]), atol=1e-5)


def test_grouped_queries_are_full_heads_with_repeated_keys_and_values():
    grouped, plain, x = layer(kv_heads=2), layer(), torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        for name in ("q", "k", "v", "o"):
            for key, value in grouped.get_submodule(name).state_dict().items():
                if name in ("k", "v"):  # rows of head h of the group go to heads 2h and 2h + 1
                    value = value.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
                plain.get_submodule(name).get_parameter(key).copy_(value)
    assert grouped.k.weight.shape == (8, 16) and grouped.memory.heads == 2
    assert torch.allclose(grouped(x, Mask()), plain(x, Mask()), rtol=0, atol=1e-13)


def test_values_may_have_another_width_than_keys():
    attn, x = layer(value_dim=7, out_dim=0), torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (attn.project(name, x, Mask()) for name in "qkv")
    expected = effzoo.attention.reference.dense(q, k, v, torch.ones(5, 5, dtype=torch.bool))
    assert (
        torch.allclose(attn(x, Mask()), expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-13)
        and expected.shape[-1] == 7
    )


def test_cross_attention_reads_another_sequence_and_kinds_without_it_refuse():
    attn = layer(source_dim=6)
    x, source = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    assert attn(x, Mask(), source=source).shape == (2, 5, 16)
    with pytest.raises(IncompatibleError, match="'longformer' attends within one sequence only; use 'full'"):
        layer("longformer", source_dim=6)


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(8, 1e-3, role="norm").double(), torch.randn(5, 8, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    assert torch.allclose(
        norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight, rtol=0, atol=1e-14
    )


def test_axial_positions_are_the_coordinates_of_a_grid():
    axial = AxialPositions((3, 4), (2, 5))
    rows = axial(torch.arange(12).unsqueeze(0))[0]
    for p in range(12):
        assert torch.equal(rows[p], torch.cat([axial.axes[0].weight[p // 4], axial.axes[1].weight[p % 4]]))


def test_sinusoidal_positions_are_those_of_the_paper():
    rows = SinusoidalPositions(6)(torch.tensor([[0, 9]]))[0]
    assert torch.allclose(rows[0], torch.tensor([0.0, 1, 0, 1, 0, 1]))
    angle = 9 / 10_000 ** (torch.tensor([0, 2, 4]) / 6)
    assert torch.allclose(rows[1], torch.stack([angle.sin(), angle.cos()], dim=1).flatten(), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"kv_heads": 3, "heads": 4, "dim": 16}, "kv_heads 3 does not divide the 4 heads; try kv_heads=2"),
        ({"positions": "axial", "axial_shape": (2, 4), "axial_dims": (8, 8)}, "product of at least max_length 64"),
        ({"positions": "rotary", "rotary_theta": (1.0, 2.0, 3.0)}, "3 values of rotary_theta for 2 layers"),
        ({"positions": "rotary", "dim": 6, "heads": 2}, "rotary positions turn pairs, so head_dim is even, got 3"),
        ({"positions": "rotary", "rotary_scaling": {"type": "yarn", "factor": 2.0}}, "got type='yarn' with factor"),
        ({"first_norm": False}, "build it with norm='pre'"),
        ({"norm_kind": "batch"}, "norm_kind"),
    ],
)
def test_slots_that_do_not_fit_say_so(sizes, said, tiny):
    with pytest.raises(OptionError, match=said):
        effzoo.build("bert", **tiny | sizes)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "axial", "rotary", "none"])
def test_every_kind_of_positions_runs_with_prompts_and_padding(positions, tiny):
    """And but for "none" the order of the tokens matters."""
    more = {"axial_shape": (8, 8), "axial_dims": (6, 10)} if positions == "axial" else {}
    model = effzoo.build("bert", peft="prompt[length=3]", positions=positions, **tiny, **more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(53, (1, 11))
    swapped = ids[:, [1, 0, *range(2, 11)]]
    a, b = model(ids).last_hidden_state, model(swapped).last_hidden_state
    assert torch.allclose(a[:, [1, 0]], b[:, :2], atol=1e-5) is (positions == "none")
