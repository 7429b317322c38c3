"""The compiled kernels: error against fp64, equal bits, FlexAttention as a third party, long sequences."""

import random

import pytest
import torch
from kernel_calls import on_ranks, results, triton_attention

from pi_dist.measure.kernel_peers import peers
from pi_dist.ops import PiPattern, pi_attention
from pi_dist.ops.oracle import pi_attention_oracle

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)
SPARSE = PiPattern(4, 16)  # one skip, in the band of the window
BROAD = PiPattern(64, 128, num_skips=16)  # window and residue classes, two launches
LONG = PiPattern(4, 8192, num_skips=6)  # residue classes of nine tokens


def reference_attention(*inputs, **options):
    return pi_attention(*inputs, backend="reference", **options)


def draw_inputs(seed, batch, length, heads, kv_heads, head_dim, dtype, gated=True):
    """([q, k, v, gate], dout): values that `dtype` holds exactly, gates between 0.05 and 0.95."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(heads):
        return torch.randn(batch, length, heads, head_dim, generator=generator, device=DEVICE).to(dtype)

    q, k, v, dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    gate = 0.05 + 0.9 * torch.rand(batch, length, heads, generator=generator, device=DEVICE)
    return [q, k, v, gate if gated else None], dout


def relative_errors(found, expected, floor=0.0):
    """Relative L2 distance of each tensor; `floor`: what an element of `expected` counts at least."""
    return [
        ((a.double() - b.double()).norm() / (b.double().norm() + floor * b.numel() ** 0.5)).item()
        for a, b in zip(found, expected, strict=True)
    ]


def random_case(seed):
    """(inputs, dout, pattern, options) of a random call in one of the three dtypes."""
    chance = random.Random(seed)
    dtype = DTYPES[seed % 4]
    heads, kv_heads = chance.choice([(1, 1), (2, 2), (4, 2), (2, 1), (16, 1)])
    single = chance.random() < 0.5
    pattern = PiPattern(
        window=chance.choice([0, 1, 4, 16, 40, 100, 200]),
        strides=chance.randint(1, 40) if single else tuple(chance.randint(1, 40) for _ in range(heads)),
        causal=chance.random() < 0.6,
        include_self=chance.random() < 0.7,
        num_skips=chance.choice([0, 1, 1, 2, 5, 16]),
    )
    length, head_dim = chance.randint(2, 400), (32, 64, 80, 128, 256)[seed % 5]
    batch = max(2, 800 // length)  # of a few tokens an error says little
    options = {"logit_cap": chance.choice([20.0, 0.5, None])}
    generator = torch.Generator().manual_seed(seed)
    if chance.random() < 0.3:
        segments = torch.randint(0, 3, (batch, length), generator=generator).sort(dim=1).values
        options["segment_ids"] = segments.to(DEVICE)
    if chance.random() < 0.3:
        options["padding_mask"] = (torch.rand(batch, length, generator=generator) < 0.7).to(DEVICE)
    if chance.random() < 0.3:
        options |= {"dropout_p": 0.3, "seed": chance.randint(0, 2**63 - 1), "row_start": 2**40}
    gated = chance.random() < 0.7
    return *draw_inputs(seed, batch, length, heads, kv_heads, head_dim, dtype, gated), pattern, options


@pytest.mark.parametrize("seed", range(24))
def test_random_calls_err_no_more_than_plain_pytorch_and_repeat(seed):
    """Against fp64: at most 1.5 times the error of plain PyTorch in the same dtype; equal bits when rerun."""
    inputs, dout, pattern, options = random_case(seed)
    exact = results(pi_attention_oracle, inputs, dout, pattern, torch.float64, **options)
    plain = results(pi_attention_oracle, inputs, dout, pattern, **options)
    found = results(triton_attention, inputs, dout, pattern, **options)
    again = results(triton_attention, inputs, dout, pattern, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    dtype = inputs[0].dtype
    # far below plain PyTorch's own error, but for fp32, whose errors are a few roundings
    slack = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1 / 16)
    ours, eager = (relative_errors(tensors, exact, floor=0.05) for tensors in (found, plain))
    # written so that NaN fails
    assert all(a <= 1.5 * b + slack for a, b in zip(ours, eager, strict=True)), (ours, eager, pattern)


@pytest.mark.parametrize(
    "pattern", [SPARSE, PiPattern(4, 37), BROAD, PiPattern(3, (9, 20), False, num_skips=5)], ids=str
)
def test_shards_with_received_rows_err_no_more_than_plain_pytorch(pattern):
    """In bf16, three ranks played by one process: at most 1.5 times the error, and a rounding."""
    inputs, dout = draw_inputs(6, 2, 600, 2, 2, 64, torch.bfloat16)
    options = {"logit_cap": 20.0, "dropout_p": 0.2, "seed": 5, "row_start": 0}
    exact = results(pi_attention_oracle, inputs, dout, pattern, torch.float64, **options)
    plain = results(pi_attention_oracle, inputs, dout, pattern, **options)
    found = on_ranks(inputs, dout, pattern, None, 3, options)
    ours, eager = (relative_errors(tensors, exact, floor=0.05) for tensors in (found, plain))
    slack = torch.finfo(torch.bfloat16).eps
    assert all(a <= 1.5 * b + slack for a, b in zip(ours, eager, strict=True)), (ours, eager)


def flex_attention_of(pattern, compiled):
    """The pattern, causal and with one stride, by PyTorch's FlexAttention; called as `pi_attention`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, stride, reach = pattern.window, pattern.strides, pattern.num_skips * pattern.strides

    def mask(batch, head, query, key):
        offset = query - key
        ring = (offset >= 0) & (offset <= window)
        return ring | ((offset > window) & (offset <= reach) & (offset % stride == 0))

    def attend(q, k, v, gate, pattern_, **options):
        assert pattern_ is pattern and options == {"logit_cap": None}
        alpha = ((1 - 2e-4) * gate + 1e-4).transpose(1, 2)  # [B, H, T]
        log_ring, log_skip = alpha.log(), (1 - alpha).log()

        def score(value, batch, head, query, key):
            ring, skip = log_ring[batch, head, query], log_skip[batch, head, query]
            return value + torch.where(query - key <= window, ring, skip)

        blocks = create_block_mask(mask, None, None, q.shape[1], k.shape[1], device=q.device)
        attention = torch.compile(flex_attention) if compiled else flex_attention
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, score_mod=score, block_mask=blocks).transpose(1, 2)

    return attend


def compare_with_flex_attention(pattern, length, head_dim, dtype, compiled, tolerance, gate_tolerance):
    inputs, dout = draw_inputs(1, 1, length, 2, 2, head_dim, dtype)
    ours, flex = (
        results(function, inputs, dout, pattern, logit_cap=None)
        for function in (triton_attention, flex_attention_of(pattern, compiled))
    )
    errors = relative_errors(ours, flex)
    assert all(error <= tolerance for error in errors[:4]) and errors[4] <= gate_tolerance, errors


@pytest.mark.parametrize("pattern", [SPARSE, BROAD], ids=["sparse", "broad"])
def test_equals_flex_attention(pattern):
    """Written by others, in bf16: the output and the gradients of q, k, v and the gate."""
    compare_with_flex_attention(pattern, 2048, 64, torch.bfloat16, True, 1e-2, 3e-2)


@pytest.mark.parametrize("name", ["flash-attn, window", "cudnn, window"])
@pytest.mark.parametrize("window", [4, 20, 300])
def test_windows_equal_those_of_the_kernels_that_the_benchmark_names(window, name):
    """FlashAttention's and, where its frontend is installed, cuDNN's: output and gradients, no gate."""
    pattern = PiPattern(window, 200, num_skips=0)
    (q, k, v, _), dout = draw_inputs(5, 2, 1024, 2, 2, 64, torch.bfloat16, gated=False)
    ours = results(triton_attention, [q, k, v, None], dout, pattern, logit_cap=None)
    gate = torch.ones(q.shape[:3], device=DEVICE)
    (peer,) = [peer for peer in peers(pattern, (q, k, v, gate, dout)) if peer.name == name]
    try:
        forward, backward = peer.setup()
    except ImportError as error:
        pytest.skip(str(error))
    theirs = [
        x.transpose(1, 2) if x.dim() == 4 else x.unflatten(0, q.shape[:2]) for x in (forward(), *backward())
    ]
    errors = relative_errors(theirs, ours)
    assert all(error <= 1e-2 for error in errors), errors


@pytest.mark.parametrize("pattern", [SPARSE, BROAD, LONG], ids=["sparse", "broad", "long"])
def test_long_sequences_equal_the_reference_backend(pattern):
    inputs, dout = draw_inputs(2, 1, 65536 + 17, 2, 2, 64, torch.bfloat16)
    ours, reference = (
        results(function, inputs, dout, pattern) for function in (triton_attention, reference_attention)
    )
    errors = relative_errors(ours, reference)
    assert all(error <= 1e-2 for error in errors[:4]) and errors[4] <= 3e-2, errors


@pytest.mark.parametrize("pattern", [SPARSE, LONG], ids=["sparse", "long"])
def test_tensors_of_more_elements_than_32_bits_count(pattern):
    """Views of a wide projection: LONG's tiles hold rows from one end to the other, SPARSE's begin there."""
    length, columns = 65536 + 17, 32832
    (*dense, gate), dout = draw_inputs(4, 1, length, 2, 2, 64, torch.bfloat16)
    wide = torch.empty(1, length, columns, dtype=torch.bfloat16, device=DEVICE)
    assert wide.numel() >= 2**31
    views = [wide[..., 128 * i : 128 * (i + 1)].unflatten(2, (2, 64)) for i in range(3)]
    for view, rows in zip(views, dense, strict=True):
        view.copy_(rows)
    ours, expected = (results(triton_attention, [*x, gate], dout, pattern) for x in (views, dense))
    errors = relative_errors(ours, expected)
    assert all(error <= 1e-3 for error in errors), errors


@pytest.mark.parametrize("pattern", [SPARSE, PiPattern(4, 37), PiPattern(3, 9, num_skips=12)], ids=str)
def test_positions_beyond_32_bits(pattern):
    """Dropout hashes positions, of which the sum of a few of these does not fit 32 bits."""
    inputs, dout = draw_inputs(3, 1, 150, 2, 1, 64, torch.float32)
    for query_start, key_start in ((2**31 + 5, 2**31 + 5), (2**31 + 5, 2**31 - 40)):
        options = {"query_start": query_start, "key_start": key_start, "dropout_p": 0.3, "seed": 2**62 + 1}
        ours, reference = (
            results(function, inputs, dout, pattern, **options)
            for function in (triton_attention, reference_attention)
        )
        assert all(error <= 2e-5 for error in relative_errors(ours, reference, floor=0.05))
