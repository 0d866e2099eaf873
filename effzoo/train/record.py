"""The record of a run: the model's function, the data and the settings.

A checkpoint of one run is never taken for that of another.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from effzoo.errors import TrainingError
from effzoo.parallel.agreement import difference
from effzoo.peft.attach import acting, attached
from effzoo.peft.fingerprint import facts, fingerprint
from effzoo.peft.state import adapters_of, checksum, label_layers
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.sharding import is_split

ELASTIC = ("processes", "batch_size", "gradient_accumulation")  # these may change on resuming while their product stays
HINTS = {
    "steps": "the schedule spans all steps; to train longer, finetune the result once more into another output_dir",
    "data": "hashes of all rows: the rows of train are not those of that run",
    "evaluation": "hashes of all rows: those of evaluate are not those of that run",
}


def adapters(model: nn.Module) -> dict[str, Any]:
    """The specs of the active adapters.

    How they are combined, their scales, which of them learn, and other numbers of labels are recorded where they are
    not the usual ones.
    """
    now = adapters_of(model).roster.now
    record: dict[str, Any] = {name: attached(model)[name].spec for name in now.names}
    for path, site in label_layers(model).items():
        if other := {name: site.outputs(name) for name in now.names if site.outputs(name) != site.out_features}:
            record[f"outputs of {path}"] = other
    if now.combine != "stack" or set(now.scales) - {1.0} or now.trained != frozenset(now.names):
        record["acting"] = [now.combine, now.by_row(), list(now.scales), sorted(now.trained)]
    return record


def rates(model: nn.Module, learning_rate: float | None) -> dict[str, Any]:
    """The learning rate, or each method's own where it is None, and the factors that methods have for tensors."""
    methods = {f"{name}.{method.name}": method for name in acting(model) for method, _ in attached(model)[name].methods}
    of_methods = {name: method.learning_rate for name, method in methods.items()}
    factors = {
        name: dict(method.rates)
        for name, method in methods.items()
        if isinstance(method, TrainingHooks) and method.rates
    }
    record = {"learning_rate": of_methods if learning_rate is None else learning_rate}
    return {**record, "rates": factors} if factors else record


def of_model(model: nn.Module) -> dict[str, Any]:
    """What a model computes in training, by name: all that it computes in evaluation, and every dropout.

    Tensors that a checkpoint holds, or whose hashes an adapter holds, are not among it.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    trained = {key: parameter for key, parameter in parameters if parameter.requires_grad}
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained.values()})
    record = {**facts(model), **dropouts(model), "dtypes of what is trained": dtypes}
    return record if acting(model) else record | fingerprint(model, without=trained).tensors


def dropouts(model: nn.Module) -> dict[str, float]:
    """The probability of every dropout of the base, by the path of its module."""
    probabilities = {}
    for path, module in model.named_modules():
        if ".adapters." in f".{path}.":
            continue
        attention = getattr(module, "context", None)
        p = module.p if isinstance(module, nn.Dropout) else getattr(attention, "dropout", None)
        if p is not None:
            probabilities[f"dropout of {path}"] = float(p)
    return probabilities


def name_of(function: Any) -> str | None:
    """A function in words that are the same in another process."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two records differ, as sentences with both values.

    Evaluations may come and go unless the best checkpoint is chosen by them.
    """
    names = [name for name in dict.fromkeys([*now, *earlier]) if name not in ELASTIC]
    chosen_by = (earlier.get("best"), now.get("best"))
    if chosen_by == (None, None) and None in (now.get("evaluation"), earlier.get("evaluation")):
        names.remove("evaluation")
    if _global_batch(earlier) != _global_batch(now):
        names += ELASTIC
    sentences = []
    for name in names:
        if name == "model" and isinstance(earlier.get(name), Mapping):
            before, after = earlier[name], now[name]
            facts = [key for key in dict.fromkeys([*after, *before]) if before.get(key) != after.get(key)]
            sentences += [_difference(f"model: {fact}", before, after, fact) for fact in facts]
        elif earlier.get(name) != now.get(name) or name not in earlier:
            sentences.append(_difference(name, earlier, now, name))
    return sentences


def _difference(what: str, before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    was, is_now = (repr(record[key])[:160] if key in record else "nothing" for record in (before, after))
    return f"{what} was {was} and is now {is_now}" + (f" ({HINTS[what]})" if what in HINTS else "")


def _global_batch(run: Mapping[str, Any]) -> int:
    size = 1
    for key in ELASTIC:
        size *= run.get(key, 0)
    return size


def of_process(model: nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same in every process of a run, by name: the record, every tensor, and the versions."""
    flat = {key: value for key, value in record.items() if not isinstance(value, Mapping)}
    for group, values in record.items():
        flat |= {f"{group}: {key}": value for key, value in values.items()} if isinstance(values, Mapping) else {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = {key: tensor for key, tensor in named if not is_split(tensor)}
    flat |= {key: f"{tensor.dtype}{list(tensor.shape)} {checksum(tensor):x}" for key, tensor in tensors.items()}
    packages = ("effzoo", "torch", "transformers")
    return flat | {f"version of {package}": importlib.metadata.version(package) for package in packages}


def check_alike(of_processes: Sequence[Mapping[str, Any]]) -> None:
    """Raise TrainingError where processes of one run were given different things: the first difference by name."""
    if found := difference(of_processes, "in process"):
        raise TrainingError(
            f"the processes of this run differ: {found}; give all the same data, model, adapters, settings and "
            "versions; torch.manual_seed(0) before effzoo.build and effzoo.attach has all draw the same weights"
        )
