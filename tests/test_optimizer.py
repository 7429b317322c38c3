"""The schedule and the groups of AdamW."""

import math

import pytest
import torch

from pi_dist.config import ModelConfig, TrainingConfig
from pi_dist.model.transformer import PiTransformer
from pi_dist.training.optimizer import guard_update, learning_rate, make_optimizer

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


def test_parameters_lie_at_multiples_of_16_bytes_where_zero_lays_them_end_to_end():
    """But for the second layer's gate bias of six numbers, at the end."""
    model = PiTransformer(ModelConfig(num_layers=2, hidden_size=48, num_heads=6, vocab_size=64), 32)
    for group in make_optimizer(model, CONFIG).param_groups:
        start, misaligned = 0, []
        for parameter in group["params"]:
            if 2 * start % 16:
                misaligned.append(parameter.numel())
            start += parameter.numel()
        assert misaligned == ([] if group["weight_decay"] else [6])


@pytest.mark.parametrize(("clip_norm", "clipped"), [(0.0, 1.0), (100.0, 1.0), (2.0, 0.4)])
def test_clipping_on_the_device_is_that_of_pytorch(clip_norm, clipped):
    """Gradient (3, 4), of norm 5: the first moment after one step is a tenth of what is left of it."""
    parameter = torch.nn.Parameter(torch.ones(1, 2))
    model = torch.nn.ParameterList([parameter])
    optimizer = make_optimizer(model, CONFIG)
    parameter.grad = torch.tensor([[3.0, 4.0]])
    guard_update(optimizer, torch.tensor(5.0), torch.tensor(1.0), clip_norm)
    optimizer.step()
    moment = optimizer.state[parameter]["exp_avg"]
    torch.testing.assert_close(moment, clipped * torch.tensor([[0.3, 0.4]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("norm", "loss"), [("nan", "1"), ("inf", "1"), ("1", "nan"), ("1", "-inf")])
def test_what_is_not_finite_changes_nothing(norm, loss):
    """Neither weights nor moments nor their count; and the next step is the first."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer(torch.nn.ParameterList([parameter]), CONFIG)
    parameter.grad = torch.full((2, 2), float("nan"))
    guard_update(optimizer, torch.tensor(float(norm)), torch.tensor(float(loss)), 1.0)
    optimizer.step()
    state = optimizer.state[parameter]
    assert torch.equal(parameter, torch.ones(2, 2))
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 0
    parameter.grad = torch.ones(2, 2)
    guard_update(optimizer, torch.tensor(2.0), None, 1.0)
    optimizer.step()
    assert state["step"] == 1 and not torch.equal(parameter, torch.ones(2, 2))
