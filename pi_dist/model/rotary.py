"""Rotary positions (Su et al., arXiv 2104.09864) at global token positions."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


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


def split_projection(
    projected: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fused projection [B, T, (H + 2·H_kv)·D + w] to its parts.

    q [B, T, H, D] and k [B, T, H_kv, D] are rotated; v [B, T, H_kv, D] and the rest [B, T, w] are views. On a
    GPU by a kernel, whose backward pass writes the gradient of all columns at once.
    """
    (positions, half), tokens = table[0].shape, projected.shape[1]
    if positions != tokens:
        raise ValueError(f"positions of the table ({positions}) == tokens ({tokens}) does not hold")
    if projected.is_cuda and projected.dtype != torch.float64:
        return _SplitProjection.apply(projected, *table, num_heads, num_kv_heads)
    q, k, v, rest = projected.split(_widths(projected, 2 * half, num_heads, num_kv_heads), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, 2 * half)) for part in (q, k, v))
    return rotate(q, table), rotate(k, table), v, rest


def _widths(projected: torch.Tensor, head_dim: int, num_heads: int, num_kv_heads: int) -> list[int]:
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    return [*widths, projected.shape[-1] - sum(widths)]


class _SplitProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, cos, sin, num_heads, num_kv_heads):
        from pi_dist.kernels.rotary import turn_heads

        ctx.save_for_backward(cos, sin)
        head_dim = 2 * cos.shape[1]
        widths = _widths(projected, head_dim, num_heads, num_kv_heads)
        turned = turn_heads(projected, cos, sin, num_heads + num_kv_heads)
        _, _, v, rest = projected.split(widths, dim=-1)
        q, k = turned.split([num_heads, num_kv_heads], dim=2)
        return q, k, v.unflatten(-1, (-1, head_dim)), rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, drest):
        from pi_dist.kernels.rotary import join_gradients

        return join_gradients(dq, dk, dv, drest, *ctx.saved_tensors), None, None, None, None
