"""What a model returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Output(dict[str, Tensor]):
    """A dict that is also read by attribute; absent entries read as None.

    loss: scalar, when labels were given; it includes balance_loss.
    logits: of the task.
    last_hidden_state [batch, n, dim]: the output of the last block, after the final norm.
    pooler_output [batch, dim]: of models with a pooler.
    balance_loss: scalar, in training: what balances the experts, weighted and summed over the layers.
    """

    _fields = ("loss", "logits", "last_hidden_state", "pooler_output", "balance_loss")

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self._fields:
            return None
        raise AttributeError(f"the output has no {name!r}; it has {', '.join(self)}")

    @classmethod
    def of(cls, **entries: Tensor | None) -> Output:
        """Leave out what is None; the loss comes first, as transformers.Trainer expects."""
        return cls({name: entries[name] for name in cls._fields if entries.get(name) is not None})  # type: ignore[misc]
