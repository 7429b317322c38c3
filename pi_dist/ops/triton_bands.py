"""Which queries look at which keys in each launch of the Triton kernels.

A band is a set of neighbours that one launch looks at; results of several are merged by lse, gradients added.
The keys of a shard and each run of received rows are blocks of their own, so nothing is concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    Attributes:
        index: of the block in `AttentionSpec.blocks`.
        queries: their global positions.
        view: where they lie in the tensors of all queries; None: they are all.
        strides: of the query heads that look at the block.
        local: whether the block holds the keys at the positions of all queries.
    """

    band: Band
    block: KeyBlock
    index: int
    queries: Run
    view: slice | None
    strides: tuple[int, ...]
    local: bool

    @property
    def span(self) -> int:
        """Tokens from the first query or key to the last."""
        return _span(self.queries, self.block.run)


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
            seen = queries
            if parts and not band.shifts:
                back = pattern.num_skips * max(strides) if band.kind == SKIP else band.left
                ahead = 0 if pattern.causal else back
                seen = Run(max(seen.start, block.run.start - ahead), min(seen.stop, block.run.stop + back))
            if seen.start < seen.stop:
                view = slice(seen.start - queries.start, seen.stop - queries.start)
                whole = seen == queries
                parts.append(Part(band, block, index, seen, None if whole else view, strides, local))
    return tuple(parts)


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
