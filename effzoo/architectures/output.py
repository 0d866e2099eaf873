"""What a model returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree


class Output(dict[str, Any]):
    """A dict that is also read by attribute; absent entries read as None. `output[0]` is the first entry there is.

    loss: scalar, when labels were given; it includes balance_loss.
    logits: of the task.
    last_hidden_state [batch, n, dim]: the output of the last block, after the final norm.
    pooler_output [batch, dim]: of models with a pooler.
    balance_loss: scalar, in training: what balances the experts, weighted and summed over the layers.
    hidden_states, attentions: a tensor for each layer, where they were asked for.
    encoder_last_hidden_state [batch, n, dim]: of an encoder-decoder, what its decoder reads.
    """

    _fields = (
        "loss", "logits", "last_hidden_state", "pooler_output", "balance_loss", "hidden_states", "attentions",
        "encoder_last_hidden_state",
    )  # fmt: skip

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries that there are, in order."""
        return tuple(self.values())

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self._fields:
            return None
        raise AttributeError(f"the output has no {name!r}; it has {', '.join(self)}")

    @classmethod
    def of(cls, **entries: Tensor | None) -> Output:
        """Leave out what is None; the loss comes first, as transformers.Trainer expects."""
        return cls({name: entries[name] for name in cls._fields if entries.get(name) is not None})


def _flat(output: Output) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flat_with_keys(output: Output) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(_pytree.MappingKey(key), value) for key, value in output.items()], list(output)


def _whole(values: Iterable[Any], keys: list[str]) -> Output:
    return Output(zip(keys, values, strict=True))


_pytree.register_pytree_node(  # for torch.export
    Output, _flat, _whole, serialized_type_name="effzoo.Output", flatten_with_keys_fn=_flat_with_keys
)
