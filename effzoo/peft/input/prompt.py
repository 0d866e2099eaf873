"""Prompt tuning: trained embeddings in front of the input (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Whole
from effzoo.errors import OptionError
from effzoo.peft.method import Method
from effzoo.registry import peft
from effzoo.sites import Embedding, PeftModule, Site


class PromptTokens(PeftModule):
    """Trained prompt tokens [length, dim] that stand before every input."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = nn.Parameter(tokens.detach().clone())

    def prompt(self) -> Tensor:
        return self.tokens


class ReparametrisedPrompt(PeftModule):
    """Prompt tokens [length, dim] that a small network makes in training; `drop_network` keeps the tokens alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: nn.Module | None = network
        self.register_parameter("tokens", None)

    def prompt(self) -> Tensor:
        tokens: Tensor = self.tokens if self.network is None else self.network()
        return tokens

    def drop_network(self) -> None:
        """Keep the prompt tokens, drop the network that made them."""
        if self.network is None:
            return
        trainable = any(parameter.requires_grad for parameter in self.network.parameters())
        tokens = self.prompt().detach().clone()
        self.network, self.tokens = None, nn.Parameter(tokens, requires_grad=trainable)


def vocabulary_embeddings(site: Embedding, length: int) -> Tensor:
    """The embeddings of tokens drawn at random, [length, dim]."""
    return site.weight.detach()[torch.randint(site.num_embeddings, (length,), device=site.weight.device)]


@peft.register("prompt", "prompt_tuning")
class Prompt(Method):
    """f([P, x]): `length` prompt tokens P [length, dim] are put in front of the embedded tokens.

    length: of the prompt, which counts towards max_length.
    init: "vocabulary" copies the embeddings of tokens drawn at random (much better than random numbers, section 3.2),
        "text" those of given tokens, "normal" draws with the standard deviation of the table.
    ids: the tokens of "text", repeated or cut to the length (a description of the task, or the names of its classes).

    The prompt takes the first positions and the tokens follow, as in the `peft` package; its outputs are cut off, so
    shapes outside do not change. In attention with global tokens the prompt is global, or distant tokens could not see
    it. The paper's learning rate is 0.3, for Adafactor, which scales steps by the size of the parameter; AdamW needs
    less.
    """

    paper = "Lester et al. 2021, The power of scale for parameter-efficient prompt tuning, arXiv:2104.08691, section 3"
    identity_at_init = False
    accepts = (Embedding,)
    default_targets = ("embed.token",)
    size = "length"
    learning_rate = 3e-2

    def __init__(
        self,
        *,
        length: Count = 20,
        init: Literal["vocabulary", "text", "normal"] = "vocabulary",
        ids: Sequence[Whole] = (),
    ):
        super().__init__()
        if (init == "text") != bool(ids):
            raise OptionError(
                f"prompt: ids are the tokens of init='text', and needed there; got init={init!r} and {len(ids)} ids"
            )
        self.length, self.init, self.ids = length, init, tuple(ids)

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Embedding)
        if self.init == "vocabulary":
            return PromptTokens(vocabulary_embeddings(site, self.length))
        if self.init == "normal":
            return PromptTokens(
                torch.randn(self.length, site.embedding_dim, device=site.weight.device) * site.weight.detach().std()
            )
        if not 0 <= min(self.ids) <= max(self.ids) < site.num_embeddings:
            raise OptionError(
                f"prompt: ids are in [0, {site.num_embeddings}), got {min(self.ids)} to {max(self.ids)}; is this the "
                "model's tokenizer?"
            )
        repeated = [self.ids[place % len(self.ids)] for place in range(self.length)]
        return PromptTokens(site.weight[torch.tensor(repeated, device=site.weight.device)])
