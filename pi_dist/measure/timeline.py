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


class Profile(NamedTuple):
    """What ran on this rank's GPU.

    products: of each call of a matrix product, all sizes of its operands, and the ms of its kernels.
    """

    kernels: list[Kernel]  # by start
    products: list[tuple[frozenset[int], float]]


# in this order: work of attention's own kernels, matrix products by their weights, and the rest
PARTS = ("attention", "projections", "mlp", "loss", "optimizer", "communication", "data", "other")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def kernels_of(step: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a step on this rank's GPU, by start; every rank calls it."""
    return _kernels(_recorded(step, [torch.profiler.ProfilerActivity.CUDA]))


def profiled(step: Callable[[], Any]) -> Profile:
    """The kernels of a step on this rank's GPU, and which are matrix products; every rank calls it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profile = _recorded(step, activities, record_shapes=True)
    products = [
        (
            frozenset(size for shape in event.input_shapes for size in shape),
            sum(kernel.duration for kernel in event.kernels) / 1e3,
        )
        for event in profile.events()
        if event.name in _PRODUCTS and event.kernels
    ]
    return Profile(_kernels(profile), products)


def parts_ms(profile: Profile, hidden_size: int, vocab_size: int) -> dict[str, float]:
    """Milliseconds of kernels by part of the model; what names no part is "other": norms, GELU, copies.

    A product belongs to the loss if a side of it is the vocabulary, to the MLP if one is 4d. The kernels of
    this package begin with an underscore.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for sizes, ms in profile.products:
        part = "loss" if vocab_size in sizes else "mlp" if 4 * hidden_size in sizes else "projections"
        found[part] += ms
    total = sum(kernel.stop - kernel.start for kernel in profile.kernels) / 1e3
    for kernel in profile.kernels:
        if kernel.kind != "compute":
            part = "communication"
        elif kernel.name.startswith("_cross_entropy"):
            part = "loss"
        elif kernel.name.startswith("_"):
            part = "attention"
        elif "Memcpy HtoD" in kernel.name:
            part = "data"
        else:
            continue
        found[part] += (kernel.stop - kernel.start) / 1e3
    found["other"] = total - sum(found.values())
    return found


def busy_ms(kernels: list[Kernel]) -> float:
    """How long at least one of them ran."""
    return sum(stop - start for start, stop in _union((k.start, k.stop) for k in kernels)) / 1e3


def _recorded(step: Callable[[], Any], activities: list[Any], **options: Any) -> torch.profiler.profile:
    with torch.profiler.profile(activities=activities, **options) as profile:
        if _several():
            dist.barrier()  # else the step's first exchange waits for whoever starts the profiler last
        torch.cuda.synchronize()
        step()
        torch.cuda.synchronize()
    return profile


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _kernels(profile: torch.profiler.profile) -> list[Kernel]:
    found = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("nccl:")  # the range around a kernel
    )
    if _several():  # the barrier's kernel
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
