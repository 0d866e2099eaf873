"""The numbers and names that make an encoder-decoder; what `models/bart.toml` holds and `build` overrides."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from effzoo.annotations import Count, Probability, Whole
from effzoo.architectures.config import TASKS, Config, set_by_trainers
from effzoo.errors import IncompatibleError, OptionError

OF_BOTH = ("features", "seq2seq_lm")  # tasks
_OF_ONE_STACK = {  # fields that an encoder-decoder does not have, each with its only value and a reason
    "share_layers": (0, "layers that share a block are numbered by block, and two stacks have two sets of numbers"),
    "residual": ("plain", "a reversible stack keeps two streams, of which cross-attention could read neither"),
    "experts": (0, "the loss that balances experts is computed in one stack"),
    "types": (0, "the decoder's text is no second part of the encoder's"),
    "embedding_dim": (0, "the decoder reads the encoder's embeddings as they are"),
    "pooler": (False, "no head of it reads the first token of the source"),
    "first_norm": (True, "block 0 of each stack is one of several"),
    "lm_transform": (False, "its language-model head reads the decoder's states as they are"),
}


@set_by_trainers
@dataclass(frozen=True)
class EncoderDecoderConfig(Config):
    """Sizes and slots of an encoder and a decoder that reads it: the fields of `Config` are the encoder's and, where
    nothing else is said, the decoder's.

    decoder_layers, decoder_heads, decoder_mlp: of the decoder; 0 for as many as in the encoder.
    decoder_max_length: the positions of the target; 0 for as many as those of the source, max_length.
    decoder_attention: of the decoder to itself, a kind that can be causal: a spec, or one per layer. `attention` is
        that of the encoder; cross-attention is full.
    decoder_start_token: what the decoder reads first; labels are shifted behind it.
    positions: as in `Config`, or "relative": a bias of the scores by the distance of key and query, of relative_buckets
        buckets and alike from relative_distance on, one table for all layers of a stack (Raffel et al. 2020, T5,
        arXiv:1910.10683, section 2.1).
    scaled_logits: whether the states that the language-model head reads are divided by sqrt(dim) (T5 with a tied head).
    activation_dropout, final_dropout: of the hidden units of feed-forwards, and of the states of each stack at the end.
    """

    architecture: Literal["encoder-decoder"]  # type: ignore[assignment]
    positions: Literal["learned", "sinusoidal", "axial", "rotary", "none", "relative"] = "learned"  # type: ignore[assignment]
    lm_transform: bool = False
    pooler: bool = False
    decoder_layers: Whole = 0
    decoder_heads: Whole = 0
    decoder_mlp: Whole = 0
    decoder_max_length: Whole = 0
    decoder_attention: str | dict[Any, Any] | tuple[Any, ...] = "full"
    decoder_start_token: Whole | None = None
    relative_buckets: Count = 32
    relative_distance: Count = 128
    scaled_logits: bool = False
    activation_dropout: Probability = 0.0
    final_dropout: Probability = 0.0

    is_encoder_decoder = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "relative" and (self.relative_buckets, self.relative_distance) != (32, 128):
            raise OptionError(
                f"relative_buckets and relative_distance are for positions='relative', got positions={self.positions!r}"
            )
        if self.relative_buckets % 4 or self.relative_distance <= self.relative_buckets // 2:
            raise OptionError(
                "half of relative_buckets are for either side and half of these for single distances, so it is a "
                f"multiple of 4, and relative_distance is above relative_buckets / 2; got {self.relative_buckets} and "
                f"{self.relative_distance}"
            )
        for name, (only, why) in _OF_ONE_STACK.items():
            if getattr(self, name) != only:
                raise IncompatibleError(
                    f"an encoder-decoder has {name}={only!r}, got {getattr(self, name)!r}: {why}; leave it out"
                )
        if isinstance(self.attention_dropout, tuple) or isinstance(self.rotary_theta, tuple):
            raise OptionError("an encoder-decoder has one attention_dropout and one rotary_theta for both stacks")
        if self.decoder_start_token is not None and self.decoder_start_token >= self.vocab:
            raise OptionError(
                f"decoder_start_token {self.decoder_start_token} is not in a vocabulary of {self.vocab}; give one in it"
            )
        self.decoder()  # checks its sizes

    def encoder(self) -> Config:
        """The encoder as the transformer that it is."""
        return self._stack(architecture="encoder", pooler=False)

    def decoder(self) -> Config:
        """The decoder as the transformer that it is, but for its cross-attention."""
        return self._stack(
            architecture="decoder", layers=self.decoder_layers or self.layers, heads=self.decoder_heads or self.heads,
            mlp=self.decoder_mlp or self.mlp, attention=self.decoder_attention,
            max_length=self.decoder_max_length or self.max_length,
        )  # fmt: skip

    def _stack(self, **own: Any) -> Config:
        # without pad_token, as positions count from the offset whatever the padding is
        given = {f.name: getattr(self, f.name) for f in fields(Config)}
        given["positions"] = "none" if self.positions == "relative" else self.positions
        return Config(**given | {"pad_token": None, "generation": None, **own})

    @property
    def counts_tokens(self) -> bool:
        return False  # the offset of BART is there whatever the padding is

    @property
    def stacks(self) -> dict[str, int]:
        """How many blocks the encoder (`i`) and the decoder (`j`) have."""
        return {"i": self.layers, "j": self.decoder_layers or self.layers}

    def check_task(self, task: str) -> None:
        """Refuse a task that this architecture has no head for."""
        if task not in TASKS:
            raise OptionError(f"task is one of {', '.join(TASKS)}, got {task!r}")
        if task not in OF_BOTH:
            raise IncompatibleError(
                f"{self.name} is an encoder-decoder, which has no head for task={task!r}; it has "
                f"{' and '.join(OF_BOTH)}"
            )
