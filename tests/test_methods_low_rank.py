"""Low-rank, Kronecker and subspace changes: each equals the formula of its paper, written out densely in float64,
forward and backward."""

import copy
import math

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from torch.nn import functional as F

import effzoo
from effzoo import nf4
from effzoo import sites as places
from effzoo.checks.models import TinyModel, train
from effzoo.errors import IncompatibleError, OptionError, TargetError
from effzoo.peft.accounting import ranks
from effzoo.peft.merging import delta
from effzoo.peft.parameter.fastfood import Fastfood, dense_hadamard, hadamard, power_of_two
from effzoo.peft.parameter.krona import balanced, kronecker
from effzoo.sites import sites

D, MLP, LAYERS, LABELS, VOCAB = 16, 32, 2, 3, 53
HEAD = D * LABELS + LABELS
EXACT = {"rtol": 0, "atol": 1e-10}
DELTA = {"rtol": 0, "atol": 1e-12}


def build(tiny, spec=None, attention="full", name="minilm", task="classification", drawn=True, **more):
    """In float64, in evaluation mode, every parameter and every adapter away from its start when `drawn`."""
    model = effzoo.build(
        name, attention=attention, task=task, num_labels=LABELS, pooling="mean", head_dense=False, **{**tiny, **more}
    ).double()
    if spec:
        effzoo.attach(model, spec)
    with torch.no_grad():
        for parameter in model.parameters() if drawn else ():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def site(model, path):
    return dict(sites(model))[path]


def module(model, path, method):
    return site(model, path).adapters["default"][method]


def batch(n=9):
    ids = torch.randint(2, VOCAB, (3, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def numerical_rank(matrix):
    return int(torch.linalg.matrix_rank(matrix.flatten(1), rtol=1e-10))


# -- every mergeable method
#     ------------------------------------------------------------------------------------------------------------------

MERGEABLE = [
    "lora[rank=3, alpha=5]",
    "lora[rank=3, alpha=5, rslora=true]",
    "lora[rank=3, init=pissa, alpha=6]",
    "lora[rank=3, init=olora, alpha=6]",
    "lora[rank=3, init=loftq]",
    "lora[rank=3, init=eva]",
    "lora[rank=3, init=corda, alpha=6]",
    "lora[rank=3, init=lora_ga]",
    "dora[rank=3, alpha=5]",
    "krona[scale=0.7]",
    "krona[shape=(2, 8)]",
    "intrinsic[dim=20]",
    "intrinsic[dim=20, projection=dense]",
    "said[dim=20]",
    "loha[rank=2, alpha=3]",
    "vera[rank=5]",
    "fourierft[frequencies=20]",
    "oft[block=4]",
    "oft[block=6]",
    "hra[rank=4]",
    "miss[rank=4]",
    "miss[rank=5]",
    "lora_fa[rank=3, alpha=5]",
    "adalora[rank=4, scale=0.7]",
    "boft[block=4]",
    "boft[block=4, factors=3]",
    "randlora[bases=3, scale=2.0]",
    "vblora[rank=3, vectors=7, length=4]",
]


@pytest.mark.parametrize("spec", MERGEABLE)
def test_the_site_with_the_method_is_the_site_with_the_weight_plus_delta(tiny, spec):
    """y = (W + delta) x + b + delta_b, forward and for the gradient of x, to 1e-12."""
    model = build(tiny, spec)
    changes = delta(model)
    for path in ("blocks.0.attn.q", "blocks.1.attn.v"):
        linear, x = site(model, path), torch.randn(5, D, dtype=torch.float64, requires_grad=True)
        assert changes[f"{path}.weight"].abs().max() > 1e-3
        y = linear(x)
        expected = F.linear(x, linear.weight + changes[f"{path}.weight"], linear.bias + changes[f"{path}.bias"])
        assert torch.allclose(y, expected, **DELTA)
        mixture = torch.randn_like(y)
        (found,), (wanted,) = (torch.autograd.grad((out * mixture).sum(), x) for out in (y, expected))
        assert torch.allclose(found, wanted, **DELTA)


@pytest.mark.parametrize(
    ("spec", "rank"),
    [
        ("lora[rank=3]", 3),
        ("lora[rank=40]", D),  # no more than the matrix has
        ("lora[rank={attn.q: 2, attn.v: 5}]", 5),
        ("lora[rank=3, init=pissa]", 6),
        ("lora[rank=3, init=olora]", 6),
        ("lora[rank=10, init=pissa]", D),
        ("krona", D),
        ("krona[shape=(1, 1)]", D),
        ("krona[shape=(1, 4)]", 4),  # 1 * min(16, 4)
        ("krona[shape=(2, 8)]", 4),  # min(2, 8) * min(8, 2)
        ("loha[rank=2]", 4),  # the square of the rank
        ("loha[rank=3]", 9),
        ("loha[rank=5]", D),
        ("vera[rank=5]", 5),
        ("hra[rank=4]", 4),
        ("miss[rank=5]", 5),
        ("lora_fa[rank=3]", 3),
        ("adalora[rank=3, scale=100.0]", 3),
        ("vblora[rank=3, vectors=7]", 3),
    ],
)
def test_the_declared_rank_is_the_numerical_rank_of_the_change(tiny, spec, rank):
    model = build(tiny, spec, task="features")
    assert effzoo.account(model).rank == rank == max(ranks(model).values())


@pytest.mark.parametrize(
    "spec", ["dora[rank=3]", "intrinsic[dim=20]", "lora[rank=3, init=loftq]", "boft[block=4]", "randlora[bases=3]"]
)
def test_what_declares_full_rank_has_it(tiny, spec):
    model = build(tiny, spec, task="features")
    assert effzoo.account(model).rank == "full" and ranks(model)["blocks.0.attn.q.weight"] == D


def test_the_rank_of_a_kronecker_product_is_the_product_of_the_ranks(tiny):
    model = build(tiny, "krona")
    krona = module(model, "blocks.0.attn.q", "krona")
    with torch.no_grad():
        krona.A[:, 2:] = krona.A[:, :2]  # 4 x 4 of rank 2
        krona.B[3] = krona.B[0] + krona.B[1]  # 4 x 4 of rank 3
    assert (numerical_rank(krona.A), numerical_rank(krona.B)) == (2, 3)
    assert numerical_rank(delta(model)["blocks.0.attn.q.weight"]) == 6


BLOCKS = LAYERS * (4 * (D * D + D) + 4 * D + 2 * D * MLP + MLP + D)
COUNTS = [
    ("lora[rank=4]", "full", LAYERS * 2 * 2 * D * 4),
    ("lora[rank={attn.q: 2, attn.v: 5}]", "full", LAYERS * 2 * D * 7),
    ("lora[rank={attn.q: 2, attn.*: 5}, targets=(attn.q, attn.o)]", "full", LAYERS * 2 * D * 7),
    ("lora[rank=3, init=pissa]", "full", LAYERS * 2 * 2 * D * 3),
    ("lora[rank=4, targets=attn.q]", "longformer[window=4]", LAYERS * 2 * D * 4),
    ("lora[rank=4, targets=attn.q_global]", "longformer[window=4]", LAYERS * 2 * D * 4),
    ("lora[rank=4, targets=attn.q*]", "longformer[window=4]", LAYERS * 2 * 2 * D * 4),
    ("lora[rank=4, targets=(attn.E, attn.F)]", "linformer[k=8]", LAYERS * 2 * 4 * (64 + 8)),
    ("lora[rank=4, targets=attn.E]", "linformer[k=8, sharing=key_value]", LAYERS * 4 * (64 + 8)),
    ("lora[rank=4]", "lsh", LAYERS * 2 * 2 * D * 4),  # attn.qk and attn.v
    ("lora[rank=4, targets=embed.token]", "full", 4 * (VOCAB + D)),
    ("dora[rank=4]", "full", LAYERS * 2 * (2 * D * 4 + D)),
    ("krona", "full", LAYERS * 2 * (4 * 4 + 4 * 4)),
    ("krona[shape=(2, 8)]", "full", LAYERS * 2 * (2 * 8 + 8 * 2)),
    ("krona_b", "full", LAYERS * (4 * 4 + 4 * 4)),
    ("krona_res", "full", LAYERS * (4 * 4 + 4 * 4 + 1)),
    ("intrinsic[dim=100]", "full", 100),
    ("intrinsic[dim=100, projection=dense]", "full", 100),
    ("said[dim=100]", "full", 100),
    ("loha[rank=3]", "full", LAYERS * 2 * 4 * D * 3),
    ("vera[rank=5]", "full", LAYERS * 2 * (D + 5)),
    ("vera[rank=5, targets=(attn.q, mlp.up)]", "full", LAYERS * (D + MLP + 2 * 5)),
    ("fourierft[frequencies=20]", "full", LAYERS * 2 * 20),
    ("fourierft[frequencies=300]", "full", LAYERS * 2 * D * D),  # all entries, no more
    ("oft[block=4]", "full", LAYERS * 2 * D * (4 - 1) // 2),
    ("oft[block=6]", "full", LAYERS * 2 * (2 * 6 * 5 // 2 + 4 * 3 // 2)),  # 6 + 6 + 4
    ("hra[rank=4]", "full", LAYERS * 2 * D * 4),
    ("miss[rank=4]", "full", LAYERS * 2 * D * 4),
    ("lora_fa[rank=4]", "full", LAYERS * 2 * D * 4),
    ("adalora[rank=4]", "full", LAYERS * 2 * 4 * (2 * D + 1)),
    ("boft[block=4]", "full", LAYERS * 2 * (2 * D * 3 // 2 + D)),
    ("boft[block=4, factors=3, targets=mlp.down]", "full", LAYERS * (3 * MLP * 3 // 2 + D)),
    ("randlora[bases=4]", "full", LAYERS * 2 * 4 * (D + 4)),
    ("randlora[bases=3, targets=(mlp.up, mlp.down)]", "full", LAYERS * 2 * 3 * (D + 6)),  # of the smaller side
    ("vblora[rank=3, vectors=7, length=4]", "full", 7 * 4 + LAYERS * 2 * 3 * 7 * 2 * D // 4),
    ("vblora[rank=2, vectors=5, targets=(attn.q, mlp.up)]", "full", 5 * 16 + LAYERS * 2 * 5 * (2 * D + D + MLP) // 16),
]


@pytest.mark.parametrize(("spec", "attention", "count"), COUNTS)
def test_trainable_parameters_are_the_closed_form(tiny, spec, attention, count):
    assert effzoo.account(build(tiny, spec, attention)).trainable == count + HEAD


def test_what_a_file_holds_is_what_is_trained_and_what_the_start_needs(tiny):
    stored = {
        spec: effzoo.account(build(tiny, spec, task="features")).stored
        for spec in ("lora[rank=3, init=pissa]", "intrinsic[dim=40]", "said[dim=40]")
    }
    assert stored["lora[rank=3, init=pissa]"] == 2 * LAYERS * 2 * 2 * D * 3  # A, B and A0, B0
    assert stored["intrinsic[dim=40]"] == stored["said[dim=40]"] == 40
    quantised = effzoo.account(build(tiny, "lora[rank=3, init=loftq]", task="features")).stored
    # A and B, two codes to a byte, a scale per 64
    assert quantised == LAYERS * 2 * (2 * D * 3 + D * D // 2 + D * D // 64)


# -- LoRA
#     ------------------------------------------------------------------------------------------------------------------


def test_rank_and_alpha_go_by_the_first_pattern_that_matches(tiny):
    model = build(
        tiny,
        "lora[rank={attn.q: 2, attn.v*: 4, attn.*: 6}, alpha={attn.q: 8, *: 12}, targets=(attn.q, attn.v, attn.o)]",
    )
    found = {role: module(model, f"blocks.0.attn.{role}", "lora") for role in "qvo"}
    assert {role: (len(m.A), m.scale) for role, m in found.items()} == {"q": (2, 4.0), "v": (4, 3.0), "o": (6, 2.0)}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 6), (9, 6), (9, None)])
def test_rslora_divides_by_the_root_of_the_rank(tiny, rank, alpha):
    given = "" if alpha is None else f", alpha={alpha}"
    assert module(build(tiny, f"lora[rank={rank}, rslora=true{given}]"), "blocks.0.attn.q", "lora").scale == (
        alpha or rank
    ) / math.sqrt(rank)
    assert module(build(tiny, f"lora[rank={rank}{given}]"), "blocks.0.attn.q", "lora").scale == (alpha or rank) / rank


def test_pissa_starts_from_the_largest_singular_vectors_and_leaves_the_output_bit_identical(tiny):
    """s B A = U_r S_r V_r^T, both factors with the root of S / s (Meng et al. 2024, eq. 2, 3); the base keeps every
    bit."""
    bare = build(tiny)
    model = effzoo.attach(copy.deepcopy(bare), "lora[rank=3, alpha=6, init=pissa]")
    lora, weight = module(model, "blocks.0.attn.q", "lora"), site(bare, "blocks.0.attn.q").weight
    U, S, Vt = torch.linalg.svd(weight)
    assert torch.allclose(lora.scale * lora.B @ lora.A, U[:, :3] @ S[:3].diag() @ Vt[:3], **EXACT)
    assert torch.allclose(lora.A @ lora.A.T, (S[:3] / 2).diag(), **EXACT) and torch.allclose(
        lora.B.T @ lora.B, (S[:3] / 2).diag(), **EXACT
    )
    assert torch.equal(model(**batch()).last_hidden_state, bare(**batch()).last_hidden_state)
    assert torch.equal(site(model, "blocks.0.attn.q").weight, weight)


def test_olora_starts_from_the_qr_factors_and_leaves_the_output_bit_identical(tiny):
    bare = build(tiny)
    model = effzoo.attach(copy.deepcopy(bare), "lora[rank=3, init=olora]")
    lora, weight = module(model, "blocks.0.attn.v", "lora"), site(bare, "blocks.0.attn.v").weight
    assert torch.allclose(lora.B.T @ lora.B, torch.eye(3, dtype=torch.float64), **EXACT)
    assert torch.allclose(lora.A, lora.B.T @ weight, **EXACT) and torch.allclose(
        lora.A[:, :3].tril(-1), torch.zeros(3, 3, dtype=torch.float64), **EXACT
    )
    assert torch.equal(model(**batch()).last_hidden_state, bare(**batch()).last_hidden_state)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_base_trains_like_the_paper_which_takes_the_factors_out_of_the_base(tiny, init):
    """Outputs and gradients equal those of plain LoRA with the same A and B on W - s B0 A0."""
    model = build(tiny, f"lora[rank=3, alpha=6, init={init}]")
    twin = build(tiny, "lora[rank=3, alpha=6]")
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.endswith(("A0", "B0"))})
    with torch.no_grad():
        for path, linear in sites(twin):
            if linear.role in ("attn.q", "attn.v"):
                start = module(model, path, "lora")
                linear.weight -= start.scale * start.B0 @ start.A0
    outs = [m(**batch()).logits for m in (model, twin)]
    assert torch.allclose(*outs, **EXACT)
    grads = [
        torch.autograd.grad((out**2).sum(), [p for p in m.parameters() if p.requires_grad])
        for out, m in zip(outs, (model, twin), strict=True)
    ]
    assert all(torch.allclose(one, other, **EXACT) and one.abs().max() > 0 for one, other in zip(*grads, strict=True))


def test_gaussian_draws_a_with_standard_deviation_one_over_the_rank(tiny):
    model = build(tiny, "lora[rank=4, init=gaussian]", drawn=False, dim=512, heads=8, layers=1, mlp=16)
    lora = module(model, "blocks.0.attn.q", "lora")
    assert abs(lora.A.std() - 1 / 4) < 5 * (1 / 4) / math.sqrt(2 * lora.A.numel()) and not lora.B.any()


def test_eva_holds_the_right_singular_vectors_of_all_tokens_that_the_layer_sees(tiny):
    model = build(tiny, "lora[rank=3, init=eva]")
    before = model(**batch()).last_hidden_state
    seen, batches = {}, [batch(9), batch(7)]
    handles = [
        site(model, path).register_forward_hook(lambda m, x, y, path=path: seen.setdefault(path, []).append(x[0]))
        for path in PATHS
    ]
    for one in batches:
        model(**one)
    for handle in handles:
        handle.remove()
    effzoo.peft.calibrate(model, batches)
    for path in PATHS:
        X = torch.cat([x[one["attention_mask"].bool()] for x, one in zip(seen[path], batches, strict=True)])
        assert X.shape == (9 + 5 + 9 + 7 + 5 + 7, D)
        lora, Vt = module(model, path, "lora"), torch.linalg.svd(X).Vh[:3]
        assert torch.allclose((lora.A * Vt).sum(1).abs(), torch.ones(3, dtype=torch.float64), **EXACT)  # up to sign
    assert not torch.equal(model(**batch()).last_hidden_state, before)  # B was drawn here
    fresh = effzoo.attach(build(tiny), "lora[init=eva]")
    bare = fresh(**batch()).last_hidden_state
    effzoo.peft.calibrate(fresh, batches)
    assert torch.equal(fresh(**batch()).last_hidden_state, bare)


PATHS = ("blocks.0.attn.q", "blocks.1.attn.v")


def test_eva_refuses_a_site_that_no_batch_reaches(tiny):
    model = build(tiny, "lora[init=eva]", attention="longformer[window=4]", task="token_classification")
    with pytest.raises(IncompatibleError, match="'attn.q_global' .* no batch reaches it"):
        effzoo.peft.calibrate(model, [batch()])


def seen_by(model, path, batches):
    """What a site sees at all tokens, [tokens, in]."""
    seen = []
    handle = site(model, path).register_forward_hook(lambda module, x, y: seen.append(x[0].detach()))
    for one in batches:
        model(**one)
    handle.remove()
    return torch.cat([x[one["attention_mask"].bool()] for x, one in zip(seen, batches, strict=True)])


@pytest.mark.parametrize(("init", "chosen"), [("corda", slice(3)), ("corda_kpm", slice(D - 3, None))])
def test_corda_starts_from_components_of_the_weight_as_its_inputs_see_it(tiny, init, chosen):
    """s B A = U_r S_r V_r^T C^-1 of W C (Yang et al. 2024), both factors with the root of S / s; the output stays."""
    bare, batches = build(tiny), [batch(9), batch(7)]
    model = effzoo.attach(copy.deepcopy(bare), f"lora[rank=3, alpha=6, init={init}]").eval()
    effzoo.peft.calibrate(model, batches)
    for path in PATHS:
        X, weight = seen_by(bare, path, batches), site(bare, path).weight
        C = X.T @ X / (X**2).sum() * D + 0.01 * torch.eye(D, dtype=torch.float64)
        U, S, Vt = torch.linalg.svd(weight @ C)
        lora = module(model, path, "lora")
        wanted = U[:, chosen] @ S[chosen].diag() @ Vt[chosen] @ torch.linalg.inv(C)
        assert torch.allclose(lora.scale * lora.B @ lora.A, wanted, **EXACT)
        assert torch.allclose(lora.B.T @ lora.B, (S[chosen] / 2).diag(), **EXACT)
        assert torch.equal(lora.A, lora.A0) and torch.equal(lora.B, lora.B0)
    assert torch.equal(model(**batch()).last_hidden_state, bare(**batch()).last_hidden_state)


def test_lora_ga_starts_from_singular_vectors_of_the_gradient(tiny):
    """A holds the first r right, B the next r left singular vectors of dL/dW times out^(1/4) / 4 (Wang et al. 2024)."""
    bare, batches = build(tiny), [batch(9) | {"labels": torch.tensor([0, 2, 1])}] * 2
    model = effzoo.attach(copy.deepcopy(bare), "lora[rank=3, init=lora_ga]").eval()
    effzoo.peft.calibrate(model, batches)
    bare.requires_grad_(True)
    sum(bare(**one).loss for one in batches).backward()
    for path in PATHS:
        lora, c = module(model, path, "lora"), D**0.25 / 4
        U, _, Vt = torch.linalg.svd(site(bare, path).weight.grad)
        for found, wanted in ((lora.A / c, Vt[:3]), (lora.B.T / c, U[:, 3:6].T)):
            assert torch.allclose((found * wanted).sum(1).abs(), torch.ones(3, dtype=torch.float64), **EXACT)
    assert torch.equal(model(**batch()).last_hidden_state, bare(**batch()).last_hidden_state)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("attn.q.weight"))


def test_a_start_from_the_gradient_needs_twice_as_many_vectors(tiny):
    with pytest.raises(OptionError, match="init='lora_ga' takes 18 vectors of 'attn.q', whose weight .* has 16"):
        build(tiny, "lora[rank=9, init=lora_ga]")


def test_normal_float_levels_are_those_of_the_paper():
    """QLoRA (arXiv:2305.14314), appendix E."""
    printed = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
    ]
    printed += [
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    assert torch.allclose(nf4.levels(), torch.tensor(printed, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (5, 13), (1, 1)])
def test_quantising_takes_the_nearest_level_of_each_block(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    codes, scales = nf4.encode(weight)
    found = nf4.decode(codes, scales, weight.shape)
    for i, block in enumerate(weight.flatten().split(64)):
        nearest = (block[:, None] / block.abs().max() - nf4.levels()).abs().argmin(1)
        assert torch.allclose(
            found.flatten()[64 * i : 64 * i + len(block)], nf4.levels()[nearest] * block.abs().max(), **DELTA
        )
    assert (
        codes.dtype == torch.uint8
        and codes.numel() == 32 * math.ceil(weight.numel() / 64)
        and scales.numel() == math.ceil(weight.numel() / 64)
    )


def test_loftq_brings_the_quantised_weight_nearer_to_the_base_than_quantising_alone(tiny):
    """W' - W = Q + s B A - W is smaller than quantised(W) - W, and B A is the best approximation of W - Q of its
    rank."""
    model = build(tiny, "lora[rank=3, alpha=6, init=loftq]", drawn=False)
    linear, lora = site(model, "blocks.0.attn.q"), module(model, "blocks.0.attn.q", "lora")
    alone = nf4.decode(*nf4.encode(linear.weight.double()), linear.weight.shape)
    change = delta(model)["blocks.0.attn.q.weight"]
    assert 0 < change.norm() < 0.9 * (alone - linear.weight).norm()
    U, S, Vt = torch.linalg.svd(linear.weight - lora.weight(linear.weight))
    # the start was computed for float32 weights
    assert torch.allclose(2 * lora.B @ lora.A, U[:, :3] @ S[:3].diag() @ Vt[:3], rtol=0, atol=1e-6)
    assert not effzoo.attached(model)["default"].methods[0][0].identity_at_init


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_stores_its_input_once_and_the_narrow_product(tiny, dropout):
    """q and v read the same x [n, D]; each adds s A x [n, rank]. With dropout each has an x of its own."""
    model = build(tiny, f"lora[rank=3, dropout={dropout}]").train()
    x, n = torch.randn(7, D, dtype=torch.float64), 7
    stored, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage().nbytes() // tensor.element_size(),
            tensor.dtype,
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = [site(model, f"blocks.0.attn.{role}")(x) for role in "qv"]
    numbers = sum(size for place, (size, dtype) in stored.items() if place not in own and dtype == torch.float64)
    assert kept and numbers == (n * D if not dropout else 2 * n * D) + 2 * n * 3


def test_lora_on_an_embedding_changes_rows_by_a_low_rank(tiny):
    model = build(tiny, "lora[rank=3, alpha=6, targets=embed.token]", task="features")
    token, lora = site(model, "embeddings.token"), module(model, "embeddings.token", "lora")
    ids = torch.randint(VOCAB, (3, 5))
    table = token.weight + 2 * (lora.B @ lora.A).T
    assert torch.allclose(token(ids), F.embedding(ids, table), **DELTA) and torch.allclose(
        delta(model)["embeddings.token.weight"], table - token.weight, **DELTA
    )


def test_rows_that_never_occur_keep_every_bit(tiny):
    model = build(tiny, "lora[rank=3, targets=embed.token]", drawn=False)
    train(model, {**batch(), "labels": torch.tensor([0, 1, 2])})
    change = delta(model)["embeddings.token.weight"]
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    # rows at padding get no gradient either
    seen[batch()["input_ids"][batch()["attention_mask"].bool()].unique()] = True
    assert (change[~seen] == 0).all() and (change[seen] != 0).any(dim=1).all()


def test_a_tied_head_reads_the_changed_table(tiny):
    model = build(tiny, "lora[rank=3, targets=embed.token]", name="gpt2", task="causal_lm")
    before = model(**batch()).logits
    change = delta(model)["embeddings.token.weight"]
    bare = copy.deepcopy(model)
    effzoo.detach(bare, "default")
    assert numerical_rank(change) == 3 and not torch.allclose(before, bare(**batch()).logits)
    effzoo.merge(model)
    assert torch.allclose(model(**batch()).logits, before, **EXACT)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_lora_on_a_convolution_is_a_narrow_convolution_and_a_change_of_low_rank(stride, padding):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = places.Conv2d(5, 6, 3, stride=stride, padding=padding, role="conv")

    model = effzoo.attach(Net().double(), "lora[rank=2, alpha=6, targets=conv]")
    lora, x = model.conv.adapters["default"]["lora"], torch.randn(4, 5, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        lora.B.normal_()
    kernel = model.conv.weight + 3 * torch.einsum("or,rihw->oihw", lora.B, lora.A)
    assert torch.allclose(model.conv(x), F.conv2d(x, kernel, model.conv.bias, stride, padding), **DELTA)
    assert torch.allclose(delta(model)["conv.weight"], kernel - model.conv.weight, **DELTA)
    assert effzoo.account(model).rank == 2 == numerical_rank(delta(model)["conv.weight"]) and effzoo.account(
        model
    ).trainable == 2 * (45 + 6)


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("lora[rank=0]", OptionError, "rank is at least 1, got 0"),
        ("lora[rank={attn.q: 0}]", OptionError, "rank is at least 1, got"),
        ("lora[rank={}]", OptionError, "got an empty map"),
        (
            "lora[rank={attn.q: 2}, targets=(attn.q, attn.v)]",
            OptionError,
            "no pattern of rank .attn.q. matches 'attn.v'",
        ),
        (
            "lora[rank={attn.q: 2, mlp.up: 4}, targets=attn.q]",
            TargetError,
            "rank for 'mlp.up' matches none of its targets",
        ),
        ("lora[rank={attn.q: 2, attn.nope: 4}]", TargetError, "target 'attn.nope' matches no role"),
        ("lora[alpha={attn.v: 2}]", OptionError, "no pattern of alpha"),
        ("lora[init=nope]", OptionError, "lora: init is 'default' or 'gaussian'"),
        ("lora[rank=17, init=pissa]", OptionError, "takes 17 vectors of 'attn.q', whose weight .16, 16. has 16"),
        (
            "lora[init=eva, targets=embed.token]",
            OptionError,
            "init='eva' is for linear layers, and 'embed.token' is Embedding",
        ),
        ("lora[targets=attn.norm]", TargetError, "lora hangs on Linear or Embedding or Conv2d sites"),
        ("dora[rank=0]", OptionError, "dora: rank is at least 1"),
        ("krona[shape=(3, 4)]", OptionError, "A of shape .3, 4. does not divide 'attn.q', which is 16 x 16; .* .4, 4."),
        ("krona[shape=(4, 4, 4)]", OptionError, "shape is that of A, two numbers"),
        ("krona_b[shape=(5, 1)]", OptionError, "does not divide 'mlp.branch'"),
        ("intrinsic[dim=0]", OptionError, "dim is at least 1"),
        ("intrinsic[seed=-1]", OptionError, "seed is 0 or more"),
        ("intrinsic[dim=100000, projection=dense]", OptionError, "the limit is 67,108,864; use projection='fastfood'"),
        ("said[dim=2]", OptionError, "dim=2 must hold one factor for each of 2 layers and more"),
    ],
)
def test_each_bad_option_has_its_own_sentence(tiny, spec, error, said):
    with pytest.raises(error, match=said):
        build(tiny, spec)


# -- DoRA
#     ------------------------------------------------------------------------------------------------------------------


def test_dora_gives_every_row_its_trained_length(tiny):
    model = build(tiny, "dora[rank=3, alpha=6]")
    linear, dora = site(model, "blocks.0.attn.q"), module(model, "blocks.0.attn.q", "dora")
    V = linear.weight + 2 * dora.B @ dora.A
    expected = dora.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    assert torch.allclose(linear.composed_weight(), expected, **DELTA)
    assert torch.allclose(linear.composed_weight().norm(dim=1), dora.magnitude.abs(), **DELTA)


def test_dora_starts_with_the_lengths_of_the_rows_and_changes_nothing(tiny):
    bare = build(tiny)
    model = effzoo.attach(copy.deepcopy(bare), "dora")
    assert torch.equal(
        module(model, "blocks.0.attn.v", "dora").magnitude, site(bare, "blocks.0.attn.v").weight.norm(dim=1)
    )
    assert torch.equal(model(**batch()).last_hidden_state, bare(**batch()).last_hidden_state)


def test_the_gradients_of_dora_treat_the_norm_as_a_constant(tiny):
    model = build(tiny, "dora[rank=3]")
    linear, dora = site(model, "blocks.0.attn.q"), module(model, "blocks.0.attn.q", "dora")
    x = torch.randn(5, D, dtype=torch.float64)
    length = (linear.weight + dora.B @ dora.A).norm(dim=1).detach().clone()
    outs = linear(x), F.linear(x, (dora.magnitude / length)[:, None] * (linear.weight + dora.B @ dora.A), linear.bias)
    tensors = (dora.A, dora.B, dora.magnitude)
    found, wanted = (torch.autograd.grad((out**3).sum(), tensors) for out in outs)
    assert all(torch.allclose(one, other, **EXACT) for one, other in zip(found, wanted, strict=True))
    V = linear.weight + dora.B @ dora.A
    whole = torch.autograd.grad(
        (F.linear(x, dora.magnitude[:, None] * V / V.norm(dim=1, keepdim=True), linear.bias) ** 3).sum(), tensors
    )
    assert not torch.allclose(found[0], whole[0], rtol=1e-2)  # the whole gradient is another one


def test_dora_keeps_rows_of_zeros(tiny):
    bare = build(tiny)
    with torch.no_grad():
        site(bare, "blocks.0.attn.q").weight[3] = 0
    model = effzoo.attach(bare, "dora")
    model(**batch()).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# -- KronA
#     ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [(1, 1), (3, 2), (1, 4), (6, 1), (2, 5)])
@pytest.mark.parametrize("b", [(1, 1), (2, 3), (7, 1), (1, 6), (4, 4)])
def test_the_kronecker_product_is_applied_as_if_it_were_formed(a, b):
    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (a, b))
    x = torch.randn(2, 3, a[1] * b[1], dtype=torch.float64, requires_grad=True)
    found, wanted = kronecker(x, A, B), F.linear(x, torch.kron(A, B))
    assert torch.allclose(found, wanted, **DELTA)
    mixture = torch.randn_like(found)
    grads = [torch.autograd.grad((out * mixture).sum(), (x, A, B)) for out in (found, wanted)]
    assert all(torch.allclose(one, other, **DELTA) for one, other in zip(*grads, strict=True))


def test_balanced_factors_have_the_fewest_parameters():
    for size in (1, 2, 7, 12, 16, 384, 768, 3072):
        best = min((a * a + (size // a) ** 2, a) for a in range(1, size + 1) if size % a == 0)
        assert balanced(size) ** 2 + (size // balanced(size)) ** 2 == best[0]
    assert balanced(768) == 24


@pytest.mark.parametrize("spec", ["krona_b[scale=0.5]", "krona_res[scale=0.5]"])
def test_krona_b_is_beside_the_feed_forward(tiny, spec):
    model, method = build(tiny, spec), spec.split("[")[0]
    branch, x = site(model, "blocks.1.mlp_branch"), torch.randn(2, 5, D, dtype=torch.float64)
    krona = branch.adapters["default"][method]
    block = model.blocks[1]
    expected = (
        block.mlp(x)
        + 0.5 * F.linear(x, torch.kron(krona.A, krona.B))
        + (krona.residual * x if method == "krona_res" else 0)
    )
    assert torch.allclose(block.feed(x, effzoo.attention.Mask()), expected, **DELTA)
    assert (krona.residual is not None) == (method == "krona_res")


# -- subspaces
#     ------------------------------------------------------------------------------------------------------------------


def kronecker_hadamard(size):
    """The definition: H_2n = H_2 kron H_n."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return H


@pytest.mark.parametrize("size", [1, 2, 4, 32, 64, 128, 1024, 2048])
def test_the_fast_transform_is_the_product_with_the_hadamard_matrix(size):
    x, H = torch.randn(3, 2, size, dtype=torch.float64, requires_grad=True), kronecker_hadamard(size)
    assert torch.equal(dense_hadamard(size, x), H) and torch.allclose(hadamard(x), x @ H, **EXACT)
    assert torch.allclose(hadamard(hadamard(x)), size * x, **EXACT)
    mixture = torch.randn_like(x)
    (grad,) = torch.autograd.grad((hadamard(x) * mixture).sum(), x)
    assert torch.allclose(grad, mixture @ H, **EXACT)  # no factor: a backward off by 1 / sqrt(size) is a known error


def test_the_fast_transform_passes_gradcheck():
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x) and torch.autograd.gradgradcheck(hadamard, x)


def explicit(rows, dim, scale, seed):
    """The matrix H G Pi H S, of the definition and the same draws, without knowing what the class makes of them."""
    padded = max(power_of_two(rows), power_of_two(dim))
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (dim,), generator=draw).double() * 2 - 1
    permutation, gauss = torch.randperm(padded, generator=draw), torch.randn(padded, generator=draw).double()
    H, Pi = kronecker_hadamard(padded), torch.eye(padded, dtype=torch.float64)[permutation]
    S = F.pad(signs.diag(), (0, 0, 0, padded - dim))  # [padded, dim]: signs, then zeros below
    return scale * (H @ gauss.diag() @ Pi @ H @ S) / math.sqrt(padded * float(gauss.square().sum()))


@pytest.mark.parametrize(("rows", "dim"), [(100, 7), (128, 32), (5, 40), (64, 64), (1, 1), (33, 100)])
def test_fastfood_is_the_product_of_its_five_factors(rows, dim):
    """Also where theta is longer than the tensor, which a padding to the tensor alone would cut off."""
    fastfood, P = Fastfood(rows, dim, 1.7, seed=5).double(), explicit(rows, dim, 1.7, 5)
    # columns over all padded rows
    assert torch.allclose(P.norm(dim=0), torch.full((dim,), 1.7, dtype=torch.float64), **EXACT)
    theta = torch.randn(dim, dtype=torch.float64, requires_grad=True)
    y = fastfood(theta)
    # G is drawn and scaled in float32
    assert y.shape == (rows,) and torch.allclose(y, P[:rows] @ theta, rtol=0, atol=1e-6)
    mixture = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * mixture).sum(), theta)
    assert torch.allclose(grad, P[:rows].T @ mixture, rtol=0, atol=1e-6) and (grad != 0).all()
    columns = torch.stack([fastfood(unit) for unit in torch.eye(dim, dtype=torch.float64)], dim=1)
    assert torch.allclose(grad, columns.T @ mixture, **EXACT) and torch.autograd.gradcheck(fastfood, theta)


def test_a_dense_projection_has_columns_of_length_one_over_all_targets(tiny):
    model = build(tiny, "intrinsic[dim=30, projection=dense]", drawn=False)
    parts = [
        p.P for path, s in sites(model) if "default" in s.adapters and "intrinsic" in s.adapters["default"]
        for p in s.adapters["default"]["intrinsic"].projections.values()
    ]  # fmt: skip
    P = torch.cat(parts).double()
    assert P.shape == (BLOCKS, 30) and torch.allclose(
        P.norm(dim=0), torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-6
    )
    angles = P.T @ P - torch.eye(30, dtype=torch.float64)
    # independent columns: cosines have the standard deviation 1 / sqrt(D)
    assert angles.abs().max() < 6 / math.sqrt(BLOCKS)


@pytest.mark.parametrize("projection", ["dense", "fastfood"])
def test_a_step_in_the_subspace_is_a_step_of_the_same_length_in_the_weights(tiny, projection):
    model = build(tiny, f"intrinsic[dim=30, projection={projection}]", drawn=False, task="features")
    theta = module(model, "blocks.0.attn.q", "intrinsic").theta
    lengths = []
    for _ in range(20):
        with torch.no_grad():
            theta.normal_()
        lengths.append(
            float(sum(change.square().sum() for change in delta(model).values()) / theta.detach().square().sum())
        )
    assert abs(sum(lengths) / len(lengths) - 1) < 0.1


@pytest.mark.parametrize("projection", ["dense", "fastfood"])
def test_all_targets_move_by_one_theta_each_with_rows_of_its_own(tiny, projection):
    model = build(tiny, f"intrinsic[dim=30, projection={projection}]")
    modules = [
        s.adapters["default"]["intrinsic"]
        for _, s in sites(model)
        if "default" in s.adapters and "intrinsic" in s.adapters["default"]
    ]
    assert len({id(m.theta) for m in modules}) == 1 and len(modules) == LAYERS * 8
    q, k = (module(model, f"blocks.0.attn.{role}", "intrinsic") for role in "qk")
    units = torch.eye(30, dtype=torch.float64)
    P, R = (torch.stack([m.projections["of_weight"](unit) for unit in units], dim=1) for m in (q, k))
    weight = site(model, "blocks.0.attn.q").weight
    assert torch.allclose(q.weight(weight), weight + (P @ q.theta).view(D, D), **EXACT)
    assert abs(float((P * R).sum())) / float(P.norm() * R.norm()) < 0.1


def test_said_scales_each_layer_by_its_own_factor(tiny):
    """theta_i = theta_0 + lambda_i P theta, with P as in the method without factors of the same length of theta."""
    model, plain = build(tiny, "said[dim=32]"), build(tiny, "intrinsic[dim=30]")
    first, second = (module(model, f"blocks.{i}.attn.q", "said") for i in range(LAYERS))
    assert first.theta is second.theta and first.theta.shape == (30,) and first.factor is not second.factor
    assert module(model, "blocks.0.mlp.up", "said").factor is first.factor
    with torch.no_grad():
        module(plain, "blocks.0.attn.q", "intrinsic").theta.copy_(first.theta)
    for i, said in enumerate((first, second)):
        own = site(model, f"blocks.{i}.attn.q").weight
        step = module(plain, f"blocks.{i}.attn.q", "intrinsic").weight(torch.zeros_like(own))
        assert torch.allclose(said.weight(own), own + said.factor * step, **EXACT)
    loss = model(**batch()).logits.square().sum()
    assert all(grad != 0 for grad in torch.autograd.grad(loss, [first.factor, second.factor]))


def test_the_projection_is_drawn_from_the_seed_alone(tiny):
    state = torch.get_rng_state()
    step = {}
    for seed in (0, 0, 1):
        torch.manual_seed(123 + len(step))
        model = build(tiny, f"intrinsic[dim=30, seed={seed}]", drawn=False)
        found = module(model, "blocks.1.mlp.up", "intrinsic").projections["of_weight"](
            torch.ones(30, dtype=torch.float64)
        )
        assert seed not in step or torch.equal(step[seed], found)
        step[seed] = found
    assert not torch.allclose(step[0], step[1])
    torch.set_rng_state(state)
    before = build(tiny, drawn=False)
    now = torch.get_rng_state()
    effzoo.attach(before, "intrinsic[dim=30]|said[dim=30, targets=embed.norm]")
    assert torch.equal(torch.get_rng_state(), now)  # the global generator is left alone


# -- rotations, shared and transformed changes
#     ------------------------------------------------------------------------------------------------------------------


def test_a_rotation_keeps_angles_and_a_chain_of_reflections_too(tiny):
    for spec, form in (("oft[block=6]", "rotated"), ("hra[rank=4]", "reflected")):
        part = module(build(tiny, spec), "blocks.0.attn.q", spec.split("[")[0])
        R = getattr(part, form)(torch.eye(D, dtype=torch.float64)).T
        assert torch.allclose(R @ R.T, torch.eye(D, dtype=torch.float64), **EXACT) and not torch.allclose(
            R, torch.eye(D, dtype=torch.float64)
        )
        assert torch.linalg.det(R).item() == pytest.approx(1)  # an even number of reflections is a rotation


def test_a_rotation_is_the_cayley_transform_of_each_block(tiny):
    oft = module(build(tiny, "oft[block=6]"), "blocks.0.attn.q", "oft")
    R = torch.zeros(D, D, dtype=torch.float64)
    for at, numbers in zip((0, 6, 12), (*oft.blocks, oft.rest), strict=True):
        size, numbers = (6, 6, 4)[at // 6], iter(numbers.tolist())
        Q = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(i + 1, size):
                Q[i, j] = next(numbers)
                Q[j, i] = -Q[i, j]
        eye = torch.eye(size, dtype=torch.float64)
        R[at : at + size, at : at + size] = (eye + Q) @ torch.linalg.inv(eye - Q)
    x = torch.randn(3, 5, D, dtype=torch.float64)
    assert torch.allclose(oft.rotated(x), x @ R.T, **EXACT)


def test_a_spectrum_gives_sums_of_waves(tiny):
    """Entry (u, v) of F with the value c adds s c cos(2 pi (u j / out + v k / in)) / (out in) to entry (j, k)."""
    part = module(build(tiny, "fourierft[frequencies=3, scale=7.0, targets=mlp.up]"), "blocks.0.mlp.up", "fourierft")
    wanted = torch.zeros(MLP, D, dtype=torch.float64)
    j, k = torch.meshgrid(torch.arange(MLP).double(), torch.arange(D).double(), indexing="ij")
    for place, c in zip(part.places.tolist(), part.c.tolist(), strict=True):
        u, v = divmod(place, D)
        wanted += 7.0 * c * torch.cos(2 * math.pi * (u * j / MLP + v * k / D)) / (MLP * D)
    assert torch.allclose(part.weight(torch.zeros(MLP, D, dtype=torch.float64)), wanted, **EXACT)


def test_vera_shares_its_matrices_over_sites_of_any_size(tiny):
    model = build(tiny, "vera[rank=5, seed=3, targets=(attn.q, mlp.up, mlp.down)]")
    parts = [module(model, f"blocks.{i}.{role}", "vera") for i in range(2) for role in ("attn.q", "mlp.up", "mlp.down")]
    shared = parts[0].shared
    assert all(part.shared is shared for part in parts) and shared.A.shape == (5, MLP) and shared.B.shape == (MLP, 5)
    again = build(tiny, "vera[rank=5, seed=3, targets=(attn.q, mlp.up, mlp.down)]")
    assert torch.equal(module(again, "blocks.1.mlp.up", "vera").shared.A, shared.A)
    other = build(tiny, "vera[rank=5, seed=4, targets=(attn.q, mlp.up, mlp.down)]")
    assert not torch.equal(module(other, "blocks.1.mlp.up", "vera").shared.A, shared.A)
    copied = copy.deepcopy(model).float()
    assert len({id(module(copied, f"blocks.{i}.attn.q", "vera").shared) for i in range(2)}) == 1


def test_butterfly_factors_rotate_pairs_of_runs_that_lie_apart(tiny):
    """Entry by entry: factor i > 1 rotates the inputs of run c and of the run 2^(i-2) blocks further, in one block."""
    part = module(build(tiny, "boft[block=4, factors=3]"), "blocks.0.attn.q", "boft")
    R, eye = torch.eye(D, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for factor in range(3):
        B, used = torch.zeros(D, D, dtype=torch.float64), []
        for block in range(4):
            if factor == 0:
                places = [4 * block + j for j in range(4)]
            else:  # runs of two inputs; a group holds 2^(factor + 1) of them
                group, at = divmod(block, 2**factor)
                runs = [group * 2 ** (factor + 1) + at, group * 2 ** (factor + 1) + at + 2**factor]
                places = [2 * run + j for run in runs for j in range(2)]
            numbers, Q = iter(part.blocks[factor, block].tolist()), torch.zeros(4, 4, dtype=torch.float64)
            for i in range(4):
                for j in range(i + 1, 4):
                    Q[i, j] = next(numbers)
                    Q[j, i] = -Q[i, j]
            B[torch.tensor(places)[:, None], torch.tensor(places)] = (eye + Q) @ torch.linalg.inv(eye - Q)
            used += places
        assert sorted(used) == list(range(D))
        R = R @ B
    assert torch.allclose(R @ R.T, torch.eye(D, dtype=torch.float64), **EXACT) and (R.abs() > 1e-12).all()
    weight = torch.randn(7, D, dtype=torch.float64)
    part.s = nn.Parameter(torch.randn(7, dtype=torch.float64))
    assert torch.allclose(part.weight(weight), part.s.diag() @ weight @ R, **EXACT)


@pytest.mark.parametrize(("role", "outputs", "inputs"), [("mlp.up", MLP, D), ("mlp.down", D, MLP), ("attn.q", D, D)])
def test_random_bases_add_up_scaled_and_stretched(tiny, role, outputs, inputs):
    """D = sum_i B_i diag(scales_i) A diag(stretches_i), entry by entry, of the smaller side."""
    model = build(tiny, f"randlora[bases=3, scale=2.0, seed=5, targets=({role}, mlp.up)]")
    part = module(model, f"blocks.1.{role}", "randlora")
    assert part.scales.shape == (3, 6) and part.shared.A.shape == (6, D) and part.shared.B.shape == (MLP, 3, 6)
    assert abs(part.shared.B.std() - 1) < 0.1
    small, large = sorted((inputs, outputs))
    wanted = torch.zeros(large, small, dtype=torch.float64)
    for i in range(3):
        A, B = part.shared.A[:, :small].double(), part.shared.B[:large, i].double()
        wanted += B @ part.scales[i].diag() @ A @ part.stretches[i].diag()
    wanted = 2.0 * (wanted.T if inputs > outputs else wanted)
    assert torch.allclose(delta(model)[f"blocks.1.{role}.weight"], wanted, **EXACT)
    assert numerical_rank(wanted) == D


def test_factors_are_mixtures_of_vectors_of_the_bank(tiny):
    """Run by run: sum_m softmax(z)_m h_m over the k largest logits, one bank for all sites."""
    model = build(tiny, "vblora[rank=3, vectors=7, length=4, k=3, targets=(attn.q, mlp.up)]")
    part, other = module(model, "blocks.0.mlp.up", "vblora"), module(model, "blocks.1.attn.q", "vblora")
    assert part.bank is other.bank and part.bank.shape == (7, 4)
    A, B = torch.zeros(3, D, dtype=torch.float64), torch.zeros(MLP, 3, dtype=torch.float64)
    for factor, logits in (("A", part.logits_A), ("B", part.logits_B)):
        for i in range(logits.shape[0]):
            for j in range(logits.shape[1]):
                order = sorted(range(7), key=lambda m: -logits[i, j, m].item())[:3]
                total = sum(math.exp(logits[i, j, m].item()) for m in order)
                run = sum(math.exp(logits[i, j, m].item()) / total * part.bank[m] for m in order)
                if factor == "A":
                    A[i, 4 * j : 4 * j + 4] = run
                else:
                    B[4 * i : 4 * i + 4, j] = run
    assert torch.allclose(delta(model)["blocks.0.mlp.up.weight"], B @ A, **EXACT)


@pytest.mark.parametrize("spec", ["loha[rank=2]", "vera[rank=5]", "fourierft[frequencies=9]", "oft[block=6]",
                                  "hra[rank=4]", "miss[rank=5]", "lora_fa[rank=2]", "adalora", "boft",
                                  "randlora"])  # fmt: skip
def test_newer_methods_start_as_the_base(tiny, spec):
    bare = build(tiny)
    model = effzoo.attach(copy.deepcopy(bare), spec).eval()
    assert torch.allclose(model(**batch()).last_hidden_state, bare(**batch()).last_hidden_state, **DELTA)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("hra[rank=3]", "reflections come in pairs, got rank=3; give 4"),
        ("oft[block=1]", "a rotation needs a block of 2 or more"),
        ("boft[block=3]", "an even number of them for more than one factor, got block=3 and factors=2"),
        ("boft[block=8, factors=3]", "mix 32 inputs, which do not divide the 16 of 'attn.q'"),
        ("vblora[length=3]", "vectors of length 3 have to divide .* common divisors are those of 16"),
        ("vblora[vectors=2, k=3]", "takes k=3 of 2 vectors"),
    ],
)
def test_newer_methods_refuse_what_is_no_size(tiny, spec, said):
    with pytest.raises(OptionError, match=said):
        build(tiny, spec)


# -- other packages
#     ------------------------------------------------------------------------------------------------------------------


def hf_bert():
    config = transformers.BertConfig(
        vocab_size=41,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=20,
        num_labels=3,
    )
    base = transformers.BertForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            parameter.normal_(1.0 if key.endswith("weight") and parameter.ndim == 1 else 0.0, 0.4)
    return base


def assert_equals_peft(base, config, spec, names, prepare=lambda ours, theirs: None):
    """Copy our drawn adapter into theirs; logits and gradients of every adapter tensor agree to 1e-10. names: our
    tensor -> theirs (a function)."""
    ours = effzoo.attach(effzoo.convert.from_transformers(copy.deepcopy(base)), spec).eval()
    theirs = peft.get_peft_model(base, config).eval()
    prepare(ours, theirs)
    method, pairs = spec.split("[")[0], []
    for i in range(2):
        for role, name in (("q", "query"), ("v", "value")):
            our = getattr(ours.blocks[i].attn, role).adapters["default"][method]
            layer = getattr(theirs.base_model.model.bert.encoder.layer[i].attention.self, name)
            pairs += [(getattr(our, mine), find(layer)) for mine, find in names.items()]
    with torch.no_grad():
        for our, their in pairs:
            our.normal_(0.3, 0.5)
            their.copy_(our)
    assert sum(p.requires_grad for p in theirs.parameters()) == len({id(our) for our, _ in pairs}), (
        "peft trains something else as well"
    )
    ids, mask = torch.randint(5, 41, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    out, other = theirs(input_ids=ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    with theirs.disable_adapter():
        assert (theirs(input_ids=ids, attention_mask=mask).logits - out).abs().max() > 1e-3
    assert torch.allclose(other, out, **EXACT)
    mixture = torch.randn_like(out)
    (out * mixture).sum().backward(), (other * mixture).sum().backward()
    for our, their in pairs:
        assert our.grad.abs().max() > 1e-6 and torch.allclose(our.grad, their.grad, rtol=1e-10, atol=1e-10)


LORA = {"A": lambda layer: layer.lora_A["default"].weight, "B": lambda layer: layer.lora_B["default"].weight}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("lora[rank=4, alpha=6, targets=(attn.q, attn.v)]", {"r": 4, "lora_alpha": 6}),
        ("lora[rank=4, alpha=6, rslora=true, targets=(attn.q, attn.v)]", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        (
            "lora[rank={attn.q: 2, attn.v: 5}, alpha={attn.q: 3, attn.v: 7}]",
            {"r": 5, "lora_alpha": 7, "rank_pattern": {"query": 2}, "alpha_pattern": {"query": 3}},
        ),
    ],
)
def test_lora_equals_peft(spec, options):
    assert_equals_peft(
        hf_bert(), peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.0, **options), spec, LORA
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_equals_peft(rslora):
    config = peft.LoraConfig(target_modules=["query", "value"], r=3, lora_alpha=6, use_dora=True, use_rslora=rslora)
    names = LORA | {"magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight}
    assert_equals_peft(
        hf_bert(), config, f"dora[rank=3, alpha=6, rslora={str(rslora).lower()}, targets=(attn.q, attn.v)]", names
    )


def test_krona_equals_lokr_of_peft_with_whole_factors():
    config = peft.LoKrConfig(target_modules=["query", "value"], r=64, alpha=32, decompose_factor=3)
    names = {"A": lambda layer: layer.lokr_w1["default"], "B": lambda layer: layer.lokr_w2["default"]}
    assert_equals_peft(hf_bert(), config, "krona[shape=(3, 3), scale=0.5, targets=(attn.q, attn.v)]", names)


def test_loha_equals_peft():
    config = peft.LoHaConfig(target_modules=["query", "value"], r=3, alpha=6)
    theirs = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    names = {mine: lambda layer, name=name: getattr(layer, name)["default"] for mine, name in theirs.items()}
    assert_equals_peft(hf_bert(), config, "loha[rank=3, alpha=6, targets=(attn.q, attn.v)]", names)


def test_vera_equals_peft_with_its_random_matrices():
    config = peft.VeraConfig(target_modules=["query", "value"], r=5, projection_prng_key=7)
    names = {"d": lambda layer: layer.vera_lambda_d["default"], "b": lambda layer: layer.vera_lambda_b["default"]}
    assert_equals_peft(hf_bert(), config, "vera[rank=5, seed=7, targets=(attn.q, attn.v)]", names)


def test_fourierft_equals_peft_at_the_same_places():
    config = peft.FourierFTConfig(target_modules=["query", "value"], n_frequency=9, scaling=20.0, random_loc_seed=5)
    base = hf_bert().float()  # peft composes the change in float32
    ours = effzoo.attach(
        effzoo.convert.from_transformers(copy.deepcopy(base)),
        "fourierft[frequencies=9, scale=20.0, seed=5, targets=(attn.q, attn.v)]",
    )
    theirs = peft.get_peft_model(base, config).base_model.model.bert.encoder.layer[1].attention.self.value
    mine = ours.blocks[1].attn.v.adapters["default"]["fourierft"]
    with torch.no_grad():
        mine.c.normal_()
        theirs.fourierft_spectrum["default"].copy_(mine.c)
    assert torch.allclose(mine.weight(torch.zeros(12, 12)), theirs.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_reflections_equal_hra_of_peft():
    config = peft.HRAConfig(target_modules=["query", "value"], r=4)
    names = {"u": lambda layer: Transposed(layer.hra_u["default"])}
    assert_equals_peft(hf_bert(), config, "hra[rank=4, targets=(attn.q, attn.v)]", names)


def test_miss_equals_peft():
    config = peft.MissConfig(target_modules=["query", "value"], r=4)
    names = {"D": lambda layer: Transposed(layer.miss_block["default"])}
    assert_equals_peft(hf_bert(), config, "miss[rank=4, targets=(attn.q, attn.v)]", names)


def test_rotations_equal_oft_of_peft():
    config = peft.OFTConfig(target_modules=["query", "value"], r=0, oft_block_size=4, use_cayley_neumann=False)
    names = {"blocks": lambda layer: layer.oft_R["default"].weight}
    assert_equals_peft(hf_bert(), config, "oft[block=4, targets=(attn.q, attn.v)]", names)


def test_adalora_equals_peft():
    """peft divides its alpha by the rank plus 1e-5, and makes that rank trainable where it casts it to float64."""

    def only_what_it_trains(ours, theirs):
        for key, parameter in theirs.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "ranknum" not in key)

    config = peft.AdaLoraConfig(target_modules=["query", "value"], init_r=4, lora_alpha=6, total_step=10)
    names = {
        "P": lambda layer: layer.lora_B["default"],
        "Q": lambda layer: layer.lora_A["default"],
        "E": lambda layer: Column(layer.lora_E["default"]),
    }
    spec = f"adalora[rank=4, scale={6 / (4 + 1e-5)!r}, targets=(attn.q, attn.v)]"
    assert_equals_peft(hf_bert(), config, spec, names, prepare=only_what_it_trains)


def block_diagonals(blocks):
    return torch.stack([torch.block_diag(*factor) for factor in blocks])


class OnCPU:
    """What peft compiles for CUDA: blocks [N, D, H, H] on diagonals [N, D H, D H]."""

    @staticmethod
    def forward(blocks):
        return [block_diagonals(blocks)]

    @staticmethod
    def backward(grad, blocks):
        with torch.enable_grad():
            again = blocks.detach().requires_grad_()
            return list(torch.autograd.grad(block_diagonals(again), again, grad))


@pytest.mark.parametrize("factors", [1, 2])
def test_butterflies_equal_boft_of_peft(factors, monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: OnCPU)
    config = peft.BOFTConfig(target_modules=["query", "value"], boft_block_size=2, boft_n_butterfly_factor=factors)
    names = {"blocks": lambda layer: Above(layer.boft_R["default"]), "s": lambda layer: Column(layer.boft_s["default"])}
    spec = f"boft[block=2, factors={factors}, targets=(attn.q, attn.v)]"
    assert_equals_peft(hf_bert(), config, spec, names)


def test_randlora_equals_peft_on_the_same_random_matrices():
    """Their columns of B are numbered by (rank, base), ours by (base, rank)."""
    config = peft.RandLoraConfig(target_modules=["query", "value"], r=4, randlora_alpha=8)
    names = {
        "scales": lambda layer: Transposed(layer.randlora_lambda["default"]),
        "stretches": lambda layer: layer.randlora_gamma["default"],
    }

    def same_matrices(ours, theirs):
        theirs.double()
        shared = ours.blocks[0].attn.q.adapters["default"]["randlora"].shared
        layer = theirs.base_model.model.bert.encoder.layer[0].attention.self.query
        A, B = layer.randlora_A["default"], layer.randlora_B["default"]
        shared.A.copy_(A[:, 0])
        shared.B.copy_(B.flatten(1).view(12, 4, 3).transpose(1, 2))

    spec = "randlora[bases=3, scale=2.0, targets=(attn.q, attn.v)]"
    assert_equals_peft(hf_bert(), config, spec, names, prepare=same_matrices)


def test_vblora_equals_peft():
    config = peft.VBLoRAConfig(target_modules=["query", "value"], r=3, num_vectors=7, vector_length=4, topk=2)
    names = {
        "logits_A": lambda layer: layer.vblora_logits_A["default"],
        "logits_B": lambda layer: layer.vblora_logits_B["default"],
        "bank": lambda layer: layer.vblora_vector_bank["default"],
    }
    assert_equals_peft(hf_bert(), config, "vblora[rank=3, vectors=7, length=4, k=2, targets=(attn.q, attn.v)]", names)


class Column:
    """A parameter [n, 1] of peft where ours is [n]."""

    def __init__(self, parameter):
        self.parameter = parameter

    def copy_(self, value):
        self.parameter.copy_(value[:, None])

    @property
    def grad(self):
        return self.parameter.grad[:, 0]


class Above:
    """A parameter of peft, of whose skew-symmetric part ours is what stands above the diagonal."""

    def __init__(self, parameter):
        self.parameter, size = parameter, parameter.shape[-1]
        self.places = torch.triu_indices(size, size, 1)

    def copy_(self, value):
        rows, columns = self.places
        self.parameter.zero_()
        self.parameter[..., rows, columns] = value
        self.parameter[..., columns, rows] = -value

    @property
    def grad(self):  # ours enters twice, theirs at each place with half its value
        return 2 * self.parameter.grad[..., self.places[0], self.places[1]]


class Transposed:
    """A parameter of peft whose transpose is ours."""

    def __init__(self, parameter):
        self.parameter = parameter

    def copy_(self, value):
        self.parameter.copy_(value.T)

    @property
    def grad(self):
        return self.parameter.grad.T


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_base_equal_those_of_peft(init):
    """peft takes s B A out of the base: the products are compared, since vectors have no sign of their own."""
    base = hf_bert().float()  # peft refuses float64 here
    ours = effzoo.attach(
        effzoo.convert.from_transformers(copy.deepcopy(base)), f"lora[rank=3, alpha=3, init={init}, targets=attn.q]"
    )
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["query"], r=3, lora_alpha=3, init_lora_weights=init)
    )
    layer = theirs.base_model.model.bert.encoder.layer[0].attention.self.query
    lora = ours.blocks[0].attn.q.adapters["default"]["lora"]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(lora.B @ lora.A, product, rtol=0, atol=1e-5)


def test_corda_equals_peft_in_float32():
    """On one batch: peft divides each batch by its largest entry."""
    base = hf_bert().float()
    ids = torch.randint(5, 41, (1, 15))
    ours = effzoo.attach(
        effzoo.convert.from_transformers(copy.deepcopy(base)), "lora[rank=3, alpha=3, init=corda, targets=attn.q]"
    )
    effzoo.peft.calibrate(ours, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    config = peft.LoraConfig(
        target_modules=["query"], r=3, lora_alpha=3, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )  # fmt: skip
    preprocess_corda(base, config, run_model=lambda: base(input_ids=ids))
    layer = peft.get_peft_model(base, config).base_model.model.bert.encoder.layer[0].attention.self.query
    lora = ours.blocks[0].attn.q.adapters["default"]["lora"]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(lora.B @ lora.A, product, rtol=0, atol=1e-4) and product.abs().max() > 0.1


@pytest.mark.parametrize("spec", MERGEABLE)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_merging_after_training_gives_the_attached_output(spec, architecture):
    case = TinyModel(architecture, "longformer[window=8]", has_global=True)
    model = effzoo.attach(case.model(), spec)
    train(model, case.batch())
    with torch.no_grad():
        before = model(**case.batch()).logits
        assert torch.allclose(effzoo.merge(model)(**case.batch()).logits, before, **EXACT)
