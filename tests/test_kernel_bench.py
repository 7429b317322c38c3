"""The benchmark of kernels: cases, floor, what is left to do, and what it says of a compiled kernel."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from pi_dist.measure import kernel_bench
from pi_dist.measure.kernel_bench import OURS, Case, cases, floor, peer_cases, resources
from pi_dist.measure.kernel_peers import FLEX, Peer
from pi_dist.measure.record import kept_records

HOPPER = SimpleNamespace(
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 * 1024,
)


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(128, 8192, 4), (121, 8192, 4), (32, 8192, 16), (32, 100 * 1024, 2), (255, 0, 2)],
)
def test_occupancy_is_that_of_cudas_calculator(registers, shared, blocks):
    """Of blocks of 4 warps; registers are handed out by eights a thread, 1 KiB a block goes to the driver."""
    metadata = SimpleNamespace(name="_fused_kernel", num_warps=4, shared=shared)
    found = resources(SimpleNamespace(metadata=metadata, n_regs=registers, n_spills=2), HOPPER)
    assert found["occupancy"] == pytest.approx(blocks * 4 / 64, abs=1e-3)
    assert (found["kernel"], found["registers"], found["spills"]) == ("fused", registers, 8)


def test_cases_are_all_windows_skips_and_strides_at_every_length():
    """And every other kernel is timed on a case that ours is timed on too."""
    sizes = product((64, 128), (8192, 131072, 1048576), (4, 16, 64, 256, 512), (0, 1, 16, 64), (False, True))
    assert set(cases()) == {Case(*size) for size in sizes if size[3] or not size[4]}
    assert len(list(cases())) == len(set(cases())) and set(peer_cases()) < set(cases())
    assert all(case.batch * case.tokens >= 131072 for case in cases())


@pytest.fixture
def gpu(monkeypatch):
    """A device of one multiprocessor at 1 GHz: 16 exponentials a ns."""
    properties = SimpleNamespace(multi_processor_count=1, clock_rate=1e6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize(
    ("case", "direction", "moved", "pairs"),
    [
        (Case(64, 131072, 4, 1), "forward", 4 * 64 * 2 + 8, 4 + 1 + 1),
        (Case(64, 131072, 4, 1), "backward", 8 * 64 * 2 + 12, 4 + 1 + 1),
        (Case(128, 1048576, 64, 16, True), "forward", 4 * 128 * 2 + 8, 64 + 64 + 16),
        (Case(128, 8192, 64, 16), "backward", 8 * 128 * 2 + 12, 64 + 64 + 16),
    ],
)
def test_the_floor_is_the_largest_of_bytes_products_and_exponentials(gpu, case, direction, moved, pairs):
    rows = case.batch * case.tokens * case.heads
    flop = rows * pairs * case.head_dim * (4 if direction == "forward" else 10)
    for copy, matmul, bound, seconds in (
        (1e9, 1e30, "bytes", rows * moved / 1e9),
        (1e30, 1e9, "matmul", flop / 1e9),
        (1e30, 1e30, "exponentials", rows * pairs / 16e9),
    ):
        found = floor(case, direction, copy, matmul)
        assert (found["bytes"], found["flop"], found["bound"]) == (rows * moved, flop, bound)
        assert found["floor_ms"] == pytest.approx(seconds * 1e3)


def test_a_record_is_resumed_where_it_ends(gpu):
    """What has its last row is not measured again; the longest context comes last."""
    done, halfway = Case(64, 131072, 16, 1, True), Case(64, 131072, 16, 1)
    rows = [
        kernel_bench._row(done, OURS, "forward", 1.0, 1e9, 1e9),
        kernel_bench._row(done, OURS, "backward", 1.0, 1e9, 1e9),
        kernel_bench._row(halfway, OURS, "forward", 1.0, 1e9, 1e9),
        kernel_bench._row(halfway, FLEX, "backward", 1.0, 1e9, 1e9),
    ]
    jobs = kernel_bench._jobs({"rows": rows}, (64,))
    wanted = {(kernel_bench._measure, case) for case in cases() if case != done}
    wanted |= {(kernel_bench._measure_peers, case) for case in peer_cases() if case != halfway}
    assert set(jobs) == {job for job in wanted if job[1].head_dim == 64} and len(jobs) == len(set(jobs))
    lengths = [case.tokens == 1048576 for _, case in jobs]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("name", [name for name in kept_records() if name.startswith("kernels")])
def test_kept_records_of_kernels_are_whole(name):
    """But for FlexAttention with many skips, which was timed on the H100 alone."""
    left = kernel_bench._jobs(kept_records()[name], tuple(kernel_bench.HEADS))
    assert all(measure is kernel_bench._measure_peers for measure, _ in left)
    assert all(case.num_skips >= 16 and name != "kernels_h100" for _, case in left)


def test_a_kernel_that_cannot_run_has_a_reason_and_is_not_tried_again(gpu, monkeypatch):
    def unusable(*_):
        raise RuntimeError("no kernel for this device")

    case = Case(64, 8192, 64, 16)
    monkeypatch.setattr(kernel_bench, "inputs", lambda _: ())
    monkeypatch.setattr(kernel_bench, "peers", lambda *_: [Peer(FLEX, unusable)])
    rows = list(kernel_bench._measure_peers(case, 1e9, 1e9))
    assert [(row["direction"], row["ms"]) for row in rows] == [("forward", None), ("backward", None)]
    assert all(kernel_bench._line(row).endswith("one      no kernel for this device") for row in rows)
    assert (kernel_bench._measure_peers, case) not in kernel_bench._jobs({"rows": rows}, (64,))
