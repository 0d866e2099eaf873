"""config.json of a model's folder: what the model is besides its tensors, written and read as of any origin.

A format is read by every later version of effzoo: a field that a later format adds to a config is in `LATER`, and older
folders take its default, which has to mean what was computed before. A later format is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from effzoo.architectures import AnyModel, Config, PerceiverConfig, config_class
from effzoo.architectures.heads import known_problem
from effzoo.attention.lsh import LSH
from effzoo.errors import EffzooError, FileError, IncompatibleError, OptionError, listing, shown
from effzoo.peft.attach import attached
from effzoo.peft.fingerprint import Fingerprint
from effzoo.peft.state import adapters_of
from effzoo.reading import read_object
from effzoo.sites import Activity, sites
from effzoo.spec import Spec

FORMAT = 2
LATER: dict[int, tuple[str, ...]] = {  # fields of configs by the format that added them
    2: ("mlp_out_bias", "rotary_fraction", "score_dim", "score_cap", "logit_cap", "scale_embeddings", "expert_mlp")
}
MODEL_TYPE = "effzoo"
CONFIG, FINGERPRINT, CARD, ADAPTERS, BUFFERS = "config.json", "fingerprint.json", "README.md", "adapters", "buffers"
GENERATION = "generation_config.json"  # of transformers, where one of its classes wrote the folder
CLASSES = {  # of effzoo.transformers
    "features": "EffzooModel", "classification": "EffzooForSequenceClassification",
    "token_classification": "EffzooForTokenClassification", "question_answering": "EffzooForQuestionAnswering",
    "masked_lm": "EffzooForMaskedLM", "causal_lm": "EffzooForCausalLM",
    "seq2seq_lm": "EffzooForSeq2SeqLM",
}  # fmt: skip
OF_TRANSFORMERS = ("transformers_version", "dtype", "problem_type", "auto_map")  # what its own classes add or read
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Description:
    """What config.json says.

    config, task, own_labels: what the model is made of.
    num_labels: of the head that acts, an adapter's own perhaps.
    label_names: by number; empty where nobody named them.
    added_tokens: how many of the tokens at the end `effzoo.resize_vocabulary` added.
    quantised: bits by the path of a site.
    hashing: rounds and seed of LSH layers whose rotations are not those of their spec, by path.
    adapters: names of those attached, in order.
    activity: which of them act, and how.
    fingerprint: the hash of fingerprint.json.
    problem_type: what the labels of a classification head are, in the words of transformers, where that is known.
    """

    config: Config | PerceiverConfig
    task: str
    own_labels: int
    num_labels: int
    label_names: tuple[str, ...] = ()
    added_tokens: int = 0
    quantised: dict[str, int] = field(default_factory=dict)
    hashing: dict[str, dict[str, int | None]] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    activity: Activity = field(default_factory=Activity)
    fingerprint: str = ""
    problem_type: str | None = None

    @classmethod
    def of_base(cls, model: AnyModel) -> Description:
        """What there is to say of a model without its adapters and names."""
        token = model.embeddings.token
        return cls(
            config=model.config, task=model.task, own_labels=model.own_labels, num_labels=model.own_labels,
            added_tokens=0 if token is None else token.added,
            quantised={path: cast(int, site.bits) for path, site in sites(model) if getattr(site, "bits", None)},
        )  # fmt: skip

    def with_adapters(self, model: AnyModel, label_names: Sequence[str]) -> Description:
        """The same with what is attached, and names of labels."""
        return dataclasses.replace(
            self, num_labels=model.num_labels, label_names=tuple(label_names), adapters=tuple(attached(model)),
            activity=adapters_of(model).roster.now, problem_type=known_problem(model),
        )  # fmt: skip

    def written(self, also: Mapping[str, Any] | None = None) -> bytes:
        """The content of config.json, and what transformers reads of it besides. Raises IncompatibleError for a value
        that JSON cannot hold."""
        names = self.label_names or tuple(f"LABEL_{number}" for number in range(self.num_labels))
        now = self.activity
        content = {
            "model_type": MODEL_TYPE, "architectures": [CLASSES[self.task]], "format": FORMAT,
            "effzoo_version": importlib.metadata.version("effzoo"), "task": self.task, "num_labels": self.num_labels,
            "own_labels": self.own_labels, "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "config": {f.name: _plain(getattr(self.config, f.name)) for f in fields(self.config)},
            "added_tokens": self.added_tokens, "quantised": self.quantised, "hashing": self.hashing,
            "adapters": {
                "attached": self.adapters, "active": now.names, "scales": now.scales, "average": now.average,
                "rows": now.rows, "trained": sorted(now.trained),
            },
            "fingerprint": self.fingerprint, **({"problem_type": self.problem_type} if self.problem_type else {}),
            **(also or {}),
        }  # fmt: skip
        try:
            return json.dumps(content, indent=2, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise IncompatibleError(f"{CONFIG} cannot hold a value of the model's config: {error}") from None


def is_folder(path: Any) -> bool:
    """Whether a path is a folder that `effzoo.save` wrote."""
    try:
        return isinstance(path, (str, Path)) and read_object(Path(path) / CONFIG).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_description(folder: Path) -> Description:
    """What config.json of a folder says. Raises FileError that names the file and the first thing that is wrong."""
    path = folder / CONFIG
    try:
        content = read_object(path)
        version = content.get("format")
        if type(version) is not int or version < 1:
            raise TypeError(f"format is a number from 1 on, got {version!r:.40}")
        if version > FORMAT:
            raise FileError(
                f"{path} has format {version}, this version of effzoo reads formats up to {FORMAT}; update effzoo"
            )
        return _checked(content, version)
    except FileNotFoundError:
        raise FileError(f"{folder} has no {CONFIG}; give a folder that effzoo.save wrote") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        reason = str(error) if isinstance(error, EffzooError) else f"{type(error).__name__}: {error}"
        raise FileError(f"{path} is not as effzoo.save writes it ({reason:.500}); save the model again") from None


def written_fingerprint(fingerprint: Fingerprint) -> tuple[bytes, str]:
    """The content of fingerprint.json, and its hash."""
    content = json.dumps(dataclasses.asdict(fingerprint), indent=1).encode()
    return content, hashlib.sha256(content).hexdigest()


def read_fingerprint(folder: Path, expected: str) -> Fingerprint:
    """What fingerprint.json says. Raises FileError where it is not the one that config.json names."""
    path = folder / FINGERPRINT
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise FileError(
                f"{path} is not the one that {CONFIG} names: the folder holds files of two models, or one is damaged; "
                "copy the whole folder again, or save the model again"
            )
        content = read_object(path)
        return Fingerprint(_typed(content, "facts", dict), _typed(content, "tensors", dict))
    except FileError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FileError(
            f"{path} cannot be read ({type(error).__name__}: {error}); copy the whole folder again"
        ) from None


def _plain(value: Any) -> Any:
    """A value of a config as JSON has it."""
    if isinstance(value, Spec):
        return {"name": value.name, **_plain(value.options)}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


KEYS: dict[str, type] = {
    "model_type": str, "architectures": list, "format": int, "effzoo_version": str, "task": str, "num_labels": int,
    "own_labels": int, "id2label": dict, "label2id": dict, "config": dict, "added_tokens": int, "quantised": dict,
    "hashing": dict, "adapters": dict, "fingerprint": str,
}  # fmt: skip


def _checked(content: dict[str, Any], version: int) -> Description:
    """The description; every entry has the type that it should have."""
    _check_keys(content, KEYS, "the file", optional=OF_TRANSFORMERS)
    for key, wanted in KEYS.items():
        _typed(content, key, wanted)
    if content["model_type"] != MODEL_TYPE:
        raise ValueError(f"model_type is {MODEL_TYPE!r}, got {shown(content['model_type'])}")
    given = content["config"]
    kind = config_class(given.get("architecture"))
    new = [name for later, names in LATER.items() if later > version for name in names]
    _check_keys(given, {f.name for f in fields(kind)}, "config", optional=new)
    config = kind(**given)
    config.check_task(content["task"])
    names = content["id2label"]
    if [*names] != [str(number) for number in range(len(names))] or len(names) != content["num_labels"]:
        raise ValueError(f"id2label names the labels 0, 1, ..., num_labels - 1, got {shown(names)}")
    if not all(isinstance(name, str) for name in names.values()):
        raise TypeError(f"the names of labels are texts, got {shown(names)}")
    if len({*names.values()}) < len(names):
        raise ValueError(f"id2label gives each name once, got {shown(names)}")
    if content.get("problem_type") not in (None, *PROBLEMS):
        raise ValueError(f"problem_type is one of {listing(PROBLEMS)}, got {shown(content['problem_type'])}")
    unnamed = all(name == f"LABEL_{number}" for number, name in names.items())
    quantised, hashing = content["quantised"], content["hashing"]
    if not all(bits in (4, 8) for bits in quantised.values()):
        raise ValueError(f"quantised says 4 or 8 for each site, got {shown(quantised)}")
    for path, entry in hashing.items():
        if not isinstance(entry, dict) or entry.keys() != {"rounds", "seed"} or not isinstance(entry["rounds"], int):
            raise ValueError(f"hashing says rounds and seed, got {shown(entry)} for {shown(path)}")
    adapters, activity = _activity(content["adapters"])
    return Description(
        config, content["task"], _count(content, "own_labels"), _count(content, "num_labels"),
        () if unnamed else tuple(names.values()), content["added_tokens"], quantised, hashing, adapters, activity,
        content["fingerprint"], content.get("problem_type"),
    )  # fmt: skip


def _activity(given: dict[str, Any]) -> tuple[tuple[str, ...], Activity]:
    """What is attached, and what of it acts."""
    kinds: dict[str, type] = {"attached": list, "active": list, "scales": list, "average": bool, "trained": list}
    _check_keys(given, {*kinds, "rows"}, "adapters")
    attached, active, scales, average, trained = (_typed(given, key, kind) for key, kind in kinds.items())
    rows = None if given["rows"] is None else tuple(_typed(given, "rows", list))
    if not all(isinstance(name, str) and name.isidentifier() for name in attached) or len({*attached}) < len(attached):
        raise ValueError(f"the names of adapters are identifiers, each once, got {shown(attached)}")
    if unknown := [name for name in (*active, *trained) if name not in attached]:
        raise ValueError(f"{shown(unknown[0])} is not among the adapters that are attached")
    if len(scales) != len(active) or not all(isinstance(scale, (int, float)) for scale in scales):
        raise ValueError(f"adapters has a scale for each that is active, got {shown(scales)}")
    if not all(type(row) is int and -1 <= row < len(active) for row in rows or ()):
        raise ValueError(f"rows are numbers of active adapters, or -1, got {shown(rows)}")
    return tuple(attached), Activity(tuple(active), tuple(map(float, scales)), average, rows, frozenset(trained))


def _check_keys(content: Mapping[str, Any], wanted: Any, where: str, optional: Sequence[str] = ()) -> None:
    if unknown := [key for key in content if key not in wanted and key not in optional]:
        raise ValueError(f"{where} has the field {shown(unknown[0])}, which this format does not have")
    if lost := [key for key in wanted if key not in content and key not in optional]:
        raise ValueError(f"{where} lacks {listing(sorted(lost))}")


def _typed(content: Mapping[str, Any], key: str, wanted: type) -> Any:
    value = content.get(key)
    if type(value) is not wanted:
        raise TypeError(f"{key} is of type {wanted.__name__}, got {value!r:.40}")
    return value


def _count(content: Mapping[str, Any], key: str) -> int:
    if content[key] < 1:
        raise ValueError(f"{key} is at least 1, got {content[key]}")
    return cast(int, content[key])


def given_names(labels: Any, model: AnyModel) -> tuple[str, ...]:
    """Names of labels by number, from a list or a mapping of numbers to names; those of the model for None."""
    if labels is None:
        return model.label_names if len(model.label_names) == model.num_labels else ()
    if isinstance(labels, Mapping):
        numbers = sorted(int(number) for number in labels)
        if numbers != list(range(len(numbers))):
            raise OptionError(f"labels names the numbers 0, 1, 2, ..., got {shown(dict(labels))}")
        labels = [labels.get(number, labels.get(str(number))) for number in numbers]
    if not model.task.endswith("classification"):
        raise OptionError(f"labels are for a classification head, and the task of this model is {model.task!r}")
    if not all(isinstance(name, str) for name in labels) or len({*labels}) != len(labels):
        raise OptionError(f"labels are texts, each once, got {shown(labels)}")
    if len(labels) != model.num_labels:
        raise OptionError(f"labels has {len(labels)} names, and the head of the model {model.num_labels} labels")
    return tuple(labels)


def rehashed(model: AnyModel, changed: Callable[[str], bool]) -> dict[str, dict[str, int | None]]:
    """Rounds and seed of the LSH layers whose rotations have `changed`, by path."""
    return {
        path: {"rounds": core.rounds, "seed": core.hash_seed}
        for path, core in model.named_modules()
        if isinstance(core, LSH) and changed(f"{path}.rotations")
    }
