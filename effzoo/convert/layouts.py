"""The layouts we know, and which one a model of ours has on the other side."""

from __future__ import annotations

from importlib import import_module

from effzoo.architectures import Config, EncoderDecoder, Transformer
from effzoo.convert.layout import Layout
from effzoo.errors import ConversionError, listing

FILES = (
    "bert",
    "albert",
    "roberta",
    "distilbert",
    "electra",
    "rotary_bert",
    "longformer",
    "bigbird",
    "gpt2",
    "llama",
    "eurobert",
    "smollm3",
    "olmo2",
    "gemma",
    "mixtral",
    "modernbert",
    "led",
    "bart",
    "t5",
    "reformer",
)
LAYOUTS = {
    layout.name: layout
    for file in FILES
    for layout in vars(import_module(f"effzoo.convert.{file}")).values()
    if isinstance(layout, Layout)
}


def class_of(name: str, *, encoder: bool = False) -> tuple[Layout, str] | None:
    """The layout and the task of a class of transformers, or None.

    encoder: of an encoder-decoder the encoder alone, where it has a layout of its own.
    """
    wholes = [(layout, task) for layout in LAYOUTS.values() for task, known in layout.classes.items() if known == name]
    parts = [(layout, "features") for layout in LAYOUTS.values() if name in layout.parts]
    return next(iter([*parts, *wholes] if encoder else [*wholes, *parts]), None)


def classes() -> str:
    """Every class name we know, in a sentence."""
    return listing(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.classes.values()))


def family(config: Config) -> str:
    """The name that layouts have in common whose weights differ in those of the attention alone."""
    return LAYOUTS[config.layout].family if config.layout in LAYOUTS else config.layout


def _counterpart(layout: str, kind: str) -> Layout | None:
    """The layout with this attention kind: the model's own, or another of its family."""
    own = LAYOUTS.get(layout)
    if own is None:
        return None
    relatives = [other for other in LAYOUTS.values() if other.family == own.family]
    return next((other for other in (own, *relatives) if kind in other.attention), None)


def layout_for(model: Transformer | EncoderDecoder) -> Layout:
    """The layout that computes what this model computes; ConversionError when there is none."""
    own = LAYOUTS.get(model.config.layout)
    if bool(model.config.experts) != (own is not None and own.routes):
        if own is not None and own.routes:
            raise ConversionError(
                f"{own.name} of transformers has experts, and this model none; build it with experts=8, say, or "
                "another layout"
            )
        raise ConversionError(
            f"a model with {model.config.experts} experts has no counterpart in transformers that "
            "we know; save its state_dict"
        )
    stack, decoder = (model.encoder, model.decoder) if isinstance(model, EncoderDecoder) else (model, None)
    kinds = sorted({core.name for core in stack.cores()})
    if decoder is not None and (other := {core.name for core in decoder.cores()} - {"full"}):
        raise ConversionError(
            f"a decoder of transformers that reads an encoder has full attention, and this one {listing(sorted(other))}"
        )
    layout, *others = [_counterpart(model.config.layout, kind) for kind in kinds]
    if any(other is not layout for other in others):
        layout = None
    if layout is None or (len(kinds) > 1 and not layout.mixed):
        known = listing(f"{known.name} with {kind}" for known in LAYOUTS.values() for kind in known.attention)
        mixed = listing(known.name for known in LAYOUTS.values() if known.mixed)
        raise ConversionError(
            f"layout {model.config.layout!r} with attention {listing(kinds)} has no counterpart in transformers; "
            f"it has {known}, the same in all layers but in {mixed}"
        )
    if model.task not in layout.classes:
        raise ConversionError(
            f"{layout.name} of transformers has no model for task {model.task!r}; it has {listing(layout.classes)}"
        )
    return layout
