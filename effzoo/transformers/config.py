"""config.json of a folder that `effzoo.save` wrote, as a configuration of transformers."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig

from effzoo import zoo
from effzoo.architectures import AnyModel, Config, EncoderDecoderConfig, PerceiverConfig, config_class
from effzoo.architectures.config import TOKEN_IDS
from effzoo.errors import OptionError, did_you_mean, shown
from effzoo.folder.description import MODEL_TYPE, Description

SIZES = {f.name for cls in (Config, PerceiverConfig, EncoderDecoderConfig) for f in dataclasses.fields(cls)} - {"name"}
NAMED = {  # names of transformers for fields of Config and PerceiverConfig
    "vocab_size": "vocab", "hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "mlp", "max_position_embeddings": "max_length", "type_vocab_size": "types",
}  # fmt: skip
TOKENS = TOKEN_IDS
OTHERS = {  # that PreTrainedConfig takes besides its fields
    "model_type", "num_labels", "torch_dtype", "name_or_path", "attn_implementation", "experts_implementation",
    "output_attentions", "auto_map", "use_cache",
}  # fmt: skip


class EffzooConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What a model of effzoo is, under the names of transformers.

    name: of the zoo, or a TOML file of your own; sizes follow by keyword, as in `effzoo.build`.
    task, num_labels: of the head; a class of transformers has the task that its name says.
    config: all fields, as config.json has them, instead of name and sizes.

        EffzooConfig(name="bert", attention="longformer[window=64]", layers=4, num_labels=3)

    `sizes` is the configuration of effzoo, from which `vocab_size`, `hidden_size`, `num_hidden_layers`,
    `num_attention_heads`, `intermediate_size`, `max_position_embeddings` and `type_vocab_size` read; `pad_token_id`,
    `bos_token_id` and `eos_token_id` are also written.

    Raises OptionError for sizes that do not exist or do not fit.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        *,
        name: Any = None,
        task: str = "features",
        num_labels: int | None = None,
        config: dict[str, Any] | None = None,
        own_labels: int | None = None,
        added_tokens: int = 0,
        quantised: dict[str, int] | None = None,
        hashing: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        fingerprint: str = "",
        format: int | None = None,
        effzoo_version: str | None = None,
        **more: Any,
    ):
        sizes = {(NAMED | TOKENS).get(key, key): more.pop(key) for key in [*more] if key in {*SIZES, *NAMED, *TOKENS}}
        known = {f.name for f in dataclasses.fields(PreTrainedConfig)} | OTHERS
        for key in more:
            if key not in known and not key.startswith("_"):
                raise OptionError(f"EffzooConfig has no {key!r}{did_you_mean(key, [*SIZES, *known])}")
        labels = more.get("id2label")
        count = num_labels if num_labels is not None else 2 if labels is None else len(labels)
        if config is None:
            made = zoo.config("bert" if name is None else name, **sizes)
            content = json.loads(Description(made, task, count, count).written())
            config, own_labels, adapters = content["config"], count, content["adapters"]
            format, effzoo_version = content["format"], content["effzoo_version"]
            more.setdefault("architectures", content["architectures"])
        elif name is not None or sizes:
            given = "name" if name is not None else next(iter(sizes))
            raise OptionError(f"config says all sizes, and {given} was given beside it; change it in config")
        self.task, self.own_labels, self.config = task, own_labels, config
        self.added_tokens, self.quantised, self.hashing = added_tokens, quantised or {}, hashing or {}
        self.adapters, self.fingerprint = adapters, fingerprint
        self.format, self.effzoo_version = format, effzoo_version
        if labels is not None and len(labels) != count:
            more.pop("id2label"), more.pop("label2id", None)
        if "id2label" not in more:
            more["num_labels"] = count
        super().__init__(**more)
        self.is_encoder_decoder = config.get("architecture") == "encoder-decoder"

    @classmethod
    def of(cls, model: AnyModel, labels: Sequence[str] = ()) -> EffzooConfig:
        """The configuration of a model that is there; labels: names, those of the model where they are empty."""
        names = labels or (model.label_names if len(model.label_names) == model.num_labels else ())
        content = json.loads(Description.of_base(model).with_adapters(model, names).written())
        return cls(**content)

    def follow(self, model: AnyModel) -> None:
        """Say what a model is that was changed; names of labels stay where their number does."""
        now = EffzooConfig.of(model)
        for key in (
            "task",
            "own_labels",
            "config",
            "added_tokens",
            "quantised",
            "hashing",
            "adapters",
            "architectures",
        ):
            setattr(self, key, getattr(now, key))
        if self.num_labels != now.num_labels:
            self.id2label, self.label2id = now.id2label, now.label2id

    @property
    def sizes(self) -> Any:
        """The config of effzoo."""
        cls = config_class(self.config.get("architecture"))
        try:
            return cls(**self.config)
        except TypeError as error:
            raise OptionError(f"config does not have the fields of effzoo: {error}") from None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels by number; empty where they are LABEL_0, LABEL_1, ..."""
        names = {int(number): str(name) for number, name in (self.id2label or {}).items()}
        if sorted(names) != list(range(len(names))):
            raise OptionError(f"id2label names the labels 0, 1, 2, ..., got {shown(self.id2label)}")
        if all(name == f"LABEL_{number}" for number, name in names.items()):
            return ()
        return tuple(names[number] for number in range(len(names)))

    def to_dict(self) -> dict[str, Any]:
        """What config.json of `effzoo.save` says, the versions, and what was set of `dtype` and `problem_type`."""
        content: dict[str, Any] = {
            key: copy.deepcopy(getattr(self, key))
            for key in (
                "model_type", "architectures", "format", "effzoo_version", "task", "num_labels", "own_labels",
                "id2label", "label2id", "config", "added_tokens", "quantised", "hashing", "adapters", "fingerprint",
            )
        }  # fmt: skip
        content["transformers_version"] = transformers.__version__
        for key in ("dtype", "problem_type", "auto_map"):
            if (value := getattr(self, key, None)) is not None:
                content[key] = copy.deepcopy(value)
        self.dict_dtype_to_str(content)
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: a folder is read without defaults."""
        return self.to_dict()

    def __getattr__(self, key: str) -> Any:
        field = (NAMED | TOKENS).get(key)
        if field is None or "config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {key!r}")
        return self.config.get(field)

    def __setattr__(self, key: str, value: Any) -> None:
        if key in NAMED:
            raise OptionError(
                f"{key} is a size of the weights, which stays; resize_token_embeddings changes the vocabulary, and "
                f"EffzooConfig(name=..., {NAMED[key]}=...) says it of a new model"
            )
        if key in TOKENS:
            self.config[TOKENS[key]] = value
            return
        super().__setattr__(key, value)  # type: ignore[no-untyped-call]
