import math

import torch
from torch.nn import functional as F


def buckets(x, rotation):
    """The bucket of each vector: argmax of [x R, -x R]."""
    turned = x @ rotation
    return torch.cat([turned, -turned], dim=-1).argmax(dim=-1)


def chunks(bucket, size):
    """The positions, sorted by bucket and then by position, in rows of `size`; -1 where a slot is empty."""
    order = bucket.argsort(stable=True)
    return F.pad(order, (0, -len(order) % size), value=-1).view(-1, size)


def one_round(x, v, slots, causal):
    """What each position reads in its own chunk and in the one before, and the log of its sum of exponentials."""
    before = F.pad(slots, (0, 0, 1, 0), value=-1)[:-1]
    seen = torch.cat([before, slots], dim=1)  # [chunks, 2 size]
    i, j = slots[:, :, None], seen[:, None, :]
    allowed = (j >= 0) & (j < i if causal else j != i)
    keys = x / x.norm(dim=-1, keepdim=True)
    scores = (x[slots] @ keys[seen].mT).masked_fill(~allowed, -math.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    out, lse = torch.zeros_like(v), x.new_zeros(len(x))
    there = slots >= 0
    out[slots[there]] = (weights @ v[seen])[there]  # back to the order of the positions
    lse[slots[there]] = scores.logsumexp(dim=-1)[there]
    return out, lse


def merge(outs, lses):
    """The softmax over the keys of all rounds, from the outputs of the rounds and their log-sum-exps."""
    weights = lses.softmax(dim=0).nan_to_num(0.0)
    return (weights[:, :, None] * outs).sum(dim=0)


def lsh(x, v, rotations, size, causal):
    """All rounds; a position that sees no key in any of them takes its own value."""
    rounds = [one_round(x, v, chunks(buckets(x, rotation), size), causal) for rotation in rotations]
    outs, lses = (torch.stack(each) for each in zip(*rounds, strict=True))
    alone = (lses == -math.inf).all(dim=0)
    return torch.where(alone[:, None], v, merge(outs, lses))
