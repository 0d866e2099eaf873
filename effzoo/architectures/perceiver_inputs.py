"""What a Perceiver reads: tokens, or arrays of numbers of any shape, with learned or Fourier positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effzoo.architectures.embeddings import check_inputs, check_tensors
from effzoo.architectures.perceiver_config import PerceiverConfig
from effzoo.errors import InputError
from effzoo.sites import Embedding


class Inputs(nn.Module):
    """Token ids [batch, n] or an array [batch, *axes, channels] -> the byte array of the paper, [batch, n, width].

    Learned positions are added, or put beside the channels when the config says `position_dim`; Fourier features are
    put beside (Jaegle et al. 2021, arXiv:2103.03206, section 3.2).
    """

    def __init__(self, config: PerceiverConfig):
        super().__init__()
        self.config, self.sizes = config, config.inputs()
        self.token = Embedding(config.vocab, config.channels, role="embed.token") if config.vocab else None
        learned = config.positions == "learned"
        width = config.position_dim or config.channels
        self.position = Embedding(config.max_length, width, role="embed.position") if learned else None

    def prompt(self) -> Tensor | None:
        """Prompt tokens in front of the others, or None."""
        return None if self.token is None else self.token.prompt()

    def forward(
        self, ids: Tensor | None, embeds: Tensor | None, position_ids: Tensor | None, prompt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The byte array [batch, p + n, width] after p prompt tokens, and its places in the grid, int[1 or batch, p +
        n]."""
        x = embeds if embeds is not None else self.token(ids)  # type: ignore[misc]
        axes = x.shape[1:-1]
        positions = grid_index(axes, self.config.grid, x.device)[None] if position_ids is None else position_ids
        x = x.flatten(1, -2)
        if prompt is not None:
            p = prompt.shape[-2]
            x = torch.cat([prompt.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
            in_front = torch.arange(p, device=x.device).expand(len(positions), -1)
            positions = torch.cat([in_front, positions + p], dim=1)
            axes = x.shape[1:-1]
        if self.config.positions == "fourier":
            features = fourier(axes, self.config.grid, self.config.bands, x.device).to(x.dtype)
            return torch.cat([x, features.expand(len(x), -1, -1)], dim=-1), positions
        if self.position is None:
            return x, positions
        where = self.position(positions).to(x.dtype)
        if self.config.position_dim:
            return torch.cat([x, where.expand(len(x), -1, -1)], dim=-1), positions
        return x + where, positions

    def check(
        self,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
        prompt_length: int,
    ) -> None:
        """Raise InputError for what does not fit."""
        config = self.config
        if position_ids is not None and config.positions != "learned":
            raise InputError(
                f"position_ids choose among learned positions; {config.name} has positions={config.positions!r}"
            )
        check_tensors(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids)
        if ids is not None and self.token is None:
            raise InputError(
                f"{config.name} reads arrays of numbers: give inputs_embeds [batch, {_axes(config.grid)}, "
                f"{config.channels}], not input_ids"
            )
        if len(config.grid) == 1:
            return check_inputs(
                self.sizes, prompt_length, 0, ids, embeds, attention_mask=mask, position_ids=position_ids
            )
        if position_ids is not None:
            raise InputError(f"position_ids are for inputs with one axis; that of {config.name} has {len(config.grid)}")
        if embeds is None:
            raise InputError(f"give inputs_embeds [batch, {_axes(config.grid)}, {config.channels}]")
        if embeds.ndim != len(config.grid) + 2 or embeds.shape[-1] != config.channels or not embeds.is_floating_point():
            raise InputError(
                f"inputs_embeds is a float tensor [batch, {_axes(config.grid)} at most, {config.channels}], the "
                f"channels last, got {embeds.dtype} of shape {tuple(embeds.shape)}"
            )
        axes = tuple(embeds.shape[1:-1])
        if len(embeds) == 0:
            raise InputError("there is nothing to compute with: a batch of 0")
        if 0 in axes or any(size > most for size, most in zip(axes, config.grid, strict=True)):
            raise InputError(
                f"an input of {_axes(axes)} does not fit into the grid of {_axes(config.grid)}; build "
                f"the model with grid={axes}"
            )
        shapes = (embeds.shape[:-1], (len(embeds), math.prod(axes)))
        if mask is not None and not any(mask.shape == shape for shape in shapes):
            raise InputError(f"attention_mask has shape {tuple(mask.shape)}, the input needs {tuple(shapes[0])}")
        return None


def grid_index(axes: Sequence[int], grid: Sequence[int], device: torch.device) -> Tensor:
    """The index of each position of an array in a grid that may be larger, int[prod(axes)]."""
    index = torch.zeros((), dtype=torch.long, device=device)
    for size, most in zip(axes, grid, strict=True):
        index = index[..., None] * most + torch.arange(size, device=device)
    return index.flatten()


def fourier(axes: Sequence[int], resolution: Sequence[int], bands: int, device: torch.device | None = None) -> Tensor:
    """(p, sin(pi f p), cos(pi f p)) of each position, float64[prod(axes), d (2 bands + 1)].

    p runs from -1 to 1 along an axis; f takes `bands` equally spaced values from 1 to resolution / 2, the Nyquist
    frequency of the largest input. Order: p of all axes, then the sines of all axes, then the cosines (section 3.2 and
    appendix D).
    """
    places: list[Tensor] = []
    sines: list[Tensor] = []
    cosines: list[Tensor] = []
    for axis, (size, most) in enumerate(zip(axes, resolution, strict=True)):
        p = torch.linspace(-1, 1, size, dtype=torch.float64, device=device)[:, None]
        angle = math.pi * p * torch.linspace(1, most / 2, bands, dtype=torch.float64, device=device)
        for values, columns in ((p, places), (angle.sin(), sines), (angle.cos(), cosines)):
            along = values.reshape([size if other == axis else 1 for other in range(len(axes))] + [-1])
            columns.append(along.expand(*axes, -1))
    return torch.cat([*places, *sines, *cosines], dim=-1).flatten(0, -2)


def _axes(axes: Sequence[int]) -> str:
    return ", ".join(map(str, axes))
