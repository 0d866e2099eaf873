"""Whether a live model computes what its class and its configuration say.

A model of transformers is read by its tensors and its configuration. Subclasses, replaced modules, adapters, quantised
layers, hooks, methods put on an instance or a class, and functions of one's own change what it computes and leave both
as they are: each is refused. So are hooks on gradients, which change what is learned. Hooks on state dicts change
neither, and the tensors are read past them.
"""

from __future__ import annotations

import copy
import logging
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_torch

from effzoo.convert.dtypes import NAMES
from effzoo.errors import ConversionError

log = logging.getLogger("effzoo.convert")
_THEIRS = ("torch", "transformers")
# whose functions transformers imports
_LIBRARIES = ("accelerate", "huggingface_hub", "numpy", "safetensors", *sys.stdlib_module_names)
_HOOKS = ("transformers", "accelerate")  # whose hooks move, count or record, and change no value
_QUANTISERS = (
    "bitsandbytes",
    "torchao",
    "auto_gptq",
    "gptqmodel",
    "awq",
    "optimum",
    "hqq",
    "eetq",
    "aqlm",
    "compressed_tensors",
)
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
# what a forward pass draws and keeps for its backward pass, the longest text it has seen, and a size that
# `resize_token_embeddings` leaves behind and nothing computes with
_SKIPPED = (
    "training", "gradient_checkpointing", "attention_seed", "feed_forward_seed", "vocab_size", "max_seq_len_cached",
)  # fmt: skip
_START = ("__init__", "_init_weights", "init_weights", "reset_parameters")  # how weights start, which is past
_SIMPLE = (bool, int, float, str, type(None))


def bare(source: Any) -> Any:
    """The model inside the wrappers of torch (`torch.compile`, data parallel), which compute the same."""
    while type(source).__module__.startswith("torch.") and type(source).__name__ in _WRAPPERS:
        source = getattr(source, _WRAPPERS[type(source).__name__])
    return source


def check_class(source: Any, cls: type) -> None:
    """Refuse a subclass: what it computes is its own affair."""
    if type(source) is not cls:
        own = type(source)
        raise ConversionError(
            f"{own.__name__} of {own.__module__} is a subclass of {cls.__name__} and may compute something else; if "
            "it computes the same, give a "
            f"{cls.__name__} with its weights: {cls.__name__}(model.config), then load_state_dict(model.state_dict())"
        )


def check_origin(path: str, module: nn.Module) -> None:
    """Refuse a module whose class is neither of torch nor of transformers."""
    own = type(module)
    package = own.__module__.partition(".")[0]
    if package == "peft":
        raise ConversionError(
            f"{path} is a {own.__name__} of peft: adapters are attached; merge them (merge_and_unload()), or give "
            "the base, save the adapter with "
            "save_pretrained and load it with effzoo.load_adapter"
        )
    if package in _QUANTISERS:
        raise ConversionError(
            f"{path} is a {own.__name__} of {package}: its weights are quantised; load the model in its own dtype, "
            "or call dequantize()"
        )
    if package not in _THEIRS:
        raise ConversionError(
            f"{path} is a {own.__name__} of {own.__module__}, and what that computes is not known; give the model "
            "with its own parts"
        )


def check_genuine(label: str, model: Any, fresh: Callable[[Any], Any], lost_by_resizing: Iterable[str] = ()) -> None:
    """Refuse a model in which anything but its class and its configuration says what is computed or what is learned.

    label: names it in messages.
    fresh: makes another model from a configuration.
    lost_by_resizing: keys of tensors that may be gone. Raises ConversionError with the place, and what to do.
    """
    if getattr(model.config, "is_heterogeneous", False):
        raise ConversionError(
            f"{label} with per_layer_config has no counterpart in effzoo, which has one configuration for all layers"
        )
    _check_attention(label, model)
    _check_hooks_of_all(label)
    for path, module in model.named_modules():
        check_origin(f"{label}: {path or 'the model'}", module)
        _check_code(f"{label}: {path or 'the model'}", module)
    for cls in {type(module) for module in model.modules()}:
        _check_class_code(label, cls)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made = dict(fresh(copy.deepcopy(model.config)).named_modules())
    except Exception as error:
        raise ConversionError(
            f"{label}: its configuration makes no model any more ({type(error).__name__}: {error}); it was changed "
            "by hand"
        ) from error
    _check_frequencies(label, model)
    _check_numbers_of_places(label, model)
    dropped: dict[str, tuple[Any, Any]] = {}
    for path, module in model.named_modules():
        where = f"{label}: {path or 'the model'}"
        if path not in made or type(module) is not type(made[path]):
            wanted = (
                f"its configuration makes a {type(made[path]).__name__}"
                if path in made
                else ("its configuration makes no such module")
            )
            raise ConversionError(
                f"{where} is a {type(module).__name__} where {wanted}; give the model with its own parts"
            )
        if (
            getattr(module, "config", model.config) is not model.config
            and module.config.to_dict() != made[path].config.to_dict()
        ):
            raise ConversionError(
                f"{where} has a configuration of its own that differs from the model's; give the "
                "model with its own parts"
            )
        if extra := sorted(_tensors(module) - _tensors(made[path])):
            raise ConversionError(
                f"{where} has a tensor {extra[0]} where its configuration makes none; give the model with its own parts"
            )
        if lost := sorted(
            _tensors(made[path])
            - _tensors(module)
            - {key.rpartition(".")[2] for key in lost_by_resizing if _inside(key, path)}
        ):
            raise ConversionError(
                f"{where} has no tensor {lost[0]} where its configuration makes one; give it "
                "(zeros add nothing, if it is a bias)"
            )
        for name, value in vars(made[path]).items():
            mine = getattr(module, name, None)
            if name.startswith("_") or name in _SKIPPED or _alike(mine, value):
                continue
            if "dropout" in name or isinstance(module, nn.Dropout):
                dropped[f"{path}.{name}"] = mine, value
                continue
            raise ConversionError(
                f"{where} has {name}={_shown(mine)} where its configuration makes {_shown(value)}; change the "
                "configuration and make the model anew"
            )
    _check_modes(label, model)
    if dropped:
        place, (mine, value) = next(iter(dropped.items()))
        log.warning(
            "%s: %s is %s and %s in its configuration, which is taken (%d such places)",
            label,
            place,
            mine,
            value,
            len(dropped),
        )


def _check_attention(label: str, model: Any) -> None:
    """Refuse attention functions that were registered by others, under a name of their own or one of transformers'."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(model.config, "_attn_implementation", None)
    found = ALL_ATTENTION_FUNCTIONS.get(name) if name in ALL_ATTENTION_FUNCTIONS else None
    if (found is None and name not in (None, "eager")) or (found is not None and not _from(found, ("transformers",))):
        raise ConversionError(
            f"{label} has attn_implementation={name!r}, a function of {getattr(found, '__module__', None)} that may "
            "compute something else; "
            "if it computes the same, call model.set_attn_implementation('sdpa') first"
        )


def _check_frequencies(label: str, model: Any) -> None:
    """Refuse rotary positions that turn by other angles than the configuration says; no file holds these buffers."""
    for path, module in model.named_modules():
        frequencies = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and not buffer.is_meta
        }
        expected = dict(type(module)(model.config).named_buffers(recurse=False)) if frequencies else {}
        expected |= {name: own for name in frequencies if (own := _of_last_text(module, name)) is not None}
        for name, buffer in frequencies.items():
            # which may be in bfloat16
            if not torch.allclose(buffer.detach().double().cpu(), expected[name].double(), rtol=1e-2, atol=0):
                raise ConversionError(
                    f"{label}: {path}.{name} was changed; say in the configuration how positions "
                    "turn, and make the model anew"
                )


def _of_last_text(module: Any, name: str) -> Tensor | None:
    """The frequencies that a module has after the texts that it has seen, where they depend on their length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    layers, kind = name.removesuffix("inv_freq").rstrip("_"), getattr(module, "rope_type", None)
    if layers.endswith("original") or kind not in ("dynamic", "longrope"):
        return None
    if kind == "longrope":  # turned anew at each call
        return cast(Tensor, module.inv_freq).detach().float().cpu()
    made: Tensor = ROPE_INIT_FUNCTIONS[kind](module.config, None, seq_len=module.max_seq_len_cached)[0]
    return made.cpu()


def _check_numbers_of_places(label: str, model: Any) -> None:
    """Refuse buffers of positions and token types that are not those of a new model."""
    for path, buffer in model.named_buffers():
        name, n = path.rpartition(".")[2], buffer.shape[-1] if buffer.ndim else 0
        if name not in ("position_ids", "token_type_ids") or buffer.is_meta:
            continue
        expected = (
            torch.arange(n, device=buffer.device) if name == "position_ids" else torch.zeros(n, device=buffer.device)
        )
        if not bool((buffer == expected).all()):
            raise ConversionError(
                f"{label}: {path} was changed, and inputs without {name} would get others here; make the model anew"
            )


def _tensors(module: nn.Module) -> set[str]:
    """The names of the parameters and buffers that are a module's own."""
    return {
        name
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }


def _inside(key: str, path: str) -> bool:
    return key.rpartition(".")[0] == path


def tensors_of(label: str, model: Any, missing: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """What its state dict holds, read past the hooks on it: {key: tensor}, each a plain dense tensor of finite numbers.

    missing: keys that no file gave, which may hold anything.
    Raises ConversionError for a tensor of another class, layout, device or dtype, and for NaN and infinity.
    """
    kept = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in {*module._parameters, *module._buffers} - module._non_persistent_buffers_set
    }
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = {key: tensor for key, tensor in named if key in kept}
    for key, tensor in tensors.items():
        if key in missing:
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            kind = type(tensor)
            raise ConversionError(
                f"{label}: {key} is a {kind.__name__} of {kind.__module__}, a tensor that may compute in its own way "
                "(quantised or sharded tensors "
                "do); give plain tensors, as in module.weight = nn.Parameter(...) of its numbers"
            )
        if tensor.is_meta:
            raise ConversionError(
                f"{label}: {key} is on the device meta and holds no numbers; load the model onto a device first"
            )
        if tensor.dtype not in NAMES.values() or tensor.layout is not torch.strided:
            raise ConversionError(
                f"{label}: {key} has the dtype {tensor.dtype} ({tensor.layout}), and effzoo holds weights dense, in "
                f"{', '.join(NAMES)}; "
                "convert it first, as in model.float()"
            )
        if not bool(tensor.isfinite().all()):
            raise ConversionError(
                f"{label} has NaN or infinity in {key} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} entries)"
            )
    return {key: tensor.detach() for key, tensor in tensors.items()}


def check_ties(label: str, model: Any, ties: Mapping[str, str], same: Mapping[str, object] | None = None) -> None:
    """Refuse parameters that are one tensor under several names, unless they are tied.

    ties: {a name: another of the same tensor}.
    same: what the names hold in our model; those that hold the same there may be one.
    """
    seen: dict[int, str] = {}
    ours = same or {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first in ours and ours[first] == ours.get(name):
            continue
        if first not in (name, ties.get(name)) and name != ties.get(first):
            raise ConversionError(
                f"{label}: {name} and {first} are one tensor, and would be two here; give each its own (a clone), or "
                "say it in the configuration "
                "(tie_word_embeddings=True)"
            )


def _check_code(where: str, module: nn.Module) -> None:
    """Refuse hooks, methods on the instance and a `forward` of the class that others have put there."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    for hook in hooks:
        if not _from(hook, _HOOKS):
            raise ConversionError(
                f"{where} has the forward hook {_shown(hook)}, which may change what is computed; "
                "remove it (handle.remove())"
            )
    on_gradients = {"": (*module._backward_hooks.values(), *module._backward_pre_hooks.values())}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            both = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
            on_gradients[f".{name}"] = tuple(hook for hooks in both for hook in (hooks or {}).values())
    for name, registered in on_gradients.items():
        for hook in registered:
            if not _from(hook, _HOOKS):
                raise ConversionError(
                    f"{where}{name} has the hook {_shown(hook)} on its gradients, which may change what is learned "
                    "and would be lost; remove it "
                    "(handle.remove()), and put it on the converted model if it is wanted"
                )
    if not _from(type(module).forward, (*_THEIRS, "accelerate")):
        raise ConversionError(
            f"{where}: {type(module).__name__}.forward was replaced by one of "
            f"{type(module).forward.__module__}; undo that"
        )
    for name, value in vars(module).items():
        if (
            callable(value)
            and callable(getattr(type(module), name, None))
            and not _from(value, _HOOKS)
            and not hasattr(module, "_hf_hook")
        ):
            raise ConversionError(
                f"{where} has a method {name} of its own, {_shown(value)}, which may compute something else; delete "
                f"it (del module.{name})"
            )


def _check_hooks_of_all(label: str) -> None:
    """Refuse hooks on all modules of the process: they act at the borders of modules, which are others here."""
    for registered in (
        of_torch._global_forward_hooks, of_torch._global_forward_pre_hooks, of_torch._global_backward_hooks,
        of_torch._global_backward_pre_hooks,
    ):  # fmt: skip
        for hook in registered.values():
            if not _from(hook, (*_HOOKS, "torch")):
                raise ConversionError(
                    f"{label}: the hook {_shown(hook)} is on every module of this process; remove it "
                    "(handle.remove()) before converting"
                )


def _check_class_code(label: str, cls: type) -> None:
    """Refuse a class or file of transformers in which others replaced functions, as libraries of faster kernels do."""
    known = (*_THEIRS, *_LIBRARIES)
    for owner in cls.__mro__:
        for name, value in vars(owner).items():
            if name in _START:
                continue
            code = getattr(value, "__func__", value)
            if isinstance(code, types.FunctionType) and not _from(code, known):
                raise ConversionError(
                    f"{label}: {owner.__name__}.{name} was replaced by one of {code.__module__}; undo that"
                )
    if cls.__module__.partition(".")[0] == "transformers":
        for name, value in vars(sys.modules[cls.__module__]).items():
            if isinstance(value, types.FunctionType) and not _from(value, known):
                raise ConversionError(
                    f"{label}: {cls.__module__}.{name} was replaced by one of {value.__module__}; undo that"
                )


def _check_modes(label: str, model: nn.Module) -> None:
    """Refuse parts that drop out while the rest does not, or the reverse: the converted model has one mode."""
    for path, module in model.named_modules():
        indifferent = type(module).__module__.startswith("torch.") and not isinstance(
            module, nn.modules.dropout._DropoutNd
        )
        if module.training != model.training and not indifferent:
            mode = {True: "train", False: "eval"}
            raise ConversionError(
                f"{label}: {path} is in {mode[module.training]} mode and the model in {mode[model.training]} mode; a "
                "converted model is in one, so "
                "call model.train() or model.eval() first"
            )


def _from(code: Any, packages: tuple[str, ...]) -> bool:
    """Whether a function, or what a partial or bound method holds, comes from these packages."""
    code = getattr(code, "func", getattr(code, "__func__", code))
    return str(getattr(code, "__module__", None) or type(code).__module__).partition(".")[0] in packages


def _alike(mine: Any, value: Any) -> bool:
    """Whether two attributes say the same; what is neither simple nor code is looked at elsewhere."""
    if isinstance(value, (list, tuple)):
        return not isinstance(mine, (list, tuple)) or (len(mine) == len(value) and all(map(_alike, mine, value)))
    if isinstance(value, _SIMPLE):
        return bool(mine == value)
    if callable(value) and not isinstance(value, nn.Module):
        return mine is value or getattr(mine, "__qualname__", type(mine)) == getattr(value, "__qualname__", type(value))
    return True


def _shown(value: Any) -> str:
    return str(getattr(value, "__qualname__", None) or repr(value))[:100]
