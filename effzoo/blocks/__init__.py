"""What every architecture is built from: the attention layer, the feed-forward, and the block that joins them."""

from effzoo.blocks.attention import Attention
from effzoo.blocks.block import Block, Slots
from effzoo.blocks.experts import Experts
from effzoo.blocks.feedforward import ACTIVATIONS, FeedForward
from effzoo.blocks.positions import Rotary

__all__ = ["ACTIVATIONS", "Attention", "Block", "Experts", "FeedForward", "Rotary", "Slots"]
