"""What a model computes inside: the hidden states between its blocks, and the weights of its attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effzoo.attention.core import AttentionCore
from effzoo.errors import IncompatibleError


@contextmanager
def weights_of(cores: Iterable[AttentionCore]) -> Iterator[list[Tensor]]:
    """A list that gets, for each core that computes inside, its weights [batch, heads, n, s].

    The output of a head is weights @ values; s = n, or m + n where m rows of memory stand in front. They are the
    definition's, so they take O(n^2) memory, whatever the kind takes.
    """
    seen: list[Tensor] = []

    def see(core: AttentionCore, projected: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen.append(attention_weights(core, projected, **given))

    hooks = [core.register_forward_pre_hook(see, with_kwargs=True) for core in cores]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(core: AttentionCore, projected: tuple[Any, ...], mask: Any, memory: Any = None) -> Tensor:
    """The weights of the definition: what it computes where the values are rows of the identity.

    Raises IncompatibleError for a kind whose keys are not those of the tokens.
    """
    first = next(x for x in projected if x is not None)
    n, m = first.shape[2], 0 if memory is None else memory[0].shape[-2]
    identity = torch.eye(m + n, dtype=first.dtype, device=first.device)
    sides = zip(projected, core.projections.values(), strict=True)
    given = []
    for x, side in sides:
        if x is not None and x.shape[2] != n:
            raise IncompatibleError(
                f"attention {core.name!r} compresses the keys, so it has no weight for each token; leave "
                "output_attentions out"
            )
        given.append(identity[m:].expand(*x.shape[:2], n, m + n) if x is not None and side == "value" else x)
    if memory is not None:
        memory = (memory[0], identity[:m].expand(*memory[0].shape[:-2], m, m + n))
    return core.dense(*given, mask=mask, memory=memory)
