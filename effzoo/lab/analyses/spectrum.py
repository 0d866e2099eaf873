"""How much of an attention matrix its largest singular values hold (Wang et al. 2020, Linformer, arXiv:2006.04768,
section 3 and figure 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.errors import IncompatibleError
from effzoo.lab.analyses.threads import one_thread


@torch.no_grad()
def attention_matrices(model: Transformer, input_ids: Tensor) -> list[Tensor]:
    """P = softmax(Q K^T / sqrt(d)) of every layer, each [batch, heads, n, n], for sequences without padding.

    The matrices are those that the layers multiply with the values.

    Raises IncompatibleError for a model whose attention is not full, or causal.
    """
    if any(core.name != "full" or core.context.causal for core in model.cores()):
        raise IncompatibleError(
            "attention matrices are read from full, bidirectional attention; swap it: "
            "effzoo.swap_attention(model, 'full')"
        )
    matrices: list[Tensor] = []

    def read(core: nn.Module, projected: tuple[Tensor, ...]) -> None:
        q, k = projected[:2]
        matrices.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1))

    hooks = [core.register_forward_pre_hook(read) for core in model.cores()]
    mode = model.training
    try:
        model.eval()(input_ids=input_ids)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return matrices


def cumulative(matrices: Tensor) -> Tensor:
    """Normalised cumulative singular values of [..., n, m], [..., min(n, m)], in float64.

        entry i = (s_0 + ... + s_i) / (s_0 + s_1 + ...)

    An orthogonal matrix, whose singular values are all the same, gives (i + 1) / n; one of rank r gives 1 from r - 1
    on.
    """
    with one_thread():  # two threads on a busy machine: ten to eighty times the time for 512 rows
        values = torch.linalg.svdvals(matrices.double())
    return values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True)
