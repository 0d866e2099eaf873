"""OLMo 2 as transformers lays it out (OLMo et al. 2025, arXiv:2501.00656, section 2.1): Llama with norms after each
sub-layer instead of before it, and one over all heads of queries, and of keys, together.
"""

from __future__ import annotations

import dataclasses

from effzoo.convert import llama
from effzoo.convert.keymap import same
from effzoo.convert.llama import HEAD_NORMS, HEADS, LLAMA, SIZES, SLOTS, biases, whole_heads, write_biases

TASKS = ("features", "classification", "causal_lm")
BODY = tuple(rule for rule in LLAMA.body if "_norm" not in rule.ours[0] or rule.ours[0] == "final_norm") + same(
    {
        "blocks.{i}.attn_norm": "{base}layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp_norm": "{base}layers.{i}.post_feedforward_layernorm",
    }
)

OLMO2 = dataclasses.replace(
    LLAMA,
    name="olmo2",
    prefixes={},
    classes={task: LLAMA.classes[task].replace("Llama", "Olmo2") for task in TASKS},
    body=BODY + HEAD_NORMS,
    heads={task: HEADS[task] for task in TASKS},
    fields=SIZES | {"attn_bias": "attention_bias"},
    slots=SLOTS | {"norm": "branch", "qk_norm": "joint", "mlp_bias": False},
    read=lambda theirs: llama.read(theirs) | biases(theirs),
    write=lambda config: whole_heads(config, llama.write(config)) | write_biases(config),
    inert=frozenset(),
)
