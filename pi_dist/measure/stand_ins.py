"""In place of exact attention's kernels: the memory that they take, without the time.

What a long context costs an exact method is time: its memory can be measured without it. Each shape of call
runs once, to see what it allocates beside its results, which grows with its tokens; after that a call only
allocates as much, and its results, which are zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from pi_dist.ops.exact_attention import ExactBlock, exact_attention_bwd, exact_attention_fwd
from pi_dist.ops.spec import accumulate_dtype
from pi_dist.parallel import ring_attention

PROBE_TOKENS = 131072  # queries and keys of the call that runs, at most; what it allocates is scaled up


class StandIns:
    """Takes the place of `exact_attention_fwd` and `exact_attention_bwd` while `in_place` is entered.

    Args:
        extra_bytes: bytes that a call allocates at its peak, beside what it returns.
    """

    def __init__(self, extra_bytes: Callable[[Callable[[], Any]], int]) -> None:
        self._extra_bytes = extra_bytes
        self._known: dict[tuple, float] = {}  # bytes by shape of call

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        with (
            patch.object(ring_attention, "exact_attention_fwd", self._forward),
            patch.object(ring_attention, "exact_attention_bwd", self._backward),
        ):
            yield

    def _forward(
        self, block: ExactBlock, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        def results() -> tuple[torch.Tensor, ...]:
            return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=accumulate_dtype(q.dtype))

        return self._stand_in(exact_attention_fwd, block, (q, k, v), results)

    def _backward(self, block: ExactBlock, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def results() -> tuple[torch.Tensor, ...]:
            return tuple(torch.zeros_like(x) for x in tensors[:3])

        return self._stand_in(exact_attention_bwd, block, tensors, results)

    def _stand_in(
        self,
        function: Callable[..., Any],
        block: ExactBlock,
        tensors: tuple[torch.Tensor, ...],
        results: Callable[[], tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """tensors: [B, T, ...], queries, keys, values and what else `function` takes."""
        q, k = tensors[:2]
        what = (function, block.causal, q.shape, k.shape, q.dtype)
        if what not in self._known:
            parts = [x[:, :PROBE_TOKENS] for x in tensors]
            scale = (q.shape[1] + k.shape[1]) / (parts[0].shape[1] + parts[1].shape[1])
            self._known[what] = scale * self._extra_bytes(lambda: function(block, *parts))
        workspace = torch.empty(int(self._known[what]), dtype=torch.uint8, device=q.device)
        found = results()
        del workspace  # as a kernel lets go of it
        return found
