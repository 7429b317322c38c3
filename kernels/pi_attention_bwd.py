"""Backward kernels, without atomics: every row of a gradient is summed and stored by one program.

With P the probabilities after dropout and delta = Σ out·dout, `dl = P·(dout·v) - softmax·delta`.

- A narrow band is one tile: block_m queries and the block_m keys around them give dq, dk, dv of the rows
  whose whole neighbourhood lies inside, so scores are computed once, and delta on the way.
- A wide band computes scores twice: keys loop over their queries for dk and dv, queries over their keys for
  dq.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pi_dist.kernels.tiles import (
    FULL_STRETCH,
    LOG2E,
    NOWHERE,
    RING,
    SKIP,
    Tokens,
    along_columns,
    along_rows,
    band_limits,
    clamped,
    decode,
    keep,
    load,
    load_labels,
    load_priors,
    load_rows,
    neighbours,
    of,
    of_skips,
    query_hash,
    shifted,
    store,
    store_rows,
    tokens,
    zeros,
)


@triton.jit
def _delta_kernel(out, dout, delta, sizes, OPTIONS: tl.constexpr):
    """delta [B, T, H] = Σ over D of out·dout."""
    tile, head, batch = decode(sizes, True)
    first = tile.to(tl.int64) * OPTIONS.block_m
    mine = tokens(first, tl.arange(0, OPTIONS.block_m), 1, sizes.q_len, OPTIONS)  # [M]
    out_rows = load_rows(of(out, batch, head), mine, OPTIONS).to(tl.float32)
    dout_rows = load_rows(of(dout, batch, head), mine, OPTIONS).to(tl.float32)
    store(of(delta, batch, head), mine, tl.sum(out_rows * dout_rows, 1))


class GateSums(NamedTuple):
    """Sums [M] over a query's neighbours, with c = 1/α on ring and -1/(1-α) on skip targets.

    dl: of c times the dlogits. weight: of c times the softmax. Both where the clamp passes. residual: of the
    dlogits before the clamp; it would be 0 if delta were exact. All dlogits times the scale.
    """

    dl: Any
    weight: Any
    residual: Any


@triton.jit
def _no_sums(OPTIONS: tl.constexpr):
    return GateSums(zeros(OPTIONS, False), zeros(OPTIONS, False), zeros(OPTIONS, False))


@triton.jit
def _dlogits(x, unclamped, ok, dp, delta, hashed, offset, scores, dropout, OPTIONS: tl.constexpr):
    """(P after dropout, dlogits, softmax where the clamp passes, dlogits before the clamp).

    dlogits and delta are times the scale. x and unclamped are logits in base 2 less the query's lse.
    """
    p = tl.where(ok, tl.exp2(x), 0.0)
    dropped = p
    if OPTIONS.dropout:
        dropped = tl.where(keep(hashed, offset, dropout), p * dropout.keep_scale, 0.0)
        dl = dropped * (dp * scores.scale) - p * delta
    else:
        dl = p * (dp * scores.scale - delta)
    if OPTIONS.has_cap:
        inside = x == unclamped
        return dropped, tl.where(inside, dl, 0.0), tl.where(inside, p, 0.0), dl
    else:
        return dropped, dl, p, dl


@triton.jit
def _add_sums(sums, passed, weight, dl, ring, alpha, OPTIONS: tl.constexpr):
    """Add a tile [M, N] to the gate's sums."""
    if OPTIONS.has_gate:
        if OPTIONS.kind == RING:
            by_ring = 1 / alpha
            return GateSums(
                sums.dl + by_ring * tl.sum(passed, 1), sums.weight + by_ring * tl.sum(weight, 1),
                sums.residual + tl.sum(dl, 1),
            )  # fmt: skip
        elif OPTIONS.kind == SKIP:
            by_skip = -1 / (1 - alpha)
            return GateSums(
                sums.dl + by_skip * tl.sum(passed, 1), sums.weight + by_skip * tl.sum(weight, 1),
                sums.residual + tl.sum(dl, 1),
            )  # fmt: skip
        else:
            c = tl.where(ring, (1 / alpha)[:, None], (-1 / (1 - alpha))[:, None])
            return GateSums(
                sums.dl + tl.sum(c * passed, 1),
                sums.weight + tl.sum(c * weight, 1),
                sums.residual + tl.sum(dl, 1),
            )
    else:
        return sums


@triton.jit
def _store_gate(dgate, weight, residual, queries, sums, scores, OPTIONS: tl.constexpr):
    """dα of queries, or, where several launches make one gradient, its three summands to be put together.

    `dα / (1-2ε) = Σ_ring dl / α - Σ_skip dl / (1-α)`. The rounding of delta adds e times the softmax to every
    dl, and e = residual: it is taken out here, because the two sums nearly cancel.
    """
    if OPTIONS.has_gate:
        sums = GateSums(sums.dl / scores.scale, sums.weight, sums.residual / scores.scale)
        if OPTIONS.parts:
            if OPTIONS.merge:
                sums = GateSums(
                    sums.dl + load(dgate, queries, 0.0), sums.weight + load(weight, queries, 0.0),
                    sums.residual + load(residual, queries, 0.0),
                )  # fmt: skip
            store(weight, queries, sums.weight)
            store(residual, queries, sums.residual)
            value = sums.dl
        else:
            value = (1 - 2 * OPTIONS.epsilon) * (sums.dl - sums.residual * sums.weight)
        store(dgate, queries, value)


@triton.jit
def _shifted(
    q_rows, dout_rows, k_rows, v_rows, queries, ok, delta, priors, q_labels, k_labels, batch, head, offset,
    scores, dropout, OPTIONS: tl.constexpr,
):  # fmt: skip
    """As `_dlogits`, [M], of one pair a row, `offset` tokens apart."""
    x = tl.sum(q_rows.to(tl.float32) * k_rows.to(tl.float32), 1)
    dp = tl.sum(dout_rows.to(tl.float32) * v_rows.to(tl.float32), 1)
    offsets = queries.offset.to(tl.int64) * 0 + offset
    ok = ok & (tl.abs(offsets) > scores.window)
    if OPTIONS.has_labels:
        ok = ok & (q_labels == k_labels) & (q_labels >= 0)
    x, unclamped = clamped(x, ok & False, of_skips(priors), scores, OPTIONS)
    hashed = query_hash(dropout, batch, queries, head, OPTIONS)
    return _dlogits(x, unclamped, ok, dp, delta, hashed, offsets, scores, dropout, OPTIONS)


@triton.jit
def _skip_of_keys(
    dk, dv, k_rows, v_rows, keys, k_label, q, dout, lse, delta, gate, q_labels, sizes, scores, dropout, batch,
    head, offset, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the queries `offset` tokens after the keys give them."""
    queries = shifted(keys, offset - sizes.shift, sizes.q_len)
    q_rows, dout_rows = load_rows(q, queries, OPTIONS), load_rows(dout, queries, OPTIONS)
    priors = load_priors(gate, queries, load(lse, queries, 0.0) * LOG2E, scores, OPTIONS)
    dropped, passed, _, _ = _shifted(
        q_rows, dout_rows, k_rows, v_rows, queries, queries.ok, load(delta, queries, 0.0) * scores.scale,
        priors, load_labels(q_labels, queries, OPTIONS), k_label, batch, head, offset, scores, dropout,
        OPTIONS,
    )  # fmt: skip
    return dk + passed[:, None] * q_rows.to(tl.float32), dv + dropped[:, None] * dout_rows.to(tl.float32)


@triton.jit
def _skip_of_queries(
    dq, sums, q_rows, dout_rows, queries, q_label, delta, priors, k, v, k_labels, sizes, scores, dropout,
    batch, head, offset, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add to dq and the gate's sums what the keys `offset` tokens before the queries give them."""
    keys = shifted(queries, sizes.shift - offset, sizes.k_len)
    k_rows, v_rows = load_rows(k, keys, OPTIONS), load_rows(v, keys, OPTIONS)
    _, passed, weight, dl = _shifted(
        q_rows, dout_rows, k_rows, v_rows, queries, keys.ok, delta, priors, q_label,
        load_labels(k_labels, keys, OPTIONS), batch, head, offset, scores, dropout, OPTIONS,
    )  # fmt: skip
    if OPTIONS.has_gate:
        by_skip = -1 / (1 - priors.alpha)
        sums = GateSums(sums.dl + by_skip * passed, sums.weight + by_skip * weight, sums.residual + dl)
    return dq + passed[:, None] * k_rows.to(tl.float32), sums


@triton.jit
def _keys_tile(
    dk, dv, k_rows, v_rows, k_ok, k_label, q, dout, lse, delta, gate, q_labels, sizes, scores, dropout,
    stride, step, base, block, batch, head, FULL: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the queries at steps [block, block + block_n) give the keys."""
    steps = tl.arange(0, OPTIONS.block_m)
    columns = block + tl.arange(0, OPTIONS.block_n)
    queries = tokens(base, columns, step, sizes.q_len, OPTIONS)  # [N]
    q_rows, dout_rows = load_rows(q, queries, OPTIONS), load_rows(dout, queries, OPTIONS)
    delta_rows = load(delta, queries, 0.0) * scores.scale
    priors = load_priors(gate, queries, load(lse, queries, 0.0) * LOG2E, scores, OPTIONS)
    x = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")  # [M keys, N queries]
    ok, ring = neighbours(
        tl.where(queries.ok, columns, NOWHERE)[None, :],
        tl.where(k_ok, steps, -NOWHERE)[:, None],
        scores,
        stride,
        OPTIONS,
    )
    if FULL:
        ok = ring | True
    if OPTIONS.has_labels:
        q_label = load_labels(q_labels, queries, OPTIONS)
        ok = ok & (k_label[:, None] == q_label[None, :]) & (q_label >= 0)[None, :]
    x, unclamped = clamped(x, ring, along_columns(priors), scores, OPTIONS)
    dp = tl.dot(v_rows, tl.trans(dout_rows), input_precision="ieee")
    dropped, passed, _, _ = _dlogits(
        x, unclamped, ok, dp, delta_rows[None, :],
        query_hash(dropout, batch, queries, head, OPTIONS)[None, :],
        (columns[None, :] - steps[:, None]).to(tl.int64) * step, scores, dropout, OPTIONS,
    )  # fmt: skip
    dv = tl.dot(dropped.to(dout_rows.dtype), dout_rows, dv, input_precision="ieee")
    dk = tl.dot(passed.to(q_rows.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _queries_tile(
    dq, sums, q_rows, dout_rows, q_ok, q_label, delta, priors, hashed, k, v, k_labels, sizes, scores, dropout,
    stride, step, base, block, FULL: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add to dq and the gate's sums what the keys at steps [block, block + block_n) give the queries."""
    steps = tl.arange(0, OPTIONS.block_m)
    columns = block + tl.arange(0, OPTIONS.block_n)
    keys = tokens(base, columns, step, sizes.k_len, OPTIONS)  # [N]
    k_rows, v_rows = load_rows(k, keys, OPTIONS), load_rows(v, keys, OPTIONS)
    x = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")  # [M, N]
    ok, ring = neighbours(
        tl.where(q_ok, steps, NOWHERE)[:, None],
        tl.where(keys.ok, columns, -NOWHERE)[None, :],
        scores,
        stride,
        OPTIONS,
    )
    if FULL:
        ok = ring | True
    if OPTIONS.has_labels:
        k_label = load_labels(k_labels, keys, OPTIONS)
        ok = ok & (q_label[:, None] == k_label[None, :]) & (q_label >= 0)[:, None]
    x, unclamped = clamped(x, ring, along_rows(priors), scores, OPTIONS)
    dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee")
    _, passed, weight, dl = _dlogits(
        x, unclamped, ok, dp, delta[:, None], hashed[:, None],
        (steps[:, None] - columns[None, :]).to(tl.int64) * step, scores, dropout, OPTIONS,
    )  # fmt: skip
    sums = _add_sums(sums, passed, weight, dl, ring, priors.alpha, OPTIONS)
    dq = tl.dot(passed.to(k_rows.dtype), k_rows, dq, input_precision="ieee")
    return dq, sums


@triton.jit(do_not_specialize=["sizes", "scores", "dropout", "first_share"])
def _keys_kernel(
    q, k, v, gate, q_labels, k_labels, delta, lse, dout, strides_ptr, kv_heads_ptr, dk, dv, sizes, scores,
    dropout, first_share, OPTIONS: tl.constexpr,
):  # fmt: skip
    """dk and dv of block_m keys, summed over `shares` query heads; num_heads counts the keys' heads."""
    tile, k_head, batch = decode(sizes, OPTIONS.heads_first)
    head = tl.load(kv_heads_ptr + k_head) * OPTIONS.share + first_share
    stride = scores.stride + tile * 0  # a tensor even if it is 1
    if not OPTIONS.uniform:
        stride = tl.load(strides_ptr + head)
    first, step = 0, 1
    if OPTIONS.kind == SKIP:
        first, step, tile = tile % stride, stride, tile // stride
    start = tile.to(tl.int64) * OPTIONS.block_m
    if first + start * step >= sizes.k_len:
        return
    mine = tokens(first + start * step, tl.arange(0, OPTIONS.block_m), step, sizes.k_len, OPTIONS)  # [M]
    k_rows = load_rows(of(k, batch, k_head), mine, OPTIONS)
    v_rows = load_rows(of(v, batch, k_head), mine, OPTIONS)
    label = load_labels(of(k_labels, batch, 0), mine, OPTIONS)
    q_labels = of(q_labels, batch, 0)
    dk_rows = zeros(OPTIONS, True)
    dv_rows = zeros(OPTIONS, True)
    base = first - sizes.shift + start * step  # the query at the tile's first key
    limits = band_limits(base, step, sizes.q_len, scores, stride, OPTIONS.right, OPTIONS.left, OPTIONS)
    for share in range(OPTIONS.shares):
        this = head + share
        if not OPTIONS.uniform:
            stride = tl.load(strides_ptr + this)
        q_part, dout_part, gate_part = of(q, batch, this), of(dout, batch, this), of(gate, batch, this)
        lse_part, delta_part = of(lse, batch, this), of(delta, batch, this)
        for stretch in tl.static_range(3):
            for block in range(limits[stretch], limits[stretch + 1], OPTIONS.block_n):
                dk_rows, dv_rows = _keys_tile(
                    dk_rows, dv_rows, k_rows, v_rows, mine.ok, label, q_part, dout_part, lse_part, delta_part,
                    gate_part, q_labels, sizes, scores, dropout, stride, step, base, block, batch, this,
                    stretch == FULL_STRETCH, OPTIONS,
                )  # fmt: skip
        for m in tl.static_range(1, OPTIONS.shifts + 1):
            for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
                dk_rows, dv_rows = _skip_of_keys(
                    dk_rows, dv_rows, k_rows, v_rows, mine, label, q_part, dout_part, lse_part, delta_part,
                    gate_part, q_labels, sizes, scores, dropout, batch, this,
                    m * stride if side == 0 else -m * stride, OPTIONS,
                )  # fmt: skip
    store_rows(of(dk, batch, k_head), mine, dk_rows, OPTIONS.merge, OPTIONS)
    store_rows(of(dv, batch, k_head), mine, dv_rows, OPTIONS.merge, OPTIONS)


@triton.jit(do_not_specialize=["sizes", "scores", "dropout", "first_share"])
def _queries_kernel(
    q, k, v, gate, q_labels, k_labels, delta, lse, dout, strides_ptr, kv_heads_ptr, dq, dgate, weight,
    residual, sizes, scores, dropout, first_share, OPTIONS: tl.constexpr,
):  # fmt: skip
    """dq and dgate of block_m queries of one head; num_heads counts `shares` of them a head of the keys."""
    tile, slot, batch = decode(sizes, OPTIONS.heads_first)
    k_head = slot // OPTIONS.shares
    head = tl.load(kv_heads_ptr + k_head) * OPTIONS.share + first_share + slot % OPTIONS.shares
    stride = scores.stride + tile * 0  # a tensor even if it is 1
    if not OPTIONS.uniform:
        stride = tl.load(strides_ptr + head)
    first, step = 0, 1
    if OPTIONS.kind == SKIP:
        first, step, tile = tile % stride, stride, tile // stride
    start = tile.to(tl.int64) * OPTIONS.block_m
    if first + start * step >= sizes.q_len:
        return
    mine = tokens(first + start * step, tl.arange(0, OPTIONS.block_m), step, sizes.q_len, OPTIONS)  # [M]
    q_rows = load_rows(of(q, batch, head), mine, OPTIONS)
    dout_rows = load_rows(of(dout, batch, head), mine, OPTIONS)
    delta_rows = load(of(delta, batch, head), mine, 0.0) * scores.scale
    origin = load(of(lse, batch, head), mine, 0.0) * LOG2E
    priors = load_priors(of(gate, batch, head), mine, origin, scores, OPTIONS)
    label = load_labels(of(q_labels, batch, 0), mine, OPTIONS)
    hashed = query_hash(dropout, batch, mine, head, OPTIONS)
    k, v, k_labels = of(k, batch, k_head), of(v, batch, k_head), of(k_labels, batch, 0)
    dq_rows = zeros(OPTIONS, True)
    sums = _no_sums(OPTIONS)
    base = first + sizes.shift + start * step  # the key at the tile's first query
    limits = band_limits(base, step, sizes.k_len, scores, stride, OPTIONS.left, OPTIONS.right, OPTIONS)
    for stretch in tl.static_range(3):
        for block in range(limits[stretch], limits[stretch + 1], OPTIONS.block_n):
            dq_rows, sums = _queries_tile(
                dq_rows, sums, q_rows, dout_rows, mine.ok, label, delta_rows, priors, hashed, k, v, k_labels,
                sizes, scores, dropout, stride, step, base, block, stretch == FULL_STRETCH, OPTIONS,
            )  # fmt: skip
    for m in tl.static_range(1, OPTIONS.shifts + 1):
        for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
            dq_rows, sums = _skip_of_queries(
                dq_rows, sums, q_rows, dout_rows, mine, label, delta_rows, priors, k, v, k_labels, sizes,
                scores, dropout, batch, head, m * stride if side == 0 else -m * stride, OPTIONS,
            )  # fmt: skip
    store_rows(of(dq, batch, head), mine, dq_rows, OPTIONS.merge, OPTIONS)
    _store_gate(
        of(dgate, batch, head),
        of(weight, batch, head),
        of(residual, batch, head),
        mine,
        sums,
        scores,
        OPTIONS,
    )


@triton.jit
def _narrow_block(
    start, first, step, batch, k_head, q, k, v, gate, q_labels, k_labels, out, lse, dout, strides_ptr, dq, dk,
    dv, dgate, weight, residual, sizes, scores, dropout, OPTIONS: tl.constexpr,
):  # fmt: skip
    """All gradients of block_m - left - right tokens from step `start` on.

    Queries begin `right` steps before these tokens, keys `left` before them: so the tile holds all queries of
    these keys and all keys of these queries.
    """
    OWN: tl.constexpr = OPTIONS.block_m - OPTIONS.left - OPTIONS.right
    steps = tl.arange(0, OPTIONS.block_m)
    queries = tokens(first + (start - OPTIONS.right) * step, steps, step, sizes.q_len, OPTIONS)  # [M]
    keys = tokens(first + (start - OPTIONS.left) * step, steps, step, sizes.k_len, OPTIONS)  # [M]
    in_queries = queries.ok & (steps >= OPTIONS.right) & (steps < OPTIONS.right + OWN)
    in_keys = keys.ok & (steps >= OPTIONS.left) & (steps < OPTIONS.left + OWN)
    own_queries = Tokens(queries.start, queries.offset, in_queries)
    own_keys = Tokens(keys.start, keys.offset, in_keys)
    k, v = of(k, batch, k_head), of(v, batch, k_head)
    k_rows, v_rows = load_rows(k, keys, OPTIONS), load_rows(v, keys, OPTIONS)
    q_labels, k_labels = of(q_labels, batch, 0), of(k_labels, batch, 0)
    q_label = load_labels(q_labels, queries, OPTIONS)
    k_label = load_labels(k_labels, keys, OPTIONS)
    dk_rows = zeros(OPTIONS, True)
    dv_rows = zeros(OPTIONS, True)
    for share in range(OPTIONS.share):
        head = k_head * OPTIONS.share + share
        stride = scores.stride + k_head * 0  # a tensor even if it is 1
        if not OPTIONS.uniform:
            stride = tl.load(strides_ptr + head)
        q_part, dout_part, gate_part = of(q, batch, head), of(dout, batch, head), of(gate, batch, head)
        lse_part, out_part = of(lse, batch, head), of(out, batch, head)
        q_rows, dout_rows = load_rows(q_part, queries, OPTIONS), load_rows(dout_part, queries, OPTIONS)
        out_rows = load_rows(out_part, queries, OPTIONS)
        delta = tl.sum(out_rows.to(tl.float32) * dout_rows.to(tl.float32), 1) * scores.scale
        origin = load(lse_part, queries, 0.0) * LOG2E
        priors = load_priors(gate_part, queries, origin, scores, OPTIONS)
        x = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
        dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee")
        t, u = steps - OPTIONS.right, steps - OPTIONS.left
        ok, ring = neighbours(
            tl.where(queries.ok, t, NOWHERE)[:, None],
            tl.where(keys.ok, u, -NOWHERE)[None, :],
            scores,
            stride,
            OPTIONS,
        )
        if OPTIONS.has_labels:
            ok = ok & (q_label[:, None] == k_label[None, :]) & (q_label >= 0)[:, None]
        x, unclamped = clamped(x, ring, along_rows(priors), scores, OPTIONS)
        dropped, passed, weights, dl = _dlogits(
            x, unclamped, ok, dp, delta[:, None], query_hash(dropout, batch, queries, head, OPTIONS)[:, None],
            (t[:, None] - u[None, :]).to(tl.int64) * step, scores, dropout, OPTIONS,
        )  # fmt: skip
        sums = _add_sums(_no_sums(OPTIONS), passed, weights, dl, ring, priors.alpha, OPTIONS)
        dropped_rows, dl_rows = dropped.to(dout_rows.dtype), passed.to(q_rows.dtype)
        # one gradient after the other, each stored as soon as it is whole: three accumulators would not fit
        dv_rows = tl.dot(tl.trans(dropped_rows), dout_rows, dv_rows, input_precision="ieee")
        if OPTIONS.shifts == 0 and OPTIONS.share == 1:
            store_rows(of(dv, batch, k_head), own_keys, dv_rows, OPTIONS.merge, OPTIONS)
        dk_rows = tl.dot(tl.trans(dl_rows), q_rows, dk_rows, input_precision="ieee")
        for m in tl.static_range(1, OPTIONS.shifts + 1):
            for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
                distance = m * stride if side == 0 else -m * stride
                there = shifted(own_keys, distance, sizes.q_len)
                far_q, far_dout = load_rows(q_part, there, OPTIONS), load_rows(dout_part, there, OPTIONS)
                far_out = load_rows(out_part, there, OPTIONS)
                far_delta = tl.sum(far_out.to(tl.float32) * far_dout.to(tl.float32), 1) * scores.scale
                far_origin = load(lse_part, there, 0.0) * LOG2E
                far_dropped, far_passed, _, _ = _shifted(
                    far_q, far_dout, k_rows, v_rows, there, there.ok, far_delta,
                    load_priors(gate_part, there, far_origin, scores, OPTIONS),
                    load_labels(q_labels, there, OPTIONS), k_label, batch, head, distance, scores, dropout,
                    OPTIONS,
                )  # fmt: skip
                dv_rows += far_dropped[:, None] * far_dout.to(tl.float32)
                dk_rows += far_passed[:, None] * far_q.to(tl.float32)
        if OPTIONS.share == 1:
            if OPTIONS.shifts > 0:
                store_rows(of(dv, batch, k_head), own_keys, dv_rows, OPTIONS.merge, OPTIONS)
            store_rows(of(dk, batch, k_head), own_keys, dk_rows, OPTIONS.merge, OPTIONS)
        dq_rows = tl.dot(dl_rows, k_rows, input_precision="ieee")
        for m in tl.static_range(1, OPTIONS.shifts + 1):
            for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
                dq_rows, sums = _skip_of_queries(
                    dq_rows, sums, q_rows, dout_rows, own_queries, q_label, delta, priors, k, v, k_labels,
                    sizes, scores, dropout, batch, head, m * stride if side == 0 else -m * stride, OPTIONS,
                )  # fmt: skip
        store_rows(of(dq, batch, head), own_queries, dq_rows, OPTIONS.merge, OPTIONS)
        _store_gate(
            of(dgate, batch, head), of(weight, batch, head), of(residual, batch, head), own_queries, sums,
            scores, OPTIONS,
        )  # fmt: skip
    if OPTIONS.share > 1:
        store_rows(of(dk, batch, k_head), own_keys, dk_rows, OPTIONS.merge, OPTIONS)
        store_rows(of(dv, batch, k_head), own_keys, dv_rows, OPTIONS.merge, OPTIONS)


@triton.jit(do_not_specialize=["sizes", "scores", "dropout"])
def _narrow_kernel(
    q, k, v, gate, q_labels, k_labels, out, lse, dout, strides_ptr, dq, dk, dv, dgate, weight, residual,
    sizes, scores, dropout, OPTIONS: tl.constexpr,
):  # fmt: skip
    """All gradients, for queries and keys in the same tensor; num_heads counts the keys' heads.

    With kind SKIP, the query heads of one of the keys' heads have one stride.
    """
    OWN: tl.constexpr = OPTIONS.block_m - OPTIONS.left - OPTIONS.right
    tile, k_head, batch = decode(sizes, OPTIONS.heads_first)
    first, step = 0, 1
    if OPTIONS.kind == SKIP:
        step = scores.stride + tile * 0
        if not OPTIONS.uniform:
            step = tl.load(strides_ptr + k_head * OPTIONS.share)
        first, tile = tile % step, tile // step
    start = tile.to(tl.int64) * OWN
    if first + start * step < sizes.q_len:
        _narrow_block(
            start, first, step, batch, k_head, q, k, v, gate, q_labels, k_labels, out, lse, dout, strides_ptr,
            dq, dk, dv, dgate, weight, residual, sizes, scores, dropout, OPTIONS,
        )  # fmt: skip
