"""Sequence-parallel π-attention: the exchange of keys around the operator of one device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.pi_attention import (
    backend_functions,
    check_labels,
    check_options,
    check_shapes,
    pi_attention,
)
from pi_dist.ops.spec import AttentionSpec, Run
from pi_dist.parallel.exchange_plan import make_plan
from pi_dist.parallel.key_exchange import start_exchange, start_return


def sequence_parallel_pi_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    pattern: PiPattern,
    group: dist.ProcessGroup | None,
    *,
    labels: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    logit_cap: float | None = 20.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    row_start: int = 0,
    fused_exchange: bool = False,
    overlap: str = "interior",
    backend: str = "auto",
) -> torch.Tensor:
    """π-attention over a sequence that lies in contiguous shards of m tokens on the P ranks of `group`.

    Equal to `pi_attention` over the whole sequence of n = P·m tokens, gradients included. Every rank of the
    group calls it with the same pattern and options, in the same order of layers.

    Args:
        q: [B, m, H, D]. k, v: [B, m, H_kv, D]. gate: [B, m, H] fp32 or None. All of this rank's tokens.
        group: the ranks that share the sequence, in its order; None or one rank: no exchange.
        labels: [B, n] document of every token of the whole sequence, negative for padding (see
            `all_gather_tokens`).
        fused_exchange: True sends the window halo inside the all_to_all_single; False by ring send/recv
            beside it.
        overlap: "interior" works on neighbours within the shard while rows travel, forward and backward, so
            that only rows at the boundary wait; "none" waits first.
        Other arguments as in `pi_dist.ops.pi_attention`.

    Returns:
        [B, m, H, D].

    Raises:
        ValueError: as `pi_attention`, and if labels are not those of the whole sequence.
    """
    num_ranks = 1 if group is None else dist.get_world_size(group)
    check_shapes(q, k, v, gate)
    seq_len = num_ranks * q.shape[1]
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"query length ({q.shape[1]}) == key length ({k.shape[1]}) of a shard does not hold")
    check_labels(labels, q.shape[0], seq_len)
    options = {"softmax_scale": softmax_scale, "logit_cap": logit_cap, "dropout_p": dropout_p, "seed": seed}
    if num_ranks == 1:
        return pi_attention(
            q, k, v, gate, pattern, segment_ids=labels, row_start=row_start, backend=backend, **options
        )
    check_options(**options)
    if overlap not in ("none", "interior"):
        raise ValueError(f"overlap ({overlap!r}) in ('none', 'interior') does not hold")
    plan = make_plan(
        pattern, q.shape[2], k.shape[2], seq_len, num_ranks, dist.get_rank(group), fused_exchange
    )
    spec = AttentionSpec(
        pattern=pattern,
        num_kv_heads=k.shape[2],
        blocks=plan.blocks,
        softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        logit_cap=logit_cap,
        dropout_p=dropout_p,
        seed=seed or 0,
        query_start=plan.shard.start,
        row_start=row_start,
    )
    return _SequenceParallelPiAttention.apply(
        q, k, v, gate, labels, spec, plan, group, overlap, backend_functions(backend, q)
    )


def _labels(labels: torch.Tensor | None, shard: Run, spec: AttentionSpec):
    """(labels of the queries, labels of the keys of each block), from those of the whole sequence [B, n]."""
    if labels is None:
        return None, [None] * len(spec.blocks)
    return labels[:, shard.start : shard.stop], [
        labels[:, block.run.start : block.run.stop] for block in spec.blocks
    ]


class _SequenceParallelPiAttention(torch.autograd.Function):
    """One Function around exchange and operator, so that gradients of received rows travel in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, gate, labels, spec, plan, group, overlap, functions):
        forward, ctx.backward_function = functions
        wait = start_exchange(plan, k, v, group)
        received: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

        def arrive() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            if not received:
                received.append(wait())
            return received[0]

        if overlap == "none":
            arrive()
        out, lse = forward(spec, q, [k], [v], gate, *_labels(labels, plan.shard, spec), arrive)
        keys, values = arrive()
        ctx.save_for_backward(q, gate, labels, out, lse, k, *keys, v, *values)
        ctx.spec, ctx.plan, ctx.group, ctx.overlap = spec, plan, group, overlap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, gate, labels, out, lse, *rows = ctx.saved_tensors
        keys, values = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        finish: list[Callable[[torch.Tensor, torch.Tensor], None]] = []

        def send_back(dkeys: list[torch.Tensor], dvalues: list[torch.Tensor]) -> None:
            wait, add_to = start_return(ctx.plan, keys[0], dkeys, dvalues, ctx.group)
            finish.append(add_to)
            if ctx.overlap == "none":
                wait()

        dq, dk, dv, dgate = ctx.backward_function(
            ctx.spec, q, keys, values, gate, *_labels(labels, ctx.plan.shard, ctx.spec), out, lse, dout,
            send_back,
        )  # fmt: skip
        finish[0](dk, dv)
        dgate = None if dgate is None else dgate.to(gate.dtype)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dgate, *[None] * 6
