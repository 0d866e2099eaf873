"""The Perceiver: a few latents read an input of any length and shape, and a transformer computes on them alone.

    z <- cross(z, input); z <- block(z); ... as often as the config says    arXiv:2103.03206, section 3
    logits <- head(mean(z))                                                 Perceiver
    logits <- head(cross(queries, z))                                       Perceiver IO, arXiv:2107.14795, section 3.2
    z_0 = the last positions of the input, everything causal                Perceiver AR, arXiv:2202.07765, section 2

A layer costs O(latents^2) whatever the length n of the input; each cross-attention costs O(latents n).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effzoo.architectures.embeddings import check_device, checked
from effzoo.architectures.function import function_of
from effzoo.architectures.heads import head, labels_of, note_problem
from effzoo.architectures.output import Output
from effzoo.architectures.perceiver_config import PER_TOKEN, PerceiverConfig
from effzoo.architectures.perceiver_cross import Cross
from effzoo.architectures.perceiver_inputs import Inputs
from effzoo.architectures.transformer import attention_specs
from effzoo.attention.core import AttentionCore, Context, Mask
from effzoo.blocks import Block
from effzoo.checked import marks, within
from effzoo.devices import at_hand
from effzoo.errors import InputError
from effzoo.recompute import Recomputing, recompute
from effzoo.sharding import is_unit
from effzoo.sites import Embedding, Linear, Model


class Perceiver(Recomputing, Model):
    """A Perceiver with the head of a task; everything in `config` is data.

    Weights and latents start normal with standard deviation 0.02, biases 0. Roles of the sites:

    attn.*, mlp.*: the latent blocks, where PEFT methods hang by default.
    cross.*: the cross-attention. latents: their table. embed.*: the input.
    decoder.*: the output queries of a language model, which come pretrained.
    head.*: those of a classification head, which start untrained: every adapter trains a copy.
    """

    def __init__(self, config: PerceiverConfig, task: str = "features", num_labels: int = 2):
        super().__init__()
        config.check_task(task)
        config = dataclasses.replace(config)  # trainers set tokens of it, which are those of this model
        self.config, self.task, self.own_labels = config, task, num_labels
        self.embeddings = Inputs(config)
        self.latents = None if config.causal else Embedding(config.latents, config.dim, role="latents")
        self.cross = nn.ModuleList(_reading(config) for _ in set(config.cross_schedule()))
        self.blocks = nn.ModuleList(_latent_blocks(config))
        slots = config.latent_transformer().slots()
        self.final_norm = slots.make_norm(config.dim, "final.norm") if config.final_norm else None
        self.decoder = _decoder(config, task)
        per_token = task in PER_TOKEN and not config.causal
        sizes = dataclasses.replace(config.inputs(), dim=config.query_dim) if per_token else config.latent_transformer()
        self.head = head(sizes, task, num_labels)
        self.apply(self._initialise)
        for core in self.cores():
            core.initialise()

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def computes(self) -> dict[str, Any]:
        """What decides the evaluated function besides the tensors, by name (`effzoo.architectures.function`)."""
        return function_of(self.config, self.task, self.own_labels)

    @property
    def num_labels(self) -> int:
        """How many labels the head that acts tells apart: `own_labels`, or those of the active adapter's head."""
        return labels_of(self.head, self.own_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_positions: Tensor | None = None,
        output_queries: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """head(decoder(latents(input))): an Output of loss, logits, last_hidden_state (the latents [batch, m, dim]).

        For a label per token, logits [batch, k, ...] and labels [batch, k] are those of k output queries, by default
        one per token. A causal model has logits for its m = min(latents, n) latents, the last positions of the input.

        input_ids int[batch, n]: the tokens, of a model with a vocabulary.
        attention_mask [batch, n] or [batch, *axes]: 1 for what is there, 0 for padding. Pad causal inputs in front, so
            that tokens come last.
        position_ids int[batch or 1, n]: which learned positions; 0, 1, 2, ... when not given.
        inputs_embeds [batch, *axes, channels]: an array of numbers, or embeddings of tokens.
        output_positions int[batch or 1, k]: positions to decode; those of all tokens when not given.
        output_queries [batch or 1, k, query_dim]: any other queries instead.
        labels: int[batch] for classes, int[batch, k] for output queries; of a causal model [batch, n], those of the
            whole input, which are shifted here and count where there is a latent.

        Raises InputError for shapes, dtypes, lengths and ids that do not fit.
        """
        prompt = self.embeddings.prompt()
        prompt_length = 0 if prompt is None else prompt.shape[-2]
        self.embeddings.check(input_ids, inputs_embeds, attention_mask, position_ids, prompt_length)
        check_device(self, input_ids=input_ids, inputs_embeds=inputs_embeds)
        input_ids = checked(self.embeddings.sizes, prompt_length, "input_ids", input_ids)
        position_ids = checked(self.embeddings.sizes, prompt_length, "position_ids", position_ids)
        x, positions = self.embeddings(input_ids, inputs_embeds, position_ids, prompt)
        output_positions = self._check_queries(len(x), prompt_length, output_positions, output_queries)
        check_device(self, output_positions=output_positions, output_queries=output_queries)
        valid = self._valid(attention_mask, prompt_length)
        n = x.shape[1] - prompt_length
        if self.latents is None:
            z = x[:, -min(self.config.latents, n) :]
            valid_latents = None if valid is None else valid[:, -z.shape[1] :]
        else:
            z = self.latents(torch.arange(self.config.latents, device=x.device)).to(x.dtype).expand(len(x), -1, -1)
            valid_latents = None
        with recompute(self.recompute if self.training else "nothing", copied=is_unit(self)):
            z = self._run(z, x, Mask(valid), valid_latents)
        if self.final_norm is not None:
            z = self.final_norm(z)
        hidden = z
        if self.decoder is not None:
            wanted = positions[:, prompt_length:] if output_positions is None else output_positions + prompt_length
            if self.task == "classification":
                wanted = positions.new_zeros(1, 1)
            hidden = self.decoder(z, wanted, output_queries)
        if labels is not None and self.config.causal and self.task in PER_TOKEN:
            if labels.shape != (len(x), n):
                raise InputError(f"labels are those of the whole input, {(len(x), n)}, got shape {tuple(labels.shape)}")
            labels = labels[:, -z.shape[1] :]
        output: Output = self.head(hidden, valid_latents, labels, self.embeddings.token)
        if labels is not None:
            note_problem(self, labels)
        output["last_hidden_state"] = z
        return output

    def _run(self, z: Tensor, x: Tensor, mask: Mask, valid_latents: Tensor | None) -> Tensor:
        """The latents after every cross-attention and the blocks that follow it."""
        blocks, depth = cast("Sequence[Block]", self.blocks), self.config.layers
        per_cross = self.config.blocks_per_cross
        order = self.config.block_schedule()
        for step, which in enumerate(self.config.cross_schedule()):
            z = self._through(self.cross[which], z, x, mask)
            for block in order[step * per_cross : (step + 1) * per_cross]:
                # a mask for each: shared weights make choices of their own (hash buckets) every time they are applied
                again = self.recompute == "blocks" and torch.is_grad_enabled()
                latent_mask = Mask(valid_latents, decisions={} if again else None)
                for layer in blocks[block * depth : (block + 1) * depth]:
                    z = self._through(layer, z, latent_mask)
        return z

    def _through(self, module: nn.Module, *inputs: Any) -> Tensor:
        if self.recompute == "blocks" and self.training:
            return cast(Tensor, checkpoint(module, *inputs, use_reentrant=False))
        return cast(Tensor, module(*inputs))

    def _check_queries(
        self, batch: int, prompt_length: int, positions: Tensor | None, queries: Tensor | None
    ) -> Tensor | None:
        """The positions; InputError for output queries that do not fit."""
        if positions is None and queries is None:
            return None
        if self.decoder is None or self.task not in PER_TOKEN:
            raise InputError(
                "output queries are for a Perceiver with a label per token that is not causal: "
                "masked_lm or token_classification"
            )
        if positions is not None and queries is not None:
            raise InputError("give output_positions or output_queries, not both")
        given, width = (positions, "") if queries is None else (queries, f", {self.config.query_dim}")
        assert given is not None
        name, kind = ("output_positions", "an integer") if queries is None else ("output_queries", "a float")
        fits = given.is_floating_point() if width else given.dtype in (torch.long, torch.int)
        if (
            given.ndim != 2 + bool(width)
            or not fits
            or given.shape[1] == 0
            or (width and given.shape[2] != self.config.query_dim)
        ):
            raise InputError(
                f"{name} is {kind} tensor [batch or 1, queries{width}], got {given.dtype} of shape {tuple(given.shape)}"
            )
        if len(given) != 1 and len(given) != batch:
            raise InputError(f"{name} has {len(given)} rows, the input {batch}; give one for each, or one for all")
        last = self.config.max_length - 1 - prompt_length
        return None if positions is None else within(positions, last, "output_positions", f"[0, {last}]")

    def cores(self) -> Iterable[AttentionCore]:
        """The attention core of each latent block that has weights of its own."""
        return (block.attn.core for block in cast("Sequence[Block]", self.blocks))

    def _valid(self, attention_mask: Tensor | None, prompt_length: int) -> Tensor | None:
        """bool[batch, prompt_length + n], or None when nothing is padding."""
        if attention_mask is None:
            return None
        valid = marks(attention_mask, "attention_mask").flatten(1)
        if at_hand(valid) and bool(valid.all()):
            return None
        return nn.functional.pad(valid, (prompt_length, 0), value=True)


class Decoder(nn.Module):
    """k output queries read the latents: [batch, m, dim] -> [batch, k, query_dim] (Perceiver IO, section 3.2)."""

    def __init__(self, queries: int, cross: Cross, dim: int, role: str):
        super().__init__()
        self.queries = Embedding(queries, dim, role=f"{role}.queries")
        self.cross = cross

    def forward(self, z: Tensor, positions: Tensor, queries: Tensor | None) -> Tensor:
        """The learned queries at positions [batch or 1, k], or the given queries [batch or 1, k, query_dim]."""
        queries = self.queries(positions) if queries is None else queries
        out: Tensor = self.cross(queries.to(z.dtype).expand(len(z), -1, -1), z, Mask())
        return out


def _reading(config: PerceiverConfig) -> Cross:
    """The latents' cross-attention."""
    slots = dataclasses.replace(config.latent_transformer().slots(), mlp=config.cross_mlp)
    return Cross(
        slots, _context(config, config.cross_heads, config.cross_head_dim, causal=config.causal),
        source_dim=config.width, value_dim=config.cross_value_dim, residual=config.cross_residual, role="cross",
    )  # fmt: skip


def _decoder(config: PerceiverConfig, task: str) -> Decoder | None:
    """What turns latents into the hidden states that a head reads; None when it reads the latents."""
    slots = config.latent_transformer().slots()
    # one query as wide as a latent, in one head, added to what it reads
    if task == "classification" and config.pooling == "query":
        cross = Cross(
            dataclasses.replace(slots, mlp=config.dim), _context(config, 1, config.dim), source_dim=config.dim,
            value_dim=config.dim, residual=True, role="head",
        )  # fmt: skip
        return Decoder(1, cross, config.dim, "head")
    if task not in PER_TOKEN or config.causal:
        return None
    dim, role = config.query_dim, "decoder" if task == "masked_lm" else "head"
    cross = Cross(
        dataclasses.replace(slots, dim=dim, mlp=config.decoder_mlp),
        _context(config, config.decoder_heads, config.decoder_head_dim),
        source_dim=config.dim, value_dim=config.decoder_value_dim, residual=config.decoder_residual, role=role,
    )  # fmt: skip
    return Decoder(config.max_length, cross, dim, role)


def _context(config: PerceiverConfig, heads: int, head_dim: int, causal: bool = False) -> Context:
    return Context(
        heads=heads, head_dim=head_dim, causal=causal, dropout=config.attention_dropout, max_length=config.max_length,
        backend=config.backend, global_tokens=False,
    )  # fmt: skip


def _latent_blocks(config: PerceiverConfig) -> Iterable[Block]:
    """The self-attention layers that have weights of their own: ordinary pre-norm blocks over the latents."""
    sizes = config.latent_transformer()
    shared: dict[str, Any] = {}
    for layer, spec in enumerate(attention_specs(sizes)):
        context = dataclasses.replace(
            _context(config, config.heads, config.head_dim, config.causal), layer=layer, layers=sizes.layers,
            max_length=config.latents, shared=shared,
        )  # fmt: skip
        yield Block(dataclasses.replace(sizes.slots(layer), value_dim=config.value_dim), spec, context)
