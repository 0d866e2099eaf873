"""Longformer as transformers lays it out (Beltagy et al. 2020, arXiv:2004.05150): RoBERTa with windows and global
projections.

Their question answering marks the question as global where it is given no mask, from its separators; ours does not:
give `global_attention_mask`, as `effzoo.data.tokenise` does with `global_question=True`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert.keymap import same
from effzoo.convert.roberta import ROBERTA
from effzoo.convert.windows import windows_of
from effzoo.errors import ConversionError
from effzoo.spec import Spec

GLOBAL = same(
    {
        "blocks.{i}.attn.q_global": "{base}encoder.layer.{i}.attention.self.query_global",
        "blocks.{i}.attn.k_global": "{base}encoder.layer.{i}.attention.self.key_global",
        "blocks.{i}.attn.v_global": "{base}encoder.layer.{i}.attention.self.value_global",
    }
)


def read(theirs: Any) -> dict[str, Any]:
    """`attention_window`, one number or one per layer, as an attention spec."""
    # of the files of its authors; transformers has none
    if any(dilation != 1 for dilation in getattr(theirs, "attention_dilation", ())):
        raise ConversionError(
            "longformer of transformers computes without dilation, and attention_dilation is "
            f"{theirs.attention_dilation}"
        )
    windows = theirs.attention_window
    same_everywhere = isinstance(windows, int) or len(set(windows)) == 1
    window = windows if isinstance(windows, int) else windows[0] if same_everywhere else tuple(windows)
    return {"attention": str(Spec("longformer", {"window": window}))}


def write(config: Config) -> dict[str, Any]:
    """The window of each layer; other options of our kind must stand at their defaults."""
    return {"attention_window": windows_of(config, "Longformer")}


LONGFORMER = dataclasses.replace(
    ROBERTA,
    name="longformer",
    relative="roberta",
    attention=("longformer",),
    prefix="longformer",
    classes={task: name.replace("Roberta", "Longformer") for task, name in ROBERTA.classes.items()},
    body=ROBERTA.body + GLOBAL,
    read=read,
    write=write,
    reads=ROBERTA.reads | {"attention_window", "attention_dilation"},
    required={
        **ROBERTA.required,
        "attention_mode": "longformer",
        "autoregressive": False,
        "ignore_attention_mask": False,
    },
)
