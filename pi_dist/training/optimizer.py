"""AdamW (Algorithm 2 of the paper): linear warm-up, cosine decay, decay on matrices only; clipping."""

from __future__ import annotations

import math

import torch
from torch import nn

from pi_dist.config import TrainingConfig

# ZeRO lays the parameters of a group end to end, in bf16. Compiled blocks read them 16 bytes at a time, and
# layers share the graph that was made for the first: where one parameter starts at 16 bytes, all have to.
# (Those of odd sizes, the gate's biases, are too short to be read so.)
ALIGNMENT = 8


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of optimizer step `step` (0 is the first)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW in two groups, matrices with weight decay and vectors without.

    Of each group those come last whose size is no multiple of ALIGNMENT elements.
    """
    parameters = sorted(model.parameters(), key=lambda p: p.numel() % ALIGNMENT != 0)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def guard_update(
    optimizer: torch.optim.AdamW, norm: torch.Tensor, loss: torch.Tensor | None, clip_norm: float
) -> None:
    """Prepare the next `optimizer.step()` of a fused AdamW without waiting for the device.

    It divides gradients by max(1, norm / clip_norm), and changes nothing if norm or loss is not finite.

    Args:
        norm, loss: scalars on the device; loss may be None. clip_norm: 0 does not clip.
    """
    finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    optimizer.found_inf = (~finite).float()
    optimizer.grad_scale = ((norm.float() + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else None
