"""Tile sizes: the table, how it is measured, and that they fit every launch."""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_calls import DEVICE, draw_inputs, spied

from pi_dist.kernels import block_sizes
from pi_dist.measure.kernel_bench import HEADS
from pi_dist.measure.kernel_tuning import trials, use
from pi_dist.ops import PiPattern, pi_attention, triton_backend, triton_launches
from pi_dist.ops.spec import AttentionSpec
from pi_dist.parallel.exchange_plan import make_plan

pytestmark = pytest.mark.usefixtures("quick_interpreter", "poisoned_memory")


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
