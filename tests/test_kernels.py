"""The Triton kernels against the dense fp64 oracle, on a GPU if there is one, else interpreted."""

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# Triton's interpreter, for machines without a GPU. `triton.jit` looks at this when it decorates, so before
# the first import of a kernel.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from pi_dist.kernels import block_sizes
from pi_dist.kernels.block_sizes import Blocks
from pi_dist.kernels.tiles import Rows
from pi_dist.measure.kernel_bench import HEADS
from pi_dist.measure.kernel_tuning import trials, use
from pi_dist.ops import PiPattern, pi_attention, triton_backend, triton_bands, triton_launches
from pi_dist.ops.oracle import pi_attention_oracle
from pi_dist.ops.pi_attention import token_labels
from pi_dist.ops.spec import AttentionSpec, KeyBlock, Run
from pi_dist.ops.triton_bands import BOTH, RING, SKIP
from pi_dist.ops.triton_compile import Call
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


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter():
    """The interpreter patches `triton.language` anew at every call inside a kernel; here, once a launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, all_of_it = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(_):
        return patch_lang(all_of_it) if tl.core.is_builtin(tl.load) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory():
    """Fresh tensors of the backend are NaN in every test here, so that each element must be written."""

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *arguments, **keywords):
            return torch.empty(*arguments, **keywords).fill_(float("nan"))

        def empty_like(self, *arguments, **keywords):
            return torch.empty_like(*arguments, **keywords).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "torch", Torch())
        yield


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


def test_what_the_kernels_cannot_count_is_refused():
    inputs, _ = draw_inputs(21, 1, 4)
    with pytest.raises(ValueError, match=r"num_skips · stride \(536870912\) < 2\^29 does not hold"):
        triton_attention(*inputs, PiPattern(1, 2**29))
    with pytest.raises(ValueError, match=r"queries and keys within \(536870916\) < 2\^29 tokens"):
        triton_attention(*inputs, PiPattern(1, 2), query_start=2**29)
    with pytest.raises(ValueError, match=r"softmax_scale \(0\) != 0"):
        triton_attention(*inputs, PiPattern(1, 2), softmax_scale=0.0)


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


@contextlib.contextmanager
def planned():
    """The launch plans of calls in here."""
    plans, plan_of = [], triton_backend.plan_of

    def noting(*arguments):
        plans.append(plan_of(*arguments))
        return plans[-1]

    with patch.object(triton_backend, "plan_of", noting):
        yield plans


@pytest.fixture
def far_is_near(monkeypatch):
    """Skips count as far beyond 8 tokens instead of 32, so that short sequences have all bands."""
    monkeypatch.setattr(triton_bands, "NEAR_SKIPS", 8)
    triton_launches.plan_of.cache_clear()
    yield
    triton_launches.plan_of.cache_clear()


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


def test_queries_near_the_edge_of_a_shard_alone_are_summed_in_fp32():
    """Four launches work on those, two on the others; errors as of plain PyTorch over the whole sequence."""
    inputs, dout = draw_inputs(31, 2, 240, None, 2, 1, dtype=torch.float16)
    pattern, edge = PiPattern(3, 20, num_skips=2), slice(120, 160)
    options = {"logit_cap": 20.0, "dropout_p": 0.0, "seed": 0, "row_start": 0}
    exact = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
    plain = results(pi_attention_oracle, inputs, dout, pattern)
    with planned() as plans:
        found = on_ranks(inputs, dout, pattern, None, 2, options)
    assert [plan.edge for plan in plans] == [None, None, slice(0, 40), slice(0, 40)]
    assert all(plan.sum_dtype == torch.float16 for plan in plans)
    for rows in (edge, slice(None)):
        for expected, eager, ours in zip(exact, plain, found, strict=True):
            errors = ((x.double() - expected)[:, rows].norm() for x in (eager, ours))
            eager_error, our_error = (error / expected[:, rows].norm() for error in errors)
            assert our_error <= 1.5 * eager_error + torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("pattern", "heads", "kv_heads"),
    [
        (PiPattern(3, 7), 2, 1),
        (PiPattern(3, 10), 1, 1),
        (PiPattern(4, (5, 11), causal=False), 2, 2),
        (PiPattern(1, (2, 4), num_skips=3), 2, 1),
        (PiPattern(1, (2, 2, 5, 5), causal=False, num_skips=3), 4, 2),
        (PiPattern(0, 4, include_self=False, num_skips=3), 1, 1),
        (PiPattern(8, 12), 1, 1),
        (PiPattern(20, 25, causal=False), 1, 1),
    ],
    ids=str,
)
def test_shards_with_received_rows_equal_the_whole_sequence(pattern, heads, kv_heads, far_is_near):
    """Several key blocks, of all heads or of one group of heads: three ranks played by one process."""
    inputs, dout = draw_inputs(8, 1, 21, None, heads, kv_heads)
    options = {"logit_cap": 20.0, "dropout_p": 0.25, "seed": 2**40 + 3, "row_start": 2**34}
    labels = None
    if heads < 4:
        segments = torch.tensor([[0] * 9 + [1] * 12], device=DEVICE)
        padding = torch.rand(1, 21, generator=torch.Generator().manual_seed(8)).to(DEVICE) < 0.8
        labels = token_labels(segments, padding)
    masks = {} if labels is None else {"segment_ids": labels, "padding_mask": labels >= 0}
    expected = results(pi_attention_oracle, inputs, dout, pattern, torch.float64, **options, **masks)
    assert_close(on_ranks(inputs, dout, pattern, labels, 3, options), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_one_skip_sees_cost_the_same_at_any_distance(causal):
    """No launch works on the places between such rows and the queries that look at them."""

    def programs(distance):
        pattern = PiPattern(3, distance, causal)
        runs = (Run(0, 96), Run(-distance, 96 - distance), Run(distance + 48, distance + 96))
        blocks = tuple(KeyBlock((0, 1), Run(a + 10**6, b + 10**6)) for a, b in runs[: 2 if causal else 3])
        spec = AttentionSpec(pattern, 2, blocks, 0.5, 20.0, 0.0, 0, 10**6, 0)
        shape, device = torch.Size((1, 96, 2, 16)), torch.device(DEVICE)
        plan = triton_launches.LaunchPlan(spec, shape, torch.float32, device, True, False, 32)
        launches = (*plan.forward, *plan.backward.sent, *plan.backward.rest)
        return [(launch.kernel, launch.part.view, launch.programs) for launch in launches]

    near = programs(200)
    assert near == programs(2**19) and len(near) > 3
    assert causal or slice(47, 96) in [view for _, view, _ in near]


def test_the_interior_is_worked_on_while_rows_travel():
    """Forward, rows are awaited after the launches on the shard; backward, what is sent back comes first."""
    inputs, dout = draw_inputs(18, 1, 96, None, 1, 1)
    q, k, v, gate = inputs
    plan = make_plan(PiPattern(3, 40, num_skips=2), 1, 1, 96, 2, 1)
    spec = AttentionSpec(
        PiPattern(3, 40, num_skips=2), 1, plan.blocks, 0.5, 20.0, 0.0, 0, plan.shard.start, 0
    )
    keys, values = ([x[:, slice(*block.run)].clone() for block in plan.blocks] for x in (k, v))
    mine, nowhere = slice(*plan.shard), [None] * len(keys)
    rest = (gate[:, mine], None, nowhere)

    def names(launches):
        """(kernel, whether it works on the shard's own keys), or what happened in between."""
        own = keys[0].data_ptr()
        return [x if isinstance(x, str) else (x[0], x[1][1].ptr.data_ptr() == own) for x in launches]

    with spied() as launches:

        def arrive():
            launches.append("arrive")
            return keys[1:], values[1:]

        out, lse = triton_backend.pi_attention_fwd(spec, q[:, mine], keys[:1], values[:1], *rest, arrive)
        forward = names(launches)
        launches.clear()
        triton_backend.pi_attention_bwd(
            spec, q[:, mine], keys, values, *rest, out, lse, dout[:, mine],
            lambda dkeys, dvalues: launches.append("send back"),
        )  # fmt: skip
        backward = [name for name in names(launches) if name[0] != "_queries_once_kernel"]
    arrived, sent = forward.index("arrive"), backward.index("send back")
    assert 0 < arrived < len(forward) - 1
    assert all(own for _, own in forward[:arrived]) and not any(own for _, own in forward[arrived + 1 :])
    assert 0 < sent < len(backward) - 1
    assert all(name == ("_keys_kernel", False) for name in backward[:sent])
    assert all(own or name == "_queries_kernel" for name, own in backward[sent + 1 :])


@pytest.mark.parametrize("pattern", [PiPattern(4, 16), PiPattern(36, 7, num_skips=5)], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_compiled_ahead_is_what_a_call_launches(pattern, rank):
    """The same kernels with the same options and types of arguments, though no tensor has memory."""
    (q, k, v, gate), dout = draw_inputs(25, 2, 240, None, 2, 2, 16)
    plan = make_plan(pattern, 2, 2, 240, 3, rank)
    spec = AttentionSpec(pattern, 2, plan.blocks, 0.25, 20.0, 0.0, 0, plan.shard.start, 0)
    keys, values = ([x[:, slice(*block.run)].contiguous() for block in plan.blocks] for x in (k, v))
    mine = slice(*plan.shard)
    labels = [torch.zeros(2, x.shape[1], dtype=torch.int32, device=DEVICE) for x in keys]
    by_head = gate[:, mine].transpose(1, 2).contiguous().transpose(1, 2)
    tensors = (q[:, mine].contiguous(), keys, values, by_head, labels[0], labels)
    out, lse, dout = torch.empty_like(tensors[0]), torch.empty_like(by_head), dout[:, mine].contiguous()

    def noted(launch):
        """The launches, tensors by their dtypes and strides."""
        launches = []

        def run(kernel, programs, *arguments, **keywords):
            kinds = [(x.ptr.dtype, x[1:]) if isinstance(x, Rows) else x for x in arguments]
            launches.append((kernel, programs, [x for x in kinds if not torch.is_tensor(x)], keywords))

        launch(run)
        return launches

    def real(run):
        q, keys, values, *rest = tensors
        triton_backend.pi_attention_fwd(
            spec, q, keys[:1], values[:1], *rest, lambda: (keys[1:], values[1:]), run=run
        )
        triton_backend.pi_attention_bwd(spec, q, keys, values, *rest, out, lse, dout, run=run)

    call = Call(spec, 2, 80, 2, 16, torch.float32, gated=True, labelled=True)
    assert noted(real) == noted(call.launch) != []


def test_gradients_of_received_rows_are_fp32_for_fp16_inputs():
    inputs, dout = draw_inputs(9, 1, 18, None, 2, 2, dtype=torch.float16)
    options = {"logit_cap": 20.0, "dropout_p": 0.0, "seed": 0, "row_start": 0}
    pattern = PiPattern(3, (4, 7))
    expected = results(pi_attention_oracle, inputs, dout, pattern, torch.float64)
    assert_close(on_ranks(inputs, dout, pattern, None, 3, options), expected, relative=2e-3)


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


def is_tile(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def test_the_table_of_tile_sizes_has_the_entries_that_are_measured_and_no_others():
    measured = {trial.entry for head_dim in HEADS for trial in trials(head_dim)}
    assert measured == set(block_sizes.table())


def test_tuning_launches_what_it_times():
    """Calls that are alike share a plan, which must not outlive the sizes that it was made with."""
    inputs, _ = draw_inputs(18, 1, 200, dtype=torch.float16)
    pattern, entry = PiPattern(100, 200, num_skips=0), block_sizes.key("fwd", "ring", 100, 4)
    before = block_sizes.table()[entry]
    try:
        for block_n in (32, 128):
            use(entry, replace(before, block_n=block_n))
            with spied(run=False) as launches:
                pi_attention(*inputs, pattern, backend="triton")
            assert {options.block_n for *_, options in launches} == {block_n}
    finally:
        use(entry, before)


def test_tile_sizes_fit_whatever_is_asked_for(monkeypatch):
    """By calls of every kind; launches are not run."""
    asked = set()

    def recorded(kernel, kind, band, head_dim, element_bytes):
        if head_dim <= 128:
            asked.add(block_sizes.key(kernel, kind, band, head_dim))
        sizes = block_sizes.blocks(kernel, kind, band, head_dim, element_bytes)
        assert is_tile(sizes.block_m) and is_tile(sizes.block_n)
        if kernel == "walk":
            assert sizes.block_m >= band and sizes.block_n % sizes.block_m == 0
        if kernel == "narrow":
            assert sizes.block_m > band, f"a tile owns no token: band {band}, {element_bytes} bytes"
        if sizes.halo:
            assert kernel == "fwd" and is_tile(sizes.halo) and sizes.halo >= band
        return sizes

    monkeypatch.setattr(triton_launches, "blocks", recorded)
    triton_launches.plan_of.cache_clear()
    windows, skips = (0, 4, 16, 20, 33, 64, 100, 600), (0, 1, 3, 16, 17, 64, 100)
    for dtype, head_dim, heads in itertools.product((torch.float16, torch.float32), (1, 128, 200), (1, 2)):
        (q, k, v, gate), dout = draw_inputs(17, 1, 900, None, heads, 1, head_dim, dtype=dtype)
        for window, num_skips, stride in itertools.product(windows, skips, (3, 20, 400)):
            for causal, ranks in ((True, 1), (True, 3), (False, 1)):
                pattern, m = PiPattern(window, stride, causal, num_skips=num_skips), 900 // ranks
                plan = make_plan(pattern, heads, 1, 900, ranks, ranks - 1)
                spec = AttentionSpec(pattern, 1, plan.blocks, 0.5, 20.0, 0.0, 0, plan.shard.start, 0)
                keys, values = ([x[:, slice(*block.run)] for block in plan.blocks] for x in (k, v))
                rest = (gate[:, :m], None, [None] * len(keys))
                with spied(run=False):
                    out, lse = triton_backend.pi_attention_fwd(
                        spec, q[:, :m], keys[:1], values[:1], *rest, lambda k=keys, v=values: (k[1:], v[1:])
                    )
                    triton_backend.pi_attention_bwd(
                        spec, q[:, :m], keys, values, *rest, out, lse, dout[:, :m]
                    )
    assert asked == set(block_sizes.table())  # every entry is of use


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_of_every_launch_hold_their_band_and_own_something(dtype):
    """Launches are recorded, not run: windows and numbers of skips up to 40, both directions."""
    (q, k, v, gate), dout = draw_inputs(17, 1, 2000, None, 1, 1, dtype=dtype)
    lse = torch.zeros(1, 2000, 1, device=DEVICE)
    sizes = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40)
    for window, num_skips, causal in itertools.product(sizes, sizes, (True, False)):
        for stride, length in itertools.product((1, 3, 50), (1, 100, 2000)):
            pattern = PiPattern(window, stride, causal, True, num_skips)
            plan = make_plan(pattern, 1, 1, length, 1, 0)
            spec = AttentionSpec(pattern, 1, plan.blocks, 0.5, 20.0, 0.0, 0, 0, 0)
            tensors = [q[:, :length], [k[:, :length]], [v[:, :length]], gate[:, :length], None, [None]]
            with spied(run=False) as launches:
                triton_backend.pi_attention_fwd(spec, *tensors)
                triton_backend.pi_attention_bwd(
                    spec, *tensors, q[:, :length], lse[:, :length], dout[:, :length]
                )
            for kernel, _, grid, options in launches:
                assert grid[0] >= 1 and is_tile(options.block_m) and is_tile(options.block_n)
                if kernel == "_fused_kernel" and options.walk:
                    assert options.block_m >= options.left > 0 == options.right, (pattern, length)
                elif kernel == "_fused_kernel":
                    assert options.block_m > options.left + options.right, (pattern, length)
                if options.halo:
                    assert options.halo >= max(options.left, options.right), (pattern, length)


def test_a_saved_table_reads_back_the_same(tmp_path, monkeypatch):
    entries = block_sizes.table()
    changed = entries | {"fwd.ring.64.16": replace(entries["fwd.ring.64.16"], num_stages=9, max_registers=96)}
    before = block_sizes.TABLE.read_text("utf-8")
    block_sizes.save(changed, tmp_path / "table.json")
    monkeypatch.setattr(block_sizes, "TABLE", tmp_path / "table.json")
    assert block_sizes.table.__wrapped__() == changed != entries
    block_sizes.save(entries, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text("utf-8") == before


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
