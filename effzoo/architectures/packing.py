"""Documents that share the rows of a batch: split for the blocks of a decoder, and joined after them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.core import AttentionCore, Mask
from effzoo.checked import known
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, InputError

log = logging.getLogger("effzoo")
_INSTEAD = "give each document a row of its own"
_looked_at: set[torch.device] = set()  # where a batch has been


class Documents:
    """The documents of a packed batch; one starts where a position id does not follow that of the token before it.

    Each becomes a row of its own, so every kind of attention computes it as it does when it stands alone.

    starts bool[batch, n]: True at the first position of each document.
    """

    def __init__(self, starts: Tensor):
        self.batch, n = starts.shape
        starts = starts.clone()
        starts[:, 0] = True
        flat = torch.arange(starts.numel(), device=starts.device)
        self.document = starts.flatten().cumsum(0) - 1
        first = flat[starts.flatten()]
        self.place = flat - first[self.document]
        lengths = self.document.bincount()
        offset = torch.arange(int(lengths.max()), device=starts.device)
        self.valid = offset < lengths[:, None]  # [documents, longest]
        self.index = torch.where(self.valid, first[:, None] + offset, 0)
        self.row = first // n

    def split(self, x: Tensor) -> Tensor:
        """[batch, n, ...] -> [documents, longest, ...]."""
        return x.flatten(0, 1)[self.index]

    def join(self, x: Tensor) -> Tensor:
        """The inverse, without what fills up shorter documents."""
        return x[self.document, self.place].view(self.batch, -1, *x.shape[2:])

    def mask(self, mask: Mask) -> Mask:
        """The mask of the documents."""
        n = len(self.document) // self.batch
        valid = self.valid if mask.valid is None else self.valid & self.split(mask.valid)
        return dataclasses.replace(
            mask,
            valid=valid,
            is_global=None if mask.is_global is None else valid & self.split(mask.is_global),
            position_ids=None if mask.position_ids is None else self.split(mask.position_ids.expand(self.batch, n)),
            tasks=None if mask.tasks is None else mask.tasks[self.row],
            start=None if mask.start is None else self.split(mask.start),
            _memo={},
        )


def documents_of(positions: Tensor, batch: int) -> tuple[Tensor, Documents | None]:
    """The position ids [batch or 1, n], and the documents of a batch by them; None where each row is one document."""
    starts = F.pad(positions.expand(batch, -1).diff(dim=1) != 1, (1, 0))
    if torch.compiler.is_compiling():
        return known(
            positions,
            ~starts.any(),
            f"position_ids start again, and compiled code has no rows for several documents; {_INSTEAD}",
        ), None
    return positions, Documents(starts) if bool(starts.any()) else None


def warn_of_documents(positions: Tensor, valid: Tensor) -> None:
    """Warn that documents see each other where an attention mask stands beside position ids that start again at 0.

    On an accelerator, which would be waited for, only the first batch is looked at.
    """
    if torch.compiler.is_compiling() or (positions.device in _looked_at and not at_hand(positions)):
        return
    _looked_at.add(positions.device)
    again = (positions[:, 1:] == 0) & valid[:, 1:] & valid[:, :-1]
    if bool(again.any()):
        log.warning(
            "position_ids start again at 0 beside an attention_mask, which alone says what is seen, as in "
            "transformers: the documents see each other; leave attention_mask out to keep them apart, or %s",
            _INSTEAD,
        )


def check_packed(cores: Iterable[AttentionCore], task: str, prompt_length: int, cached: bool) -> None:
    """Refuse what has no meaning for several documents in a row."""
    what = "position_ids start again, so the row holds several documents"
    if task == "classification":
        raise InputError(f"{what}, and a classification head labels whole rows; {_INSTEAD}")
    if cached or prompt_length:
        why = (
            "a cache holds one for each row"
            if cached
            else f"{prompt_length} prompt tokens stand before the first alone"
        )
        raise InputError(f"{what}, but {why}; {_INSTEAD}")
    ring = next((core.name for core in cores if getattr(core, "circular", False)), None)
    if ring:
        raise IncompatibleError(
            f"{what}, and attention {ring!r} with circular=true computes a short one otherwise "
            f"beside a longer one; {_INSTEAD}"
        )
