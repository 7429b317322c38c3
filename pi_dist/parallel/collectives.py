"""The two ways that rows travel, on a process group passed in: ring send/recv and all_to_all_single."""

from __future__ import annotations

import torch
import torch.distributed as dist


def ring_exchange(
    sends: list[tuple[int, torch.Tensor]], receives: list[tuple[int, torch.Tensor]], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Start sends to and receives from ranks of `group`; returns what to wait for.

    A call has at most one message per ordered pair of ranks: NCCL matches messages of a pair by order, so two
    of a call could swap. Calls may overlap if all ranks make them in one order.

    Raises:
        ValueError: two messages of one pair, or a message to oneself (gloo has none).
    """
    for name, messages in (("send", sends), ("receive", receives)):
        peers = [peer for peer, _ in messages]
        if len(set(peers)) != len(peers) or dist.get_rank(group) in peers:
            raise ValueError(f"ring_exchange: one {name} per other rank does not hold for peers {peers}")
    operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer, tensor in sends] + [
        dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for peer, tensor in receives
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def all_to_all(
    send: torch.Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    """Start one all_to_all_single of a flat tensor cut by counts of elements.

    Returns (received, what to wait for).
    """
    received = send.new_empty(sum(receive_counts))
    work = dist.all_to_all_single(received, send, receive_counts, send_counts, group=group, async_op=True)
    return received, work


def all_gather_tokens(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[B, m] on every rank to the whole [B, n], in rank order. No gradient."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    size = dist.get_world_size(group)
    gathered = tensor.new_empty((size, *tensor.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor.contiguous(), group=group)
    return gathered.transpose(0, 1).flatten(1, 2)
