"""The numbers and names that make a Perceiver; what `models/perceiver*.toml` hold and `build` overrides."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from effzoo.annotations import Count, Few, Probability, Whole
from effzoo.architectures.config import TASKS, Config, Epsilon, ReadByTrainers, check_fields, set_by_trainers
from effzoo.errors import IncompatibleError, OptionError

Sharing = Literal["none", "all_but_first", "all"]
PER_TOKEN = ("token_classification", "masked_lm", "causal_lm")


@set_by_trainers
@dataclass(frozen=True)
class PerceiverConfig(ReadByTrainers):
    """Sizes and slots of one Perceiver: plain names for the latents, `cross_` for the cross-attention.

    latents: how many; in a causal model the last so many positions themselves are the latents.
    dim: width of a latent.
    layers: self-attention layers with weights of their own in one block.
    heads, head_dim, value_dim, mlp: of these layers; 0 stands for head_dim = dim / heads, value_dim = head_dim.
    attention: a spec, or one per layer.
    cross_attends: how often the latents read the input.
    blocks_per_cross: how often a block follows each time.
    share_cross, share_blocks: which of these have the same weights (all, all but the first, none).
    cross_heads, cross_head_dim, cross_value_dim, cross_mlp: of the cross-attention; 0 stands for the input's width /
        cross_heads, for cross_head_dim and for mlp.
    cross_residual: whether what is read adds to the latents.
    vocab: how many tokens there are; 0 for arrays of numbers.
    channels: width of a token's embedding, or of the array.
    grid: the most positions along each axis of the input; (max_length,) when empty.
    positions: learned (added, or beside the input with the width `position_dim` where that is above 0), Fourier
        features with `bands` frequencies up to half the grid, beside the input, or none.
    pooling: what a classification head reads: the mean of the latents, the last one, or one output query
        (Perceiver IO).
    query_dim, decoder_heads, decoder_head_dim, decoder_value_dim, decoder_mlp, decoder_residual: of the output queries
        of tasks with a label per token; 0 stands for query_dim = channels, decoder_mlp = query_dim.
    causal: each position sees the earlier ones only (Perceiver AR).
    final_norm: a norm after the last block.
    head_norm: a norm in a classification head.
    gated, attn_bias, attn_out_bias, mlp_bias, eps, activation, dropout, tied, lm_bias, backend: as in `Config`.
    """

    name: str
    architecture: Literal["perceiver"]
    layout: str
    channels: Count
    latents: Count
    dim: Count
    layers: Few
    heads: Count
    mlp: Count
    max_length: Whole = 0
    vocab: Whole = 0
    attention: str | dict[Any, Any] | tuple[Any, ...] = "full"
    head_dim: Whole = 0
    value_dim: Whole = 0
    cross_attends: Few = 1
    blocks_per_cross: Few = 1
    share_cross: Sharing = "all_but_first"
    share_blocks: Sharing = "all"
    cross_heads: Count = 1
    cross_head_dim: Whole = 0
    cross_value_dim: Whole = 0
    cross_mlp: Whole = 0
    cross_residual: bool = True
    grid: tuple[Count, ...] = ()
    positions: Literal["learned", "fourier", "none"] = "learned"
    position_dim: Whole = 0
    bands: Whole = 0
    pooling: Literal["mean", "last", "query"] = "mean"
    query_dim: Whole = 0
    decoder_heads: Count = 8
    decoder_head_dim: Whole = 0
    decoder_value_dim: Whole = 0
    decoder_mlp: Whole = 0
    decoder_residual: bool = False
    causal: bool = False
    final_norm: bool = False
    head_norm: bool = False
    gated: bool = False
    attn_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True
    eps: Epsilon = 1e-5
    activation: str = "gelu"
    dropout: Probability = 0.0
    attention_dropout: Probability = 0.1
    tied: bool = True
    lm_bias: bool | None = None
    pad_token: Whole | None = None
    backend: str = "auto"
    paper: str = ""
    hub: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_input()
        if self.width % self.cross_heads and not self.cross_head_dim:
            raise OptionError(
                f"an input {self.width} wide does not divide into {self.cross_heads} cross_heads; give cross_head_dim"
            )
        if self.causal and self.width != self.dim:
            raise OptionError(
                f"the latents of a causal Perceiver are inputs themselves: channels {self.width} and "
                f"dim {self.dim} have to be equal"
            )
        self.latent_transformer()  # checks the sizes that both have
        self._fill()

    def _fill(self) -> None:
        """Put numbers in the place of widths of 0."""
        head_dim, query_dim = self.head_dim or self.dim // self.heads, self.query_dim or self.channels
        cross_head_dim = self.cross_head_dim or self.width // self.cross_heads
        decoder_head_dim = self.decoder_head_dim or query_dim // self.decoder_heads * (
            query_dim % self.decoder_heads == 0
        )
        found = {
            "head_dim": head_dim, "value_dim": head_dim, "cross_head_dim": cross_head_dim,
            "cross_value_dim": cross_head_dim, "cross_mlp": self.mlp,
            "query_dim": query_dim, "decoder_head_dim": decoder_head_dim, "decoder_value_dim": decoder_head_dim,
            "decoder_mlp": query_dim,
        }  # fmt: skip
        for name, value in found.items():
            object.__setattr__(self, name, getattr(self, name) or value)

    def _check_input(self) -> None:
        if not self.grid and not self.max_length:
            raise OptionError(
                "give max_length, the most positions of an input, or grid, the most along each of its axes"
            )
        if not self.grid:
            object.__setattr__(self, "grid", (self.max_length,))
        if self.max_length not in (0, math.prod(self.grid)):
            raise OptionError(
                f"grid {self.grid} has {math.prod(self.grid)} positions, max_length is "
                f"{self.max_length}; give one of the two"
            )
        object.__setattr__(self, "max_length", math.prod(self.grid))
        if (self.vocab or self.causal) and len(self.grid) > 1:
            raise OptionError(
                f"tokens and causal models have one axis, the grid {self.grid} has {len(self.grid)}; "
                "use vocab=0 for arrays of numbers"
            )
        if (self.positions == "fourier") != bool(self.bands):
            raise OptionError(
                "bands are for positions='fourier', which needs at least 1; got "
                f"positions={self.positions!r} with bands={self.bands}"
            )
        if self.position_dim and self.positions != "learned":
            raise OptionError(f"position_dim is for positions='learned', got positions={self.positions!r}")

    @property
    def norm(self) -> str:
        """Norms stand before each sub-layer, in every Perceiver."""
        return "pre"

    @property
    def width(self) -> int:
        """Width of the array that the latents read: the channels, and the positions that stand beside them."""
        return self.channels + self.position_dim + len(self.grid) * (2 * self.bands + 1) * bool(self.bands)

    def cross_schedule(self) -> list[int]:
        """Which weights each cross-attention uses."""
        return _schedule(self.cross_attends, self.share_cross)

    def block_schedule(self) -> list[int]:
        """Which weights each block uses."""
        return _schedule(self.cross_attends * self.blocks_per_cross, self.share_blocks)

    def latent_transformer(self) -> Config:
        """The stack over the latents as the transformer that it is, one layer for each with weights of its own."""
        blocks = len(set(self.block_schedule()))
        attention = tuple(self.attention) * blocks if isinstance(self.attention, (tuple, list)) else self.attention
        if isinstance(attention, tuple) and len(attention) != self.layers * blocks:
            raise OptionError(
                f"{len(attention) // blocks} attention specs for {self.layers} layers; give one, or one per layer"
            )
        return Config(
            name=self.name, architecture="decoder" if self.causal else "encoder", layout=self.layout,
            vocab=max(self.vocab, 1), dim=self.dim,
            layers=self.layers * blocks, heads=self.heads, mlp=self.mlp, max_length=self.latents, attention=attention,
            head_dim=self.head_dim,
            attn_bias=self.attn_bias, attn_out_bias=self.attn_out_bias, mlp_bias=self.mlp_bias, gated=self.gated,
            norm="pre", eps=self.eps,
            activation=self.activation, dropout=self.dropout, attention_dropout=self.attention_dropout,
            positions="none", tied=self.tied,
            lm_bias=self.lm_bias, pooling="last" if self.pooling == "last" else "mean", head_dense=False,
            head_norm=self.head_norm, pooler=False, lm_transform=False, backend=self.backend,
        )  # fmt: skip

    def inputs(self) -> Config:
        """The embedded input as a transformer's, for the checks and heads that see its width."""
        return dataclasses.replace(
            self.latent_transformer(),
            dim=self.channels,
            heads=1,
            head_dim=0,
            layers=1,
            attention="full",
            max_length=self.max_length,
        )

    def check_task(self, task: str) -> None:
        """Refuse a task that this model has no head for."""
        if task not in TASKS:
            raise OptionError(f"task is one of {', '.join(TASKS)}, got {task!r}")
        self.latent_transformer().check_task(task)
        if task == "question_answering":
            raise IncompatibleError(f"{self.name} is a Perceiver, which has no head for task={task!r}; take an encoder")
        if task.endswith("_lm") and not self.vocab:
            raise IncompatibleError(
                f"{self.name} reads arrays of numbers, so task={task!r} has no vocabulary to predict; give vocab, or "
                "another task"
            )
        if task in PER_TOKEN and not self.causal and not self.decoder_head_dim:
            raise OptionError(
                f"query_dim {self.query_dim} does not divide into {self.decoder_heads} decoder_heads; "
                "give query_dim or decoder_heads"
            )
        if self.pooling == "query" and self.causal and task == "classification":
            raise IncompatibleError(
                "an output query reads all latents, the causal ones too; use pooling='last' or 'mean' with causal=True"
            )


def _schedule(times: int, share: Sharing) -> list[int]:
    """The number of the weights that each of `times` applications uses."""
    return {"none": list(range(times)), "all_but_first": [min(i, 1) for i in range(times)], "all": [0] * times}[share]
