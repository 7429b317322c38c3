"""One rank of a job of any size, measured alone: real engine, real memory, no other ranks.

PyTorch's fake process group answers every collective at once. What others would send is zero instead, so
losses mean nothing, but this rank allocates and computes what it would in the job: its peak of memory is
measured, and its step time without communication. Measurements run in a process of their own, so running out
of memory ends nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pi_dist.config import Config, UserError, accumulation_steps, check, compiles
from pi_dist.data.loader import Batch
from pi_dist.measure.steps import random_batch
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.kept_keys import Placement
from pi_dist.parallel.mesh import Mesh, make_mesh
from pi_dist.parallel.process_group import choose_device, start
from pi_dist.training.deepspeed_engine import Engine, unchecked_across_ranks
from pi_dist.training.kept_memory import Memory, free_host_memory, plan_kept_rows
from pi_dist.training.streaming import ON_DEVICE, evaluated_loss, streamed_losses

OUT_OF_MEMORY = "out of memory"
_MARK = "measured rank: "  # before the row, on standard output, which DeepSpeed writes to as well
_GRACE_S = 45.0  # torchrun gives its ranks 30
_LONG_S = 3.0  # a step that takes longer is timed once


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        config: of the job; checked for `world_size` ranks.
        rank: which rank to be; None: the real ranks of the launcher.
        limit_mib: memory that the rank may reserve on a GPU; None: all there is.
        timed_steps: optimizer steps, and forward passes, to take the median time of, after two steps that
            warm up; 0: no time.
    """

    config: Config
    world_size: int
    rank: int | None
    limit_mib: float | None = None
    timed_steps: int = 0


def typical_rank(config: Config, world_size: int) -> int:
    """A rank with the most memory: not the first of its sequence, which receives no rows, nor the last."""
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


@contextlib.contextmanager
def _nothing_arrives() -> Iterator[None]:
    """Receive buffers of collectives are zero, unless they are part of what is sent."""

    def zeroing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            given = (x for x in (*args, *options.values()) if isinstance(x, torch.Tensor))
            received, sent = next(given), next(given)  # as all of these functions name them
            if received.untyped_storage()._cdata != sent.untyped_storage()._cdata:
                received.zero_()
            return function(*args, **options)

        return call

    def receiving(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.irecv:
                operation.tensor.zero_()
        return batch_isend_irecv(operations)

    def all_to_all_single(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        output.zero_()  # the fake group would refuse one in which this rank only receives
        return dist.barrier(group=group, async_op=async_op)

    batch_isend_irecv = dist.batch_isend_irecv
    with contextlib.ExitStack() as stack:
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            stack.enter_context(patch.object(dist, name, zeroing(getattr(dist, name))))
        stack.enter_context(patch.object(dist, "all_to_all_single", all_to_all_single))
        stack.enter_context(patch.object(dist, "batch_isend_irecv", receiving))
        yield


class _Memory:
    """Peak, reserved and resting memory of this process's tensors, in MiB."""

    def __init__(self, device: torch.device, live: LiveBytes) -> None:
        self.cuda, self.live = device.type == "cuda", live

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.live.peak = self.live.now

    def row(self) -> dict[str, float | None]:
        if not self.cuda:
            return {"peak_mib": self._mib(self.live.peak), "reserved_mib": None} | self._resting()
        found = {
            "peak_mib": torch.cuda.max_memory_allocated(),
            "reserved_mib": torch.cuda.max_memory_reserved(),
        }
        return {key: self._mib(value) for key, value in found.items()} | self._resting()

    def _resting(self) -> dict[str, float | None]:
        return {"resting_mib": self._mib(torch.cuda.memory_allocated() if self.cuda else self.live.now)}

    @staticmethod
    def _mib(size: int) -> float:
        return round(size / 2**20, 2)


def _placement(config: Config, device: torch.device, request: Request) -> Placement:
    """Where a run in chunks would keep rows; machines of eight ranks share their host memory."""
    if config.training.chunk_tokens is None:
        return ON_DEVICE
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if total is not None and request.limit_mib is not None:
        total = min(total, int(request.limit_mib * 2**20))
    host = free_host_memory()
    host = None if host is None else host // min(request.world_size, 8)
    return plan_kept_rows(config, Memory(total, host)).placement()


def _optimizer_step(engine: Engine, mesh: Mesh, config: Config, batch: Batch, placement: Placement) -> None:
    t = config.training
    valid = torch.tensor(float(t.context * t.batch_size), device=mesh.device)
    for _ in range(accumulation_steps(config, mesh.world_size)):
        for loss in streamed_losses(engine, mesh, batch, config.parallel, 0, t.chunk_tokens, placement):
            engine.backward(loss, valid)
            engine.step(0)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one step; the slowest rank's."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    dist.barrier()
    began = time.perf_counter()
    step()
    wait()
    seconds = torch.tensor(time.perf_counter() - began, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def measure(request: Request) -> dict[str, Any]:
    """A row about one rank, in this process, whose process group is started here unless it is there.

    Peak and reserved memory are those of the second optimizer step, in which moments are there already;
    resting memory is what is held after it. ms is of a whole optimizer step, forward_ms of its losses without
    gradients: both without communication where ranks are fake.

    Raises:
        UserError: there is no such GPU, or the step made no finite gradient.
    """
    config, fake = request.config, request.rank is not None
    check(config, request.world_size)
    if fake:
        device = choose_device(config.parallel.device, 0)
        if not dist.is_initialized():
            _join_fake_group(request.rank, request.world_size)
    else:
        device = start(config.parallel.device, config.parallel.timeout_s)
    if device.type == "cuda" and request.limit_mib is not None:
        total = torch.cuda.get_device_properties(device).total_memory / 2**20
        torch.cuda.set_per_process_memory_fraction(min(1.0, request.limit_mib / total), device)
    live = LiveBytes()
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(_nothing_arrives())
            stack.enter_context(unchecked_across_ranks())
        if device.type == "cpu":
            stack.enter_context(live)
        return _measured_steps(request, device, _Memory(device, live))


def _measured_steps(request: Request, device: torch.device, memory: _Memory) -> dict[str, Any]:
    config, t = request.config, request.config.training
    mesh = make_mesh(config.parallel.sp_degree, device)
    model = PiTransformer(
        config.model,
        t.context,
        activation_checkpointing=t.activation_checkpointing,
        compiled=compiles(config, device.type),
    )
    engine = Engine(model, config, mesh)
    batch, placement = random_batch(config, mesh), _placement(config, device, request)
    try:

        def step() -> None:
            _optimizer_step(engine, mesh, config, batch, placement)

        def forward() -> None:
            evaluated_loss(engine, mesh, batch, config.parallel, t.chunk_tokens, placement)

        first = _seconds(step, device)
        memory.reset()
        times, forward_times = [_seconds(step, device)], []
        row = memory.row()
        if not math.isfinite(engine.gradient_norm()):
            raise UserError(f"fake_ranks: gradient norm ({engine.gradient_norm()}) < inf does not hold")
        if request.timed_steps:
            again = request.timed_steps if min(first, *times) < _LONG_S else 0
            times = [_seconds(step, device) for _ in range(again)] or times
            forward_times = [_seconds(forward, device) for _ in range(again + 1)][1:]
    finally:
        engine.close()
    timed = {"ms": times if request.timed_steps else [], "forward_ms": forward_times}
    return row | {
        **{key: round(1e3 * statistics.median(found), 3) if found else None for key, found in timed.items()},
        "num_parameters": model.num_parameters(),
        "rank": mesh.rank,
        "world_size": request.world_size,
        "fake": request.rank is not None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _join_fake_group(rank: int, world_size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def measured_apart(requests: Sequence[Request], timeout_s: float = 600.0) -> list[dict[str, Any]]:
    """`measure` in a new process, or with real ranks under a new torchrun on this machine.

    Args:
        requests: of one rank of one number of ranks; they share the process.
        timeout_s: for all of them.

    Returns:
        For each request a row with "status": "ok", or only the status: OUT_OF_MEMORY, or in words what ended
        the process. Of real ranks it is the row with the highest peak.
    """
    (ranks,) = {(request.rank, request.world_size) for request in requests}
    rank, world_size = ranks
    text = json.dumps([asdict(request) | {"config": request.config.to_dict()} for request in requests])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *(launcher if rank is None else []), "-m", "pi_dist.measure.fake_ranks", text]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_NAMES}
    if rank is not None:  # DeepSpeed asks for these
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    said, why = _run(command, environment, timeout_s)
    rows = [json.loads(line.split(_MARK)[1]) for line in said.splitlines() if _MARK in line]
    by_request = [(row.pop("request"), row) for row in rows]
    found = []
    for index in range(len(requests)):
        of_ranks = [row for request, row in by_request if request == index]
        unhappy = [row for row in of_ranks if row["status"] != "ok"]
        best = max(of_ranks, key=lambda row: row.get("peak_mib", 0.0), default={"status": why})
        found.append(unhappy[0] if unhappy else best)
    return found


def _run(command: list[str], environment: dict[str, str], timeout_s: float) -> tuple[str, str]:
    """(standard output of a command, how it ended); after the timeout it is stopped, and torchrun's ranks."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks, which it would leave behind if it were killed
            try:
                said, _ = process.communicate(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
            return said, f"no answer within {timeout_s:.0f} s"
    last = (errors.strip().splitlines() or ["nothing said"])[-1]
    return said, f"ended with exit status {process.returncode}: {last}"


_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(text: str) -> None:
    """Measure what requests in JSON ask for, one by one, and print a row for each."""
    for index, values in enumerate(json.loads(text)):
        request = Request(**values | {"config": Config.from_dict(values["config"])})
        try:
            row = {"status": "ok"} | measure(request)
        except torch.OutOfMemoryError:
            row = {"status": OUT_OF_MEMORY}
        except UserError as error:
            row = {"status": str(error)}
        print(_MARK + json.dumps(row | {"request": index}), flush=True)
        gc.collect()  # the next one's memory is to be its own
        if row["status"] == OUT_OF_MEMORY and request.rank is None:
            break  # the others may be in a collective
    os._exit(0)  # DeepSpeed may abort in its destructors; the others of a real group may hang


if __name__ == "__main__":
    main(sys.argv[1])
