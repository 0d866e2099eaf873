"""The transformer, encoder or decoder: embeddings, a stack of blocks, a head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effzoo.architectures.config import Config
from effzoo.architectures.embeddings import Embeddings, check_device, check_inputs, check_tensors, checked
from effzoo.architectures.function import function_of
from effzoo.architectures.heads import Classification, head, labels_of, note_problem
from effzoo.architectures.inside import weights_of
from effzoo.architectures.output import Output
from effzoo.architectures.packing import Documents, Rows, check_packed, documents_by_id, documents_of, warn_of_documents
from effzoo.architectures.relative import RelativePositions
from effzoo.architectures.sharing import turns
from effzoo.attention.core import AttentionCore, Cache, Context, Mask, Source
from effzoo.attention.predicate import PredicateAttention
from effzoo.blocks.block import Block
from effzoo.blocks.experts import Experts, balancing, total
from effzoo.blocks.feedforward import FeedForward
from effzoo.blocks.reversible import reversible, states, two_streams
from effzoo.checked import known, marks
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, IncompatiblePeft, InputError, OptionError
from effzoo.recompute import Recomputing, recompute
from effzoo.routing.router import Shares
from effzoo.sharding import is_unit
from effzoo.sites import HookContext, Linear, Model, Side, Site, calling
from effzoo.sites.hooks import positionwise
from effzoo.spec import Spec, parse_one


@dataclass(frozen=True)
class Stack:
    """What a transformer is inside an encoder-decoder.

    first: the number of its first layer.
    layers: those of both stacks.
    reads: whether it is the decoder, which has cross-attention and is given the embeddings of its tokens.
    relative: buckets and distance of `RelativePositions`; None without them.
    slots: fields of `Slots` that `Config` does not have.
    dropout: of the states at the end.
    """

    first: int
    layers: int
    reads: bool = False
    relative: tuple[int, int] | None = None
    slots: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0


class Transformer(Recomputing, Model):
    """An encoder (bidirectional) or a decoder (causal) with the head of a task; everything in `config` is data.

    Weights start as in BERT and GPT-2: normal with standard deviation 0.02, biases 0; decoders scale the projections
    that end a residual branch by 1 / sqrt(2 layers) (Radford et al. 2019, section 2.3).

    stack: its place in an encoder-decoder; None for a transformer of its own.
    """

    shows_mask = True  # the hooks at its sites are given the mask of the batch

    def __init__(self, config: Config, task: str = "features", num_labels: int = 2, *, stack: Stack | None = None):
        super().__init__()
        config = dataclasses.replace(config)  # trainers set tokens of it, which are those of this model
        self.config, self.task, self.own_labels = config, task, num_labels
        self.stack = stack
        self.reads = stack is not None and stack.reads
        self.relative: RelativePositions | None = None
        if stack is not None and stack.relative is not None:
            self.relative = RelativePositions(config.heads, *stack.relative, causal=config.causal)
        self.embeddings = Embeddings(config, tokens=not self.reads)
        shared: dict[str, Any] = {}
        specs = attention_specs(config)
        self.blocks = nn.ModuleList(
            self._block(config, number, specs[layer], shared, stack) for number, layer in enumerate(config.first_layers)
        )
        self.final_norm = config.slots().make_norm(config.width, "final.norm") if config.norm != "post" else None
        # a side network runs beside one stack, and a decoder's would have nothing to read
        side = Side(config.width, config.layers, partial(_narrow, config)) if stack is None else None
        self.side = cast(Side, side)
        self.head = head(config, task, num_labels)
        self.end_dropout = nn.Dropout(stack.dropout) if stack is not None and stack.dropout else None
        # of the last block, the positions that a classification head reads; then no last_hidden_state
        self.only_what_is_read = False
        self.headless = False
        self.source: Source | None = None
        self.apply(self._initialise)
        for core in self.cores():
            core.initialise()
            if self.relative is not None and not core.adds_scores:
                raise IncompatibleError(
                    f"attention {core.name!r} adds no bias by distance to its scores, as relative positions do: it "
                    "mixes or orders its keys, or has no scores; use 'full', 'longformer' or 'local'"
                )
        for block in cast("Sequence[Block]", self.blocks) if config.causal and stack is None else ():
            ends = [part.down for part in block.mlp.modules() if isinstance(part, FeedForward)]
            for linear in (cast(Linear, block.attn.o), *ends):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _block(config: Config, number: int, spec: Spec, shared: dict[str, Any], stack: Stack | None = None) -> Block:
        stack = stack or Stack(0, config.blocks)
        context = Context(
            heads=config.heads,
            head_dim=config.head_dim or config.dim // config.heads,
            causal=config.causal,
            dropout=config.dropped_weights(config.first_layers[number]),
            layer=stack.first + number,
            layers=stack.layers,
            max_length=config.max_length,
            backend=config.backend,
            shared=shared,
            score_cap=config.score_cap,
        )
        slots = dataclasses.replace(config.slots(config.first_layers[number]), reads=stack.reads, **stack.slots)
        block = Block(slots, spec, context)
        if config.residual == "reversible":
            block.stream = None  # there are two
        if config.residual == "reversible" and isinstance(block.mlp, Experts) and block.mlp.router.weighted:
            raise IncompatibleError(
                f"router {config.router!r} adds a loss, and a reversible residual keeps no graph that would lead "
                "back from it; use residual='plain', or a router without a loss ('base', 'soft', 'gumbel', "
                "or 'switch[balance=0]')"
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
        document_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """head(blocks(embeddings(input))): an Output with loss, logits and last_hidden_state [batch, n, dim].

        input_ids int[batch, n]: the tokens.
        attention_mask [batch, n]: 1 for tokens, 0 for padding; with a cache it covers the positions in it, too.
        token_type_ids int[batch, n]: which text a token belongs to; 0 when not given.
        position_ids int[batch or 1, n]: 0, 1, 2, ... when not given. Where they do not go on by 1 in a decoder, another
            document starts, which is computed as it is alone; beside an attention_mask they are positions only, as in
            transformers.
        inputs_embeds [batch, n, dim]: embeddings of tokens instead of input_ids.
        global_attention_mask [batch, n]: 1 for tokens with global attention, for kinds that have it; when not given,
            the first token of an encoder with a classification head.
        labels: int[batch] for classes (float for one label), int[batch, n] for tokens,
            int[batch, 2] for the first and the last token of an answer; -100 does not count.
        cache: of a decoder that generates; the input is what follows the positions in it.
        task_ids int[batch]: the task of each example, for adapters that are routed by it.
        document_ids int[batch, n]: which document of its row a token belongs to, 1, 2, ...; 0 is padding. Each document
            is computed as it is alone, its positions start again, and its first label has to be -100 in a decoder
            (`effzoo.data.pack` makes such rows).
        output_hidden_states: also `hidden_states`, what goes into each block [batch, n, width], and last_hidden_state.
        output_attentions: also `attentions`, of each layer the weights [batch, heads, n, n] of the definition, in
            O(n^2), where the kind has a weight for each token (rows of memory and prompt stand in front).

        A classifier with pooling="last" reads the last token of the mask; in a decoder with a `pad_token`, the last one
        whose id is another. Padding at the front takes positions: pad at the end, or give position_ids and use a kind
        that is `shift_invariant` (full, longformer, lsh). `effzoo.generate` does so for every kind.

        Raises InputError for shapes, dtypes, lengths and ids that do not fit, IncompatibleError for an encoder's cache.
        """
        if self.reads and self.source is None:
            raise InputError("the decoder of an encoder-decoder reads a source; call the whole model")
        start, cached_prompt = self._start(cache)
        prompt = self.embeddings.prompt() if start == 0 else None
        prompt_length = 0 if prompt is None else prompt.shape[-2]
        in_front = prompt_length + cached_prompt
        check_inputs(
            self.config, in_front, start - cached_prompt, input_ids, inputs_embeds, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, global_attention_mask=global_attention_mask,
            document_ids=document_ids,
        )  # fmt: skip
        check_tensors(labels=labels, task_ids=task_ids)
        check_device(self, input_ids=input_ids, inputs_embeds=inputs_embeds, task_ids=task_ids)
        input_ids = checked(self.config, in_front, "input_ids", input_ids)
        token_type_ids = checked(self.config, in_front, "token_type_ids", token_type_ids)
        position_ids = checked(self.config, in_front, "position_ids", position_ids)
        valid = self.valid_tokens(attention_mask)
        position_ids, documents = self._documents(position_ids, attention_mask, input_ids, inputs_embeds)
        if document_ids is not None:
            inside, documents = documents_by_id(document_ids)
            valid = self.valid_tokens(inside if valid is None else inside & valid)
        if documents is not None:
            check_packed(self.cores(), self.task, cache is not None, document_ids is not None)
            self._check_angles(documents)
        rows, like = self._layout(documents, prompt_length)
        if documents is not None and like is not None and position_ids is None:
            position_ids = self._positions(documents, input_ids)
        if rows is not None:
            (group,) = rows.groups
            given = input_ids, inputs_embeds, token_type_ids, position_ids, valid, global_attention_mask
            input_ids, inputs_embeds, token_type_ids, position_ids, valid, global_attention_mask = (
                None if x is None else group.split(x.expand(rows.shape[0], *x.shape[1:])) for x in given
            )
            valid = group.valid if valid is None else group.valid & valid
            task_ids = None if task_ids is None else task_ids[group.row]
        position_ids = None if position_ids is None else position_ids + cached_prompt

        with_prompt = None if valid is None else nn.functional.pad(valid, (prompt_length, 0), value=True)
        outside = HookContext(with_prompt, Mask(with_prompt, tasks=task_ids))
        with calling(outside):
            x, positions = self.embeddings(input_ids, inputs_embeds, position_ids, token_type_ids, prompt, start)
        positions = positions if cache is None else self._turned_alike(cache, positions)
        mask = self.mask_of(valid, global_attention_mask, x, prompt_length, cached_prompt, positions, task_ids)
        mask = dataclasses.replace(mask, ids=_text(input_ids, prompt_length, cache), documents=like)
        if self.source is not None:
            mask = dataclasses.replace(mask, source=self.source)
        if self.relative is not None:
            with calling(outside):
                mask = dataclasses.replace(mask, scores=self.relative(start + x.shape[1]))
        if valid is not None:
            valid = valid[:, -(x.shape[1] - prompt_length) :]
        valid = self.read_tokens(valid, input_ids)
        wanted = self._read(x[:, prompt_length:], valid, prompt_length) if cache is None else None
        losses: list[Tensor | Shares] = []
        seen: list[Tensor] | None = None
        if output_hidden_states or output_attentions:
            self._check_inside(cache, rows is not None or like is not None)
            seen, wanted = [], None
        shown = weights_of(self.cores() if output_attentions else ())
        with balancing(losses) if self.config.experts else nullcontext(), shown as attentions:
            x = self.run(x, mask, cache, wanted, seen)
        if cache is not None:
            cache.length, cache.prompt_tokens = start + x.shape[1], in_front
            cache.ids = cache.ids if mask.ids is None else mask.ids
        with calling(outside):
            if self.final_norm is not None:
                x = self.final_norm(x)
            if self.end_dropout is not None:
                x = self.end_dropout(x)
            if wanted is None:
                # the decoder behind an encoder reads the states of the prompt, too
                x = x if self.stack is not None else x[:, prompt_length:]
                x = x if rows is None else rows.join([x])
                output = self._headed(x, valid, labels)
            else:
                output = self._headed(x, None, labels)
                del output["last_hidden_state"]
        if output_hidden_states and seen is not None:
            between = [state[:, prompt_length:] for state in seen[:-1]]
            output["hidden_states"] = (*between, output["last_hidden_state"])
        if output_attentions:
            output["attentions"] = tuple(attentions)
        return balanced(output, total(losses))

    def _headed(self, x: Tensor, valid: Tensor | None, labels: Tensor | None) -> Output:
        if self.headless:
            return Output.of(last_hidden_state=x)
        output = cast(Output, self.head(x, valid, labels, self.embeddings.token))
        if labels is not None:
            note_problem(self, labels)
        return output

    @contextmanager
    def without_head(self) -> Iterator[None]:
        """Inside, the output has last_hidden_state and nothing that the head computes."""
        self.headless = True
        try:
            yield
        finally:
            self.headless = False

    @contextmanager
    def reading(self, source: Source) -> Iterator[None]:
        """Inside, the cross-attention of a decoder reads this source."""
        self.source = source
        try:
            yield
        finally:
            self.source = None

    def _check_inside(self, cache: Cache | None, packed: bool) -> None:
        """Raise where hidden states and weights cannot be shown."""
        if cache is not None or packed:
            why = "packed documents" if packed else "a cache"
            raise IncompatibleError(
                f"hidden states and attention weights are shown of whole rows, not with {why}; call the model on the "
                "text alone"
            )
        if self.beside:
            raise IncompatibleError(
                "a side network computes the output beside the blocks; deactivate it to see the blocks' hidden states"
            )

    def _layout(self, documents: Documents | None, prompt_length: int) -> tuple[Rows | None, Rows | None]:
        """The rows that documents become before the embeddings, or else in attention alone, where nothing more reads
        whole rows."""
        if documents is None:
            return None, None
        outside = [part for part in (self.embeddings, self.final_norm) if part is not None]
        sites = [site for part in outside for site in part.modules() if isinstance(site, Site)]
        alone = all(positionwise(module) for site in sites for module in site.hung())
        if prompt_length or not alone or not all(block.apart for block in cast("Sequence[Block]", self.blocks)):
            return documents.rows, None
        return None, documents.like

    def _positions(self, documents: Documents, ids: Tensor | None) -> Tensor:
        """The positions that tokens have when their document stands alone, [batch, n]."""
        (group,) = documents.rows.groups
        own = None if ids is None else group.split(ids)
        positions = self.embeddings.positions(own, len(group.index), group.index.shape[1], group.index.device)
        return documents.rows.join([positions[..., None]])[..., 0]

    def _check_angles(self, documents: Documents) -> None:
        """Refuse documents that are not turned as they are alone, as one in the batch is long (dynamic, longrope)."""
        at, longest = self.config.angles_change_at, int(documents.lengths.max())
        if at is not None and longest > at:
            raise InputError(
                f"a document of {longest} positions makes all of them turn by other angles, as rotary_scaling says for "
                f"texts of more than {at}, so shorter ones would not be computed as they are alone; give each document "
                "a batch of its own"
            )

    def _turned_alike(self, cache: Cache, positions: Tensor) -> Tensor:
        """The positions, once keys in the cache are turned as those of a text of the present length are (longrope)."""
        at = self.config.keys_change_at
        if at is None:
            return positions
        beyond = positions.max() >= at
        if cache.beyond is not None:
            positions = known(
                positions, beyond == cache.beyond,
                f"the text passes {at} positions, where rotary_scaling turns all keys by other angles, and those in "
                "the cache are turned by the former; start a new cache with the whole text",
            )  # fmt: skip
        cache.beyond = beyond
        return positions

    def _start(self, cache: Cache | None) -> tuple[int, int]:
        """How many positions the cache holds, and how many of them are prompt tokens."""
        if cache is None:
            return 0, 0
        if not self.config.causal:
            raise IncompatibleError(
                f"{self.config.name} is an encoder: every position sees the later ones, so there is nothing to cache"
            )
        if not isinstance(cache, Cache):
            raise InputError(f"cache is an effzoo.attention.Cache, got {type(cache).__name__}")
        return cache.length, cache.prompt_tokens if cache.length else 0

    def _documents(
        self, position_ids: Tensor | None, attention_mask: Tensor | None, ids: Tensor | None, embeds: Tensor | None
    ) -> tuple[Tensor | None, Documents | None]:
        """The position ids, and the documents that they pack into the rows of a decoder's batch, if they do."""
        if position_ids is None or not self.config.causal:
            return position_ids, None
        if attention_mask is None:
            given = cast(Tensor, embeds if ids is None else ids)
            return documents_of(position_ids, len(given))
        warn_of_documents(position_ids, attention_mask[:, -position_ids.shape[1] :].bool())
        return position_ids, None

    def read_tokens(self, valid: Tensor | None, ids: Tensor | None) -> Tensor | None:
        """The positions that the head may read, bool[batch, n], or None for all.

        A decoder's classifier that reads the last token reads the last whose id is not `pad_token`, with a mask or not,
        as in transformers: where eos is the padding, a text is read before its eos.
        """
        pad = self.config.pad_token
        reads_last = isinstance(self.head, Classification) and self.config.pooling == "last" and self.config.causal
        if not reads_last or ids is None or pad is None:
            return valid
        return ids != pad if valid is None else valid & (ids != pad)

    def _read(self, x: Tensor, valid: Tensor | None, prompt_length: int) -> Tensor | None:
        """The positions whose output the head reads, after the prompt's; None where the last block computes all."""
        last = cast(Block, self.blocks[-1])
        plain = self.config.residual != "reversible" and not self.beside
        if not (
            self.only_what_is_read
            and not self.headless
            and isinstance(self.head, Classification)
            and plain
            and last.positionwise
        ):
            return None
        where = self.head.reads(x, valid)
        return None if where is None else where + prompt_length

    def run(
        self, x: Tensor, mask: Mask, cache: Cache | None, wanted: Tensor | None = None, seen: list[Tensor] | None = None
    ) -> Tensor:
        """The output of the last block, at the wanted positions only where some are named.

        seen: gets the hidden states before, between and after the blocks, which are all stored then.

        Reversible blocks compute their inputs again in the backward pass, whatever `recompute` says.
        """
        if seen is not None:
            seen.extend(self._states(x, mask))
            return seen[-1]
        blocks = self.by_layer()
        if self.beside:
            if cache is not None:
                raise IncompatibleError(
                    "a side network keeps no cache for decoding; generate without one (use_cache=False)"
                )
            return self.side(self._states(x, mask), mask)
        if self.config.residual == "reversible":
            return reversible(blocks, x, mask) if cache is None else two_streams(blocks, x, mask, cache)
        level = self.recompute if self.training and cache is None else "nothing"
        with recompute(level, copied=is_unit(self)):
            for i, block in enumerate(blocks):
                where = wanted if i == len(blocks) - 1 else None
                if level == "blocks":
                    x = checkpoint(block, x, mask, None, where, use_reentrant=False)
                else:
                    x = block(x, mask, cache, where)
        return x

    def _states(self, x: Tensor, mask: Mask) -> list[Tensor]:
        """The hidden states before, between and after the blocks."""
        blocks = self.by_layer()
        if self.config.residual == "reversible":
            return states(blocks, x, mask)
        hidden = [x]
        for block in blocks:
            hidden.append(block(hidden[-1], mask))
        return hidden

    @property
    def beside(self) -> bool:
        """Whether a side network computes the output in place of the blocks."""
        return self.side is not None and bool(self.side.active) and self.side.replaces

    def by_layer(self) -> Sequence[Block]:
        """The block of each layer; where layers share one, turns of it."""
        blocks = cast("Sequence[Block]", self.blocks)
        if len(blocks) != self.config.blocks:
            raise IncompatibleError(
                f"the model has {len(blocks)} blocks and its config {self.config.blocks}; build one with "
                f"layers={len(blocks)} and load the weights"
            )
        if len(blocks) == self.config.layers:
            return blocks
        return cast("Sequence[Block]", turns(blocks, self.config.layers))

    def cores(self) -> Iterable[AttentionCore]:
        """The attention core of each block."""
        return (block.attn.core for block in cast("Sequence[Block]", self.blocks))

    def valid_tokens(self, attention_mask: Tensor | None) -> Tensor | None:
        """bool[batch, n], or None when every position holds a token, which lets attention run without a mask."""
        if attention_mask is None:
            return None
        valid = marks(attention_mask, "attention_mask")
        return None if at_hand(valid) and bool(valid.all()) else valid

    def mask_of(
        self, valid: Tensor | None, is_global: Tensor | None, x: Tensor, prompt_length: int, cached_prompt: int,
        positions: Tensor, tasks: Tensor | None,
    ) -> Mask:  # fmt: skip
        """The mask of the blocks.

        Prompt tokens are global where attention knows global tokens: else only the tokens near them would see them.
        """
        batch, n = x.shape[0], x.shape[1] - prompt_length
        cores = list(self.cores())
        knows_global = any(core.knows_globals() for core in cores)
        if is_global is not None and not knows_global:
            cores[0].check(Mask(is_global=is_global))
        given, marked = is_global is not None, 0  # marked: how many tokens of an example, at most
        first = not given and knows_global and self.task == "classification" and not self.config.causal
        if given:
            marked = max([0, *(core.max_globals for core in cores if isinstance(core, PredicateAttention))])
        elif first and any(core.for_globals() for core in cores):
            is_global, marked = (torch.arange(n, device=x.device) == 0).expand(batch, n), 1
        elif knows_global and prompt_length:
            is_global = torch.zeros(batch, n, device=x.device)
        most = None if given and at_hand(x) else prompt_length + marked
        if is_global is not None:
            is_global = nn.functional.pad(marks(is_global, "global_attention_mask"), (prompt_length, 0), value=True)
        if valid is not None:
            valid = nn.functional.pad(valid, (prompt_length + cached_prompt, 0), value=True)
            is_global = None if is_global is None else is_global & valid[:, -x.shape[1] :]
        if is_global is not None and at_hand(is_global) and not bool(is_global.any()):
            is_global = None
        again = self.config.residual == "reversible" or self.recompute == "blocks"
        decisions: dict[Any, Any] | None = {} if again and torch.is_grad_enabled() else None
        return Mask(valid, is_global, positions, tasks, x, decisions, most_globals=most)


def _text(ids: Tensor | None, prompt_length: int, cache: Cache | None) -> Tensor | None:
    """The tokens of the cache and of this call, -1 where there is none; None where the call has embeddings."""
    if ids is None:
        return None
    ids = nn.functional.pad(ids, (prompt_length, 0), value=-1)
    if cache is None or cache.length == 0:
        return ids
    before = ids[:, :0] if cache.ids is None else cache.ids
    return torch.cat([nn.functional.pad(before, (0, cache.length - before.shape[1]), value=-1), ids], dim=1)


def balanced(output: Output, losses: Sequence[Tensor]) -> Output:
    """The output with the losses that balance experts, if there are any."""
    if losses:
        output["balance_loss"] = torch.stack(list(losses)).sum()
        if output.loss is not None:
            output["loss"] = output.loss + output.balance_loss
    return output


def _narrow(config: Config, factor: int, layers: Sequence[int]) -> tuple[nn.ModuleList, int]:
    """Blocks like those of the given layers, `factor` times narrower and with plain residuals; and their width."""
    if config.share_layers:
        reason = "a side network has a block beside each layer, cut out of that layer's own"
        raise IncompatiblePeft(
            "ladder", "a model whose layers share blocks", reason, "use another method, or build with share_layers=0"
        )
    unit = config.heads * (2 if config.positions == "rotary" else 1)
    # at least 8: a norm over fewer leaves nothing to learn
    dim = max(-(-8 // unit), config.dim // factor // unit) * unit
    fraction, scaling = config.rotary_fraction, config.rotary_scaling
    every = fraction if isinstance(fraction, tuple) else (fraction,) * config.layers
    if config.angles_change_at is not None or isinstance(scaling, tuple):  # numbers for heads as wide as the model's
        scaling = None
    slim = dataclasses.replace(
        config, dim=dim, head_dim=dim // config.heads, mlp=max(1, config.mlp // factor), residual="plain",
        experts=0, router="switch", expert_every=1, expert_mlp=0, embedding_dim=0,
        positions="rotary" if config.positions == "rotary" else "none",
        score_dim=0.0, rotary_fraction=tuple(float(share > 0) for share in every), rotary_scaling=scaling,
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
