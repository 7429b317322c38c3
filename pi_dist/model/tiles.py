"""Work on tiles of tokens that keeps only its input, for what treats every token by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from pi_dist.ops.spec import accumulate_dtype


def in_tiles(
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    tile_tokens: int,
) -> torch.Tensor:
    """`function(x, *parameters)`, x [B, T, d], by tiles of tokens, each computed again in the backward pass.

    Gradients of parameters add up in the accumulation dtype over tiles, and come once.
    """
    return _InTiles.apply(function, tile_tokens, x, *parameters)


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, tile_tokens, x, *parameters):
        device = x.device.type
        ctx.autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.function, ctx.tile_tokens, ctx.parameters = function, tile_tokens, parameters
        ctx.save_for_backward(x)
        return torch.cat([function(part, *parameters) for part in x.split(tile_tokens, dim=1)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        dtype, enabled = ctx.autocast
        leaves = [parameter.detach().requires_grad_() for parameter in ctx.parameters]
        sums = [torch.zeros_like(leaf, dtype=accumulate_dtype(leaf.dtype)) for leaf in leaves]
        dx = []
        for part, dpart in zip(*(tensor.split(ctx.tile_tokens, dim=1) for tensor in (x, dout)), strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=enabled):
                out = ctx.function(part, *leaves)
            gradient, *of_leaves = torch.autograd.grad(out, [part, *leaves], dpart)
            dx.append(gradient)
            for total, gradient in zip(sums, of_leaves, strict=True):
                total += gradient
        gradients = (total.to(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True))
        return None, None, torch.cat(dx, dim=1), *gradients
