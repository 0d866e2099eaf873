"""Two adapters of different tasks at work together (composition of modules: Pfeiffer et al. 2023, Modular deep
learning, arXiv:2302.11529)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from effzoo import peft
from effzoo.errors import DataError
from effzoo.lab.fit import Examples
from effzoo.peft.method import HEAD
from effzoo.sites import Activity, overruled, sites


@contextmanager
def averaged(model: nn.Module, names: Sequence[str], head: str) -> Iterator[None]:
    """Inside the block the named adapters act as their mean at every site of the body.

    For a change of weights that is half of each of two changes, for prompt tokens, keys and values their mean.

    head: the adapter whose task head acts.
    """
    with peft.active(model, *names, combine="average"):
        heads = [site for _, site in sites(model) if fnmatchcase(site.role, HEAD) and head in site.adapters]
        with overruled(dict.fromkeys(heads, Activity((head,), (1.0,)))):
            yield


def divided(examples: Examples, groups: Sequence[Sequence[int]]) -> list[Examples]:
    """One set of examples for each group of labels, which are numbered anew within it.

    Raises DataError for a group without two labels.
    """
    parts = []
    for group in groups:
        if len(group) < 2:
            raise DataError(
                f"a task has two labels or more, got {list(group)}; this needs data with four labels at least"
            )
        of_group = examples.at(torch.isin(examples.labels, torch.tensor(group)))
        numbers = {label: number for number, label in enumerate(group)}
        parts.append(Examples(of_group.inputs, torch.tensor([numbers[int(label)] for label in of_group.labels])))
    return parts
