"""FourierFT: the change of a weight has few coefficients in its Fourier transform (Gao et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, NonZero, Seed
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Linear, PeftModule, Site


class Spectrum(PeftModule):
    """W' = W + s Re(IDFT(F)), where F [out, in] holds c at the places and is 0 elsewhere.

    c: [frequencies].
    places: of c in F, row by row.
    """

    delta_rank = None
    places: Tensor

    def __init__(self, places: Tensor, scale: float):
        super().__init__()
        self.scale = scale
        self.c = nn.Parameter(torch.zeros(len(places)))
        self.register_buffer("places", places, persistent=False)

    def weight(self, weight: Tensor) -> Tensor:
        c = self.c.to(torch.promote_types(weight.dtype, torch.float32))  # there is no transform of half precision
        F = c.new_zeros(weight.numel()).index_put((self.places,), c).view(weight.shape)
        return weight + self.scale * torch.fft.ifft2(F).real.to(weight)


@peft.register("fourierft")
class FourierFT(Method):
    """W' = W + s Re(IDFT(F)): `frequencies` entries of F [out, in] are trained, at random places; the others are 0.

    frequencies: how many, in each matrix; one with fewer entries has all of them trained.
    scale: s; IDFT divides by out * in, so it is large.
    seed: of the places, which are drawn from it whenever the adapter is attached: matrices of one shape have the same.

    It trains `frequencies` numbers for each matrix. They start at 0, where the paper draws them, so that the model
    starts as it is.
    """

    paper = (
        "Gao et al. 2024, Parameter-efficient fine-tuning with discrete Fourier transform, arXiv:2405.03003, eq. 2-4"
    )
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 5e-2
    size = "frequencies"

    def __init__(
        self,
        *,
        frequencies: Count = 1000,
        scale: NonZero = 150.0,
        seed: Seed = 0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.frequencies, self.scale, self.seed = frequencies, scale, seed

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        entries = site.weight.numel()
        count = min(self.frequencies, entries)
        if site.weight.is_meta:
            places = torch.empty(count, dtype=torch.long, device="meta")
        else:
            draw = torch.Generator().manual_seed(self.seed)
            places = torch.randperm(entries, generator=draw, device="cpu")[:count].to(site.weight.device)
        return Spectrum(places, self.scale)
