"""Prompt tuning: trained embedding rows in front of the input (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.errors import OptionError
from effzoo.peft.method import Method
from effzoo.registry import peft
from effzoo.sites import Embedding, PeftModule, Site


class Rows(PeftModule):
    """Trained rows [length, dim] that stand before every input."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.prompt = nn.Parameter(rows.detach().clone())

    def rows(self) -> Tensor:
        return self.prompt


@peft.register("prompt", "prompt_tuning")
class Prompt(Method):
    """f([P, x]): `length` trained rows P of shape [length, dim] are put in front of the embedded tokens.

    The rows take the first positions and the tokens follow, as in the `peft` package; outputs at the rows are cut off, so
    shapes outside do not change. In attention with global tokens the rows are global, or distant tokens could not see them.

    length: of the prompt, which counts towards max_length. init: `vocabulary` copies the embeddings of tokens drawn at random
    (much better than `normal`, section 3.2).
    """

    paper = "Lester et al. 2021, The power of scale for parameter-efficient prompt tuning, arXiv:2104.08691, section 3"
    identity_at_init = False
    accepts = (Embedding,)
    default_targets = ("embed.token",)

    def __init__(self, *, length: int = 20, init: Literal["vocabulary", "normal"] = "vocabulary"):
        super().__init__()
        if length < 1:
            raise OptionError(f"prompt: length is at least 1, got {length}")
        self.length, self.init = length, init

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Embedding)
        if self.init == "normal":
            return Rows(torch.randn(self.length, site.embedding_dim))
        return Rows(site.weight[torch.randint(site.num_embeddings, (self.length,))])
