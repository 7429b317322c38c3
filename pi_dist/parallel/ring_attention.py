"""Exact attention over a sequence on several ranks, by a ring (Liu et al., arXiv 2310.01889), and on one.

Keys and values travel round the ring, one neighbour a step, while the step's block is worked on; softmaxes
merge by their lse. Backward, the gradients of keys and values travel with them and end at their owner.
The front and the back of the sequence are paired, so that causal work is the same on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pi_dist.ops.exact_attention import ExactBlock, exact_attention_bwd, exact_attention_fwd, merge
from pi_dist.ops.pi_attention import check_labels, check_shapes
from pi_dist.ops.spec import accumulate_dtype
from pi_dist.parallel.balance import balanced_columns, rebalance
from pi_dist.parallel.collectives import ring_exchange


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | None,
    *,
    labels: torch.Tensor | None = None,
    balanced: bool = False,
) -> torch.Tensor:
    """Causal softmax attention over a sequence in shards of m tokens on the P ranks of `group`.

    Args:
        q: [B, m, H, D]. k, v: [B, m, H_kv, D].
        group: the ranks that share the sequence, in its order; None or one rank: no exchange.
        labels: [B, n] document of every token, negative for padding, in the order of ranks.
        balanced: shards are two pieces, see `shard_starts`; else they are contiguous, and q, k, v and the
            output are exchanged for those of two pieces and back, so that all ranks have the same work.

    Returns:
        [B, m, H, D]; exactly 0 for padding.

    Raises:
        ValueError: shapes or dtypes that do not fit, or shards that have no halves.
    """
    check_shapes(q, k, v, None)
    num_ranks = 1 if group is None else dist.get_world_size(group)
    check_labels(labels, q.shape[0], num_ranks * q.shape[1])
    if balanced or num_ranks == 1:
        return _RingAttention.apply(q, k, v, labels, group)
    if q.shape[1] % 2:
        raise ValueError(f"tokens of a shard ({q.shape[1]}) % 2 == 0 does not hold for a balanced ring")
    packed = rebalance(torch.cat([q, k, v], dim=2), group)
    q, k, v = packed.split([x.shape[2] for x in (q, k, v)], dim=2)
    labels = None if labels is None else balanced_columns(labels, num_ranks)
    return rebalance(_RingAttention.apply(q, k, v, labels, group), group, back=True)


class _Step(NamedTuple):
    """What a rank's queries do with the keys of `source`: queries and keys [start, stop), by which rule."""

    queries: slice
    keys: slice
    block: ExactBlock


def _step(labels: torch.Tensor | None, length: int, rank: int, source: int, scale: float) -> _Step:
    queries = keys = slice(0, length)
    if source < rank:  # of their two pieces, the second lies behind both of ours
        keys = slice(0, length // 2)
    elif source > rank:  # both lie behind our first piece and before our second
        queries = slice(length // 2, length)
    of_ranks = [None if labels is None else labels[:, r * length : (r + 1) * length] for r in (rank, source)]
    parts = (None if x is None else x[:, part] for x, part in zip(of_ranks, (queries, keys), strict=True))
    return _Step(queries, keys, ExactBlock(rank == source, *parts, scale))


class _Ring:
    """Passes a tensor to the next rank and takes that of the previous one."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def start(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[dist.Work]]:
        """(what arrives, what to wait for before it is read and before `tensor` is changed)."""
        arriving = torch.empty_like(tensor)
        to, from_ = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return arriving, ring_exchange([(to, tensor)], [(from_, arriving)], self.group)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, labels, group):
        ring, scale, length = _Ring(group), q.shape[3] ** -0.5, q.shape[1]
        held = torch.stack([k, v]) if ring.size > 1 else (k, v)
        out = lse = None
        for step in range(ring.size):
            source = (ring.rank - step) % ring.size
            arriving, works = ring.start(held) if step + 1 < ring.size else (None, [])
            do = _step(labels, length, ring.rank, source, scale)
            mine = do.queries
            part = exact_attention_fwd(do.block, q[:, mine], *(x[:, do.keys] for x in held))
            if out is None:  # the first step is a rank's own keys, for all of its queries
                out, lse = part[0].to(part[1].dtype), part[1].clone()
            else:
                out[:, mine], lse[:, mine] = merge(out[:, mine], lse[:, mine], *part)
            _wait(works)
            held = arriving
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, labels, out, lse)
        ctx.group = group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, labels, out, lse = ctx.saved_tensors
        ring, scale = _Ring(ctx.group), q.shape[3] ** -0.5
        held, dtype = torch.stack([k, v]) if ring.size > 1 else (k, v), accumulate_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        dheld = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)
        returning: list[dist.Work] = []  # gradients on their way here, for the keys that are held now
        for step in range(ring.size):
            source = (ring.rank - step) % ring.size
            arriving, works = ring.start(held) if step + 1 < ring.size else (None, [])
            do = _step(labels, q.shape[1], ring.rank, source, scale)
            q_rows, out_rows, lse_rows, dout_rows = (x[:, do.queries] for x in (q, out, lse, dout))
            k_rows, v_rows = (x[:, do.keys] for x in held)
            part = exact_attention_bwd(do.block, q_rows, k_rows, v_rows, out_rows, lse_rows, dout_rows)
            _wait(returning)
            places = (dq[:, do.queries], *(x[:, do.keys] for x in dheld))
            for total, gradient in zip(places, part, strict=True):
                total += gradient
            _wait(works)
            held = arriving
            if ring.size > 1:  # to the rank that holds these keys next; after the last step, to their owner
                dheld, returning = ring.start(dheld)
        _wait(returning)
        return dq.to(q.dtype), dheld[0].to(k.dtype), dheld[1].to(v.dtype), None, None
