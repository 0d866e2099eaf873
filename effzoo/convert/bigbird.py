"""BigBird as transformers lays it out (Zaheer et al. 2020, arXiv:2007.14062): BERT with blocks of attention, or with
full attention.

Its `block_sparse` is our kind `bigbird[like_transformers=true]`, with what transformers does beside the paper: in
evaluation every random block is the first block, and the last, global block is that of the padded batch. An input of at
most (5 + 2 random) blocks is computed with full attention on both sides; transformers then goes on with full attention
for every later input, until `set_attention_type("block_sparse")`; a model that has been left so is refused. While
training, transformers drops no attention weights in `block_sparse` where ours does, and drops out embeddings before
their norm where ours does behind it. Its head for question answering has a block of its own, and is not read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.architectures.transformer import attention_specs
from effzoo.convert.bert import BERT, HEADS
from effzoo.convert.keymap import same
from effzoo.convert.layout import ACTIVATIONS
from effzoo.errors import ConversionError
from effzoo.registry import attention as registry
from effzoo.spec import Spec

FIXED = {"ends": True, "like_transformers": True}
TASKS = ("features", "classification", "token_classification", "masked_lm")


def read(theirs: Any) -> dict[str, Any]:
    """The attention, and the activation of the classification head, which is that of the body."""
    full = theirs.attention_type == "original_full"
    blocks = {"block": theirs.block_size, "random": theirs.num_random_blocks, "like_transformers": True}
    return {
        "attention": "full" if full else str(Spec("bigbird", blocks)),
        "head_activation": ACTIVATIONS.get(theirs.hidden_act),
    }


def write(config: Config) -> dict[str, Any]:
    if config.head_activation != config.activation:
        raise ConversionError(
            f"transformers' BigBird has one activation where this model has {config.activation!r} and, in its head, "
            f"{config.head_activation!r}"
        )
    given: list[dict[str, Any]] = []
    for spec in attention_specs(config):
        if registry.get(spec.name).name == "full":
            given.append({"attention_type": "original_full"})
            continue
        options = {option.name: option.default for option in registry.options(spec.name)} | spec.options
        for name, value in FIXED.items():
            if options[name] != value:
                raise ConversionError(
                    f"transformers' BigBird has no counterpart for {name}={options[name]!r} of attention {spec}: it "
                    f"has {value!r}"
                )
        blocks = {"block_size": options["block"], "num_random_blocks": options["random"]}
        given.append({"attention_type": "block_sparse", **blocks})
    if any(other != given[0] for other in given):
        raise ConversionError(f"transformers' BigBird has one attention for all layers, got {config.attention}")
    return given[0]


BIGBIRD = dataclasses.replace(
    BERT,
    name="big_bird",
    attention=("bigbird", "full"),
    classes={task: BERT.classes[task].replace("Bert", "BigBird") for task in TASKS},
    heads={
        **{task: HEADS[task] for task in TASKS},
        "features": same({"head.pooler": "{base}pooler"}),
        "classification": same({"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}),
    },
    required={"is_decoder": False, "add_cross_attention": False, "use_bias": True, "rescale_embeddings": False},
    read=read,
    write=write,
    translated=frozenset({"head_activation"}),
    reads=BERT.reads | {"attention_type", "block_size", "num_random_blocks"},
    inert=frozenset({"sep_token_id"}),  # of its head for question answering
    unread=frozenset({"bert.pooler.weight", "bert.pooler.bias"}),
)
