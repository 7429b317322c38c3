"""AdamW and its schedule (Algorithm 2 of the paper): linear warm-up, cosine decay, decay on matrices only."""

from __future__ import annotations

import math

import torch
from torch import nn

from pi_dist.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of optimizer step `step` (0 is the first)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW in two groups, matrices with weight decay and vectors without; fused where there is a GPU."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True if on_gpu else None
    )
