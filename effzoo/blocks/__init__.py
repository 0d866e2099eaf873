"""What every architecture is built from: the attention layer, the feed-forward, and the block that joins them."""

from effzoo.blocks.attention import Attention
from effzoo.blocks.block import Block
from effzoo.blocks.feedforward import ACTIVATIONS, FeedForward

__all__ = ["ACTIVATIONS", "Attention", "Block", "FeedForward"]
