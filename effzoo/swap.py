"""Another attention for a model that has weights: what has a meaning in the new kind stays, the rest starts well."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from effzoo.annotations import checked
from effzoo.architectures import Config, EncoderDecoder, Transformer
from effzoo.architectures.transformer import attention_specs
from effzoo.attention.core import Context
from effzoo.blocks import Block
from effzoo.blocks.attention import Attention
from effzoo.blocks.block import attention_layer
from effzoo.errors import AdapterError, IncompatibleError, OptionError, listing
from effzoo.memory import room
from effzoo.peft import attached
from effzoo.peft.merging import check_nothing_merged
from effzoo.peft.state import transition
from effzoo.sites import sites, unwrap


@dataclass(frozen=True)
class Swap:
    """What became of the attention's tensors, with keys as in `state_dict`."""

    attention: str
    kept: tuple[str, ...]
    copied: dict[str, str]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"attention is now {self.attention}", f"  kept    {len(self.kept)} tensors: {_folded(self.kept)}"]
        if self.copied:
            pairs = (f"{new} from {old.rpartition('.attn.')[2]}" for new, old in self.copied.items())
            lines.append(f"  copied  {len(self.copied)} tensors: {_folded(pairs)}")
        if self.new:
            lines.append(f"  new     {len(self.new)} tensors: {_folded(self.new)}")
        if self.dropped:
            lines.append(f"  dropped {len(self.dropped)} tensors: {_folded(self.dropped)}")
        return "\n".join(lines)


@torch.no_grad()
@checked
def swap_attention(model: Transformer | EncoderDecoder, attention: Any, *, decoder_attention: Any = None) -> Swap:
    """Replace the attention of every block, in place, and say what became of each tensor.

    Projections that both kinds have stay the same modules. One that only the new kind has starts as a copy of the one
    it stands in for (Longformer's global projections from the local ones, the shared queries and keys of LSH from the
    queries); what has no such origin is drawn as the kind says (Linformer's E and F start as the mean over segments).
    With the same weights the new kind computes another function: measure how near it is, and fine-tune.

    attention: a spec such as "linformer[k=128]", or one per layer; of an encoder-decoder that of the encoder.
    decoder_attention: of its decoder to itself; None leaves what is there.

    Raises UnknownNameError, OptionError, IncompatibleError (a kind that cannot be causal, in a decoder) and
        AdapterError when adapters are attached, or merged into the attention and not taken out again; the model is then
        unchanged.
    """
    model = unwrap(model)
    if not isinstance(model, Transformer | EncoderDecoder):
        raise IncompatibleError(
            f"swap_attention changes a Transformer or EncoderDecoder of effzoo, got {type(model).__name__}"
        )
    if names := attached(model):
        raise AdapterError(
            f"adapters are attached ({listing(names)}) to the old attention; merge or detach them, "
            "and attach anew after the swap"
        )
    if any(getattr(site, "bits", None) for _, site in sites(model)):
        raise IncompatibleError(
            "projections are quantised, and cannot be copied for another attention; swap first, and quantise then"
        )
    check_nothing_merged(model, "another attention", lambda path: ".attn." in f".{path}.")
    if decoder_attention is not None and not isinstance(model, EncoderDecoder):
        raise OptionError(f"decoder_attention is for an encoder-decoder, got it for {model.config.name}; leave it out")
    with transition(model), room(attention):
        if isinstance(model, EncoderDecoder):
            return _both_swapped(model, attention, decoder_attention)
        return _swapped(model, attention)


def _both_swapped(model: EncoderDecoder, attention: Any, decoder_attention: Any) -> Swap:
    """The attention of both stacks, or of the encoder alone."""
    asked: dict[str, Any] = {"attention": attention}
    if decoder_attention is not None:
        asked["decoder_attention"] = decoder_attention
    config = dataclasses.replace(model.config, **asked)
    stacks = {"encoder": (model.encoder, config.encoder())}
    if decoder_attention is not None:
        stacks["decoder"] = (model.decoder, config.decoder())
    made = {name: _layers(stack, sizes) for name, (stack, sizes) in stacks.items()}
    swaps = [_put(stack, *made[name], f"{name}.", model) for name, (stack, _) in stacks.items()]
    model.config = config
    kept, new, dropped = (
        tuple(key for one in swaps for key in getattr(one, part)) for part in ("kept", "new", "dropped")
    )
    copied = {key: origin for one in swaps for key, origin in one.copied.items()}
    return Swap(" | ".join(dict.fromkeys(one.attention for one in swaps)), kept, copied, new, dropped)


def _swapped(model: Transformer, attention: Any) -> Swap:
    config = dataclasses.replace(model.config, attention=attention)
    swap = _put(model, *_layers(model, config), "", model)
    model.config = config
    return swap


def _layers(model: Transformer, config: Config) -> tuple[str, list[Attention]]:
    """The attention layers of another config, and the specs that they are made of."""
    shared: dict[str, Any] = {}
    layers = []
    specs = attention_specs(config)
    for layer, block in zip(config.first_layers, model.blocks, strict=True):
        assert isinstance(block, Block)
        context: Context = dataclasses.replace(block.attn.core.context, shared=shared)
        layers.append(attention_layer(config.slots(layer), specs[layer], context))
    return " | ".join(dict.fromkeys(map(str, specs))), layers


def _put(
    model: Transformer, specs: str, layers: list[Attention], stack: str, whole: Transformer | EncoderDecoder
) -> Swap:
    """Give the blocks of a stack these layers; keys are those of the whole model."""
    before = {key: value for key, value in whole.state_dict(keep_vars=True).items() if ".attn." in key}
    copied: dict[str, str] = {}
    for layer, (block, new) in enumerate(zip(model.blocks, layers, strict=True)):
        assert isinstance(block, Block)
        _fill(new, block.attn, f"{stack}blocks.{layer}.attn", copied)
        block.attn = new.train(block.training)
    after = whole.state_dict(keep_vars=True)
    mine = [key for key in after if ".attn." in key and key.startswith(stack)]
    kept = tuple(key for key in mine if key in before and after[key] is before[key])
    new_keys = tuple(key for key in mine if key not in kept and key not in copied)
    dropped = tuple(key for key in before if key not in after)
    return Swap(specs, kept, copied, new_keys, dropped)


def _fill(new: Attention, old: Attention, path: str, copied: dict[str, str]) -> None:
    """Give the new layer the old one's modules where both have them, and copies where one stands in for another."""
    reference = next(old.parameters())
    new.to(device=reference.device, dtype=reference.dtype)
    new.o, new.memory = old.o, old.memory
    new.core.initialise()
    for name in new.core.projections:
        origin = _origin(name, new, old)
        if origin == name:
            new.add_module(name, old.get_submodule(name))
            if name in old.norms:
                new.norms[name] = old.norms[name]
        elif origin is not None:
            _copy(new.get_submodule(name), old.get_submodule(origin))
            copied.update(
                {f"{path}.{name}.{key}": f"{path}.{origin}.{key}" for key in new.get_submodule(name).state_dict()}
            )
            if name in new.norms:
                _copy(new.norms[name], old.norms[origin])
                copied[f"{path}.norms.{name}.weight"] = f"{path}.norms.{origin}.weight"
        else:
            linear = new.get_submodule(name)
            torch.nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)  # type: ignore[arg-type]


def _origin(name: str, new: Attention, old: Attention) -> str | None:
    """The projection of the old layer that `name` takes over or starts from; None when it has no such."""
    wanted = next((one for one in (name, *new.core.starts_from(name)) if one in old.core.projections), None)
    if wanted is None or old.get_submodule(wanted).weight.shape != new.get_submodule(name).weight.shape:
        return None
    return wanted


def _copy(new: torch.nn.Module, old: torch.nn.Module) -> None:
    new.load_state_dict(old.state_dict())
    for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)


def _folded(keys: Iterable[str]) -> str:
    """Keys with the number of the block replaced by *, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"^(\w+\.)?blocks\.\d+\.attn\.", "attn.", key) for key in keys))
