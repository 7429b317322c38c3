"""Backward kernels for narrow bands: dq, dk, dv and dgate in one launch, delta on the way.

Every row of a gradient is summed and stored by one program, without atomics, in two ways:

- One tile: block_m queries and the block_m keys around them give the gradients of the rows whose whole
  neighbourhood lies inside. Little is computed twice where the band is far narrower than the tile.
- A walk: a program goes from tile to tile of block_m tokens. A band of up to block_m steps back reaches from
  a tile into the one before, so dk and dv of a tile are whole one step after its dq, and nothing is computed
  twice but where a walk begins. Rows of the next step are loaded during this one.
"""

import triton
import triton.language as tl

from pi_dist.kernels.gradients import (
    delta_of,
    dlogits_of,
    earlier_sums,
    far_of_keys,
    far_of_queries,
    load_queries,
    no_sums,
    softmax_of,
    store_gate,
)
from pi_dist.kernels.tiles import (
    LOG2E,
    SKIP,
    Tokens,
    decode,
    earlier_rows,
    first_slot,
    load,
    load_gate,
    load_labels,
    load_rows,
    nothing_in,
    of,
    order_of,
    priors_of,
    shifted,
    store_sum,
    tokens,
    zeros,
)


@triton.jit
def _where(those, condition):
    """The tokens for which the condition holds too."""
    return Tokens(those.start, those.offset, those.ok & condition, those.place)


@triton.jit
def _load_queries(
    q, out, dout, those, lse, gate, q_labels, scores, dropout, batch, head, OPTIONS: tl.constexpr
):
    """As `load_queries`, delta computed from out."""
    dout_rows = load_rows(dout, those, OPTIONS)
    delta = delta_of(load_rows(out, those, OPTIONS), dout_rows, scores)
    priors = priors_of(load_gate(gate, those, OPTIONS), load(lse, those, 0.0) * LOG2E, scores, OPTIONS)
    return load_queries(q, dout_rows, those, delta, priors, q_labels, dropout, batch, head, OPTIONS)


@triton.jit
def _tile(
    start, order, batch, k_head, q, k, v, gate, q_labels, k_labels, out, lse, dout, strides_ptr, dq, dk, dv,
    dgate, weight, residual, sizes, scores, dropout, OPTIONS: tl.constexpr,
):  # fmt: skip
    """All gradients of block_m - left - right tokens from slot `start` on.

    Queries begin `right` slots before these tokens, keys `left` before them: so the tile holds all queries of
    these keys and all keys of these queries.
    """
    OWN: tl.constexpr = OPTIONS.block_m - OPTIONS.left - OPTIONS.right
    steps = tl.arange(0, OPTIONS.block_m)
    t, u = steps - OPTIONS.right, steps - OPTIONS.left
    mine = tokens(order.low, start - OPTIONS.right, steps, order, sizes.q_len, OPTIONS)  # [M]
    keys = tokens(order.low, start - OPTIONS.left, steps, order, sizes.k_len, OPTIONS)  # [M]
    own_queries, own_keys = _where(mine, (t >= 0) & (t < OWN)), _where(keys, (u >= 0) & (u < OWN))
    k, v = of(k, batch, k_head), of(v, batch, k_head)
    dk, dv = of(dk, batch, k_head), of(dv, batch, k_head)
    k_rows, v_rows = load_rows(k, keys, OPTIONS), load_rows(v, keys, OPTIONS)
    q_labels, k_labels = of(q_labels, batch, 0), of(k_labels, batch, 0)
    k_label = load_labels(k_labels, keys, OPTIONS)
    dk_before, dv_before = earlier_rows(dk, own_keys, OPTIONS), earlier_rows(dv, own_keys, OPTIONS)
    dk_rows, dv_rows = zeros(OPTIONS, True), zeros(OPTIONS, True)
    for share in range(OPTIONS.share):
        head = k_head * OPTIONS.share + share
        stride = scores.stride + k_head * 0  # a tensor even if it is 1
        if not OPTIONS.uniform:
            stride = tl.load(strides_ptr + head)
        q_part, dout_part, out_part = of(q, batch, head), of(dout, batch, head), of(out, batch, head)
        lse_part, gate_part, dq_part = of(lse, batch, head), of(gate, batch, head), of(dq, batch, head)
        gate_parts = of(dgate, batch, head), of(weight, batch, head), of(residual, batch, head)
        sums_before = earlier_sums(*gate_parts, own_queries, OPTIONS)
        queries = _load_queries(
            q_part, out_part, dout_part, mine, lse_part, gate_part, q_labels, scores, dropout, batch, head,
            OPTIONS,
        )  # fmt: skip
        pairs = softmax_of(
            queries, t, k_rows, keys, u, k_label, order, scores, dropout, stride, False, OPTIONS
        )
        # one gradient after the other, each stored as soon as it is whole: three accumulators would not fit
        dropped = pairs.dropped.to(queries.dout.dtype)
        dv_rows = tl.dot(tl.trans(dropped), queries.dout, dv_rows, input_precision="ieee")
        if OPTIONS.shifts == 0 and OPTIONS.share == 1:
            store_sum(dv, own_keys, dv_rows, dv_before, OPTIONS)
        dq_before = earlier_rows(dq_part, own_queries, OPTIONS)
        passed, sums = dlogits_of(pairs, queries, v_rows, no_sums(OPTIONS), scores, OPTIONS)
        dk_rows = tl.dot(tl.trans(passed), queries.q, dk_rows, input_precision="ieee")
        for m in tl.static_range(1, OPTIONS.shifts + 1):
            for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
                offset = m * stride if side == 0 else -m * stride
                far = _load_queries(
                    q_part, out_part, dout_part, shifted(own_keys, offset, sizes.q_len), lse_part, gate_part,
                    q_labels, scores, dropout, batch, head, OPTIONS,
                )  # fmt: skip
                dk_rows, dv_rows = far_of_keys(
                    dk_rows, dv_rows, far, k_rows, v_rows, k_label, offset, scores, dropout, OPTIONS
                )
        if OPTIONS.share == 1:
            if OPTIONS.shifts > 0:
                store_sum(dv, own_keys, dv_rows, dv_before, OPTIONS)
            store_sum(dk, own_keys, dk_rows, dk_before, OPTIONS)
        dq_rows = tl.dot(passed, k_rows, input_precision="ieee")
        dq_rows, sums = far_of_queries(
            dq_rows, sums, queries, k, v, k_labels, stride, sizes, scores, dropout, OPTIONS
        )
        store_sum(dq_part, own_queries, dq_rows, dq_before, OPTIONS)
        store_gate(*gate_parts, own_queries, sums, sums_before, scores, OPTIONS)
    if OPTIONS.share > 1:
        store_sum(dk, own_keys, dk_rows, dk_before, OPTIONS)
        store_sum(dv, own_keys, dv_rows, dv_before, OPTIONS)


@triton.jit
def _walk(
    start, order, batch, head, q, k, v, gate, q_labels, k_labels, out, lse, dout, dq, dk, dv, dgate, weight,
    residual, sizes, scores, dropout, stride, OPTIONS: tl.constexpr,
):  # fmt: skip
    """All gradients of block_n tokens from slot `start` on, of one batch row and head.

    A step adds the queries of a tile to dk and dv of the tile before and stores those, then begins dk and dv
    of its own. The walk owns neither the tile before its first nor that after its last.
    """
    TILES: tl.constexpr = OPTIONS.block_n // OPTIONS.block_m
    steps = tl.arange(0, OPTIONS.block_m)
    dk_rows = zeros(OPTIONS, True)
    dv_rows = zeros(OPTIONS, True)
    mine = tokens(order.low, start, steps, order, sizes.q_len, OPTIONS)  # [M]
    lse_ahead, gate_ahead = load(lse, mine, 0.0), load_gate(gate, mine, OPTIONS)
    for number in range(TILES + 1):
        here = start + number * OPTIONS.block_m
        mine = tokens(order.low, here, steps, order, sizes.q_len, OPTIONS)  # [M]
        before = tokens(order.low, here - OPTIONS.block_m, steps, order, sizes.k_len, OPTIONS)
        after = tokens(order.low, here + OPTIONS.block_m, steps, order, sizes.k_len, OPTIONS)
        lse_here, gate_here = lse_ahead, gate_ahead
        lse_ahead, gate_ahead = load(lse, after, 0.0), load_gate(gate, after, OPTIONS)
        k_before, v_before = load_rows(k, before, OPTIONS), load_rows(v, before, OPTIONS)
        k_rows, v_rows = load_rows(k, mine, OPTIONS), load_rows(v, mine, OPTIONS)
        dout_rows = load_rows(dout, mine, OPTIONS)
        delta = delta_of(load_rows(out, mine, OPTIONS), dout_rows, scores)
        priors = priors_of(gate_here, lse_here * LOG2E, scores, OPTIONS)
        queries = load_queries(q, dout_rows, mine, delta, priors, q_labels, dropout, batch, head, OPTIONS)
        own, own_before = _where(mine, number < TILES), _where(before, number > 0)
        sums_before = earlier_sums(dgate, weight, residual, own, OPTIONS)
        dk_before, dv_before = earlier_rows(dk, own_before, OPTIONS), earlier_rows(dv, own_before, OPTIONS)
        dq_before = earlier_rows(dq, own, OPTIONS)
        pairs = softmax_of(
            queries, steps, k_before, before, steps - OPTIONS.block_m, load_labels(k_labels, before, OPTIONS),
            order, scores, dropout, stride, False, OPTIONS,
        )  # fmt: skip
        dropped = pairs.dropped.to(dout_rows.dtype)
        dv_rows = tl.dot(tl.trans(dropped), dout_rows, dv_rows, input_precision="ieee")
        store_sum(dv, own_before, dv_rows, dv_before, OPTIONS)
        passed, sums = dlogits_of(pairs, queries, v_before, no_sums(OPTIONS), scores, OPTIONS)
        dk_rows = tl.dot(tl.trans(passed), queries.q, dk_rows, input_precision="ieee")
        store_sum(dk, own_before, dk_rows, dk_before, OPTIONS)
        dq_rows = tl.dot(passed, k_before, input_precision="ieee")
        pairs = softmax_of(
            queries, steps, k_rows, mine, steps, load_labels(k_labels, mine, OPTIONS), order, scores, dropout,
            stride, False, OPTIONS,
        )  # fmt: skip
        dropped = pairs.dropped.to(dout_rows.dtype)
        dv_rows = tl.dot(tl.trans(dropped), dout_rows, input_precision="ieee")
        passed, sums = dlogits_of(pairs, queries, v_rows, sums, scores, OPTIONS)
        dk_rows = tl.dot(tl.trans(passed), queries.q, input_precision="ieee")
        dq_rows = tl.dot(passed, k_rows, dq_rows, input_precision="ieee")
        store_sum(dq, own, dq_rows, dq_before, OPTIONS)
        store_gate(dgate, weight, residual, own, sums, sums_before, scores, OPTIONS)


@triton.jit(do_not_specialize=["sizes", "scores", "dropout"])
def _fused_kernel(
    q, k, v, gate, q_labels, k_labels, out, lse, dout, dq, dk, dv, dgate, weight, residual, strides_ptr,
    kv_heads_ptr, sizes, scores, dropout, OPTIONS: tl.constexpr,
):  # fmt: skip
    """All gradients, for queries and keys in the same tensor; num_heads counts the keys' heads.

    A walk is for causal bands without far skips, and keys with one query head each. With kind SKIP, the query
    heads of one of the keys' heads have one stride.
    """
    tile, k_head, batch = decode(sizes, OPTIONS.heads_first)
    stride = scores.stride + tile * 0  # a tensor even if it is 1
    if OPTIONS.kind == SKIP and not OPTIONS.uniform:
        stride = tl.load(strides_ptr + k_head * OPTIONS.share)
    order = order_of(sizes.q_len, sizes.shift, sizes.q_len, sizes.k_len, stride, OPTIONS)
    if OPTIONS.walk:
        start = first_slot(tile, OPTIONS.block_n, OPTIONS)
        if not nothing_in(start, order, scores, OPTIONS):
            _walk(
                start, order, batch, k_head, of(q, batch, k_head), of(k, batch, k_head), of(v, batch, k_head),
                of(gate, batch, k_head), of(q_labels, batch, 0), of(k_labels, batch, 0),
                of(out, batch, k_head), of(lse, batch, k_head), of(dout, batch, k_head),
                of(dq, batch, k_head), of(dk, batch, k_head), of(dv, batch, k_head),
                of(dgate, batch, k_head), of(weight, batch, k_head), of(residual, batch, k_head), sizes,
                scores, dropout, stride, OPTIONS,
            )  # fmt: skip
    else:
        start = first_slot(tile, OPTIONS.block_m - OPTIONS.left - OPTIONS.right, OPTIONS)
        if not nothing_in(start, order, scores, OPTIONS):
            _tile(
                start, order, batch, k_head, q, k, v, gate, q_labels, k_labels, out, lse, dout, strides_ptr,
                dq, dk, dv, dgate, weight, residual, sizes, scores, dropout, OPTIONS,
            )  # fmt: skip
