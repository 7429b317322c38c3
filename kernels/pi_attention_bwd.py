"""Backward kernels for wide bands, which compute scores twice: for dk and dv, and for dq and dgate.

Keys loop over their queries, queries over their keys: every row of a gradient is summed and stored by one
program, without atomics.
"""

import triton
import triton.language as tl

from pi_dist.kernels.gradients import (
    after_dropout,
    delta_of,
    dlogits,
    dlogits_of,
    earlier_sums,
    far_of_keys,
    far_of_queries,
    load_queries,
    no_sums,
    signed_softmax,
    softmax_of,
    store_gate,
)
from pi_dist.kernels.tiles import (
    FULL_STRETCH,
    LOG2E,
    NOWHERE,
    SKIP,
    along_columns,
    band_limits,
    clamped,
    decode,
    earlier_rows,
    first_slot,
    load,
    load_gate,
    load_labels,
    load_rows,
    log2,
    neighbours,
    nothing_in,
    of,
    order_of,
    priors_from,
    priors_of,
    shifted,
    squeezed,
    store,
    store_sum,
    sure,
    tokens,
    zeros,
)


@triton.jit
def _queries_once_kernel(out, dout, gate, delta, log_ring, log_skip, sizes, scores, OPTIONS: tl.constexpr):
    """What both kernels, or many programs, need of queries, [B, T, H]: delta, and the base-2 log-priors.

    delta is the sum over D of out·dout, times the scale.
    """
    tile, head, batch = decode(sizes, True)
    order = order_of(sizes.q_len, sizes.shift, sizes.q_len, sizes.k_len, 1, OPTIONS)
    start = first_slot(tile, OPTIONS.block_m, OPTIONS)
    mine = tokens(order.low, start, tl.arange(0, OPTIONS.block_m), order, sizes.q_len, OPTIONS)  # [M]
    out_rows = load_rows(of(out, batch, head), mine, OPTIONS)
    dout_rows = load_rows(of(dout, batch, head), mine, OPTIONS)
    store(of(delta, batch, head), mine, delta_of(out_rows, dout_rows, scores))
    if OPTIONS.has_gate:
        alpha = squeezed(load_gate(of(gate, batch, head), mine, OPTIONS), OPTIONS)
        store(of(log_ring, batch, head), mine, log2(alpha, OPTIONS))
        store(of(log_skip, batch, head), mine, log2(1 - alpha, OPTIONS))


@triton.jit
def _queries_of_keys(
    q, dout, those, delta, lse, log_ring, log_skip, q_labels, scores, dropout, batch, head,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """As `load_queries`, for programs that own keys: α is not known."""
    origin = load(lse, those, 0.0) * LOG2E
    if OPTIONS.has_gate:
        ring, skip = load(log_ring, those, 0.0), load(log_skip, those, 0.0)
        priors = priors_from(ring, skip, origin, origin, scores)
    else:
        priors = priors_from(0.0, 0.0, origin, origin, scores)
    return load_queries(
        q, load_rows(dout, those, OPTIONS), those, load(delta, those, 0.0), priors, q_labels, dropout, batch,
        head, OPTIONS,
    )  # fmt: skip


@triton.jit
def _keys_tile(
    dk, dv, k_rows, v_rows, keys, k_labels, queries, t, order, scores, dropout, stride, FULL: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a tile of keys what queries in slots t give them; FULL: all of them do."""
    steps = tl.arange(0, OPTIONS.block_m)
    x = tl.dot(k_rows, tl.trans(queries.q), input_precision="ieee")  # [M keys, N queries]
    ok, ring = neighbours(
        tl.where(queries.tokens.ok, t, NOWHERE)[None, :], tl.where(keys.ok, steps, -NOWHERE)[:, None],
        queries.tokens.place[None, :], order, scores, stride, OPTIONS,
    )  # fmt: skip
    if FULL:
        ok = ring | True
    if OPTIONS.has_labels:
        ok = ok & (k_labels[:, None] == queries.labels[None, :]) & (queries.labels >= 0)[None, :]
    x, unclamped = clamped(x, ring, along_columns(queries.priors), scores, OPTIONS)
    signed = signed_softmax(x, unclamped, ok, OPTIONS)
    offset = (t[None, :] - steps[:, None]).to(tl.int64) * order.step
    dropped = after_dropout(signed, queries.hashed[None, :], offset, dropout, OPTIONS)
    dv = tl.dot(dropped.to(queries.dout.dtype), queries.dout, dv, input_precision="ieee")
    dp = tl.dot(v_rows, tl.trans(queries.dout), input_precision="ieee")
    passed, _, _ = dlogits(signed, dropped, dp, queries.delta[None, :], scores, OPTIONS)
    dk = tl.dot(passed.to(queries.q.dtype), queries.q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["sizes", "scores", "dropout", "first_share"])
def _keys_kernel(
    q, k, v, q_labels, k_labels, delta, lse, dout, log_ring, log_skip, dk, dv, strides_ptr, kv_heads_ptr,
    sizes, scores, dropout, first_share, OPTIONS: tl.constexpr,
):  # fmt: skip
    """dk and dv of block_m keys, summed over `shares` query heads; num_heads counts the keys' heads."""
    tile, k_head, batch = decode(sizes, OPTIONS.heads_first)
    head = tl.load(kv_heads_ptr + k_head) * OPTIONS.share + first_share
    stride = scores.stride + tile * 0  # a tensor even if it is 1
    if not OPTIONS.uniform:
        stride = tl.load(strides_ptr + head)
    order = order_of(sizes.k_len, sizes.shift, sizes.q_len, sizes.k_len, stride, OPTIONS)
    start = first_slot(tile, OPTIONS.block_m, OPTIONS)
    if nothing_in(start, order, scores, OPTIONS):
        return
    first = order.low  # the key in slot 0
    if OPTIONS.kind == SKIP:
        first += sizes.shift
    mine = tokens(first, start, tl.arange(0, OPTIONS.block_m), order, sizes.k_len, OPTIONS)  # [M]
    k_rows = load_rows(of(k, batch, k_head), mine, OPTIONS)
    v_rows = load_rows(of(v, batch, k_head), mine, OPTIONS)
    label = load_labels(of(k_labels, batch, 0), mine, OPTIONS)
    q_labels = of(q_labels, batch, 0)
    dk, dv = of(dk, batch, k_head), of(dv, batch, k_head)
    dk_rows, dv_rows = zeros(OPTIONS, True), zeros(OPTIONS, True)
    first -= sizes.shift  # the query in slot 0
    limits = band_limits(start, first, sizes.q_len, order, OPTIONS.right, OPTIONS.left, OPTIONS)
    for share in range(OPTIONS.shares):
        this = head + share
        if not OPTIONS.uniform:
            stride = tl.load(strides_ptr + this)
        q_part, dout_part = of(q, batch, this), of(dout, batch, this)
        lse_part, delta_part = of(lse, batch, this), of(delta, batch, this)
        ring_part, skip_part = of(log_ring, batch, this), of(log_skip, batch, this)
        for stretch in tl.static_range(1 if OPTIONS.one_stretch else 3):
            for block in range(limits[stretch], limits[stretch + 1], OPTIONS.block_n):
                t = block + tl.arange(0, OPTIONS.block_n)
                those = sure(tokens(first, start, t, order, sizes.q_len, OPTIONS), stretch == FULL_STRETCH)
                queries = _queries_of_keys(
                    q_part, dout_part, those, delta_part, lse_part, ring_part, skip_part, q_labels, scores,
                    dropout, batch, this, OPTIONS,
                )  # fmt: skip
                dk_rows, dv_rows = _keys_tile(
                    dk_rows, dv_rows, k_rows, v_rows, mine, label, queries, t, order, scores, dropout, stride,
                    stretch == FULL_STRETCH, OPTIONS,
                )  # fmt: skip
        for m in tl.static_range(1, OPTIONS.shifts + 1):
            for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
                offset = m * stride if side == 0 else -m * stride
                queries = _queries_of_keys(
                    q_part, dout_part, shifted(mine, offset - sizes.shift, sizes.q_len), delta_part, lse_part,
                    ring_part, skip_part, q_labels, scores, dropout, batch, this, OPTIONS,
                )  # fmt: skip
                dk_rows, dv_rows = far_of_keys(
                    dk_rows, dv_rows, queries, k_rows, v_rows, label, offset, scores, dropout, OPTIONS
                )
    store_sum(dk, mine, dk_rows, earlier_rows(dk, mine, OPTIONS), OPTIONS)
    store_sum(dv, mine, dv_rows, earlier_rows(dv, mine, OPTIONS), OPTIONS)


@triton.jit(do_not_specialize=["sizes", "scores", "dropout", "first_share"])
def _queries_kernel(
    q, k, v, q_labels, k_labels, delta, lse, dout, gate, dq, dgate, weight, residual, strides_ptr,
    kv_heads_ptr, sizes, scores, dropout, first_share, OPTIONS: tl.constexpr,
):  # fmt: skip
    """dq and dgate of block_m queries of one head; num_heads counts `shares` of them a head of the keys."""
    tile, slot, batch = decode(sizes, OPTIONS.heads_first)
    k_head = slot // OPTIONS.shares
    head = tl.load(kv_heads_ptr + k_head) * OPTIONS.share + first_share + slot % OPTIONS.shares
    stride = scores.stride + tile * 0  # a tensor even if it is 1
    if not OPTIONS.uniform:
        stride = tl.load(strides_ptr + head)
    order = order_of(sizes.q_len, sizes.shift, sizes.q_len, sizes.k_len, stride, OPTIONS)
    start = first_slot(tile, OPTIONS.block_m, OPTIONS)
    if nothing_in(start, order, scores, OPTIONS):
        return
    mine = tokens(order.low, start, tl.arange(0, OPTIONS.block_m), order, sizes.q_len, OPTIONS)  # [M]
    origin = load(of(lse, batch, head), mine, 0.0) * LOG2E
    queries = load_queries(
        of(q, batch, head), load_rows(of(dout, batch, head), mine, OPTIONS), mine,
        load(of(delta, batch, head), mine, 0.0),
        priors_of(load_gate(of(gate, batch, head), mine, OPTIONS), origin, scores, OPTIONS),
        of(q_labels, batch, 0), dropout, batch, head, OPTIONS,
    )  # fmt: skip
    k, v, k_labels = of(k, batch, k_head), of(v, batch, k_head), of(k_labels, batch, 0)
    steps = tl.arange(0, OPTIONS.block_m)
    dq = of(dq, batch, head)
    dgate, weight, residual = of(dgate, batch, head), of(weight, batch, head), of(residual, batch, head)
    earlier = earlier_sums(dgate, weight, residual, mine, OPTIONS)
    dq_rows = zeros(OPTIONS, True)
    sums = no_sums(OPTIONS)
    first = order.low + sizes.shift  # the key in slot 0
    limits = band_limits(start, first, sizes.k_len, order, OPTIONS.left, OPTIONS.right, OPTIONS)
    for stretch in tl.static_range(1 if OPTIONS.one_stretch else 3):
        for block in range(limits[stretch], limits[stretch + 1], OPTIONS.block_n):
            u = block + tl.arange(0, OPTIONS.block_n)
            keys = sure(tokens(first, start, u, order, sizes.k_len, OPTIONS), stretch == FULL_STRETCH)
            k_rows = load_rows(k, keys, OPTIONS)
            v_rows = load_rows(v, keys, OPTIONS)
            pairs = softmax_of(
                queries, steps, k_rows, keys, u, load_labels(k_labels, keys, OPTIONS), order, scores, dropout,
                stride, stretch == FULL_STRETCH, OPTIONS,
            )  # fmt: skip
            passed, sums = dlogits_of(pairs, queries, v_rows, sums, scores, OPTIONS)
            dq_rows = tl.dot(passed, k_rows, dq_rows, input_precision="ieee")
    dq_rows, sums = far_of_queries(
        dq_rows, sums, queries, k, v, k_labels, stride, sizes, scores, dropout, OPTIONS
    )
    store_sum(dq, mine, dq_rows, earlier_rows(dq, mine, OPTIONS), OPTIONS)
    store_gate(dgate, weight, residual, mine, sums, earlier, scores, OPTIONS)
