"""What a fused projection is split into, and the gate: kernels against plain PyTorch, gradients too."""

import os

import pytest
import torch
import torch.nn.functional as F

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # see kernel_calls.py

from pi_dist.model import gate, rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def draw(*shape, seed=0, dtype=torch.float64):
    """Numbers that every dtype here holds exactly."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().to(DEVICE, dtype)


def errors(function, plain, leaves, dtype):
    """Relative L2 errors, against fp64, of results and gradients of `function` in dtype, and of `plain`."""

    def computed(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        results = [x for x in function(*inputs) if x.numel()]
        directions = [draw(*x.shape, seed=9 + n, dtype=x.dtype) for n, x in enumerate(results)]
        return [*results, *torch.autograd.grad(results, inputs, directions)]

    exact = computed(plain, torch.float64)
    return [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(computed(f, dtype), exact, strict=True)]
        for f in (function, plain)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "head_dim", "width"),
    [(2, 37, 4, 4, 64, 128), (1, 16, 5, 1, 80, 40), (3, 5, 2, 2, 32, 0), (1, 1, 16, 2, 2, 16)],
)
def test_split_projection(batch, length, heads, kv_heads, head_dim, width, dtype):
    """Heads of sizes that are no powers of two, fewer key heads, no other columns; within 1.5 times plain."""
    table = rotary.rotary_table((1000,), length, head_dim, 10000.0, torch.device(DEVICE))
    columns = (heads + 2 * kv_heads) * head_dim + width

    def plain(projected):
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, width]
        q, k, v, rest = projected.split(sizes, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        return rotary.rotate(q, table), rotary.rotate(k, table), v, rest

    def kernel(projected):
        return rotary._SplitProjection.apply(projected, *table, heads, kv_heads)

    for ours, eager in zip(*errors(kernel, plain, [draw(batch, length, columns)], dtype), strict=True):
        assert ours <= 1.5 * eager + 1e-7


def test_gradients_of_any_layout_are_joined():
    """Of heads before tokens, and of one number for all, as sums hand it back."""
    table = rotary.rotary_table((0,), 8, 4, 10000.0, torch.device(DEVICE))
    projected = draw(2, 8, 3 * 2 * 4 + 6, dtype=torch.float32).requires_grad_()
    weights = draw(2, 2, 8, 4, seed=1, dtype=torch.float32)
    found = []
    for split in (rotary._SplitProjection.apply, None):
        if split is None:
            q, k, v, rest = (
                x.unflatten(-1, (-1, 4)) if x.shape[-1] == 8 else x
                for x in projected.split([8, 8, 8, 6], dim=-1)
            )
            q, k = rotary.rotate(q, table), rotary.rotate(k, table)
        else:
            q, k, v, rest = split(projected, *table, 2, 2)
        loss = (
            (q.transpose(1, 2) * weights).sum() + k.sum() + (v.transpose(1, 2) * weights).sum() + rest.sum()
        )
        found += torch.autograd.grad(loss, projected)
    torch.testing.assert_close(*found)


def plain_gate(x, up_bias, weight, down_bias):
    hidden = F.gelu(x + up_bias)
    accumulate = torch.promote_types(torch.float32, hidden.dtype)
    logits = F.linear(*(part.to(accumulate) for part in (hidden, weight, down_bias)))
    return torch.sigmoid(logits).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "width", "heads"),
    [(2, 70, 24, 3), (1, 500, 200, 16), (3, 1, 16, 1), (1, 64, 128, 20)],
)
def test_gate(batch, length, width, heads, dtype):
    """Tiles that are not full, inputs inside a wider row; within 1.5 times the error of plain PyTorch."""

    def plain(wide, *parameters):
        return (plain_gate(wide[..., 3 : 3 + width], *parameters),)

    def kernel(wide, *parameters):
        return (gate._Gate.apply(wide[..., 3 : 3 + width], *parameters),)

    leaves = [
        draw(batch, length, width + 8),
        draw(width, seed=1),
        draw(heads, width, seed=2) / 4,
        draw(heads, seed=3),
    ]
    slack = 1e-6 if dtype == torch.float32 else 5e-5
    for ours, eager in zip(*errors(kernel, plain, leaves, dtype), strict=True):
        assert ours <= 1.5 * eager + slack


def test_gate_repeats_bit_for_bit(monkeypatch):
    """Programs that walk over several tiles each."""
    monkeypatch.setattr("pi_dist.kernels.gate.PROGRAMS", 3)
    leaves = [draw(1, 700, 40), draw(40, seed=1), draw(2, 40, seed=2), draw(2, seed=3)]
    leaves = [x.float().requires_grad_() for x in leaves]
    found, again, plain = (
        torch.autograd.grad(f(*leaves), leaves, draw(1, 2, 700, seed=4, dtype=torch.float32))
        for f in (gate._Gate.apply, gate._Gate.apply, plain_gate)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
