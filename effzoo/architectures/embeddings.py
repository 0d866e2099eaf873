"""Token, position and type embeddings, and the rows that prompts put in front."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.architectures.config import Config
from effzoo.errors import InputError
from effzoo.sites import Embedding, LayerNorm


class Embeddings(nn.Module):
    """norm(token + position + type), [batch, n] ids -> [batch, rows + n, dim], with `rows` prompt rows in front."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token = Embedding(config.vocab, config.dim, role="embed.token")
        self.position = Embedding(config.max_length + config.position_offset, config.dim, role="embed.position")
        self.token_type = Embedding(config.types, config.dim, role="embed.type") if config.types else None
        self.norm = LayerNorm(config.dim, config.eps, role="embed.norm") if config.norm == "post" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        positions: Tensor | None = None,
        types: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        x = embeds if embeds is not None else self.token(ids)
        batch, n, _ = x.shape
        positions = self.positions(ids, batch, n, x.device) if positions is None else positions.expand(batch, n)
        if self.token_type is not None and types is None:
            types = torch.zeros(batch, n, dtype=torch.long, device=x.device)
        if prompt is not None:
            rows = len(prompt)
            x = torch.cat([prompt.to(x.dtype).expand(batch, -1, -1), x], dim=1)
            positions = self._shifted(positions, rows)
            types = None if types is None else torch.cat([types[:, :1].expand(-1, rows), types], dim=1)
        x = x + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type(types)
        return self.dropout(x if self.norm is None else self.norm(x))

    def positions(self, ids: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor:
        """0, 1, 2, ...; with an offset, padding tokens are not counted and keep the id before the offset (as in RoBERTa)."""
        offset = self.config.position_offset
        if offset and ids is not None and self.config.pad_token is not None:
            present = ids != self.config.pad_token
            return torch.where(present, present.cumsum(dim=1) + offset - 1, offset - 1)
        return (torch.arange(n, device=device) + offset).expand(batch, n)

    def _shifted(self, positions: Tensor, rows: int) -> Tensor:
        """Prompt rows take the first positions and the tokens follow; padding stays where it is."""
        offset = self.config.position_offset
        front = torch.arange(offset, offset + rows, device=positions.device).expand(len(positions), -1)
        return torch.cat([front, torch.where(positions < offset, positions, positions + rows)], dim=1)


def check_inputs(config: Config, rows: int, ids: Tensor | None, embeds: Tensor | None, **others: Tensor | None) -> None:
    """Refuse wrong shapes, dtypes, lengths and ids; `rows` prompt rows count towards the length."""
    if (ids is None) == (embeds is None):
        raise InputError("give either input_ids or inputs_embeds" + (", not both" if ids is not None else ""))
    if ids is not None:
        if ids.ndim != 2 or ids.dtype not in (torch.long, torch.int):
            raise InputError(f"input_ids is an integer tensor [batch, n], got {ids.dtype} of shape {tuple(ids.shape)}")
    elif embeds is not None and (embeds.ndim != 3 or embeds.shape[2] != config.dim or not embeds.is_floating_point()):
        raise InputError(f"inputs_embeds is a float tensor [batch, n, {config.dim}], got {embeds.dtype} of shape {tuple(embeds.shape)}")
    batch, n = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
    if n == 0:
        raise InputError("the sequence is empty: n = 0")
    if n + rows > config.max_length:
        with_rows = f" and {rows} prompt rows" if rows else ""
        raise InputError(
            f"{n} tokens{with_rows} do not fit into max_length {config.max_length}; truncate to {config.max_length - rows}, "
            f"or build the model with max_length={n + rows}"
        )
    for name, tensor in others.items():
        if tensor is None:
            continue
        shapes = [(batch, n), (1, n)] if name == "position_ids" else [(batch, n)]
        if tuple(tensor.shape) not in shapes:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, the input needs {(batch, n)}")
        if name.endswith("_ids") and tensor.dtype not in (torch.long, torch.int):
            raise InputError(f"{name} is an integer tensor, got {tensor.dtype}")
    if not torch.compiler.is_compiling():
        _check_values(config, rows, ids, others)


def _check_values(config: Config, rows: int, ids: Tensor | None, others: dict[str, Tensor | None]) -> None:
    if ids is not None and ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab:
        raise InputError(f"input_ids are in [0, {config.vocab}), got {int(ids.min())} to {int(ids.max())}; is this the model's tokenizer?")
    positions = others.get("position_ids")
    last = config.max_length + config.position_offset - 1
    if positions is not None and positions.device.type == "cpu" and not 0 <= int(positions.min()) <= int(positions.max()) + rows <= last:
        raise InputError(f"position_ids are in [0, {last - rows}], got {int(positions.min())} to {int(positions.max())}")
    types = others.get("token_type_ids")
    if types is not None and types.device.type == "cpu" and not 0 <= int(types.min()) <= int(types.max()) < max(config.types, 1):
        raise InputError(f"token_type_ids are in [0, {max(config.types, 1)}), got {int(types.min())} to {int(types.max())}")
    for name in ("attention_mask", "global_attention_mask"):
        tensor = others.get(name)
        if tensor is not None and tensor.device.type == "cpu" and not bool(((tensor == 0) | (tensor == 1)).all()):
            raise InputError(f"{name} holds 0 and 1 (or booleans), got values from {tensor.min().item()} to {tensor.max().item()}")
