"""The gate between a token's window and its skips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from pi_dist.config import ModelConfig
from pi_dist.ops.spec import accumulate_dtype


class Gate(nn.Module):
    """α of eq. (4), one value per token and head, in fp32 or better.

    dynamic: `sigmoid(W2·gelu(W1·u + b1) + b2)` with hidden width d/2; static: one learned value per head.
    Where u is the query, W1 is `up`; where it is the hidden state, W1 is the last `projected` = d/2 rows of
    the layer's projection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.hidden_size, config.hidden_size // 2
        self.static = config.gate == "static"
        self.projected = width if config.gate == "dynamic" and config.gate_input == "hidden" else 0
        if self.static:
            self.logit = nn.Parameter(torch.zeros(config.num_heads))
        else:
            self.up = None if self.projected else nn.Linear(d, width, bias=False)
            self.up_bias = nn.Parameter(torch.zeros(width))
            self.down = nn.Linear(width, config.num_heads)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """u [B, T, d], or W1·u [B, T, d/2] if `projected`, to α [B, T, H]: a view of [B, H, T] if dynamic."""
        if self.static:
            logit = self.logit.to(accumulate_dtype(self.logit.dtype))
            return torch.sigmoid(logit).expand(*u.shape[:2], -1)
        raised = u if self.up is None else self.up(u)
        return gate_of(raised, self.up_bias, self.down.weight, self.down.bias).transpose(1, 2)


def gate_of(
    raised: torch.Tensor, up_bias: torch.Tensor, weight: torch.Tensor, down_bias: torch.Tensor
) -> torch.Tensor:
    """sigmoid(W2·gelu(raised + b1) + b2), [B, H, T], fp32 or better, of raised [B, T, w] and W2 [H, w].

    The pre-activation of the sigmoid is fp32: bf16 would round α to 1 from 7 on. A head's tokens lie side by
    side, as the attention kernels read them. On a GPU by a kernel each way.
    """
    if raised.is_cuda and raised.dtype != torch.float64:
        return _Gate.apply(raised, up_bias, weight, down_bias)
    hidden = F.gelu(raised + up_bias.to(raised.dtype))
    dtype = accumulate_dtype(hidden.dtype)
    with torch.autocast(raised.device.type, enabled=False):
        logit = F.linear(hidden.to(dtype), weight.to(dtype), down_bias.to(dtype))
        return torch.sigmoid(logit.transpose(1, 2).contiguous())


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raised, up_bias, weight, down_bias):
        from pi_dist.kernels.gate import gate_forward

        up_bias, weight, down_bias = (p.contiguous() for p in (up_bias, weight, down_bias))
        alpha = gate_forward(raised, up_bias, weight, down_bias)
        ctx.save_for_backward(raised, up_bias, weight, down_bias, alpha)
        return alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, dalpha):
        from pi_dist.kernels.gate import gate_backward

        raised, up_bias, weight, down_bias, alpha = ctx.saved_tensors
        dx, *gradients = gate_backward(raised, up_bias, weight, alpha, dalpha.contiguous())
        parameters = (up_bias, weight, down_bias)
        return dx, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))
