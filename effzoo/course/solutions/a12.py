import math

import torch
from torch.nn import functional as F


def top_k(scores, k):
    """scores [tokens, N] -> weights [tokens, N]: softmax over the k largest of each token, 0 for the others."""
    best = scores.topk(k, dim=-1).indices
    kept = torch.full_like(scores, -math.inf).scatter(-1, best, scores.gather(-1, best))
    return kept.softmax(dim=-1)


def layer(x, router, experts, k):
    """y = sum_i w_i W_i x: x [tokens, d], router [N, d], experts [N, d, d] -> [tokens, d]."""
    weights = top_k(x @ router.T, k)
    y = torch.zeros_like(x)
    for i in range(len(experts)):
        sent = (weights[:, i] > 0).nonzero().flatten()
        y = y.index_add(0, sent, weights[sent, i, None] * (x[sent] @ experts[i].T))
    return y


def balance_loss(scores, k):
    """N sum_i f_i P_i of scores [tokens, N], where each token chooses k: a tensor without axes."""
    tokens, n = scores.shape
    choices = F.one_hot(scores.topk(k, dim=-1).indices, n).to(scores)  # [tokens, k, N]
    f = choices.sum(dim=(0, 1)) / (tokens * k)
    probabilities = scores.softmax(dim=-1).mean(dim=0)
    return n * (f * probabilities).sum()


def loss(x, target, router, experts, k, weight):
    """The mean of (y - target)^2 plus weight times the balancing loss; target [tokens, d]."""
    error = (layer(x, router, experts, k) - target).square().mean()
    return error + weight * balance_loss(x @ router.T, k)
