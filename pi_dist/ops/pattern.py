"""THE definition of who attends to whom: window, strides, skips, schedules over layers, reach. Pure Python.

Offsets are `query position - key position` in tokens, so a positive offset looks back. Python integers have
no width, so no offset overflows at any context.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi_dist.config import EXACT_METHODS, Config, ConfigError, ModelConfig, num_chunks


@dataclass(frozen=True)
class HeadGroup:
    """Key/value heads whose query heads use the same strides, so that they need the same rows.

    `kv_heads` are the group's key/value heads; `strides[s]` is the stride of query head `kv_head * G + s`,
    where G query heads share a key/value head.
    """

    kv_heads: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class PiPattern:
    """Neighbours of a query: its ring and its skips.

    At position i these are the j with `|i-j| <= window`, and `i - m·stride` for `1 <= m <= num_skips`.

    Args:
        window: k, neighbours on a side; the token itself is not counted.
        strides: π in tokens, one int for all heads or one per query head.
        causal: only j <= i (False adds the forward companions i + m·stride and the right half of the ring).
        include_self: whether i is in its own ring (eq. 2 says yes, Algorithm 1 no).
        num_skips: M; 1 is the paper, 0 a plain window.

    A target in both sets is a ring target, counted once: skips with m·stride <= window do not exist.

    Raises:
        ValueError: a size is out of its range.
    """

    window: int
    strides: int | tuple[int, ...]
    causal: bool = True
    include_self: bool = True
    num_skips: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.strides, list):
            object.__setattr__(self, "strides", tuple(self.strides))
        distinct = self.strides if isinstance(self.strides, tuple) else (self.strides,)
        if not all(isinstance(size, int) for size in (self.window, self.num_skips, *distinct)):
            raise ValueError(f"type(size) == int does not hold for every size in {self}")
        if self.window < 0:
            raise ValueError(f"window ({self.window}) >= 0 does not hold")
        if self.num_skips < 0:
            raise ValueError(f"num_skips ({self.num_skips}) >= 0 does not hold")
        if not distinct or min(distinct) < 1:
            raise ValueError(f"strides ({self.strides}) >= 1 does not hold")

    def ring_offsets(self) -> tuple[int, ...]:
        """Offsets of the local window, farthest past first."""
        offsets = range(self.window, -1 if self.causal else -self.window - 1, -1)
        return tuple(o for o in offsets if o != 0 or self.include_self)

    def skip_offsets(self, stride: int) -> tuple[int, ...]:
        """Offsets of the skips of a head with this stride, nearest first, without those inside the window."""
        back = [m * stride for m in range(1, self.num_skips + 1) if m * stride > self.window]
        return tuple(back) if self.causal else tuple(back + [-o for o in back])

    def head_strides(self, num_heads: int) -> tuple[int, ...]:
        """The stride of every query head.

        Raises:
            ValueError: the pattern names strides for another number of heads.
        """
        if isinstance(self.strides, int):
            return (self.strides,) * num_heads
        if len(self.strides) != num_heads:
            raise ValueError(f"len(strides) ({len(self.strides)}) == num_heads ({num_heads}) does not hold")
        return self.strides

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[HeadGroup, ...]:
        """Key/value heads grouped by the strides of their query heads, in order of the first head."""
        strides = self.head_strides(num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) % num_kv_heads ({num_kv_heads}) == 0 does not hold")
        share = num_heads // num_kv_heads
        members: dict[tuple[int, ...], list[int]] = {}
        for kv_head in range(num_kv_heads):
            members.setdefault(strides[kv_head * share : (kv_head + 1) * share], []).append(kv_head)
        return tuple(HeadGroup(tuple(heads), key) for key, heads in members.items())

    def distinct_strides(self) -> tuple[int, ...]:
        """The strides in use, ascending."""
        return (self.strides,) if isinstance(self.strides, int) else tuple(sorted(set(self.strides)))

    def offsets(self) -> tuple[int, ...]:
        """Every offset that some head uses, ascending."""
        skips = {o for stride in self.distinct_strides() for o in self.skip_offsets(stride)}
        return tuple(sorted(skips.union(self.ring_offsets())))

    def reach(self) -> int:
        """How far left one layer reaches, in tokens: the most of window and any head's num_skips·stride."""
        return max(self.window, self.num_skips * max(self.distinct_strides()))


def default_num_strides(stride: int, context: int) -> int:
    """The most strides `stride·2^l`, l < c, that all stay below the context; at least one."""
    count = 1
    while stride << count < context:
        count += 1
    return count


def layer_patterns(model: ModelConfig, context: int) -> tuple[PiPattern, ...]:
    """The pattern of every layer of the model, from its schedule; a window over all for an exact method.

    Args:
        context: tokens of the sequence; sets the default of `num_strides`, and the window of exact methods.

    Raises:
        ConfigError: explicit strides do not fit the model.
    """
    count = model.num_strides or default_num_strides(model.stride, context)
    per_layer: list[int | tuple[int, ...]]
    if model.strides is not None:
        if len(model.strides) != model.num_layers:
            raise ConfigError(
                f"model.strides: len(strides) ({len(model.strides)}) == num_layers ({model.num_layers}) "
                "does not hold"
            )
        per_layer = [tuple(entry) if isinstance(entry, list) else entry for entry in model.strides]
    elif model.schedule == "doubling":
        per_layer = [model.stride << (layer % count) for layer in range(model.num_layers)]
    elif model.schedule == "per_head":
        per_layer = [
            tuple(model.stride << (head % count) for head in range(model.num_heads))
        ] * model.num_layers
    else:
        per_layer = [model.stride] * model.num_layers
    return tuple(
        PiPattern(context - 1, strides, model.causal, num_skips=0)
        if method in EXACT_METHODS
        else PiPattern(
            window=model.window if model.ring else 0,
            strides=strides,
            causal=model.causal,
            include_self=model.include_self and model.ring,
            num_skips=model.num_skips if model.skip and method == "pi" else 0,
        )
        for strides, method in zip(per_layer, model.methods, strict=True)
    )


def total_reach(patterns: tuple[PiPattern, ...]) -> int:
    """Tokens to the left that the whole stack reaches: Σ over layers of max(k, M·π)."""
    return sum(pattern.reach() for pattern in patterns)


def looks_beyond_a_chunk(config: Config) -> bool:
    """Whether chunks read rows that are kept of chunks farther back than the one before."""
    t = config.training
    patterns = layer_patterns(config.model, t.context)
    return num_chunks(t) > 1 and any(pattern.reach() > t.chunk_tokens for pattern in patterns)
