"""Runs an exchange plan: keys and values forward, their gradients back the same way.

Forward, every rank ends up with the key axis of each head group: its own shard and the received rows,
ascending. Backward, gradients of received rows return to their owner in the accumulation dtype (fp32 for
bf16) and are added.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from pi_dist.ops.pi_attention import merge_heads, split_heads
from pi_dist.ops.spec import Run
from pi_dist.parallel.collectives import all_to_all, ring_exchange
from pi_dist.parallel.exchange_plan import ExchangePlan, Message


def exchange_keys(
    plan: ExchangePlan, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of each head group, [B, R_g, H_g, D] over its key runs, from shards [B, m, H_kv, D]."""
    batch, _, _, head_dim = k.shape
    own = list(zip(split_heads(plan.groups, k), split_heads(plan.groups, v), strict=True))

    def pack(message: Message) -> Iterator[torch.Tensor]:
        for (keys, values), rows in zip(own, message.rows, strict=True):
            for tensor in (keys, values):
                yield from (
                    tensor[:, run.start - plan.shard.start : run.stop - plan.shard.start] for run in rows
                )

    pieces: list[list[tuple[Run, torch.Tensor, torch.Tensor]]] = [[(plan.shard, *kv)] for kv in own]
    for message, flat in _travel(plan, pack, batch, head_dim, k, group, backward=False):
        for index, (group_rows, blocks) in enumerate(_unpack(message, flat, plan, batch, head_dim)):
            pieces[index] += [(run, *block) for run, block in zip(group_rows, blocks, strict=True)]
    ordered = [sorted(of_group, key=lambda piece: piece[0]) for of_group in pieces]
    keys = [torch.cat([piece[1] for piece in of_group], dim=1) for of_group in ordered]
    values = [torch.cat([piece[2] for piece in of_group], dim=1) for of_group in ordered]
    return keys, values


def return_gradients(
    plan: ExchangePlan, dkeys: list[torch.Tensor], dvalues: list[torch.Tensor], group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The conjugate of `exchange_keys`: gradients of the key axes to (dk, dv) of the shard, [B, m, H_kv, D].

    Sums are in the gradients' dtype, in an order that does not depend on timing.
    """
    batch, _, _, head_dim = dkeys[0].shape

    def rows_of(tensor: torch.Tensor, index: int, run: Run) -> torch.Tensor:
        row = 0
        for whole in plan.key_runs[index]:
            if whole.start <= run.start and run.stop <= whole.stop:
                return tensor[:, row + run.start - whole.start : row + run.stop - whole.start]
            row += whole.stop - whole.start
        raise AssertionError(f"{run} is not on the key axis {plan.key_runs[index]}")

    def pack(message: Message) -> Iterator[torch.Tensor]:
        for index, rows in enumerate(message.rows):
            for tensor in (dkeys[index], dvalues[index]):
                yield from (rows_of(tensor, index, run) for run in rows)

    own = [
        tuple(rows_of(tensor, index, plan.shard).clone() for tensor in (dkeys[index], dvalues[index]))
        for index in range(len(plan.groups))
    ]
    for message, flat in _travel(plan, pack, batch, head_dim, dkeys[0], group, backward=True):
        for index, (group_rows, blocks) in enumerate(_unpack(message, flat, plan, batch, head_dim)):
            for run, block in zip(group_rows, blocks, strict=True):
                for target, gradient in zip(own[index], block, strict=True):
                    target[:, run.start - plan.shard.start : run.stop - plan.shard.start] += gradient
    dk, dv = (merge_heads(plan.groups, list(tensors)) for tensors in zip(*own, strict=True))
    return dk, dv


def _travel(plan, pack, batch, head_dim, like, group, *, backward) -> list[tuple[Message, torch.Tensor]]:
    """Send what `pack` yields for each message; returns the received (message, flat tensor).

    Backward, receives become sends. The order of what is returned never changes, and the order of collectives
    is the same on every rank.
    """
    halo_sends, halo_receives = plan.halo_sends, plan.halo_receives
    skip_sends, skip_receives = plan.skip_sends, plan.skip_receives
    if backward:
        halo_sends, halo_receives = halo_receives, halo_sends
        skip_sends, skip_receives = skip_receives, skip_sends

    def flat(messages: tuple[Message, ...]) -> torch.Tensor:
        parts = [part.reshape(-1) for message in messages for part in pack(message)]
        return torch.cat(parts) if parts else like.new_empty(0)

    def counts(messages: tuple[Message, ...]) -> list[int]:
        return [message.elements(batch, head_dim, plan.groups) for message in messages]

    received, pending = [], []
    if plan.any_halo:
        buffers = [like.new_empty(count) for count in counts(halo_receives)]
        pending += ring_exchange(
            [(message.peer, flat((message,))) for message in halo_sends],
            [(message.peer, buffer) for message, buffer in zip(halo_receives, buffers, strict=True)],
            group,
        )
        received += zip(halo_receives, buffers, strict=True)
    if plan.any_skip:
        sizes = counts(skip_receives)
        arrived, work = all_to_all(flat(skip_sends), counts(skip_sends), sizes, group)
        pending.append(work)
        received += zip(skip_receives, arrived.split(sizes), strict=True)
    for work in pending:
        work.wait()
    return received


def _unpack(message: Message, flat: torch.Tensor, plan: ExchangePlan, batch: int, head_dim: int):
    """For each head group: its runs and, for each, (K rows, V rows) as [B, rows, H_g, D] views of `flat`."""
    start = 0
    for heads, rows in zip(plan.groups, message.rows, strict=True):
        blocks = []
        for _ in range(2):  # K, then V
            for run in rows:
                shape = (batch, run.stop - run.start, len(heads.kv_heads), head_dim)
                size = batch * shape[1] * shape[2] * head_dim
                blocks.append(flat[start : start + size].view(shape))
                start += size
        yield rows, list(zip(blocks[: len(rows)], blocks[len(rows) :], strict=True))
