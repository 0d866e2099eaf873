"""Intrinsic prompt tuning: prompts lie in a small space, and only a point of it is trained (Qin et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from effzoo.annotations import Count, Probability
from effzoo.errors import InputError
from effzoo.peft.input.prompt import ReparametrisedPrompt, vocabulary_embeddings
from effzoo.peft.method import Modules
from effzoo.peft.training_hooks import Stage, TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Embedding, PeftModule, Site


class PromptDecoder(nn.Module):
    """Dec(z) = W_1 tanh(W_2 z + b_2) + b_1, z [..., dim] -> prompt tokens [..., length, width]."""

    def __init__(self, dim: int, hidden: int, length: int, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, length * width)
        self.shape = (length, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.outer(self.inner(z).tanh()).unflatten(-1, self.shape)


class IntrinsicPrompt(nn.Module):
    """Dec(z) for a trained z [dim].

    fixed: whether the decoder stays what it is.
    """

    def __init__(self, decoder: PromptDecoder, dim: int):
        super().__init__()
        self.z, self.decoder, self.fixed = nn.Parameter(torch.randn(dim)), decoder, False

    def forward(self) -> Tensor:
        decoder = {name: p.detach() if self.fixed else p for name, p in self.decoder.named_parameters()}
        tokens: Tensor = functional_call(self.decoder, decoder, (self.z,))
        return tokens


@peft.register("ipt", "intrinsic_prompt")
class IPT(TrainingHooks):
    """f([Dec(z), x]): the prompt is decoded from z of `dim` numbers, and in the end only z is trained.

    dim: of z, the intrinsic dimension (the paper: 5 to 250).
    length: prompt tokens.
    hidden: units of the decoder.
    subspace: share of the steps that train the decoder too.

    Stage `subspace` trains the decoder together with z, stage `intrinsic` z alone: the decoder then gets no gradient.
    `finish` keeps the prompt tokens and drops both. Dec(z) starts near the embeddings of random tokens, which b_1
    holds. The paper finds the space with many tasks: `fit_subspace` fits a decoder to prompts that were trained for
    them; load it into `module.network.decoder` and give subspace=0, so that all steps train z alone.
    """

    paper = (
        "Qin et al. 2021, Exploring universal intrinsic task subspace via prompt tuning, arXiv:2110.07867, section 3"
    )
    identity_at_init = False
    accepts = (Embedding,)
    default_targets = ("embed.token",)
    size = "hidden"
    learning_rate = 3e-3  # of the decoder, which at 1e-2 learns nothing
    rates = {"network.z": 100.0}  # 0.3

    def __init__(self, *, dim: Count = 100, length: Count = 20, hidden: Count = 64, subspace: Probability = 0.8):
        super().__init__()
        self.dim, self.length, self.hidden = dim, length, hidden
        self.stages = (
            (Stage("subspace", subspace), Stage("intrinsic", 1 - subspace)) if subspace else (Stage("intrinsic", 1.0),)
        )

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Embedding)
        decoder = PromptDecoder(self.dim, self.hidden, self.length, site.embedding_dim)
        with torch.no_grad():
            decoder.outer.bias.copy_(vocabulary_embeddings(site, self.length).flatten())
            decoder.outer.weight.normal_(std=1 / self.hidden**0.5).mul_(
                site.weight.std().to(decoder.outer.weight.device)
            )
        return ReparametrisedPrompt(IntrinsicPrompt(decoder, self.dim))

    def begin(self, stage: str, modules: Modules) -> None:
        for network in _networks(modules):
            network.fixed = stage == "intrinsic"
            for parameter in network.decoder.parameters():
                parameter.grad = None  # one left from the last step would move it once more

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, ReparametrisedPrompt)
            module.drop_network()


def _networks(modules: Modules) -> list[IntrinsicPrompt]:
    return [
        module.network
        for module in modules.values()
        if isinstance(module, ReparametrisedPrompt) and isinstance(module.network, IntrinsicPrompt)
    ]


def fit_subspace(
    prompts: Tensor, *, dim: int = 100, hidden: int = 64, steps: int = 1000, learning_rate: float = 1e-2, seed: int = 0
) -> tuple[PromptDecoder, Tensor]:
    """The decoder of min ||Dec(Enc(P)) - P||^2 over trained prompts P, and their codes Enc(P) [tasks, dim].

    prompts: [tasks, length, width].
    dim: of the codes.
    hidden: units of the decoder.
    steps: of Adam, its rate falling to 0.
    learning_rate: at the beginning.
    seed: of everything random.

    Enc is one linear layer (section 3.2, without the tasks' own losses, which need the models).
    """
    if prompts.ndim != 3 or not prompts.is_floating_point():
        raise InputError(
            f"prompts is a float tensor [tasks, length, width], got {prompts.dtype} of shape {tuple(prompts.shape)}"
        )
    prompts = prompts.detach()
    length, width = prompts.shape[1:]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        encoder, decoder = (
            nn.Linear(length * width, dim).to(prompts),
            PromptDecoder(dim, hidden, length, width).to(prompts),
        )
        with torch.no_grad():
            decoder.outer.bias.copy_(prompts.mean(dim=0).flatten())
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(decoder(encoder(prompts.flatten(1))), prompts).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return decoder, encoder(prompts.flatten(1))
