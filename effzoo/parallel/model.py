"""A transformer whose sequences are spread over ranks: every rank is given the whole batch, and computes its slice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from effzoo.architectures import Output, Transformer
from effzoo.architectures.embeddings import check_device, check_inputs, check_tensors, checked
from effzoo.architectures.heads import Classification, Features, LanguageModel, mean_cross_entropy
from effzoo.architectures.transformer import balanced
from effzoo.attention.core import AttentionCore, Mask
from effzoo.blocks.experts import Experts, balancing
from effzoo.blocks.experts import total as summed
from effzoo.checked import IGNORED
from effzoo.errors import IncompatibleError, InputError, listing
from effzoo.parallel.agreement import agree, of_inputs, of_model
from effzoo.parallel.experts import check, tokens_of_all
from effzoo.parallel.kinds import attention, multiple_of, sees_all
from effzoo.parallel.ranks import Group, Order, Planned, Split, all_reduced, total
from effzoo.routing.router import Shares
from effzoo.sites import HookContext, calling, sites, unwrap
from effzoo.sites.hooks import positionwise


class OverRanks:
    """model(**batch) with the positions spread over the ranks of a group, exact and at the cost of the attention kind.

        spread = OverRanks(model, group)
        spread(input_ids=ids, labels=labels).loss.backward()
        spread.sum_gradients()                               # then every rank takes the same optimizer step

    Rank r computes the positions of its slice: norms, feed-forwards and adapters need nothing of other ranks, attention
    what `effzoo.parallel.kinds` says. The model, and what the ranks give it, must be the same on all: before the first
    call they compare versions, adapters, options and hashes of all tensors, before each one those of the inputs.

    model: a Transformer without side network, with adapters that compute each position
        by itself (LoRA, Houlsby, IA3, BitFit, prefix, prompt, ...).
    group: None for all processes.
    order: of the positions, see `Split`; None: "zigzag" where every layer is full causal attention, so that each rank
        computes as many scores, and "contiguous" for others, which need their neighbours.

    Raises IncompatibleError for a model or an adapter that needs the whole sequence at one place, and on all ranks
    where one differs.
    """

    def __init__(self, model: nn.Module, group: Group | None = None, order: Order | None = None):
        inner = unwrap(model)
        if not isinstance(inner, Transformer):
            raise IncompatibleError(f"OverRanks spreads a Transformer of effzoo, got {type(inner).__name__}")
        balances = all(sees_all(core) and core.context.causal for core in inner.cores())
        if order == "zigzag" and not balances:
            raise IncompatibleError("order 'zigzag' is for models of full causal attention; use order='contiguous'")
        if inner.config.score_cap:
            raise IncompatibleError("capped scores are not computed over ranks; build the model with score_cap=0")
        if inner.config.angles_change_at is not None:
            raise IncompatibleError(
                "rotary angles that depend on the longest text of a batch (rotary_scaling of type dynamic or longrope) "
                "are not computed over ranks; build the model with another scaling, or with a max_length of at most "
                f"{inner.config.angles_change_at}"
            )
        self.model = inner
        self.order, self._balances, self._agreed = order, balances, False
        self.group: Group = cast(Group, dist.group.WORLD) if group is None else group

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None, global_attention_mask: Tensor | None = None, labels: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """loss, and logits and last_hidden_state of this rank's tokens; of a classifier the logits, on every rank.

        Arguments as those of the model, of the whole sequence. The loss is that of the whole batch; its backward pass
        gives this rank's share of each gradient. `output.positions` int[m]: of this rank's tokens in input_ids.
        """
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "global_attention_mask": global_attention_mask, "labels": labels,
        }  # fmt: skip
        self._agree(**given)
        own = vars(self.model)
        before = own.get("forward")
        own["forward"] = self._computed  # through the model, whose hooks bring split parameters together
        try:
            return cast(Output, self.model(**given))
        finally:
            own.pop("forward")
            if before is not None:
                own["forward"] = before

    def _computed(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, global_attention_mask: Tensor | None, labels: Tensor | None,
    ) -> Output:  # fmt: skip
        model, config = self.model, self.model.config
        self._check_adapters()
        for part in model.modules():
            if isinstance(part, Experts):
                check(part.router, model.training)
        prompt = model.embeddings.prompt()
        p = 0 if prompt is None else prompt.shape[-2]
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        check_inputs(config, p, 0, input_ids, None, **given, global_attention_mask=global_attention_mask)
        check_tensors(labels=labels)
        check_device(model, input_ids=input_ids)
        ids = cast(Tensor, checked(config, p, "input_ids", input_ids))
        batch, n = ids.shape
        split = self.split(p + n)
        if p > split.bounds[1]:
            raise InputError(f"{p} prompt tokens do not fit into the first rank's {split.bounds[1]}; use fewer ranks")
        tokens = Tokens(split, p)

        positions = checked(config, p, "position_ids", position_ids)
        if positions is None:
            positions = model.embeddings.positions(ids, batch, n, ids.device)
        elif config.causal and attention_mask is None and bool((positions.diff(dim=1) != 1).any()):
            raise IncompatibleError("packed documents are not computed over ranks; give each a row of its own")
        types = checked(config, p, "token_type_ids", token_type_ids)
        valid = model.valid_tokens(attention_mask)
        places = ids.new_empty(batch, p + n, 0)
        whole = model.mask_of(valid, global_attention_mask, places, p, 0, positions, None)
        offset = config.position_offset
        shifted = positions if tokens.prompt else torch.where(positions < offset, positions, positions + p)
        own = None if whole.valid is None else split.own(whole.valid)
        outside = HookContext(own, Mask(own))
        with calling(outside):
            x, own_positions = model.embeddings(
                tokens.own(ids), None, tokens.own(shifted.expand(batch, n)),
                None if types is None else tokens.own(types), prompt if tokens.prompt else None,
            )  # fmt: skip
        if prompt is not None and prompt.requires_grad and not x.requires_grad:
            x.requires_grad_()  # as on the first rank: gradients travel between all
        mask = Mask(
            own, None if whole.is_global is None else split.own(whole.is_global), own_positions, None, x,
            whole.decisions, most_globals=whole.most_globals, over_ranks=partial(_attention, split),
            tokens=tokens_of_all(split, whole.valid, batch, x.device) if config.experts else None,
        )  # fmt: skip
        losses: list[Tensor | Shares] = []
        with balancing(losses):
            x = model.run(x, mask, None)
        with calling(outside):
            if model.final_norm is not None:
                x = model.final_norm(x)
            output = self._head(x[:, tokens.prompt :], tokens, model.read_tokens(valid, ids), labels)
        return balanced(output, [cast(Any, _Shared).apply(loss, split.ranks) for loss in summed(losses)])

    def _agree(self, **inputs: Tensor | None) -> None:
        if self.group.size() == 1 or isinstance(self.group, Planned):
            return
        model, device = self.model, next(self.model.parameters()).device
        if not self._agreed:
            agree(of_model(model), self.group, device)
        how = {"training": model.training, "recompute": model.recompute, "order": self.order}
        agree(of_inputs({**inputs, **how}), self.group, device)
        self._agreed = True

    def split(self, n: int) -> Split:
        """How n positions, prompt tokens included, are spread. Raises InputError for fewer pieces than ranks need."""
        order = self.order
        if order is None:
            order = "zigzag" if self._balances and n >= 2 * self.group.size() else "contiguous"
        return Split.of(n, self.group, multiple_of_all(self.model), order)

    def _head(self, hidden: Tensor, tokens: Tokens, valid: Tensor | None, labels: Tensor | None) -> Output:
        head, token, split = self.model.head, self.model.embeddings.token, tokens.split
        if isinstance(head, Classification):
            pooled = self._pooled(head.before_pooling(hidden), tokens, valid, head.pools)
            output = head.of_pooled(pooled, labels)
            if output.loss is not None:
                output["loss"] = cast(Any, _Shared).apply(output.loss, split.ranks)
            return output
        if isinstance(head, Features) and head.pooler is not None:
            raise IncompatibleError("the pooler reads the first token, which one rank has; build with pooler=False")
        output = head(hidden, None if valid is None else tokens.own(valid), None, token)
        output["positions"] = tokens.positions(hidden.device)
        if labels is None:
            return output
        wanted = (hidden.shape[0], split.n - tokens.p)
        if labels.shape != wanted:
            raise InputError(f"labels are those of the whole sequence, {wanted}, got shape {tuple(labels.shape)}")
        if isinstance(head, LanguageModel) and head.causal:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        mine = tokens.own(labels)
        count = (labels != IGNORED).sum().clamp(min=1)
        share = mean_cross_entropy(output.logits, mine) * (mine != IGNORED).sum() / count
        return Output({"loss": cast(Any, _Shared).apply(total(share, split), split.ranks), **output})

    def _pooled(self, hidden: Tensor, tokens: Tokens, valid: Tensor | None, how: str) -> Tensor:
        """The first token, the mean over tokens, or the last token, [batch, dim], on every rank."""
        batch, n, split, index = len(hidden), tokens.split.n - tokens.p, tokens.split, tokens.positions(hidden.device)
        if how == "mean":
            every = torch.ones(batch, n, dtype=torch.bool, device=hidden.device) if valid is None else valid
            summed = total((hidden * tokens.own(every)[..., None]).sum(dim=1), split)
            return summed / every.sum(dim=1, keepdim=True).clamp(min=1).to(hidden.dtype)
        if how == "first":
            wanted = index.new_zeros(batch)
        else:
            last = torch.arange(n, device=hidden.device)
            wanted = last[-1].expand(batch) if valid is None else (valid * last).argmax(dim=1)
        here = (index == wanted[:, None]).to(hidden.dtype)
        return total((hidden * here[..., None]).sum(dim=1), split)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every trainable parameter the sum of the gradients of all ranks."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = all_reduced(grad, self.group)

    def _check_adapters(self) -> None:
        model = self.model
        if model.side.active:
            raise IncompatibleError("a side network sees the whole sequence; detach it, or use one rank")
        whole = {site.role for _, site in sites(model.blocks) for module in site.hung() if not positionwise(module)}
        if whole:
            raise IncompatibleError(
                f"adapters at {listing(sorted(whole))} read the whole sequence, of which a rank has a slice; use "
                "methods that compute each position by itself"
            )
        drawn = {site.role for _, site in sites(model) for m in site.hung() if getattr(m, "draws_weights", False)}
        if drawn and model.training:
            raise IncompatibleError(
                f"adapters at {listing(sorted(drawn))} draw their weights in each training pass, and every rank would "
                "draw others for the same sequence; train them with whole sequences"
            )


@dataclass(frozen=True)
class Tokens:
    """The tokens of the input that a rank holds, behind the p prompt tokens of the first.

    split: of the p prompt tokens and the n tokens together.
    """

    split: Split
    p: int

    @property
    def prompt(self) -> int:
        """Prompt tokens in front of this rank's tokens: p on the first rank, 0 on others."""
        return self.p if self.split.rank == 0 else 0

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [batch, n]."""
        return self.split.own(nn.functional.pad(x, (self.p, 0)) if self.p else x)[:, self.prompt :]

    def positions(self, device: torch.device) -> Tensor:
        """Their positions in the input, int[m]."""
        return self.split.positions(device)[self.prompt :] - self.p


def multiple_of_all(model: Transformer) -> int:
    """Slices have to be multiples of this for the attention of every layer."""
    return math.lcm(*(multiple_of(core) for core in model.cores()))


def _attention(split: Split, core: AttentionCore, *projected: Any, **given: Any) -> Tensor:
    return attention(core, split, *projected, **({"memory": None} | given))


class _Shared(torch.autograd.Function):
    """A loss that every rank has: each gives 1 / ranks of its gradient, so that their sum is that of the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.ranks, None
