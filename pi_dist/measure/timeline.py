"""What a GPU did in one step: its kernels, and how long it communicated without computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

Kind = Literal["compute", "exchange", "collective"]


class Kernel(NamedTuple):
    """A kernel or copy on the GPU, times in µs from the first one.

    kind: exchange, send/recv and all_to_all of a layer's rows; collective, other NCCL kernels (ZeRO, labels).
    """

    name: str
    kind: Kind
    start: float
    stop: float


def _kind(name: str) -> Kind:
    if not name.startswith("nccl"):
        return "compute"
    return "exchange" if "SendRecv" in name else "collective"


def kernels_of(step: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a step on this rank's GPU, by start; every rank calls it."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        if several:
            dist.barrier()  # else the step's first exchange waits for whoever starts the profiler last
        torch.cuda.synchronize()
        step()
        torch.cuda.synchronize()
    found = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("nccl:")  # the range around a kernel
    )
    if several:  # the barrier's kernel
        found = found[1 + next(i for i, (_, _, name) in enumerate(found) if name.startswith("nccl")) :]
    first = found[0][0] if found else 0.0
    return [Kernel(name, _kind(name), start - first, stop - first) for start, stop, name in found]


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def exposed_ms(kernels: list[Kernel], kind: Kind) -> tuple[float, float]:
    """(time in which kernels of this kind ran, time of it in which no compute kernel did), ms."""
    wanted, compute = (
        _union((kernel.start, kernel.stop) for kernel in kernels if kernel.kind == k)
        for k in (kind, "compute")
    )
    total = sum(stop - start for start, stop in wanted)
    covered = 0.0
    for start, stop in wanted:
        covered += sum(max(0.0, min(stop, b) - max(start, a)) for a, b in compute)
    return total / 1e3, (total - covered) / 1e3


@contextmanager
def counted_bytes() -> Iterator[dict[str, list[int]]]:
    """Count the bytes that each exchange of this rank sends to other ranks, by way, in what is yielded.

    The ways are "all_to_all_single" and "isend", by wrapping the functions of torch.distributed.
    """
    sent: dict[str, list[int]] = {"all_to_all_single": [], "isend": []}
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def counting_all_to_all(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, **options
    ):
        rows, rank = input.shape[0], dist.get_rank(group)
        own = input_split_sizes[rank] if input_split_sizes else rows // dist.get_world_size(group)
        sent["all_to_all_single"].append(input.nbytes // max(1, rows) * (rows - own))
        return all_to_all_single(output, input, output_split_sizes, input_split_sizes, group=group, **options)

    def counting_sends(operations):
        sent["isend"].append(sum(o.tensor.nbytes for o in operations if o.op is dist.isend))
        return batch_isend_irecv(operations)

    dist.all_to_all_single, dist.batch_isend_irecv = counting_all_to_all, counting_sends
    try:
        yield sent
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv = all_to_all_single, batch_isend_irecv
