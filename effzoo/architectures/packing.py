"""Documents that share the rows of a batch: each is computed as it is when it stands alone.

Attention takes the documents apart, so every kind can; all else computes each position by itself, in the packed rows.
Where an adapter or a prompt reads whole rows, the documents become rows before the first block.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.core import AttentionCore, Mask
from effzoo.checked import known, within
from effzoo.devices import at_hand, sent
from effzoo.errors import IncompatibleError, InputError

log = logging.getLogger("effzoo")
_INSTEAD = "give each document a row of its own"
_LIKE = 0.7  # documents of at least this share of the longest one are padded to it, and computed with it
_looked_at: set[torch.device] = set()  # where a batch has been


class Documents:
    """The documents of a packed batch. Their layout decides shapes, so it is computed on the host.

    starts bool[batch, n]: True at the first position of each; on the CPU.
    inside bool[batch, n]: True in a document, False at padding; None without padding; on the CPU.
    device: that of the batch.
    """

    def __init__(self, starts: Tensor, inside: Tensor | None, device: torch.device):
        self.batch, self.n = starts.shape
        self.device = device
        self.inside = None if inside is None else inside.flatten()
        begins = starts.flatten()
        self.number = (begins.cumsum(0) - 1).clamp(min=0)  # of the document at each position
        self.first = begins.nonzero()[:, 0]
        here = self.number if self.inside is None else self.number[self.inside]
        self.lengths = here.bincount(minlength=len(self.first))

    @cached_property
    def rows(self) -> Rows:
        """One row for each document, in their order."""
        return Rows(self, [list(range(len(self.first)))])

    @cached_property
    def like(self) -> Rows:
        """Documents of like lengths together, which saves padding."""
        lengths: list[int] = self.lengths.tolist()
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            if not groups or lengths[number] < _LIKE * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(number)
        return Rows(self, groups)


class Rows:
    """Groups of documents: in each they are the rows of a batch, padded to the longest."""

    def __init__(self, documents: Documents, groups: list[list[int]]):
        self.shape = documents.batch, documents.n
        self.groups = [_Group(documents, torch.tensor(numbers)) for numbers in groups]
        bases, total = torch.empty_like(documents.first), 0  # where the row of each document begins in the flat groups
        for numbers, group in zip(groups, self.groups, strict=True):
            rows, longest = group.index.shape
            bases[numbers] = torch.arange(total, total + rows * longest, longest)
            total += rows * longest
        place = bases[documents.number] + torch.arange(len(documents.number)) - documents.first[documents.number]
        self.padded = documents.inside is not None
        place = place if documents.inside is None else torch.where(documents.inside, place, total)
        self.place = sent(place, documents.device)

    def each(self, x: Tensor, mask: Mask, compute: Callable[[Tensor, Mask], Tensor]) -> Tensor:
        """compute(documents, their mask) for x [batch, n, dim], joined again; zeros at padding."""
        parts = zip(self.groups, self._masks(mask), strict=True)
        return self.join([compute(group.split(x), own) for group, own in parts])

    def join(self, parts: list[Tensor]) -> Tensor:
        """[documents, longest, dim] of each group -> [batch, n, dim]."""
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        flat = F.pad(flat, (0, 0, 0, 1)) if self.padded else flat
        return flat[self.place].view(*self.shape, -1)

    def _masks(self, mask: Mask) -> list[Mask]:
        """The mask of each group, the same in all layers; decisions are those of the layer that asks."""
        masks = mask.memo(self, lambda: [group.mask(mask) for group in self.groups])
        if mask.decisions is None:
            return [dataclasses.replace(own, decisions=None) for own in masks]
        decisions = [mask.decisions.setdefault(("documents", number), {}) for number in range(len(masks))]
        return [dataclasses.replace(own, decisions=of) for own, of in zip(masks, decisions, strict=True)]


class _Group:
    """Documents as the rows of a batch.

    index int[documents, longest]: their positions in the flat batch; 0 at padding.
    valid bool[documents, longest]: True at tokens.
    row int[documents]: the row of the batch in which each stands.
    """

    def __init__(self, documents: Documents, numbers: Tensor):
        first, lengths = documents.first[numbers], documents.lengths[numbers]
        offset = torch.arange(int(lengths.max()))
        valid = offset < lengths[:, None]
        self.valid = sent(valid, documents.device)
        self.index = sent(torch.where(valid, first[:, None] + offset, 0), documents.device)
        self.row = sent(first // documents.n, documents.device)

    def split(self, x: Tensor) -> Tensor:
        """[batch, n, ...] -> [documents, longest, ...]."""
        return x.flatten(0, 1)[self.index]

    def mask(self, mask: Mask) -> Mask:
        """The mask of the documents."""
        valid = self.valid if mask.valid is None else self.valid & self.split(mask.valid)
        batch = -1 if mask.start is None else len(mask.start)
        return dataclasses.replace(
            mask,
            valid=valid,
            is_global=None if mask.is_global is None else valid & self.split(mask.is_global),
            position_ids=None if mask.position_ids is None else self.split(mask.position_ids.expand(batch, -1)),
            tasks=None if mask.tasks is None else mask.tasks[self.row],
            start=None if mask.start is None else self.split(mask.start),
            ids=None if mask.ids is None else self.split(mask.ids),
            documents=None,
            _memo={},
        )


def documents_by_id(document_ids: Tensor) -> tuple[Tensor, Documents | None]:
    """Which positions hold a token, and the documents; None where each row is one document from its beginning."""
    if torch.compiler.is_compiling():
        raise IncompatibleError(f"compiled code has no rows for several documents; leave document_ids out: {_INSTEAD}")
    document_ids = within(document_ids, 2**31 - 1, "document_ids", "0 (padding), 1, 2, ...")
    there = document_ids > 0
    ids = document_ids.cpu()
    inside = ids > 0
    starts = inside & (F.pad(ids, (1, 0))[:, :-1] != ids)
    return there, Documents(starts, inside, document_ids.device) if bool(starts[:, 1:].any()) else None


def documents_of(positions: Tensor, batch: int) -> tuple[Tensor, Documents | None]:
    """The position ids [batch or 1, n], and the documents of a batch by them; None where each row is one document."""
    starts = F.pad(positions.expand(batch, -1).diff(dim=1) != 1, (1, 0))
    if torch.compiler.is_compiling():
        return known(
            positions,
            ~starts.any(),
            f"position_ids start again, and compiled code has no rows for several documents; {_INSTEAD}",
        ), None
    starts = starts.cpu()
    if not bool(starts.any()):
        return positions, None
    starts[:, 0] = True
    return positions, Documents(starts, None, positions.device)


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
            "transformers: the documents see each other; give document_ids or leave attention_mask out to keep them "
            "apart, or %s",
            _INSTEAD,
        )


def check_packed(cores: Iterable[AttentionCore], task: str, cached: bool, by_id: bool) -> None:
    """Refuse what has no meaning for several documents in a row."""
    what = f"{'document_ids differ' if by_id else 'position_ids start again'}, so the row holds several documents"
    if task in ("classification", "question_answering"):
        raise InputError(f"{what}, and a {task} head labels whole rows; {_INSTEAD}")
    if cached:
        raise InputError(f"{what}, but a cache holds one for each row; {_INSTEAD}")
    ring = next((core.name for core in cores if getattr(core, "circular", False)), None)
    if ring:
        raise IncompatibleError(
            f"{what}, and attention {ring!r} with circular=true computes a short one otherwise "
            f"beside a longer one; {_INSTEAD}"
        )
