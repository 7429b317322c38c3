"""Degrees to process groups: world = data-parallel degree × sequence-parallel degree."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. Ranks of one sequence are neighbours: rank = dp_rank · sp_degree + sp_rank.

    Attributes:
        sp_group: the ranks that share this rank's sequences, in order of their shards; None where sp_degree
            is 1.
    """

    rank: int
    world_size: int
    sp_degree: int
    device: torch.device
    sp_group: dist.ProcessGroup | None

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp_degree

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on this rank's device. The host does not wait for the work queued there before it."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_degree

    @property
    def dp_degree(self) -> int:
        return self.world_size // self.sp_degree


def make_mesh(sp_degree: int, device: torch.device, timeout_s: float = 600.0) -> Mesh:
    """Build the groups; every rank of the initialized default group calls it.

    timeout_s: the longest that a collective among ranks of a sequence may take.

    Raises:
        ValueError: the world does not divide into sequence-parallel groups.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % sp_degree:
        raise ValueError(f"world size ({world_size}) % sp_degree ({sp_degree}) == 0 does not hold")
    own = None
    if sp_degree > 1:
        for start in range(0, world_size, sp_degree):
            group = dist.new_group(list(range(start, start + sp_degree)), **_options(timeout_s))
            if start <= rank < start + sp_degree:
                own = group
    return Mesh(rank, world_size, sp_degree, device, own)


def _options(timeout_s: float) -> dict[str, Any]:
    """Of a group; its rows must not wait for a multiprocessor until the attention that hides them ends."""
    timeout = timedelta(seconds=timeout_s)
    if dist.get_backend() != "nccl":
        return {"timeout": timeout}
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # PyTorch warns of another one here
    return {"timeout": timeout, "pg_options": options}
