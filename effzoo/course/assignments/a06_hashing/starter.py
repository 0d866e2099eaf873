import math

import torch
from torch.nn import functional as F


def buckets(x, rotation):
    """The bucket of each vector: argmax of [x R, -x R].

    x [n, d], rotation R [d, b / 2]  ->  int64 [n], from 0 to b - 1
    """
    raise NotImplementedError("write the hash here")


def chunks(bucket, size):
    """The positions, sorted by bucket and then by position, in rows of `size`; -1 where a slot is empty.

    bucket int64 [n]  ->  int64 [ceil(n / size), size]
    """
    raise NotImplementedError("write the sorting here")


def one_round(x, v, slots, causal):
    """What each position reads in its own chunk and in the one before, and the log of its sum of exponentials.

    x [n, d], v [n, d_v], slots int64 [chunks, size] as `chunks` makes them, causal True or False
    ->  out [n, d_v], lse [n], both in the order of the positions; 0 and -inf where a position sees no key
    """
    raise NotImplementedError("write the round here")


def merge(outs, lses):
    """The softmax over the keys of all rounds, from the outputs of the rounds and their log-sum-exps.

    outs [rounds, n, d_v], lses [rounds, n]  ->  [n, d_v]; 0 where a position sees no key in any round
    """
    raise NotImplementedError("write the merging here")


def lsh(x, v, rotations, size, causal):
    """All rounds; a position that sees no key in any of them takes its own value.

    x [n, d], v [n, d_v], rotations [rounds, d, b / 2], size of a chunk, causal True or False  ->  [n, d_v]
    """
    raise NotImplementedError("put the four together here")
