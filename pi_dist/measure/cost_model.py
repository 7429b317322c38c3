"""What methods send, in closed form: eq. (8) for any window, stride and number of skips, and its peers.

Independent of `exchange_plan`, whose counts it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from pi_dist.config import Config, num_chunks
from pi_dist.ops.pattern import layer_patterns

BYTES = {"fp32": 4, "bf16": 2}


def rows_received(window: int, stride: int, num_skips: int, start: int, length: int) -> int:
    """Rows before its shard [start, start + length) that the shard's queries see, causal, of one stride.

    `max(k, Mπ)` for π <= m, clipped to the sequence; beyond, M runs of m rows, and what of the window's halo
    lies outside them.
    """
    if stride <= length or num_skips * stride <= window:
        return min(start, max(window, num_skips * stride))
    halo, total = max(0, start - window), min(start, window)
    skips = range(-(-(window + 1) // stride) * stride, min(num_skips * stride, start + length) + 1, stride)
    for offset in skips:
        first, last = max(0, start - offset), max(0, start - offset + length)
        total += last - first - max(0, min(last, start) - max(first, halo))
    return total


def _covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Integers in the union of half-open intervals."""
    total, end = 0, None
    for start, stop in sorted(intervals):
        if end is not None:
            start = max(start, end)
        if stop > start:
            total, end = total + stop - start, stop
    return total


@lru_cache(maxsize=4096)
def _rows_in_chunks(
    window: int, strides: tuple[int, ...], num_skips: int, begin: int, length: int, ranks: int, chunk: int
) -> int:
    """Rows that all ranks receive for a chunk of `chunk` tokens that begins there, whose shards are so long.

    As `rows_received`, but that queries may have several strides, and that a rank holds some of what is
    before its shard: its shards of earlier chunks.
    """
    total, reach = 0, max(window, num_skips * max(strides))
    for rank in range(ranks):
        start = begin + rank * length
        wanted = [(start - window, start)]
        for stride in strides:
            for offset in range(stride, num_skips * stride + 1, stride):
                if offset > window:
                    wanted.append((start - offset, min(start, start - offset + length)))
        mine, size = rank * (chunk // ranks), chunk // ranks
        first = max(0, (start - reach) // chunk) * chunk
        own = [(at + mine, at + mine + size) for at in range(first, begin, chunk)]
        total += _covered([*((max(0, a), b) for a, b in wanted), *own]) - _covered(own)
    return total


def _pi_bytes(config: Config, layer: int) -> int:
    """Of all ranks, for one sequence: keys and values in every forward pass, gradients of them once.

    In chunks also in the pass that makes the rows of all but the last, which in the last layer receives none.
    """
    model, training, ranks = config.model, config.training, config.parallel.sp_degree
    pattern = layer_patterns(model, training.context)[layer]
    chunk_tokens = training.chunk_tokens or training.context
    chunks, length = num_chunks(training), chunk_tokens // ranks
    forwards = 2 if training.activation_checkpointing is True else 1
    last_layer, element, total = layer == model.num_layers - 1, BYTES[training.precision], 0
    for group in pattern.head_groups(model.num_heads, model.kv_heads):
        strides = tuple(sorted(set(group.strides)))
        for chunk in range(chunks):
            begin = min(chunk, -(-pattern.reach() // chunk_tokens)) * chunk_tokens  # farther on all are alike
            here = min(length, (training.context - chunk * chunk_tokens) // ranks)
            if chunks == 1 and len(strides) == 1:
                of_all = (pattern.window, *strides, pattern.num_skips)
                rows = sum(rows_received(*of_all, rank * here, here) for rank in range(ranks))
            else:
                of_all = (pattern.window, strides, pattern.num_skips)
                rows = _rows_in_chunks(*of_all, begin, here, ranks, chunk_tokens)
            passes = forwards + (chunk < chunks - 1 and not last_layer)
            total += 2 * model.head_dim * len(group.kv_heads) * rows * (passes * element + 4)
    return total


def rebalanced_bytes(config: Config) -> float:
    """Of `exchanged_bytes`, for one sequence, those around a ring layer whose shards are contiguous.

    q, k, v and out forward, and their gradients backward, of all 2P pieces but those that stay: the first,
    and one more unless 3 divides P.
    """
    model, training, ranks = config.model, config.training, config.parallel.sp_degree
    if config.balanced or ranks == 1:
        return 0.0
    tokens = (2 * ranks - 1 - (ranks % 3 > 0)) * (training.context // (2 * ranks)) / ranks
    forwards = 2 if training.activation_checkpointing is True else 1
    width = 2 * (model.hidden_size + model.kv_heads * model.head_dim)
    return tokens * width * (forwards + 1) * BYTES[training.precision]


def exchanged_bytes(config: Config, layer: int) -> float:
    """Bytes that a rank sends for one layer in one optimizer step, if its replica has the whole batch.

    The mean over the replica's ranks.

    Forward (again where activations are recomputed) and backward. Segment ids, which travel once for all
    layers, and ZeRO's traffic are not among them.

    - pi, window: K and V of `rows_received` forward, their gradients in fp32 backward; in chunks again for
      each, and for all but the last once more, before the others.
    - ring: K and V in P-1 steps forward and again backward, where their fp32 gradients make P steps;
      among other layers `rebalanced_bytes` too.
    - ulysses: a (P-1)/P share of q, k, v and out forward, and of their gradients backward.
    """
    model, training, ranks = config.model, config.training, config.parallel.sp_degree
    element, length = BYTES[training.precision], training.context // ranks
    forwards = 2 if training.activation_checkpointing is True else 1
    method, kv = model.methods[layer], model.kv_heads * model.head_dim
    if ranks == 1:
        total = 0.0
    elif method == "ring":
        total = 2 * length * kv * ((ranks - 1) * (forwards + 1) * element + ranks * 4)
        total += rebalanced_bytes(config)
    elif method == "ulysses":
        total = 2 * (model.hidden_size + kv) * length * (ranks - 1) / ranks * (forwards + 1) * element
    else:
        total = _pi_bytes(config, layer) / ranks
    return total * training.batch_size
