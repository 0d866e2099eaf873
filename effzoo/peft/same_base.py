"""Whether a model is the base that a saved adapter was trained on, or holds the same weights rounded."""

from __future__ import annotations

import logging
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from effzoo.errors import AdapterError
from effzoo.peft.fingerprint import Fingerprint, content_hash, difference, embeddings_left_out, fingerprint
from effzoo.peft.manifest import UNPROVED, Manifest
from effzoo.peft.method import HEAD
from effzoo.peft.rounded import BaseRounding, compare, differing_precision
from effzoo.peft.state import label_layers
from effzoo.peft.stored import replaced, replaced_embeddings
from effzoo.sites import sites, unwrap

CHANGES = (
    "its methods change this head and bring none, so give the model the head it had then, or target what is no head"
)
SAVED_BEFORE = "it was saved before files could recognise rounded weights: save it again on its own base"
TAKE_ROUNDED = (
    "load_adapter(..., rounded_base=True) takes a base that holds the same weights rounded, proves it, and says what "
    "that costs"
)
log = logging.getLogger("effzoo")


def check_base(
    model: nn.Module, manifest: Manifest, directory: Path, trust_base: bool = False, rounded_base: bool = False
) -> tuple[Fingerprint, BaseRounding | None]:
    """The fingerprint of the model, heads included, and the rounding between the bases, where there is any.

    model: to which the adapter is to be attached.
    manifest: of the adapter; its fingerprint is without what the adapter brings itself.
    directory: for errors.
    trust_base, rounded_base: as in `load_adapter`.

    Raises AdapterError for another base, with the first difference and what to do.
    """
    model, theirs = unwrap(model), manifest.fingerprint
    ours = _fingerprint(model, manifest, directory, trust_base)
    heads = {path for path, site in sites(model) if fnmatchcase(site.role, HEAD)}
    brought = {key for key in ours.tensors if key.rpartition(".")[0] in heads and key not in theirs.tensors}
    seen = Fingerprint(ours.facts, {key: value for key, value in ours.tensors.items() if key not in brought})
    theirs, seen = _of_any_labels(model, theirs, seen)
    first = difference(theirs, seen)
    if first is None:
        return ours, None
    another = f"the adapter in {directory} was trained on another base ({manifest.base!r})"
    if manifest.format > 1 and (differs := differing_precision(theirs, seen)):
        if not rounded_base or not manifest.kept:
            raise AdapterError(f"{another}: {differs}; {SAVED_BEFORE if rounded_base else TAKE_ROUNDED}")
        try:
            rounding = compare(theirs, manifest.kept, seen, model)
        except AdapterError as error:
            raise AdapterError(f"{another}, rounded or not: {error}") from None
        same = "the base is not the one of the file but the same weights, rounded"
        log.warning("%s: %s: %s", directory, same, str(rounding).partition("\n")[0])
        own = {key: value for key, value in ours.tensors.items() if key in brought or key in theirs.tensors}
        return Fingerprint(ours.facts, own), rounding
    advice = "build the model with the same name, sizes, attention and pretrained weights"
    if first.split(": ")[0].rpartition(".")[0] in heads:
        advice = CHANGES
    if first.startswith("num_labels: "):
        advice = f"{CHANGES}: an adapter that brings its whole head loads whatever the model's number of labels"
    if first.startswith("vocab: "):
        advice = _resize(theirs.facts.get("vocab"), ours.facts.get("vocab"))
    raise AdapterError(f"{another}: {first}; {advice}")


def _fingerprint(model: nn.Module, manifest: Manifest, directory: Path, trust_base: bool) -> Fingerprint:
    """The fingerprint of the model, as far as one of the manifest's format goes."""
    ours = fingerprint(model, embeddings=embeddings_left_out(manifest.fingerprint))
    if manifest.format > 1:
        return ours
    if not trust_base:
        raise AdapterError(
            f"the adapter in {directory} has format 1, which cannot prove the base's {UNPROVED}; when this is the "
            "model it was trained on, load it with trust_base=True, and save it again"
        )
    log.warning("%s has format 1: the base's tensors are compared, and nothing proves its %s", directory, UNPROVED)
    values = dict(model.state_dict())
    return Fingerprint({}, {key: content_hash(values[key]) for key in ours.tensors if key in values})


def _of_any_labels(model: nn.Module, theirs: Fingerprint, ours: Fingerprint) -> tuple[Fingerprint, Fingerprint]:
    """Both without the number of labels, where the adapter brings the layer with an output for each label."""
    layers = label_layers(model)
    if not layers or any(f"{path}.{key}" in theirs.tensors for path, site in layers.items() for key in site.base()):
        return theirs, ours
    number = {"num_labels"}
    for path in layers:
        number |= {f"{path}.out_features", f"{path.rpartition('.')[0]}.num_labels"}
    them, us = ({name: value for name, value in of.facts.items() if name not in number} for of in (theirs, ours))
    return replace(theirs, facts=them), replace(ours, facts=us)


def _resize(theirs: Any, ours: Any) -> str:
    """What to do about another number of tokens."""
    if isinstance(theirs, int) and isinstance(ours, int) and theirs > ours:
        return f"give the model its tokens first: effzoo.resize_vocabulary(model, {theirs})"
    return (
        "load it into the model that it was trained on, and call effzoo.resize_vocabulary with the adapter "
        "attached, which keeps it"
    )


def check_head(shapes: nn.Module, name: str, base: Fingerprint, manifest: Manifest, directory: Path) -> None:
    """Refuse a file without the hash of a head, or of embeddings, that the adapter changes and does not bring."""
    left_out = embeddings_left_out(manifest.fingerprint)
    brought = replaced_embeddings(shapes, name)
    if unproved := [key for key, tokens in left_out.items() if brought.get(key) != tokens]:
        key = unproved[0]
        raise AdapterError(
            f"the adapter in {directory} brings tokens {brought.get(key, 'none')} of {key}, and its manifest has no "
            f"hash of {left_out[key]}; save it again"
        )
    lacking = base.tensors.keys() - manifest.fingerprint.tensors.keys() - replaced(shapes, name)
    if lacking and manifest.format == 1:
        log.warning("%s: nothing proves the base's %s, which the adapter changes", directory, min(lacking))
    elif lacking:
        raise AdapterError(
            f"the adapter in {directory} changes {min(lacking)}, of which its manifest has no hash; "
            "save the adapter again"
        )
