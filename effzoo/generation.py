"""Text from causal models: greedy, sampling and beam search by transformers' `generate`, over our models and caches.

transformers is the only place where decoding strategies are kept well, so our models are shown to it through a thin face; the models
themselves know nothing of it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from effzoo.architectures import Transformer
from effzoo.attention.core import Cache
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.sites import prompt_rows


def generate(
    model: Transformer,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    global_attention_mask: Tensor | None = None,
    use_cache: bool = True,
    **options: Any,
) -> Any:
    """Continue token ids [batch, n]; the result is what transformers' `generate` gives: ids [batch, n + new], the prompt in front.

    attention_mask: 0 at padding, which stands at the front (left) in a batch of prompts of different length. global_attention_mask: of the
    prompt, for kinds with global tokens. use_cache: keep keys and values; the kind must have a cache (`full`, `longformer`, `lsh`). options: of
    transformers' GenerationConfig, such as `max_new_tokens=20, do_sample=True, top_p=0.9, num_beams=4, eos_token_id=2`. Active adapters act.

    Raises IncompatibleError for an encoder, another task, or a kind without a cache; OptionError for options that transformers does
    not know; InputError for prompts that do not fit.
    """
    if not isinstance(model, Transformer) or model.task != "causal_lm":
        what = f"task {model.task!r}" if isinstance(model, Transformer) else type(model).__name__
        raise IncompatibleError(f"generate needs a decoder with a language-model head, got {what}; build it with task='causal_lm'")
    without = next((core.name for core in model.cores() if not core.supports_cache), None)
    if use_cache and without:
        raise IncompatibleError(f"attention {without!r} keeps no cache for decoding; generate with use_cache=False")
    _check_prompt(model, input_ids, attention_mask)
    pad = options.pop("pad_token_id", model.config.pad_token)
    eos = options.get("eos_token_id")
    options["pad_token_id"] = pad if pad is not None else (eos[0] if isinstance(eos, (list, tuple)) else eos if eos is not None else 0)
    unknown = [name for name in options if not hasattr(_defaults, name) and name not in _CALL_OPTIONS]
    if unknown:
        raise OptionError(f"generate has no option {unknown[0]!r}; options are those of transformers.GenerationConfig")
    room = model.config.max_length - input_ids.shape[1] - prompt_rows(model)
    wanted = options.get("max_new_tokens", (options.get("max_length") or 20 + input_ids.shape[1]) - input_ids.shape[1])
    if wanted > room:
        raise InputError(
            f"{wanted} new tokens do not fit: {room} positions are left of max_length {model.config.max_length}; set max_new_tokens={room}"
        )
    called = {name: options.pop(name) for name in _CALL_OPTIONS if name in options}
    config = GenerationConfig(use_cache=use_cache, **options)  # type: ignore[no-untyped-call]
    face = _Face(model, global_attention_mask)
    was_training = model.training
    try:
        model.eval()
        kept = {"past_key_values": _Kept()} if use_cache else {}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return cast(Any, face).generate(input_ids, attention_mask=mask, generation_config=config, **kept, **called)
    finally:
        model.train(was_training)


_defaults = GenerationConfig()  # type: ignore[no-untyped-call]
_CALL_OPTIONS = ("logits_processor", "stopping_criteria", "streamer", "prefix_allowed_tokens_fn")


def _check_prompt(model: Transformer, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids is an integer tensor [batch, n] with n at least 1, got shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}, the prompt {tuple(input_ids.shape)}")
    if not bool(attention_mask[:, -1].all()):
        raise InputError("a prompt ends in padding, so what follows would stand after it; pad prompts at the front (padding_side='left')")


class _Kept:
    """Our cache as transformers handles one."""

    is_compileable = False

    def __init__(self) -> None:
        self.cache = Cache()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length - self.cache.rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder(beam_idx)


class _Face(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Our model with the few attributes that `generate` reads."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: Transformer, is_global: Tensor | None):
        parameter = next(model.parameters())
        super().__init__(PreTrainedConfig.from_dict({"vocab_size": model.config.vocab, "is_encoder_decoder": False}))
        self.inner, self.is_global = [model], is_global  # in a list: the face owns no weights
        self._place = (parameter.device, parameter.dtype)
        self.generation_config = _defaults

    @property
    def device(self) -> torch.device:
        return self._place[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._place[1]

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: _Kept | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        first = past_key_values is None or past_key_values.get_seq_length() == 0
        is_global = self.is_global if first else None
        if is_global is not None:
            is_global = is_global.repeat_interleave(len(input_ids) // len(is_global), dim=0)  # beams of one prompt stand together
            is_global = torch.nn.functional.pad(is_global, (0, input_ids.shape[1] - is_global.shape[1]))
        out = self.inner[0](
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            global_attention_mask=is_global,
            cache=None if past_key_values is None else past_key_values.cache,
        )
        return CausalLMOutputWithPast(logits=out.logits, past_key_values=past_key_values)  # type: ignore[arg-type]
