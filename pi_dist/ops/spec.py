"""One call of the operator, frozen: what every backend needs beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pi_dist.ops.pattern import HeadGroup, PiPattern

GATE_EPSILON = 1e-4  # ε of α̃ = (1-2ε)α + ε, which keeps the log-prior finite


class Run(NamedTuple):
    """Global token positions [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True)
class KeyGroup:
    """Key/value heads that use the same rows; the group's key axis is its runs laid end to end, ascending."""

    heads: HeadGroup
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """Everything about a call but its tensors.

    Attributes:
        groups: the key/value heads in groups, with the global positions of each group's key rows. A position
            in no run does not exist (it lies beyond the sequence) and is nobody's neighbour.
        query_start: global position of the first query; queries are contiguous.
        row_start: global number of the first batch row, for dropout.
        seed: of this layer, step and micro-step; used if dropout_p > 0.
    """

    pattern: PiPattern
    groups: tuple[KeyGroup, ...]
    softmax_scale: float
    logit_cap: float | None
    dropout_p: float
    seed: int
    query_start: int
    row_start: int

    @property
    def head_groups(self) -> tuple[HeadGroup, ...]:
        """The groups without their positions."""
        return tuple(group.heads for group in self.groups)
