"""Whole models: sizes (`config`), embeddings, the stack of blocks (`transformer`), and heads."""

from typing import Any

from effzoo.architectures.config import TASKS, Config
from effzoo.architectures.encoder_decoder import EncoderDecoder
from effzoo.architectures.encoder_decoder_config import EncoderDecoderConfig
from effzoo.architectures.output import Output
from effzoo.architectures.perceiver import Perceiver
from effzoo.architectures.perceiver_config import PerceiverConfig
from effzoo.architectures.transformer import Transformer

__all__ = [
    "TASKS", "AnyModel", "Config", "EncoderDecoder", "EncoderDecoderConfig", "Output", "Perceiver",
    "PerceiverConfig", "Transformer", "config_class", "made",
]  # fmt: skip

AnyModel = Transformer | Perceiver | EncoderDecoder


def config_class(architecture: Any) -> Any:
    """The class of the configs of an architecture, as a config names it."""
    return {"perceiver": PerceiverConfig, "encoder-decoder": EncoderDecoderConfig}.get(str(architecture), Config)


def made(config: Config | PerceiverConfig, task: str, num_labels: int) -> Any:
    """A freshly initialised model of a config."""
    if isinstance(config, PerceiverConfig):
        return Perceiver(config, task, num_labels)
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config, task, num_labels)
    return Transformer(config, task, num_labels)
