"""(IA)3 in the files of peft: `ia3_l` [out, 1] scales a module's output, [1, in] the input of a feed-forward module.

Modules are named by their full path: the ends of names that peft takes by default also hit others (`output.dense` of
BERT is the output of attention too, whose input peft then scales). Where their module stacks several of ours, those
without a vector get ones.

Scaling the input of the attention's output projection is scaling the values: each of its channels is a sum of one
channel of the values, weighted by attention. So such a vector, which (IA)3 of ours does not have, is read as a factor
of the vectors of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effzoo.convert.peft_files.patterns import ends_with
from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, parts_of, shaped, split, whole
from effzoo.errors import AdapterError
from effzoo.peft import Method
from effzoo.peft.function.ia3 import ScaleInput, ScaleOutput
from effzoo.sites import Linear

CLASSES = (ScaleInput, ScaleOutput)


def write(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    out, inputs = Written(), []
    for theirs, paths in whole(modules, twin).items():
        rule = twin.rule(paths[0])
        out.targets.append(theirs)
        scaled = {path: module for path in paths if isinstance(module := modules[path], ScaleInput | ScaleOutput)}
        if any(isinstance(module, ScaleInput) for module in scaled.values()):
            if len(rule.ours) > 1:
                raise AdapterError(
                    f"{paths[0]} scales its input, and {theirs} of transformers has one input for "
                    f"{', '.join(rule.ours)}"
                )
            inputs.append(theirs)
            out.tensors[f"{theirs}.ia3_l"] = scaled[paths[0]].scale[None]
            continue
        scales = [
            scaled[path].scale if path in scaled else twin.weight(path).new_ones(len(twin.weight(path)))
            for path in rule.ours
        ]
        out.tensors[f"{theirs}.ia3_l"] = torch.cat(scales)[:, None]
        if len(rule.ours) > 1:
            out.parts[theirs] = [int(path in scaled) for path in rule.ours]
    out.config = {
        "peft_type": "IA3", "target_modules": out.targets, "feedforward_modules": inputs,
        "fan_in_fan_out": any(twin.rules[theirs].transposed for theirs in out.targets), "init_ia3_weights": True,
    }  # fmt: skip
    return out


def read(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    _check_inputs(config, tensors)
    wanted: dict[str, Wanted] = {}
    to_values: dict[str, Tensor] = {}
    for key, vector in tensors.items():
        theirs, dot, name = key.rpartition(".")
        if name != "ia3_l" or not dot or theirs not in twin.rules:
            raise AdapterError(
                f"{key}: this model's twin has no such module; its modules begin with {next(iter(twin.rules))!r}"
            )
        rule = twin.rules[theirs]
        for path in rule.ours:
            if not isinstance(twin.sites[path], Linear):
                raise AdapterError(
                    f"{key}: (IA)3 of effzoo scales linear layers, and {path} is {type(twin.sites[path]).__name__}"
                )
        path, role = rule.ours[0], twin.sites[rule.ours[0]].role
        if vector.ndim == 2 and len(vector) == 1 and len(rule.ours) == 1:
            shaped(key, vector, 1, twin.weight(path).shape[1])
            if role == "attn.o":
                to_values[path] = vector[0]
            elif role.endswith("mlp.down"):
                wanted[path] = Wanted("ia3", {}, {"scale": vector[0]})
            else:
                raise AdapterError(f"{key} scales the input of {path}; (IA)3 of effzoo does that for mlp.down only")
            continue
        if role.endswith("mlp.down"):
            raise AdapterError(
                f"{key} scales the output of {path}; (IA)3 of effzoo scales its input, the hidden "
                "units, as in the paper"
            )
        sizes = [len(twin.weight(ours)) for ours in rule.ours]
        scales = split(shaped(key, vector, sum(sizes), 1)[:, 0], sizes)
        hung = parts_of(theirs, rule, parts) or [1] * len(sizes)
        for ours, scale, has in zip(rule.ours, scales, hung, strict=True):
            if has:
                wanted[ours] = Wanted("ia3", {}, {"scale": scale})
            elif (scale != 1).any():
                raise AdapterError(
                    f"{key}: the file's header says that {ours} has no vector, and it is not of ones; "
                    "save the adapter again"
                )
    for path, scale in to_values.items():
        _into_values(twin, path, scale, wanted)
    return wanted


def _check_inputs(config: Config, tensors: Mapping[str, Tensor]) -> None:
    """AdapterError where the config and the shape of a vector do not agree on whether it scales the input."""
    given = config.get("feedforward_modules")
    if given is None:
        return  # peft's own choice
    shapes = {
        key.rpartition(".")[0]: vector.shape
        for key, vector in tensors.items()
        if vector.ndim == 2 and vector.numel() > 1
    }
    named = ends_with(given, shapes)
    for theirs, shape in shapes.items():
        if (shape[0] == 1) != (theirs in named):
            said = "names it" if theirs in named else "does not name it"
            raise AdapterError(
                f"{theirs}.ia3_l has shape {tuple(shape)}, and feedforward_modules of the config "
                f"{said}; save the adapter again"
            )


def _into_values(twin: Twin, path: str, scale: Tensor, wanted: dict[str, Wanted]) -> None:
    """Take the scale of the attention output's input into the vectors of all values of the layer."""
    out = twin.sites[path]
    values = [
        ours
        for ours, site in twin.sites.items()
        if isinstance(site, Linear) and site.layer == out.layer and site.role.startswith("attn.v")
    ]
    for ours in values:
        if ours not in wanted or len(wanted[ours].tensors["scale"]) != len(scale):
            raise AdapterError(
                f"the file scales the input of {path}, which is the same as scaling the values, but {ours} "
                + (
                    "has no vector to take it up"
                    if ours not in wanted
                    else "has grouped heads, which several heads of the output share"
                )
                + "; name the modules by their full paths in peft, so that its ends of names do not hit the "
                "attention's output"
            )
        wanted[ours].tensors["scale"] = wanted[ours].tensors["scale"] * scale
