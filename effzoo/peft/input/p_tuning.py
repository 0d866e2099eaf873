"""P-tuning: a prompt made by a small network that is dropped after training (Liu et al. 2021, arXiv:2103.10385)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Count
from effzoo.peft.input.prompt import ReparametrisedPrompt
from effzoo.peft.method import Modules
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Embedding, PeftModule, Site


class Perceptron(nn.Module):
    """P = W_3 relu(W_2 relu(W_1 e + b_1) + b_2) + b_3 for each of `length` trained e [dim], with `hidden` units."""

    def __init__(self, length: int, dim: int, hidden: int):
        super().__init__()
        self.start = nn.Parameter(torch.randn(length, dim))
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )

    def forward(self) -> Tensor:
        tokens: Tensor = self.layers(self.start)
        return tokens


class Recurrent(nn.Module):
    """P_i = W_2 relu(W_1 [forward h_i, backward h_i] + b_1) + b_2, h a bidirectional LSTM of two layers over trained e.

    Equations 4 and 5.
    """

    def __init__(self, length: int, dim: int, hidden: int):
        super().__init__()
        self.start = nn.Parameter(torch.randn(length, dim))
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True)
        self.layers = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self) -> Tensor:
        tokens: Tensor = self.layers(self.lstm(self.start)[0])
        return tokens


@peft.register("p_tuning")
class PTuning(TrainingHooks):
    """f([E(e), x]): prompt tokens from trained e through a small encoder E, so that they depend on each other.

    length: prompt tokens.
    encoder: "mlp", three linear layers with ReLU; "lstm", a bidirectional LSTM of two layers and two linear ones (the
        paper's).
    hidden: units of the encoder (of each direction).

    After training `finish` keeps the prompt tokens and drops the encoder: from there on it is a prompt of length * dim
    numbers, and is stored as one. The prompt stands in front of the input; the paper also puts parts of it inside a
    template, which a caller can do with inputs_embeds.
    """

    paper = "Liu et al. 2021, GPT understands, too, arXiv:2103.10385, section 3"
    identity_at_init = False
    accepts = (Embedding,)
    default_targets = ("embed.token",)
    size = "hidden"
    learning_rate = 1e-3

    def __init__(self, *, length: Count = 20, encoder: Literal["mlp", "lstm"] = "mlp", hidden: Count = 128):
        super().__init__()
        self.length, self.hidden = length, hidden
        self.encoder: type[Perceptron | Recurrent] = Perceptron if encoder == "mlp" else Recurrent

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Embedding)
        return ReparametrisedPrompt(self.encoder(self.length, site.embedding_dim, self.hidden))

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, ReparametrisedPrompt)
            module.drop_network()
