"""The encoder-decoder: an encoder reads the source, and a decoder writes the target and reads the encoder's states.

    h <- encoder(source)                                    bidirectional, any attention kind
    z <- self-attention(z); cross-attention(z, h); mlp(z)   in each layer of the decoder, z from the target, causal
    logits_t = head(z_t), which predicts the target at t + 1

Vaswani et al. 2017, arXiv:1706.03762, section 3.1; BART: Lewis et al. 2020, arXiv:1910.13461.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo.architectures.embeddings import Embeddings, check_device, check_tensors
from effzoo.architectures.encoder_decoder_config import EncoderDecoderConfig
from effzoo.architectures.function import function_of
from effzoo.architectures.heads import head
from effzoo.architectures.output import Output
from effzoo.architectures.transformer import Stack, Transformer
from effzoo.attention.core import AttentionCore, Cache, Mask, Source
from effzoo.checked import IGNORED, within
from effzoo.errors import InputError, OptionError
from effzoo.recompute import Level, Recomputing
from effzoo.sites import HookContext, Model, calling


class EncoderDecoder(Recomputing, Model):
    """An encoder, and a decoder with cross-attention, with the head of a task; everything in `config` is data.

    Source and target share the token embedding, `encoder.embeddings.token`. Layers are numbered through both stacks:
    those of the decoder follow those of the encoder. Roles of the sites:

    attn.*, mlp.*: the self-attention and the feed-forwards of both stacks, where PEFT methods hang by default.
    cross.*: the decoder's cross-attention (cross.q, cross.memory, cross.branch, ...), for `targets`.
    embed.*, final.norm, lm.*: as in a transformer.

    Prompt tokens stand in front of the source, and the decoder reads their states (Lester et al. 2021,
    arXiv:2104.08691, section 2).
    """

    def __init__(self, config: EncoderDecoderConfig, task: str = "features", num_labels: int = 2):
        super().__init__()
        config.check_task(task)
        config = dataclasses.replace(config)  # trainers set tokens of it, which are those of this model
        self._config, self.task, self.own_labels = config, task, num_labels
        encoder, decoder = config.encoder(), config.decoder()
        layers = encoder.layers + decoder.layers
        relative = (config.relative_buckets, config.relative_distance) if config.positions == "relative" else None
        slots = {"activation_dropout": config.activation_dropout}
        same: dict[str, Any] = {"relative": relative, "slots": slots, "dropout": config.final_dropout}
        self.encoder = Transformer(encoder, stack=Stack(0, layers, **same))
        self.decoder = Transformer(decoder, stack=Stack(encoder.layers, layers, reads=True, **same))
        self.head = head(config, task, num_labels)
        self.head.apply(Transformer._initialise)

    @property
    def config(self) -> EncoderDecoderConfig:
        """Sizes and slots of both stacks; a new one is given to them."""
        return self._config

    @config.setter
    def config(self, config: EncoderDecoderConfig) -> None:
        self._config = config
        self.encoder.config = self.encoder.embeddings.config = config.encoder()
        self.decoder.config = self.decoder.embeddings.config = config.decoder()

    @property
    def embeddings(self) -> Embeddings:
        """The encoder's embeddings, whose tokens are the decoder's too."""
        return self.encoder.embeddings

    @property
    def recompute(self) -> Level:
        """What both stacks compute again in the backward pass (`effzoo/recompute.py`)."""
        return self.encoder.recompute

    @recompute.setter
    def recompute(self, level: Level) -> None:
        self.encoder.recompute = self.decoder.recompute = level

    @property
    def num_labels(self) -> int:
        """Of a classification head, which an encoder-decoder does not have: `own_labels`."""
        return self.own_labels

    def computes(self) -> dict[str, Any]:
        """What decides the evaluated function besides the tensors, by name (`effzoo.architectures.function`)."""
        return function_of(self.config, self.task, self.own_labels)

    def cores(self) -> Iterable[AttentionCore]:
        """The self-attention core of each block, the encoder's first."""
        return chain(self.encoder.cores(), self.decoder.cores())

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """The encoder's states [batch, p + n, dim], those of p prompt tokens in front: the `encoder_outputs` of
        `forward`, whose arguments these are."""
        out = self.encoder(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, global_attention_mask=global_attention_mask,
            task_ids=task_ids,
        )  # fmt: skip
        return cast(Tensor, out.last_hidden_state)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        task_ids: Tensor | None = None,
    ) -> Output:
        """head(decoder(target, encoder(source))): an Output with loss, logits [batch, m, vocab], last_hidden_state
        [batch, m, dim] of the decoder and encoder_last_hidden_state [batch, p + n, dim].

        input_ids int[batch, n]: the tokens of the source.
        attention_mask [batch, n]: 1 for tokens of the source, 0 for padding, which neither stack reads.
        decoder_input_ids int[batch, m]: the tokens that the decoder reads; when not given, `decoder_start_token` and
            the labels but the last, with `pad_token` in the place of -100.
        decoder_attention_mask [batch, m]: 1 for tokens of the target; with a cache it covers the positions in it, too.
        encoder_outputs: the states of the source, as `encode` or encoder_last_hidden_state has them (or a sequence that
            begins with them), instead of the source itself.
        inputs_embeds, decoder_inputs_embeds [batch, n or m, dim]: embeddings of tokens instead of ids.
        global_attention_mask [batch, n]: 1 for tokens of the source with global attention, for kinds that have it.
        labels int[batch, m]: the target; -100 does not count. The logits at t are compared with the label at t.
        cache: of a decoder that generates; its input is what follows the positions in it. Keys and values of the
            source are computed in the first call and kept.
        task_ids int[batch]: the task of each example, for adapters that are routed by it.

        Raises InputError for shapes, dtypes, lengths and ids that do not fit.
        """
        check_tensors(labels=labels, decoder_input_ids=decoder_input_ids, task_ids=task_ids)
        check_device(self, labels=labels, decoder_input_ids=decoder_input_ids)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise InputError("the decoder has nothing to read; give labels, or decoder_input_ids")
            decoder_input_ids = self.shifted(labels)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise InputError("give either decoder_input_ids or decoder_inputs_embeds, not both")
        if encoder_outputs is None:
            states = self.encode(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, global_attention_mask=global_attention_mask,
                task_ids=task_ids,
            )  # fmt: skip
        elif input_ids is not None or inputs_embeds is not None or global_attention_mask is not None:
            raise InputError("encoder_outputs are the states of the source, so give one of the two")
        else:
            states = _states(encoder_outputs, self.config.dim)
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self._embedded(cast(Tensor, decoder_input_ids), decoder_attention_mask, task_ids)
        if len(states) != len(decoder_inputs_embeds):
            raise InputError(f"the source has {len(states)} rows and the target {len(decoder_inputs_embeds)}")
        source = Source(states, Mask(self._valid(attention_mask, states), tasks=task_ids))
        with self.decoder.reading(source):
            z = self.decoder(
                inputs_embeds=decoder_inputs_embeds, attention_mask=decoder_attention_mask, cache=cache,
                task_ids=task_ids,
            ).last_hidden_state  # fmt: skip
        with calling(HookContext()):
            read = z * self.config.dim**-0.5 if self.config.scaled_logits and self.task == "seq2seq_lm" else z
            output = cast(Output, self.head(read, None, labels, self.embeddings.token))
        output["last_hidden_state"] = z
        output["encoder_last_hidden_state"] = states
        return output

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict these labels: the start token and all but the last, -100 as padding."""
        start, pad = self.config.decoder_start_token, self.config.pad_token
        if start is None:
            raise OptionError(
                f"{self.config.name} has no decoder_start_token, so labels cannot be shifted behind it; build it with "
                "one, or give decoder_input_ids"
            )
        if labels.ndim != 2 or labels.is_floating_point():
            raise InputError(f"labels are integers [batch, m], got {labels.dtype} of shape {tuple(labels.shape)}")
        labels = labels.long()
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted if pad is None else shifted.masked_fill(shifted == IGNORED, pad)

    def _embedded(self, ids: Tensor, mask: Tensor | None, task_ids: Tensor | None) -> Tensor:
        """The embeddings of the decoder's tokens."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise InputError(
                f"decoder_input_ids is an integer tensor [batch, m], got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        hint = "; labels of -100 need a pad_token" if self.config.pad_token is None else ""
        last = self.config.vocab - 1
        ids = within(ids, last, "decoder_input_ids", f"[0, {last}]", hint)
        valid = self.decoder.valid_tokens(mask)
        valid = None if valid is None else valid[:, -ids.shape[1] :]
        with calling(HookContext(valid, Mask(valid, tasks=task_ids))):
            return cast(Tensor, self.embeddings.token(ids))

    def _valid(self, attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
        """Which states of the source are read, bool[batch, p + n]; None for all."""
        valid = self.encoder.valid_tokens(attention_mask)
        if valid is None:
            return None
        rows = self.embeddings.prompt()
        prompt = 0 if rows is None else rows.shape[-2]
        if valid.shape != (len(states), states.shape[1] - prompt):
            raise InputError(
                f"attention_mask has shape {tuple(valid.shape)}, and the source {tuple(states.shape[:2])}; give 1 for "
                "each of its tokens and 0 for padding"
            )
        return nn.functional.pad(valid, (prompt, 0), value=True)


def _states(given: Any, dim: int) -> Tensor:
    """The states that encoder_outputs hold."""
    if isinstance(given, Output) and given.encoder_last_hidden_state is not None:
        given = given.encoder_last_hidden_state
    states = given if isinstance(given, Tensor) else given[0]
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[-1] != dim:
        shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise InputError(f"encoder_outputs are states [batch, n, {dim}], or begin with them, got {shape}")
    return states
