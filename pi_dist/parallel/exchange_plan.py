"""Which key and value rows go where, from (n, P, pattern) alone: pure Python, the same answer on every rank.

The sequence of n tokens is cut into P contiguous shards of m = n/P. A rank needs, beyond its own shard, the
window halo (k tokens on a side) and the rows that its queries skip to; both are intervals of positions,
clipped to the sequence, and may lie on any number of other ranks. A row is sent once even if several heads or
skips need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pi_dist.ops.pattern import HeadGroup, PiPattern
from pi_dist.ops.spec import KeyBlock, Run

Rows = tuple[Run, ...]


def shard_starts(seq_len: int, num_ranks: int, rank: int, balanced: bool) -> tuple[int, ...]:
    """Positions where the equally long pieces of a rank's shard begin.

    One piece; or, balanced, two of n/(2P) tokens, one from the front and one from the back, so that exact
    causal attention is as much work on every rank.
    """
    if not balanced:
        return (rank * (seq_len // num_ranks),)
    half = seq_len // (2 * num_ranks)
    return rank * half, (2 * num_ranks - 1 - rank) * half


def _union(runs: Iterable[Run]) -> Rows:
    """Sorted, disjoint, non-adjacent runs that cover the same positions."""
    merged: list[Run] = []
    for run in sorted(runs):
        if run.start >= run.stop:
            continue
        if merged and run.start <= merged[-1].stop:
            merged[-1] = Run(merged[-1].start, max(merged[-1].stop, run.stop))
        else:
            merged.append(run)
    return tuple(merged)


def _clip(run: Run, bounds: Run) -> Run:
    return Run(max(run.start, bounds.start), min(run.stop, bounds.stop))


def _subtract(runs: Iterable[Run], holes: Rows) -> Rows:
    """The positions of `runs` outside the sorted, disjoint `holes`."""
    kept = []
    for start, stop in _union(runs):
        for hole in holes:
            kept.append(Run(start, min(stop, hole.start)))
            start = max(start, hole.stop)
        kept.append(Run(start, stop))
    return _union(kept)


def count_rows(runs: Iterable[Run]) -> int:
    """Positions in disjoint runs."""
    return sum(run.stop - run.start for run in runs)


@dataclass(frozen=True)
class Needs:
    """Rows that a rank needs of one head group and does not own."""

    halo: Rows
    skip: Rows


@dataclass(frozen=True)
class Message:
    """What one rank sends another in one exchange: for each head group, runs of the sender's rows.

    Its elements, in order: for each group, K then V, each [B, rows, heads of the group, D].
    """

    peer: int
    rows: tuple[Rows, ...]

    def elements(self, batch: int, head_dim: int, groups: tuple[HeadGroup, ...]) -> int:
        per_row = 2 * batch * head_dim
        heads = (len(group.kv_heads) for group in groups)
        return sum(per_row * count_rows(rows) * h for rows, h in zip(self.rows, heads, strict=True))


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's part in the exchange of a layer.

    Forward moves keys and values, backward their gradients back.

    Attributes:
        groups: head groups, the order of everything below.
        shard: this rank's positions.
        received: for each group, the positions of the rows that it receives, as ascending, maximal runs.
        blocks: where the keys of the operator lie: the shard, then each group's received runs.
        halo_sends, halo_receives: messages that travel by ring send/recv, at most one per ordered pair of
            ranks.
        skip_sends, skip_receives: messages of the one all_to_all_single, one per peer, in rank order.
        any_halo, any_skip: whether any rank sends rows this way (a collective that all would skip is not
            called).
    """

    groups: tuple[HeadGroup, ...]
    shard: Run
    received: tuple[Rows, ...]
    blocks: tuple[KeyBlock, ...]
    halo_sends: tuple[Message, ...]
    halo_receives: tuple[Message, ...]
    skip_sends: tuple[Message, ...]
    skip_receives: tuple[Message, ...]
    any_halo: bool
    any_skip: bool


def rows_needed(pattern: PiPattern, group: HeadGroup, shard: Run, seq_len: int) -> Needs:
    """The rows that the queries of `shard` need beyond it: window halo, and skip rows outside the halo."""
    sequence = Run(0, seq_len)

    def shifted(offset: int) -> Run:
        return _clip(Run(shard.start - offset, shard.stop - offset), sequence)

    sides = [Run(shard.start - pattern.window, shard.start)]
    if not pattern.causal:
        sides.append(Run(shard.stop, shard.stop + pattern.window))
    halo = _union(_clip(run, sequence) for run in sides)
    skips = (shifted(offset) for stride in set(group.strides) for offset in pattern.skip_offsets(stride))
    return Needs(halo, _subtract(skips, _union((*halo, shard))))


@lru_cache(maxsize=256)
def make_plan(
    pattern: PiPattern,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
    num_ranks: int,
    rank: int,
    fused: bool = False,
) -> ExchangePlan:
    """The plan of `rank`.

    Args:
        seq_len: n, tokens of the whole sequence; num_ranks: P.
        fused: True sends the window halo in the all_to_all_single too.

    Raises:
        ValueError: n is not a multiple of P, or heads do not fit the pattern.
    """
    if seq_len % num_ranks:
        raise ValueError(f"seq_len ({seq_len}) % num_ranks ({num_ranks}) == 0 does not hold")
    length = seq_len // num_ranks
    shards = [Run(r * length, (r + 1) * length) for r in range(num_ranks)]
    groups = pattern.head_groups(num_heads, num_kv_heads)
    needs = []  # of every rank, for every group
    for shard in shards:
        of_rank = [rows_needed(pattern, group, shard, seq_len) for group in groups]
        needs.append([Needs((), _union((*n.halo, *n.skip))) if fused else n for n in of_rank])

    def message(kind: str, sender: int, receiver: int, peer: int) -> Message:
        owned = (tuple(_clip(run, shards[sender]) for run in getattr(need, kind)) for need in needs[receiver])
        return Message(peer, tuple(tuple(run for run in rows if run.start < run.stop) for rows in owned))

    def messages(kind: str, sending: bool) -> list[Message]:
        return [
            message(kind, rank, peer, peer) if sending else message(kind, peer, rank, peer)
            for peer in range(num_ranks)
        ]

    received = tuple(_union((*need.halo, *need.skip)) for need in needs[rank])
    return ExchangePlan(
        groups=groups,
        shard=shards[rank],
        received=received,
        blocks=(
            KeyBlock(tuple(range(num_kv_heads)), shards[rank]),
            *(
                KeyBlock(group.kv_heads, run)
                for group, runs in zip(groups, received, strict=True)
                for run in runs
            ),
        ),
        halo_sends=tuple(m for m in messages("halo", True) if any(m.rows)),
        halo_receives=tuple(m for m in messages("halo", False) if any(m.rows)),
        skip_sends=tuple(messages("skip", True)),
        skip_receives=tuple(messages("skip", False)),
        any_halo=any(need.halo for of_rank in needs for need in of_rank),
        any_skip=any(need.skip for of_rank in needs for need in of_rank),
    )
