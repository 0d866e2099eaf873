"""The layouts we know, and which one a model of ours has on the other side."""

from __future__ import annotations

from effzoo.architectures import Config, Transformer
from effzoo.convert.albert import ALBERT
from effzoo.convert.bert import BERT
from effzoo.convert.gpt2 import GPT2
from effzoo.convert.layout import Layout
from effzoo.convert.led import LED
from effzoo.convert.llama import LLAMA, MISTRAL, QWEN3
from effzoo.convert.longformer import LONGFORMER
from effzoo.convert.modernbert import MODERNBERT
from effzoo.convert.reformer import REFORMER
from effzoo.convert.roberta import ROBERTA
from effzoo.errors import ConversionError, listing

LAYOUTS = {
    layout.name: layout
    for layout in (BERT, ALBERT, ROBERTA, LONGFORMER, GPT2, LLAMA, MISTRAL, QWEN3, MODERNBERT, LED, REFORMER)
}
_BY_ATTENTION = {
    ("bert", "full"): BERT,
    ("albert", "full"): ALBERT,
    ("roberta", "full"): ROBERTA,
    ("roberta", "longformer"): LONGFORMER,
    ("longformer", "full"): ROBERTA,  # the two layouts differ in their attention alone
    ("longformer", "longformer"): LONGFORMER,
    ("gpt2", "full"): GPT2,
    ("llama", "full"): LLAMA,
    ("llama", "longformer"): MISTRAL,  # likewise
    ("mistral", "full"): MISTRAL,
    ("mistral", "longformer"): MISTRAL,
    ("qwen3", "full"): QWEN3,
    ("qwen3", "longformer"): QWEN3,
    ("modernbert", "full"): MODERNBERT,
    ("modernbert", "longformer"): MODERNBERT,
    ("led", "longformer"): LED,
    ("reformer", "lsh"): REFORMER,
    ("reformer", "local"): REFORMER,
}
_FAMILY = {"longformer": "roberta", "mistral": "llama"}


def class_of(name: str) -> tuple[Layout, str] | None:
    """The layout and the task of a class of transformers, or None."""
    for layout in LAYOUTS.values():
        for task, known in layout.classes.items():
            if known == name:
                return layout, task
        if name in layout.parts:
            return layout, "features"
    return None


def classes() -> str:
    """Every class name we know, in a sentence."""
    return listing(name for layout in LAYOUTS.values() for name in (*layout.classes.values(), *layout.parts))


def family(config: Config) -> str:
    """Layouts that share their weights but for the attention have one family."""
    return _FAMILY.get(config.layout, config.layout)


def layout_for(model: Transformer) -> Layout:
    """The layout that computes what this model computes; ConversionError when there is none."""
    if model.config.experts:
        raise ConversionError(
            f"a model with {model.config.experts} experts has no counterpart in transformers that "
            "we know; save its state_dict"
        )
    kinds = sorted({core.name for core in model.cores()})
    found = [_BY_ATTENTION.get((model.config.layout, kind)) for kind in kinds]
    layout = found[0] if all(other is found[0] for other in found) else None
    if layout is None or (len(kinds) > 1 and not layout.mixed):
        known = listing(f"{layout} with {attention}" for layout, attention in _BY_ATTENTION)
        mixed = listing(layout.name for layout in LAYOUTS.values() if layout.mixed)
        raise ConversionError(
            f"layout {model.config.layout!r} with attention {listing(kinds)} has no counterpart in transformers; "
            f"it has {known}, the same in all layers but in {mixed}"
        )
    if model.task not in layout.classes:
        raise ConversionError(
            f"{layout.name} of transformers has no model for task {model.task!r}; it has {listing(layout.classes)}"
        )
    return layout
