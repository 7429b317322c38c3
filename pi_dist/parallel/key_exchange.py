"""Runs an exchange plan: keys and values forward, their gradients back the same way.

Forward, every rank ends up with the blocks of the plan: its own shard, which is not copied, and for each head
group the rows that it received. Backward, gradients of received rows return to their owner in the
accumulation dtype (fp32 for bf16) and are added. Both are started, and waited for when they are needed: what
is computed in between hides them. Rows of earlier chunks are taken from, and their gradients added to, what
their owner has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from pi_dist.ops.spec import KeyBlock, Run, accumulate_dtype
from pi_dist.parallel.collectives import all_to_all, ring_exchange
from pi_dist.parallel.exchange_plan import ExchangePlan, Message
from pi_dist.parallel.kept_keys import KeptKeys, add_rows, columns_of, rows_at


def start_exchange(
    plan: ExchangePlan,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | None,
    kept: KeptKeys | None = None,
) -> Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Send the shard's keys and values [B, m, H_kv, D], and those kept, to the ranks that need them.

    Returns what waits for the rows of others: it gives (keys, values) of all blocks but the first.
    """
    batch, _, _, head_dim = k.shape

    def pack(message: Message) -> Iterator[torch.Tensor]:
        for index, (heads, rows) in enumerate(zip(plan.groups, message.rows, strict=True)):
            columns = columns_of(heads.kv_heads, k.device)
            for part, tensor in enumerate((k, v)):
                for run in rows:
                    if _within(run, plan.shard):
                        yield rows_at(tensor, plan.shard, run)[:, :, columns]
                    else:
                        yield kept.rows(index, run)[part]

    arrive = _travel(plan, pack, batch, head_dim, k, group, backward=False)

    def wait() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pieces: list[list[tuple[Run, torch.Tensor, torch.Tensor]]] = [
            [(run, *kept.rows(index, run)) for run in rows] for index, rows in enumerate(plan.own.rows)
        ]
        for message, flat in arrive():
            for index, (group_rows, blocks) in enumerate(_unpack(message, flat, plan, batch, head_dim)):
                pieces[index] += [(run, *block) for run, block in zip(group_rows, blocks, strict=True)]
        keys, values = [], []
        for of_group, runs in zip(pieces, plan.received, strict=True):
            ordered = sorted(of_group, key=lambda piece: piece[0])
            for whole in runs:
                parts = [piece for piece in ordered if _within(piece[0], whole)]
                for blocks, position in ((keys, 1), (values, 2)):
                    tensors = [part[position] for part in parts]
                    blocks.append(tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1))
        return keys, values

    return wait


def start_return(
    plan: ExchangePlan,
    k: torch.Tensor,
    dkeys: list[torch.Tensor],
    dvalues: list[torch.Tensor],
    group: dist.ProcessGroup | None,
    kept: KeptKeys | None = None,
) -> tuple[Callable[[], object], Callable[[torch.Tensor, torch.Tensor], None]]:
    """The conjugate of `start_exchange`: send the gradients of every block but the first to their owners.

    Args:
        k: the shard's keys [B, m, H_kv, D], for shape, dtype and device.
        dkeys, dvalues: in the accumulation dtype of k.

    Returns:
        What waits for the gradients that others send; and what waits for them and adds them to (dk, dv) of
        the shard, or to what is kept of earlier chunks, and then adds what later chunks had sent to the
        shard. Sums are in the dtype that travels, in an order that does not depend on timing.
    """
    batch, _, _, head_dim = k.shape
    received = {block: index for index, block in enumerate(plan.blocks[1:])}

    def gradient(tensors: list[torch.Tensor], index: int, run: Run) -> torch.Tensor:
        whole = next(whole for whole in plan.received[index] if _within(run, whole))
        return rows_at(tensors[received[KeyBlock(plan.groups[index].kv_heads, whole)]], whole, run)

    def pack(message: Message) -> Iterator[torch.Tensor]:
        for index, rows in enumerate(message.rows):
            for tensors in (dkeys, dvalues):
                yield from (gradient(tensors, index, run) for run in rows)

    like = k.new_empty(0, dtype=accumulate_dtype(k.dtype))
    wait = _travel(plan, pack, batch, head_dim, like, group, backward=True)

    def add_to(dk: torch.Tensor, dv: torch.Tensor) -> None:
        for index, rows in enumerate(plan.own.rows):
            for run in rows:
                kept.add(index, run, gradient(dkeys, index, run), gradient(dvalues, index, run))
        for message, flat in wait():
            unpacked = _unpack(message, flat, plan, batch, head_dim)
            for index, (group_rows, blocks) in enumerate(unpacked):
                for run, block in zip(group_rows, blocks, strict=True):
                    if not _within(run, plan.shard):
                        kept.add(index, run, *block)
                        continue
                    for target, part in zip((dk, dv), block, strict=True):
                        add_rows(target, plan.shard, run, plan.groups[index].kv_heads, part)
        if kept is not None:
            kept.give_back(plan, dk, dv)

    return wait, add_to


def _within(run: Run, whole: Run) -> bool:
    """Whether a run, which no border of `whole` cuts, lies in it."""
    return whole.start <= run.start < whole.stop


def _travel(
    plan, pack, batch, head_dim, like, group, *, backward
) -> Callable[[], list[tuple[Message, torch.Tensor]]]:
    """Send what `pack` yields for each message; returns what waits for all received (message, flat tensor).

    Backward, receives become sends. The order of what is returned never changes, and the order of collectives
    is the same on every rank.
    """
    halo_sends, halo_receives = plan.halo_sends, plan.halo_receives
    skip_sends, skip_receives = plan.skip_sends, plan.skip_receives
    if backward:
        halo_sends, halo_receives = halo_receives, halo_sends
        skip_sends, skip_receives = skip_receives, skip_sends

    def flat(messages: tuple[Message, ...]) -> torch.Tensor:
        parts = [part for message in messages if any(message.rows) for part in pack(message)]
        if batch == 1 and len({part.shape[2] for part in parts}) == 1:  # one launch for all
            return torch.cat(parts, dim=1).flatten()
        whole, start = like.new_empty(sum(counts(messages))), 0
        for part in parts:
            whole[start : start + part.numel()].view(part.shape).copy_(part)
            start += part.numel()
        return whole

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
        whole = zip(skip_receives, arrived.split(sizes), strict=True)
        received += [(message, part) for message, part in whole if any(message.rows)]

    def wait() -> list[tuple[Message, torch.Tensor]]:
        while pending:
            pending.pop().wait()
        return received

    return wait


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
