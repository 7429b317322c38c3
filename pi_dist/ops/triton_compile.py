"""Compiles the Triton kernels that calls of the operator launch, before there are any tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pi_dist.ops.spec import AttentionSpec
from pi_dist.ops.triton_backend import pi_attention_bwd, pi_attention_fwd


@dataclass(frozen=True)
class Call:
    """What a call of the operator is, but for the values of its tensors.

    Attributes:
        batch, q_len, num_heads, head_dim: of q [B, T, H, D].
        gated, labelled: whether there are a gate and labels of documents.
    """

    spec: AttentionSpec
    batch: int
    q_len: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    gated: bool
    labelled: bool

    def launch(self, run: Callable[..., None]) -> None:
        """Give the launches to `run`, with tensors that have no memory, laid out as the model's."""

        def meta(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def labels(tensor: torch.Tensor) -> torch.Tensor | None:
            return meta(*tensor.shape[:2], dtype=torch.int32) if self.labelled else None

        q = meta(self.batch, self.q_len, self.num_heads, self.head_dim)
        keys = [
            meta(self.batch, block.run.stop - block.run.start, len(block.heads), self.head_dim)
            for block in self.spec.blocks
        ]
        of_queries = meta(self.batch, self.num_heads, self.q_len, dtype=torch.float32).transpose(1, 2)
        rest = (of_queries if self.gated else None, labels(q), [labels(k) for k in keys])
        pi_attention_fwd(self.spec, q, keys[:1], keys[:1], *rest, lambda: (keys[1:], keys[1:]), run=run)
        pi_attention_bwd(self.spec, q, keys, keys, *rest, q, of_queries, q, run=run)


def compile_kernels(calls: Iterable[Call]) -> int:
    """Compile for the current GPU, side by side in threads, what calls need, forward and backward.

    The kernels land in Triton's caches, in memory and on disk; those that are in memory already cost nothing.

    Returns:
        How many were compiled or read from disk.
    """
    from triton.runtime._async_compile import AsyncCompileMode  # private: another Triton may not have it

    def compile_only(kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
        kernel.warmup(*arguments, grid=(programs,), **keywords)

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool) as mode:
        for call in calls:
            call.launch(compile_only)
        return len(mode.raw_futures)
