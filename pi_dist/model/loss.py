"""Next-token loss without the full logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from pi_dist.ops.spec import accumulate_dtype

IGNORE = -100  # label of a position that has no next token
# logits held at a time: plain PyTorch takes several copies of them, the kernel none
_PLAIN_ELEMENTS, KERNEL_ELEMENTS = 2**25, 2**29
_TILE_ROWS = 128  # tiles are multiples of it, as the matrix products like them


def summed_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ over labels != -100 of -log softmax(hidden · weightᵀ)[label], in nats, fp32 scalar.

    Works through tiles of tokens, and forms the gradients in the forward pass, so that at most one tile of
    logits exists: in hidden's dtype, or autocast's. Under no_grad no gradient is formed. No valid label: 0,
    still connected to the graph.

    Args:
        hidden: [N, d]. weight: [V, d]. labels: int64 [N].
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _SummedCrossEntropy.apply(hidden, weight, labels, dtype, torch.is_grad_enabled())


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, ignore: int, with_gradient: bool
) -> torch.Tensor:
    """`pi_dist.kernels.cross_entropy.cross_entropy_` in plain PyTorch, on any device; losses fp32 or fp64."""
    log_probabilities = F.log_softmax(logits, -1, dtype=accumulate_dtype(logits.dtype))  # [N, V]
    losses = F.nll_loss(log_probabilities, targets, ignore_index=ignore, reduction="none")
    if with_gradient:
        counts, gradient = targets != ignore, log_probabilities.exp_()
        gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
        logits.copy_(gradient.mul_(counts[:, None]))
    return losses


def tile_rows(rows: int, vocab: int, elements: int) -> int:
    """Rows of one of the equal tiles that have about so many logits each."""
    count = -(-rows * vocab // elements)
    size = -(-rows // max(1, count))
    return -(-size // _TILE_ROWS) * _TILE_ROWS


def _tiles(rows: int, vocab: int, elements: int) -> Iterator[slice]:
    size = tile_rows(rows, vocab, elements)
    return (slice(start, start + size) for start in range(0, rows, size))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [m, n] += a [m, k] · b [k, n]; a 16-bit product is added in fp32, not rounded first."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, dtype, with_gradient):
        need_hidden, need_weight = (with_gradient and need for need in ctx.needs_input_grad[:2])
        ctx.weight_dtype = weight.dtype
        if hidden.is_cuda and dtype != torch.float64:
            from pi_dist.kernels.cross_entropy import cross_entropy_ as losses_of

            elements = KERNEL_ELEMENTS
        else:
            losses_of, elements = cross_entropy_, _PLAIN_ELEMENTS
        total = hidden.new_zeros((), dtype=accumulate_dtype(dtype))
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            for tile in _tiles(hidden.shape[0], weight.shape[0], elements):
                rows = hidden[tile].to(dtype)
                logits = rows @ weight.T  # [t, V]; their gradient takes their place
                total += losses_of(logits, labels[tile], IGNORE, need_hidden or need_weight).sum()
                if need_hidden:
                    dhidden[tile] = logits @ weight
                if need_weight:
                    _add_product(dweight, logits.T, rows)
                del logits  # before there is another tile
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        dhidden, dweight = ctx.saved_tensors
        # dtotal stays fp32: rounded to bf16 it would scale every gradient
        return (
            None if dhidden is None else (dhidden.to(dtotal.dtype) * dtotal).to(dhidden.dtype),
            None if dweight is None else (dweight * dtotal).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
