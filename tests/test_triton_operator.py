"""The kernels as an operator of PyTorch: compiled, recomputed, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_calls import DEVICE, assert_close, draw_inputs, results, triton_attention

from pi_dist.ops import PiPattern, pi_attention

pytestmark = pytest.mark.usefixtures("quick_interpreter", "poisoned_memory")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_graph_is_whole_and_equal(backend):
    inputs, dout = draw_inputs(13, 1, 30)

    def scaled(q, k, v, gate, pattern, **options):
        return 2 * pi_attention(
            q + 1, k, v, gate * 0.5, pattern, backend=backend, dropout_p=0.1, seed=3, **options
        )

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    segments = torch.tensor([[0] * 12 + [1] * 18], device=DEVICE)
    for pattern in (PiPattern(2, 12), PiPattern(40, 2)):
        eager, ours = (
            results(function, inputs, dout, pattern, segment_ids=segments) for function in (scaled, compiled)
        )
        assert_close(ours, eager, relative=1e-6, absolute=1e-7)


def operator_arguments(backend, gate_layout):
    """Arguments of the two registered operators, forward and backward, for one call."""
    (q, k, v, gate), dout = draw_inputs(14, 1, 12)
    if gate_layout == "transposed":
        gate = gate.transpose(1, 2).contiguous().transpose(1, 2)
    labels = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32, device=DEVICE)
    tensors = [None if gate_layout == "none" and x is gate else x for x in (q, k, v, gate, labels, labels)]
    options = (2, [3, 5], True, True, 1, 0.5, 20.0, 0.2, 7, 0, 0, 0, backend)
    out, lse = torch.ops.pi_dist.pi_attention_fwd(*tensors, *options)
    leaves = [x if x is None or x.dtype == torch.int32 else x.detach().requires_grad_() for x in tensors]
    return (*leaves, *options), (*tensors, out, lse, dout, *options)


@pytest.mark.parametrize("gate_layout", ["contiguous", "transposed", "none"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_registered_operators_are_what_they_say(backend, gate_layout):
    """Schema, strides of the fake tensors and autograd registration: what torch.compile builds upon."""
    forward, backward = operator_arguments(backend, gate_layout)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.pi_dist.pi_attention_fwd.default, forward, test_utils=checks)
    torch.library.opcheck(torch.ops.pi_dist.pi_attention_bwd.default, backward, test_utils=checks[:2])


def test_activation_checkpointing_gives_equal_gradients():
    inputs, dout = draw_inputs(15, 1, 30)

    def checkpointed(*arguments, **options):
        return torch.utils.checkpoint.checkpoint(triton_attention, *arguments, use_reentrant=False, **options)

    pattern, options = PiPattern(2, 3, num_skips=11), {"dropout_p": 0.2, "seed": 9}
    plain, ours = (
        results(function, inputs, dout, pattern, **options) for function in (triton_attention, checkpointed)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def refusals(interpret: str | None) -> dict[str, str]:
    """What a fresh process without a GPU answers to backend="triton", by dtype and head_dim."""
    script = """
import torch
from pi_dist.ops import PiPattern, pi_attention
for name, dim in (("float32", 4), ("float64", 4), ("bfloat16", 4), ("float32", 257)):
    x = torch.zeros(1, 3, 1, dim, dtype=getattr(torch, name))
    try:
        pi_attention(x, x, x, None, PiPattern(1, 2), backend="triton")
        print(name, dim, "accepted", sep="|")
    except ValueError as error:
        print(name, dim, error, sep="|")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | (
        {} if interpret is None else {"TRITON_INTERPRET": interpret}
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fields = (line.split("|", 2) for line in done.stdout.splitlines())
    return {f"{name}.{dim}": answer for name, dim, answer in fields}


def test_a_backend_that_cannot_be_used_is_refused_with_the_reason():
    without_gpu = refusals(None)
    assert len(without_gpu) == 4 and all("needs a GPU" in answer for answer in without_gpu.values())
    interpreted = refusals("1")
    assert interpreted["float32.4"] == "accepted"
    assert "float64" in interpreted["float64.4"] and "does not hold" in interpreted["float64.4"]
    assert "bfloat16" in interpreted["bfloat16.4"]
    assert "head_dim (257)" in interpreted["float32.257"]
    inputs, _ = draw_inputs(16, 1, 3)
    with pytest.raises(ValueError, match=r"backend \('cuda'\) in \('auto', 'triton', 'reference'\)"):
        pi_attention(*inputs, PiPattern(1, 2), backend="cuda")


def test_what_the_kernels_cannot_count_is_refused():
    inputs, _ = draw_inputs(21, 1, 4)
    with pytest.raises(ValueError, match=r"num_skips · stride \(536870912\) < 2\^29 does not hold"):
        triton_attention(*inputs, PiPattern(1, 2**29))
    with pytest.raises(ValueError, match=r"queries and keys within \(536870916\) < 2\^29 tokens"):
        triton_attention(*inputs, PiPattern(1, 2), query_start=2**29)
    with pytest.raises(ValueError, match=r"softmax_scale \(0\) != 0"):
        triton_attention(*inputs, PiPattern(1, 2), softmax_scale=0.0)
