"""A transformer whose sequences are spread over ranks: every rank is given the whole batch, and computes its slice."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from effzoo.architectures import Output, Transformer
from effzoo.architectures.embeddings import check_device, check_inputs, check_tensors, checked
from effzoo.architectures.heads import Classification, Features, LanguageModel, mean_cross_entropy
from effzoo.attention.core import AttentionCore, Mask
from effzoo.checked import IGNORED
from effzoo.errors import IncompatibleError, InputError, listing
from effzoo.parallel.kinds import attention, multiple_of
from effzoo.parallel.ranks import Split, all_reduced, total
from effzoo.sites import HookContext, calling, sites, unwrap
from effzoo.sites.hooks import positionwise

Group = dist.ProcessGroup


class OverRanks:
    """model(**batch) with the positions spread over the ranks of a group, exact and at the cost of the attention kind.

        spread = OverRanks(model, group)
        spread(input_ids=ids, labels=labels).loss.backward()
        spread.sum_gradients()                               # then every rank takes the same optimizer step

    Rank r computes the positions of its slice: norms, feed-forwards and adapters need nothing of other ranks, attention
    what `effzoo.parallel.kinds` says. The model, and what the ranks give it, must be the same on all.

    model: a Transformer without experts, reversible residual or side network, with adapters that compute each position
        by itself (LoRA, Houlsby, IA3, BitFit, prefix, prompt, ...).
    group: None for all processes.

    Raises IncompatibleError for a model or an adapter that needs the whole sequence at one place.
    """

    def __init__(self, model: nn.Module, group: Group | None = None):
        inner = unwrap(model)
        if not isinstance(inner, Transformer):
            raise IncompatibleError(f"OverRanks spreads a Transformer of effzoo, got {type(inner).__name__}")
        if inner.config.experts or inner.config.residual == "reversible":
            what = "experts" if inner.config.experts else "a reversible residual"
            raise IncompatibleError(f"a model with {what} is not computed over ranks; use another, or one rank")
        self.model = inner
        self.group: Group = cast(Group, dist.group.WORLD) if group is None else group

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None, global_attention_mask: Tensor | None = None, labels: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """loss, and logits and last_hidden_state of this rank's positions; of a classifier the logits, on every rank.

        Arguments as those of the model, of the whole sequence. The loss is that of the whole batch; its backward pass
        gives this rank's share of each gradient.
        """
        model, config = self.model, self.model.config
        self._check_adapters()
        prompt = model.embeddings.prompt()
        p = 0 if prompt is None else prompt.shape[-2]
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        check_inputs(config, p, 0, input_ids, None, **given, global_attention_mask=global_attention_mask)
        check_tensors(labels=labels)
        check_device(model, input_ids=input_ids)
        ids = cast(Tensor, checked(config, p, "input_ids", input_ids))
        batch, n = ids.shape
        split = Split.of(p + n, self.group, multiple_of_all(model))
        first, end = split.range()
        if p > split.bounds[1]:
            raise InputError(f"{p} prompt tokens do not fit into the first rank's {split.bounds[1]}; use fewer ranks")
        tokens = slice(max(0, first - p), end - p)  # of the ids; the prompt is in front, on the first rank

        positions = checked(config, p, "position_ids", position_ids)
        if positions is None:
            positions = model.embeddings.positions(ids, batch, n, ids.device)
        elif config.causal and attention_mask is None and bool((positions.diff(dim=1) != 1).any()):
            raise IncompatibleError("packed documents are not computed over ranks; give each a row of its own")
        types = checked(config, p, "token_type_ids", token_type_ids)
        valid = model.valid_tokens(attention_mask)
        places = ids.new_empty(batch, p + n, 0)
        whole = model.mask_of(valid, global_attention_mask, places, p, 0, positions, None)
        shifted = positions if first == 0 else positions + p
        own = None if whole.valid is None else split.own(whole.valid)
        outside = HookContext(own, Mask(own))
        with calling(outside):
            x, own_positions = model.embeddings(
                ids[:, tokens], None, shifted.expand(batch, n)[:, tokens], None if types is None else types[:, tokens],
                prompt if first == 0 else None,
            )  # fmt: skip
        if prompt is not None and prompt.requires_grad and not x.requires_grad:
            x.requires_grad_()  # as on the first rank: gradients travel between all
        again = model.recompute == "blocks" and torch.is_grad_enabled()
        mask = Mask(
            own, None if whole.is_global is None else split.own(whole.is_global), own_positions, None, x,
            {} if again else None, most_globals=whole.most_globals, over_ranks=partial(_attention, split),
        )  # fmt: skip
        x = model.run(x, mask, None)
        with calling(outside):
            if model.final_norm is not None:
                x = model.final_norm(x)
            hidden = x[:, max(0, p - first) :]
            return self._head(hidden, split, p, model.read_tokens(valid, ids), labels)

    def _head(self, hidden: Tensor, split: Split, p: int, valid: Tensor | None, labels: Tensor | None) -> Output:
        head, token = self.model.head, self.model.embeddings.token
        first, end = split.range()
        own = slice(max(0, first - p), end - p)
        ranks = split.ranks
        if isinstance(head, Classification):
            pooled = self._pooled(hidden, split, p, own, valid, head.pooling)
            output: Output = head(pooled[:, None], None, labels, token)
            del output["last_hidden_state"]
            if output.loss is not None:
                output["loss"] = cast(Any, _Shared).apply(output.loss, ranks)
            return output
        if isinstance(head, Features) and head.pooler is not None:
            raise IncompatibleError("the pooler reads the first token, which one rank has; build with pooler=False")
        output = head(hidden, None if valid is None else valid[:, own], None, token)
        if labels is None:
            return output
        if labels.shape != (hidden.shape[0], split.n - p):
            wanted = (hidden.shape[0], split.n - p)
            raise InputError(f"labels are those of the whole sequence, {wanted}, got shape {tuple(labels.shape)}")
        if isinstance(head, LanguageModel) and head.causal:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        mine = labels[:, own]
        count = (labels != IGNORED).sum().clamp(min=1)
        share = mean_cross_entropy(output.logits, mine) * (mine != IGNORED).sum() / count
        loss = cast(Any, _Shared).apply(total(share, split), ranks)
        return Output.of(loss=loss, **output)

    def _pooled(self, hidden: Tensor, split: Split, p: int, own: slice, valid: Tensor | None, how: str) -> Tensor:
        """The first token, the mean over tokens, or the last token, [batch, dim], on every rank."""
        batch, n = len(hidden), split.n - p
        index = torch.arange(own.start, own.stop, device=hidden.device)
        if how == "mean":
            every = torch.ones(batch, n, dtype=torch.bool, device=hidden.device) if valid is None else valid
            summed = total((hidden * every[:, own, None]).sum(dim=1), split)
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
