"""The operator against the dense oracle (fp64), gradients included; the edge cases; what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_dist.ops import PiPattern, pi_attention
from pi_dist.ops.oracle import neighbour_masks, pi_attention_oracle


def make_inputs(
    seed, batch=2, q_len=13, k_len=13, heads=4, kv_heads=2, head_dim=4, gate=True, dtype=torch.float64
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    q, k, v = (
        draw(batch, q_len, heads, head_dim),
        draw(batch, k_len, kv_heads, head_dim),
        draw(batch, k_len, kv_heads, 4),
    )
    alpha = (
        torch.rand(batch, q_len, heads, generator=generator, dtype=torch.float64).requires_grad_()
        if gate
        else None
    )
    return q, k, v, alpha


def results(function, inputs, pattern, **options):
    """Output and the gradients of a fixed random functional of it."""
    out = function(*inputs, pattern, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(
        out.dtype
    )
    wanted = [x for x in inputs if x is not None]
    return (out, *torch.autograd.grad((out * weight).sum(), wanted))


def assert_equal(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]))
    strides = draw(
        st.integers(1, 9) | st.lists(st.integers(1, 12), min_size=heads, max_size=heads).map(tuple)
    )
    pattern = PiPattern(
        window=draw(st.integers(0, 6)),
        strides=strides,
        causal=draw(st.booleans()),
        include_self=draw(st.booleans()),
        num_skips=draw(st.integers(0, 4)),
    )
    length = draw(st.integers(1, 24))
    options = {"logit_cap": draw(st.sampled_from([20.0, 0.5, None]))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        options["segment_ids"] = torch.randint(0, 3, (2, length), generator=generator).sort(dim=1).values
    if draw(st.booleans()):
        options["padding_mask"] = torch.rand(2, length, generator=generator) < 0.7
    if draw(st.booleans()):
        options |= {
            "dropout_p": 0.3,
            "seed": draw(st.integers(0, 2**63 - 1)),
            "row_start": draw(st.integers(0, 2**40)),
        }
    inputs = make_inputs(
        draw(st.integers(0, 99)), 2, length, length, heads, kv_heads, gate=draw(st.booleans())
    )
    return inputs, pattern, options


@settings(max_examples=150)
@given(cases())
def test_reference_equals_the_dense_oracle_and_its_gradients(case):
    inputs, pattern, options = case
    assert_equal(
        results(pi_attention, inputs, pattern, **options),
        results(pi_attention_oracle, inputs, pattern, **options),
    )


@settings(max_examples=60)
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 12),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_global_positions_of_queries_and_keys(query_start, key_start, q_len, k_len, causal, base):
    inputs = make_inputs(3, 2, q_len, k_len)
    pattern = PiPattern(2, (3, 5, 3, 7), causal=causal, num_skips=2)
    options = {"query_start": base + query_start, "key_start": base + key_start, "dropout_p": 0.2, "seed": 5}
    assert_equal(
        results(pi_attention, inputs, pattern, **options),
        results(pi_attention_oracle, inputs, pattern, **options),
    )


def test_a_slice_with_its_neighbours_equals_the_whole():
    """Queries 8..13 need only keys 4..13 here: positions, not lengths, decide who is a neighbour."""
    q, k, v, gate = make_inputs(1)
    pattern = PiPattern(2, 4)
    whole = pi_attention(q, k, v, gate, pattern, dropout_p=0.4, seed=11)
    part = pi_attention(
        q[:, 8:], k[:, 4:], v[:, 4:], gate[:, 8:], pattern, query_start=8, key_start=4, dropout_p=0.4, seed=11
    )
    assert torch.equal(whole[:, 8:], part)
    row = pi_attention(q[1:], k[1:], v[1:], gate[1:], pattern, row_start=1, dropout_p=0.4, seed=11)
    assert torch.equal(whole[1:], row)


def test_independent_formula_per_token():
    """One softmax written out token by token in Python floats, for one head."""
    q, k, v, gate = make_inputs(7, batch=1, heads=1, kv_heads=1)
    pattern = PiPattern(2, 3, num_skips=2)
    out = pi_attention(q, k, v, gate, pattern)
    for i in range(13):
        alpha = (1 - 2e-4) * gate[0, i, 0].item() + 1e-4
        weights = {}
        for j in range(13):
            score = sum(a * b for a, b in zip(q[0, i, 0].tolist(), k[0, j, 0].tolist(), strict=True)) / 2.0
            if 0 <= i - j <= 2:
                weights[j] = math.exp(max(-20, min(20, score + math.log(alpha))))
            elif i - j in (3, 6):
                weights[j] = math.exp(max(-20, min(20, score + math.log(1 - alpha))))
        total = sum(weights.values())
        for d in range(4):
            expected = sum(w * v[0, j, 0, d].item() for j, w in weights.items()) / total
            assert out[0, i, 0, d].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(causal, dropout_p):
    inputs = make_inputs(5, 1, 7, 7, heads=2, kv_heads=1, head_dim=3)
    inputs = (*inputs[:2], inputs[2][..., :3].detach().requires_grad_(), inputs[3])
    pattern = PiPattern(1, (2, 3), causal=causal, num_skips=2)
    segment_ids = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    assert torch.autograd.gradcheck(
        lambda *x: pi_attention(
            *x, pattern, segment_ids=segment_ids, dropout_p=dropout_p, seed=1, logit_cap=1.5
        ),
        inputs,
    )


def test_empty_neighbourhoods_are_exactly_zero_with_zero_gradient():
    inputs = make_inputs(2)
    for pattern in (PiPattern(2, 4, include_self=False), PiPattern(0, 5, include_self=False, num_skips=0)):
        found = results(pi_attention, inputs, pattern)
        assert all(torch.isfinite(x).all() for x in found)
        assert (found[0][:, 0] == 0).all() and (found[1][:, 0] == 0).all() and (found[4][:, 0] == 0).all()
    everything_padded = results(
        pi_attention, inputs, PiPattern(2, 4), padding_mask=torch.zeros(2, 13, dtype=torch.bool)
    )
    assert all((x == 0).all() for x in everything_padded)


def test_skips_inside_the_window_are_ring_targets():
    q, k, v, gate = make_inputs(4)
    assert PiPattern(4, 2, num_skips=2).skip_offsets(2) == ()
    both = pi_attention(q, k, v, gate, PiPattern(4, 2, num_skips=2))
    ring_only = pi_attention(q, k, v, gate, PiPattern(4, 2, num_skips=0))
    assert torch.equal(both, ring_only)


def test_without_gate_the_clamp_acts_on_the_bare_scores():
    """gate None is log w = 0, not α = ½, which would shift the clamp."""
    q, k, v, _ = make_inputs(6)
    pattern = PiPattern(1, 5)
    half = torch.full((2, 13, 4), 0.5, dtype=torch.float64)
    assert torch.allclose(
        pi_attention(q, k, v, None, pattern, logit_cap=None),
        pi_attention(q, k, v, half, pattern, logit_cap=None),
    )
    assert not torch.allclose(
        pi_attention(10 * q, k, v, None, pattern), pi_attention(10 * q, k, v, half, pattern), atol=1e-4
    )


def test_clamp_passes_the_gradient_at_its_edges_and_none_outside():
    """Two neighbours; the scores are exactly 20 and 21 with logit_cap 20: only the first has a gradient."""
    q = torch.ones(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([20.0, 21.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    v = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    out = pi_attention(q, k, v, None, PiPattern(1, 9), softmax_scale=1.0)[0, 1]
    (dk,) = torch.autograd.grad(out.sum(), k)
    assert out.item() == pytest.approx(0.5)
    assert dk[0, 0].item() == pytest.approx(-0.25) and dk[0, 1].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_plain_pytorch(dtype):
    """Against fp64: at most 1.5 times the error of the same formula in plain PyTorch, and one rounding."""
    drawn = make_inputs(8, q_len=64, k_len=64)
    pattern = PiPattern(4, 16, num_skips=2)

    def inputs(in_dtype):
        tensors = [x.detach().to(dtype).to(in_dtype).requires_grad_() for x in drawn[:3]]
        gate_dtype = torch.float64 if in_dtype == torch.float64 else torch.float32
        return [*tensors, drawn[3].detach().float().to(gate_dtype).requires_grad_()]

    exact = results(pi_attention_oracle, inputs(torch.float64), pattern)
    plain = results(pi_attention_oracle, inputs(dtype), pattern)
    found = results(pi_attention, inputs(dtype), pattern)
    for expected, eager, ours in zip(exact, plain, found, strict=True):
        eager_error, our_error = ((x.double() - expected).norm() / expected.norm() for x in (eager, ours))
        assert our_error <= 1.5 * eager_error + torch.finfo(dtype).eps


def test_dropout_rate_and_keys():
    q, k, v, _ = make_inputs(1, batch=2, q_len=400, k_len=400, heads=4, kv_heads=4)
    ones = torch.ones_like(v)
    pattern = PiPattern(0, 500)  # each token sees itself only: out is 0 or 1 / (1-p)
    dropped = pi_attention(q, k, ones, None, pattern, dropout_p=0.25, seed=3)[..., 0]
    assert set(dropped.unique().tolist()) <= {0.0, 1 / 0.75}
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    again = pi_attention(q, k, ones, None, pattern, dropout_p=0.25, seed=3)[..., 0]
    other = pi_attention(q, k, ones, None, pattern, dropout_p=0.25, seed=4)[..., 0]
    assert torch.equal(dropped, again) and not torch.equal(dropped, other)


@pytest.mark.parametrize(
    ("change", "equation"),
    [
        (
            lambda q, k, v, g: (q, k[:, :, :1].expand(-1, -1, 3, -1), v[:, :, :1].expand(-1, -1, 3, -1), g),
            "num_heads (4)",
        ),
        (lambda q, k, v, g: (q, k, v[:, :5], g), "k.shape"),
        (lambda q, k, v, g: (q, k, v, g[..., :1]), "gate.shape"),
        (lambda q, k, v, g: (q, k, v, g.bfloat16()), "gate.dtype"),
        (lambda q, k, v, g: (q.float(), k, v, g), "dtypes"),
        (lambda q, k, v, g: (q[0], k, v, g), "[B, T, H, D]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_equation(change, equation):
    with pytest.raises(ValueError, match="does not hold") as error:
        pi_attention(*change(*make_inputs(0)), PiPattern(1, 4))
    assert equation in str(error.value)


def test_options_that_make_no_sense_are_refused():
    inputs = make_inputs(0)
    for options in (
        {"backend": "fast"},
        {"dropout_p": 0.1},
        {"dropout_p": 1.0, "seed": 1},
        {"logit_cap": 0.0},
        {"segment_ids": torch.zeros(2, 12, dtype=torch.int64)},
        {"segment_ids": torch.zeros(inputs[0].shape[:2], dtype=torch.uint64)},  # from 2^63 on: as if padding
        {"padding_mask": torch.ones(inputs[0].shape[:2], dtype=torch.int64)},
    ):
        with pytest.raises(ValueError):
            pi_attention(*inputs, PiPattern(1, 4), **options)
    for arguments in ((-1, 4), (1, 0), (1, (4, 0)), (1, 4, True, True, -1), (1, ()), (1, 4.0)):
        with pytest.raises(ValueError, match="does not hold"):
            PiPattern(*arguments)
    with pytest.raises(ValueError, match="num_heads"):
        pi_attention(*inputs, PiPattern(1, (4, 4)))


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 4), st.booleans(), st.booleans())
def test_pattern_offsets_are_the_masks(window, stride, num_skips, causal, include_self):
    pattern = PiPattern(window, stride, causal, include_self, num_skips)
    positions = torch.arange(30)
    ring, skip = neighbour_masks(pattern, stride, positions, positions)
    for mask, offsets in ((ring, pattern.ring_offsets()), (skip, pattern.skip_offsets(stride))):
        expected = torch.zeros(30, 30, dtype=torch.bool)
        for offset in offsets:
            expected |= (positions[:, None] - positions[None, :]) == offset
        assert torch.equal(mask, expected)


def test_segment_ids_of_64_bits_are_told_apart():
    """Hashes: equal in their low 32 bits, above 2^31, negative for padding; both sides by the same names."""
    small = torch.tensor([[3, 0, 0, 1, 2, 2, -1], [0, 0, 1, 1, -1, 0, 0]])
    names = torch.tensor([2**33, 2**33 + 2**32, 2**31 + 5, -(2**40), 7])  # the last but one is padding
    large = names[torch.where(small < 0, 3, torch.where(small == 3, 4, small))]
    pattern = PiPattern(3, 4)
    inputs = make_inputs(1, q_len=7, k_len=7)
    expected = results(pi_attention, inputs, pattern, segment_ids=small.int())
    assert_equal(results(pi_attention, inputs, pattern, segment_ids=large), expected)
    later = (inputs[0][:, 2:], *inputs[1:3], inputs[3][:, 2:])
    options = {"query_start": 2, "backend": "reference"}
    found, right = (
        pi_attention(*later, pattern, segment_ids=(ids[:, 2:], ids), **options)
        for ids in (large, small.int())
    )
    assert torch.equal(found, right)
    with pytest.raises(ValueError, match=r"segment_ids.dtype \(torch.float32\) is an integer type"):
        pi_attention(*inputs, pattern, segment_ids=small.float())
