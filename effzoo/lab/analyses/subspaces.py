"""What a change of a weight matrix is made of: its subspaces, its rank, what it amplifies, and singular vectors that
were not there before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.errors import InputError


def subspace_similarity(A: Tensor, B: Tensor) -> Tensor:
    """phi(A, B, i, j) = ||U_A^i^T U_B^j||_F^2 / min(i, j), [r_A, r_B] float64 for A [r_A, in] and B [r_B, in].

    U^i [in, i] are the first i right singular vectors, so phi is 1 where the smaller of two subspaces lies in the
    other, and 0 where they are orthogonal. Entry [i - 1, j - 1] is phi(i, j). For matrices [out, in] of low rank give
    `subspace_similarity(A[:r], ...)` of their factors, or cut the answer to the ranks: behind them singular vectors are
    arbitrary. Hu et al. 2021, LoRA, arXiv:2106.09685, section 7.2 and appendix G.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[1]:
        raise InputError(
            f"two matrices over the same inputs are compared, [r, in] each; got {list(A.shape)} and {list(B.shape)}"
        )
    overlap = (_right(A) @ _right(B).T).square().cumsum(dim=0).cumsum(dim=1)
    rows, columns = (torch.arange(1, size + 1, dtype=torch.float64) for size in overlap.shape)
    return overlap / torch.minimum(rows[:, None], columns[None])


def _right(matrix: Tensor) -> Tensor:
    """Right singular vectors as rows, the largest first."""
    directions: Tensor = torch.linalg.svd(matrix.detach().double(), full_matrices=False)[2]
    return directions


@dataclass(frozen=True)
class Amplification:
    """What W holds in the subspaces of a change, of itself and of a random matrix, ||U^T W V||_F, and two norms.

    of_change, of_weight, of_random: ||U^T W V||_F.
    weight, change: ||W||_F and ||dW||_F.
    """

    of_change: float
    of_weight: float
    of_random: float
    weight: float
    change: float

    @property
    def factor(self) -> float:
        """How far the change stretches the directions it has, beside what W does there: ||dW||_F / ||U^T W V||_F."""
        return self.change / self.of_change


def amplification(weight: Tensor, change: Tensor, rank: int, *, seed: int = 0) -> Amplification:
    """Whether a change amplifies what the weight holds: ||U^T W V||_F with singular vectors of dW, W, a random matrix.

    weight, change: [out, in].
    rank: how many singular vectors, the first ones.
    seed: of the random matrix, whose entries are normal.

    Raises InputError for another rank than the matrices can have.

    Hu et al. 2021, LoRA, arXiv:2106.09685, section 7.3 and table 7.
    """
    if weight.shape != change.shape or weight.ndim != 2:
        raise InputError(
            f"a weight and its change have one shape [out, in], got {list(weight.shape)} and {list(change.shape)}"
        )
    if not 1 <= rank <= min(weight.shape):
        raise InputError(
            f"rank is from 1 to {min(weight.shape)} for matrices of shape {list(weight.shape)}, got {rank}"
        )
    W, dW = weight.detach().double(), change.detach().double()
    random = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def share(matrix: Tensor) -> float:
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return float((U[:, :rank].T @ W @ Vh[:rank].T).norm())

    return Amplification(share(dW), share(W), share(random), float(W.norm()), float(dW.norm()))


def rank_for_variance(matrix: Tensor, share: float = 0.9) -> int:
    """The smallest k whose k largest singular values hold this share of the sum of all squares; 0 for zeros.

    It is the squares, unlike in `spectrum.cumulative`: the best approximation of rank k misses at most 1 - share of
    ||M||_F^2.

    Biderman et al. 2024, LoRA learns less and forgets less, arXiv:2405.09673.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is in (0, 1], got {share}")
    energy = torch.linalg.svdvals(matrix.detach().double()).square()
    if not float(energy.sum()):
        return 0
    reached = energy.cumsum(dim=0) / energy.sum() >= share - 1e-12
    return int(reached.double().argmax()) + 1


def intruder_dimensions(before: Tensor, after: Tensor, *, first: int = 10, threshold: float = 0.5) -> int:
    """How many of the first left singular vectors of a trained matrix resemble none of the matrix before training.

    y_j is an intruder when max_i |cos(y_j, x_i)| < threshold over all left singular vectors x_i of `before`.

    Shuttleworth et al. 2024, LoRA vs full fine-tuning: an illusion of equivalence, arXiv:2410.21228, algorithm 1.
    """
    if before.shape != after.shape or before.ndim != 2:
        raise InputError(
            f"a matrix before and after training has one shape [out, in], got {list(before.shape)} and "
            f"{list(after.shape)}"
        )
    if not 1 <= first <= min(before.shape):
        raise InputError(
            f"first is from 1 to {min(before.shape)} for matrices of shape {list(before.shape)}, got {first}"
        )
    x = torch.linalg.svd(before.detach().double(), full_matrices=False)[0]
    y = torch.linalg.svd(after.detach().double(), full_matrices=False)[0][:, :first]
    return int(((x.T @ y).abs().amax(dim=0) < threshold).sum())


def participation(matrix: Tensor) -> float:
    """(s_1 + s_2 + ...)^2 / (s_1^2 + s_2^2 + ...): how many singular values a matrix has in effect.

    From 1 to its rank; 0 for zeros.
    """
    values = torch.linalg.svdvals(matrix.detach().double())
    return float(values.sum().square() / values.square().sum()) if float(values.sum()) else 0.0


def factored(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [r] and right singular vectors [r, in] of B A, without the product, in float64.

    With B = Q_B R_B and A^T = Q_A R_A the small matrix R_B R_A^T has the singular values of B A.

    B: [out, r].
    A: [r, in].
    """
    if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
        raise InputError(f"factors B [out, r] and A [r, in] are multiplied, got {list(B.shape)} and {list(A.shape)}")
    _, R_B = torch.linalg.qr(B.detach().double())
    Q_A, R_A = torch.linalg.qr(A.detach().double().T)
    _, values, Vh = torch.linalg.svd(R_B @ R_A.T)
    return values, Vh @ Q_A.T
