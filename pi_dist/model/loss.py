"""Next-token loss without the full logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE = -100  # label of a position that has no next token
_TILE_ELEMENTS = 2**25  # logits held at a time


def summed_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ over labels != -100 of -log softmax(hidden · weightᵀ)[label], in nats, fp32 scalar.

    Works through tiles of tokens, and forms the gradients in the forward pass, so that at most one tile of
    logits exists. No valid label: 0, still connected to the graph.

    Args:
        hidden: [N, d]. weight: [V, d]. labels: int64 [N].
    """
    return _SummedCrossEntropy.apply(hidden, weight, labels)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
        tile = max(1, _TILE_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], tile):
            rows, targets = hidden[start : start + tile], labels[start : start + tile]
            log_probabilities = F.log_softmax((rows @ weight.T).to(total.dtype), dim=-1)  # [t, V]
            total += F.nll_loss(log_probabilities, targets, ignore_index=IGNORE, reduction="sum")
            if not (need_hidden or need_weight):
                continue
            valid = targets != IGNORE
            dlogits = log_probabilities.exp_()
            dlogits[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
            dlogits = (dlogits * valid[:, None]).to(hidden.dtype)
            if need_hidden:
                dhidden[start : start + tile] = dlogits @ weight
            if need_weight:
                dweight += dlogits.T @ rows
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
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
        )
