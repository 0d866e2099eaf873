"""The numbers and names that make a transformer; what `models/*.toml` hold and `build` overrides."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from effzoo.annotations import (
    Count,
    Few,
    Fraction,
    NotNegative,
    Probability,
    Range,
    Whole,
    annotations_of,
    plain,
    problem,
)
from effzoo.attention import backends
from effzoo.blocks import ACTIVATIONS, Rotary, Slots
from effzoo.errors import IncompatibleError, OptionError, did_you_mean, listing

Epsilon = Annotated[float, Range(1e-20, 1.0)]  # a smaller one is 0 beside the variance of any dtype
Theta = Annotated[float, Range(0.0, 1e12, above=True)]
MOST_EXPERTS = 10_000
OF_TRANSFORMERS = frozenset({  # what pipelines and scripts read of a PreTrainedConfig
    "num_labels", "id2label", "label2id", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "max_position_embeddings", "type_vocab_size", "architectures",
})  # fmt: skip
TOKEN_IDS = {"pad_token_id": "pad_token", "bos_token_id": "bos_token", "eos_token_id": "eos_token"}  # of trainers
C = TypeVar("C")
TASKS = (
    "features", "classification", "token_classification", "question_answering", "masked_lm", "causal_lm",
    "seq2seq_lm",
)  # fmt: skip


def check_fields(config: Any) -> None:
    """Refuse a field of another type or range than its annotation says; lists become tuples, numpy's numbers Python's.

    Every config passes here: keywords of `build`, TOML files, configs of transformers, `dataclasses.replace`.
    """
    for key, annotation in annotations_of(type(config)).items():
        value = getattr(config, key)
        if wrong := problem(value, annotation):
            raise OptionError(f"{key} {wrong}")
        value = plain(value)
        # TOML and JSON have no tuples
        object.__setattr__(config, key, tuple(value) if isinstance(value, list) else value)


class ReadByTrainers:
    """What trainers of transformers read of a configuration, and the few things that they set.

    `pad_token_id`, `bos_token_id` and `eos_token_id` are `pad_token`, `bos_token` and `eos_token`: a trainer sets them
    to those of the tokenizer. `use_cache` is set as well; a cache is used where one is given.
    """

    model_type = "effzoo"
    use_cache = False
    is_encoder_decoder = False
    problem_type = None

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """Entries of an output that are no predictions."""
        return [
            "last_hidden_state", "balance_loss", "hidden_states", "attentions", "encoder_last_hidden_state",
        ]  # fmt: skip

    def get_text_config(self, **given: Any) -> Any:
        """The configuration itself: there are texts alone."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields, and model_type."""
        return {"model_type": self.model_type, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]

    def to_json_string(self) -> str:
        """The same as JSON; specs of attention are texts."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def __getattr__(self, name: str) -> Any:
        if (field := TOKEN_IDS.get(name)) is not None:
            return getattr(self, field, None)
        near = did_you_mean(name, self.__dict__)
        if name in OF_TRANSFORMERS:
            near = "; it is transformers' name, which the config of effzoo.transformers.wrap(model) has"
        raise AttributeError(f"{type(self).__name__} has no field {name!r}{near}")


def set_by_trainers(cls: type[C]) -> type[C]:
    """Let a frozen configuration take what trainers of transformers set; other fields stay frozen."""
    frozen = cls.__setattr__

    def set_one(self: Any, name: str, value: Any) -> None:
        field = TOKEN_IDS.get(name)
        if field is not None and field in annotations_of(cls):
            value = tuple(value) if isinstance(value, list) else value
            if wrong := problem(value, annotations_of(cls)[field]):
                raise OptionError(f"{name} {wrong}")
            object.__setattr__(self, field, value)
        elif name == "use_cache":
            object.__setattr__(self, name, value)
        else:
            frozen(self, name, value)

    cls.__setattr__ = set_one  # type: ignore[method-assign]
    return cls


@set_by_trainers
@dataclass(frozen=True)
class Config(ReadByTrainers):
    """Sizes and slots of one transformer.

    attention: a spec, or one per layer.
    vocab, dim, layers, heads: sizes of the vocabulary, of the hidden states, of the stack, of each attention.
    mlp: inner width of the feed-forward.
    max_length: positions, the prompt's included.
    share_layers: how many blocks there are for all layers, each shared by layers / share_layers of them in a row
        (Lan et al. 2020, ALBERT, arXiv:1909.11942, section 3.1); 0 for a block per layer. What is said per layer
        (window=(32, 64), layers= of methods) is then said per block.
    embedding_dim: width of the embeddings, which a linear layer brings to dim (ALBERT, section 3.1); 0 for dim.
    head_dim: width of a head; 0 for dim / heads.
    kv_heads: heads of keys and values (grouped queries); 0 for all.
    qk_norm: an RMSNorm over each head of queries and keys; "joint": over all heads of a token together (OLMo 2).
    score_dim: scores are q . k / sqrt(score_dim), one or one per layer; 0 for the width of a head.
    score_cap, logit_cap: scores, and the logits of a language-model head, become c tanh(s / c) (Gemma 2); 0 for none.
    attn_bias, attn_out_bias, mlp_bias, mlp_out_bias: which linear layers have a bias; mlp_out_bias is of the last one
        of a feed-forward, None for what mlp_bias says.
    gated: a gated feed-forward.
    mlp_chunk: positions that the feed-forward computes at a time; 0 for all.
    experts: feed-forwards of which a router chooses for each token; 0 for one without a router.
    router: a spec of `effzoo.routing`.
    expert_mlp: inner width of an expert; 0 for mlp.
    expert_every: 2 gives experts to layers 1, 3, 5, ...; 1 to all.
    norm: before a sub-layer ("pre"), after its residual ("post"), after the sub-layer itself ("branch"), or before and
        after the sub-layer ("sandwich").
    norm_kind, norm_bias: LayerNorm, RMSNorm, or RMSNorm that multiplies by 1 + w (Gemma), and whether it has a bias.
    first_norm: whether block 0 of a pre-norm model has a norm before its attention.
    residual: "reversible" has two streams, which end side by side (Gomez et al. 2017, arXiv:1707.04585).
    eps: of the norms.
    activation: of the feed-forward.
    dropout: of embeddings, sub-layers and heads.
    attention_dropout: of the attention weights, one or one per layer.
    positions: learned, sinusoidal, axial, rotary or none.
    axial_shape, axial_dims: size and width of each axis (Kitaev et al. 2020, arXiv:2001.04451, section 4).
    rotary_theta, rotary_scaling: the base of the frequencies, and how they are stretched (`effzoo.blocks.Rotary`; {} in
        a tuple for not at all); one or one per layer.
    rotary_fraction: how much of each head is turned, one or one per layer; 0 in layers without positions.
    types: how many token types there are; 0 for none.
    position_offset: the first position id (RoBERTa counts from pad_token + 1; padding then keeps the id pad_token).
    pad_token, bos_token, eos_token: the token of padding, the one that begins a text, the one or those that end it.
    generation: the options that `effzoo.generate` starts from.
    scale_embeddings: embeddings of tokens times sqrt(dim).
    embed_norm: a norm after the embeddings; None for one in post-norm models.
    tied: the language-model head uses the token embedding.
    lm_bias: the language-model head adds a bias; None for one when masked.
    lm_transform: dense, activation and norm before the language-model head.
    pooling: what a classification head reads: the first token, the mean, or the last token; "late" takes the mean
        behind its dense layer, activation and norm.
    head_dense, head_activation, head_norm, head_bias: what a classification head has before its last layer.
    token_dense: whether the head that labels tokens has them as well.
    transform_bias: whether the dense layer of a head has a bias.
    pooler: a features model ends in a dense tanh layer on the first token.
    backend: what computes attention: "auto", or a name of `effzoo.attention.backends`.
    name, layout, architecture: what it is called, whose weights it can load, and "encoder" or "decoder" (causal).
    paper, hub, package: where it was published, its weights on the hub, and a package that holds them.
    """

    name: str
    architecture: Literal["encoder", "decoder"]
    layout: str
    vocab: Count
    dim: Count
    layers: Few
    heads: Count
    mlp: Count
    max_length: Count
    attention: str | dict[Any, Any] | tuple[Any, ...] = "full"
    share_layers: Whole = 0
    embedding_dim: Whole = 0
    head_dim: Whole = 0
    kv_heads: Whole = 0
    qk_norm: bool | Literal["joint"] = False
    score_dim: NotNegative | tuple[NotNegative, ...] = 0.0
    score_cap: NotNegative = 0.0
    logit_cap: NotNegative = 0.0
    scale_embeddings: bool = False
    attn_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True
    mlp_out_bias: bool | None = None
    gated: bool = False
    mlp_chunk: Whole = 0
    experts: Whole = 0
    router: str = "switch"
    expert_every: Count = 1
    expert_mlp: Whole = 0
    norm: Literal["pre", "post", "branch", "sandwich"] = "post"
    norm_kind: Literal["layer", "rms", "rms_plus_one"] = "layer"
    norm_bias: bool = True
    first_norm: bool = True
    residual: Literal["plain", "reversible"] = "plain"
    eps: Epsilon = 1e-12
    activation: str = "gelu"
    dropout: Probability = 0.1
    attention_dropout: Probability | tuple[Probability, ...] = 0.1
    positions: Literal["learned", "sinusoidal", "axial", "rotary", "none"] = "learned"
    axial_shape: tuple[Count, ...] = ()
    axial_dims: tuple[Count, ...] = ()
    rotary_theta: Theta | tuple[Theta, ...] = 10_000.0
    rotary_scaling: dict[str, Any] | tuple[dict[str, Any], ...] | None = None
    rotary_fraction: Fraction | tuple[Fraction, ...] = 1.0
    types: Whole = 0
    position_offset: Whole = 0
    pad_token: Whole | None = None
    bos_token: Whole | None = None
    eos_token: Whole | tuple[Whole, ...] | None = None
    generation: dict[str, Any] | None = None
    embed_norm: bool | None = None
    tied: bool = True
    lm_bias: bool | None = None
    pooling: Literal["first", "mean", "last", "late"] = "first"
    head_dense: bool = True
    head_norm: bool = False
    head_activation: str = "tanh"
    head_bias: bool = True
    token_dense: bool = False
    pooler: bool = True
    lm_transform: bool = True
    transform_bias: bool = True
    backend: str = "auto"
    paper: str = ""
    hub: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % self.heads and not self.head_dim:
            raise OptionError(
                f"dim {self.dim} does not divide into {self.heads} heads; try "
                f"heads={_nearest_divisor(self.dim, self.heads)}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise OptionError(
                f"kv_heads {self.kv_heads} does not divide the {self.heads} heads; try "
                f"kv_heads={_nearest_divisor(self.heads, self.kv_heads)}"
            )
        choices = {"activation": tuple(ACTIVATIONS), "head_activation": ("tanh", *ACTIVATIONS)}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise OptionError(f"{key} is one of {', '.join(known)}, got {getattr(self, key)!r}")
        backends.known(self.backend)
        if self.residual == "reversible" and self.norm != "pre":
            raise OptionError("a reversible residual stands around a norm that comes first; build it with norm='pre'")
        if not self.first_norm and self.norm != "pre":
            raise OptionError("first_norm=False drops a norm before attention; build it with norm='pre'")
        self._check_layers()
        self._check_positions()
        self._check_experts()
        self._check_sharing()

    def _check_sharing(self) -> None:
        if not self.share_layers:
            return
        if self.layers % self.share_layers:
            near = _nearest_divisor(self.layers, self.share_layers)
            raise OptionError(
                f"share_layers {self.share_layers} does not divide the {self.layers} layers; try share_layers={near}"
            )
        if not self.first_norm and self.share_layers < self.layers:
            raise OptionError(
                "first_norm=False makes layer 0 another one, which can share no block; build it with "
                "first_norm=True or share_layers=0"
            )
        for layer, slots in enumerate(map(self.slots, range(self.layers))):
            first = layer - layer % (self.layers // self.share_layers)
            different = [f.name for f in fields(Slots) if getattr(slots, f.name) != getattr(self.slots(first), f.name)]
            different += ["attention_dropout"] if self.dropped_weights(layer) != self.dropped_weights(first) else []
            if different:
                raise OptionError(
                    f"layers {first} and {layer} share a block, but differ in {listing(different)}; make them alike, "
                    "or share among fewer layers"
                )

    def _check_experts(self) -> None:
        if self.experts > MOST_EXPERTS or self.expert_every > self.layers:
            raise OptionError(
                f"experts is at most {MOST_EXPERTS:,} and expert_every from 1 to the number of layers, {self.layers}, "
                f"got {self.experts} and {self.expert_every}"
            )
        if not self.experts and (self.router != "switch" or self.expert_every != 1 or self.expert_mlp):
            raise OptionError(
                f"router={self.router!r}, expert_every={self.expert_every} and expert_mlp={self.expert_mlp} mean "
                "nothing without experts; give experts=8, say"
            )

    def _check_positions(self) -> None:
        if self.positions == "axial":
            places, width = math.prod(self.axial_shape), sum(self.axial_dims)
            if len(self.axial_shape) != len(self.axial_dims) or places < self.max_length or width != self.embed_dim:
                raise OptionError(
                    f"axial positions need axial_shape with a product of at least max_length {self.max_length} and "
                    f"axial_dims that add up to {'embedding_dim' if self.embedding_dim else 'dim'} {self.embed_dim}, "
                    f"got {self.axial_shape} and {self.axial_dims}"
                )

    def _check_layers(self) -> None:
        """What is said per layer is said for each, and once where all agree."""
        object.__setattr__(self, "rotary_scaling", _without_lists(self.rotary_scaling))
        if isinstance(self.score_dim, (tuple, list)):
            width = self.head_dim or self.dim // self.heads
            object.__setattr__(self, "score_dim", tuple(given or float(width) for given in self.score_dim))
        for name in ("rotary_theta", "rotary_scaling", "rotary_fraction", "score_dim", "attention_dropout"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != self.layers:
                raise OptionError(f"{len(given)} values of {name} for {self.layers} layers; give one, or one per layer")
            if isinstance(given, tuple) and all(value == given[0] for value in given):
                object.__setattr__(self, name, given[0] or None if name == "rotary_scaling" else given[0])

    @property
    def width(self) -> int:
        """Width of the hidden states at the end: the two streams of a reversible model stand side by side."""
        return 2 * self.dim if self.residual == "reversible" else self.dim

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self.embedding_dim or self.dim

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.share_layers or self.layers

    @property
    def stacks(self) -> dict[str, int]:
        """How many blocks each stack has, by the letter of its blocks' numbers in key maps."""
        return {"i": self.blocks}

    @property
    def first_layers(self) -> range:
        """The first layer of each block: every layer, unless some share one."""
        return range(0, self.layers, self.layers // self.blocks)

    def dropped_weights(self, layer: int) -> float:
        """The dropout probability of the attention weights of one layer."""
        return self.attention_dropout[layer] if isinstance(self.attention_dropout, tuple) else self.attention_dropout

    def rotary(self, layer: int = 0) -> Rotary | None:
        """The rotary positions of one layer; None where it has none."""
        said: tuple[Any, ...] = self.rotary_theta, self.rotary_scaling, self.rotary_fraction
        theta, scaling, fraction = (given[layer] if isinstance(given, tuple) else given for given in said)
        if self.positions != "rotary" or not fraction:
            return None
        return Rotary.of(self.head_dim or self.dim // self.heads, theta, scaling or {}, fraction)

    @property
    def angles_change_at(self) -> int | None:
        """The length beyond which rotary angles depend on the longest text of a batch; None where they never do."""
        lengths = [rotary.changes_at for rotary in map(self.rotary, range(self.layers)) if rotary is not None]
        return min((n for n in lengths if n is not None and n < self.max_length), default=None)

    @property
    def keys_change_at(self) -> int | None:
        """The length beyond which the keys of a text are turned anew (longrope); None where they never are."""
        turned = [rotary for rotary in map(self.rotary, range(self.layers)) if rotary is not None]
        lengths = [rotary.changes_at for rotary in turned if rotary.turns_back]
        return min((n for n in lengths if n is not None and n < self.max_length), default=None)

    def slots(self, layer: int = 0) -> Slots:
        """What fills the slots of one block."""
        rotary = self.rotary(layer)
        same = {f.name: getattr(self, f.name) for f in fields(Slots) if f.name in {mine.name for mine in fields(self)}}
        experts = 0 if (layer + 1) % self.expert_every else self.experts
        score_dim = self.score_dim[layer] if isinstance(self.score_dim, tuple) else self.score_dim
        own = {"rotary": rotary, "kv_heads": self.kv_heads or None, "experts": experts, "score_dim": score_dim}
        return Slots(**same | own)

    @property
    def counts_tokens(self) -> bool:
        """Whether positions count tokens and padding stays at the one before them (RoBERTa), which an offset begins."""
        return self.pad_token is not None

    @property
    def causal(self) -> bool:
        return self.architecture == "decoder"

    def check_task(self, task: str) -> None:
        """Refuse a task that this architecture has no head for."""
        if task not in TASKS:
            raise OptionError(f"task is one of {', '.join(TASKS)}, got {task!r}")
        if task == "seq2seq_lm":
            raise IncompatibleError(
                f"{self.name} is one stack, and task={task!r} is for an encoder-decoder; build 'bart', 't5' or "
                "'led-seq2seq'"
            )
        if task == ("masked_lm" if self.causal else "causal_lm"):
            other = "causal_lm" if self.causal else "masked_lm"
            raise IncompatibleError(
                f"{self.name} is a{'n' * (not self.causal)} {self.architecture}, so task={task!r} makes no sense; "
                f"try task={other!r}"
            )


def _without_lists(scaling: Any) -> Any:
    """A scaling of rotary positions as it is compared: TOML and JSON have lists for tuples."""
    if isinstance(scaling, dict):
        return {name: tuple(value) if isinstance(value, list) else value for name, value in scaling.items()}
    return tuple(map(_without_lists, scaling)) if isinstance(scaling, tuple) else scaling


def _nearest_divisor(dim: int, heads: int) -> int:
    return min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(h - heads))
