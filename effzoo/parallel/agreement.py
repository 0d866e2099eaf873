"""Ranks that compute one sequence have the same model and inputs: compared before they exchange anything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import effzoo
from effzoo.errors import IncompatibleError
from effzoo.peft import attached
from effzoo.peft.attach import acting
from effzoo.peft.fingerprint import described, fingerprint

ABSENT = "nothing"


def of_model(model: nn.Module) -> dict[str, Any]:
    """Name -> value of what ranks have to agree on: versions, adapters, what the model computes, every tensor."""
    base = fingerprint(model)
    adapters = attached(model)
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {
        "version of effzoo": effzoo.__version__, "version of torch": torch.__version__,
        "adapters": ", ".join(f"{name}: {adapters[name].spec}" for name in acting(model)) or ABSENT,
        **base.facts, **base.tensors,
        **{key: described(tensor) for key, tensor in tensors if ".adapters." in key},
    }  # fmt: skip


def of_inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> dtype, shape and hash of each tensor, as text of all else."""
    return {name: described(x) if isinstance(x, Tensor) else str(x) for name, x in given.items() if x is not None}


def agree(mine: Mapping[str, Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise IncompatibleError on all ranks where one has other values, with the name and both values.

    Eight bytes of each rank are compared, all values only where these differ.
    """
    text = json.dumps(mine, sort_keys=True, default=str)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    here = torch.tensor([digest], device=device)
    digests = [torch.empty_like(here) for _ in range(group.size())]
    dist.all_gather(digests, here, group=group)
    if all(torch.equal(digests[0], other) for other in digests):
        return
    of_ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(of_ranks, dict(mine), group=group)
    raise IncompatibleError(f"the ranks of one sequence differ: {difference(of_ranks)}; give all the same")


def difference(of_ranks: Sequence[Mapping[str, Any]], place: str = "on rank") -> str | None:
    """The first value that is not that of the first rank, in words; None where all are alike.

    place: what stands before a rank's number.
    """
    for name in dict.fromkeys(name for of_rank in of_ranks for name in of_rank):
        values = [str(of_rank.get(name, ABSENT)) for of_rank in of_ranks]
        for rank, value in enumerate(values):
            if value != values[0]:
                return f"{name} is {values[0]:.160} {place} 0, and {value:.160} {place} {rank}"
    return None
