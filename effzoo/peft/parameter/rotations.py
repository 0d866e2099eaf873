"""Orthogonal fine-tuning: the input of a frozen weight is rotated (OFT, BOFT) or reflected (HRA)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.annotations import Count, Few
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


def skew(numbers: Tensor, size: int) -> Tensor:
    """Q [..., size, size], skew-symmetric, with these numbers above its diagonal.

    numbers: [..., size (size - 1) / 2], row by row.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    upper = numbers.new_zeros(*numbers.shape[:-1], size, size)
    upper[..., rows, columns] = numbers
    return upper - upper.mT


def cayley(numbers: Tensor, size: int) -> Tensor:
    """Rotations (I + Q) (I - Q)^-1 [..., size, size] with Q = skew(numbers); zeros are I."""
    Q, identity = skew(numbers, size), torch.eye(size, dtype=numbers.dtype, device=numbers.device)
    return torch.linalg.solve(identity - Q, identity + Q, left=False)


def turned(blocks: Tensor, R: Tensor) -> Tensor:
    """Each block [block, size] of the last two axes by its own matrix of R [block, size, size]."""
    return torch.einsum("bij,...bj->...bi", R, blocks)


class Rotation(Positionwise, PeftModule):
    """y = W R x + b, R a block-diagonal rotation; merged, W' = W R.

    blocks: [whole blocks, size (size - 1) / 2].
    rest: of the last block, which is smaller where the size does not divide the inputs.
    """

    delta_rank = None

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.inputs, self.size = inputs, min(size, inputs)
        whole, self.left = divmod(inputs, self.size)
        self.blocks = nn.Parameter(torch.zeros(whole, self.size * (self.size - 1) // 2))
        self.rest = nn.Parameter(torch.zeros(self.left * (self.left - 1) // 2)) if self.left > 1 else None

    def rotated(self, x: Tensor) -> Tensor:
        """R x, along the last axis."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # there is no solver of half precision
        R = cayley(self.blocks.to(dtype), self.size).to(x)
        end = self.inputs - self.left
        blocks = rearrange(x[..., :end], "... (block j) -> ... block j", j=self.size)
        parts = [turned(blocks, R).flatten(-2)]
        if self.rest is not None:
            parts.append(x[..., end:] @ cayley(self.rest.to(dtype), self.left).to(x).mT)
        elif self.left:
            parts.append(x[..., end:])
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        return self.rotated(x)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        identity = torch.eye(self.inputs, dtype=weight.dtype, device=weight.device)
        return weight @ self.rotated(identity).T - weight, None  # row i of `rotated(identity)` is R e_i


@peft.register("oft")
class OFT(Method):
    """W' = W R with a rotation R of blocks (I + Q) (I - Q)^-1 on its diagonal, Q skew-symmetric: angles between the
    inputs' directions stay.

    block: size of the blocks; the last one is smaller where it does not divide the inputs.

    It trains in (block - 1) / 2 numbers for each matrix, and rotates the input, so W is not composed anew. The paper
    writes W [in, out] and R W.
    """

    paper = "Qiu et al. 2023, Controlling text-to-image diffusion by orthogonal finetuning, arXiv:2306.07280, eq. 3, 5"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 2e-3
    size = "block"

    def __init__(self, *, block: Count = 32, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        if block < 2:
            raise OptionError(f"{self.name}: a rotation needs a block of 2 or more, got block={block}")
        self.block = block

    def make(self, site: Site) -> PeftModule | None:
        assert isinstance(site, Linear)
        return Rotation(site.in_features, self.block) if site.in_features > 1 else None


class Butterfly(PeftModule):
    """W' = diag(s) W R with R = R_1 R_2 ... R_m, each of rotations of `size` inputs.

    blocks: [m, in / size, size (size - 1) / 2].

    Factor 1 rotates neighbours. Factor i > 1 rotates two runs of size / 2 inputs that are 2^(i - 2) size apart, so that
    m factors together mix size * 2^(m - 1) inputs.
    """

    delta_rank = None

    def __init__(self, inputs: int, outputs: int, size: int, factors: int):
        super().__init__()
        self.size = size
        self.blocks = nn.Parameter(torch.zeros(factors, inputs // size, size * (size - 1) // 2))
        self.s = nn.Parameter(torch.ones(outputs))

    def weight(self, weight: Tensor) -> Tensor:
        dtype, rows = torch.promote_types(weight.dtype, torch.float32), weight  # there is no solver of half precision
        for i, numbers in enumerate(self.blocks):
            halves, R = 2 if i else 1, cayley(numbers.to(dtype), self.size).to(weight)
            sizes = {"half": halves, "at": 2**i, "j": self.size // halves}
            blocks = rearrange(rows, "out (group half at j) -> out (group at) (half j)", **sizes)
            turned_rows = turned(blocks, R.mT)  # w R for each row w
            rows = rearrange(turned_rows, "out (group at) (half j) -> out (group half at j)", **sizes)
        return self.s.to(weight)[:, None] * rows


@peft.register("boft", "butterfly")
class BOFT(Method):
    """W' = diag(s) W R, where R = R_1 R_2 ... R_m is a product of butterfly factors: each rotates blocks of inputs, and
    together they mix far more inputs than a block holds.

    block: size of the blocks, an even number, (I + Q) (I - Q)^-1 with Q skew-symmetric.
    factors: m; 1 is OFT, m mix block * 2^(m - 1) inputs, which has to divide the inputs of the matrix.

    It trains m * in * (block - 1) / 2 + out numbers for each matrix. s starts at 1; it is not in the equation of the
    paper, but in the code of its authors. W is composed anew for each step.
    """

    paper = "Liu et al. 2024, Parameter-efficient orthogonal finetuning via butterfly factorization, arXiv:2311.06243"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 2e-3
    size = "block"

    def __init__(self, *, block: Count = 8, factors: Few = 2, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        if block < 2 or (factors > 1 and block % 2):
            raise OptionError(
                f"{self.name}: blocks have 2 or more inputs, and an even number of them for more than one factor, got "
                f"block={block} and factors={factors}; give block=8, say"
            )
        self.block, self.factors = block, factors

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        mixed = self.block * 2 ** (self.factors - 1)
        if site.in_features % mixed:
            raise OptionError(
                f"{self.name}: {self.factors} factors with blocks of {self.block} mix {mixed} inputs, which do not "
                f"divide the {site.in_features} of {site.role!r}; give a smaller block, or fewer factors"
            )
        return Butterfly(site.in_features, site.out_features, self.block, self.factors)


class Reflections(Positionwise, PeftModule):
    """y = W H_1 ... H_r x + b with H_i = I - 2 u_i u_i^T / u_i^T u_i; merged, W' = W H_1 ... H_r.

    u: [r, in].
    """

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.delta_rank = min(rank, inputs, outputs)
        # twice the same reflection is none
        self.u = nn.Parameter(torch.randn(rank // 2, inputs).repeat_interleave(2, dim=0))

    def reflected(self, x: Tensor) -> Tensor:
        """H_1 ... H_r x, along the last axis."""
        for u in self.u.to(x).flip(0):
            x = x - (2 / u.square().sum()) * (x @ u)[..., None] * u
        return x

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        return self.reflected(x)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return weight @ self.reflected(identity).T - weight, None


@peft.register("hra", "householder")
class HRA(Method):
    """W' = W H_1 ... H_r, a chain of Householder reflections of the input, H_i = I - 2 u_i u_i^T / ||u_i||^2.

    rank: r, an even number: pairs start alike, so that each pair starts as I.

    It trains rank * in numbers for each matrix; the change of W has a rank of at most r.
    """

    paper = "Yuan et al. 2024, Bridging the gap between low-rank and orthogonal adaptation, arXiv:2405.17484, eq. 3"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 2e-3
    size = "rank"

    def __init__(self, *, rank: Count = 8, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        if rank % 2:
            raise OptionError(f"{self.name}: reflections come in pairs, got rank={rank}; give {rank + 1}")
        self.rank = rank

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return Reflections(site.in_features, site.out_features, self.rank)
