"""The layouts we know, and which one a model of ours has on the other side."""

from __future__ import annotations

from effzoo.architectures import Config, Transformer
from effzoo.convert.bert import BERT
from effzoo.convert.gpt2 import GPT2
from effzoo.convert.layout import Layout
from effzoo.convert.longformer import LONGFORMER
from effzoo.convert.roberta import ROBERTA
from effzoo.errors import ConversionError, listing

LAYOUTS = {layout.name: layout for layout in (BERT, ROBERTA, LONGFORMER, GPT2)}
_BY_ATTENTION = {
    ("bert", "full"): BERT,
    ("roberta", "full"): ROBERTA,
    ("roberta", "longformer"): LONGFORMER,
    ("longformer", "full"): ROBERTA,  # the two layouts differ in their attention alone
    ("longformer", "longformer"): LONGFORMER,
    ("gpt2", "full"): GPT2,
}


def class_of(name: str) -> tuple[Layout, str] | None:
    """The layout and the task of a class of transformers, or None."""
    for layout in LAYOUTS.values():
        for task, known in layout.classes.items():
            if known == name:
                return layout, task
    return None


def classes() -> str:
    """Every class name we know, in a sentence."""
    return listing(name for layout in LAYOUTS.values() for name in layout.classes.values())


def family(config: Config) -> str:
    """Layouts that share their weights but for the attention have one family."""
    return "roberta" if config.layout == "longformer" else config.layout


def layout_for(model: Transformer) -> Layout:
    """The layout that computes what this model computes; ConversionError when there is none."""
    kinds = sorted({core.name for core in model.cores()})
    layout = _BY_ATTENTION.get((model.config.layout, kinds[0])) if len(kinds) == 1 else None
    if layout is None:
        known = listing(f"{layout} with {attention}" for layout, attention in _BY_ATTENTION)
        raise ConversionError(
            f"layout {model.config.layout!r} with attention {listing(kinds)} has no counterpart in transformers; "
            f"it has {known}, the same in all layers"
        )
    if model.task not in layout.classes:
        raise ConversionError(f"{layout.name} of transformers has no model for task {model.task!r}; it has {listing(layout.classes)}")
    return layout
