"""Latent attention: learned latents summarise keys and values, queries read the summary (Jaegle et al. 2021,
arXiv:2103.03206, section 3.1)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.annotations import Count
from effzoo.attention import reference
from effzoo.attention.core import CompressedAttention, Context, Mask
from effzoo.attention.part import Part
from effzoo.registry import attention
from effzoo.sites import Embedding, KeysValues


@attention.register("perceiver")
class Perceiver(CompressedAttention):
    """Latents summarise keys and values by one softmax; queries attend to the summary by another.

    S = softmax(z k^T / sqrt(d)),    out = softmax(q (S k)^T / sqrt(d)) S v

    z are m latents per head. This is the cross-attention of the Perceiver as a kind for encoder blocks. Cost O(n m),
    for sources of any length.

    latents: m; a site with the role `attn.latents`, a table [latents, heads head_dim] per layer. They start normal with
        standard deviation 1, so that they attend to different keys; with the Perceiver's 0.02, whose latents pass a
        norm and a projection first, all would start as the mean.

    Queries see memory (prefix tuning) besides the summary. Dropout acts on both softmaxes.
    """

    paper = "Jaegle et al. 2021, Perceiver: General perception with iterative attention, arXiv:2103.03206, section 3.1"
    cost = "n * latents"
    not_causal = "its latents summarise past and future together"

    def __init__(self, context: Context, *, latents: Count = 128):
        super().__init__(context)
        self.latents = Embedding(latents, context.heads * context.head_dim, role="attn.latents", layer=context.layer)
        self.initialise()

    def initialise(self) -> None:
        nn.init.normal_(self.latents.weight)

    def compressed(self, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor | None]:
        z = self.latent_queries().to(k.dtype).expand(k.shape[0], -1, -1, -1)
        summary = self.attend(Part(z, k, torch.cat([k, v], dim=-1), bias=mask.key_bias(k.dtype)))
        return summary[..., : k.shape[-1]], summary[..., k.shape[-1] :], None

    def latent_queries(self) -> Tensor:
        """z [heads, latents, d], with the adapters of the site."""
        z = self.latents(torch.arange(self.latents.num_embeddings, device=self.latents.weight.device))
        return rearrange(z, "m (h d) -> h m d", h=self.context.heads)

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition with both softmaxes written out."""
        q, k, v = projected
        valid = reference.padding(k.shape[2], mask.valid, k.device)
        scores = torch.einsum("hmd,bhjd->bhmj", self.latent_queries(), k) / math.sqrt(k.shape[-1])
        some = valid.any(dim=-1, keepdim=True)
        S = scores.masked_fill(~valid & some, -math.inf).softmax(dim=-1) * some
        keys, values = (torch.einsum("bhmj,bhjd->bhmd", S, x) for x in (k, v))
        return reference.dense(q, keys, values, torch.ones(1, dtype=torch.bool, device=q.device), memory)
