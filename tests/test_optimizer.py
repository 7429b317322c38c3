"""The schedule and the groups of AdamW."""

import math

import pytest
import torch

from pi_dist.config import ModelConfig, TrainingConfig
from pi_dist.model.transformer import PiTransformer
from pi_dist.training.optimizer import learning_rate, make_optimizer

CONFIG = TrainingConfig(
    learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, steps=110, weight_decay=0.3
)


def test_linear_warm_up_then_cosine():
    assert [learning_rate(CONFIG, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for step in (10, 35, 60, 85, 109, 110, 500):
        progress = min(1.0, (step - 10) / 100)
        assert learning_rate(CONFIG, step) == pytest.approx(0.55 + 0.45 * math.cos(math.pi * progress))
    assert learning_rate(CONFIG, 60) == pytest.approx(0.55) and learning_rate(CONFIG, 110) == pytest.approx(
        0.1
    )


def test_only_matrices_decay():
    model = PiTransformer(ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=8), 32)
    optimizer = make_optimizer(model, CONFIG)
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    before = {id(p): p.detach().clone() for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, before[id(p)]) for p in vectors["params"])
    assert all(torch.allclose(p, 0.7 * before[id(p)]) for p in matrices["params"])
