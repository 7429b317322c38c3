"""Rotary positions (Su et al., arXiv 2104.09864) at global token positions."""

from __future__ import annotations

import torch


def rotary_table(
    starts: tuple[int, ...], length: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each fp32 [length, head_dim / 2], of `length` positions in equally long runs from `starts`.

    Angles are formed and reduced in fp64: fp32 has no odd integers beyond 2^24, so far positions would
    collide.
    """
    run = torch.arange(length // len(starts), dtype=torch.float64, device=device)
    positions = torch.cat([run + start for start in starts])
    frequencies = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / -head_dim)
    angles = torch.outer(positions, frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (x_d, x_{d + D/2}) of [B, T, H, D] by their positions' angles.

    Computed in fp32; the result has x's dtype.
    """
    cos, sin = (part[None, :, None, :] for part in table)  # [1, T, 1, D/2]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
