"""Token, position and type embeddings, and the prompt tokens in front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from effzoo.architectures.config import Config
from effzoo.checked import within
from effzoo.errors import InputError, shown
from effzoo.sites import Embedding, Linear

# torch reads uint8 as a mask, and cuts a bound to the size of the integers that it is compared with
INDEX_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
)  # fmt: skip


class Embeddings(nn.Module):
    """norm(token + position + type): ids [batch, n] -> [batch, p + n, dim], with the p tokens of a prompt in front.

    Embeddings that are narrower than the blocks go through a linear layer at the end (ALBERT, section 3.1). The
    positions are learned, sinusoidal or axial, or there are none (rotary positions act in attention). With
    `scale_embeddings` those of tokens are multiplied by sqrt(dim) (Vaswani et al. 2017, section 3.4; Gemma);
    inputs_embeds and prompts stay as they are.

    tokens: False: the embeddings of tokens are given, as an encoder-decoder gives them to its decoder.
    """

    def __init__(self, config: Config, *, tokens: bool = True):
        super().__init__()
        self.config = config
        scale = math.sqrt(config.embed_dim) if config.scale_embeddings else 1.0
        token = Embedding(config.vocab, config.embed_dim, scale=scale, role="embed.token") if tokens else None
        self.token = cast(Embedding, token)
        self.position = _table(config)
        self.token_type = Embedding(config.types, config.embed_dim, role="embed.type") if config.types else None
        with_norm = config.norm == "post" if config.embed_norm is None else config.embed_norm
        self.norm = config.slots().make_norm(config.embed_dim, "embed.norm") if with_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.project = Linear(config.embed_dim, config.dim, role="embed.project") if config.embedding_dim else None

    def prompt(self) -> Tensor | None:
        """The prompt tokens of active adapters, in front of every input: [p, dim], [batch, p, dim] or None."""
        return None if self.token is None else self.token.prompt()

    def forward(
        self,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        positions: Tensor | None = None,
        types: Tensor | None = None,
        prompt: Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The embeddings and their position ids [batch, p + n], after `start` positions that a cache holds."""
        if embeds is None:
            if self.token is None:
                raise InputError("a decoder that reads a source is given inputs_embeds, as the source has the tokens")
            embeds = self.token(ids)
        x = embeds
        batch, n, _ = x.shape
        positions = self.positions(ids, batch, n, x.device) + start if positions is None else positions.expand(batch, n)
        if self.token_type is not None and types is None:
            types = torch.zeros(batch, n, dtype=torch.long, device=x.device)
        if prompt is not None:
            p = prompt.shape[-2]
            x = torch.cat([prompt.to(x.dtype).expand(batch, -1, -1), x], dim=1)
            positions = self._shifted(positions, p)
            types = None if types is None else torch.cat([types[:, :1].expand(-1, p), types], dim=1)
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        if self.token_type is not None:
            x = x + self.token_type(types).to(x.dtype)
        x = self.dropout(x if self.norm is None else self.norm(x))
        return x if self.project is None else self.project(x), positions

    def positions(self, ids: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor:
        """0, 1, 2, ...; from an offset, where there is one, and padding has the id before it (as in RoBERTa)."""
        offset = self.config.position_offset
        if offset and ids is not None and self.config.counts_tokens:
            pad = cast(int, self.config.pad_token)
            present = ids != pad
            return torch.where(present, present.cumsum(dim=1) + offset - 1, offset - 1)
        return (torch.arange(n, device=device) + offset).expand(batch, n)

    def _shifted(self, positions: Tensor, p: int) -> Tensor:
        """The p prompt tokens take the first positions and the others follow; padding stays where it is."""
        offset = self.config.position_offset
        front = torch.arange(offset, offset + p, device=positions.device).expand(len(positions), -1)
        return torch.cat([front, torch.where(positions < offset, positions, positions + p)], dim=1)


def _table(config: Config) -> nn.Module | None:
    """The module that embeds position ids, or None."""
    if config.positions == "learned":
        return Embedding(config.max_length + config.position_offset, config.embed_dim, role="embed.position")
    if config.positions == "axial":
        return AxialPositions(config.axial_shape, config.axial_dims)
    return SinusoidalPositions(config.embed_dim) if config.positions == "sinusoidal" else None


class AxialPositions(nn.Module):
    """e(p) = [e_1(i), e_2(j), ...]: a position p has coordinates (i, j, ...) in a grid, each with an embedding.

    prod(shape) positions cost sum(shape_a dims_a) parameters (Kitaev et al. 2020, arXiv:2001.04451, section 4). In
    training transformers also drops out whole columns of these embeddings; here the dropout of all embeddings acts.

    shape: the size of the grid along each axis; the last one runs fastest.
    dims: the width of each axis's embeddings.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.axes = nn.ModuleList(
            Embedding(size, dim, role="embed.position") for size, dim in zip(shape, dims, strict=True)
        )

    def forward(self, positions: Tensor) -> Tensor:
        embeddings = []
        for axis, size in zip(reversed(self.axes), reversed(self.shape), strict=True):
            embeddings.append(axis(positions % size))
            positions = positions // size
        return torch.cat(embeddings[::-1], dim=-1)


class SinusoidalPositions(nn.Module):
    """(sin(p w_0), cos(p w_0), sin(p w_1), ...) with w_j = 10000^(-2j/dim); nothing is learned.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=positions.device)
        angle = positions.unsqueeze(-1).double() * torch.exp(pair.double() * (-math.log(10_000.0) / self.dim))
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.dim]
        return table.to(torch.get_default_dtype())


def check_tensors(**given: object) -> None:
    """Refuse what is no dense tensor, masks and ids of a dtype that is not read, and tensors on several devices."""
    first = None
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} is a tensor, got {shown(value)} ({type(value).__name__}); torch.tensor(...) "
                "makes one of a list"
            )
        if value.is_nested or value.layout is not torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise InputError(
                f"{name} is a dense tensor, got a {kind} one; .to_dense() makes one of a sparse tensor, "
                "and padding of a nested one"
            )
        if name.endswith("_ids") and value.dtype not in INDEX_DTYPES:
            raise InputError(
                f"{name} is an integer tensor, got {value.dtype} of shape {tuple(value.shape)}; int64 and int32 are "
                "read, as .long() makes them"
            )
        if name.endswith("_mask") and value.dtype not in MASK_DTYPES:
            raise InputError(
                f"{name} holds 0 and 1 as booleans, integers or floats, got {value.dtype}; .bool() makes such a mask"
            )
        first = (name, value.device) if first is None else first
        if value.device != first[1]:
            raise InputError(
                f"{first[0]} is on {first[1]} and {name} on {value.device}; bring both to the device of the model"
            )


def check_device(model: nn.Module, **given: Tensor | None) -> None:
    """Refuse a tensor on another device than the model, unless hooks of accelerate bring inputs to their weights."""
    here = next((parameter.device for parameter in model.parameters()), None)
    for name, value in given.items():
        if value is None or here is None or value.device == here:
            continue
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise InputError(
                f"{name} is on {value.device} and the model on {here}; bring it there, as in {name}.to({str(here)!r})"
            )


def check_inputs(
    config: Config, prompt_length: int, past: int, ids: Tensor | None, embeds: Tensor | None, **others: Tensor | None
) -> None:
    """Refuse wrong shapes, dtypes and lengths; prompt tokens and the `past` tokens of a cache count as well."""
    check_tensors(input_ids=ids, inputs_embeds=embeds, **others)
    if (ids is None) == (embeds is None):
        raise InputError("give either input_ids or inputs_embeds" + (", not both" if ids is not None else ""))
    if ids is not None:
        if ids.ndim != 2:
            raise InputError(f"input_ids is an integer tensor [batch, n], got {ids.dtype} of shape {tuple(ids.shape)}")
    elif embeds is not None and (
        embeds.ndim != 3 or embeds.shape[2] != config.embed_dim or not embeds.is_floating_point()
    ):
        raise InputError(
            f"inputs_embeds is a float tensor [batch, n, {config.embed_dim}], got {embeds.dtype} of "
            f"shape {tuple(embeds.shape)}"
        )
    batch, n = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
    if n == 0 or batch == 0:
        raise InputError(
            f"there is nothing to compute with: {'the sequence is empty, n = 0' if n == 0 else 'a batch of 0'}"
        )
    if n + prompt_length + past > config.max_length:
        more = f" and {prompt_length} prompt tokens" * bool(prompt_length) + f" after {past} in the cache" * bool(past)
        raise InputError(
            f"{n} tokens{more} do not fit into max_length {config.max_length}; truncate to "
            f"{config.max_length - prompt_length}, or build the model with max_length={n + prompt_length + past}"
        )
    for name, tensor in others.items():
        if tensor is None:
            continue
        shapes = [(batch, n + past if name == "attention_mask" else n)]
        shapes += [(1, n)] if name == "position_ids" else []
        if not any(tensor.shape == shape for shape in shapes):  # `in` knows no symbolic sizes of compiled code
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, the input needs {shapes[0]}")


def checked(config: Config, prompt_length: int, name: str, ids: Tensor | None) -> Tensor | None:
    """Token, type or position ids, once none is out of range; positions of the prompt come before those given."""
    if ids is None:
        return None
    if name == "position_ids":
        last = config.max_length + config.position_offset - 1 - prompt_length
        return within(ids, last, name, f"[0, {last}]")
    most = config.vocab if name == "input_ids" else max(config.types, 1)
    advice = "; is this the model's tokenizer?" if name == "input_ids" else ""
    return within(ids, most - 1, name, f"[0, {most})", advice)
