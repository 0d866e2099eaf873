# mypy: ignore-errors
"""The one softmax in Triton, forward and backward: the scores of a tile never leave the chip (Dao et al. 2022,
arXiv:2205.14135).

    S = scale q k^T + bias,    P = exp(S - lse),    out = (P * M / kept) v,    lse = log sum exp S,
    dv = (P * M / kept)^T dO,    dS = P * (M / kept * (dO v^T) - delta),    delta = rowsum(dO * out),
    dq = scale dS k,    dk = scale dS^T q

In the backward pass out and lse may be those of several parts merged. M is the dropout mask, drawn again from (seed,
head, query, key). There are no atomics: one program of `of_queries` writes a tile of dq, one of `of_keys` a tile of dk
and dv.

An index counts queries or keys in the order of the tiles, a position in that of the sequence. They differ under
dilation (positions of equal remainder form a sequence) and under `Order` (hashing: sorted by bucket). Out, Grad, DQ, DK
and DV are [batch, n, heads, width]. The compiler removes what is None or False. `triton_launch.py` describes the
arguments.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_SIZES = ["m", "s", "left", "right", "slots", "rounds", "turn", "keep", "seed_low", "seed_high", "span", "key_count",
          "batches"]  # fmt: skip


@triton.jit
def _random(first, second, key):
    """Philox 2x32 with 7 rounds (Salmon et al. 2011): a word for each counter (first, second)."""
    for _ in tl.static_range(7):
        high, low = tl.umulhi(first, 0xD256D193), first * 0xD256D193
        first, second = high ^ key ^ second, low
        key += 0x9E3779B9
    return first


@triton.jit
def _kept(query, key, row, keep, seed_low, seed_high):
    """Which weights dropout keeps: keep / 2^31 of them. row: number of the head among those of the batch."""
    of_head = _random(seed_low.to(tl.uint32), row.to(tl.uint32), seed_high.to(tl.uint32))
    return (_random(query.to(tl.uint32), key.to(tl.uint32), of_head) >> 1).to(tl.int32) < keep


@triton.jit
def _place(count, size, heads, dilation):
    """Tile, example, head and remainder of this program; count: number of queries or keys."""
    tiles = tl.cdiv(tl.cdiv(count, dilation), size)
    program = tl.program_id(0)
    group = program // tiles
    return program % tiles, group // dilation // heads, group // dilation % heads, group % dilation


@triton.jit
def _positions(Order, KeyMask, index, count, sequence, batch, remainder, dilation):
    """The positions of indices, which are in range, and which are in the key mask; sequence: the row of Order."""
    if Order is None:
        position = remainder + index * dilation
        inside = position < count
    else:
        inside = index < count
        position = tl.load(Order + sequence * count + index, mask=inside, other=0)
    live = inside
    if KeyMask is not None:
        live = inside & (tl.load(KeyMask + batch * count + position, mask=inside, other=0) != 0)
    return position, inside, live


@triton.jit
def _load(X, position, width, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors [positions, BLOCK] of X; width: stride from one position to the next."""
    column = tl.arange(0, BLOCK)
    return tl.load(
        X + position[:, None] * width + column[None, :], mask=inside[:, None] & (column[None, :] < WIDTH), other=0.0
    )


@triton.jit
def _write(X, position, width, inside, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Write vectors, or add them: each position has one writer."""
    column = tl.arange(0, BLOCK)
    at, mask = X + position[:, None] * width + column[None, :], inside[:, None] & (column[None, :] < WIDTH)
    if ADD:
        x += tl.load(at, mask=mask, other=0.0)
    tl.store(at, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _scores(product, query, key, i, j, live, row, Bias, Place, Buckets, bias_query, bias_key, scale, m, s, left, right,
            chunk, rounds, turn, step, CAUSAL: tl.constexpr, ITSELF: tl.constexpr, WINDOW: tl.constexpr,
            BIAS_ROWS: tl.constexpr):  # fmt: skip
    """S / log 2 of a tile, -inf where a query does not see a key. Arguments of queries and of keys broadcast."""
    score = product * (scale * LOG2E)
    if Bias is not None:
        if BIAS_ROWS:
            bias = tl.load(Bias + query * bias_query + key * bias_key, mask=live & (query < m), other=0.0)
        else:
            bias = tl.load(Bias + key * bias_key, mask=live, other=0.0)
        score += bias.to(tl.float32) * LOG2E
    seen = live
    if CAUSAL:
        seen = seen & (key <= query)
    if not ITSELF:
        seen = seen & (key != query)
    if WINDOW:
        gap = i // chunk - j // chunk
        seen = seen & (gap <= left) & (gap >= -right)
    if Buckets is not None:
        own = Buckets + (turn * step + row) * s
        seen = seen & (tl.load(own + query, mask=query < m, other=-1) == tl.load(own + key, mask=key < s, other=-2))
    if Place is not None:  # a pair that meets in several rounds counts once: -log of how often it does
        times = tl.zeros(product.shape, tl.int32)
        for one in range(rounds):
            at = (one * step + row) * s
            gap = (
                tl.load(Place + at + query, mask=query < m, other=0) // chunk
                - tl.load(Place + at + key, mask=key < s, other=0) // chunk
            )
            met = (gap <= left) & (gap >= -right)
            if Buckets is not None:
                met = met & (
                    tl.load(Buckets + at + query, mask=query < m, other=-1)
                    == tl.load(Buckets + at + key, mask=key < s, other=-2)
                )
            times += met.to(tl.int32)
        score -= tl.log2(tl.maximum(times, 1).to(tl.float32))
    return tl.where(seen, score, float("-inf"))


@triton.jit
def _span_of_keys(tile, count, left, right, chunk, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The first index of the keys that a tile of queries sees, and the one after the last."""
    first, last = 0, count
    if CAUSAL:
        last = tl.minimum(last, (tile + 1) * BM)
    if WINDOW:
        first = tl.maximum(first, (tile * BM // chunk - left) * chunk)
        last = tl.minimum(last, (((tile + 1) * BM - 1) // chunk + right + 1) * chunk)
    return first, last


@triton.jit
def _online(acc, top, total, score, v, query, key, row, keep, seed_low, seed_high, DROPOUT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The softmax over the tiles so far and one more."""
    new = tl.maximum(top, tl.max(score, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p, fade = tl.exp2(score - safe[:, None]), tl.exp2(top - safe)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(_kept(query[:, None], key[None, :], row, keep, seed_low, seed_high), p, 0.0)
    return tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION), new, total


@triton.jit(do_not_specialize=_SIZES)
def forward(Q, K, V, Bias, KeyMask, Columns, Order, Place, Buckets, Out, Lse, scale, heads, m, s, q_batch, q_head,
            q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_query, bias_key, left,
            right, dilation, chunk, slots, rounds, turn, batches, keep, seed_low, seed_high, D: tl.constexpr,
            BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            CAUSAL: tl.constexpr, ITSELF: tl.constexpr, WINDOW: tl.constexpr, BIAS_ROWS: tl.constexpr,
            DROPOUT: tl.constexpr, RESUME: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Out and Lse of a tile of queries; RESUME: over the keys that they already stand for, too."""
    tile, batch, head, remainder = _place(m, BM, heads, dilation)
    batch = batch.to(tl.int64)
    row = batch * heads + head
    step = batches * heads
    Q, K = Q + batch * q_batch + head * q_head, K + batch * k_batch + head * k_head
    V = V + batch * v_batch + head * v_head
    Out += (batch * m * heads + head) * E
    if Bias is not None:
        Bias += batch * bias_batch + head * bias_head
    i = tile * BM + tl.arange(0, BM)
    query, inside, live_query = _positions(
        Order, None if Order is None else KeyMask, i, m, turn * step + row, batch, remainder, dilation
    )
    q = _load(Q, query, q_row, inside, D, BD)
    weight = keep * (1.0 / 2147483648.0) if DROPOUT else 1.0
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    if RESUME:
        lse = tl.load(Lse + row * m + query, mask=inside, other=float("-inf"))
        top, total = lse * LOG2E, tl.where(lse == float("-inf"), 0.0, 1.0)
        acc = _load(Out, query, heads * E, inside, E, BE).to(tl.float32) * weight
    first, last = _span_of_keys(
        tile, tl.cdiv(s - remainder, dilation), left, right, chunk, BM, CAUSAL and Order is None, WINDOW
    )
    for start in range(first, last, BN):
        j = start + tl.arange(0, BN)
        key, _, live = _positions(Order, KeyMask, j, s, turn * step + row, batch, remainder, dilation)
        k = _load(K, key, k_row, live, D, BD)
        v = _load(V, key, v_row, live, E, BE)
        seen = live[None, :] if Order is None else live[None, :] & live_query[:, None]
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = _scores(product, query[:, None], key[None, :], i[:, None], j[None, :], seen, row, Bias, Place, Buckets,
                        bias_query, bias_key, scale, m, s, left, right, chunk, rounds, turn, step, CAUSAL, ITSELF,
                        WINDOW, BIAS_ROWS)  # fmt: skip
        acc, top, total = _online(
            acc, top, total, score, v, query, key, row, keep, seed_low, seed_high, DROPOUT, PRECISION
        )
    if Columns is not None:
        for start in range(0, slots, BN):
            j = start + tl.arange(0, BN)
            key = tl.load(Columns + batch * slots + j, mask=j < slots, other=s)
            live = (key >= 0) & (key < s)
            k = _load(K, key, k_row, live, D, BD)
            v = _load(V, key, v_row, live, E, BE)
            product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            score = _scores(product, query[:, None], key[None, :], i[:, None], j[None, :], live[None, :], row, Bias,
                            None, None,
                            bias_query, bias_key, scale, m, s, left, right, chunk, rounds, turn, step, CAUSAL, ITSELF,
                            False, BIAS_ROWS)  # fmt: skip
            acc, top, total = _online(
                acc, top, total, score, v, query, key, row, keep, seed_low, seed_high, DROPOUT, PRECISION
            )
    some = tl.where(total == 0.0, 1.0, total)
    _write(Out, query, heads * E, inside, acc / (some * weight)[:, None], E, BE, False)
    tl.store(Lse + row * m + query, tl.where(total == 0.0, float("-inf"), top * LN2 + tl.log(some)), mask=inside)


@triton.jit
def _slope(product, score, lse, delta, query, key, row, keep, seed_low, seed_high, weight, DROPOUT: tl.constexpr):
    """P * M / kept and dS of a tile, given dO v^T; lse and delta lie along the axis of the queries."""
    p = tl.exp2(score - lse)
    used = p
    if DROPOUT:
        kept = _kept(query, key, row, keep, seed_low, seed_high)
        used, product = tl.where(kept, p / weight, 0.0), tl.where(kept, product / weight, 0.0)
    return used, p * (product - delta)


@triton.jit(do_not_specialize=_SIZES)
def of_queries(Q, K, V, Bias, KeyMask, Columns, Order, Place, Buckets, Out, Grad, Lse, Delta, DQ, scale, heads, m, s,
               q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head,
               bias_query, bias_key, left, right, dilation, chunk, slots, rounds, turn, batches, keep, seed_low,
               seed_high, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, CAUSAL: tl.constexpr, ITSELF: tl.constexpr, WINDOW: tl.constexpr,
               BIAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """DQ, and Delta, of a tile of queries."""
    tile, batch, head, remainder = _place(m, BM, heads, dilation)
    batch = batch.to(tl.int64)
    row = batch * heads + head
    step = batches * heads
    Q, K = Q + batch * q_batch + head * q_head, K + batch * k_batch + head * k_head
    V = V + batch * v_batch + head * v_head
    if Bias is not None:
        Bias += batch * bias_batch + head * bias_head
    i = tile * BM + tl.arange(0, BM)
    query, inside, live_query = _positions(
        Order, None if Order is None else KeyMask, i, m, turn * step + row, batch, remainder, dilation
    )
    q = _load(Q, query, q_row, inside, D, BD)
    first_row = (batch * m * heads + head) * E
    g = _load(Grad + first_row, query, heads * E, inside, E, BE)
    delta = tl.sum(g.to(tl.float32) * _load(Out + first_row, query, heads * E, inside, E, BE).to(tl.float32), 1)
    tl.store(Delta + row * m + query, delta, mask=inside)
    lse = tl.load(Lse + row * m + query, mask=inside, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a query without keys: P is 0
    weight = keep * (1.0 / 2147483648.0) if DROPOUT else 1.0
    acc = tl.zeros([BM, BD], tl.float32)
    first, last = _span_of_keys(
        tile, tl.cdiv(s - remainder, dilation), left, right, chunk, BM, CAUSAL and Order is None, WINDOW
    )
    for start in range(first, last, BN):
        j = start + tl.arange(0, BN)
        key, _, live = _positions(Order, KeyMask, j, s, turn * step + row, batch, remainder, dilation)
        k = _load(K, key, k_row, live, D, BD)
        v = _load(V, key, v_row, live, E, BE)
        seen = live[None, :] if Order is None else live[None, :] & live_query[:, None]
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = _scores(product, query[:, None], key[None, :], i[:, None], j[None, :], seen, row, Bias, Place, Buckets,
                        bias_query, bias_key, scale, m, s, left, right, chunk, rounds, turn, step, CAUSAL, ITSELF,
                        WINDOW, BIAS_ROWS)  # fmt: skip
        of_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        _, slope = _slope(of_weights, score, lse[:, None], delta[:, None], query[:, None], key[None, :], row, keep,
                          seed_low, seed_high, weight, DROPOUT)  # fmt: skip
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    if Columns is not None:
        for start in range(0, slots, BN):
            j = start + tl.arange(0, BN)
            key = tl.load(Columns + batch * slots + j, mask=j < slots, other=s)
            live = (key >= 0) & (key < s)
            k = _load(K, key, k_row, live, D, BD)
            v = _load(V, key, v_row, live, E, BE)
            product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            score = _scores(product, query[:, None], key[None, :], i[:, None], j[None, :], live[None, :], row, Bias,
                            None, None,
                            bias_query, bias_key, scale, m, s, left, right, chunk, rounds, turn, step, CAUSAL, ITSELF,
                            False, BIAS_ROWS)  # fmt: skip
            of_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            _, slope = _slope(of_weights, score, lse[:, None], delta[:, None], query[:, None], key[None, :], row,
                              keep, seed_low, seed_high, weight, DROPOUT)  # fmt: skip
            acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    _write(DQ + (batch * m * heads + head) * D, query, heads * D, inside, acc * scale, D, BD, ADD)


@triton.jit(do_not_specialize=_SIZES)
def of_keys(Q, K, V, Bias, KeyMask, Columns, Order, Place, Buckets, Grad, Lse, Delta, DK, DV, scale, heads, m, s,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_query,
            bias_key, left, right, dilation, chunk, slots, rounds, turn, batches, span, key_count, keep, seed_low,
            seed_high, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, CAUSAL: tl.constexpr, ITSELF: tl.constexpr, WINDOW: tl.constexpr,
            BIAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DK and DV of a tile of keys. With Columns, of the keys at these positions, from `span` queries each: DK is
    [parts, batch, slots, heads, D]."""
    tile, batch, head, remainder = _place(s if Columns is None else slots, BN, heads, dilation)
    to, part = batch.to(tl.int64), batch // batches
    batch = batch % batches
    batch = batch.to(tl.int64)
    row = batch * heads + head
    step = batches * heads
    Q, K = Q + batch * q_batch + head * q_head, K + batch * k_batch + head * k_head
    V = V + batch * v_batch + head * v_head
    Grad += (batch * m * heads + head) * E
    if Bias is not None:
        Bias += batch * bias_batch + head * bias_head
    j = tile * BN + tl.arange(0, BN)
    first, last = 0, tl.cdiv(m - remainder, dilation)
    if Columns is None:
        key, own, live = _positions(Order, KeyMask, j, s, turn * step + row, batch, remainder, dilation)
        at = key
        if CAUSAL and Order is None:
            first = tile * BN
        if WINDOW:
            first = tl.maximum(first, (tile * BN // chunk - right) * chunk)
            last = tl.minimum(last, (((tile + 1) * BN - 1) // chunk + left + 1) * chunk)
    else:
        at, own = j, j < slots
        key = tl.load(Columns + batch * slots + j, mask=own, other=s)
        live = (key >= 0) & (key < s)
        first, last = part * span, tl.minimum(last, (part + 1) * span)
    k = _load(K, key, k_row, live, D, BD)
    v = _load(V, key, v_row, live, E, BE)
    weight = keep * (1.0 / 2147483648.0) if DROPOUT else 1.0
    of_k, of_v = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BE], tl.float32)
    for start in range(first, last, BM):
        i = start + tl.arange(0, BM)
        query, inside, live_query = _positions(
            Order, None if Order is None else KeyMask, i, m, turn * step + row, batch, remainder, dilation
        )
        q = _load(Q, query, q_row, inside, D, BD)
        g = _load(Grad, query, heads * E, inside, E, BE)
        lse = tl.load(Lse + row * m + query, mask=inside, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(Delta + row * m + query, mask=inside, other=0.0)
        seen = live[:, None] if Order is None else live[:, None] & live_query[None, :]
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        score = _scores(product, query[None, :], key[:, None], i[None, :], j[:, None], seen, row, Bias, Place, Buckets,
                        bias_query, bias_key, scale, m, s, left, right, chunk, rounds, turn, step, CAUSAL, ITSELF,
                        WINDOW, BIAS_ROWS)  # fmt: skip
        of_weights = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        used, slope = _slope(of_weights, score, lse[None, :], delta[None, :], query[None, :], key[:, None], row, keep,
                             seed_low, seed_high, weight, DROPOUT)  # fmt: skip
        of_v = tl.dot(used.to(g.dtype), g, of_v, input_precision=PRECISION)
        of_k = tl.dot(slope.to(q.dtype), q, of_k, input_precision=PRECISION)
    _write(DK + (to * key_count * heads + head) * D, at, heads * D, own, of_k * scale, D, BD, ADD)
    _write(DV + (to * key_count * heads + head) * E, at, heads * E, own, of_v, E, BE, ADD)
