"""What methods send, in closed form: eq. (8) for any window, stride and number of skips, and its peers.

Independent of `exchange_plan`, whose counts it is compared with.
"""

from __future__ import annotations

from pi_dist.config import Config, ConfigError
from pi_dist.ops.pattern import PiPattern, layer_patterns

BYTES = {"fp32": 4, "bf16": 2}


def rows_received(window: int, stride: int, num_skips: int, start: int, length: int) -> int:
    """Rows before its shard [start, start + length) that the shard's queries see, causal, of one stride.

    `max(k, Mπ)` for π <= m, clipped to the sequence; beyond, M runs of m rows, and what of the window's halo
    lies outside them.
    """
    skips = [m * stride for m in range(1, num_skips + 1) if m * stride > window]
    if stride <= length or not skips:
        return min(start, max(window, *skips, 0))
    halo, total = max(0, start - window), min(start, window)
    for offset in skips:
        first, last = max(0, start - offset), max(0, start - offset + length)
        total += last - first - max(0, min(last, start) - max(first, halo))
    return total


def _pi_bytes(config: Config, pattern: PiPattern, num_ranks: int, element: int) -> int:
    """Of all ranks, if an element of K and V is so many bytes."""
    model, length = config.model, config.training.context // num_ranks
    rows = 0
    for group in pattern.head_groups(model.num_heads, model.kv_heads):
        if len(set(group.strides)) > 1:
            raise ConfigError(
                f"model.num_kv_heads: strides of the {len(group.strides)} query heads of a key/value head "
                f"({', '.join(map(str, sorted(set(group.strides))))}) are equal does not hold; what they "
                "receive together has no closed form"
            )
        stride = group.strides[0]
        for rank in range(num_ranks):
            here = rows_received(pattern.window, stride, pattern.num_skips, rank * length, length)
            rows += here * len(group.kv_heads)
    return 2 * model.head_dim * rows * element


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

    - pi, window: K and V of `rows_received` forward, their gradients in fp32 backward.
    - ring: K and V in P-1 steps forward and again backward, where their fp32 gradients make P steps;
      among other layers `rebalanced_bytes` too.
    - ulysses: a (P-1)/P share of q, k, v and out forward, and of their gradients backward.

    Raises:
        ConfigError: the query heads of a key/value head have several strides.
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
        pattern = layer_patterns(model, training.context)[layer]
        total = _pi_bytes(config, pattern, ranks, forwards * element + 4) / ranks
    return total * training.batch_size
