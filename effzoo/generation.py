"""Text from causal models: greedy, sampling and beam search by transformers' `generate`, over our models and caches.

transformers is the only place where decoding strategies are kept well. It is asked to decode without a cache, so that
all it needs of a model is its logits after rows of token ids; which rows continue which, and what is kept of them,
stays here and does not change with its versions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from effzoo.annotations import Count, Few, Fraction, Number, Positive, Whole, checked, problem
from effzoo.architectures import Config, EncoderDecoder, PerceiverConfig, Transformer
from effzoo.attention.core import Cache
from effzoo.errors import EffzooError, IncompatibleError, InputError, OptionError, did_you_mean, shown
from effzoo.lookup import Ahead
from effzoo.sites import prompt_length, unwrap
from effzoo.sites.dtypes import decoding

log = logging.getLogger("effzoo.generate")
OPTIONS = {  # of GenerationConfig
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_beams", "num_return_sequences", "output_logits", "output_scores", "pad_token_id",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "sequence_bias", "stop_strings", "suppress_tokens", "temperature", "top_h", "top_k",
    "top_p", "typical_p", "watermarking_config",
}  # fmt: skip
_CALL_OPTIONS = ("logits_processor", "stopping_criteria", "streamer", "prefix_allowed_tokens_fn", "tokenizer")
_DRAFTS = "it drafts tokens ahead, which changes the speed and not the text; leave it out"
_CACHES = "effzoo keeps a cache of its own; choose use_cache=True or False"
_RECIPES = "transformers fetches this strategy from the hub as code; use sampling or num_beams"
_INSIDE = (
    "attention here never forms its weights, and what a layer computes is not kept; call the model on the "
    "result for last_hidden_state"
)
_TWICE = "it runs the model on a second prompt at every step; leave it out"
_REFUSED = {
    **dict.fromkeys(("assistant_model", "use_mtp", "assistant_early_exit"), _DRAFTS),
    **dict.fromkeys(
        ("cache_implementation", "cache_config", "prefill_chunk_size", "past_key_values", "cache", "max_cache_len"),
        _CACHES,
    ),
    **dict.fromkeys(
        ("penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
        _RECIPES,
    ),
    **dict.fromkeys(("custom_generate", "trust_remote_code"), _RECIPES),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _INSIDE),
    **dict.fromkeys(("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"), _TWICE),
    "synced_gpus": "rows are decoded in one process; leave it out",
    "generation_config": "give its options themselves, such as temperature=0.7; those of a converted model are in "
    "model.config",
    "inputs_embeds": "text is continued from token ids; for trained rows in front of a prompt attach 'prompt'",
    "decoder_start_token_id": "a decoder starts with its prompt, and an encoder-decoder with decoder_start_token of "
    "its config; say it there",
}
_OF_SOURCE = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty")
_NUMBERS: dict[str, Any] = {  # which transformers takes unseen, or fails on in the middle
    "max_new_tokens": Count, "max_length": Count, "min_new_tokens": Whole, "min_length": Whole, "num_beams": Few,
    "num_return_sequences": Few, "prompt_lookup_num_tokens": Count, "max_matching_ngram_size": Count,
    "no_repeat_ngram_size": Whole, "top_k": Whole, "top_p": Fraction, "min_p": Fraction, "typical_p": Fraction,
    "epsilon_cutoff": Fraction,
    "eta_cutoff": Fraction, "repetition_penalty": Positive, "length_penalty": Number,
    "eos_token_id": Whole | Sequence[Whole] | Tensor, "pad_token_id": Whole, "do_sample": bool,
}  # fmt: skip
_NEUTRAL = {"num_beam_groups": 1, "guidance_scale": 1.0}


@checked
def generate(
    model: Transformer | EncoderDecoder,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    global_attention_mask: Tensor | None = None,
    use_cache: bool = True,
    **options: Any,
) -> Any:
    """Continue token ids [batch, n] as transformers' `generate` does: ids [batch, n + new], the prompt in front.

    An encoder-decoder reads input_ids as the source, padded on either side, and the ids are those of the target
    [batch, 1 + new], which begins with its `decoder_start_token`.

    attention_mask [batch, n]: 0 at padding, which stands in front (left) of shorter prompts; a row gives the text and
        the logits that it gives alone.
    global_attention_mask [batch, n]: of the prompt, for kinds with global tokens.
    use_cache: keep keys and values; the kind must have a cache (all but those that cannot be causal).
    options: of transformers' GenerationConfig, such as `max_new_tokens=20, do_sample=True, top_p=0.9, num_beams=4,
        eos_token_id=2`, and `logits_processor`, `stopping_criteria`, `streamer`, `prefix_allowed_tokens_fn`,
        `tokenizer` (for `stop_strings`). One that is not given is what the model's config says (`eos_token`,
        `bos_token`, `pad_token`, `generation`), which an INFO record names; None takes it away.

    `prompt_lookup_num_tokens=4` computes the logits of so many tokens ahead where the text repeats itself
    (`effzoo.lookup`), of one prompt; the text is the same.

    Active adapters act. Attention that counts places from the front (`local`, `blockwise`, a circular `lsh`) computes
    rows of one length at a time.

    Raises IncompatibleError for an encoder, another task, or a kind without a cache; OptionError for options that
        transformers does not know, refuses, or that have no meaning here; InputError for prompts that do not fit.
    """
    model = unwrap(model)
    if not _writes(model):
        what = f"task {model.task!r}" if isinstance(model, Transformer | EncoderDecoder) else type(model).__name__
        raise IncompatibleError(
            f"generate needs a decoder with a language-model head, got {what}; build it with task='causal_lm', or an "
            "encoder-decoder with task='seq2seq_lm'"
        )
    without = next((core.name for core in _decoder(model).cores() if not core.decodes()), None)
    if use_cache and without:
        raise IncompatibleError(f"attention {without!r} keeps no cache for decoding; generate with use_cache=False")
    if isinstance(model, EncoderDecoder):
        return _translated(model, input_ids, attention_mask, global_attention_mask, use_cache, options)
    _check_prompt(model, input_ids, attention_mask)
    called = {name: options.pop(name) for name in _CALL_OPTIONS if options.get(name) is not None}
    config = _settings(model, input_ids, options)
    rows = _rows(model, input_ids, attention_mask, global_attention_mask, use_cache, config)
    try:
        return _decoded(model, rows, input_ids, config, called)
    except (ValueError, TypeError) as error:
        if isinstance(error, EffzooError) or called:
            raise
        raise OptionError(f"generate cannot decode with {_listed(options)}: {error}") from error


def _translated(
    model: EncoderDecoder, input_ids: Tensor, mask: Tensor | None, is_global: Tensor | None, use_cache: bool,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """`generate` of an encoder-decoder: the target of each source, behind the start token."""
    called = {name: options.pop(name) for name in _CALL_OPTIONS if options.get(name) is not None}
    start = _start(model, input_ids)
    config = _settings(model, start, options)
    rows = _targets(model, input_ids, mask, is_global, use_cache, config)
    try:
        return _decoded(model, rows, start, config, called)
    except (ValueError, TypeError) as error:
        if isinstance(error, EffzooError) or called:
            raise
        raise OptionError(f"generate cannot decode with {_listed(options)}: {error}") from error


def _start(model: EncoderDecoder, sources: Any) -> Tensor:
    """What the decoder reads first, int[batch, 1]."""
    if not isinstance(sources, Tensor) or sources.ndim != 2:
        given = f"shape {tuple(sources.shape)}" if isinstance(sources, Tensor) else type(sources).__name__
        raise InputError(f"input_ids is an integer tensor [batch, n], the sources, got {given}")
    token = model.config.decoder_start_token
    if token is None:
        raise OptionError(
            f"{model.config.name} has no decoder_start_token, behind which the target would start; build it with one"
        )
    return torch.full_like(sources[:, :1], token, dtype=torch.long)


def _targets(
    model: EncoderDecoder, ids: Tensor, mask: Tensor | None, is_global: Tensor | None, use_cache: bool, config: Any
) -> Targets:
    for name in _OF_SOURCE:
        if getattr(config, name, None) not in (None, 0, 1.0):
            raise OptionError(
                f"generate takes no {name} of an encoder-decoder: it would be read off the target instead of the "
                "source; give a logits_processor"
            )
    if config.prompt_lookup_num_tokens:
        raise OptionError(
            "prompt_lookup_num_tokens looks up what follows in the text itself, and a target starts from nothing; "
            "leave it out"
        )
    return Targets(model, ids, mask, is_global, use_cache)


def _writes(model: Any) -> bool:
    """Whether a model has a decoder with a language-model head."""
    return (isinstance(model, Transformer) and model.task == "causal_lm") or (
        isinstance(model, EncoderDecoder) and model.task == "seq2seq_lm"
    )


def _decoder(model: Transformer | EncoderDecoder) -> Transformer:
    return model.decoder if isinstance(model, EncoderDecoder) else model


def config_of(config: Config | PerceiverConfig) -> GenerationConfig:
    """What a model's config says of generation, as transformers has it."""
    said = {name: value for name, value in _said(config).items() if name in OPTIONS and value is not None}
    return GenerationConfig(**said)  # type: ignore[no-untyped-call]


def continued(
    outer: Any, model: Any, input_ids: Tensor, generation_config: GenerationConfig | None, given: dict[str, Any]
) -> Any:
    """`generate` as a model of transformers has it: settings are those of a GenerationConfig.

    outer: the model of transformers around `model`, whose own generation_config says what is not given.
    given: the other arguments of transformers' `generate`; one that has no meaning here is an OptionError.
    """
    mask, is_global = given.pop("attention_mask", None), given.pop("global_attention_mask", None)
    called = {name: given.pop(name) for name in [*given] if name in _CALL_OPTIONS}
    called = {name: value for name, value in called.items() if value is not None}
    types = given.pop("token_type_ids", None)
    if types is not None and bool(types.any()):
        raise OptionError("generate takes no token_type_ids: a text that is continued is one text; leave them out")
    if not _writes(model):
        raise IncompatibleError(f"a {type(model).__name__} does not generate; build a decoder with task='causal_lm'")
    sources = input_ids
    if isinstance(model, EncoderDecoder):
        input_ids = _start(model, sources)
    configs = (generation_config, outer.generation_config)
    free = given.get("max_length") is None and all(c is None or c.max_length is None for c in configs)
    asked = given.get("use_cache")
    config, rest = outer._prepare_generation_config(generation_config, **given)
    for name, value in rest.items():
        if value is not None and value is not False:
            raise OptionError(f"generate takes no {name}={shown(value)}: {_reason(name)}")
    for name in _REFUSED.keys() - {"generation_config"}:
        value = getattr(config, name, None)
        if value is not None and value is not False and value != getattr(_filled, name, None):
            raise OptionError(f"generate takes no {name}={shown(value)}: {_reason(name)}")
    if not isinstance(model, EncoderDecoder):
        _check_prompt(model, input_ids, mask)
    if config.max_new_tokens is not None or free:
        config.max_new_tokens, config.max_length = config.max_new_tokens or 20, None
    wanted = config.max_new_tokens or config.max_length - input_ids.shape[1]
    _check_room(model, input_ids, wanted)
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = (eos[0] if isinstance(eos, (list, tuple)) else eos) or 0
    without = next((core.name for core in _decoder(model).cores() if not core.decodes()), None)
    if asked and without:
        raise IncompatibleError(f"attention {without!r} keeps no cache for decoding; generate with use_cache=False")
    use_cache = config.use_cache is not False and not without
    rows: Rows | Ahead
    if isinstance(model, EncoderDecoder):
        rows = _targets(model, sources, mask, is_global, use_cache, config)
    else:
        rows = _rows(model, input_ids, mask, is_global, use_cache, config)
    config.use_cache = False
    return _decoded(model, rows, input_ids, config, called)


def _rows(
    model: Transformer, ids: Tensor, mask: Tensor | None, is_global: Tensor | None, use_cache: bool, config: Any
) -> Rows | Ahead:
    """What computes logits; the drafts of prompt lookup are its own matter, and not seen by transformers."""
    most = config.prompt_lookup_num_tokens
    if not most:
        return Rows(model, ids, mask, is_global, use_cache)
    config.prompt_lookup_num_tokens = None
    return Ahead(model, ids, mask, is_global, use_cache, most, config.max_matching_ngram_size or 2)


def _decoded(
    model: Transformer | EncoderDecoder,
    rows: Rows | Ahead,
    input_ids: Tensor,
    config: GenerationConfig,
    called: dict[str, Any],
) -> Any:
    was_training = model.training
    try:
        model.eval()
        return cast(Any, _Face(model, rows)).generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, **called
        )
    finally:
        model.train(was_training)


def _check_prompt(model: Transformer, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        given = f"shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"input_ids is an integer tensor [batch, n] with n at least 1, got {given}")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}, the prompt {tuple(input_ids.shape)}")
    if not bool(attention_mask[:, -1].all()):
        raise InputError(
            "a prompt ends in padding, so what follows would stand after it; pad prompts at the front "
            "(padding_side='left')"
        )


def _settings(model: Transformer | EncoderDecoder, input_ids: Tensor, options: dict[str, Any]) -> GenerationConfig:
    """The options as a GenerationConfig, each known, with those of the model's config and a length that fits."""
    for name, value in options.items():
        if name in OPTIONS or value is None or value is False or value == _NEUTRAL.get(name):
            continue
        if name in _REFUSED or hasattr(_known, name):
            raise OptionError(f"generate takes no {name}={shown(value)}: {_reason(name)}")
        raise OptionError(
            f"generate has no option {name!r}{did_you_mean(name, OPTIONS)} Options are those of "
            f"transformers.GenerationConfig, {_and(_CALL_OPTIONS)}"
        )
    for name in _NUMBERS.keys() & options.keys():
        if options[name] is not None and (wrong := problem(options[name], _NUMBERS[name])):
            raise OptionError(f"generate: {name} {wrong}")
    room = _room(model, input_ids)
    options = {
        name: value
        for name, value in (_own(model, room + input_ids.shape[1], options) | options).items()
        if value is not None
    }
    eos = options.get("eos_token_id")
    options.setdefault("pad_token_id", eos[0] if isinstance(eos, (list, tuple)) else eos if eos is not None else 0)
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 20)
    wanted = options.get("max_new_tokens", options.get("max_length", 0) - input_ids.shape[1])
    _check_room(model, input_ids, wanted)
    try:
        return GenerationConfig(use_cache=False, **{name: value for name, value in options.items() if name in OPTIONS})  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        raise OptionError(f"generate cannot decode with {_listed(options)}: {error}") from error


def _check_room(model: Transformer | EncoderDecoder, input_ids: Tensor, wanted: int) -> None:
    """Raise where so many new tokens do not fit behind the prompt."""
    room = _room(model, input_ids)
    if wanted > room:
        advice = (
            f"set max_new_tokens={room}"
            if room > 0
            else (f"shorten the prompt of {input_ids.shape[1]}, or build with a larger max_length")
        )
        raise InputError(
            f"{wanted} new tokens do not fit: {max(room, 0)} positions are left of max_length {_longest(model)}; "
            f"{advice}"
        )


def _room(model: Transformer | EncoderDecoder, ids: Tensor) -> int:
    """How many positions are left behind these ids; prompt tokens stand in front of a source."""
    in_front = 0 if isinstance(model, EncoderDecoder) else prompt_length(model)
    return _longest(model) - ids.shape[1] - in_front


def _longest(model: Transformer | EncoderDecoder) -> int:
    """The positions of what is written."""
    return model.decoder.config.max_length if isinstance(model, EncoderDecoder) else model.config.max_length


def _said(config: Any) -> dict[str, Any]:
    """What a config says of texts and of generation; tokens that cannot come are None."""
    ended = (config.eos_token,) if isinstance(config.eos_token, int) else config.eos_token or ()
    tokens = {"pad_token_id": config.pad_token, "bos_token_id": config.bos_token, "eos_token_id": list(ended)} | dict(
        config.generation or {}
    )
    ends = tokens["eos_token_id"] if isinstance(tokens["eos_token_id"], (list, tuple)) else [tokens["eos_token_id"]]
    tokens["eos_token_id"] = [token for token in ends if token is not None and token < config.vocab] or None
    tokens["bos_token_id"] = tokens["bos_token_id"] if tokens["bos_token_id"] in range(config.vocab) else None
    return tokens


def _own(model: Transformer | EncoderDecoder, longest: int, given: dict[str, Any]) -> dict[str, Any]:
    """What the model's config says of texts and of generation, without what was given; an INFO record names it."""
    config = model.config
    tokens = _said(config)
    if given.get("max_new_tokens") is not None or given.get("max_length") is not None:
        tokens |= {"max_length": None, "max_new_tokens": None}
    elif tokens.get("max_length") is not None:
        tokens["max_length"] = min(tokens["max_length"], longest)
    for name in [name for name in tokens if name not in OPTIONS]:
        value = tokens.pop(name)
        if name not in given and _REFUSED.get(name) in (_RECIPES, _TWICE) and value not in (False, _NEUTRAL.get(name)):
            raise OptionError(
                f"the model's generation settings have {name}={shown(value)}: {_reason(name)}; "
                f"{name}=None goes on without"
            )
    acting = {
        name: value
        for name, value in tokens.items()
        if name in (config.generation or {}) and name not in given and value is not None
    }
    if acting:
        log.info("generate: %s, from the generation settings of %s", _listed(acting), config.name)
    return tokens


def _reason(name: str) -> str:
    return _REFUSED.get(name, "it says how transformers runs its own models; leave it out")


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())[:400] or "the default options"


def _and(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


_known = GenerationConfig()  # type: ignore[no-untyped-call]
_filled = GenerationConfig(**_known._get_default_generation_params())  # type: ignore[no-untyped-call]


class _Group:
    """Rows that are computed together, their numbers, and the padding that is cut off in front."""

    def __init__(self, numbers: Tensor, cut: int, mask: Tensor, is_global: Tensor | None):
        self.numbers, self.cut, self.mask, self.cache = numbers, cut, mask[numbers, cut:], Cache()
        self.padded = not bool(self.mask.all())
        self.longest = 0  # positions of the longest row in the last call
        self.is_global = None if is_global is None else is_global[numbers, cut:]


class Rows:
    """The logits after each row of a batch that grows, as they are where the row stands alone.

    Where the attention counts places from the front, rows with as much padding make a group, and the padding is cut
    off; otherwise padding in front changes nothing, and all rows are one group.

    Without a cache each call computes its rows from their start. With one, a row that continues a row of the last call
    goes on from what is kept of that one; samples and beams of a prompt stand together.
    """

    def __init__(
        self, model: Transformer, prompt: Tensor, mask: Tensor | None, is_global: Tensor | None, use_cache: bool
    ):
        mask = torch.ones_like(prompt) if mask is None else mask.to(prompt.device)
        self.model, self.use_cache, self.prompts, self.before = model, use_cache, len(prompt), prompt[:, :0]
        invariant = all(core.shift_invariant for core in model.cores())
        cuts = mask.bool().int().argmax(dim=1) * (not invariant)
        self.groups = [
            _Group((cuts == cut).nonzero()[:, 0], cut, mask, is_global) for cut in sorted(set(cuts.tolist()))
        ]

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of the next token, [rows, vocab], for ids [rows, n], as many rows for each prompt."""
        times, out = len(ids) // self.prompts, None
        origin = self._origin(ids, times) if self.use_cache else None
        if len(self.groups) == 1:  # of all rows, in their order
            logits_of_group = self._of_group(self.groups[0], ids[:, self.groups[0].cut :], times, origin)
            self.before = ids
            return logits_of_group
        for group in self.groups:
            numbers = (group.numbers[:, None] * times + torch.arange(times, device=ids.device)).flatten()
            kept = None if origin is None else torch.searchsorted(numbers, origin[numbers])
            logits_of_group = self._of_group(group, ids[numbers, group.cut :], times, kept)
            out = logits_of_group.new_empty(len(ids), logits_of_group.shape[1]) if out is None else out
            out[numbers] = logits_of_group
        self.before = ids
        assert out is not None
        return out

    def _of_group(self, group: _Group, ids: Tensor, times: int, kept: Tensor | None) -> Tensor:
        n, prompt = ids.shape[1], group.mask.shape[1]
        start, is_global, mask, positions = 0, None, None, None
        if group.padded or self.model.config.position_offset:
            mask = F.pad(group.mask.repeat_interleave(times, dim=0), (0, n - prompt), value=1)
            positions = self._positions(ids, mask.bool())
        kept = None if self._turned_anew(group, n) else kept
        if kept is None:
            group.cache = Cache()
            if group.is_global is not None:
                is_global = F.pad(group.is_global.repeat_interleave(times, dim=0), (0, n - prompt))
        else:
            start = n - 1
            if not torch.equal(kept, torch.arange(len(kept), device=kept.device)):
                group.cache.reorder(kept)
        positions = None if positions is None else positions[:, start:]
        cache = group.cache if self.use_cache else None
        with decoding():
            out = self.model(ids[:, start:], mask, position_ids=positions, global_attention_mask=is_global, cache=cache)
        return cast(Tensor, out.logits[:, -1])

    def _turned_anew(self, group: _Group, n: int) -> bool:
        """Whether the rows of a group, now n long, have passed the length at which all keys are turned anew (longrope).

        Raises IncompatibleError where rows of other lengths would be turned by the angles of the longest.
        """
        config, longest = self.model.config, n + prompt_length(self.model)
        at, of_keys, before = config.angles_change_at, config.keys_change_at, group.longest
        group.longest = longest
        if at is not None and group.padded and longest > at:
            raise IncompatibleError(
                f"rows of other lengths than the longest, {longest}, would be turned by its angles, as rotary_scaling "
                f"says for texts of more than {at}; generate from one prompt, or from prompts of one length"
            )
        return of_keys is not None and before <= of_keys < longest

    def _positions(self, ids: Tensor, present: Tensor) -> Tensor:
        """Tokens are counted from 0, or from the offset of a model whose padding has the position before it."""
        offset, pad = self.model.config.position_offset, self.model.config.pad_token
        if offset and pad is not None:
            present = present & (ids != pad)
        return torch.where(present, present.long().cumsum(dim=1) + offset - 1, max(offset - 1, 0))

    def _origin(self, ids: Tensor, times: int) -> Tensor | None:
        """For each row the row of the last call that it continues by one token, int[rows]; None when none does."""
        if self.before.shape != (len(ids), ids.shape[1] - 1):
            return None
        order = torch.arange(len(ids), device=ids.device)
        if torch.equal(ids[:, :-1], self.before):
            return order
        now, before = (x.view(self.prompts, times, -1) for x in (ids[:, :-1], self.before))
        same = (now[:, :, None] == before[:, None]).all(dim=-1)
        if not bool(same.any(dim=-1).all()):
            return None
        return (same.int().argmax(dim=-1) + order.view(self.prompts, times)[:, :1]).flatten()


class Targets(Rows):
    """The logits after each row of targets that grow, of as many rows for each source; the sources are encoded once."""

    def __init__(
        self, model: EncoderDecoder, sources: Tensor, mask: Tensor | None, is_global: Tensor | None, use_cache: bool
    ):
        was_training = model.training
        model.eval()
        try:
            with decoding():
                self.states = model.encode(sources, mask, global_attention_mask=is_global)
        finally:
            model.train(was_training)
        self.reader, self.mask, self.cache = model, mask, Cache()
        self.use_cache, self.prompts, self.before = use_cache, len(sources), sources[:, :0]

    def logits(self, ids: Tensor) -> Tensor:
        times, start = len(ids) // self.prompts, 0
        origin = self._origin(ids, times) if self.use_cache else None
        if origin is None:
            self.cache = Cache()
        else:
            start = ids.shape[1] - 1
            if not torch.equal(origin, torch.arange(len(origin), device=origin.device)):
                self.cache.reorder(origin)
        states = self.states.repeat_interleave(times, dim=0)
        mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)
        cache = self.cache if self.use_cache else None
        with decoding():
            out = self.reader(None, mask, ids[:, start:], encoder_outputs=states, cache=cache)
        self.before = ids
        return cast(Tensor, out.logits[:, -1])


class _Face(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Our model with the few attributes that `generate` reads."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: Transformer | EncoderDecoder, rows: Rows | Ahead):
        parameter = next(model.parameters())
        super().__init__(PreTrainedConfig.from_dict({"vocab_size": model.config.vocab, "is_encoder_decoder": False}))
        self.rows = rows
        self._place = (parameter.device, parameter.dtype)
        self.generation_config = _known

    @property
    def device(self) -> torch.device:
        return self._place[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._place[1]

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.rows.logits(input_ids)[:, None])
