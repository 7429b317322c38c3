"""Exact attention by DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): ranks share heads, not tokens.

An all_to_all gives every rank the whole sequence of H/P heads, and another brings the outputs back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pi_dist.parallel.ring_attention import ring_attention


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | None,
    *,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ring_attention`, for at most H_kv ranks.

    Raises:
        ValueError: the ranks do not divide the key/value heads.
    """
    num_ranks = 1 if group is None else dist.get_world_size(group)
    if k.shape[2] % num_ranks:
        raise ValueError(f"num_kv_heads ({k.shape[2]}) % ranks ({num_ranks}) == 0 does not hold for ulysses")
    if num_ranks == 1:
        return ring_attention(q, k, v, None, labels=labels)
    from deepspeed.sequence.layer import DistributedAttention

    def local(*tensors: torch.Tensor) -> torch.Tensor:
        return ring_attention(*tensors, None, labels=labels)

    return DistributedAttention(local, group, scatter_idx=2, gather_idx=1)(q, k, v, 0)
