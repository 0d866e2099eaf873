"""Narrow blocks that start as slices of wide ones: of their channels with the largest weights.

Sung et al. 2022, arXiv:2206.06522, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import reduce
from torch import Tensor, nn

from effzoo.errors import OptionError
from effzoo.sites import Embedding, Linear, Norm, Site, sites

STREAM, HIDDEN, COMPARED = "the residual stream", "the feed-forward", "a head's queries and keys"
VALUES = "a head's values"
WITHIN_HEADS = (COMPARED, VALUES)
_SPACES = {
    "mlp.up": (HIDDEN, STREAM),
    "mlp.gate": (HIDDEN, STREAM),
    "mlp.down": (STREAM, HIDDEN),
    "attn.o": (STREAM, VALUES),
}


@torch.no_grad()
def slice_blocks(narrow: Sequence[nn.Module], wide: Sequence[nn.Module], places: Sequence[int]) -> Tensor:
    """Fill narrow block i with the most important channels of wide block places[i]; the channels of the stream that
    stay.

    A channel's importance is the sum of the squares of all weights that read or write it. The channels of the residual
    stream are chosen once for all blocks, hidden units in each block, and dimensions within heads in each block, the
    same for all of its heads (in pairs where they are rotated). What does not depend on these widths (Linformer's E and
    F) is copied. Raises OptionError where the narrow block is wider.
    """
    importance = [_importance(wide[place]) for place in places]
    anywhere = {path: site for block in wide for path, site in sites(block)}  # what blocks share is in one of them
    stream = torch.stack([found[STREAM] for found in importance]).sum(dim=0)
    kept_stream = None
    for slim, place, scores in zip(narrow, places, importance, strict=True):
        sizes = {space: size for space, size in _sizes(slim).items() if space in scores}
        kept = {
            space: _largest(space, stream if space == STREAM else scores[space], size, _rotated(slim))
            for space, size in sizes.items()
        }
        kept_stream = kept[STREAM]
        origin = anywhere | dict(sites(wide[place]))
        for path, site in sites(slim):
            if not site.base():
                continue  # nothing to fill
            if path not in origin:
                raise OptionError(
                    f"ladder: init='pruned' takes slices of the same matrices of the base, and {path} is not in its "
                    "blocks (are feed-forwards experts?); use init='random'"
                )
            _copy(path, slim, site, origin[path], kept)
    assert kept_stream is not None
    return kept_stream


def _spaces(path: str, block: nn.Module) -> tuple[str, str] | None:
    """What the outputs and the inputs of a matrix of the block stand for; None for those that only one kind has."""
    if path in _SPACES:
        return _SPACES[path]
    part, _, name = path.partition(".")
    side = cast(Any, block.get_submodule("attn")).core.projections.get(name) if part == "attn" else None
    return None if side is None else (VALUES if side == "value" else COMPARED, STREAM)


def _matrices(block: nn.Module) -> list[tuple[str, Linear, tuple[str, str]]]:
    return [
        (path, site, spaces)
        for path, site in sites(block)
        if isinstance(site, Linear) and (spaces := _spaces(path, block))
    ]


def _sizes(block: nn.Module) -> dict[str, int]:
    """How many channels each space has."""
    sizes: dict[str, int] = {}
    for _, site, spaces in _matrices(block):
        for space, size in zip(spaces, site.weight.shape, strict=True):
            sizes[space] = size // site.heads if space in WITHIN_HEADS else size
    return sizes


def _importance(block: nn.Module) -> dict[str, Tensor]:
    importance: dict[str, Tensor] = {}
    for _, site, spaces in _matrices(block):
        for axis, space in enumerate(spaces):
            of_channel = site.weight.float().square().sum(dim=1 - axis)
            if space in WITHIN_HEADS:
                of_channel = reduce(of_channel, "(heads d) -> d", "sum", heads=site.heads)
            importance[space] = importance.get(space, 0) + of_channel
    return importance


def _rotated(block: nn.Module) -> bool:
    return getattr(block.get_submodule("attn"), "rotary", None) is not None


def _largest(space: str, scores: Tensor, size: int, rotated: bool) -> Tensor:
    """The channels with the largest scores, ascending; of rotated heads, pairs (j, j + d / 2)."""
    if size > len(scores):
        raise OptionError(
            f"ladder: init='pruned' cannot take {size} channels of {space}, which has {len(scores)}; give a larger "
            "reduction, or init='random'"
        )
    if rotated and space == COMPARED:
        half = len(scores) // 2
        pairs = scores.view(2, half).sum(dim=0).topk(size // 2).indices.sort().values
        return torch.cat([pairs, pairs + half])
    return scores.topk(size).indices.sort().values


def _copy(path: str, block: nn.Module, slim: Site, broad: Site, kept: dict[str, Tensor]) -> None:
    """Fill one site of the narrow block."""
    spaces = _spaces(path, block) if isinstance(slim, Linear) else None
    for name, parameter in slim.base().items():
        value: Tensor = getattr(broad, name)
        if spaces is not None and isinstance(slim, Linear):
            for axis, space in enumerate(spaces[: value.ndim]):
                value = value.index_select(
                    axis,
                    _all_heads(kept[space], value.shape[axis], slim.heads) if space in WITHIN_HEADS else kept[space],
                )
        elif isinstance(slim, Norm):
            value = value[kept[COMPARED if path.startswith("attn.") else STREAM]]
        # learned vectors that are compared, heads side by side
        elif isinstance(slim, Embedding) and value.shape != parameter.shape:
            value = value[:, _all_heads(kept[COMPARED], value.shape[1], parameter.shape[1] // len(kept[COMPARED]))]
        parameter.copy_(value)


def _all_heads(kept: Tensor, total: int, heads: int) -> Tensor:
    """The same dimensions of every head, as places among all heads side by side."""
    starts = torch.arange(heads, device=kept.device) * (total // heads)
    return (starts[:, None] + kept).flatten()
