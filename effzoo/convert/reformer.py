"""Reformer as transformers lays it out (Kitaev et al. 2020, arXiv:2001.04451): reversible blocks of LSH and local
attention, axial positions.

What differs on the other side, and what was done about it:
- Its chunks look around a ring (`circular`), which the specs of a converted model say.
- Its rotations come from `hash_seed`, the same in every layer; a converted model hashes with these, and gives the seed
  back. Without a seed it draws others at every call, and ours come from the seed of the spec: a model with such
  rotations is given back without a seed, with a warning.
- Its language-model head holds a bias that transformers does not add before 5.24 (4 did, and the published weights were
  trained with it): ours adds it. From 5.24 on there are two, of which the decoder's is added and the other does
  nothing: ours is the decoder's, and both are written.
  `resize_token_embeddings` makes the two one, and before 5.24 loses the only one: ours is then zero, which is what
      theirs computes.
- While training, it also drops out the hidden units of the feed-forward, rows of the axial positions and the input of
  the classification head.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from effzoo.architectures import Config, Transformer
from effzoo.architectures.transformer import attention_specs
from effzoo.attention.lsh import LSH
from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import Layout
from effzoo.errors import ConversionError
from effzoo.registry import attention as registry
from effzoo.spec import Spec

log = logging.getLogger("effzoo.convert")
_LAYER = "{base}encoder.layers.{i}"
BODY = (
    *same(
        {
            "embeddings.token": "{base}embeddings.word_embeddings",
            "blocks.{i}.attn_norm": f"{_LAYER}.attention.layer_norm",
            "blocks.{i}.attn.v": f"{_LAYER}.attention.self_attention.value",
            "blocks.{i}.attn.o": f"{_LAYER}.attention.output.dense",
            "blocks.{i}.mlp_norm": f"{_LAYER}.feed_forward.layer_norm",
            "blocks.{i}.mlp.up": f"{_LAYER}.feed_forward.dense.dense",
            "blocks.{i}.mlp.down": f"{_LAYER}.feed_forward.output.dense",
            "final_norm": "{base}encoder.layer_norm",
        }
    ),
    Rule(("embeddings.position",), "{base}embeddings.position_embeddings.embedding", optional=True),
    *(
        Rule(
            (f"embeddings.position.axes.{a}",),
            f"{{base}}embeddings.position_embeddings.weights.{a}",
            parameters=("weight",),
            optional=True,
            axis=(a, 2),
        )
        for a in range(2)
    ),
    Rule(("blocks.{i}.attn.qk",), f"{_LAYER}.attention.self_attention.query_key", optional=True),
    Rule(("blocks.{i}.attn.q",), f"{_LAYER}.attention.self_attention.query", optional=True),
    Rule(("blocks.{i}.attn.k",), f"{_LAYER}.attention.self_attention.key", optional=True),
)
LM_HEAD = (  # the decoder's bias, where there is one, comes last and counts
    Rule(("head.out",), "lm_head.decoder", parameters=("weight",)),
    Rule(("head.out",), "lm_head", parameters=("bias",)),
    Rule(("head.out",), "lm_head.decoder", parameters=("bias",), optional=True),
)
_LSH = {
    "rounds": "num_hashes",
    "chunk": "lsh_attn_chunk_length",
    "look_back": "lsh_num_chunks_before",
    "look_forward": "lsh_num_chunks_after",
}
_DROPOUT = {"lsh": "lsh_attention_probs_dropout_prob", "local": "local_attention_probs_dropout_prob"}
_LOCAL = {
    "chunk": "local_attn_chunk_length",
    "look_back": "local_num_chunks_before",
    "look_forward": "local_num_chunks_after",
}


def read(theirs: Any) -> dict[str, Any]:
    """The attention of each layer, the positions, and whether it is a decoder."""
    buckets = tuple(theirs.num_buckets) if isinstance(theirs.num_buckets, (list, tuple)) else theirs.num_buckets
    lsh = {name: getattr(theirs, key) for name, key in _LSH.items()} | (
        {"buckets": buckets} if buckets is not None else {}
    )
    local = {name: getattr(theirs, key) for name, key in _LOCAL.items()}
    specs = {"lsh": str(Spec("lsh", lsh | {"circular": True})), "local": str(Spec("local", local | {"circular": True}))}
    chosen = tuple(specs[kind] for kind in theirs.attn_layers)
    fields = {
        "architecture": "decoder" if theirs.is_decoder else "encoder",
        "attention": chosen[0] if len(set(chosen)) == 1 else chosen,
        "layers": len(theirs.attn_layers),
        "mlp_chunk": theirs.chunk_size_feed_forward,
        "attention_dropout": tuple(getattr(theirs, _DROPOUT[kind]) for kind in theirs.attn_layers),
    }
    if not theirs.axial_pos_embds:
        return fields
    if len(theirs.axial_pos_shape) != 2:
        raise ConversionError(
            f"axial positions of transformers with {len(theirs.axial_pos_shape)} axes have no counterpart in "
            "effzoo's key map; it has 2"
        )
    return fields | {
        "positions": "axial",
        "axial_shape": tuple(theirs.axial_pos_shape),
        "axial_dims": tuple(theirs.axial_pos_embds_dim),
    }


def write(config: Config) -> dict[str, Any]:
    """The same the other way; options that transformers does not have must stand at what it does."""
    fields: dict[str, Any] = {
        "attention_head_size": config.head_dim or config.dim // config.heads,
        "is_decoder": config.causal,
        "attn_layers": [],
        "chunk_size_feed_forward": config.mlp_chunk,
    }
    for layer, spec in enumerate(attention_specs(config)):
        kind = registry.get(spec.name).name
        names = _LSH if kind == "lsh" else _LOCAL
        options = {option.name: option.default for option in registry.options(kind)} | spec.options
        for name, value in {"circular": True, "within_buckets": False, "count_once": False, "stable": False}.items():
            if options.get(name, value) != value:
                raise ConversionError(
                    f"transformers' Reformer has no counterpart for {name}={options[name]!r} of "
                    f"attention {spec}: it has {value!r}"
                )
        given = {key: options[name] for name, key in names.items()} | {_DROPOUT[kind]: config.dropped_weights(layer)}
        if kind == "lsh":
            given["num_buckets"] = (
                list(options["buckets"]) if isinstance(options["buckets"], (list, tuple)) else options["buckets"]
            )
        if any(fields.get(key, value) != value for key, value in given.items()):
            raise ConversionError(
                "transformers' Reformer has the same options and attention_dropout in all layers of one kind, and "
                f"layer {layer}, with attention "
                f"{spec} and attention_dropout={config.dropped_weights(layer)}, differs from one before"
            )
        fields |= given
        fields["attn_layers"].append(kind)
    axial = (
        {"axial_pos_shape": list(config.axial_shape), "axial_pos_embds_dim": list(config.axial_dims)}
        if config.positions == "axial"
        else {}
    )
    return fields | axial | {"axial_pos_embds": config.positions == "axial"}


def finish(model: Transformer, theirs: Any) -> None:
    """Hash as transformers does: with the rotations that its seed gives, drawn in the model's dtype."""
    if theirs.hash_seed is None:
        return
    for core in model.cores():
        if isinstance(core, LSH):
            core.rotate_by(_rotations(core, theirs.hash_seed, model.embeddings.token.weight.dtype))
            core.hash_seed = theirs.hash_seed


def built(model: Transformer) -> dict[str, Any]:
    """The seed of transformers' rotations; None, and a warning, where the model's come from no such seed."""
    cores = [core for core in model.cores() if isinstance(core, LSH)]
    dtype = model.embeddings.token.weight.dtype
    for seed in {core.hash_seed for core in cores}:
        if seed is not None and all(
            torch.equal(core.rotations[: core.rounds].to("cpu", dtype), _rotations(core, seed, dtype)) for core in cores
        ):
            return {"hash_seed": seed}
    if cores:
        log.warning(
            "reformer: no hash_seed of transformers gives the rotations of this model (they are those of the spec's "
            "seed, drawn anew, or of another "
            "dtype): there they are drawn at every call, and outputs differ from here and from call to call"
        )
    return {"hash_seed": None}


def _rotations(core: LSH, seed: int, dtype: torch.dtype) -> Tensor:
    """The rotations [rounds, heads, head_dim, sum of the factors / 2] that transformers draws from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = torch.randn(
            core.context.heads, core.context.head_dim, core.rounds, core.rotations.shape[-1], dtype=dtype
        )
    return drawn.permute(2, 0, 1, 3)


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """The classifier may have a dropout of its own; None means that it has the common one."""
    return {"classifier_dropout": getattr(theirs, "classifier_dropout", None)} if task == "classification" else {}


REFORMER = Layout(
    name="reformer",
    attention=("lsh", "local"),
    prefix="reformer",
    classes={
        "features": "ReformerModel",
        "classification": "ReformerForSequenceClassification",
        "question_answering": "ReformerForQuestionAnswering",
        "masked_lm": "ReformerForMaskedLM",
        "causal_lm": "ReformerModelWithLMHead",
    },
    body=BODY,
    heads={
        "features": (),
        "classification": same({"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}),
        "question_answering": same({"head.out": "qa_outputs"}),
        "masked_lm": LM_HEAD,
        "causal_lm": LM_HEAD,
    },
    tied={},
    fields={
        "vocab": "vocab_size",
        "dim": "hidden_size",
        "heads": "num_attention_heads",
        "head_dim": "attention_head_size",
        "mlp": "feed_forward_size",
        "eps": "layer_norm_eps",
        "dropout": "hidden_dropout_prob",
        "pad_token": "pad_token_id",
    },
    positions="max_position_embeddings",
    activation="hidden_act",
    slots={
        "norm": "pre", "residual": "reversible", "attn_bias": False, "attn_out_bias": False, "types": 0, "tied": False,
        "lm_bias": True, "lm_transform": False, "pooler": False, "pooling": "first", "head_dense": True,
    },
    required={},
    dropouts=dropouts,
    read=read,
    write=write,
    translated=frozenset({"architecture", "attention", "attention_dropout", "layers", "mlp_chunk", "positions",
    "axial_shape", "axial_dims"}), mixed=True,
    finish=finish,
    built=built,
    lost={"lm_head.bias": "lm_head.decoder.weight"},
    reads=frozenset({"attn_layers", "axial_pos_embds", "axial_pos_embds_dim", "axial_pos_shape",
    "chunk_size_feed_forward", "classifier_dropout",
                     "hash_seed", "is_decoder", "num_buckets", "num_hidden_layers", *_DROPOUT.values(), *_LSH.values(),
                     *_LOCAL.values()}),
    inert=frozenset({"axial_norm_std", "chunk_size_lm_head", "intermediate_size",
                     # the published file has them from before local and lsh attention had their own
                     "attention_probs_dropout_prob", "num_chunks_after", "num_chunks_before"}),
)  # fmt: skip
