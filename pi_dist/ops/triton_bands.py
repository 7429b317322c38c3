"""Which queries look at which keys in each launch of the Triton kernels.

A band is a set of neighbours that one launch looks at; results of several are merged by lse, gradients added.
The keys of a shard and each run of received rows are blocks of their own, so nothing is concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pi_dist.kernels import tiles
from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.spec import AttentionSpec, KeyBlock, Run

RING, SKIP, BOTH = (kind.value for kind in (tiles.RING, tiles.SKIP, tiles.BOTH))
LONGEST = 2**29  # tokens that a call may span, and its skips; see `tiles.NOWHERE`
NEAR_SKIPS = 32  # skips that lie no farther than the window or this join its band
SHIFTED_SKIPS = 1  # so few farther skips are done row by row; more, by residue class in a launch of their own


@dataclass(frozen=True)
class Band:
    """Neighbours that one launch looks at: `left` and `right` steps of a query, and `shifts` far skips.

    kind: RING, SKIP or BOTH; a step of SKIP is a stride, of the others a token.
    """

    kind: int
    left: int
    right: int
    shifts: int = 0


@dataclass(frozen=True)
class Part:
    """Queries that look at one block of keys by one band.

    Skips of which a block is seen by one alone become a skip of one token, and the keys lie next to their
    queries: the launch works on no place between them.

    Attributes:
        pattern: by which they look.
        index: of the block in `AttentionSpec.blocks`.
        queries: their global positions.
        keys: those of the block, `moved` tokens later.
        view: where they lie in the tensors of all queries; None: they are all.
        strides: of the query heads that look at the block.
        local: whether the block holds the keys at the positions of all queries.
    """

    pattern: PiPattern
    band: Band
    block: KeyBlock
    index: int
    queries: Run
    view: slice | None
    strides: tuple[int, ...]
    local: bool
    moved: int = 0

    @property
    def keys(self) -> Run:
        return Run(self.block.run.start + self.moved, self.block.run.stop + self.moved)

    @property
    def span(self) -> int:
        """Tokens from the first query or key to the last."""
        return _span(self.queries, self.keys)


def parts_of(spec: AttentionSpec, num_heads: int, q_len: int) -> tuple[Part, ...]:
    """The parts of a call, in order; the first covers all queries, and the rest those that need it.

    Raises:
        ValueError: the kernels cannot count that far, or the first block lacks heads.
    """
    pattern, share = spec.pattern, num_heads // spec.num_kv_heads
    all_strides = pattern.head_strides(num_heads)
    far = max(all_strides) * max(1, pattern.num_skips)
    if far >= LONGEST:
        raise ValueError(f"backend 'triton': num_skips · stride ({far}) < 2^29 does not hold")
    if spec.blocks[0].heads != tuple(range(spec.num_kv_heads)):
        raise ValueError(f"heads of the first block ({spec.blocks[0].heads}) == all heads does not hold")
    queries = Run(spec.query_start, spec.query_start + q_len)
    parts: list[Part] = []
    for index, block in enumerate(spec.blocks):
        local = block.run == queries
        strides = tuple(all_strides[head * share + s] for head in block.heads for s in range(share))
        span = _span(queries, block.run)
        if span >= LONGEST:
            raise ValueError(
                f"backend 'triton': queries and keys within ({span}) < 2^29 tokens does not hold"
            )
        for band in _bands(pattern, strides, span, local):
            part = Part(pattern, band, block, index, queries, None, strides, local)
            if band.kind == SKIP and not local:
                part = _next_to_queries(part)
            if parts and not band.shifts:
                part = _of_queries_in_sight(part)
            if part.queries.start < part.queries.stop:
                parts.append(part)
    return tuple(parts)


def _next_to_queries(part: Part) -> Part:
    """A part of which some query sees some key by one skip alone, as a part of a skip of one token."""
    pattern, stride, (start, stop) = part.pattern, part.strides[0], part.block.run
    if len(set(part.strides)) > 1:
        return part

    def skips(nearest: int, farthest: int) -> range:
        """Those of `nearest` to `farthest` tokens."""
        low, high = max(-(-nearest // stride), pattern.window // stride + 1), farthest // stride
        return range(low, min(high, pattern.num_skips) + 1)

    nearest, farthest = part.queries.start - stop + 1, part.queries.stop - 1 - start
    behind, ahead = skips(nearest, farthest), skips(-farthest, -nearest)
    if len(behind) + (0 if pattern.causal else len(ahead)) != 1:
        return part
    offset = behind[0] * stride if behind else -ahead[0] * stride
    next_to = PiPattern(window=0, strides=1, include_self=False)
    strides, band = (1,) * len(part.strides), Band(SKIP, 1, 0)
    return replace(part, pattern=next_to, band=band, strides=strides, moved=offset - 1)


def _of_queries_in_sight(part: Part) -> Part:
    """The part of those queries alone that may look at its keys."""
    band, whole, (start, stop) = part.band, part.queries, part.keys
    back = part.pattern.num_skips * max(part.strides) if band.kind == SKIP else band.left
    ahead = 0 if part.pattern.causal else back
    seen = Run(max(whole.start, start - ahead), min(whole.stop, stop + back))
    if seen == whole:
        return part
    return replace(part, queries=seen, view=slice(seen.start - whole.start, seen.stop - whole.start))


def _span(queries: Run, keys: Run) -> int:
    return max(queries.stop, keys.stop) - min(queries.start, keys.start)


def _bands(pattern: PiPattern, strides: tuple[int, ...], span: int, local: bool) -> list[Band]:
    """The bands of heads with these strides, of queries and keys within `span` tokens.

    local: the keys lie at the queries' own positions.
    """
    window = min(pattern.window, span)
    chain = -(-span // min(strides))  # the longest: nothing lies farther than its end
    skips = min(pattern.num_skips, max(16, 1 << (chain - 1).bit_length())) if chain > 1 else 0
    far = skips * max(strides)

    def band(kind: int, steps: int, shifts: int = 0) -> Band:
        return Band(kind, steps, 0 if pattern.causal else steps, shifts)

    if far <= window:
        return [band(RING, window)]
    if far <= max(window, NEAR_SKIPS):
        return [band(BOTH, far)]
    if local and skips <= SHIFTED_SKIPS:
        return [band(RING, window, skips)]
    if window == 0 and not pattern.include_self:
        return [band(SKIP, skips)]
    return [band(RING, window), band(SKIP, skips)]
