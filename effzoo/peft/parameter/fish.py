"""FISH mask: training the entries with the largest Fisher information (Sung et al. 2021, arXiv:2111.09839)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Share
from effzoo.errors import IncompatiblePeft
from effzoo.peft.method import Batches, Layers, Modules, Targets, examples
from effzoo.peft.parameter.mask_scores import NETWORK, check_choice, count, has_values, top
from effzoo.peft.parameter.sparse_delta import SparseMethod, in_order, shared_entries
from effzoo.registry import peft
from effzoo.sharding import as_written, gathered
from effzoo.sites import Site, sites


@peft.register("fish", "fish_mask")
class Fish(SparseMethod):
    """theta' = theta + phi on the K entries with the largest Fisher information F; the rest is frozen.

        F = 1/N sum_i (d log p(y_i | x_i) / d theta)^2                        fisher = label
        F = 1/N sum_i sum_c p(c | x_i) (d log p(c | x_i) / d theta)^2         fisher = expected

    keep: K as a share of the targets' parameters, over all tensors together.
    fisher: "label" or "expected", as above; `expected` needs one label per example.
    samples: N, how many labelled examples are used, one backward pass each (C for `expected`), because the square of a
        batch's gradient is another thing.

    The entries are chosen once, before training; until `calibrate` they are random ones. log p(y | x) is minus the loss
    of the one example: in tasks with many labels the mean over them. The paper counts the classifier in K; here it is
    trained in addition, as in every method. Weight decay pulls towards theta.

    Where the base is split over processes, each holds all of it, and F, while the entries are chosen.

    Only phi [K] is trained, but the backward pass makes the dense gradient of one weight at a time, and the changed
    weights are stored until then.
    """

    paper = "Sung et al. 2021, Training neural networks with fixed sparse masks, arXiv:2111.09839, section 3"
    default_targets = NETWORK
    size = "keep"
    learning_rate = 1e-3

    def __init__(
        self,
        *,
        keep: Share = 0.005,
        fisher: str = "label",
        samples: Count = 1024,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.keep = keep
        self.fisher = check_choice("fish", "fisher", fisher, ("label", "expected"))
        self.samples = samples

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        super().prepare(model, found)
        total = self.entries.total
        if total:
            k = count(self.keep, total)
            like = next(p for site in found.values() for p in site.base().values())
            numbers = drawn(total, k) if has_values(like) else torch.arange(k, device=like.device)
            self.entries.choose(numbers.to(like.device), torch.zeros(k, device=like.device, dtype=like.dtype))

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        with gathered(model), as_written(model):  # gradients of whole tensors
            self._choose(model, modules, batches)

    def _choose(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        chosen, known = shared_entries(modules), dict(sites(model))
        tensors = [tensor for path in in_order(modules) for tensor in known[path].base().values()]
        information = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
        ]
        before = [tensor.requires_grad for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.requires_grad_(True)
            for done, example in enumerate(examples(batches)):
                if done == self.samples:
                    break
                for share, log_likelihood in self._likelihoods(model, example):
                    gradients = torch.autograd.grad(log_likelihood, tensors, allow_unused=True)
                    for total, gradient in zip(information, gradients, strict=True):
                        if gradient is not None:
                            total.addcmul_(gradient.to(total), gradient.to(total), value=share)
        finally:
            for tensor, flag in zip(tensors, before, strict=True):
                tensor.requires_grad_(flag)
        assert chosen.values is not None
        k = chosen.values.numel()
        chosen.choose(top(information, k), chosen.values.new_zeros(k))

    def _likelihoods(self, model: nn.Module, example: Mapping[str, Any]) -> Iterator[tuple[float, Tensor]]:
        """Log-likelihoods of one example, each with its weight in the sum of squares."""
        if self.fisher == "label":
            yield 1.0, -model(**example).loss
            return
        with torch.no_grad():
            logits = model(**example).logits
        if logits.ndim != 2 or logits.shape[-1] < 2:
            raise IncompatiblePeft(
                "fish[fisher=expected]", f"logits of shape {tuple(logits.shape)}",
                "the expectation runs over the labels of a whole example",
                "take fisher=label, or a classification task",
            )  # fmt: skip
        for label, p in enumerate(logits[0].softmax(dim=-1).tolist()):
            yield p, model(**example).logits[0].log_softmax(dim=-1)[label]


def drawn(total: int, k: int) -> Tensor:
    """k different numbers below total at random, ascending; where k is small, without a permutation of all of them."""
    if k * 4 > total:
        return torch.randperm(total, device="cpu")[:k].sort().values
    numbers = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(numbers) < k:
        numbers = torch.cat([numbers, torch.randint(total, (2 * k,), device="cpu")]).sort().values
        numbers = numbers[torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), numbers[1:] != numbers[:-1]])]
    return numbers[torch.randperm(len(numbers), device="cpu")[:k]].sort().values
