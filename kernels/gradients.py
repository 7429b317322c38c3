"""What the backward kernels share: the gradients of a tile of pairs, of far skips, of the gate.

With P the probabilities after dropout and delta = Σ out·dout, `dl = P·(dout·v) - softmax·delta`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pi_dist.kernels.tiles import (
    NOWHERE,
    RING,
    SKIP,
    along_rows,
    clamped,
    keep,
    load,
    load_labels,
    load_rows,
    neighbours,
    of_skips,
    query_hash,
    shifted,
    store,
    zeros,
)


class Queries(NamedTuple):
    """What a program knows of queries: q and dout [M, D], values [M]; delta is times the scale."""

    q: Any
    dout: Any
    tokens: Any
    labels: Any
    delta: Any
    priors: Any
    hashed: Any


class GateSums(NamedTuple):
    """Sums [M] over a query's neighbours, with c = 1/α on ring and -1/(1-α) on skip targets.

    dl: of c times the dlogits. weight: of c times the softmax. Both where the clamp passes. residual: of the
    dlogits before the clamp; it would be 0 if delta were exact. All dlogits times the scale.
    """

    dl: Any
    weight: Any
    residual: Any


@triton.jit
def no_sums(OPTIONS: tl.constexpr):
    return GateSums(zeros(OPTIONS, False), zeros(OPTIONS, False), zeros(OPTIONS, False))


@triton.jit
def delta_of(out_rows, dout_rows, scores):
    """delta [M] times the scale."""
    return tl.sum(out_rows.to(tl.float32) * dout_rows.to(tl.float32), 1) * scores.scale


@triton.jit
def load_queries(q, dout_rows, tokens, delta, priors, q_labels, dropout, batch, head, OPTIONS: tl.constexpr):
    """Queries, from q and labels of one batch row and head; dout's rows, delta and priors are at hand."""
    return Queries(
        load_rows(q, tokens, OPTIONS),
        dout_rows,
        tokens,
        load_labels(q_labels, tokens, OPTIONS),
        delta,
        priors,
        query_hash(dropout, batch, tokens, head, OPTIONS),
    )


@triton.jit
def signed_softmax(x, unclamped, ok, OPTIONS: tl.constexpr):
    """The softmax, negative where the clamp lets no gradient pass: one tensor for what would be two.

    x and unclamped are logits in base 2 less the query's lse.
    """
    p = tl.where(ok, tl.exp2(x), 0.0)
    if OPTIONS.has_cap:
        p = tl.where(x == unclamped, p, -p)
    return p


@triton.jit
def after_dropout(signed, hashed, offset, dropout, OPTIONS: tl.constexpr):
    """P after dropout, from the signed softmax."""
    p = tl.abs(signed) if OPTIONS.has_cap else signed
    if OPTIONS.dropout:
        p = tl.where(keep(hashed, offset, dropout), p * dropout.keep_scale, 0.0)
    return p


@triton.jit
def dlogits(signed, dropped, dp, delta, scores, OPTIONS: tl.constexpr):
    """(dlogits, softmax where the clamp passes, dlogits before the clamp); dlogits and delta times the scale.

    signed: the softmax as in `signed_softmax`. dropped: P after dropout.
    """
    passes = tl.maximum(signed, 0.0) if OPTIONS.has_cap else signed
    if OPTIONS.dropout:
        dl = dropped * (dp * scores.scale) - tl.abs(signed) * delta
        passed = tl.where(signed >= 0.0, dl, 0.0)
    else:
        slope = dp * scores.scale - delta
        dl = (tl.abs(signed) if OPTIONS.has_cap else signed) * slope
        passed = passes * slope
    return passed, passes, dl


@triton.jit
def _add_sums(sums, passed, weight, dl, ring, alpha, OPTIONS: tl.constexpr):
    """Add a tile [M, N] to the gate's sums."""
    if OPTIONS.has_gate:
        residual = sums.residual + tl.sum(dl, 1)
        if OPTIONS.kind == RING or OPTIONS.kind == SKIP:
            c = 1 / alpha if OPTIONS.kind == RING else -1 / (1 - alpha)
            return GateSums(sums.dl + c * tl.sum(passed, 1), sums.weight + c * tl.sum(weight, 1), residual)
        else:
            c = tl.where(ring, (1 / alpha)[:, None], (-1 / (1 - alpha))[:, None])
            return GateSums(sums.dl + tl.sum(c * passed, 1), sums.weight + tl.sum(c * weight, 1), residual)
    else:
        return sums


class Pairs(NamedTuple):
    """Of pairs [M queries, N keys]: the softmax as in `signed_softmax`, P after dropout, who is ring."""

    signed: Any
    dropped: Any
    ring: Any


@triton.jit
def softmax_of(
    queries, t, k_rows, keys, u, k_labels, order, scores, dropout, stride, FULL: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Pairs of queries in slots t and keys in slots u, labelled k_labels; FULL: all are neighbours."""
    x = tl.dot(queries.q, tl.trans(k_rows), input_precision="ieee")  # [M, N]
    ok, ring = neighbours(
        tl.where(queries.tokens.ok, t, NOWHERE)[:, None], tl.where(keys.ok, u, -NOWHERE)[None, :],
        queries.tokens.place[:, None], order, scores, stride, OPTIONS,
    )  # fmt: skip
    if FULL:
        ok = ring | True
    if OPTIONS.has_labels:
        same = queries.labels[:, None] == k_labels[None, :]
        ok = ok & same & (queries.labels >= 0)[:, None]
    x, unclamped = clamped(x, ring, along_rows(queries.priors), scores, OPTIONS)
    signed = signed_softmax(x, unclamped, ok, OPTIONS)
    offset = (t[:, None] - u[None, :]).to(tl.int64) * order.step
    return Pairs(signed, after_dropout(signed, queries.hashed[:, None], offset, dropout, OPTIONS), ring)


@triton.jit
def dlogits_of(pairs, queries, v_rows, sums, scores, OPTIONS: tl.constexpr):
    """(dlogits times the scale, as q's dtype; the gate's sums) of a tile of pairs."""
    dp = tl.dot(queries.dout, tl.trans(v_rows), input_precision="ieee")
    passed, weight, dl = dlogits(pairs.signed, pairs.dropped, dp, queries.delta[:, None], scores, OPTIONS)
    sums = _add_sums(sums, passed, weight, dl, pairs.ring, queries.priors.alpha, OPTIONS)
    return passed.to(queries.q.dtype), sums


@triton.jit
def _far_pairs(queries, ok, k_rows, v_rows, k_labels, offset, scores, dropout, OPTIONS: tl.constexpr):
    """(P after dropout, and as `dlogits`), [M], of one pair a row, `offset` tokens apart."""
    x = tl.sum(queries.q.to(tl.float32) * k_rows.to(tl.float32), 1)
    dp = tl.sum(queries.dout.to(tl.float32) * v_rows.to(tl.float32), 1)
    offsets = queries.tokens.offset.to(tl.int64) * 0 + offset
    ok = ok & (tl.abs(offsets) > scores.window)
    if OPTIONS.has_labels:
        ok = ok & (queries.labels == k_labels) & (queries.labels >= 0)
    x, unclamped = clamped(x, ok & False, of_skips(queries.priors), scores, OPTIONS)
    signed = signed_softmax(x, unclamped, ok, OPTIONS)
    dropped = after_dropout(signed, queries.hashed, offsets, dropout, OPTIONS)
    passed, weight, dl = dlogits(signed, dropped, dp, queries.delta, scores, OPTIONS)
    return dropped, passed, weight, dl


@triton.jit
def far_of_keys(dk, dv, queries, k_rows, v_rows, k_labels, offset, scores, dropout, OPTIONS: tl.constexpr):
    """Add to dk and dv what `queries`, `offset` tokens after the keys, give them."""
    dropped, passed, _, _ = _far_pairs(
        queries, queries.tokens.ok, k_rows, v_rows, k_labels, offset, scores, dropout, OPTIONS
    )
    dk += passed[:, None] * queries.q.to(tl.float32)
    dv += dropped[:, None] * queries.dout.to(tl.float32)
    return dk, dv


@triton.jit
def far_of_queries(dq, sums, queries, k, v, k_labels, stride, sizes, scores, dropout, OPTIONS: tl.constexpr):
    """Add to dq and the gate's sums what the far skips give the queries."""
    for m in tl.static_range(1, OPTIONS.shifts + 1):
        for side in tl.static_range(0, 1 if OPTIONS.causal else 2):
            offset = m * stride if side == 0 else -m * stride
            dq, sums = _far_of_queries(
                dq, sums, queries, k, v, k_labels, offset, sizes, scores, dropout, OPTIONS
            )
    return dq, sums


@triton.jit
def _far_of_queries(dq, sums, queries, k, v, k_labels, offset, sizes, scores, dropout, OPTIONS: tl.constexpr):
    """What the keys `offset` tokens before the queries give them."""
    keys = shifted(queries.tokens, sizes.shift - offset, sizes.k_len)
    k_rows, v_rows = load_rows(k, keys, OPTIONS), load_rows(v, keys, OPTIONS)
    _, passed, weight, dl = _far_pairs(
        queries, keys.ok, k_rows, v_rows, load_labels(k_labels, keys, OPTIONS), offset, scores, dropout,
        OPTIONS,
    )  # fmt: skip
    if OPTIONS.has_gate:
        by_skip = -1 / (1 - queries.priors.alpha)
        sums = GateSums(sums.dl + by_skip * passed, sums.weight + by_skip * weight, sums.residual + dl)
    return dq + passed[:, None] * k_rows.to(tl.float32), sums


@triton.jit
def earlier_sums(dgate, weight, residual, queries, OPTIONS: tl.constexpr):
    """What earlier launches of the same gradient stored, for `store_gate`."""
    if OPTIONS.has_gate and OPTIONS.parts and OPTIONS.merge:
        return GateSums(load(dgate, queries, 0.0), load(weight, queries, 0.0), load(residual, queries, 0.0))
    else:
        return no_sums(OPTIONS)


@triton.jit
def store_gate(dgate, weight, residual, queries, sums, earlier, scores, OPTIONS: tl.constexpr):
    """dα of queries, or, where several launches make one gradient, its parts: dα = dgate - residual·weight.

    `dα / (1-2ε) = Σ_ring dl / α - Σ_skip dl / (1-α)`. The rounding of delta adds e times the softmax to every
    dl, and e = residual: it is taken out here, because the two sums nearly cancel.
    """
    if OPTIONS.has_gate:
        slope: tl.constexpr = 1 - 2 * OPTIONS.epsilon
        dl, residuals = slope * (sums.dl / scores.scale), slope * (sums.residual / scores.scale)
        if OPTIONS.parts:
            store(dgate, queries, dl + earlier.dl)
            store(weight, queries, sums.weight + earlier.weight)
            store(residual, queries, residuals + earlier.residual)
        else:
            store(dgate, queries, dl - residuals * sums.weight)
