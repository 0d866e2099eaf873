"""Whole models: sizes (`config`), embeddings, the stack of blocks (`transformer`), and heads."""

from effzoo.architectures.config import TASKS, Config
from effzoo.architectures.output import Output
from effzoo.architectures.perceiver import Perceiver
from effzoo.architectures.perceiver_config import PerceiverConfig
from effzoo.architectures.transformer import Transformer

__all__ = ["TASKS", "Config", "Output", "Perceiver", "PerceiverConfig", "Transformer"]
