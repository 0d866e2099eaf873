"""The record of a run: the model's function, the data and the settings. A checkpoint of one run is never taken for that
of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from effzoo.peft.attach import acting, attached
from effzoo.peft.fingerprint import facts, fingerprint
from effzoo.peft.state import adapters_of, label_layers

ELASTIC = ("processes", "batch_size", "gradient_accumulation")  # these may change on resuming while their product stays
HINTS = {
    "steps": "the schedule spans all steps; to train longer, finetune the result once more into another output_dir",
    "data": "hashes of all rows: the rows of train are not those of that run",
    "evaluation": "hashes of all rows: those of evaluate are not those of that run",
}


def adapters(model: nn.Module) -> dict[str, Any]:
    """The active adapters with their specs; and how they are combined, their scales and which of them learn, where that
    is not the usual."""
    now = adapters_of(model).roster.now
    found: dict[str, Any] = {name: attached(model)[name].spec for name in now.names}
    for path, site in label_layers(model).items():
        if other := {name: site.outputs(name) for name in now.names if site.outputs(name) != site.out_features}:
            found[f"outputs of {path}"] = other
    if now.combine != "stack" or set(now.scales) - {1.0} or now.trained != frozenset(now.names):
        found["acting"] = [now.combine, now.by_row(), list(now.scales), sorted(now.trained)]
    return found


def of_model(model: nn.Module) -> dict[str, Any]:
    """What a model computes in training, by name: all that it computes in evaluation, and every dropout.

    Tensors that a checkpoint holds, or whose hashes an adapter holds, are not among it.
    """
    trained = {
        key: parameter for key, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
    }
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained.values()})
    found = {**facts(model), **dropouts(model), "dtypes of what is trained": dtypes}
    return found if acting(model) else found | fingerprint(model, without=trained).tensors


def dropouts(model: nn.Module) -> dict[str, float]:
    """The probability of every dropout of the base, by the path of its module."""
    found = {}
    for path, module in model.named_modules():
        if ".adapters." in f".{path}.":
            continue
        rate = (
            module.p if isinstance(module, nn.Dropout) else getattr(getattr(module, "context", None), "dropout", None)
        )
        if rate is not None:
            found[f"dropout of {path}"] = float(rate)
    return found


def name_of(function: Any) -> str | None:
    """A function in words that are the same in another process."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two records differ, with both values. Evaluations may come, go or change unless the best checkpoint is
    chosen by them."""
    names = [name for name in dict.fromkeys([*now, *earlier]) if name not in ELASTIC]
    if (
        now.get("best") is None
        and earlier.get("best") is None
        and None in (now.get("evaluation"), earlier.get("evaluation"))
    ):
        names.remove("evaluation")
    if _global_batch(earlier) != _global_batch(now):
        names += ELASTIC
    found = []
    for name in names:
        if name == "model" and isinstance(earlier.get(name), Mapping):
            before, after = earlier[name], now[name]
            found += [
                _said(f"model: {key}", before, after, key)
                for key in dict.fromkeys([*after, *before])
                if before.get(key) != after.get(key)
            ]
        elif earlier.get(name) != now.get(name) or name not in earlier:
            found.append(_said(name, earlier, now, name))
    return found


def _said(what: str, before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    was, now = (f"{repr(record[key])[:160]}" if key in record else "nothing" for record in (before, after))
    return f"{what} was {was} and is now {now}" + (f" ({HINTS[what]})" if what in HINTS else "")


def _global_batch(run: Mapping[str, Any]) -> int:
    size = 1
    for key in ELASTIC:
        size *= run.get(key, 0)
    return size
