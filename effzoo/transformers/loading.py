"""`from_pretrained`: the folder, the model of effzoo in it, and the head that was asked for."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from effzoo.annotations import plain
from effzoo.architectures import AnyModel
from effzoo.errors import FileError, OptionError, shown
from effzoo.folder.description import Description, is_folder, read_description
from effzoo.folder.loading import load, new_head, reused
from effzoo.placing import placed
from effzoo.transformers.config import EffzooConfig

log = logging.getLogger("effzoo.transformers")
_PLACES = ("cache_dir", "revision", "token", "force_download", "local_files_only")  # of a repository of the hub
_NO_MEANING: dict[str, Any] = {  # keywords that transformers passes on, with the values that ask for nothing here
    **dict.fromkeys(
        (
            "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "trust_remote_code", "code_revision",
            "low_cpu_mem_usage", "ignore_mismatched_sizes", "tqdm_class",
        )
    ),
    "use_safetensors": (True,), "weights_only": (True,), "attn_implementation": ("eager",),
}  # fmt: skip


def inner_of_folder(
    cls: Any, source: Any, config: Any, given: dict[str, Any]
) -> tuple[AnyModel, EffzooConfig, dict[str, Any], Path]:
    """The model of a folder or of the hub with the head of a class, its configuration, and which tensors are new."""
    folder = _folder(source, given)
    if not isinstance(config, EffzooConfig):
        at = folder if config is None else config
        config, given = EffzooConfig.from_pretrained(at, return_unused_kwargs=True, **given)
    dtype, device = given.pop("dtype", None), given.pop("device_map", None)
    dtype = dtype if (older := given.pop("torch_dtype", None)) is None else older
    for name, value in given.items():
        accepted = _NO_MEANING.get(name, ())
        if accepted is not None and value is not None and value is not False and value not in accepted:
            raise OptionError(f"from_pretrained takes no {name}={shown(value)} of a folder of effzoo; leave it out")
    if (asked := getattr(config, "_attn_implementation", None)) not in (None, "eager"):
        raise OptionError(
            f"from_pretrained takes no attn_implementation={shown(asked)} of a folder of effzoo, which says its "
            "attention itself; effzoo.load(folder) and effzoo.build(pretrained=folder, backend=...) choose the operator"
        )
    said, config = read_description(folder), copy.deepcopy(config)
    _check_sizes(config, said, folder)
    model, new = _with_head(cls, folder, said, config, dtype)
    config.follow(model)
    if new and config.problem_type == said.problem_type:  # of the head that is left out
        config.problem_type = None
    config.name_or_path = str(source)
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    info = {"missing_keys": new, "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    return placed(model, device), config, info, folder


def has_labels(task: str) -> bool:
    """Whether a head of this task tells labels apart."""
    return task.endswith("classification")


def _folder(source: Any, given: dict[str, Any]) -> Path:
    where = {name: value for name in _PLACES if (value := given.pop(name, None)) is not None}
    inside = given.pop("subfolder", "")
    folder = Path(source)
    if not folder.is_dir():
        if where.get("revision") == "main":
            del where["revision"]
        try:
            folder = Path(snapshot_download(str(source), **where))
        except (OSError, ValueError) as error:  # of huggingface_hub: no such repository, no network, no such name
            raise FileError(
                f"{str(source)!r} is no local folder, and as a hub id it could not be fetched "
                f"({type(error).__name__}: {str(error).splitlines()[0]:.200}); give a folder that effzoo.save "
                "wrote, or check the name and the network"
            ) from error
    folder = folder / inside
    if not is_folder(folder):
        raise FileError(f"{folder} is no folder that effzoo.save wrote; AutoModel opens those of transformers")
    return folder


def _check_sizes(config: EffzooConfig, said: Description, folder: Path) -> None:
    """A changed configuration would be another function on the same weights."""
    mine = said.config
    for key, value in config.config.items():
        if plain(value) != (there := _listed(getattr(mine, key, None))) and _listed(value) != there:
            raise OptionError(
                f"{key} is {shown(there)} in {folder}, and {shown(value)} in the configuration that was given; "
                f"effzoo.build(pretrained={str(folder)!r}, {key}=...) says what may be another"
            )


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _with_head(
    cls: Any, folder: Path, said: Description, config: EffzooConfig, dtype: Any
) -> tuple[AnyModel, list[str]]:
    """The model, and the names of the tensors that are new."""
    labels = config.num_labels if has_labels(cls.task) else None
    if cls.task == said.task and labels in (None, said.num_labels):
        return load(folder, dtype=dtype), []
    if cls.task == "features":
        model = reused(folder, None, said.task, None, dtype, {})
        new_head(model, folder, "features", said.own_labels, pooler=False)
    else:
        model = reused(folder, None, cls.task, labels, dtype, {})
        if model.task == said.task:
            new_head(model, folder, cls.task, labels or 2)
    names = [f"head.{name}" for name, _ in model.head.named_parameters()]
    log.warning(
        "%s holds a model for the task %r%s; %s", folder, said.task,
        f" with {said.num_labels} labels" if has_labels(said.task) else "",
        f"its head is left out of {cls.__name__}" if not names else
        f"the head of {cls.__name__} is new and has to be trained: {', '.join(names)}",
    )  # fmt: skip
    return model.eval(), names
