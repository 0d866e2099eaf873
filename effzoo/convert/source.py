"""Where weights come from: a live model of transformers, a local folder, a folder inside an installed package, or the
hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effzoo.architectures import Config
from effzoo.architectures.encoder_decoder_config import OF_BOTH
from effzoo.convert import texts
from effzoo.convert.fields import check_code
from effzoo.convert.genuine import check_class, check_genuine, check_origin, check_ties
from effzoo.convert.keymap import Rule, expand, trained
from effzoo.convert.layout import Layout
from effzoo.convert.layouts import LAYOUTS, class_of, classes
from effzoo.convert.pretrained import Pretrained, open_pretrained
from effzoo.errors import ConversionError, FileError, shown
from effzoo.tensors import StoredTensor, read_index

log = logging.getLogger("effzoo.convert")


@dataclass(frozen=True)
class Source:
    """A model of transformers, its config as ours, and its tensors; `label` names it in messages.

    state: the tensors by their keys; where they are `stored` in files, on the device meta.
    """

    label: str
    model: Any
    layout: Layout
    task: str
    config: Config
    state: dict[str, Tensor]
    stored: Mapping[str, StoredTensor]


def source_of(config: Config) -> str:
    """Where the own weights of a zoo entry are: `package`, a folder in an installed package, or else `hub`.

    package reads "<import name>/<folder>": a top-level name, found without importing it, and a folder inside of it that
    holds no link out of it.
    Raises ConversionError when neither is there.
    """
    if config.package:
        name, _, inside = config.package.partition("/")
        if not name.isidentifier():  # of a dotted name the parents would be imported, which runs their code
            raise ConversionError(
                f"{config.name}: package reads '<import name>/<folder>' with a top-level name, got "
                f"{shown(config.package)}"
            )
        for root in _folders_of(name):
            folder = (Path(root) / inside).resolve()
            if not folder.is_relative_to(Path(root).resolve()):
                raise ConversionError(
                    f"{config.name}: the package {shown(config.package)} leads out of {root}; name "
                    "a folder inside of it"
                )
            if (folder / "config.json").is_file():
                log.info("%s: weights from the installed package %s", config.name, config.package)
                return str(Path(root) / inside)
    if config.hub:
        log.info(
            "%s: weights from the hub, %s%s",
            config.name,
            config.hub,
            f" ({config.package} is not installed)" if config.package else "",
        )
        return config.hub
    raise ConversionError(f"{config.name} names no weights of its own; give pretrained= a local folder or a hub id")


def _folders_of(name: str) -> Sequence[str]:
    """The folders of an installed package; none of its code runs."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # half imported, or `__main__`
        return ()
    return (found.submodule_search_locations or ()) if found else ()


def encodes(task: str | None) -> bool:
    """Whether a task is one that encoders have and encoder-decoders do not."""
    return task not in (None, *OF_BOTH)


def open_source(source: Any, task: str | None, *, encoder: bool) -> Source:
    """Load a folder or hub id with the class that it was saved from, or take a live model as it is.

    task: says the class when the source does not name one that we know; its head may then be missing. Raises
        ConversionError.
    encoder: of an encoder-decoder take the encoder alone, where it has a layout of its own.
    """
    if isinstance(source, (str, Path)):
        return _from_pretrained(source, task, encoder)
    if type(source).__module__.startswith("peft."):
        check_origin("the model", source)
    for cls in type(source).__mro__:
        if (found := class_of(cls.__name__, encoder=encoder)) and hasattr(source, "base_model_prefix"):
            layout, its_task = found
            check_class(source, getattr(importlib.import_module(layout.module), cls.__name__))
            model = source.get_submodule(layout.parts.get(cls.__name__, ""))
            required = (*layout.body, *layout.heads[its_task])
            return _checked(type(source).__name__, Pretrained(model), layout, its_task, required)
    raise ConversionError(
        f"{type(source).__name__} has no counterpart in effzoo; give a folder, a hub id, or one of {classes()}"
    )


def _from_pretrained(source: str | Path, task: str | None, encoder: bool) -> Source:
    import transformers

    label = local_or_hub(source)
    with explained(label, source), quiet():
        config = transformers.AutoConfig.from_pretrained(label, trust_remote_code=False)
    check_code(getattr(config, "auto_map", None), label)
    if config.model_type not in LAYOUTS:
        raise ConversionError(
            f"{label} is of type {config.model_type!r}, which has no counterpart in effzoo; give "
            f"one of {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[config.model_type]
    if layout.whole and not encoder:
        layout = LAYOUTS[layout.whole]
    name = (config.architectures or ["a class that its config does not name"])[0]
    known = class_of(name, encoder=encoder)
    if config.architectures and known is None and not hasattr(transformers, name):
        raise ConversionError(
            f"{label} was saved from {name}, which transformers does not have, so what it computes is not known; if "
            "a class of transformers computes "
            "the same, name that one in architectures of its config.json"
        )
    if known is None and task is None:
        raise ConversionError(
            f"{label} was saved from {name}, which has no counterpart in effzoo; give task=... to take what it needs"
        )
    if known is not None and layout.name in (known[0].name, known[0].whole):
        layout = known[0]
    elif known is not None:
        raise ConversionError(
            f"{label} was saved from {name}, but its config.json says "
            f"model_type={config.model_type!r}; set the one that is true"
        )
    its_task = known[1] if known else str(task)
    if its_task not in layout.classes:
        raise ConversionError(
            f"{layout.name} of transformers has no model for task {its_task!r}; it has {', '.join(layout.classes)}"
        )
    with explained(label, source), quiet():
        cls = getattr(transformers, name) if name in layout.parts else layout.cls(its_task)
        opened = open_pretrained(cls, label, config)
    required = (*layout.body, *layout.heads[its_task]) if known else layout.body
    return _checked(label, opened.part(layout.parts.get(name, "")), layout, its_task, required)


def _check_shards(folder: Path) -> None:
    """Refuse an index that names files outside of its folder: transformers would open them."""
    for index in folder.glob("*.index.json"):
        try:
            read_index(index)
        except FileError as error:
            raise ConversionError(str(error)) from error


def local_or_hub(source: str | Path) -> str:
    """The source as transformers takes it; what looks like a path has to exist."""
    text = os.path.expanduser(str(source))
    path = Path(text)
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ConversionError(f"{text} has no config.json; give a folder that save_pretrained wrote")
        _check_shards(path)
        return text
    if os.path.isfile(path):
        raise ConversionError(
            f"{text} is a file; give the folder that save_pretrained wrote, with config.json and the weights"
        )
    if isinstance(source, Path) or text.startswith((".", os.sep)) or "\\" in text or text.count("/") > 1:
        raise ConversionError(
            f"{text} looks like a local folder, but there is none; give a folder that "
            "save_pretrained wrote, or a hub id"
        )
    return text


def _checked(label: str, opened: Pretrained, layout: Layout, task: str, required: tuple[Rule, ...]) -> Source:
    """A source whose config we can express and whose tensors are complete, tied where we tie, and all known.

    Those of a live model are finite; those in files are looked at when they are read.
    """
    model, missing = opened.model, opened.missing
    check_genuine(label, model, type(model), layout.lost)
    config = dataclasses.replace(layout.config(model.config, task), generation=texts.settings_of(model))
    tensors = opened.tensors(label)
    config = _untied(layout, config, task, tensors)
    rules = list(layout.known(config, task))
    ours = {rule.key(parameter): (rule.ours, parameter) for rule in rules for parameter in rule.parameters}
    check_ties(label, model, layout.ties(config, task), ours)
    state = {key: value for key, value in tensors.items() if key not in missing}
    given = {ours[key] for key in state if key in ours}
    for key, like in layout.lost.items():
        if like in tensors and ours[key] not in given:
            log.warning(
                "%s: %s is gone (resizing the vocabulary loses it) and adds nothing there: zeros are taken", label, key
            )
            state[key] = tensors[like].new_zeros(len(tensors[like]))
            given.add(ours[key])
    present = set(state)
    learns = trained(model)
    for key, other in layout.ties(config, task).items():
        tied = state.pop(key, None)
        if tied is not None and other in state and tied is not state[other] and not tied.equal(state[other]):
            raise ConversionError(
                f"{label}: {key} differs from {other}; effzoo ties the two (tie_word_embeddings=True), so an untied "
                "head has no counterpart"
            )
        if tied is not None and learns.get(key) != learns.get(other):
            raise ConversionError(
                f"{label}: of {key} and {other}, which hold the same, one is frozen (requires_grad=False) and the "
                "other is not; "
                "in effzoo they are one tensor, so freeze both, or none"
            )
    for rule in expand(required, config.stacks, layout.base(task), config.experts):
        keys = [rule.key(parameter) for parameter in rule.parameters]
        # models exist with and without
        if "pooler" in rule.theirs and task == "features" and not present.intersection(keys):
            continue
        if not rule.optional and not present.intersection(keys):
            raise ConversionError(
                f"{label} has no tensor for {rule.theirs}; the weights are incomplete, or adapters "
                "or quantisation changed them"
            )
        for key in keys:
            if key in tensors and key not in present and ours[key] not in given:  # transformers drew it anew
                raise ConversionError(
                    f"{label} has no tensor {key}; the weights are incomplete, so give the whole "
                    "of what save_pretrained wrote"
                )
    for key in state:
        if key not in ours:
            raise ConversionError(
                f"{label} has the tensor {key}, which {layout.classes[task]} does not have; merge "
                "or remove what was added"
            )
    return Source(label, model, layout, task, config, state, opened.stored)


def _untied(layout: Layout, config: Config, task: str, tensors: Mapping[str, Tensor]) -> Config:
    """The config, whose head is not tied where its weight differs from the embedding."""
    head = tensors.get(layout.untied)
    table = tensors.get(layout.ties(config, task).get(layout.untied, ""))
    if head is None or table is None or head is table or (not head.is_meta and head.equal(table)):
        return config
    return dataclasses.replace(config, tied=False)


@contextmanager
def explained(label: str, source: Any) -> Iterator[None]:
    """What transformers raises, as a ConversionError that says what was tried."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if os.path.isdir(label):
            raise ConversionError(
                f"{label} could not be loaded ({reason}); it should hold what save_pretrained wrote"
            ) from error
        raise ConversionError(
            f"{shown(str(source))} is no local folder, and as a hub id it could not be fetched ({reason}); "
            "give a local folder that save_pretrained wrote, or check the name and the network"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hush the report of transformers about new and unused tensors: `transfer` makes its own."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(level)
