"""Whether the ranks of a job see each other, and how fast neighbours do. No step waits without a limit.

Ranks report through the launcher's key-value store, not through the links that are looked at: so a rank that
is stopped, or behind a firewall, is named by the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pi_dist.measure.doctor import Finding
from pi_dist.parallel.process_group import choose_device, find_launcher

_SMALL, _LARGE, _BLOCK = 8, 32 * 2**20, 2**20  # bytes: latency, bandwidth, of each rank to each other one
_NO_ANSWER = (dist.DistStoreError, dist.DistNetworkError)
_GAVE_UP = "Connection closed by peer"  # in Gloo's words
_REMEDY = "ranks exchange rows and gradients over this: {}"


@dataclass(frozen=True)
class _Job:
    """This rank's place and the store through which it reports."""

    store: dist.Store
    rank: int
    world_size: int
    timeout_s: float

    def report(self, what: str, value: object) -> None:
        """Leave a value for rank 0, unless it has ended; then it has named this rank."""
        with contextlib.suppress(*_NO_ANSWER):
            self.store.set(f"doctor/{what}/{self.rank}", json.dumps(value))

    def collect(self, what: str, ranks: range | list[int], extra_s: float = 0.0) -> dict[int, object]:
        """What ranks have reported, waiting once for all of them; those that have not are missing."""
        deadline, found = time.monotonic() + self.timeout_s + extra_s, {}
        for rank in ranks:
            left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
            try:
                self.store.wait([f"doctor/{what}/{rank}"], left)
                found[rank] = json.loads(self.store.get(f"doctor/{what}/{rank}"))
            except _NO_ANSWER:
                continue
        return found


def examine(timeout_s: float = 30.0) -> list[Finding]:
    """Findings about the ranks of this job, on rank 0; on others that it is not there. All call it.

    Every wait for others ends after timeout_s; the whole takes at most about four times that. Starts the
    default process group if it can.

    Raises:
        ConfigError: no GPU for this rank, or a launcher that does not tell ranks who they are.
    """
    find_launcher()
    device = choose_device("auto", int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    try:
        store = dist.TCPStore(address, port, is_master=serves, wait_for_workers=False, timeout=timeout)
    except _NO_ANSWER as error:
        here = f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port}"
        remedy = _REMEDY.format("is the address right, and the port open between nodes?")
        return [Finding("ranks", "missing", f"{here}: {_first_line(error)}", remedy, required=True)]
    job = _Job(dist.PrefixStore("pi-dist", store), rank, world_size, timeout_s)
    job.report("host", socket.gethostname())
    hosts = job.collect("host", range(world_size))
    problem = _join(job, store, device, timeout)
    job.report("joined", problem)
    joined = job.collect("joined", range(world_size), extra_s=5.0)  # who cannot join says so at the timeout
    complete = len(joined) == world_size and not any(joined.values())
    findings = _presence(job, hosts, joined)
    if complete:
        findings += _speeds(job, hosts, device, timeout)
    return findings if rank == 0 else []


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _join(job: _Job, store: dist.Store, device: torch.device, timeout: timedelta) -> str:
    """Start the process group; returns what went wrong, empty if nothing did."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=job.rank,
            world_size=job.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        return _first_line(error)
    return ""


def _presence(job: _Job, hosts: dict[int, object], joined: dict[int, object]) -> list[Finding]:
    """Who is there; who has not come, or cannot be reached by whom.

    Of a rank that only lost the connection to one that gave up nothing is said beside that one.
    """
    remedy = _REMEDY.format("is the rank running, and are ports open between the nodes?")
    failed = {rank for rank in range(job.world_size) if joined.get(rank, "absent")}
    followed = {rank for rank in failed if _GAVE_UP in str(joined.get(rank))}
    findings = []
    for rank in sorted(failed - followed or followed):
        where = f"rank {rank} on {hosts[rank]}" if rank in hosts else f"rank {rank}"
        detail = f"{where} has not answered within {job.timeout_s:.0f} s"
        if rank in joined:
            detail = f"{where} cannot reach all others: {joined[rank]}"
        findings.append(Finding(f"rank {rank}", "missing", detail, remedy, required=True))
    if not findings:
        backend = dist.get_backend()
        detail = f"{job.world_size} on {len(set(hosts.values()))} hosts see each other over {backend}"
        findings.append(Finding("ranks", "ok", detail))
    return findings


def _pairs(world_size: int) -> list[list[tuple[int, int]]]:
    """Neighbouring ranks, in rounds in which every rank has one partner at most."""
    ring = [(rank, rank + 1) for rank in range(world_size - 1)]
    rounds = [ring[0::2], ring[1::2]]
    return [*rounds, [(0, world_size - 1)]] if world_size > 2 else rounds


def _seconds(peer: int, leads: bool, tensor: torch.Tensor, rounds: int, timeout: timedelta) -> float:
    """Median time of one message to a peer: half of there and back."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for sends in (leads, not leads):
            work = dist.isend(tensor, peer) if sends else dist.irecv(tensor, peer)
            work.wait(timeout)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / 2)
    return statistics.median(times[1:])


def _speeds(job: _Job, hosts: dict[int, object], device: torch.device, timeout: timedelta) -> list[Finding]:
    """Latency and bandwidth of neighbours, the worst of each pair of hosts, and of an all_to_all."""
    rounds = _pairs(job.world_size)
    for pair in [pair for round_ in rounds for pair in round_ if job.rank in pair]:
        peer = pair[1] if job.rank == pair[0] else pair[0]

        def measure(peer: int = peer) -> list[float]:
            small, large = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (_SMALL, _LARGE))
            leads = job.rank < peer
            return [_seconds(peer, leads, small, 50, timeout), _seconds(peer, leads, large, 3, timeout)]

        job.report(f"pair {pair[0]} {pair[1]}", _measured(measure))

    def exchange() -> list[float]:
        blocks = torch.zeros(job.world_size * _BLOCK, dtype=torch.uint8, device=device)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            dist.all_to_all_single(torch.empty_like(blocks), blocks)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return [statistics.median(times[1:])]

    job.report("all_to_all", _measured(exchange))
    if job.rank != 0:
        return []
    links: dict[tuple[str, str], list[tuple[tuple[int, int], object]]] = {}
    for pair in (pair for round_ in rounds for pair in round_):
        found = job.collect(f"pair {pair[0]} {pair[1]}", [pair[0]]).get(pair[0], "no answer")
        links.setdefault(tuple(sorted(str(hosts[rank]) for rank in pair)), []).append((pair, found))
    findings = [_link(*item) for item in links.items()]
    all_to_all = job.collect("all_to_all", range(job.world_size))
    slowest = [seconds[0] for seconds in all_to_all.values() if isinstance(seconds, list)]
    if len(slowest) == job.world_size:
        detail = f"{_BLOCK >> 20} MiB from each rank to each: {max(slowest) * 1e3:.2f} ms"
        findings.append(Finding("all_to_all", "ok", detail))
    else:
        absent = sorted(set(range(job.world_size)) - set(all_to_all))
        words = [f"rank {rank} has not answered" for rank in absent]
        words += [f"rank {rank}: {text}" for rank, text in all_to_all.items() if isinstance(text, str)]
        findings.append(
            Finding("all_to_all", "missing", "; ".join(words), _REMEDY.format("see above"), required=True)
        )
    return findings


def _measured(measure: Callable[[], list[float]]) -> list[float] | str:
    """What was measured, or what went wrong."""
    try:
        return measure()
    except RuntimeError as error:
        return _first_line(error)


def _link(hosts: tuple[str, str], found: list[tuple[tuple[int, int], object]]) -> Finding:
    """One line for all neighbours on a pair of hosts: the worst of them."""
    name = f"within {hosts[0]}" if hosts[0] == hosts[1] else f"{hosts[0]} - {hosts[1]}"
    broken = [f"ranks {a} and {b}: {text}" for (a, b), text in found if isinstance(text, str)]
    if broken:
        remedy = _REMEDY.format("are ports open between the nodes, and is the right network chosen?")
        return Finding(name, "missing", "; ".join(broken), remedy, required=True)
    latency = max(values[0] for _, values in found)
    bandwidth = min(_LARGE / values[1] for _, values in found)
    pairs = ", ".join(f"{a}-{b}" for (a, b), _ in found[:4]) + (", …" if len(found) > 4 else "")
    return Finding(name, "ok", f"{latency * 1e6:.0f} µs, {bandwidth / 1e9:.2f} GB/s (ranks {pairs})")
