"""Forward kernel: one program gives block_m queries of one head their softmax over one band of keys."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pi_dist.kernels.tiles import (
    FULL_STRETCH,
    LOG2E,
    NOWHERE,
    along_rows,
    band_limits,
    clamped,
    decode,
    first_slot,
    keep,
    load,
    load_gate,
    load_labels,
    load_rows,
    log2,
    neighbours,
    nothing_in,
    of,
    of_skips,
    order_of,
    priors_of,
    query_hash,
    shifted,
    store,
    store_rows,
    sure,
    tokens,
    zeros,
)

FAR_BELOW = tl.constexpr(-1e30)  # any logit


class Queries(NamedTuple):
    """What a program knows of its queries: [M, D] rows and [M] values."""

    rows: Any
    tokens: Any
    labels: Any
    priors: Any
    hashed: Any


class Softmax(NamedTuple):
    """A running softmax in base 2: Σ p·v [M, D], Σ p [M] and the maximum that p is relative to [M]."""

    acc: Any
    total: Any
    top: Any


@triton.jit
def _raise_top(x_top, softmax, OPTIONS: tl.constexpr):
    """Rescale to a maximum that covers x_top [M]."""
    if OPTIONS.fixed_top:
        return softmax
    else:
        top = tl.maximum(softmax.top, x_top)
        top = tl.maximum(top, FAR_BELOW)  # a row without neighbours so far must not become NaN
        rescale = tl.exp2(softmax.top - top)
        return Softmax(softmax.acc * rescale[:, None], softmax.total * rescale, top)


class Keys(NamedTuple):
    """What a program knows of keys: [N, D] rows and [N] values; slots count from the tile's first."""

    k: Any
    v: Any
    tokens: Any
    labels: Any
    slots: Any


@triton.jit
def _load_keys(
    k, v, k_labels, sizes, order, start, block, WIDTH: tl.constexpr, FULL: tl.constexpr, OPTIONS: tl.constexpr
):
    """The keys in slots [block, block + WIDTH) from the tile's first; FULL: all of them exist."""
    slots = block + tl.arange(0, WIDTH)
    keys = sure(tokens(order.low + sizes.shift, start, slots, order, sizes.k_len, OPTIONS), FULL)
    k_rows, v_rows = load_rows(k, keys, OPTIONS), load_rows(v, keys, OPTIONS)
    return Keys(k_rows, v_rows, keys, load_labels(k_labels, keys, OPTIONS), slots)


@triton.jit
def _tile(queries, softmax, keys, order, scores, dropout, stride, FULL: tl.constexpr, OPTIONS: tl.constexpr):
    """Add keys; FULL: all are neighbours."""
    slots = tl.arange(0, OPTIONS.block_m)
    x = tl.dot(queries.rows, tl.trans(keys.k), input_precision="ieee")  # [M, N]
    ok, ring = neighbours(
        slots[:, None], tl.where(keys.tokens.ok, keys.slots, -NOWHERE)[None, :],
        queries.tokens.place[:, None], order, scores, stride, OPTIONS,
    )  # fmt: skip
    x, _ = clamped(x, ring, along_rows(queries.priors), scores, OPTIONS)
    if OPTIONS.has_labels:
        same = (queries.labels[:, None] == keys.labels[None, :]) & (queries.labels >= 0)[:, None]
        ok = same if FULL else ok & same
    if OPTIONS.fixed_top:
        p = tl.exp2(x)
        if OPTIONS.has_labels or not FULL:
            p = tl.where(ok, p, 0.0)
    else:
        if OPTIONS.has_labels or not FULL:
            x = tl.where(ok, x, float("-inf"))
        softmax = _raise_top(tl.max(x, 1), softmax, OPTIONS)
        p = tl.exp2(x - softmax.top[:, None])
    total = softmax.total + tl.sum(p, 1)
    if OPTIONS.dropout:
        offset = (slots[:, None] - keys.slots[None, :]).to(tl.int64) * order.step
        p = tl.where(keep(queries.hashed[:, None], offset, dropout), p, 0.0)
    acc = tl.dot(p.to(keys.v.dtype), keys.v, softmax.acc, input_precision="ieee")
    return Softmax(acc, total, softmax.top)


@triton.jit
def _shifted(queries, softmax, k, v, k_labels, sizes, scores, dropout, offset, OPTIONS: tl.constexpr):
    """Add the one key `offset` tokens before each query."""
    keys = shifted(queries.tokens, sizes.shift - offset, sizes.k_len)
    k_rows = load_rows(k, keys, OPTIONS).to(tl.float32)  # [M, D]
    v_rows = load_rows(v, keys, OPTIONS).to(tl.float32)
    offsets = keys.offset.to(tl.int64) * 0 + offset
    ok = keys.ok & (tl.abs(offsets) > scores.window)
    if OPTIONS.has_labels:
        ok = ok & (queries.labels == load_labels(k_labels, keys, OPTIONS)) & (queries.labels >= 0)
    x = tl.sum(queries.rows.to(tl.float32) * k_rows, 1)
    x, _ = clamped(x, ok & False, of_skips(queries.priors), scores, OPTIONS)
    x = tl.where(ok, x, float("-inf"))
    softmax = _raise_top(x, softmax, OPTIONS)
    p = tl.exp2(x) if OPTIONS.fixed_top else tl.exp2(x - softmax.top)
    total = softmax.total + p
    if OPTIONS.dropout:
        p = tl.where(keep(queries.hashed, offsets, dropout), p, 0.0)
    return Softmax(softmax.acc + p[:, None] * v_rows, total, softmax.top)


@triton.jit
def _block(
    start, order, stride, batch, head, q, k, v, gate, q_labels, k_labels, out, lse, sizes, scores, dropout,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """block_m queries of one head from slot `start` on, all tensors being those of the batch row and head."""
    mine = tokens(order.low, start, tl.arange(0, OPTIONS.block_m), order, sizes.q_len, OPTIONS)  # [M]
    top = zeros(OPTIONS, False) + float("-inf")
    origin = zeros(OPTIONS, False)
    if OPTIONS.fixed_top:
        top = origin + scores.cap * LOG2E
        origin = top
    queries = Queries(
        load_rows(q, mine, OPTIONS),
        mine,
        load_labels(q_labels, mine, OPTIONS),
        priors_of(load_gate(gate, mine, OPTIONS), origin, scores, OPTIONS),
        query_hash(dropout, batch, mine, head, OPTIONS),
    )
    if OPTIONS.merge:  # wanted at the end, and under way from here
        before, out_before = load(lse, mine, float("-inf")) * LOG2E, load_rows(out, mine, OPTIONS)
    softmax = Softmax(zeros(OPTIONS, True), zeros(OPTIONS, False), top)
    if OPTIONS.halo > 0:  # all keys are under way before the first is needed
        keys = _load_keys(k, v, k_labels, sizes, order, start, 0, OPTIONS.block_m, False, OPTIONS)
        if OPTIONS.left > 0:
            left = _load_keys(
                k, v, k_labels, sizes, order, start, -OPTIONS.halo, OPTIONS.halo, False, OPTIONS
            )
        if OPTIONS.right > 0:
            right = _load_keys(
                k, v, k_labels, sizes, order, start, OPTIONS.block_m, OPTIONS.halo, False, OPTIONS
            )
    for m in tl.static_range(1, OPTIONS.shifts + 1):
        softmax = _shifted(queries, softmax, k, v, k_labels, sizes, scores, dropout, m * stride, OPTIONS)
        if not OPTIONS.causal:
            softmax = _shifted(queries, softmax, k, v, k_labels, sizes, scores, dropout, -m * stride, OPTIONS)
    if OPTIONS.halo > 0:
        softmax = _tile(queries, softmax, keys, order, scores, dropout, stride, False, OPTIONS)
        if OPTIONS.left > 0:
            softmax = _tile(queries, softmax, left, order, scores, dropout, stride, False, OPTIONS)
        if OPTIONS.right > 0:
            softmax = _tile(queries, softmax, right, order, scores, dropout, stride, False, OPTIONS)
    else:
        limits = band_limits(
            start, order.low + sizes.shift, sizes.k_len, order, OPTIONS.left, OPTIONS.right, OPTIONS
        )
        for stretch in tl.static_range(1 if OPTIONS.one_stretch else 3):
            for block in range(limits[stretch], limits[stretch + 1], OPTIONS.block_n):
                full: tl.constexpr = stretch == FULL_STRETCH
                keys = _load_keys(k, v, k_labels, sizes, order, start, block, OPTIONS.block_n, full, OPTIONS)
                softmax = _tile(queries, softmax, keys, order, scores, dropout, stride, full, OPTIONS)

    acc = softmax.acc
    if OPTIONS.dropout:
        acc *= dropout.keep_scale
    if OPTIONS.merge:
        softmax = _raise_top(before, Softmax(acc, softmax.total, softmax.top), OPTIONS)
        share = tl.exp2(before - softmax.top)
        acc = softmax.acc + out_before.to(tl.float32) * share[:, None]
        softmax = Softmax(acc, softmax.total + share, softmax.top)
    empty = softmax.total == 0.0
    total = tl.where(empty, 1.0, softmax.total)
    store_rows(out, mine, acc * (1 / total)[:, None], OPTIONS)
    store(lse, mine, tl.where(empty, float("-inf"), (softmax.top + log2(total, OPTIONS)) / LOG2E))


@triton.jit(do_not_specialize=["sizes", "scores", "dropout"])
def _pi_attention_fwd_kernel(
    q, k, v, gate, q_labels, k_labels, out, lse, strides_ptr, kv_heads_ptr, sizes, scores, dropout,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """out and lse of block_m queries of one head."""
    tile, slot, batch = decode(sizes, OPTIONS.heads_first)
    k_head = slot // OPTIONS.share  # among the heads of the keys given
    head = tl.load(kv_heads_ptr + k_head) * OPTIONS.share + slot % OPTIONS.share
    stride = scores.stride + tile * 0  # a tensor even if it is 1
    if not OPTIONS.uniform:
        stride = tl.load(strides_ptr + head)
    order = order_of(sizes.q_len, sizes.shift, sizes.q_len, sizes.k_len, stride, OPTIONS)
    start = first_slot(tile, OPTIONS.block_m, OPTIONS)
    if not nothing_in(start, order, scores, OPTIONS):
        _block(
            start, order, stride, batch, head, of(q, batch, head), of(k, batch, k_head), of(v, batch, k_head),
            of(gate, batch, head), of(q_labels, batch, 0), of(k_labels, batch, 0), of(out, batch, head),
            of(lse, batch, head), sizes, scores, dropout, OPTIONS,
        )  # fmt: skip
