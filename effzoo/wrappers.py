"""Models inside wrappers: those of torch are seen through, so that names and keys are those of the model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from effzoo.errors import AdapterError

M = TypeVar("M", bound=nn.Module)


class Model(nn.Module):
    """A whole model, as against a part of one or a wrapper around one: what adapters are attached to."""


def unwrap(model: M) -> M:
    """The model inside `torch.compile`, DistributedDataParallel and DataParallel; any other module is itself.

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
    # importing it costs a second
    if type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch."):
        return module._orig_mod  # type: ignore[return-value]
    return None
