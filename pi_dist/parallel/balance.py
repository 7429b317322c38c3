"""Contiguous shards to those of two pieces, and back: equal causal work for a ring in a stack of others.

Of the 2P pieces of a sequence rank r holds 2r and 2r+1, its neighbours in a window beside it, and works on r
and 2P-1-r, see `shard_starts`. Each piece travels once, straight to the rank that works on it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def rebalance(tensor: torch.Tensor, group: dist.ProcessGroup, back: bool = False) -> torch.Tensor:
    """[B, m, ...] of a contiguous shard to [B, m, ...] of two pieces, or back; m is even. Differentiable."""
    return _Rebalance.apply(tensor, group, back)


def balanced_columns(labels: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[B, n] in the order of the sequence to that of ranks with two pieces."""
    front, back = labels.unflatten(1, (2 * num_ranks, -1)).chunk(2, dim=1)
    return torch.stack([front, back.flip(1)], dim=2).flatten(1)  # by no list of indices: a GPU's host waits


class _Rebalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, back):
        ctx.group, ctx.back = group, back
        return _exchange(tensor, group, back)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _exchange(gradient, ctx.group, not ctx.back), None, None


def _exchange(tensor: torch.Tensor, group: dist.ProcessGroup, back: bool) -> torch.Tensor:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    last = 2 * size - 1
    workers = [min(piece, last - piece) for piece in (2 * rank, 2 * rank + 1)]  # of the pieces held here
    holders = [piece // 2 for piece in (rank, last - rank)]  # of those worked on here
    to, from_ = (holders, workers) if back else (workers, holders)
    pieces = _ascending(tensor.unflatten(1, (2, -1)).transpose(0, 1), to).contiguous()
    received = torch.empty_like(pieces)
    counts = ([ranks.count(peer) for peer in range(size)] for ranks in (from_, to))
    dist.all_to_all_single(received, pieces, *counts, group=group)
    return _ascending(received, from_).transpose(0, 1).flatten(1, 2)


def _ascending(pieces: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """Two pieces between their own order and that of their ranks, in which all_to_all_single has them."""
    return pieces.flip(0) if ranks[0] > ranks[1] else pieces
