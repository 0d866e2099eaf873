"""Models inside wrappers: those of torch are seen through, so that names and keys are those of the model."""

from __future__ import annotations

import importlib
import sys
from typing import Any, TypeVar

from torch import nn

from effzoo.errors import AdapterError

M = TypeVar("M", bound=nn.Module)
OF_TRANSFORMERS = frozenset({
    "add_model_tags", "base_model", "can_generate", "device", "dtype", "enable_input_require_grads", "generate",
    "generation_config", "get_input_embeddings", "get_memory_footprint", "get_output_embeddings", "num_parameters",
    "push_to_hub", "resize_token_embeddings", "save_pretrained",
})  # fmt: skip


class Model(nn.Module):
    """A whole model, as against a part of one or a wrapper around one: what adapters are attached to.

    label_names: of the labels that a classification head tells apart, by number; empty where nobody named them.
    problem_type: what the labels of a classification head were when the last loss was computed, in the words of
        transformers: "single_label_classification", "multi_label_classification" or "regression"; None before.

    It has those methods and properties of a `PreTrainedModel` that trainers and pipelines call (`generate`, `device`,
    `num_parameters()`, `get_input_embeddings()`, ...): they are those of `effzoo.transformers.wrap(model)`.
    """

    label_names: tuple[str, ...] = ()
    problem_type: str | None = None

    def __getattr__(self, name: str) -> Any:
        if name in OF_TRANSFORMERS:
            return getattr(self._pretrained(), name)
        return super().__getattr__(name)

    def _pretrained(self) -> Any:
        """The model of transformers around this one, always the same."""
        outer = self.__dict__.get("_outer")
        if outer is None or outer.inner is not self:
            models = importlib.import_module("effzoo.transformers.models")  # on first use
            outer = self.__dict__["_outer"] = models.wrapped(self)
        return outer

    def _get_name(self) -> str:
        """For a Trainer of transformers, which shifts the labels of a decoder by its name (label smoothing)."""
        if getattr(self, "task", "") == "causal_lm" and "transformers" in sys.modules:
            return type(self._pretrained()).__name__
        return type(self).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_outer"}


class Around(nn.Module):
    """A model under the interface of another library: its children are those of `inner`, so that names and keys are."""

    inner: Any


def unwrap(model: M) -> M:
    """The model inside `torch.compile`, DistributedDataParallel, DataParallel and `effzoo.transformers`; any other
    module is itself.

    Give the wrapper, not what is in it, to whatever changes which parameters learn: only then is it seen that
    DistributedDataParallel does not synchronise one that it did not know, or that was frozen, when it was made.

    Raises AdapterError for what is no module, and for another module around a model (nn.Sequential, a trainer's module,
        peft's own model): what it does besides calling the model is not known.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    innermost: nn.Module = model
    while (found := inside(innermost)) is not None:
        innermost = found
    if not isinstance(innermost, Model):
        for path, part in innermost.named_modules():
            if part is not innermost and isinstance(part, Model):
                raise AdapterError(
                    f"{type(innermost).__name__} is a module around a model; give the model itself, its {path!r} "
                    f"({type(part).__name__})"
                )
    return innermost  # type: ignore[return-value]


def refuse_compiled(part: nn.Module, path: str) -> None:
    """Refuse a model of which a part stands in `torch.compile`, which changes the names of all that is in it."""
    if type(part).__name__ == "OptimizedModule":
        raise AdapterError(
            f"{path} is compiled as a module of its own, which renames what is in it; compile it in "
            f"place, by {path}.compile()"
        )


def inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper of torch wraps; None for any other module."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return module.module
    if isinstance(module, Around):
        return module.inner
    # importing it costs a second
    if type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch."):
        return module._orig_mod  # type: ignore[return-value]
    return None
