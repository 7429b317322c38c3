"""Where the rows lie that a run in chunks keeps: decided before it starts, from closed forms, and said.

And what host memory the inputs of recomputed blocks take, where they are offloaded.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
import torch.distributed as dist

from pi_dist.config import Config, ConfigError
from pi_dist.model.flops import matmul_parameters
from pi_dist.ops.pattern import layer_patterns
from pi_dist.parallel.host_memory import HostMemory, slab_bytes
from pi_dist.parallel.kept_keys import KeptSize, Placement, kept_size
from pi_dist.parallel.mesh import Mesh

ACTIVATIONS = 20
"""Numbers of hidden size that a layer holds of a token of a chunk: 13 saved, and of its backward pass."""
LOSS_BYTES = 2**30
"""Of a tile of logits."""

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank may use, None where that is not known.

    Attributes:
        device: memory of its GPU; None on a CPU, whose tensors lie in host memory.
        host: free memory of its machine over the ranks there.
    """

    device: int | None
    host: int | None


@dataclass(frozen=True)
class KeptPlan:
    """Where kept rows lie and how many bytes they are, of the rank that keeps most."""

    host: bool
    spread: bool
    size: KeptSize

    def placement(self) -> Placement:
        return Placement(HostMemory() if self.host else None, self.spread)

    def describe(self) -> str:
        rows, gradients = _size(self.size.rows), _size(self.size.gradients)
        said = f"keeps {rows} of keys and values for later chunks and at most {gradients} of their gradients"
        if not self.host:
            return f"{said}, on the device"
        near = _size(self.size.near + self.size.near_gradients)
        between = "" if self.spread else ", and moves rows for every skip"
        return f"{said}, in host memory but for {near} of the chunks that are looked at{between}"


def plan_kept_rows(config: Config, memory: Memory, ranks: Sequence[int] | None = None) -> KeptPlan:
    """Decide by `training.kept_rows`, for a run in chunks.

    Args:
        ranks: those of a sequence that are looked at; None: all.

    Raises:
        ConfigError: the rows fit neither as asked for nor, with auto, in any way.
    """
    where = config.training.kept_rows
    plans = [
        KeptPlan(host, spread, _whole_size(config, spread, ranks))
        for host, spread in ((False, True), (True, True), (True, False))
        if where in ("auto", "host" if host else "device")
    ]
    step = step_bytes(config)
    for beside in (step, 0):  # else the nearest that there is: the estimate may be too high
        for plan in plans:
            if _fits(plan, memory, beside):
                return plan
    size = plans[0].size
    places = ((memory.device, "of the device"), (memory.host, "of free host memory"))
    room = " and ".join(f"{_size(amount)} {name}" for amount, name in places if amount is not None)
    raise ConfigError(
        f"training.kept_rows: kept rows ({_size(size.rows)}) and their gradients ({_size(size.gradients)}) "
        f"within {room} does not hold with {where!r}; shorter strides, fewer num_kv_heads or more sp ranks "
        "keep less"
    )


def step_bytes(config: Config) -> int:
    """About what a rank's GPU holds of a step in chunks beside kept rows: states, activations, logits."""
    m, t, p = config.model, config.training, config.parallel
    width = 2 if t.precision == "bf16" else 4
    whole = width + 4 + (12 if p.zero_stage == 0 else 0)  # parameters and gradients; masters and moments
    parameters = matmul_parameters(m) * (whole + (0 if p.zero_stage == 0 else 12 / p.sp_degree))
    layers = 1 if t.activation_checkpointing is True else m.num_layers
    tokens = t.micro_batch_size * t.chunk_tokens // p.sp_degree
    return round(parameters) + tokens * layers * ACTIVATIONS * m.hidden_size * width + LOSS_BYTES


def _fits(plan: KeptPlan, memory: Memory, beside: int) -> bool:
    """Whether there is room for the kept rows, on the device `beside` so many other bytes."""
    size = plan.size
    everything = size.rows + size.gradients
    on_device = size.near + size.near_gradients if plan.host else everything
    in_host = size.rows + (0 if plan.spread else size.gradients) if plan.host else 0
    if memory.device is None:  # the device's tensors lie in host memory
        return memory.host is None or everything <= memory.host
    return on_device + beside <= memory.device and (memory.host is None or in_host <= memory.host)


def _whole_size(config: Config, spread: bool, ranks: Sequence[int] | None) -> KeptSize:
    """All layers, on the rank that keeps most."""
    m, t, p = config.model, config.training, config.parallel
    dtype = torch.bfloat16 if t.precision == "bf16" else torch.float32

    def of_rank(rank: int) -> Iterable[KeptSize]:
        for pattern in layer_patterns(m, t.context):
            yield kept_size(
                pattern,
                m.num_heads,
                m.kv_heads,
                m.head_dim,
                batch=t.micro_batch_size,
                dtype=dtype,
                seq_len=t.context,
                chunk_tokens=t.chunk_tokens,
                num_ranks=p.sp_degree,
                rank=rank,
                spread=spread,
            )

    sizes = (reduce(add, of_rank(rank)) for rank in (range(p.sp_degree) if ranks is None else ranks))
    return max(sizes, key=lambda size: size.rows)


def offloaded_bytes(config: Config) -> int:
    """Of pinned host memory for the inputs of blocks, and of their second halves if these are in tiles."""
    m, t, p = config.model, config.training, config.parallel
    if not t.activation_offload:
        return 0
    number = m.num_layers * (1 if t.mlp_tile_tokens is None else 2)
    tokens = t.micro_batch_size * t.context // p.sp_degree
    size = tokens * m.hidden_size * (2 if t.precision == "bf16" else 4)
    slab = slab_bytes(size)
    return -(-number // (slab // size)) * slab


def check_offload(config: Config, host: int | None) -> None:
    """Refuse inputs of blocks that a rank's share of free host memory, in bytes, has no room for.

    Raises:
        ConfigError: it has not.
    """
    need = offloaded_bytes(config)
    if host is not None and need > host:
        raise ConfigError(
            f"training.activation_offload: inputs of blocks in host memory ({_size(need)}) <= what is free "
            f"for a rank ({_size(host)}) does not hold; more sp ranks share a sequence, or machines"
        )


def memory_of_ranks(mesh: Mesh) -> Memory:
    """The least that some rank has, so that all ranks decide alike; collective."""
    device = None
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_properties(mesh.device).total_memory
    gathered: list = [None] * mesh.world_size
    dist.all_gather_object(gathered, (platform.node(), device, free_host_memory()))
    machines = [machine for machine, _, _ in gathered]
    free = [host // machines.count(machine) for machine, _, host in gathered if host is not None]
    devices = [device for _, device, _ in gathered if device is not None]
    return Memory(min(devices, default=None), min(free, default=None))


def free_host_memory() -> int | None:
    """Bytes that are available on this machine, or all that its container may use; None if nothing tells."""
    found = []
    for path, name in (
        ("/proc/meminfo", "MemAvailable:"),
        ("/sys/fs/cgroup/memory.max", ""),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", ""),
    ):
        try:
            lines = [line for line in Path(path).read_text().splitlines() if line.startswith(name)]
        except OSError:
            continue
        for number in (line.removeprefix(name).split()[0] for line in lines):
            if number != "max":
                found.append(int(number) * (1024 if name else 1))
    return min(found, default=None)


def _size(count: int) -> str:
    unit, name = next((unit, name) for unit, name in _UNITS if count >= unit or name == "KiB")
    return f"{count / unit:.1f} {name}"
