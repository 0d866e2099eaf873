"""The transformer, encoder or decoder: embeddings, a stack of blocks, a head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effzoo.architectures.config import Config
from effzoo.architectures.embeddings import Embeddings, check_device, check_inputs, check_tensors, checked
from effzoo.architectures.function import function_of
from effzoo.architectures.heads import Classification, head, labels_of
from effzoo.architectures.output import Output
from effzoo.architectures.packing import check_packed, packed, warn_of_documents
from effzoo.architectures.sharing import turns
from effzoo.attention.core import AttentionCore, Cache, Context, Mask
from effzoo.attention.predicate import PredicateAttention
from effzoo.blocks.block import Block
from effzoo.blocks.experts import Experts, balancing
from effzoo.blocks.feedforward import FeedForward
from effzoo.blocks.reversible import reversible, states, two_streams
from effzoo.checked import marks
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, IncompatiblePeft, InputError, OptionError
from effzoo.recompute import Recomputing, recompute
from effzoo.sites import HookContext, Linear, Model, Side, calling
from effzoo.spec import Spec, parse_one


class Transformer(Recomputing, Model):
    """An encoder (bidirectional) or a decoder (causal) with the head of a task; everything in `config` is data.

    Weights start as in BERT and GPT-2: normal with standard deviation 0.02, biases 0; decoders scale the projections
    that end a residual branch by 1 / sqrt(2 layers) (Radford et al. 2019, section 2.3).
    """

    shows_mask = True  # the hooks at its sites are given the mask of the batch

    def __init__(self, config: Config, task: str = "features", num_labels: int = 2):
        super().__init__()
        self.config, self.task, self.own_labels = config, task, num_labels
        self.embeddings = Embeddings(config)
        shared: dict[str, Any] = {}
        specs = attention_specs(config)
        self.blocks = nn.ModuleList(
            self._block(config, number, specs[layer], shared) for number, layer in enumerate(config.first_layers)
        )
        self.final_norm = config.slots().make_norm(config.width, "final.norm") if config.norm == "pre" else None
        self.side = Side(config.width, config.layers, partial(_narrow, config))
        self.head = head(config, task, num_labels)
        # of the last block, the positions that a classification head reads; then no last_hidden_state
        self.only_what_is_read = False
        self.apply(self._initialise)
        for core in self.cores():
            core.initialise()
        for block in self.blocks if config.causal else ():
            ends = [part.down for part in block.mlp.modules() if isinstance(part, FeedForward)]  # type: ignore[union-attr]
            for linear in (block.attn.o, *ends):  # type: ignore[union-attr]
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.layers))  # type: ignore[union-attr, arg-type]

    @staticmethod
    def _block(config: Config, number: int, spec: Spec, shared: dict[str, Any]) -> Block:
        context = Context(
            heads=config.heads,
            head_dim=config.head_dim or config.dim // config.heads,
            causal=config.causal,
            dropout=config.dropped_weights(config.first_layers[number]),
            layer=number,
            layers=config.blocks,
            max_length=config.max_length,
            backend=config.backend,
            shared=shared,
        )
        block = Block(config.slots(config.first_layers[number]), spec, context)
        if config.residual == "reversible" and isinstance(block.mlp, Experts) and block.mlp.router.weighted:
            raise IncompatibleError(
                f"router {config.router!r} adds a loss, and a reversible residual keeps no graph that would lead "
                "back from it; use residual='plain', "
                "or a router without a loss ('base', 'soft', 'gumbel', or 'switch[balance=0]')"
            )
        return block

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
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        task_ids: Tensor | None = None,
    ) -> Output:
        """Token ids [batch, n], or embeddings [batch, n, dim], -> loss, logits, last_hidden_state [batch, n, dim].

        attention_mask [batch, n]: 1 for tokens, 0 for padding; with a cache it covers the positions in it too.
        position_ids [batch or 1, n]: where they do not go on by 1 in a decoder, another document starts, which is
            computed as it is alone. Beside an attention_mask they are positions only, as in transformers.
        global_attention_mask [batch, n]: 1 for tokens with global attention. By default the first token of an encoder
            with a classification head, where attention has projections for global tokens.
        cache: of a causal model that decodes; the input is what follows the positions in it.
        task_ids [batch]: the number of each example's task, for adapters that are routed by it.

        A classifier with pooling="last" reads the last token of the mask; in a decoder with a `pad_token`, the last one
        whose id is another.

        Padding at the front takes positions and places: give position_ids, and use it with kinds that are
        `shift_invariant` (full, longformer, lsh), or pad at the end. `effzoo.generate` gives each row what it gives
        alone with every kind.

        Raises InputError for shapes, dtypes, lengths and ids that do not fit.
        """
        if cache is not None and not self.config.causal:
            raise IncompatibleError(
                f"{self.config.name} is an encoder: every position sees the later ones, so there is nothing to cache"
            )
        if cache is not None and not isinstance(cache, Cache):
            raise InputError(f"cache is an effzoo.attention.Cache, got {type(cache).__name__}")
        start = 0 if cache is None else cache.length
        prompt = self.embeddings.prompt() if start == 0 else None
        rows = 0 if prompt is None else prompt.shape[-2]
        before = 0 if cache is None or start == 0 else cache.prompt_tokens  # prompt rows that are in the cache
        check_inputs(
            self.config, rows + before, start - before, input_ids, inputs_embeds, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, global_attention_mask=global_attention_mask,
        )  # fmt: skip
        check_tensors(labels=labels, task_ids=task_ids)
        check_device(self, input_ids=input_ids, inputs_embeds=inputs_embeds, task_ids=task_ids)
        input_ids, token_type_ids, position_ids = (
            checked(self.config, rows + before, name, ids)
            for name, ids in (
                ("input_ids", input_ids),
                ("token_type_ids", token_type_ids),
                ("position_ids", position_ids),
            )
        )
        valid = self._valid(attention_mask)
        documents = None
        if position_ids is not None and self.config.causal and attention_mask is not None:
            warn_of_documents(position_ids, attention_mask[:, -position_ids.shape[1] :].bool())
        elif position_ids is not None and self.config.causal:
            position_ids, documents = packed(position_ids, len(inputs_embeds if input_ids is None else input_ids))  # type: ignore[arg-type]
            if documents is not None:
                check_packed(self.cores(), self.task, rows, cache is not None)
        position_ids = None if position_ids is None else position_ids + before
        seen = None if valid is None else nn.functional.pad(valid, (rows, 0), value=True)
        outside = HookContext(seen, Mask(seen, tasks=task_ids))
        with calling(outside):
            x, positions = self.embeddings(input_ids, inputs_embeds, position_ids, token_type_ids, prompt, start)
        mask = self._mask(valid, global_attention_mask, x, rows, before, positions, task_ids)
        if valid is not None:
            valid = valid[:, -(x.shape[1] - rows) :]
        valid = self._text(valid, input_ids)
        read = self._read(x[:, rows:], valid, rows) if cache is None else None
        losses: list[Tensor] = []
        with balancing(losses) if self.config.experts else nullcontext():
            if documents is None:
                x = self._run(x, mask, cache, read)
            else:
                x = documents.together(self._run(documents.apart(x), documents.mask(mask), None))
        if cache is not None:
            cache.length, cache.prompt_tokens = start + x.shape[1], rows + before
        with calling(outside):
            if self.final_norm is not None:
                x = self.final_norm(x)
            output: Output = self.head(
                x[:, rows:] if read is None else x, valid if read is None else None, labels, self.embeddings.token
            )
        if read is not None:
            del output["last_hidden_state"]
        return _balanced(output, losses)

    def _text(self, valid: Tensor | None, ids: Tensor | None) -> Tensor | None:
        """The positions that the head may read, bool[batch, n], or None for all. A decoder's classifier that reads the
        last token reads the last whose id is not `pad_token`, with a mask or not, as in transformers: a text that ends
        in eos is read before it where it is the padding."""
        pad = self.config.pad_token
        if (
            not (isinstance(self.head, Classification) and self.config.pooling == "last" and self.config.causal)
            or ids is None
            or pad is None
        ):
            return valid
        return ids != pad if valid is None else valid & (ids != pad)

    def _read(self, x: Tensor, valid: Tensor | None, before: int) -> Tensor | None:
        """The positions that the head reads, with `before` prompt rows in front of them, or None where the last block
        computes all."""
        last = cast(Block, self.blocks[-1])
        plain = self.config.residual != "reversible" and not (self.side.active and self.side.replaces)
        if not (self.only_what_is_read and isinstance(self.head, Classification) and plain and last.positionwise):
            return None
        where = self.head.reads(x, valid)
        return None if where is None else where + before

    def _run(self, x: Tensor, mask: Mask, cache: Cache | None, read: Tensor | None = None) -> Tensor:
        """The blocks, with the residual and the memory of the config; gradient checkpointing is what reversible blocks
        do anyway."""
        blocks = self.by_layer()
        if self.side.active and self.side.replaces:
            if cache is not None:
                raise IncompatibleError(
                    "a side network keeps no cache for decoding; generate without one (use_cache=False)"
                )
            return self.side(self._states(x, mask), mask)
        if self.config.residual == "reversible":
            return reversible(blocks, x, mask) if cache is None else two_streams(blocks, x, mask, cache)
        level = self.recompute if self.training and cache is None else "nothing"
        with recompute(level):
            for i, block in enumerate(blocks):
                rows = read if i == len(blocks) - 1 else None
                x = (
                    checkpoint(block, x, mask, None, rows, use_reentrant=False)
                    if level == "blocks"
                    else block(x, mask, cache, rows)
                )
        return x

    def _states(self, x: Tensor, mask: Mask) -> list[Tensor]:
        """What stands before, between and after the blocks; autograd keeps nothing of them unless something in them is
        trained as well."""
        blocks = self.by_layer()
        if self.config.residual == "reversible":
            return states(blocks, x, mask)
        found = [x]
        for block in blocks:
            found.append(block(found[-1], mask))
        return found

    def by_layer(self) -> Sequence[Block]:
        """The block of each layer; where layers share one, turns of it."""
        blocks = cast("Sequence[Block]", self.blocks)
        if len(blocks) != self.config.blocks:
            raise IncompatibleError(
                f"the model has {len(blocks)} blocks and its config {self.config.blocks}; build one with "
                f"layers={len(blocks)} and load the weights"
            )
        return (
            blocks if len(blocks) == self.config.layers else cast("Sequence[Block]", turns(blocks, self.config.layers))
        )

    def cores(self) -> Iterable[AttentionCore]:
        """The attention core of each block."""
        return (block.attn.core for block in self.blocks)  # type: ignore[union-attr, misc]

    def _valid(self, attention_mask: Tensor | None) -> Tensor | None:
        """bool[batch, n], or None when every position holds a token, which lets attention run without a mask."""
        if attention_mask is None:
            return None
        valid = marks(attention_mask, "attention_mask")
        return None if at_hand(valid) and bool(valid.all()) else valid

    def _mask(
        self,
        valid: Tensor | None,
        is_global: Tensor | None,
        x: Tensor,
        rows: int,
        before: int,
        positions: Tensor,
        tasks: Tensor | None,
    ) -> Mask:
        """The mask of the blocks. Prompt rows are tokens, and global where attention knows global tokens: else only
        near tokens saw them."""
        batch, n = x.shape[0], x.shape[1] - rows
        knows_global = any(core.knows_globals() for core in self.cores())
        if is_global is not None and not knows_global:
            next(iter(self.cores())).check(Mask(is_global=is_global))
        given, marked = is_global is not None, 0  # marked: how many tokens of a row, at most
        first = not given and knows_global and self.task == "classification" and not self.config.causal
        if given:
            marked = max([0, *(core.max_globals for core in self.cores() if isinstance(core, PredicateAttention))])
        elif first and any(core.for_globals() for core in self.cores()):
            is_global, marked = (torch.arange(n, device=x.device) == 0).expand(batch, n), 1
        elif knows_global and rows:
            is_global = torch.zeros(batch, n, device=x.device)
        most = None if given and at_hand(x) else rows + marked
        if is_global is not None:
            is_global = nn.functional.pad(marks(is_global, "global_attention_mask"), (rows, 0), value=True)
        if valid is not None:
            valid = nn.functional.pad(valid, (rows + before, 0), value=True)
            is_global = None if is_global is None else is_global & valid[:, -x.shape[1] :]
        if is_global is not None and at_hand(is_global) and not bool(is_global.any()):
            is_global = None
        again = self.config.residual == "reversible" or self.recompute == "blocks"
        decisions: dict[Any, Any] | None = {} if again and torch.is_grad_enabled() else None
        return Mask(valid, is_global, positions, tasks, x, decisions, most_globals=most)


def _balanced(output: Output, losses: Sequence[Tensor]) -> Output:
    """The output with the losses that balance experts, if there are any."""
    if losses:
        output["balance_loss"] = torch.stack(list(losses)).sum()
        if output.loss is not None:
            output["loss"] = output.loss + output.balance_loss
    return output


def _narrow(config: Config, factor: int, layers: Sequence[int]) -> tuple[nn.ModuleList, int]:
    """Blocks like those of the given layers with plain residuals, `factor` times narrower, and their width: a multiple
    of the heads, even if rotated."""
    if config.share_layers:
        reason = "a side network has a block beside each layer, cut out of that layer's own"
        raise IncompatiblePeft(
            "ladder", "a model whose layers share blocks", reason, "use another method, or build with share_layers=0"
        )
    unit = config.heads * (2 if config.positions == "rotary" else 1)
    # at least 8: a norm over fewer leaves nothing to learn
    dim = max(-(-8 // unit), config.dim // factor // unit) * unit
    slim = dataclasses.replace(
        config, dim=dim, head_dim=dim // config.heads, mlp=max(1, config.mlp // factor), residual="plain",
        experts=0, router="switch", expert_every=1, embedding_dim=0,
        positions="rotary" if config.positions == "rotary" else "none",
    )  # fmt: skip
    shared: dict[str, Any] = {}
    specs = attention_specs(slim)
    blocks = nn.ModuleList(Transformer._block(slim, layer, specs[layer], shared) for layer in layers)
    blocks.apply(Transformer._initialise)
    for block in blocks:
        block.attn.core.initialise()  # type: ignore[union-attr, operator]
    return blocks, dim


def attention_specs(config: Config) -> list[Spec]:
    """One attention spec per layer."""
    given = config.attention
    if isinstance(given, (tuple, list)):
        if len(given) != config.layers:
            raise OptionError(f"{len(given)} attention specs for {config.layers} layers; give one, or one per layer")
        specs = [parse_one(spec) for spec in given]
        for layer, spec in enumerate(specs):
            first = config.first_layers[layer * config.blocks // config.layers]
            if spec != specs[first]:
                raise OptionError(
                    f"layers {first} and {layer} share a block, but have the attentions {specs[first]} and {spec}; "
                    "give both the same, or share "
                    "among fewer layers"
                )
        return specs
    return [parse_one(given)] * config.layers
