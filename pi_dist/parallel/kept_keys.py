"""Keys and values that a rank keeps of earlier chunks of a sequence, and the gradients that later ones send.

Training in chunks (`pi_dist.training.streaming`) is exact because a token needs nothing of a layer but the
keys and values of a few earlier tokens. Those that lie in another chunk are kept here, and so are the
gradients that come back to them, in fp32, until the backward of their own chunk adds them to its own.

All is kept on the device, or what is far from the chunk that is worked on in host memory: rows go there when
the sequence has moved on, and come back, one chunk ahead, when the backward has come near again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import torch

from pi_dist.ops.pattern import HeadGroup, PiPattern
from pi_dist.ops.spec import Run, accumulate_dtype
from pi_dist.parallel.exchange_plan import ExchangePlan, chunk_run, count_rows, rows_kept
from pi_dist.parallel.host_memory import HostMemory, Movable


def rows_at(tensor: torch.Tensor, lies: Run, wanted: Run) -> torch.Tensor:
    """The positions `wanted` of a [B, R, ...] tensor that holds the positions `lies`."""
    return tensor[:, wanted.start - lies.start : wanted.stop - lies.start]


@lru_cache(maxsize=1024)
def columns_of(heads: tuple[int, ...], device: torch.device) -> slice | torch.Tensor:
    """What selects these ascending heads: a slice, else indices that lie on the device already.

    A list would be copied there each time, and the host would wait for it.
    """
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if heads == tuple(range(heads[0], heads[-1] + 1, step)):
        return slice(heads[0], heads[-1] + 1, step)
    return torch.tensor(heads, device=device)


def add_rows(
    target: torch.Tensor, lies: Run, run: Run, heads: tuple[int, ...], gradient: torch.Tensor
) -> None:
    """Add a [B, rows, heads, D] gradient to these heads of positions of `target`.

    The sum is rounded once, from the wider of the two dtypes: one launch.
    """
    rows, columns = rows_at(target, lies, run), columns_of(heads, target.device)
    theirs = rows[:, :, columns].add_(gradient)
    if not isinstance(columns, slice):  # then they are a copy
        rows[:, :, columns] = theirs


@lru_cache(maxsize=1024)
def chunks_looked_at(pattern: PiPattern, group: HeadGroup, chunk_tokens: int, spread: bool) -> frozenset[int]:
    """How many chunks back lie the rows that some query of a head group needs, its own chunk (0) included.

    spread: with all chunks in between.
    """
    skips = {o for stride in group.strides for o in pattern.skip_offsets(stride)}
    ring = range(pattern.window + 1)
    if spread:
        return frozenset(range(-(-max(ring.stop - 1, *skips, 0) // chunk_tokens) + 1))
    back = {o // chunk_tokens for o in skips} | {-(-o // chunk_tokens) for o in skips}
    return frozenset(back.union(range(-(-pattern.window // chunk_tokens) + 1)))


@dataclass(frozen=True)
class KeptSize:
    """What one rank keeps of one layer, in bytes.

    Attributes:
        rows: keys and values of the whole sequence.
        gradients: of them, in the accumulation dtype: at most so much at a time, of the chunks that the
            current one can reach.
        near, near_gradients: what of both is on the device when the rest is in host memory: of the chunks
            that the current and the next one look at, and of those that are on their way out.
    """

    rows: int
    gradients: int
    near: int
    near_gradients: int

    def __add__(self, other: KeptSize) -> KeptSize:
        return KeptSize(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def kept_size(
    pattern: PiPattern,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    batch: int,
    dtype: torch.dtype,
    seq_len: int,
    chunk_tokens: int,
    num_ranks: int = 1,
    rank: int = 0,
    spread: bool = True,
) -> KeptSize:
    """What `KeptKeys` of this layer will hold, in closed form.

    `rows` is (n/C)·Σ min(h, C)·2·H_kv·head_dim elements, without those of the last chunk and those that no
    later token needs.
    """
    near_the_end = -(-pattern.reach() // chunk_tokens)  # so many of the last chunks keep fewer rows
    num_chunks = -(-seq_len // chunk_tokens)
    first_of_those = max(0, num_chunks - near_the_end - 1)
    total = KeptSize(0, 0, 0, 0)
    for group in pattern.head_groups(num_heads, num_kv_heads):
        first, *rows = _rows_of_chunks(
            pattern, group, seq_len, chunk_tokens, num_ranks, rank, first_of_those, num_chunks
        )
        most = max(first, *rows)
        elements = 2 * batch * len(group.kv_heads) * head_dim
        all_rows = elements * (sum(rows) + first_of_those * first)

        def at_most(
            chunks: int, size: int, elements: int = elements, most: int = most, limit: int = all_rows
        ):
            return min(limit, chunks * most * elements) * size

        row_size, gradient_size = dtype.itemsize, accumulate_dtype(dtype).itemsize
        back = chunks_looked_at(pattern, group, chunk_tokens, spread)
        near = len({chunks + more for chunks in back for more in range(2 if spread else 3)})
        reached = max(back)
        total += KeptSize(
            rows=all_rows * row_size,
            gradients=at_most(reached, gradient_size),
            near=at_most(near, row_size),
            near_gradients=at_most(min(near, reached), gradient_size),
        )
    return total


@lru_cache(maxsize=1024)
def _rows_of_chunks(
    pattern: PiPattern,
    group: HeadGroup,
    seq_len: int,
    chunk_tokens: int,
    num_ranks: int,
    rank: int,
    start: int,
    stop: int,
) -> tuple[int, ...]:
    """Rows that a rank keeps of one head group of the first chunk, and of each chunk from start to stop."""

    def rows_of(chunk: int) -> int:
        whole = chunk_run(seq_len, chunk_tokens, chunk)
        length = (whole.stop - whole.start) // num_ranks
        shard = Run(whole.start + rank * length, whole.start + (rank + 1) * length)
        return count_rows(rows_kept(pattern, group, shard, whole.stop, seq_len))

    return tuple(rows_of(chunk) for chunk in (0, *range(start, stop)))


@dataclass
class _Piece:
    """Rows of one head group in one chunk: keys and values [2, B, rows, heads, D], and their gradient."""

    run: Run
    pair: Movable
    gradient: Movable | None = None  # in the accumulation dtype; None: nothing came yet

    def parts(self) -> list[Movable]:
        return [self.pair] if self.gradient is None else [self.pair, self.gradient]


@dataclass(frozen=True)
class Placement:
    """Where kept rows are.

    Attributes:
        memory: host memory for what neither the current nor the next chunk looks at; None: all stays on the
            device.
        spread: let what lies between the chunks that these look at stay on the device too. Then rows leave
            and return once; else, with strides longer than a chunk, they come for every skip.
    """

    memory: HostMemory | None = None
    spread: bool = True


_Key = tuple[int, int]  # chunk, head group


class KeptKeys:
    """What one rank keeps of one layer while a sequence goes by in chunks.

    Args:
        seq_len: tokens of the whole sequence.
        chunk_tokens: tokens of a chunk, of which only the last may have fewer.
        backward: whether a backward pass will follow; without one, rows are forgotten as soon as no later
            chunk needs them.
        placement: where they are kept.
    """

    def __init__(self, seq_len: int, chunk_tokens: int, backward: bool, placement: Placement) -> None:
        self.seq_len, self.chunk_tokens, self.backward = seq_len, chunk_tokens, backward
        self.memory, self.spread = placement.memory, placement.spread
        self._chunks: dict[int, list[list[_Piece]]] = {}  # by chunk and head group
        self._here: set[_Key] = set()  # on the device, or on their way there
        self._leaving: set[_Key] = set()  # those of them that are being saved
        self._farthest = -1  # chunk that has been seen
        self._looking: tuple[int, int] | None = None  # the current chunk and the next

    def keep(self, plan: ExchangePlan, k: torch.Tensor, v: torch.Tensor, pattern: PiPattern) -> None:
        """Copy what later chunks need of the shard's k and v [B, m, H_kv, D], unless it is there already.

        With host memory also start to fetch what the next chunk will look at, and to save what no more.
        """
        chunk = plan.shard.start // self.chunk_tokens
        if chunk not in self._chunks and any(plan.kept):
            self._chunks[chunk] = [
                [_Piece(run, Movable(self._pair(plan, k, v, run, columns), self.memory)) for run in runs]
                for columns, runs in zip(
                    (columns_of(group.kv_heads, k.device) for group in plan.groups), plan.kept, strict=True
                )
            ]
            self._here |= {(chunk, group) for group in range(len(plan.groups))}
        if not self.backward:
            oldest = (chunk * self.chunk_tokens - pattern.reach()) // self.chunk_tokens  # that it looks at
            for done in [number for number in self._chunks if number < oldest]:
                self._forget(done)
        if self.memory is not None:
            last = (chunk + 1) * self.chunk_tokens >= self.seq_len
            forward = not self.backward or (chunk > self._farthest and not last)
            self._farthest = max(self._farthest, chunk)
            self._look(chunk, chunk + 1 if forward else chunk - 1, plan, pattern)

    def rows(self, group: int, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, rows, heads of the group, D] at positions of one chunk; views."""
        piece = self._piece(group, run)
        k, v = piece.pair.get()
        return rows_at(k, piece.run, run), rows_at(v, piece.run, run)

    def add(self, group: int, run: Run, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Add gradients [B, rows, heads of the group, D] that a later chunk has for these rows."""
        piece = self._piece(group, run)
        if piece.gradient is None:
            pair = piece.pair.get()
            zeros = torch.zeros_like(pair, dtype=accumulate_dtype(pair.dtype))
            piece.gradient = Movable(zeros, self.memory)
        for total, gradient in zip(piece.gradient.get_to_change(), (dk, dv), strict=True):
            rows_at(total, piece.run, run).add_(gradient)

    def give_back(self, plan: ExchangePlan, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Add all that came for the shard's rows to its own gradients, and forget these rows."""
        chunk = plan.shard.start // self.chunk_tokens
        for group, of_group in zip(plan.groups, self._chunks.get(chunk, ()), strict=False):
            for piece in (piece for piece in of_group if piece.gradient is not None):
                for target, gradient in zip((dk, dv), piece.gradient.get(), strict=True):
                    add_rows(target, plan.shard, piece.run, group.kv_heads, gradient)
        self._forget(chunk)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is held, gradients too, the device's copy of what is in both places."""
        yield from (part.held()[0] for key in self._keys() for part in self._parts(key))

    def on_device(self) -> Iterator[torch.Tensor]:
        """What of it takes memory of the device; without host memory all."""
        yield from (part.held()[0] for key in self._here for part in self._parts(key))

    def _pair(
        self, plan: ExchangePlan, k: torch.Tensor, v: torch.Tensor, run: Run, columns: slice | torch.Tensor
    ) -> torch.Tensor:
        return torch.stack([rows_at(x, plan.shard, run)[:, :, columns] for x in (k, v)])

    def _look(self, chunk: int, following: int, plan: ExchangePlan, pattern: PiPattern) -> None:
        """Move rows so that those of the current and the next chunk are here."""
        if self._looking == (chunk, following):  # it is computed once more
            return
        self._looking = (chunk, following)
        wanted = {
            (looking - back, index)
            for index, group in enumerate(plan.groups)
            for back in chunks_looked_at(pattern, group, self.chunk_tokens, self.spread)
            for looking in (chunk, following)
            if looking - back in self._chunks
        }
        left = self._leaving - wanted  # their copies were started a chunk ago
        for part in (part for key in left for part in self._parts(key)):
            part.leave()
        self._here -= left
        self._leaving = self._here - wanted
        for part in (part for key in self._leaving for part in self._parts(key)):
            part.save()
        for part in (part for key in sorted(wanted - self._here) for part in self._parts(key)):
            part.fetch()
        self._here |= wanted

    def _forget(self, chunk: int) -> None:
        for group in range(len(self._chunks.get(chunk, ()))):
            for part in self._parts((chunk, group)):
                part.forget()
            self._here.discard((chunk, group))
            self._leaving.discard((chunk, group))
        self._chunks.pop(chunk, None)

    def _keys(self) -> list[_Key]:
        return [(chunk, group) for chunk, groups in self._chunks.items() for group in range(len(groups))]

    def _parts(self, key: _Key) -> list[Movable]:
        chunk, group = key
        return [part for piece in self._chunks[chunk][group] for part in piece.parts()]

    def _piece(self, group: int, run: Run) -> _Piece:
        pieces = self._chunks[run.start // self.chunk_tokens][group]
        return next(piece for piece in pieces if piece.run.start <= run.start < piece.run.stop)
