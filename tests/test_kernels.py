"""The Triton kernels against the dense fp64 oracle, on a GPU if there is one, else interpreted."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_calls import (
    DEVICE,
    KERNELS,
    assert_close,
    check,
    draw_inputs,
    on_ranks,
    results,
    spied,
    triton_attention,
)

from pi_dist.kernels import block_sizes
from pi_dist.kernels.block_sizes import Blocks
from pi_dist.kernels.tiles import Rows
from pi_dist.ops import PiPattern, pi_attention, triton_backend, triton_launches
from pi_dist.ops.oracle import pi_attention_oracle
from pi_dist.ops.triton_bands import BOTH, RING, SKIP

pytestmark = pytest.mark.usefixtures("quick_interpreter", "poisoned_memory")


@contextlib.contextmanager
def tiles(sizes):
    """Tiles as small as (block_m, block_n) where the band allows: many edges in short sequences."""

    def small(kernel, kind, band, head_dim, element_bytes):
        entry = block_sizes.blocks(kernel, kind, band, head_dim, element_bytes)
        power = 1 << (2 * band).bit_length()  # above 2·band
        block_m = max(sizes[0], {"narrow": power, "walk": power // 2}.get(kernel, 0))
        block_n = 4 * block_m if kernel == "walk" else sizes[1]
        return Blocks(block_m, block_n, 4, 1, halo=entry.halo and max(16, power // 2))

    with pytest.MonkeyPatch.context() as patch:
        if sizes is not None:
            patch.setattr(triton_launches, "blocks", small)
            triton_launches.plan_of.cache_clear()
        yield
    triton_launches.plan_of.cache_clear()


@st.composite
def cases(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    num_skips = draw(st.sampled_from([0, 1, 1, 2, 5, 16]))
    largest = 90  # beyond the longest sequence
    pattern = PiPattern(
        window=draw(st.integers(0, 20) | st.integers(0, 100)),
        strides=draw(
            st.integers(1, largest)
            | st.lists(st.integers(1, largest), min_size=heads, max_size=heads).map(tuple)
        ),
        causal=draw(st.booleans()),
        include_self=draw(st.booleans()),
        num_skips=num_skips,
    )
    length = draw(st.integers(1, 70))
    k_len, options = length, {"logit_cap": draw(st.sampled_from([20.0, 0.5, None]))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    match draw(st.sampled_from(["plain", "segments", "padding", "both", "positions"])):
        case "positions":
            k_len, base = draw(st.integers(1, 70)), draw(st.sampled_from([0, 2**33]))
            options["query_start"] = base + draw(st.integers(0, 40))
            options["key_start"] = base + draw(st.integers(0, 40))
        case kind:
            if kind in ("segments", "both"):
                options["segment_ids"] = (
                    torch.randint(0, 3, (1, length), generator=generator).sort(dim=1).values.to(DEVICE)
                )
            if kind in ("padding", "both"):
                options["padding_mask"] = (torch.rand(1, length, generator=generator) < 0.7).to(DEVICE)
    if draw(st.booleans()):
        options |= {
            "dropout_p": 0.3,
            "seed": draw(st.integers(0, 2**63 - 1)),
            "row_start": draw(st.integers(0, 2**40)),
        }
    inputs, dout = draw_inputs(
        draw(st.integers(0, 99)),
        1,
        length,
        k_len,
        heads,
        kv_heads,
        draw(st.sampled_from([4, 16, 24])),
        draw(st.booleans()),
    )
    sizes = draw(st.sampled_from([None, (16, 16), (32, 16), (16, 32)]))
    return inputs, dout, pattern, options, sizes


@settings(max_examples=22)
@given(cases())
def test_kernels_equal_the_dense_oracle_and_its_gradients(case):
    inputs, dout, pattern, options, sizes = case
    with tiles(sizes):
        check(inputs, dout, pattern, **options)


def wide(kind, shifts=0):
    """The launches of a band whose backward takes two kernels."""
    kernels = ("_pi_attention_fwd_kernel", "_keys_kernel", "_queries_kernel")
    return {(kernel, kind, shifts) for kernel in kernels}


def narrow(kind, shifts=0):
    """The launches of a band whose backward is one tile."""
    return {("_pi_attention_fwd_kernel", kind, shifts), ("_fused_kernel, one tile", kind, shifts)}


def walk(kind):
    """The launches of a band whose backward is a walk."""
    return {("_pi_attention_fwd_kernel", kind, 0), ("_fused_kernel, a walk", kind, 0)}


BOTH_WAYS = {"causal": False}


# pattern, query heads, key/value heads, length, launches as (kernel, band, far skips done row by row)
LAUNCHES = {
    "window": (PiPattern(9, 3, num_skips=3), 1, 1, 120, narrow(RING)),
    "window both ways": (PiPattern(16, 3, num_skips=3, **BOTH_WAYS), 1, 1, 100, narrow(RING)),
    "widest narrow window": (PiPattern(32, 40, num_skips=0), 1, 1, 70, narrow(RING)),
    "one near skip": (PiPattern(4, 17), 2, 1, 100, narrow(BOTH)),
    "near skips": (PiPattern(2, 5, num_skips=6), 1, 1, 80, narrow(BOTH)),
    "near skips, one head's inside the window": (PiPattern(6, (3, 11)), 2, 1, 80, narrow(BOTH)),
    "near skips both ways": (PiPattern(2, 4, num_skips=4, **BOTH_WAYS), 1, 1, 90, narrow(BOTH)),
    "wide near skips both ways": (PiPattern(8, (12, 5), num_skips=2, **BOTH_WAYS), 2, 1, 100, wide(BOTH)),
    "one far skip": (PiPattern(4, 70), 1, 1, 150, narrow(RING, 1)),
    "one far skip, strides differ in a key head": (PiPattern(4, (35, 70)), 2, 1, 110, narrow(RING, 1)),
    "one far skip both ways": (PiPattern(4, (35, 70), **BOTH_WAYS), 2, 1, 110, narrow(RING, 1)),
    "far skip of a wide window": (PiPattern(100, (90, 110)), 2, 1, 170, wide(RING, 1)),
    "far skip of a wide window both ways": (PiPattern(60, (90, 70), **BOTH_WAYS), 2, 1, 130, wide(RING, 1)),
    "many skips": (PiPattern(2, 3, num_skips=16), 1, 1, 110, narrow(RING) | narrow(SKIP)),
    "many skips both ways": (
        PiPattern(2, 3, num_skips=16, **BOTH_WAYS), 1, 1, 110, narrow(RING) | narrow(SKIP),
    ),
    "many skips, strides differ between key heads": (
        PiPattern(0, (2, 2, 5, 5), num_skips=8), 4, 2, 45, narrow(RING) | narrow(SKIP),
    ),
    "many skips, strides differ in a key head": (
        PiPattern(4, (3, 5), num_skips=7), 2, 1, 50, narrow(RING) | wide(SKIP),
    ),
    "many skips, strides differ in a key head, both ways": (
        PiPattern(4, (3, 5), num_skips=7, **BOTH_WAYS), 2, 1, 50, narrow(RING) | wide(SKIP),
    ),
    "skips alone": (PiPattern(0, 4, include_self=False, num_skips=9), 2, 1, 70, narrow(SKIP)),
    "skips alone, a walk": (PiPattern(0, 2, include_self=False, num_skips=60), 2, 2, 330, walk(SKIP)),
    "wide skips alone": (PiPattern(0, 2, include_self=False, num_skips=100), 1, 1, 330, wide(SKIP)),
    "wide skips both ways": (
        PiPattern(1, 2, num_skips=40, **BOTH_WAYS), 1, 1, 170, narrow(RING) | wide(SKIP),
    ),
    "window, a walk": (PiPattern(33, 40, num_skips=0), 2, 2, 300, walk(RING)),
    "window and skips, two walks": (PiPattern(64, (3, 2), num_skips=64), 2, 2, 330, walk(RING) | walk(SKIP)),
    "window of a walk, query heads share keys": (PiPattern(64, 70, num_skips=0), 2, 1, 130, wide(RING)),
    "a skip beyond the sequence": (
        PiPattern(2, (3, 500), num_skips=20), 2, 2, 90, narrow(RING) | narrow(SKIP),
    ),
    "no skip within the sequence": (PiPattern(2, 90, num_skips=20), 1, 1, 90, narrow(RING)),
    "chains of two tokens": (PiPattern(0, 46, False, num_skips=3), 1, 1, 90, narrow(RING) | narrow(SKIP)),
    "wide window": (PiPattern(130, 7, num_skips=5), 1, 1, 230, wide(RING)),
    "wide window both ways": (PiPattern(130, 7, num_skips=5, **BOTH_WAYS), 1, 1, 200, wide(RING)),
    "wide window without self": (PiPattern(130, 7, True, False, 5), 1, 1, 200, wide(RING)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_kind_of_launch(name):
    """With the shipped tile sizes; the recorded launches show that the case is what its name says."""
    pattern, heads, kv_heads, length, expected = LAUNCHES[name]
    inputs, dout = draw_inputs(1, 1, length, None, heads, kv_heads)
    with spied() as launches:
        check(inputs, dout, pattern)
    assert {
        (
            kernel + (", a walk" if options.walk else ", one tile") * (kernel == "_fused_kernel"),
            options.kind,
            options.shifts,
        )
        for kernel, *_, options in launches
        if kernel != "_queries_once_kernel"
    } == expected


@pytest.mark.parametrize(
    ("window", "causal", "include_self", "shift"),
    [
        (33, True, True, 0),
        (46, True, True, 0),
        (46, False, True, 0),
        (47, True, True, 0),
        (47, False, False, 0),
        (48, True, False, 0),
        (48, True, False, 15),
        (46, False, True, 15),
        (49, True, False, -15),
    ],
)
def test_tile_edges_of_a_wide_window(window, causal, include_self, shift):
    """Tiles of 16 that are full or whose last column matters, if the loops' limits are right to the token.

    Queries begin `shift` tokens after the keys.
    """
    inputs, dout = draw_inputs(2, 1, 66, None, 1, 1)
    starts = {"query_start": 20 + shift, "key_start": 20}
    with tiles((16, 16)):
        check(inputs, dout, PiPattern(window, 1, causal, include_self, 0), **starts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 3])
def test_tile_edges_of_many_skips(window, causal):
    """48 skips of stride 2, the first inside the window or not: two residue classes of several tiles."""
    inputs, dout = draw_inputs(3, 1, 110, None, 1, 1)
    with tiles((16, 16)):
        check(inputs, dout, PiPattern(window, 2, causal, window > 0, 48))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_lengths_around_a_tile(length):
    inputs, dout = draw_inputs(4, 2, length, None, 1, 1)
    for pattern in (PiPattern(3, 33), PiPattern(1, 2, False, num_skips=17)):
        check(inputs, dout, pattern)


def test_memory_is_poisoned_and_every_element_written():
    """Empty neighbourhoods and padding give exact zeros, not what the memory held."""
    assert triton_backend.torch.empty(2).isnan().all()
    assert triton_backend.torch.empty_like(torch.zeros(2)).isnan().all()
    inputs, dout = draw_inputs(5)
    for pattern in (
        PiPattern(0, 50, include_self=False, num_skips=0),
        PiPattern(2, 37, include_self=False),
        PiPattern(0, 2, include_self=False, num_skips=17),
    ):
        found = results(triton_attention, inputs, dout, pattern)
        assert all(torch.isfinite(x).all() for x in found)
        assert all((found[index][:, 0] == 0).all() for index in (0, 1, 4))  # the first query sees nothing
    nothing = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    for pattern in (PiPattern(2, 4), PiPattern(40, 50), PiPattern(2, 3, num_skips=11)):
        found = results(triton_attention, inputs, dout, pattern, padding_mask=nothing)
        assert all((x == 0).all() for x in found)


def test_gates_at_their_ends():
    """α = 0 and 1 are squeezed: finite, and as near the oracle as fp32 holds 1-α near 1."""
    inputs, dout = draw_inputs(6)
    inputs[3] = (inputs[3] > 0.5).float()
    for pattern in (PiPattern(3, 7), PiPattern(2, 3, num_skips=11)):
        found = results(triton_attention, inputs, dout, pattern)
        expected = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
        assert_close(found, expected, relative=2e-3)


@pytest.mark.parametrize(
    "pattern",
    [PiPattern(4, 70), PiPattern(2, 3, num_skips=16), PiPattern(60, 70), PiPattern(150, 1, num_skips=0)],
    ids=str,
)
@pytest.mark.parametrize(("level", "cap"), [(-90.0, None), (-110.0, None), (-300.0, 200.0)])
def test_very_negative_logits(pattern, level, cap):
    """A row's first keys may lie in another document: the softmax must not start from a maximum of 0."""
    (q, k, v, gate), dout = draw_inputs(19, 1, 100, None, 2, 2)
    q, k = q * 0.1 + abs(level), k * 0.1 + level / abs(level) * 0.5  # logits of 4 elements: about level
    segments = torch.tensor([[0] * 55 + [1] * 45], device=DEVICE)
    options = {"logit_cap": cap, "segment_ids": segments}
    found = results(triton_attention, (q, k, v, gate), dout, pattern, **options)
    expected = results(pi_attention_oracle, (q, k, v, gate), dout, pattern, torch.float64, **options)
    assert_close(found, expected, relative=5e-4, absolute=1e-4)


@pytest.mark.parametrize(
    "pattern", [PiPattern(4, 16), PiPattern(70, 90, num_skips=0), PiPattern(2, 3, num_skips=12)], ids=str
)
def test_strides_of_more_elements_than_32_bits_count(pattern, monkeypatch):
    """The 64-bit offsets, with tensors that would not need them."""
    used = []

    class Far(triton_launches.LaunchPlan):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._token_stride = 2**31

        def _options(self, *arguments, **keywords):
            options = super()._options(*arguments, **keywords)
            used.append(options.long_steps)
            return options

    monkeypatch.setattr(triton_backend, "plan_of", Far)
    inputs, dout = draw_inputs(20, 1, 110, None, 2, 1)
    check(inputs, dout, pattern)
    assert len(used) >= 2 and all(used)


@pytest.mark.parametrize(
    "pattern",
    [PiPattern(4, 16), PiPattern(3, 70), PiPattern(40, 3, num_skips=9), PiPattern(2, 3, False, num_skips=12)],
    ids=str,
)
def test_the_cap_serves_as_the_maximum_as_in_bf16(pattern, monkeypatch):
    """What bf16 alone does, which the interpreter cannot: here in fp32, also merged over received rows."""

    class Capped(triton_launches.LaunchPlan):
        def _options(self, *arguments, **keywords):
            return super()._options(*arguments, **keywords)._replace(fixed_top=True)

    monkeypatch.setattr(triton_backend, "plan_of", Capped)
    inputs, dout = draw_inputs(24, 1, 99, None, 2, 1)
    inputs[0] = inputs[0] * 8  # some logits are clamped
    segments = torch.tensor([[0] * 30 + [1] * 69], device=DEVICE)
    check(inputs, dout, pattern, logit_cap=20.0, segment_ids=segments)
    options = {"logit_cap": 40.0, "dropout_p": 0.25, "seed": 3, "row_start": 0}
    expected = results(
        pi_attention_oracle, inputs, dout, pattern, torch.float64, segment_ids=segments, **options
    )
    assert_close(on_ranks(inputs, dout, pattern, segments, 3, options), expected)


def test_a_window_without_end_and_an_fp64_gate():
    inputs, dout = draw_inputs(22, 1, 40)
    check(inputs, dout, PiPattern(2**31, 1, num_skips=0))
    inputs[3] = inputs[3].double()
    out = triton_attention(*inputs, PiPattern(3, 2))
    expected = pi_attention_oracle(*(x.double() for x in inputs), PiPattern(3, 2))
    assert_close([out], [expected])


def test_labels_of_queries_and_keys_of_different_lengths():
    """As the reference in fp64, which tests/test_pi_attention.py compares with the oracle."""
    inputs, dout = draw_inputs(7, 2, 33, 47, 1, 1)
    generator = torch.Generator().manual_seed(7)
    segments = torch.randint(-1, 2, (2, 60), generator=generator).to(DEVICE)
    options = {"query_start": 20, "key_start": 5, "segment_ids": (segments[:, 20:53], segments[:, 5:52])}
    for pattern in (PiPattern(3, 24, False), PiPattern(3, 3, num_skips=11), PiPattern(50, 3)):
        found = results(triton_attention, inputs, dout, pattern, **options)
        reference = results(
            pi_attention, inputs, dout, pattern, torch.float64, backend="reference", **options
        )
        assert_close(found, reference)


def test_segment_ids_of_64_bits_are_read_as_they_are():
    """Hashes, equal in their low 32 bits or above 2^31: neither copied nor sorted, and equal to small ids."""
    inputs, dout = draw_inputs(23, 1, 60, None, 2, 1)
    small = torch.arange(60, device=DEVICE)[None] // 25
    small[:, 40:44] = 3
    ids = torch.tensor([2**33, 2**33 + 2**32, 2**31 + 5, -(2**40)], device=DEVICE)[small]  # 3: padding
    for pattern in (PiPattern(3, 24), PiPattern(3, 3, num_skips=11), PiPattern(50, 3)):
        with spied() as launches:
            found = results(triton_attention, inputs, dout, pattern, segment_ids=ids)
        read = {x.ptr.data_ptr() for _, arguments, *_ in launches for x in arguments if isinstance(x, Rows)}
        assert ids.data_ptr() in read
        options = {"segment_ids": small.int(), "padding_mask": small != 3}
        assert_close(found, results(triton_attention, inputs, dout, pattern, **options), 1e-6, 1e-7)


@pytest.mark.parametrize(
    "pattern", [PiPattern(4, 35), PiPattern(36, 3), PiPattern(2, 3, num_skips=11)], ids=str
)
def test_strided_inputs_are_read_in_place(pattern):
    """Views of a fused projection amid NaN, a transposed gate, dout of any layout, without copies.

    Equal bits when interpreted; compiled, a tile, and so its sums, may be laid out by how rows are aligned.
    """

    def assert_equal(found, expected):
        assert_close(found, expected, *((1e-6, 1e-7) if DEVICE == "cuda" else (0.0, 0.0)))

    (q, k, v, gate), dout = draw_inputs(10, 2, 40, None, 2, 1)
    contiguous = results(triton_attention, (q, k, v, gate), dout, pattern)
    fused = torch.full((2, 42, 4, 4), float("nan"), device=DEVICE)
    fused[:, 1:-1] = torch.cat([q, k, v], dim=2)
    views = [fused[:, 1:-1, heads] for heads in (slice(0, 2), slice(2, 3), slice(3, 4))]
    views.append(gate.transpose(1, 2).contiguous().transpose(1, 2))
    with spied() as launches:
        strided = results(triton_attention, views, dout.transpose(1, 2).contiguous().transpose(1, 2), pattern)
    assert_equal(strided, contiguous)
    calls = [(name, arguments) for name, arguments, *_ in launches if name in KERNELS]
    assert len(calls) >= 2
    for name, arguments in calls:
        read = [(x.ptr.data_ptr(), x.batch, x.token, x.head) for x in arguments if isinstance(x, Rows)]
        wanted = [(x.data_ptr(), *x.stride()[:3]) for x in views]
        assert read[:3] == wanted[:3]
        assert wanted[3] in read or name == "_keys_kernel"  # which reads the gate's logarithms
    if pattern.window > 4:
        return
    for layout in (torch.ones(1, device=DEVICE).expand_as(dout), dout[..., :1].expand_as(dout)):
        expanded = results(triton_attention, (q, k, v, gate), layout, pattern)
        dense = results(triton_attention, (q, k, v, gate), layout.contiguous(), pattern)
        assert_equal(expanded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_runs_are_equal_bit_by_bit(dtype):
    inputs, dout = draw_inputs(11, 1, 40, dtype=dtype)
    for pattern in (PiPattern(2, 35), PiPattern(3, (2, 3), False, num_skips=12), PiPattern(40, 2)):
        first, second = (
            results(triton_attention, inputs, dout, pattern, dropout_p=0.1, seed=5) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "pattern",
    [
        PiPattern(4, 16, num_skips=2),
        PiPattern(16, 40),
        PiPattern(32, 5, num_skips=0),
        PiPattern(40, 3, num_skips=15),
        PiPattern(2, 3, False, num_skips=12),
    ],
    ids=str,
)
def test_low_precision_errs_no_more_than_plain_pytorch(pattern, dtype):
    """Against fp64: at most 1.5 times the error of the same formula in plain PyTorch, and a rounding."""
    inputs, dout = draw_inputs(12, 1, 80, None, 2, 1, 16, dtype=dtype)
    exact = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
    plain = results(pi_attention_oracle, inputs, dout, pattern)
    found = results(triton_attention, inputs, dout, pattern)
    slack = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for index, (expected, eager, ours) in enumerate(zip(exact, plain, found, strict=True)):
        scale = expected.norm() + 1e-3 * expected.numel() ** 0.5  # the gradient of a gate without skips is 0
        eager_error, our_error = ((x.double() - expected).norm() / scale for x in (eager, ours))
        assert our_error <= 1.5 * eager_error + slack, f"tensor {index}"


@pytest.mark.parametrize("logit_cap", [20.0, None])
@pytest.mark.parametrize("pattern", [PiPattern(3, 5), PiPattern(4, 9, num_skips=6)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_a_number_stays_so(pattern, logit_cap):
    """In the rows in which the reference has it: a clamp that hid it would hide it from the loss, too."""
    for place in range(4):
        inputs, _ = draw_inputs(5, gated=True, head_dim=16)
        inputs[place][0, 11, 0] = float("nan")
        ours, plain = (
            pi_attention(*inputs, pattern, logit_cap=logit_cap, backend=backend).isfinite().all(-1)
            for backend in ("triton", "reference")
        )
        assert not plain[0, 11, 0]
        if place == 2:  # in v it also meets the weight 0 of keys beside it in a tile
            assert (ours <= plain).all()
        else:
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("heads", [4, 32])
def test_heads_that_share_keys_and_differ_in_stride_round_their_sum_once(heads):
    """16 bits: at most half again of the error of plain PyTorch, which adds up in fp32."""
    pattern = PiPattern(4, tuple(range(3, 3 + heads)), num_skips=7)
    inputs, dout = draw_inputs(3, q_len=96, heads=heads, kv_heads=1, head_dim=16, dtype=torch.float16)
    exact = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
    plain = results(pi_attention_oracle, inputs, dout, pattern)
    found = results(triton_attention, inputs, dout, pattern)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        error, eager = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert error <= 1.5 * eager + 1e-6


def test_keys_that_no_query_sees_have_no_gradient():
    """Not even one, of no queries: 0, not what was in memory."""
    inputs, dout = draw_inputs(0, q_len=0, k_len=5)
    _, _, dk, dv, _ = results(triton_attention, inputs, dout, PiPattern(3, 5))
    assert not dk.any() and not dv.any()
