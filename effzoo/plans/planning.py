"""`plan`: the memory of one training step, by part, without allocating it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effzoo import zoo
from effzoo.annotations import Count, PerSecond
from effzoo.architectures import AnyModel, PerceiverConfig
from effzoo.attention import backends
from effzoo.attention.core import AttentionCore
from effzoo.builder import build
from effzoo.devices import taken_to_be
from effzoo.errors import EffzooError, IncompatibleError, InputError, OptionError, UnknownNameError
from effzoo.parallel import OverRanks
from effzoo.parallel.ranks import Planned
from effzoo.peft import attach, attached
from effzoo.peft.attach import acting, adapter_dtype
from effzoo.plans.optimizers import STATES, states
from effzoo.plans.report import Plan
from effzoo.plans.shadow import Shadows, key, size
from effzoo.plans.shards import shards
from effzoo.plans.spread import Spread, spread
from effzoo.plans.step import step
from effzoo.recompute import Level, save_memory
from effzoo.sites import sites, unwrap
from effzoo.sites.dtypes import floating

PRECISIONS = ("plain", "autocast", "master")
_HALF = (torch.bfloat16, torch.float16)


def plan(
    model: nn.Module | str,
    peft: Any = None,
    *,
    batch: Count = 1,
    length: Count | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str = "plain",
    optimizer: str = "adamw",
    checkpointing: bool | None = None,
    recompute: Level | None = None,
    backend: str | None = None,
    device: str | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    ranks: Count = 1,
    shard: Literal["full"] | None = None,
    link: PerSecond | None = None,
    rate: PerSecond | None = None,
    **choices: Any,
) -> Plan:
    """Predict the memory of one training step: weights, gradients, optimizer states, activations by cause, peak.

    Forward and backward run on tensors without memory, in training mode. Activations are the storages that autograd
    saves, each once and whole, without parameters, buffers and inputs.

    model: a built model, which does not change, or a name of the zoo with the keywords of `effzoo.build` in `choices`
        (`plan("longformer", "lora", batch=2, length=4096, layers=24)`). Of a name, the task is "causal_lm" for
        decoders and "classification" for others unless given.
    peft: a spec to attach; None trains what is trainable: all parameters of a name, or the adapters of a model.
    batch, length: of the inputs, without padding.
    dtype: of weights and activations; None: that of the model.
    precision: of half dtypes; adapters are float32 in all.
        plain: weights, gradients, optimizer states and activations in dtype.
        autocast: weights, gradients and states in float32, operations in dtype (None: bfloat16), for whose backward
        pass half copies of weights are stored.
        master: weights, gradients and activations in dtype (None: bfloat16), states and a copy of every trainable half
        weight in float32.
    optimizer: adamw, adam (2 numbers per trained parameter), momentum (1), sgd (0), adafactor (a row and a column of
        each matrix); adamw_8bit, adamw_8bit_paged, adamw_8bit_torchao, adamw_4bit_torchao (2 codes, and scales of
        blocks, for tensors of at least 4,096 numbers), under the names of `effzoo.train.Optimisation`.
    checkpointing: True is recompute="blocks".
    recompute: what is computed again in the backward pass, as in `finetune`; None: as the model is.
    backend: of attention, as in `build`; None: as the model is.
    device: "cpu" or "cuda", whose kernels decide what is stored; None: that of a built model, the CPU for a name.
        Without a card, compute capability 9.0 is assumed.
    inputs: the keywords of a real call instead of batch and length; integers count (padding, global tokens, labels).
    ranks: devices over which each sequence is spread (`effzoo.parallel.OverRanks`); the plan is that of the one in the
        middle, and says in `spread` what it sends. With `shard` it is of the model that each holds a part.
    shard: "full" splits weights, gradients and optimizer states over the ranks, as `finetune` under FSDP2 does; batch
        is that of one rank. Adapters are whole in each.
    link: bytes a second that a rank sends, for the seconds of `spread`.
    rate: operations a second of a rank, as `effzoo.measure.cards.card("H100").half`.

    Raises OptionError, InputError, IncompatibleError, UnknownNameError, and what `build` and `attach` raise.
    """
    if optimizer not in STATES:
        raise UnknownNameError("optimizer", optimizer, STATES)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    model = model if isinstance(model, str) else unwrap(model)
    chosen, where = _dtype(dtype, precision), _device(model, device, precision)
    weights_dtype = torch.float32 if precision == "autocast" else chosen
    shadows = Shadows()
    with torch.random.fork_rng(devices=[]):
        copied = _stand_in(model, peft, choices, shadows, weights_dtype)
        if recompute is not None:
            _set_recompute(copied, recompute)
        if checkpointing is not None:
            _set_checkpointing(copied, checkpointing)
        if backend is not None:
            _set_backend(copied, backend)
        given = _inputs(copied, batch, length, inputs, shadows)
        with taken_to_be(where):
            over = None if ranks == 1 or shard else OverRanks(copied, Planned(ranks, ranks // 2))
            kept, peak = step(copied, given, shadows, chosen if precision == "autocast" else None, over)
    trained = [p for p in copied.parameters() if p.requires_grad]
    state = 4 if precision == "master" else None
    kept_states = states(optimizer, ((p.shape, state or p.element_size()) for p in trained))
    master = 4 * sum(p.numel() for p in trained if p.element_size() < 4) if precision == "master" else 0
    weights = _stored([*copied.parameters(), *copied.buffers()])
    gradients = sum(p.numel() * p.element_size() for p in trained)
    part = shards(copied, ranks, optimizer, state) if shard else None
    if part is not None:
        if master:
            raise IncompatibleError(
                "precision='master' is not sharded; plan precision='autocast', whose weights are float32"
            )
        peak = peak - gradients + part.gradients + part.gathered  # gradients of a unit are whole for a moment
        weights, kept_states, gradients = part.weights, part.optimizer, part.gradients
    activations: dict[str, int] = {}
    for saved in kept:
        activations[saved.cause] = activations.get(saved.cause, 0) + saved.bytes
    return Plan(
        title=_title(copied, model, given, chosen, precision, optimizer)
        + (f", {where}" if where != "cpu" else "")
        + (f", one of {ranks} ranks that split the model" if shard else ""),
        weights=weights,
        gradients=gradients,
        optimizer=kept_states,
        master=master,
        activations=dict(sorted(activations.items(), key=lambda item: -item[1])),
        peak=weights + kept_states + master + peak,
        parameters=sum(p.numel() for p in copied.parameters()),
        trainable=sum(p.numel() for p in trained),
        saved=tuple(kept),
        shards=part,
        spread=None if over is None else _spread(copied, given, ranks, link, rate),
    )


def _spread(model: nn.Module, given: Mapping[str, Any], ranks: int, link: float | None, rate: float | None) -> Spread:
    marked = given.get("global_attention_mask")
    (batch, length), most = given["input_ids"].shape, None if marked is None else int(marked.sum(dim=1).max())
    return spread(model, batch=batch, length=length, ranks=ranks, link=link, rate=rate, globals=most)


def _dtype(given: torch.dtype | str | None, precision: str) -> torch.dtype | None:
    kind = floating(given)
    if precision == "plain":
        return kind
    if kind is not None and kind not in _HALF:
        raise OptionError(f"precision {precision!r} is for bfloat16 and float16, got {kind}; use precision='plain'")
    return torch.bfloat16 if kind is None else kind


def _device(model: nn.Module | str, device: str | None, precision: str) -> str:
    """The kind of device that is planned for."""
    if device is None:
        device = (
            "cpu"
            if isinstance(model, str)
            else next((p.device.type for p in model.parameters() if p.device.type == "cuda"), "cpu")
        )
    if device not in ("cpu", "cuda"):
        raise OptionError(f"plan knows the devices 'cpu' and 'cuda', got {device!r}")
    if device == "cuda" and precision == "autocast":
        raise IncompatibleError(
            "autocast on CUDA computes other operations in float32 than on the CPU, and a plan has no CUDA "
            "operators; plan precision='master' or "
            "'plain' there, or device='cpu'"
        )
    return device


def _set_backend(model: nn.Module, backend: str) -> None:
    for core in model.modules():
        if isinstance(core, AttentionCore):
            core.context = dataclasses.replace(core.context, backend=backends.known(backend))


def _stand_in(
    model: nn.Module | str, peft: Any, choices: dict[str, Any], shadows: Shadows, dtype: torch.dtype | None
) -> nn.Module:
    """The model with its adapters, of tensors without memory, in training mode."""
    if not isinstance(model, (str, nn.Module)):
        raise OptionError(f"plan takes a model or the name of one, got {type(model).__name__}")
    if isinstance(model, nn.Module) and choices:
        raise OptionError(
            f"a built model has its sizes already, so {', '.join(sorted(choices))} mean nothing; give the model's "
            "name, or leave them out"
        )
    adapter_dtype = None
    if peft is not None:  # attached below, so `build` has no use for its dtype
        adapter_dtype, choices = (
            choices.get("adapter_dtype"),
            {key: value for key, value in choices.items() if key != "adapter_dtype"},
        )
    try:
        with torch.device("meta"):
            if isinstance(model, str):
                config = zoo.config(model)
                one_stack = "causal_lm" if config.causal else "classification"
                task = "seq2seq_lm" if config.is_encoder_decoder else one_stack
                model = build(model, **{"task": task, **choices})
            elif peft is not None:
                model = shadows.copied(model, device="meta")
            if peft is not None:
                attach(model, peft, name="planned", dtype=adapter_dtype)
    except EffzooError:
        raise
    except (NotImplementedError, RuntimeError) as error:  # what torch raises when a value is asked of the meta device
        raise IncompatibleError(
            f"{'the model' if peft is None else repr(peft)} computes with the values of weights when it is made "
            f"({error}), and a plan has none; "
            "make it for real and plan that"
        ) from error
    with shadows:
        return shadows.copied(model, dtype, kinds={} if dtype is None else _kinds(model, dtype)).train()


def _kinds(model: nn.Module, dtype: torch.dtype) -> dict[int, torch.dtype]:
    """The dtypes of what adapters hold on a base of this dtype, by the tensor's id: those that `attach` gives."""
    dtypes: dict[int, torch.dtype] = {}
    for _, site in sites(model):
        for name, modules in site.adapters.named_children():
            dtype_of_adapter = adapter_dtype(dtype, attached(model)[name].dtype)
            dtypes |= {id(tensor): dtype_of_adapter for tensor in (*modules.parameters(), *modules.buffers())}
    return dtypes


def _set_checkpointing(model: nn.Module, wanted: bool) -> None:
    switch = getattr(model, f"gradient_checkpointing_{'enable' if wanted else 'disable'}", None)
    if switch is None:
        raise OptionError(f"{type(model).__name__} has no gradient checkpointing; leave checkpointing out")
    switch()


def _set_recompute(model: nn.Module, level: Level) -> None:
    if not hasattr(model, "recompute"):
        raise OptionError(f"{type(model).__name__} has nothing to recompute; leave recompute out")
    save_memory(model, level)


def _inputs(
    model: nn.Module, batch: int, length: int | None, inputs: Mapping[str, Tensor] | None, shadows: Shadows
) -> dict[str, Any]:
    """The keywords of one call: integers with values, floating-point tensors without."""
    if inputs is not None:
        if length is not None:
            raise OptionError("give length (and batch), or the inputs of a real call, not both")
        return {name: _given(x, shadows) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    config: Any = getattr(model, "config", None)
    if not isinstance(model, AnyModel):
        raise OptionError(
            f"{type(model).__name__} is no model of effzoo, so its inputs are not known; give them, as in "
            "plan(model, inputs={...}), or the model that effzoo.convert.from_transformers(model) returns"
        )
    if length is None:
        raise OptionError("plan needs the length of the sequences, such as length=512")
    if batch < 1 or length < 1:
        raise InputError(f"batch and length are at least 1, got {batch} and {length}")
    made = _sequence(model, config, batch, length, shadows)
    task, labels = model.task, model.num_labels
    if config.is_encoder_decoder and task == "features":
        made["decoder_input_ids"] = made["input_ids"]
    if task == "classification":
        kind = torch.float32 if labels == 1 else torch.long
        made["labels"] = torch.zeros(batch, dtype=kind)
    elif task == "question_answering":
        made["labels"] = torch.zeros(batch, 2, dtype=torch.long)
    elif task != "features":
        made["labels"] = torch.zeros(batch, length, dtype=torch.long)
    return made


def _given(x: Tensor, shadows: Shadows) -> Tensor:
    return shadows.stand_in(x) if x.is_floating_point() else x.cpu()


def _sequence(model: nn.Module, config: Any, batch: int, length: int, shadows: Shadows) -> dict[str, Any]:
    """Token ids that are no padding, or an array for a Perceiver that reads none."""
    if config.vocab:
        token = int(config.pad_token == 0) if config.vocab > 1 else 0
        return {"input_ids": torch.full((batch, length), token, dtype=torch.long)}
    assert isinstance(config, PerceiverConfig)
    shape = config.grid if len(config.grid) > 1 else (length,)
    if math.prod(shape) != length:
        raise InputError(
            f"{config.name} reads a grid of {' x '.join(map(str, shape))}, which is "
            f"length={math.prod(shape)}, got length={length}"
        )
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {"inputs_embeds": shadows.stand_in(torch.empty(batch, *shape, config.channels, dtype=kind, device="meta"))}


def _stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, shared ones once."""
    return sum({key(tensor): size(tensor) for tensor in tensors}.values())


def _title(
    model: nn.Module, given: Any, inputs: Mapping[str, Any], dtype: torch.dtype | None, precision: str, optimizer: str
) -> str:
    name = given if isinstance(given, str) else getattr(getattr(model, "config", None), "name", type(model).__name__)
    adapters = " | ".join(attached(model)[name].spec for name in acting(model)) or "no adapter"
    shape = next((x.shape for x in inputs.values() if isinstance(x, Tensor)), ())
    kind = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    half = "" if precision == "plain" else f" ({precision})"
    return f"{name}, {adapters}, {' x '.join(map(str, shape))}, {str(kind).removeprefix('torch.')}{half}, {optimizer}"
