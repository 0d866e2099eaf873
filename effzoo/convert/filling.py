"""Numbers into the tensors of a model: those of a source, one tensor of theirs after the other, and what is new."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.convert.dtypes import let_learn
from effzoo.convert.pretrained import read, rows_of
from effzoo.errors import ConversionError
from effzoo.sharding import is_split, part_of, rows_here, shard
from effzoo.tensors import StoredTensor
from effzoo.undrawn import Undrawn

Taken = tuple[str, Callable[[Tensor], Tensor] | None]
"""A key of ours, and what makes its tensor of theirs; None: it is theirs."""


@dataclass(frozen=True)
class Fresh:
    """A model that is made for these weights alone: it is thrown away where they do not fit.

    undrawn: the initial values of its parameters, of which only those are drawn that nothing is written into.
    dtype: of its tensors; "auto": each that of the tensor it is read from, and the others that of the source's first;
        None: as they are.
    device: None: where they are.
    done: called with each key whose tensor holds its numbers; nobody here holds the tensor any more.
    mesh: of the processes over which the model is split, and each of which reads its rows; None for one that is whole.
    """

    undrawn: Undrawn = field(default_factory=Undrawn)
    dtype: torch.dtype | str | None = None
    device: torch.device | None = None
    done: Callable[[str], None] | None = None
    mesh: Any = None


@torch.no_grad()
def fill(
    model: nn.Module,
    label: str,
    state: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    taken: Mapping[str, Sequence[Taken]],
    learns: Mapping[str, bool],
    fresh: Fresh | None,
) -> None:
    """Write the tensors of a source into those of a model; a model that is not fresh stays as it is if one is damaged.

    state, stored: the source's tensors by its keys, on the device meta where they are in files.
    taken: {their key: what of ours is made of it}. What is theirs row by row is read in blocks; for all else one tensor
        of theirs is whole for a moment.
    learns: {our key: requires_grad}, for those whose flag is to be set.

    Raises ConversionError for NaN and infinity in a file, also in tensors that are not taken, and for damaged files.
    """
    for key in stored.keys() & state.keys():
        if fresh is None or key not in taken:
            for _ in rows_of(label, key, state[key], stored[key]):
                pass
    wanted = own_tensors(model)
    let_learn(wanted, learns)
    first = next(iter(state.values())).dtype
    one_by_one = fresh is not None and fresh.done is not None
    for key, ours in taken.items() if not one_by_one else ():  # all first: what is let go then was never written to
        for name, _ in ours:
            _empty(wanted[name], state[key].dtype, fresh)
    if fresh is not None and fresh.mesh is not None:
        if not stored:
            raise ConversionError(
                f"{label} has no safetensors files that hold every tensor under its name, so each process would load "
                "all of it first; save it once more with save_pretrained (of a Mixtral or Qwen3-MoE, whose files name "
                "experts otherwise, with effzoo.save), or leave shard out"
            )
        for ours in taken.values():
            for name, _ in ours:
                wanted.pop(name)
        _settle(model, wanted, first, fresh)
        shard(model, fresh.mesh)
        wanted = own_tensors(model)
    for key, ours in taken.items():
        like = state[key]
        targets = [wanted.pop(name) for name, _ in ours]
        for target in targets if one_by_one else ():  # `done` may let it go again
            _empty(target, like.dtype, fresh)
        _write(label, key, like, stored.get(key), [make for _, make in ours], targets)
        del targets
        if fresh is not None and fresh.done is not None:
            for name, _ in ours:
                fresh.done(name)
    if fresh is not None and fresh.mesh is None:
        _settle(model, wanted, first, fresh)


def _write(
    label: str,
    key: str,
    like: Tensor,
    stored: StoredTensor | None,
    makes: Sequence[Callable[[Tensor], Tensor] | None],
    targets: Sequence[Tensor],
) -> None:
    """One tensor of theirs into those of ours that are made of it, of which this process may hold some rows."""
    if any(make is not None for make in makes):
        theirs = read(label, key, like, stored)
        for make, target in zip(makes, targets, strict=True):
            rows_here(target.detach())[0].copy_(part_of(theirs if make is None else make(theirs), target))
        return
    here, first = rows_here(targets[0].detach())
    end = first + len(here) if is_split(targets[0]) else None
    for index, rows in rows_of(label, key, like, stored, first, end):
        for target in targets:
            rows_here(target.detach())[0][index].copy_(rows)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by key, without those of adapters."""
    return {key: value for key, value in model.state_dict(keep_vars=True).items() if ".adapters." not in f".{key}"}


def device_of(state: Mapping[str, Tensor]) -> torch.device:
    """Where a source's tensors are; those in files go to the CPU."""
    device = next(iter(state.values())).device
    return torch.device("cpu") if device.type == "meta" else device


def _empty(target: Tensor, source: torch.dtype, fresh: Fresh | None) -> None:
    """Room for other numbers in a tensor of a fresh model, in the dtype and on the device that they will have."""
    if fresh is None:
        return
    fresh.undrawn.written(target)
    dtype: Any = source if fresh.dtype == "auto" else fresh.dtype or target.dtype
    device = fresh.device or target.device
    if (target.dtype, target.device) != (dtype, device):
        target.data = torch.empty_like(target.data, dtype=dtype, device=device)


def _settle(model: nn.Module, new: dict[str, Tensor], source: torch.dtype, fresh: Fresh) -> None:
    """Draw what is new, and bring that and buffers that no file holds to the dtype and device of the rest."""
    dtype: Any = source if fresh.dtype == "auto" else fresh.dtype

    def settled(tensor: Tensor) -> Tensor:
        return tensor.to(fresh.device or tensor.device, dtype if tensor.is_floating_point() else None)

    for key in list(new):
        tensor = new.pop(key)
        fresh.undrawn.draw(tensor)
        tensor.data = settled(tensor.data)
        del tensor
        if fresh.done is not None:
            fresh.done(key)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = settled(buffer)
