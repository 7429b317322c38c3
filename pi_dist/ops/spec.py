"""One call of the operator, frozen: what every backend needs beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pi_dist.ops.pattern import PiPattern

GATE_EPSILON = 1e-4  # ε of α̃ = (1-2ε)α + ε, which keeps the log-prior finite


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in, and what gradients travel in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Run(NamedTuple):
    """Global token positions [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True)
class KeyBlock:
    """Where the keys of one tensor [B, stop - start, len(heads), D] lie: key/value heads and positions."""

    heads: tuple[int, ...]
    run: Run


@dataclass(frozen=True)
class AttentionSpec:
    """Everything about a call but its tensors.

    Attributes:
        blocks: where the keys lie; no two blocks hold one position of one head. A position in no block does
            not exist (it lies beyond the sequence) and is nobody's neighbour.
        query_start: global position of the first query; queries are contiguous.
        row_start: global number of the first batch row, for dropout.
        seed: of this layer, step and micro-step; used if dropout_p > 0.
    """

    pattern: PiPattern
    num_kv_heads: int
    blocks: tuple[KeyBlock, ...]
    softmax_scale: float
    logit_cap: float | None
    dropout_p: float
    seed: int
    query_start: int
    row_start: int


def nothing_arrives() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of the blocks after the first, where there are none."""
    return [], []


def nothing_to_send(dkeys: list[torch.Tensor], dvalues: list[torch.Tensor]) -> None:
    """Takes the gradients of the blocks after the first, where nobody waits for them."""
