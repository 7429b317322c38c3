"""Calls of the Triton kernels and what they must equal, on a GPU if there is one, else interpreted."""

import contextlib
import os

import pytest
import torch

# Triton's interpreter, for machines without a GPU. `triton.jit` looks at this when it decorates, so before
# the first import of a kernel.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from pi_dist.ops import pi_attention, triton_backend
from pi_dist.ops.oracle import pi_attention_oracle
from pi_dist.ops.spec import AttentionSpec
from pi_dist.parallel.exchange_plan import make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("_pi_attention_fwd_kernel", "_fused_kernel", "_keys_kernel", "_queries_kernel")


def triton_attention(*inputs, **options):
    return pi_attention(*inputs, backend="triton", **options)


def draw_inputs(
    seed, batch=1, q_len=40, k_len=None, heads=2, kv_heads=1, head_dim=4, gated=True, dtype=torch.float32
):
    """([q, k, v, gate], dout): values that `dtype` holds exactly, gates between 0.05 and 0.95."""
    generator = torch.Generator().manual_seed(seed)
    k_len = q_len if k_len is None else k_len

    def draw(length, heads):
        return torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype).to(DEVICE)

    q, k, v = draw(q_len, heads), draw(k_len, kv_heads), draw(k_len, kv_heads)
    gate = 0.05 + 0.9 * torch.rand(batch, q_len, heads, generator=generator)
    return [q, k, v, gate.to(DEVICE) if gated else None], draw(q_len, heads)


def results(function, inputs, dout, pattern, dtype=None, **options):
    """[out, dq, dk, dv, dgate if there is a gate], of q, k, v in `dtype`, the gate in fp32 or fp64."""
    dtype = inputs[0].dtype if dtype is None else dtype
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [
        None if x is None else x.detach().to(gate_dtype if index == 3 else dtype).requires_grad_()
        for index, x in enumerate(inputs)
    ]
    out = function(*leaves, pattern, **options)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout.to(out.dtype))]


def assert_close(found, expected, relative=2e-5, absolute=1e-5):
    """Relative L2 distance; the floor is for sums of O(1) terms that are 0 in exact arithmetic."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.double() - b.double()).norm().item()
        limit = relative * b.double().norm().item() + absolute * b.numel() ** 0.5
        assert error <= limit, (
            f"tensor {index}: error {error:.2e} <= {limit:.2e} does not hold"
        )  # NaN fails too


def check(inputs, dout, pattern, **options):
    """The kernels equal the oracle, gradients included."""
    found = results(triton_attention, inputs, dout, pattern, **options)
    assert_close(found, results(pi_attention_oracle, inputs, dout, pattern, torch.float64, **options))


@contextlib.contextmanager
def spied(run=True):
    """The launches inside, as (kernel, positional arguments, grid, Options)."""
    launches = []

    def spy(name, kernel):
        def at(_, grid):
            def launch(*arguments, **keywords):
                launches.append((name, arguments, grid, keywords["OPTIONS"]))
                if run:
                    kernel[grid](*arguments, **keywords)

            return launch

        return type("Spy", (), {"__getitem__": at})()

    with pytest.MonkeyPatch.context() as patch:
        for name in (*KERNELS, "_queries_once_kernel"):
            patch.setattr(triton_backend, name, spy(name, getattr(triton_backend, name)))
        yield launches


def on_ranks(inputs, dout, pattern, labels, num_ranks, options):
    """[out, dq, dk, dv, dgate] of the whole sequence, from ranks that hold shards and received rows."""
    q, k, v, gate = inputs
    parts, dk, dv = [], torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
    for rank in range(num_ranks):
        plan = make_plan(pattern, q.shape[2], k.shape[2], q.shape[1], num_ranks, rank)
        spec = AttentionSpec(
            pattern, k.shape[2], plan.blocks, q.shape[3] ** -0.5, options["logit_cap"], options["dropout_p"],
            options["seed"], plan.shard.start, options["row_start"],
        )  # fmt: skip
        mine = slice(*plan.shard)
        keys, values = (
            [x[:, slice(*block.run)][:, :, list(block.heads)] for block in plan.blocks] for x in (k, v)
        )
        k_labels = [None if labels is None else labels[:, slice(*block.run)] for block in plan.blocks]
        q_labels = None if labels is None else labels[:, mine]
        rest = (gate[:, mine], q_labels, k_labels)
        out, lse = triton_backend.pi_attention_fwd(
            spec,
            q[:, mine],
            keys[:1],
            values[:1],
            *rest,
            lambda keys=keys, values=values: (keys[1:], values[1:]),
        )
        sent = []
        dq, own_dk, own_dv, dgate = triton_backend.pi_attention_bwd(
            spec,
            q[:, mine],
            keys,
            values,
            *rest,
            out,
            lse,
            dout[:, mine],
            lambda *rows, to=sent: to.extend(rows),
        )
        dkeys, dvalues = [own_dk, *sent[0]], [own_dv, *sent[1]]
        parts.append((out, dq, dgate))
        for whole, gradients in ((dk, dkeys), (dv, dvalues)):
            assert [x.dtype for x in gradients] == [q.dtype] + [torch.float32] * (len(keys) - 1)
            for block, gradient in zip(plan.blocks, gradients, strict=True):
                for index, head in enumerate(block.heads):
                    whole[:, slice(*block.run), head] += gradient[:, :, index]
    out, dq, dgate = (torch.cat(of_ranks, dim=1) for of_ranks in zip(*parts, strict=True))
    return [out, dq, dk, dv, dgate]
