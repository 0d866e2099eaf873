"""Subspaces of weight changes and intrinsic dimension: each analysis against its definition in float64, and the
experiments' parts on tiny things."""

import math

import numpy as np
import pytest
import torch

import effzoo
from effzoo.errors import DataError, InputError
from effzoo.lab.analyses.intrinsic import crossing, d90
from effzoo.lab.analyses.lora_factors import attached_factors, read_factors
from effzoo.lab.analyses.small_nets import Convolutional, FullyConnected
from effzoo.lab.analyses.subspaces import (
    amplification,
    factored,
    intruder_dimensions,
    participation,
    rank_for_variance,
    subspace_similarity,
)
from effzoo.lab.fit import Examples, logits
from effzoo.lab.score import score
from effzoo.lab.word_order import word_order


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# subspaces


@pytest.mark.parametrize(("rows", "others", "width"), [(3, 7, 11), (5, 5, 5), (1, 4, 9)])
def test_similarity_is_the_squared_norm_of_the_product_of_two_bases(rows, others, width):
    A, B = drawn(rows, width), drawn(others, width, seed=1)
    # eigenvectors of A^T A, the largest first: another way to right singular vectors
    U_A = torch.linalg.eigh(A.T @ A)[1].flip(1)
    U_B = torch.linalg.eigh(B.T @ B)[1].flip(1)
    found = subspace_similarity(A, B)
    assert found.shape == (rows, others)
    for i in range(1, rows + 1):
        for j in range(1, others + 1):
            dense = torch.linalg.matrix_norm(U_A[:, :i].T @ U_B[:, :j]) ** 2 / min(i, j)
            assert abs(found[i - 1, j - 1] - dense) < 1e-10


def test_similarity_is_one_within_and_zero_across():
    basis = torch.linalg.qr(drawn(9, 9))[0]
    one = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ basis[:3]
    other = torch.diag(torch.tensor([2.0, 1.0]).double()) @ basis[3:5]
    assert torch.allclose(subspace_similarity(one, one).diagonal(), torch.ones(3).double(), atol=1e-12)
    assert subspace_similarity(one, other).abs().max() < 1e-12
    both = torch.cat([0.1 * one, other])
    assert abs(subspace_similarity(one, both)[2, 4] - 1) < 1e-12  # the smaller space lies in the larger


def test_similarity_of_random_matrices_is_the_larger_rank_over_the_width():
    found = torch.stack(
        [subspace_similarity(drawn(4, 60, seed=i), drawn(9, 60, seed=100 + i)) for i in range(200)]
    ).mean(dim=0)
    i, j = torch.arange(1, 5)[:, None], torch.arange(1, 10)[None]
    assert torch.allclose(found, torch.maximum(i, j).double() / 60, atol=0.012)  # four standard errors of 200 draws


def test_similarity_refuses_matrices_over_other_inputs():
    with pytest.raises(InputError, match=r"\[2, 5\] and \[2, 6\]"):
        subspace_similarity(torch.ones(2, 5), torch.ones(2, 6))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_amplification_is_what_the_weight_holds_between_the_singular_vectors_of_the_change(rank):
    W, change = drawn(7, 5), drawn(7, 5, seed=1)
    found = amplification(W, change, rank, seed=3)

    def held(matrix):  # || P_left W P_right ||_F with orthogonal projectors, for ||U^T W V||_F
        left, right = (torch.linalg.eigh(gram)[1].flip(1)[:, :rank] for gram in (matrix @ matrix.T, matrix.T @ matrix))
        return float(((left @ left.T) @ W @ (right @ right.T)).norm())

    random = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert found.of_change == pytest.approx(held(change), abs=1e-10)
    assert found.of_weight == pytest.approx(float(torch.linalg.svdvals(W)[:rank].norm()), abs=1e-10)
    assert found.of_random == pytest.approx(held(random), abs=1e-10)
    assert found.factor == pytest.approx(float(change.norm()) / held(change), abs=1e-10)


def test_amplification_of_the_weights_own_direction_and_of_its_published_norms():
    W = drawn(6, 6)
    assert amplification(W, 3 * W, 6).factor == pytest.approx(3)
    assert pytest.approx(21.5, abs=0.1) == 6.91 / 0.32  # table 7: the factor as the paper computes it


@pytest.mark.parametrize(
    ("change", "rank", "said"), [((7, 5), 6, "from 1 to 5"), ((7, 5), 0, "from 1 to 5"), ((5, 7), 2, "one shape")]
)
def test_amplification_refuses_ranks_and_shapes(change, rank, said):
    with pytest.raises(InputError, match=said):
        amplification(torch.ones(7, 5), torch.ones(*change), rank)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_rank_for_variance_is_the_first_approximation_whose_error_is_small_enough(share):
    M = drawn(9, 7) @ torch.diag(torch.logspace(0, -2, 7).double())
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    errors = [float((M - U[:, :k] @ torch.diag(s[:k]) @ Vh[:k]).norm() ** 2 / M.norm() ** 2) for k in range(8)]
    assert rank_for_variance(M, share) == next(k for k in range(8) if errors[k] <= 1 - share + 1e-12)


def test_rank_for_variance_of_low_rank_equal_and_no_values():
    assert rank_for_variance(drawn(8, 3) @ drawn(3, 9, seed=1), 1.0) == 3
    assert [rank_for_variance(torch.eye(10), share) for share in (0.9, 0.91, 1.0)] == [9, 10, 10]
    assert rank_for_variance(torch.zeros(4, 3)) == 0
    with pytest.raises(InputError, match="share"):
        rank_for_variance(torch.eye(3), 0.0)


def test_participation_counts_equal_values_and_is_one_for_rank_one():
    assert participation(torch.eye(5)) == pytest.approx(5)
    assert participation(drawn(6, 1) @ drawn(1, 4)) == pytest.approx(1)
    assert participation(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(16 / 10)


def test_an_intruder_is_a_direction_that_was_not_there():
    before = drawn(8, 6)
    U, s, Vh = torch.linalg.svd(before, full_matrices=True)
    assert intruder_dimensions(before, before, first=6) == 0
    assert intruder_dimensions(before, before + 0.5 * s[1] * U[:, :1] @ Vh[:1], first=6) == 0  # an old direction grows
    # a direction outside the column space comes in
    assert intruder_dimensions(before, before + 50 * s[0] * U[:, 7:] @ Vh[:1], first=6) == 1


def test_intruders_are_counted_as_in_the_definition():
    before, after = drawn(9, 7), drawn(9, 7) + 2 * drawn(9, 7, seed=1)
    x, y = np.linalg.svd(before.numpy())[0][:, :7], np.linalg.svd(after.numpy())[0]
    counts = sum(max(abs(float(x[:, i] @ y[:, j])) for i in range(7)) < 0.5 for j in range(5))
    assert intruder_dimensions(before, after, first=5) == counts > 0


def test_factors_have_the_singular_values_and_directions_of_their_product():
    A, B = drawn(3, 11), drawn(8, 3, seed=1)
    values, right = factored(B, A)
    _, s, Vh = torch.linalg.svd(B @ A)
    assert torch.allclose(values, s[:3], atol=1e-10)
    assert torch.allclose((right @ Vh[:3].T).abs(), torch.eye(3).double(), atol=1e-8)
    with pytest.raises(InputError, match="factors"):
        factored(A, B.T)


# the curve of the intrinsic dimension


def test_d90_is_the_smallest_d_that_reaches_the_share():
    curve = {40: 0.95, 10: 0.5, 20: 0.81}
    assert (d90(curve, 0.9), d90(curve, 0.9, share=0.5), d90(curve, 1.0), d90(curve, 1.2)) == (20, 10, 40, None)


def test_published_curve_of_lenet_crosses_at_the_published_dimension():
    curve = {200: 0.864, 250: 0.887, 275: 0.898, 290: 0.901, 300: 0.903}  # Li et al. 2018, the authors' notebook
    assert d90(curve, 1.0) == 290 and 275 < crossing(curve, 1.0) < 290


def test_crossing_is_straight_over_the_logarithm():
    assert crossing({10: 0.4, 1000: 0.6}, 0.5, share=1.0) == pytest.approx(100)
    assert crossing({10: 0.9}, 1.0) == 10 and crossing({10: 0.8}, 1.0) is None
    falling = {10: 0.5, 20: 0.9, 40: 0.5, 80: 0.95}  # the first crossing counts
    assert 10 < crossing(falling, 1.0) <= 20 + 1e-9


@pytest.mark.parametrize("curve", [{}, {0: 0.5}])
def test_a_curve_needs_dimensions(curve):
    with pytest.raises(InputError, match="map from d"):
        d90(curve, 1.0)


# networks, factors, tasks


def test_networks_have_the_published_numbers_of_parameters():
    def numbers(model):
        return sum(p.numel() for p in model.parameters())

    assert numbers(FullyConnected((784, 200, 200, 10))) == 199_210 and numbers(Convolutional()) == 44_426


@pytest.mark.parametrize(
    "net", [lambda: FullyConnected((63, 5, 10)), lambda: Convolutional((7, 9), kernel=3, padding=1, hidden=(6, 5))]
)
@pytest.mark.parametrize(
    "spec", ["intrinsic[dim=7, targets=*]", "intrinsic[dim=7, projection=dense, targets=*]", "said[dim=9, targets=*]"]
)
def test_networks_move_in_the_subspace_alone(net, spec):
    torch.manual_seed(0)
    model = net().double()
    batch = {"pixels": drawn(4, 1, 7, 9), "labels": torch.tensor([0, 3, 9, 1])}
    before = model(**batch).logits
    effzoo.attach(model, spec)
    assert torch.allclose(model(**batch).logits, before, atol=1e-12)
    model(**batch).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == (9 if "said" in spec else 7) and all(
        p.grad.abs().sum() > 0 for p in trained if p.ndim
    )


def test_networks_refuse_sizes_that_leave_nothing():
    with pytest.raises(InputError, match="too small"):
        Convolutional((8, 8))
    with pytest.raises(InputError, match="widths"):
        FullyConnected((5,))


def test_attached_factors_multiply_to_the_delta(tiny):
    model = effzoo.build("bert", **tiny, peft="lora[rank=3, alpha=6]")
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p)
    deltas = effzoo.peft.delta(model)
    found = attached_factors(model)
    assert {f"{path}.weight" for path in found} == {key for key in deltas if key.endswith("weight")}
    for path, (A, B) in found.items():
        assert torch.allclose(B.double() @ A.double(), deltas[f"{path}.weight"], atol=1e-6)  # float32 factors
    with pytest.raises(InputError, match="no LoRA"):
        attached_factors(effzoo.build("bert", **tiny))


def test_factors_of_a_file_come_in_pairs(tmp_path):
    A, B = np.ones((2, 5), np.float32), np.zeros((4, 2), np.float32)
    np.savez(tmp_path / "good.npz", **{"l.q.lora_A": A, "l.q.lora_B": B, "head.weight": A})
    ((name, pair),) = read_factors(tmp_path / "good.npz").items()
    assert name == "l.q" and pair[0].shape == (2, 5) and pair[1].shape == (4, 2)
    np.savez(tmp_path / "half.npz", **{"l.q.lora_A": A})
    np.savez(tmp_path / "odd.npz", **{"l.q.lora_A": A, "l.q.lora_B": B.T})
    for file, said in (("half.npz", "l.q"), ("odd.npz", "do not fit"), ("none.bin", "no .npz")):
        with pytest.raises(DataError, match=said):
            read_factors(tmp_path / file)


def test_shuffled_texts_keep_their_words_and_ends():
    ids = torch.arange(1, 61).view(5, 12)
    mask = torch.ones(5, 12, dtype=torch.long)
    mask[1, 7:] = mask[2, 5:] = 0
    made = word_order(
        Examples({"input_ids": ids * mask, "attention_mask": mask}, torch.zeros(5, dtype=torch.long)), seed=1
    )
    assert made.labels.tolist() == [0, 1, 0, 1, 0]
    moved = made.inputs["input_ids"]
    assert torch.equal(moved[::2], (ids * mask)[::2]) and torch.equal(
        moved.sort(dim=1).values, (ids * mask).sort(dim=1).values
    )
    assert torch.equal(moved[1, [0, 6]], ids[1, [0, 6]]) and not torch.equal(moved[3], ids[3])
    assert not moved[1, 7:].any()


def test_score_is_accuracy_and_mean_cross_entropy():
    torch.manual_seed(0)
    net = FullyConnected((6, 3))
    examples = Examples({"pixels": torch.randn(7, 1, 2, 3)}, torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    found, p = score(net, examples, bfloat16=False), logits(net, examples).double().softmax(dim=-1)
    assert found.loss == pytest.approx(
        -sum(math.log(float(p[i, y])) for i, y in enumerate(examples.labels.tolist())) / 7, abs=1e-6
    )
    assert found.accuracy == pytest.approx(
        sum(int(p[i].argmax()) == y for i, y in enumerate(examples.labels.tolist())) / 7
    )
