"""What the kernels share: arguments, rows, who is a neighbour, logits, dropout bits.

Coordinates. The tokens of a launch lie in slots, in an order in which neighbours are close. For a window that
is the order of tokens. For many skips it is chain by chain, each chain a residue class of the stride: there
the skips are a plain window of M slots, cut where a chain begins or ends, and a tile may hold pieces of many
chains, however short they are. Queries and keys have the same slots, wherever their tensors begin.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(1 << 29)  # step of a query that does not exist; of such a key, minus this
FULL_STRETCH = tl.constexpr(1)  # of the three stretches of `band_limits`

# bands that a program can look at
RING = tl.constexpr(0)  # the window
SKIP = tl.constexpr(1)  # the skips, by residue class of the stride
BOTH = tl.constexpr(2)  # window and skips, where the skips lie near enough to make one band


class Rows(NamedTuple):
    """A [B, T, H, D] or [B, T, H] tensor: its pointer and its strides in elements; the last one is 1."""

    ptr: Any
    batch: Any
    token: Any
    head: Any


class Sizes(NamedTuple):
    """Sizes of a launch; shift is the global position of the first query less that of the first key."""

    q_len: Any
    k_len: Any
    num_heads: Any
    num_tiles: Any
    shift: Any


class Scores(NamedTuple):
    """Scalars of the logits."""

    window: Any
    stride: Any
    num_skips: Any
    scale: Any
    cap: Any


class Dropout(NamedTuple):
    """Keys of the dropout bits; 32-bit values as signed integers, so that their type never changes.

    moved: tokens by which the keys lie later in the launch than in the sequence.
    """

    seed_low: Any
    seed_high: Any
    row_start: Any
    query_start: Any
    moved: Any
    threshold: Any
    keep_scale: Any


class Options(NamedTuple):
    """What is compiled into a kernel.

    Attributes:
        kind: RING, SKIP or BOTH. left, right: steps of the band before and behind a query.
        halo: of a narrow band, the width of the tiles beside the diagonal one; 0 loops over tiles of block_n.
        long_steps: a tile's tokens lie farther apart than 32 bits count elements.
        walk: see `pi_attention_bwd_fused`.
        one_stretch: see `band_limits`.
        shifts: skips that are not in the band and are done row by row (KIND RING).
        share: query heads of a key/value head. shares: how many of them this launch covers.
        merge: continue from the out and lse (or add to the gradients) of an earlier launch.
        parts: several launches make the gradient of a gate.
        fast_log: see `log2`.
        fixed_top: the logit cap serves as the softmax's maximum.
    """

    kind: int
    left: int
    right: int
    halo: int
    walk: bool
    one_stretch: bool
    long_steps: bool
    shifts: int
    causal: bool
    include_self: bool
    one_skip: bool
    uniform: bool
    share: int
    shares: int
    has_gate: bool
    has_labels: bool
    has_cap: bool
    dropout: bool
    merge: bool
    parts: bool
    fixed_top: bool
    fast_log: bool
    heads_first: bool
    head_dim: int
    block_d: int
    block_m: int
    block_n: int
    epsilon: float


@triton.jit
def zeros(OPTIONS: tl.constexpr, BY_DIM: tl.constexpr):
    """fp32 zeros, [M] or [M, block_d]."""
    M: tl.constexpr = OPTIONS.block_m
    D: tl.constexpr = OPTIONS.block_d
    if BY_DIM:
        return tl.zeros((M, D), tl.float32)
    else:
        return tl.zeros((M,), tl.float32)


@triton.jit
def of(rows, batch, head):
    """The [T, D] or [T] part of one batch row and head."""
    start = batch * rows.batch + (batch * 0 + head) * rows.head  # in 64 bits, as batch is
    return Rows(rows.ptr + start, rows.batch, rows.token, rows.head)


class Order(NamedTuple):
    """In which order tokens lie in slots.

    step: tokens between neighbouring slots. slots: how many there are. chain: slots of a residue class.
    reciprocal: 2^32 / chain, rounded down. low: the query in slot 0, as an index, which may be negative.
    """

    step: Any
    slots: Any
    chain: Any
    reciprocal: Any
    low: Any


class Tokens(NamedTuple):
    """Tokens start + offset [N] of a tensor, whether they exist, and where in their chain (KIND SKIP)."""

    start: Any
    offset: Any
    ok: Any
    place: Any


@triton.jit
def order_of(slots, shift, q_len, k_len, stride, OPTIONS: tl.constexpr):
    """The order of a launch; `slots`: tokens of the program's side. Chains span queries and keys."""
    low = tl.minimum(-shift, 0).to(tl.int64)
    if OPTIONS.kind == SKIP:
        span = (tl.maximum(k_len - shift, q_len) - low).to(tl.int32)
        chain = (span + stride - 1) // stride
        reciprocal = 0xFFFFFFFF // chain.to(tl.uint32)
        return Order(stride, tl.minimum(stride, span) * chain, chain, reciprocal, low)
    else:
        return Order(1, slots, slots, 0, low * 0)


@triton.jit
def _clamped(index):
    return tl.minimum(tl.maximum(index, -NOWHERE), NOWHERE).to(tl.int32)


@triton.jit
def tokens(first, start, steps, order, length, OPTIONS: tl.constexpr):
    """The tokens in slots start + steps [N], of a tensor of `length` tokens whose slot 0 is token `first`."""
    if OPTIONS.kind == SKIP:
        slots = start + steps
        # slots // chain, at most one too small before it is set right
        number = tl.umulhi(tl.maximum(slots, 0).to(tl.uint32), order.reciprocal).to(tl.int32)
        place = slots - number * order.chain
        number = tl.where(place >= order.chain, number + 1, number)
        place = tl.where(place >= order.chain, place - order.chain, place)
        offset = number + place * order.step
        ok = (slots >= 0) & (slots < order.slots)
        ok = ok & (offset >= _clamped(-first)) & (offset < _clamped(length - first))
        if OPTIONS.long_steps:
            offset = offset.to(tl.int64)
        return Tokens(first, offset, ok, place)
    else:
        first += start
        ok = (steps >= _clamped(-first)) & (steps < _clamped(length - first))
        if OPTIONS.long_steps:
            return Tokens(first, steps.to(tl.int64), ok, steps)
        else:
            return Tokens(first, steps, ok, steps)


@triton.jit
def sure(those, FULL: tl.constexpr):
    """The tokens, without masks if all of them exist (FULL)."""
    if FULL:
        return Tokens(those.start, those.offset, those.place == those.place, those.place)
    else:
        return those


@triton.jit
def first_slot(tile, OWNED: tl.constexpr, OPTIONS: tl.constexpr):
    """The slot with which a tile begins; there may be more than 2^31 of them where slots are tokens."""
    if OPTIONS.kind == SKIP:
        return tile * OWNED
    else:
        return tile.to(tl.int64) * OWNED


@triton.jit
def nothing_in(start, order, scores, OPTIONS: tl.constexpr):
    """Whether a tile that begins in slot `start` has no work: no tokens, or no pairs to add to others'."""
    nothing = start >= order.slots
    if OPTIONS.kind == SKIP and OPTIONS.merge:
        nothing = nothing | (order.chain <= tl.maximum(scores.window // order.step + 1, 1))
    return nothing


@triton.jit
def shifted(those, by, length):
    """The tokens `by` tokens after those, where both exist."""
    start = those.start + by
    index = start + those.offset.to(tl.int64)
    return Tokens(start, those.offset, those.ok & (index >= 0) & (index < length), those.place)


@triton.jit
def index_of(those):
    """Indices [N], int64."""
    return those.start + those.offset.to(tl.int64)


@triton.jit
def pointers_to(rows, those):
    """Pointers [N] to elements of a [T] part, or to the beginnings of rows of a [T, D] part."""
    return (rows.ptr + those.start * rows.token) + those.offset * rows.token


@triton.jit
def load(rows, those, other):
    """Elements [N] of a [T] part; `other` where there is no token."""
    return tl.load(pointers_to(rows, those), mask=those.ok, other=other)


@triton.jit
def store(rows, those, value):
    """Store [N] to elements of a [T] part."""
    tl.store(pointers_to(rows, those), value, mask=those.ok)


@triton.jit
def _row_pointers(rows, those, OPTIONS: tl.constexpr):
    """Pointers [N, block_d] to rows of a [T, D] part; sums in 32 bits before the one addition in 64."""
    d = tl.arange(0, OPTIONS.block_d)
    return (rows.ptr + those.start * rows.token) + ((those.offset * rows.token)[:, None] + d[None, :])


@triton.jit
def _row_mask(those, OPTIONS: tl.constexpr):
    if OPTIONS.block_d == OPTIONS.head_dim:
        return those.ok[:, None]
    else:
        return those.ok[:, None] & (tl.arange(0, OPTIONS.block_d) < OPTIONS.head_dim)[None, :]


@triton.jit
def load_rows(rows, those, OPTIONS: tl.constexpr):
    """Rows of a [T, D] part, as [N, block_d]; 0 where there is no token."""
    return tl.load(_row_pointers(rows, those, OPTIONS), mask=_row_mask(those, OPTIONS), other=0.0)


@triton.jit
def store_rows(rows, those, value, OPTIONS: tl.constexpr):
    """Store [N, block_d] to rows of a [T, D] part."""
    pointers, mask = _row_pointers(rows, those, OPTIONS), _row_mask(those, OPTIONS)
    tl.store(pointers, value.to(rows.ptr.dtype.element_ty), mask=mask)


@triton.jit
def earlier_rows(rows, those, OPTIONS: tl.constexpr):
    """What earlier launches left in rows, for `store_sum`: asked for early, since only added at the end."""
    if OPTIONS.merge:
        return load_rows(rows, those, OPTIONS)
    else:
        return 0.0


@triton.jit
def store_sum(rows, those, value, earlier, OPTIONS: tl.constexpr):
    """As `store_rows`, added to what earlier launches left."""
    store_rows(rows, those, value + earlier.to(tl.float32) if OPTIONS.merge else value, OPTIONS)


@triton.jit
def log2(x, OPTIONS: tl.constexpr):
    """One instruction, exact to 2^-22, where 16-bit inputs allow it."""
    if OPTIONS.fast_log:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


class Priors(NamedTuple):
    """Of queries, in base 2: what their gate adds to ring and skip logits, and the bounds of the clamp.

    All four less the queries' own `origin`, so that exp2 of a clamped logit is a share of 2^origin. alpha is
    squeezed.
    """

    ring: Any
    skip: Any
    low: Any
    high: Any
    alpha: Any


@triton.jit
def load_gate(gate, queries, OPTIONS: tl.constexpr):
    """The gate of queries [N], if there is one."""
    if OPTIONS.has_gate:
        return load(gate, queries, 0.5)
    else:
        return queries.ok


@triton.jit
def squeezed(gate, OPTIONS: tl.constexpr):
    """α of queries [N] from their gate."""
    return (1 - 2 * OPTIONS.epsilon) * gate + OPTIONS.epsilon


@triton.jit
def priors_from(ring, skip, alpha, origin, scores):
    """Priors of queries [N] from the logarithms of α and 1-α, all in base 2."""
    cap = scores.cap * LOG2E
    return Priors(ring - origin, skip - origin, -(origin + cap), -(origin - cap), alpha)


@triton.jit
def priors_of(gate, origin, scores, OPTIONS: tl.constexpr):
    """Priors of queries [N] from their gate, as `load_gate` gives it; origin [N] in base 2."""
    if OPTIONS.has_gate:
        alpha = squeezed(gate, OPTIONS)
        return priors_from(log2(alpha, OPTIONS), log2(1 - alpha, OPTIONS), alpha, origin, scores)
    else:
        return priors_from(0.0, 0.0, origin, origin, scores)


@triton.jit
def load_labels(labels, those, OPTIONS: tl.constexpr):
    """Labels of tokens [N], -1 where there is none."""
    if OPTIONS.has_labels:
        return load(labels, those, -1)
    else:
        return those.ok


@triton.jit
def decode(sizes, HEADS_FIRST: tl.constexpr):
    """(tile, head, batch row) of this program; HEADS_FIRST: programs that run together share their tokens."""
    pid = tl.program_id(0)
    if HEADS_FIRST:
        rest = pid // sizes.num_heads
        return rest % sizes.num_tiles, pid % sizes.num_heads, (rest // sizes.num_tiles).to(tl.int64)
    else:
        rest = pid // sizes.num_tiles
        return pid % sizes.num_tiles, rest % sizes.num_heads, (rest // sizes.num_heads).to(tl.int64)


@triton.jit
def _mix(x):
    """As `pi_dist.ops.dropout._mix`, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _fold(state, value):
    """Fold a signed 64-bit integer into the state."""
    return _mix(_mix(state ^ value.to(tl.uint32)) ^ (value >> 32).to(tl.uint32))


@triton.jit
def query_hash(dropout, batch, queries, head, OPTIONS: tl.constexpr):
    """Dropout's hash [N] of queries of one batch row and head."""
    if OPTIONS.dropout:
        zero = batch * 0
        state = _mix(_mix((zero + dropout.seed_low).to(tl.uint32)) ^ (zero + dropout.seed_high).to(tl.uint32))
        state = _fold(state, batch + dropout.row_start)
        return _fold(_fold(state, index_of(queries) + dropout.query_start), zero + head)
    else:
        return queries.ok


@triton.jit
def keep(hashed, offset, dropout):
    """Whether dropout keeps the neighbour that a launch sees `offset` (int64) tokens before the query."""
    offset += dropout.moved
    bits = _mix(_mix(hashed ^ offset.to(tl.uint32)) ^ (offset >> 32).to(tl.uint32))
    return bits >= (offset * 0 + dropout.threshold).to(tl.uint32)


@triton.jit
def _within(offset, limit):
    """Whether 0 <= offset <= limit, for a limit >= 0, in one comparison."""
    return offset.to(tl.uint32, bitcast=True) <= limit.to(tl.uint32, bitcast=True)


@triton.jit
def neighbours(t, u, place, order, scores, stride, OPTIONS: tl.constexpr):
    """(neighbour, ring) for queries in slots t, at `place` of their chains, and keys in slots u.

    The first two have one shape, and the third broadcasts to it.
    """
    if OPTIONS.kind == SKIP:
        nearest = tl.maximum(scores.window // stride + 1, 1)
        beyond = tl.minimum(place, scores.num_skips) - nearest  # of the nearest skip back to the farthest
        skip = _within(tl.where(beyond < 0, NOWHERE, t - nearest) - u, tl.maximum(beyond, 0))
        if not OPTIONS.causal:
            beyond = tl.minimum(order.chain - 1 - place, scores.num_skips) - nearest
            skip = skip | _within(u - tl.where(beyond < 0, NOWHERE, t + nearest), tl.maximum(beyond, 0))
        return skip, skip
    else:
        offset = t - u
        if OPTIONS.causal:
            distance = offset
            ring = _within(offset, offset * 0 + scores.window)
        else:
            distance = tl.abs(offset)
            ring = distance <= scores.window
        if not OPTIONS.include_self:
            ring = ring & (offset != 0)
        if OPTIONS.kind == RING:
            return ring, ring
        else:
            lift = stride * (2 * OPTIONS.left // stride + 2)  # makes steps of the tile's margins positive
            if OPTIONS.one_skip:
                skip = (distance == stride) & (stride > scores.window)
            else:
                skip = ((t + lift) % stride == (u + lift) % stride) & (distance <= scores.num_skips * stride)
                skip = skip & (distance > scores.window)
            return ring | skip, ring


@triton.jit
def along_rows(priors):
    """The priors of queries that are the rows of a tile; α stays [M]."""
    ring, skip, low, high = priors.ring, priors.skip, priors.low, priors.high
    return Priors(ring[:, None], skip[:, None], low[:, None], high[:, None], priors.alpha)


@triton.jit
def along_columns(priors):
    """The priors of queries that are the columns of a tile; α stays [N]."""
    ring, skip, low, high = priors.ring, priors.skip, priors.low, priors.high
    return Priors(ring[None, :], skip[None, :], low[None, :], high[None, :], priors.alpha)


@triton.jit
def of_skips(priors):
    """Priors where every neighbour is a skip target, whatever the band."""
    return Priors(priors.skip, priors.skip, priors.low, priors.high, priors.alpha)


@triton.jit
def clamped(scores_tile, ring, priors, scores, OPTIONS: tl.constexpr):
    """(clamped logits, logits) in base 2, from q·k; the priors broadcast to it."""
    if OPTIONS.kind == RING:
        prior = priors.ring
    elif OPTIONS.kind == SKIP:
        prior = priors.skip
    else:
        prior = tl.where(ring, priors.ring, priors.skip)
    x = scores_tile * (scores.scale * LOG2E) + prior
    if OPTIONS.has_cap:
        bounded = tl.maximum(x, priors.low, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(bounded, priors.high, propagate_nan=tl.PropagateNan.ALL), x
    else:
        return x, x


@triton.jit
def band_limits(
    start, first, length, order, BEFORE: tl.constexpr, AFTER: tl.constexpr, OPTIONS: tl.constexpr
):
    """(low, full_start, full_stop, high): slots, from `start`, of the other side that block_m tokens look at.

    They look at [low, high), in three stretches; tiles of block_n in the middle one, [full_start, full_stop),
    need no mask. With `one_stretch`, as of KIND SKIP, there is only the first: a third of the code.
    BEFORE and AFTER: the band's steps on the two sides; `first`, `length`: slot 0 and tokens of the other
    side.
    """
    if OPTIONS.kind == SKIP:
        low = tl.maximum(_clamped(-start), -BEFORE)
        high = tl.minimum(_clamped(order.slots - start), OPTIONS.block_m + AFTER)
        return low, high, high, high
    else:
        low = tl.maximum(_clamped(-start - first), -BEFORE)
        high = tl.minimum(_clamped(length - start - first), OPTIONS.block_m + AFTER)
        if OPTIONS.one_stretch:
            return low, high, high, high
        near = OPTIONS.block_m - 1 - BEFORE
        far = 1 + AFTER
        if OPTIONS.kind == BOTH:
            far = near
        elif not OPTIONS.include_self:
            if not OPTIONS.causal:
                far = near
            elif BEFORE == 0:
                near = OPTIONS.block_m
            else:
                far = 0
        edge = tl.maximum(near - low + OPTIONS.block_n - 1, 0) // OPTIONS.block_n * OPTIONS.block_n
        full_start = tl.minimum(low + edge, high)
        full = tl.maximum(tl.minimum(far, high) - full_start, 0) // OPTIONS.block_n
        return low, full_start, full_start + full * OPTIONS.block_n, high
