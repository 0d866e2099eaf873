"""Where a text begins and ends, and how a model is asked to continue one: what a model of transformers says, and
back."""

from __future__ import annotations

from typing import Any

from effzoo.architectures import Config

FIELDS = ("bos_token", "eos_token", "generation")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_KEPT = ("transformers_version", "_from_model_config", "_commit_hash", "use_cache")


def tokens_of(theirs: Any) -> dict[str, Any]:
    """The tokens of a config of theirs, as fields of ours."""
    return {
        "bos_token": _ids(getattr(theirs, "bos_token_id", None)),
        "eos_token": _ids(getattr(theirs, "eos_token_id", None)),
    }


def settings_of(theirs: Any) -> dict[str, Any] | None:
    """The settings of their `generation_config` that are no defaults, and tokens that differ from their config's."""
    generation = getattr(theirs, "generation_config", None)
    if generation is None:
        return None
    settings = {
        key: value
        for key, value in generation.to_diff_dict().items()
        if value is not None and value is not False and key not in (*_NOT_KEPT, *_TOKENS)
    }
    tokens = {key: getattr(generation, key, None) for key in _TOKENS}
    return (
        settings | {key: value for key, value in tokens.items() if value != getattr(theirs.config, key, None)} or None
    )


def _ids(given: Any) -> Any:
    """One token id, several, or None; some configs write -1 for none."""
    kept = [
        token
        for token in (given if isinstance(given, (list, tuple)) else [given])
        if isinstance(token, int) and token >= 0
    ]
    return tuple(kept) or None if isinstance(given, (list, tuple)) else kept[0] if kept else None


def tokens(config: Config) -> dict[str, Any]:
    """Our tokens as the fields of theirs, without those that are not in the vocabulary."""
    fields: dict[str, Any] = {}
    for name, given in (("bos_token_id", config.bos_token), ("eos_token_id", config.eos_token)):
        kept = [
            token
            for token in (given if isinstance(given, tuple) else (given,))
            if token is not None and token < config.vocab
        ]
        fields[name] = kept or None if isinstance(given, tuple) else kept[0] if kept else None
    return fields


def write(theirs: Any, config: Config) -> None:
    """Give a model of transformers the settings that ours holds, if it generates."""
    if getattr(theirs, "generation_config", None) is not None and config.generation:
        theirs.generation_config.update(**config.generation)
