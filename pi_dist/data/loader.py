"""Sequences out of documents, in an order that depends on the seed alone, and each rank's slice of them.

The cursor is the number of sequences consumed. It knows nothing of ranks: a run that is resumed on another
number of them reads on where it stopped.
"""

from __future__ import annotations

import atexit
import ctypes
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pi_dist.config import DataConfig
from pi_dist.data.shards import ShardError, ShardIndex
from pi_dist.model.loss import IGNORE
from pi_dist.parallel.exchange_plan import shard_starts

_OPEN_SEQUENCES = 32
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux

# tokens, labels, segment_ids, each int32 [B, m], the last None if all sequences are one document
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class SequencePlan:
    """Which tokens make which sequence: pieces [pieces] in sequence order, and each sequence's range of them.

    Piece p is tokens start[p] to stop[p] - 1 of document[p]; sequence s holds pieces first[s] to first[s + 1]
    - 1.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray

    @property
    def num_sequences(self) -> int:
        return len(self.first) - 1


def plan_sequences(token_counts: np.ndarray, context: int, packing: str) -> SequencePlan:
    """Cut documents of token_counts [documents] tokens (>= 1 each) into sequences of at most `context`.

    packing "pack": documents up to `context` stay whole, longer ones are cut at every `context` tokens;
    pieces go first-fit into at most 32 open sequences, the fullest of which is closed when none has room.
    packing "split": documents end to end, cut at every `context`. "join": the same, and the text begins again
    until the last sequence is full. Every token is in exactly one piece, but for that. Raises ValueError
    otherwise.
    """
    counts = np.asarray(token_counts, dtype=np.int64)
    if context < 1 or len(counts) == 0 or counts.min() < 1:
        raise ValueError(f"context ({context}) >= 1 and documents of >= 1 token are needed")
    if packing in ("split", "join"):
        num_documents, total = len(counts), int(counts.sum())
        if packing == "join":
            length, total = total, -(-total // context) * context
            counts = np.tile(counts, -(-total // length))
        ends = np.cumsum(counts)  # where each document ends in the whole text
        borders = np.union1d(np.arange(0, total, context), np.minimum(ends, total))  # 0 … total
        document = np.searchsorted(ends, borders[:-1], side="right")
        offset = ends[document] - counts[document]
        first = np.searchsorted(borders, np.append(np.arange(0, total, context), total))
        return SequencePlan(document % num_documents, borders[:-1] - offset, borders[1:] - offset, first)
    if packing != "pack":
        raise ValueError(f"packing: {packing!r} in ('pack', 'split', 'join') does not hold")
    pieces = -(-counts // context)
    document = np.repeat(np.arange(len(counts)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = nth * context
    stop = np.minimum(start + context, counts[document])
    sequence, num_sequences = _first_fit(stop - start, context)
    order = np.argsort(sequence, kind="stable")
    first = np.searchsorted(sequence[order], np.arange(num_sequences + 1))
    return SequencePlan(document[order], start[order], stop[order], first)


def _first_fit(lengths: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """(sequence of each piece [pieces], number of sequences)."""
    sequence = np.empty(len(lengths), dtype=np.int64)
    numbers: list[int] = []  # open sequences, oldest first
    rooms: list[int] = []  # tokens free in each
    opened = 0
    for piece, length in enumerate(lengths.tolist()):
        slot = next((slot for slot, room in enumerate(rooms) if room >= length), None)
        if slot is None:
            if len(rooms) == _OPEN_SEQUENCES:
                fullest = rooms.index(min(rooms))
                del numbers[fullest], rooms[fullest]
            slot = len(rooms)
            numbers.append(opened)
            rooms.append(context)
            opened += 1
        sequence[piece] = numbers[slot]
        rooms[slot] -= length
        if rooms[slot] == 0:
            del numbers[slot], rooms[slot]
    return sequence, opened


def _mix(state: np.ndarray) -> np.ndarray:
    """The splitmix64 step, uint64 -> uint64, wrapping."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation int64 [num_sequences] of (seed, epoch), by sorting hashes; no library's generator."""
    state = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    return np.argsort(_mix(state + np.arange(num_sequences, dtype=np.uint64)), kind="stable")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: its slice of B sequences, m = context / sp_degree positions of each.

    tokens int32 [B, m], 0 at padding; labels int32 [B, m], the next token of the same document, -100 where
    there is none; segment_ids int32 [B, m], number of the document's piece within its sequence, -1 at
    padding, or None: every sequence is one document, without padding. starts: positions in the sequence where
    the equally long runs of columns begin. row_start: row of the optimizer step's batch of row 0.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    segment_ids: torch.Tensor | None
    starts: tuple[int, ...]
    row_start: int


class _SliceReader(Dataset):
    """Reads runs of `length` columns of rows. A ShardError is returned, so that a worker's arrives whole."""

    def __init__(
        self, index: ShardIndex, plan: SequencePlan, starts: tuple[int, ...], length: int, joined: bool
    ) -> None:
        self.index, self.plan, self.starts, self.length, self.joined = index, plan, starts, length, joined

    def __getitem__(self, sequences: list[int]) -> Arrays | ShardError:
        """Arrays of the given sequences; -1 is a row of padding."""
        shape = (len(sequences), len(self.starts) * self.length)
        tokens = np.zeros(shape, dtype=np.int32)
        labels = np.full(shape, IGNORE, dtype=np.int32)
        segment_ids = None if self.joined else np.full(shape, -1, dtype=np.int32)
        try:
            for row, sequence in enumerate(sequences):
                for run, start in enumerate(self.starts if sequence >= 0 else ()):
                    columns = slice(run * self.length, (run + 1) * self.length)
                    arrays = [x if x is None else x[row, columns] for x in (tokens, labels, segment_ids)]
                    self._fill(*arrays, sequence, start)
        except ShardError as error:
            return error
        return tokens, labels, segment_ids

    def _fill(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        segment_ids: np.ndarray | None,
        sequence: int,
        first: int,
    ) -> None:
        """Write positions from `first` on of one sequence into three rows [length].

        Joined, a label goes on into the next piece, and only the last token of the sequence has none.
        """
        plan, position = self.plan, 0
        for segment, piece in enumerate(range(plan.first[sequence], plan.first[sequence + 1])):
            document, start, stop = int(plan.document[piece]), int(plan.start[piece]), int(plan.stop[piece])
            begin = max(first, position)
            end = min(first + self.length + self.joined, position + stop - start)
            if begin < end and self.joined:
                ids = self.index.read(document, begin - position + start, end - position + start)
                column = begin - first
                tokens[column : column + len(ids)] = ids[: self.length - column]
                labels[max(column - 1, 0) : column + len(ids) - 1] = ids[column == 0 :]
            elif begin < end:
                shift = start - position  # from position in the sequence to token of the document
                more = min(
                    end + shift + 1, int(self.index.token_counts[document])
                )  # the last one's label too
                ids = self.index.read(document, begin + shift, more)
                column = begin - first
                tokens[column : column + end - begin] = ids[: end - begin]
                labels[column : column + len(ids) - 1] = ids[1:]
                segment_ids[column : column + end - begin] = segment
            position += stop - start


def _start_worker(_: int) -> None:
    """A loader process leaves signals to its rank and ends with it: it holds copies of the rank's sockets."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _unchanged(value):
    return value


class SequenceLoader:
    """The batches of one rank; see `iterate` (training) and `evaluate` (one pass).

    The B·dp·accumulation rows of a step are consecutive sequences of the epochs' orders, which follow on each
    other without a gap. Row a·dp·B + r·B + b is row b of replica r in micro-step a, so a step's batch is the
    same on any number of ranks; the sp ranks of a replica read the same rows, each its own columns: see
    `shard_starts`. Raises ValueError unless context % sp_degree == 0, or % (2·sp_degree) if balanced, and if
    pieces of chunks would not be equally long.
    """

    def __init__(
        self,
        index: ShardIndex,
        data_config: DataConfig,
        *,
        context: int,
        micro_batch_size: int,
        accumulation_steps: int,
        dp_rank: int,
        dp_degree: int,
        sp_rank: int,
        sp_degree: int,
        seed: int,
        balanced: bool = False,
        chunk_tokens: int | None = None,
    ) -> None:
        pieces = 2 * sp_degree if balanced else sp_degree
        if context % pieces != 0:
            degree = "2 × sp_degree" if balanced else "sp_degree"
            raise ValueError(f"context ({context}) % {degree} ({pieces}) == 0 does not hold")
        self.index, self.data_config, self.context, self.seed = index, data_config, context, seed
        self.micro_batch_size, self.accumulation_steps = micro_batch_size, accumulation_steps
        self.dp_rank, self.dp_degree = dp_rank, dp_degree
        self.starts = shard_starts(context, sp_degree, sp_rank, balanced, chunk_tokens)
        self.plan = plan_sequences(index.token_counts, context, data_config.packing)
        length = context // sp_degree // len(self.starts)
        self._reader = _SliceReader(index, self.plan, self.starts, length, data_config.packing == "join")

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""
        return self.plan.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, padding not counted, those that "join" repeats counted again."""
        if self.data_config.packing == "join":
            return self.num_sequences * self.context
        return self.index.num_tokens

    @property
    def padding_share(self) -> float:
        """Share of an epoch's positions that are padding, 0 to 1."""
        return 1 - self.num_tokens / (self.num_sequences * self.context)

    @property
    def _round(self) -> int:
        """Rows of one micro-step over all replicas."""
        return self.dp_degree * self.micro_batch_size

    def iterate(self, start_step: int) -> Iterator[list[Batch]]:
        """Yield, for every optimizer step from start_step on, without end, this rank's micro-batches.

        Raises ShardError as soon as a sequence cannot be read, also when it was a worker process that read
        it.
        """
        workers = self.data_config.num_workers
        loader = DataLoader(
            self._reader,
            sampler=self._rows(start_step),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=self.data_config.prefetch if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default would draw from the run's own generator
        )
        running = [iter(loader)]  # the only reference: to drop it ends the workers
        atexit.register(running.clear)  # runs before multiprocessing's own exit, which would wait for them
        try:
            while True:
                yield [self._batch(next(running[0]), a * self._round) for a in range(self.accumulation_steps)]
        finally:
            running.clear()
            atexit.unregister(running.clear)

    def sequences(self, step: int) -> list[int]:
        """The numbers of the sequences, in the plan's order, that this replica reads in an optimizer step."""
        rows = self._rows(step)
        return [number for _ in range(self.accumulation_steps) for number in next(rows)]

    def evaluate(self) -> Iterator[Batch]:
        """Yield every sequence once, in the plan's order, dealt over the replicas; read in this process.

        Every rank gets the same number of micro-batches; rows that are missing at the end are padding.
        """
        for start in range(0, self.num_sequences, self._round):
            first = start + self.dp_rank * self.micro_batch_size
            rows = range(first, first + self.micro_batch_size)
            yield self._batch(self._reader[[row if row < self.num_sequences else -1 for row in rows]], start)

    def _rows(self, start_step: int) -> Iterator[list[int]]:
        """The sequences of this replica's rows, one list per micro-step, from the cursor on."""
        cursor = start_step * self.accumulation_steps * self._round + self.dp_rank * self.micro_batch_size
        epoch, order = -1, np.arange(self.num_sequences)
        while True:
            rows = []
            for sample in range(cursor, cursor + self.micro_batch_size):
                if self.data_config.shuffle and epoch != sample // self.num_sequences:
                    epoch = sample // self.num_sequences
                    order = epoch_order(self.num_sequences, self.seed, epoch)
                rows.append(int(order[sample % self.num_sequences]))
            yield rows
            cursor += self._round

    def _batch(self, arrays: Arrays | ShardError, round_start: int) -> Batch:
        """Tensors of one micro-step; raises the ShardError that the reader met."""
        if isinstance(arrays, ShardError):
            raise arrays
        tensors = (None if array is None else torch.from_numpy(array) for array in arrays)
        row_start = round_start + self.dp_rank * self.micro_batch_size
        return Batch(*tensors, self.starts, row_start)
