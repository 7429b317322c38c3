"""Degrees to process groups: world = data-parallel degree × sequence-parallel degree."""

from __future__ import annotations

from dataclasses import dataclass

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


def make_mesh(sp_degree: int, device: torch.device) -> Mesh:
    """Build the groups; every rank of the initialized default group calls it.

    Raises:
        ValueError: the world does not divide into sequence-parallel groups.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % sp_degree:
        raise ValueError(f"world size ({world_size}) % sp_degree ({sp_degree}) == 0 does not hold")
    own = None
    if sp_degree > 1:
        for start in range(0, world_size, sp_degree):
            group = dist.new_group(list(range(start, start + sp_degree)))
            if start <= rank < start + sp_degree:
                own = group
    return Mesh(rank, world_size, sp_degree, device, own)
