"""Which key and value rows go where, from (n, P, pattern) alone: pure Python, the same answer on every rank.

The sequence of n tokens is cut into P contiguous shards of m = n/P. A rank needs, beyond its own shard, the
window halo (k tokens on a side) and the rows that its queries skip to; both are intervals of positions,
clipped to the sequence, and may lie on any number of other ranks. A row is sent once even if several heads or
skips need it.

A sequence that is trained in chunks is cut into chunks first and each chunk into shards. Rows of earlier
chunks lie where they were computed, on this rank or another, and are needed like any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from pi_dist.ops.pattern import HeadGroup, PiPattern
from pi_dist.ops.spec import KeyBlock, Run

Rows = tuple[Run, ...]


def shard_starts(
    seq_len: int, num_ranks: int, rank: int, balanced: bool, chunk_tokens: int | None = None
) -> tuple[int, ...]:
    """Positions where the equally long pieces of a rank's shard begin.

    One piece; or, balanced, two of n/(2P) tokens, one from the front and one from the back, so that exact
    causal attention is as much work on every rank; or one of every chunk, chunk_tokens/P tokens long.

    Raises:
        ValueError: the pieces of chunks would not be equally long.
    """
    if balanced:
        half = seq_len // (2 * num_ranks)
        return rank * half, (2 * num_ranks - 1 - rank) * half
    if chunk_tokens is None or num_ranks == 1:
        return (rank * (seq_len // num_ranks),)
    if seq_len % chunk_tokens or chunk_tokens % num_ranks:
        raise ValueError(
            f"seq_len ({seq_len}) % chunk_tokens ({chunk_tokens}) == chunk_tokens % ranks ({num_ranks}) == 0 "
            "does not hold"
        )
    return tuple(start + rank * (chunk_tokens // num_ranks) for start in range(0, seq_len, chunk_tokens))


def chunk_run(seq_len: int, chunk_tokens: int, chunk: int) -> Run:
    """The positions of a chunk; the last may be shorter."""
    return Run(chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, seq_len))


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
    """Rows that a rank needs of one head group and that are not in its shard."""

    halo: Rows
    skip: Rows


@dataclass(frozen=True)
class Message:
    """What one rank sends another in one exchange: for each head group, runs of the sender's rows.

    Its elements, in order: for each group, K then V, each [B, rows, heads of the group, D].
    """

    peer: int
    rows: tuple[Rows, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows for each head group."""
        return tuple(count_rows(rows) for rows in self.rows)

    def elements(self, batch: int, head_dim: int, groups: tuple[HeadGroup, ...]) -> int:
        per_row = 2 * batch * head_dim
        return sum(
            per_row * count * len(group.kv_heads)
            for count, group in zip(self.counts, groups, strict=True)
            if count
        )


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's part in the exchange of a layer.

    Forward moves keys and values, backward their gradients back.

    Attributes:
        groups: head groups, the order of everything below.
        shard: this rank's positions, of the chunk.
        received: for each group, the positions of the rows that it needs beyond its shard, as ascending,
            maximal runs.
        own: those of them that this rank holds itself, from earlier chunks; a message that does not travel.
        kept: for each group, the rows of the shard that later chunks need.
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
    own: Message
    kept: tuple[Rows, ...]
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


def rows_kept(pattern: PiPattern, group: HeadGroup, shard: Run, chunk_stop: int, seq_len: int) -> Rows:
    """The rows of `shard` that queries from chunk_stop on need."""
    if chunk_stop == seq_len:
        return ()
    offsets = {o for stride in group.strides for o in pattern.skip_offsets(stride)}
    skips = (Run(chunk_stop - offset, seq_len - offset) for offset in offsets)
    return _union(_clip(run, shard) for run in (Run(chunk_stop - pattern.window, chunk_stop), *skips))


def _owners(run: Run, seq_len: int, chunk_tokens: int, num_ranks: int) -> Iterator[tuple[int, Run]]:
    """(rank that holds them, positions), ascending: `run` cut where another rank or another chunk begins."""
    start = run.start
    while start < run.stop:
        chunk = chunk_run(seq_len, chunk_tokens, start // chunk_tokens)
        length = (chunk.stop - chunk.start) // num_ranks
        owner = (start - chunk.start) // length
        stop = min(run.stop, chunk.start + (owner + 1) * length)
        yield owner, Run(start, stop)
        start = stop


def _moved(value: Any, by: int) -> Any:
    """A plan, or a part of one, `by` tokens later."""
    match value:
        case Run(start, stop):
            return Run(start + by, stop + by)
        case Message(peer, rows):
            return Message(peer, _moved(rows, by))
        case KeyBlock(heads, run):
            return KeyBlock(heads, _moved(run, by))
        case ExchangePlan():
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            fixed = {name: parts.pop(name) for name in ("groups", "any_halo", "any_skip")}
            return ExchangePlan(**{name: _moved(part, by) for name, part in parts.items()}, **fixed)
    return tuple(_moved(part, by) for part in value)


def make_plan(
    pattern: PiPattern,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
    num_ranks: int,
    rank: int,
    fused: bool = False,
    chunk_tokens: int | None = None,
    chunk: int = 0,
) -> ExchangePlan:
    """The plan of `rank`.

    Args:
        seq_len: n, tokens of the whole sequence; num_ranks: P.
        fused: True sends the window halo in the all_to_all_single too.
        chunk_tokens: tokens of a chunk, of which only the last may have fewer; None: the whole sequence.
        chunk: which one the queries are in.

    Raises:
        ValueError: n or the chunk is not a multiple of P, heads do not fit the pattern, or chunks of a
            bidirectional pattern: its queries would need keys that are not there yet.
    """
    if seq_len % num_ranks:
        raise ValueError(f"seq_len ({seq_len}) % num_ranks ({num_ranks}) == 0 does not hold")
    sizes = (pattern, num_heads, num_kv_heads, num_ranks, rank, fused)
    if chunk_tokens is None:
        return _plan(*sizes, seq_len, seq_len, 0)
    if chunk_tokens % num_ranks:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) % num_ranks ({num_ranks}) == 0 does not hold")
    if not pattern.causal:
        raise ValueError("causal == true does not hold for chunks")
    # what lies farther off than the reach changes nothing: all but a few chunks have one plan, moved
    near = -(-pattern.reach() // chunk_tokens)
    left_out = max(0, chunk - near) * chunk_tokens
    shorter = min(seq_len, (chunk + 1 + near) * chunk_tokens) - left_out
    plan = _plan(*sizes, shorter, chunk_tokens, min(chunk, near))
    return _moved(plan, left_out) if left_out else plan


@lru_cache(maxsize=256)
def _plan(
    pattern: PiPattern,
    num_heads: int,
    num_kv_heads: int,
    num_ranks: int,
    rank: int,
    fused: bool,
    seq_len: int,
    chunk_tokens: int,
    chunk: int,
) -> ExchangePlan:
    """`make_plan` of sizes that fit."""
    whole = chunk_run(seq_len, chunk_tokens, chunk)
    length = (whole.stop - whole.start) // num_ranks
    shards = [Run(whole.start + r * length, whole.start + (r + 1) * length) for r in range(num_ranks)]
    groups = pattern.head_groups(num_heads, num_kv_heads)

    def by_owner(runs: Rows) -> list[Rows]:
        """The positions of `runs` that each rank holds."""
        owned: list[list[Run]] = [[] for _ in range(num_ranks)]
        for run in runs:
            for owner, part in _owners(run, seq_len, chunk_tokens, num_ranks):
                owned[owner].append(part)
        return [tuple(parts) for parts in owned]

    # what every receiver needs, for every group: all of it, and by way what of it each rank holds
    needs: list[list[Needs]] = []
    held: dict[str, list[list[list[Rows]]]] = {"halo": [], "skip": []}
    for shard in shards:
        of_rank = [rows_needed(pattern, group, shard, seq_len) for group in groups]
        needs.append([Needs((), _union((*n.halo, *n.skip))) if fused else n for n in of_rank])
        for way, receivers in held.items():
            receivers.append([by_owner(getattr(need, way)) for need in needs[-1]])

    def message(way: str, sender: int, receiver: int, peer: int) -> Message:
        rows = (() if sender == receiver else owned[sender] for owned in held[way][receiver])
        return Message(peer, tuple(rows))

    def messages(way: str, sending: bool) -> list[Message]:
        return [
            message(way, rank, peer, peer) if sending else message(way, peer, rank, peer)
            for peer in range(num_ranks)
        ]

    def travels(way: str) -> bool:
        return any(
            rows
            for receiver, of_groups in enumerate(held[way])
            for owned in of_groups
            for sender, rows in enumerate(owned)
            if sender != receiver
        )

    received = tuple(_union((*need.halo, *need.skip)) for need in needs[rank])
    return ExchangePlan(
        groups=groups,
        shard=shards[rank],
        received=received,
        own=Message(
            rank,
            tuple(
                (*halo[rank], *skip[rank])
                for halo, skip in zip(held["halo"][rank], held["skip"][rank], strict=True)
            ),
        ),
        kept=tuple(rows_kept(pattern, group, shards[rank], whole.stop, seq_len) for group in groups),
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
        any_halo=travels("halo"),
        any_skip=travels("skip"),
    )
