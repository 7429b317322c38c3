"""π-attention over shards and chunks of a sequence: the exchange of keys around one device's operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pi_dist.config import OVERLAPS
from pi_dist.ops.pattern import PiPattern
from pi_dist.ops.pi_attention import (
    backend_functions,
    check_labels,
    check_options,
    check_shapes,
    pi_attention,
)
from pi_dist.ops.spec import AttentionSpec, Run
from pi_dist.parallel.exchange_plan import ExchangePlan, count_rows, make_plan
from pi_dist.parallel.kept_keys import KeptKeys
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
    kept: KeptKeys | None = None,
    chunk: int = 0,
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
            that only rows at the boundary wait; "pipelined" also takes batch rows one by one, and the rows of
            the next travel while the current one is worked on (Section III-B4); "none" waits first.
        kept: None: the tokens are a shard of the whole sequence. Else they are one of chunk number `chunk`,
            and keys of earlier chunks are those kept there, where this chunk's are kept too. Chunks come in
            order; backward passes, each after a second forward pass of its chunk, in reverse order. Not with
            "pipelined".
        Other arguments as in `pi_dist.ops.pi_attention`.

    Returns:
        [B, m, H, D].

    Raises:
        ValueError: as `pi_attention`, and if labels are not those of the whole sequence.
    """
    num_ranks = 1 if group is None else dist.get_world_size(group)
    check_shapes(q, k, v, gate)
    seq_len = num_ranks * q.shape[1] if kept is None else kept.seq_len
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"query length ({q.shape[1]}) == key length ({k.shape[1]}) of a shard does not hold")
    check_labels(labels, q.shape[0], seq_len)
    options = {"softmax_scale": softmax_scale, "logit_cap": logit_cap, "dropout_p": dropout_p, "seed": seed}
    if num_ranks == 1 and kept is None:
        return pi_attention(
            q, k, v, gate, pattern, segment_ids=labels, row_start=row_start, backend=backend, **options
        )
    check_options(**options)
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap ({overlap!r}) in {OVERLAPS} does not hold")
    plan = _plan(pattern, q.shape[2], k, group, fused_exchange, kept, chunk)
    if kept is not None:
        if overlap == "pipelined":
            raise ValueError("overlap ('pipelined') == 'interior' or 'none' does not hold in chunks")
        kept.keep(plan, k.detach(), v.detach(), pattern)
    spec = AttentionSpec(
        pattern=pattern,
        num_kv_heads=k.shape[2],
        blocks=plan.blocks,
        softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        logit_cap=logit_cap,
        dropout_p=dropout_p,
        seed=(seed or 0) if dropout_p > 0 else 0,  # else calls of different steps would not be alike
        query_start=plan.shard.start,
        row_start=row_start if dropout_p > 0 else 0,
    )
    return _SequenceParallelPiAttention.apply(
        q, k, v, gate, labels, spec, plan, group, overlap, kept, backend_functions(backend, q)
    )


def keep_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    pattern: PiPattern,
    group: dist.ProcessGroup | None,
    *,
    fused_exchange: bool,
    kept: KeptKeys,
    chunk: int,
) -> None:
    """Keep a chunk's k and v [B, m, H_kv, D] for later ones, of a layer whose output nobody reads."""
    plan = _plan(pattern, num_heads, k, group, fused_exchange, kept, chunk)
    kept.keep(plan, k.detach(), v.detach(), pattern)


def _plan(
    pattern: PiPattern,
    num_heads: int,
    k: torch.Tensor,
    group: dist.ProcessGroup | None,
    fused_exchange: bool,
    kept: KeptKeys | None,
    chunk: int,
) -> ExchangePlan:
    """Of a shard of a sequence, or of the chunk of one."""
    num_ranks = 1 if group is None else dist.get_world_size(group)
    plan = make_plan(
        pattern,
        num_heads,
        k.shape[2],
        num_ranks * k.shape[1] if kept is None else kept.seq_len,
        num_ranks,
        0 if group is None else dist.get_rank(group),
        fused_exchange,
        None if kept is None else kept.chunk_tokens,
        chunk,
    )
    if k.shape[1] != count_rows([plan.shard]):
        raise ValueError(f"tokens ({k.shape[1]}) == those of {plan.shard} of the chunk does not hold")
    return plan


def _labels(labels: torch.Tensor | None, shard: Run, spec: AttentionSpec):
    """(labels of the queries, labels of the keys of each block), from those of the whole sequence [B, n]."""
    if labels is None:
        return None, [None] * len(spec.blocks)
    return labels[:, shard.start : shard.stop], [
        labels[:, block.run.start : block.run.stop] for block in spec.blocks
    ]


def _pieces(batch: int, overlap: str) -> list[slice]:
    """The batch rows that are worked on together."""
    return [slice(row, row + 1) for row in range(batch)] if overlap == "pipelined" else [slice(0, batch)]


class _SequenceParallelPiAttention(torch.autograd.Function):
    """One Function around exchange and operator: gradients of others' rows travel and are added in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, gate, labels, spec, plan, group, overlap, kept, functions):
        forward, ctx.backward_function = functions
        pieces = _pieces(q.shape[0], overlap)
        waits = [start_exchange(plan, k[pieces[0]], v[pieces[0]], group, kept)]
        outs, lses, received = [], [], []
        for number, piece in enumerate(pieces):
            if number + 1 < len(pieces):
                following = pieces[number + 1]
                waits.append(start_exchange(plan, k[following], v[following], group))
            arrive = cache(waits[number])  # its rows are unpacked once, by whoever is first to need them
            if overlap == "none":
                arrive()
            mine = _Piece(piece, gate, labels, spec, plan.shard)
            out, lse = forward(mine.spec, q[piece], [k[piece]], [v[piece]], *mine.options, arrive)
            outs.append(out)
            lses.append(lse)
            received += [row for rows in arrive() for row in rows]
        out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
        ctx.save_for_backward(q, k, v, gate, labels, out, lse, *received)
        ctx.spec, ctx.plan, ctx.group, ctx.overlap, ctx.kept = spec, plan, group, overlap, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, gate, labels, out, lse, *received = ctx.saved_tensors
        pieces, others = _pieces(q.shape[0], ctx.overlap), len(ctx.spec.blocks) - 1
        gradients: list[tuple[torch.Tensor | None, ...]] = []
        finish: list[Callable[[torch.Tensor, torch.Tensor], None]] = []
        for number, piece in enumerate(pieces):
            rows = received[2 * others * number : 2 * others * (number + 1)]
            keys, values = [k[piece], *rows[:others]], [v[piece], *rows[others:]]

            def send_back(
                dkeys: list[torch.Tensor], dvalues: list[torch.Tensor], like: torch.Tensor = keys[0]
            ) -> None:
                wait, add_to = start_return(ctx.plan, like, dkeys, dvalues, ctx.group, ctx.kept)
                finish.append(add_to)
                if ctx.overlap == "none":
                    wait()

            mine = _Piece(piece, gate, labels, ctx.spec, ctx.plan.shard)
            tensors = (q[piece], keys, values, *mine.options, out[piece], lse[piece], dout[piece])
            gradients.append(ctx.backward_function(mine.spec, *tensors, send_back))
            if number > 0:  # those of the piece before have travelled meanwhile
                finish[number - 1](*gradients[number - 1][1:3])
        finish[-1](*gradients[-1][1:3])
        dq, dk, dv, dgate = (
            None if x[0] is None else x[0] if len(x) == 1 else torch.cat(x)
            for x in zip(*gradients, strict=True)
        )
        dgate = None if dgate is None else dgate.to(gate.dtype)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dgate, *[None] * 7


class _Piece:
    """What a call on some batch rows takes beside q, k and v."""

    def __init__(
        self,
        rows: slice,
        gate: torch.Tensor | None,
        labels: torch.Tensor | None,
        spec: AttentionSpec,
        shard: Run,
    ) -> None:
        later = rows.start if spec.dropout_p > 0 else 0
        self.spec = replace(spec, row_start=spec.row_start + later) if later else spec
        gate, labels = (None if x is None else x[rows] for x in (gate, labels))
        self.options = gate, *_labels(labels, shard, spec)
