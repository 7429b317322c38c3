"""One rank of a job of any size, measured alone: real engine, real memory, no other ranks.

PyTorch's fake process group answers every collective at once. Every other rank sends what this one does, zero
where that is nothing, and leaves the weights in ZeRO's flat buffer as they are. So losses mean nothing, but
this rank allocates and computes what it would in the job, on numbers like those (on others a GPU at its limit
of power is 2 to 4 % faster): its peak of memory is measured, and its step time without communication. Where
no time is asked for, exact attention only takes its memory (`stand_ins`). Measurements run in a process of
their own, see `workers`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pi_dist.config import Config, UserError, accumulation_steps, check, num_chunks
from pi_dist.measure.stand_ins import StandIns
from pi_dist.measure.steps import collect_garbage, most, random_batch
from pi_dist.measure.timeline import busy_ms, kernels_of
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops.pattern import looks_beyond_a_chunk
from pi_dist.parallel.kept_keys import Placement
from pi_dist.parallel.mesh import make_mesh
from pi_dist.parallel.process_group import choose_device, start
from pi_dist.training.deepspeed_engine import Engine, unchecked_across_ranks
from pi_dist.training.kept_memory import Memory, check_offload, free_host_memory, plan_kept_rows
from pi_dist.training.streaming import ON_DEVICE, evaluated_loss, streamed_losses

_LONG_S = 1.0  # a step that takes longer is timed once
_MANY_CHUNKS = 6  # of more, three warm up, and two have the peak


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        config: of the job; checked for `world_size` ranks.
        rank: which rank to be; None: the real ranks of the launcher.
        limit_mib: memory that the rank may reserve on a GPU; None: all there is.
        timed_steps: optimizer steps to take the median time of, after two more; of a step that takes long,
            the second is the only one. 0: no time, and exact attention takes its memory only.
        forward_too: time as many forward passes.
    """

    config: Config
    world_size: int
    rank: int | None
    limit_mib: float | None = None
    timed_steps: int = 0
    forward_too: bool = True


def typical_rank(config: Config, world_size: int) -> int:
    """A rank with the most memory, in the middle of a sequence, whose first rank receives no rows."""
    sp_degree = config.parallel.sp_degree
    return world_size - sp_degree + sp_degree // 2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, by device type: the peak of memory where there is no GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _arrives(received: torch.Tensor, sent: torch.Tensor | None) -> None:
    """Fill a buffer with what is sent, again and again; zero if that is nothing. Allocates nothing."""
    flat = received.view(-1)
    if sent is None or sent.numel() * flat.numel() == 0:
        flat.zero_()
        return
    given = sent.reshape(-1)[: flat.numel()]  # what is sent lies in one piece: no copy
    times, rest = divmod(flat.numel(), given.numel())
    whole = flat.numel() - rest
    flat[:whole].view(times, -1).copy_(given)
    flat[whole:].copy_(given[:rest])


@contextlib.contextmanager
def _others_send_the_same(zero_stage: int) -> Iterator[None]:
    """Receive buffers of collectives get what this rank sends, but for what is sent from within them.

    Up to ZeRO 2 buffers that a part is sent from hold all weights of the model already, and stay as they are.
    The fake group itself is only asked for something to wait for: what it writes differs between versions.
    """

    def arrived(received: torch.Tensor, sent: torch.Tensor, group: Any, async_op: bool) -> dist.Work | None:
        parts = [received]
        if received.untyped_storage()._cdata == sent.untyped_storage()._cdata:
            begin = max(0, sent.storage_offset() - received.storage_offset())
            flat = received.view(-1)
            parts = [] if zero_stage < 3 else [flat[:begin], flat[begin + sent.numel() :]]
        for part in parts:
            _arrives(part, sent)
        return dist.barrier(group=group, async_op=async_op)

    def all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False):
        return arrived(output_tensor, input_tensor, group, async_op)

    def reduce_scatter_tensor(output, input, op=None, group=None, async_op=False):
        return arrived(output, input, group, async_op)

    def all_to_all_single(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        return arrived(output, input, group, async_op)

    def batch_isend_irecv(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent = [operation.tensor for operation in operations if operation.op is dist.isend]
        received = [operation.tensor for operation in operations if operation.op is dist.irecv]
        for tensor, other in itertools.zip_longest(received, sent[: len(received)]):
            _arrives(tensor, other)
        return original(operations)

    original = dist.batch_isend_irecv
    with contextlib.ExitStack() as stack:
        for function in (all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single, batch_isend_irecv):
            stack.enter_context(patch.object(dist, function.__name__, function))
        yield


_LIVE = LiveBytes()  # of this process


class _Memory:
    """Peak, reserved and resting memory of this process's tensors, in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self._seen = device.type == "cuda", 0

    def reset(self) -> None:
        self._seen = 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _LIVE.peak = _LIVE.now

    def peak(self) -> int:
        """Bytes, since `reset`."""
        return max(self._seen, torch.cuda.max_memory_allocated() if self.cuda else _LIVE.peak)

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _LIVE.now

    def extra_bytes(self, call: Callable[[], Any]) -> int:
        """What a call allocates at its peak, beside what it returns."""
        before = self.peak()
        self.reset()
        returned = call()
        extra = self.peak() - self.now()
        self._seen = max(before, self.peak())
        del returned
        return extra

    def row(self) -> dict[str, float | None]:
        reserved = torch.cuda.max_memory_reserved() if self.cuda else None
        found = {"peak_mib": self.peak(), "reserved_mib": reserved, "resting_mib": self.now()}
        return {key: None if size is None else round(size / 2**20, 2) for key, size in found.items()}


def _placement(config: Config, device: torch.device, request: Request) -> Placement:
    """Where a run in chunks would keep rows."""
    if config.training.chunk_tokens is None:
        return ON_DEVICE
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if total is not None and request.limit_mib is not None:
        total = min(total, int(request.limit_mib * 2**20))
    return plan_kept_rows(config, Memory(total, _host_memory(request))).placement()


def _host_memory(request: Request) -> int | None:
    """Free bytes for a rank; machines of eight share theirs."""
    free = free_host_memory()
    return None if free is None else free // min(request.world_size, 8)


class _Job:
    """The engine of a configuration on this rank, and its steps.

    Its weights are random, and made where they are used: nothing depends on them.
    """

    def __init__(self, config: Config, device: torch.device, request: Request) -> None:
        self.config, self.mesh = config, make_mesh(config.parallel.sp_degree, device)
        with torch.device(device), patch.object(PiTransformer, "_initialize", _fill):
            model = PiTransformer.of_run(config, device.type)
        self.num_parameters = model.num_parameters()
        self.engine = Engine(model, config, self.mesh)
        self.batch, self.placement = random_batch(config, self.mesh), _placement(config, device, request)
        t = config.training
        self.valid = torch.tensor(float(t.context * t.batch_size), device=device)

    def step(self, chunks: int | None = None) -> None:
        """An optimizer step; or only the backward pass of so many chunks, the last ones.

        Raises:
            UserError: it made no finite gradient, or loss.
        """
        for _ in range(accumulation_steps(self.config, self.mesh.world_size)):
            for number, loss in enumerate(self._losses(), 1):
                self.engine.backward(loss, self.valid)
                self.engine.step(0)
                if number == chunks:
                    _require_finite("loss", loss)
                    return
        _require_finite("gradient norm", self.engine.gradient_norm())

    def _losses(self) -> Iterator[torch.Tensor]:
        p, chunk_tokens = self.config.parallel, self.config.training.chunk_tokens
        return streamed_losses(self.engine, self.mesh, self.batch, p, 0, chunk_tokens, self.placement)

    def forward_seconds(self) -> float:
        """Of one forward pass; on a GPU of its kernels, for it is not replayed and may wait for the host."""
        p, chunk_tokens = self.config.parallel, self.config.training.chunk_tokens

        def forward() -> None:
            evaluated_loss(self.engine, self.mesh, self.batch, p, chunk_tokens, self.placement)

        if self.mesh.device.type == "cuda":
            return busy_ms(kernels_of(forward)) / 1e3
        return self.seconds(forward)

    def seconds(self, part: Callable[[], None]) -> float:
        """Of a part of the work; the slowest rank's."""
        self._wait()
        dist.barrier()
        began = time.perf_counter()
        part()
        self._wait()
        return most(time.perf_counter() - began, self.mesh)

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()


def pins_memory(request: Request, device: torch.device) -> bool:
    """Whether its steps pin host memory, which a process never gives back."""
    t = request.config.training
    in_host = t.activation_offload or (
        t.chunk_tokens is not None and _placement(request.config, device, request).memory is not None
    )
    return device.type == "cuda" and in_host


def _fill(model: PiTransformer, seed: int) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)


def _require_finite(name: str, value: torch.Tensor) -> None:
    if not math.isfinite(value):
        raise UserError(f"fake_ranks: {name} ({float(value)}) < inf does not hold")


def measure(request: Request) -> dict[str, Any]:
    """A row about one rank, in this process, whose process group is started here unless it is there.

    Peak memory is that of the second optimizer step, in which moments are there already; resting memory is
    what is held after it, reserved memory the most of both. ms is of a whole optimizer step, forward_ms of
    its losses without gradients, on a GPU of their kernels alone: both without communication where ranks are
    fake. Of a sequence in many chunks, three chunks are the first step, and if no time is asked for, the
    second ends after its peak. Where no time is asked for, no graphs are captured.

    Raises:
        UserError: there is no such GPU, no host memory for what is offloaded, or the step made no finite
            gradient.
    """
    config, fake = request.config, request.rank is not None
    check(config, request.world_size)
    check_offload(config, _host_memory(request))
    if fake:
        device = choose_device(config.parallel.device, 0)
        if not dist.is_initialized():
            _join_fake_group(request.rank, request.world_size)
    else:
        device = start(config.parallel.device, config.parallel.timeout_s)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**20
        share = 1.0 if request.limit_mib is None else min(1.0, request.limit_mib / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(_others_send_the_same(config.parallel.zero_stage))
            stack.enter_context(unchecked_across_ranks())
        if device.type == "cpu":
            stack.enter_context(_LIVE)
        return _measured_steps(request, device, _Memory(device))


def _measured_steps(request: Request, device: torch.device, memory: _Memory) -> dict[str, Any]:
    config, fake = request.config, request.rank is not None
    stand_ins = StandIns(memory.extra_bytes).in_place if fake else contextlib.nullcontext
    few = few_chunks(config, request.world_size)
    if few is not None:
        short = _Job(few, device, request)
        try:
            short.step()
        finally:
            short.engine.close()
        del short
        let_go(device)
    job = _Job(config, device, request)
    try:
        if few is None:
            with stand_ins():
                job.step()
        else:
            job.engine.create_moments(0)
        memory.reset()
        times, forward_times = [], []
        if request.timed_steps:
            times.append(job.seconds(job.step))
            if job.engine.replays:  # that step captured graphs
                times = [job.seconds(job.step)]
        else:
            with stand_ins(), job.engine.as_it_is():
                job.step(None if few is None else 2)
        row, replays = memory.row(), job.engine.replays
        if request.timed_steps:
            again = request.timed_steps if times[0] < _LONG_S else 0
            times = [job.seconds(job.step) for _ in range(again)] or times
            if request.forward_too:
                forward_times = [job.forward_seconds() for _ in range(again + 1)][-max(1, again) :]
    finally:
        job.engine.close()
    return row | {
        "ms": _median_ms(times),
        "forward_ms": _median_ms(forward_times),
        "replays": replays,
        "num_parameters": job.num_parameters,
        "rank": job.mesh.rank,
        "world_size": request.world_size,
        "fake": fake,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _median_ms(seconds: list[float]) -> float | None:
    return round(1e3 * statistics.median(seconds), 3) if seconds else None


def few_chunks(config: Config, world_size: int) -> Config | None:
    """The same with three chunks, the first, one between and the last, if all others are alike and many."""
    t = config.training
    if num_chunks(t) <= _MANY_CHUNKS or accumulation_steps(config, world_size) > 1:
        return None
    if looks_beyond_a_chunk(config):
        return None
    return replace(config, training=replace(t, context=3 * t.chunk_tokens))


def _join_fake_group(rank: int, world_size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def let_go(device: torch.device) -> float:
    """Free what nothing holds any more; returns the MiB that are held all the same."""
    collect_garbage()
    if device.type != "cuda":
        return _LIVE.now / 2**20
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**20
