"""What the benchmark of kernels says of a compiled one."""

from types import SimpleNamespace

import pytest

from pi_dist.measure.kernel_bench import resources

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
