"""Starting the default process group under torchrun, mpirun, or alone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pi_dist.config import ConfigError

T = TypeVar("T")


def world_size_from_launcher() -> int:
    """Ranks that the launcher started (1 without a launcher), before any of them is waited for.

    Raises:
        ConfigError: a launcher started several processes and did not tell them who they are.
    """
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return _number(name)
    if _number("PMI_SIZE", "1") > 1 and "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"launch: PMI_SIZE ({os.environ['PMI_SIZE']}) == 1 does not hold; Open MPI's mpirun is needed, "
            "others do not tell ranks who they are"
        )
    tasks = _number("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in os.environ else 1
    if tasks > 1:
        raise ConfigError(
            f"launch: SLURM_NTASKS ({tasks}) == 1 does not hold; "
            "start one torchrun per node and let it start the ranks"
        )
    return 1


def rank_from_launcher() -> int:
    """This process's rank by its launcher (0 without one), also before there is a process group."""
    return _number("RANK" if "RANK" in os.environ else "OMPI_COMM_WORLD_RANK", "0")


def _number(name: str, default: str = "") -> int:
    """A variable that a launcher sets; ConfigError if it is no number from 0 on."""
    text = os.environ.get(name, default)
    if re.fullmatch(r"\d{1,9}", text, re.ASCII) is None:
        raise ConfigError(f"launch: {name} ({text!r}) is a number from 0 on, does not hold")
    return int(text)


def check_world_size(ranks: int) -> None:
    """Raise ConfigError unless the launcher started exactly so many ranks."""
    started = world_size_from_launcher()
    if started != ranks:
        raise ConfigError(f"launch: world size ({started}) == ranks ({ranks}) does not hold")


def of_rank_zero(call: Callable[[], T], *errors: type[Exception]) -> T:
    """What a call returns on rank 0, on every rank; of these errors, what it raises there. Collective."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [call()]
        except errors as failure:
            answer = [failure]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], errors):
        raise answer[0]
    return answer[0]


def _rendezvous_by_mpi() -> None:
    """Set what torchrun would have set, from mpi4py: rank 0's address and a free port are broadcast."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    here = None
    if comm.rank == 0:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        one_host = local.size == comm.size
        here = ("127.0.0.1" if one_host else socket.getfqdn(), port, None if one_host else _unreachable())
    address, port, problem = comm.bcast(here)
    if problem is not None:
        raise ConfigError(problem)
    os.environ |= {
        "RANK": str(comm.rank),
        "WORLD_SIZE": str(comm.size),
        "LOCAL_RANK": str(local.rank),
        "LOCAL_WORLD_SIZE": str(local.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _unreachable() -> str | None:
    """Why other hosts cannot reach this one by its name, if so."""
    name = socket.getfqdn()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return f"launch: the name {name} of rank 0's host resolves to no address ({error.strerror})"
    if address.startswith("127."):
        return (
            f"launch: {name} resolves to {address} on rank 0's host, which others cannot reach; "
            "see /etc/hosts"
        )
    return None


def find_launcher() -> None:
    """Set RANK, WORLD_SIZE, MASTER_ADDR and so on as torchrun does, unless it has: from MPI, or for one rank.

    Raises:
        ConfigError: a launcher started several processes and did not tell them who they are.
    """
    if "RANK" in os.environ:
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            _number(name)
        _number("LOCAL_RANK", "0")
        if not os.environ.get("MASTER_ADDR"):
            raise ConfigError("launch: RANK is set and MASTER_ADDR is not; start ranks with a launcher")
        return
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        _rendezvous_by_mpi()
        return
    world_size_from_launcher()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def choose_device(choice: str, local_rank: int) -> torch.device:
    """The device of a local rank for parallel.device.

    Raises:
        ConfigError: a GPU is asked for and there is none for this rank.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "cuda" and local_rank >= count:
        raise ConfigError(
            f"parallel.device: local rank ({local_rank}) < GPUs of this machine ({count}) does not hold"
        )
    if choice == "auto" and 0 < count <= local_rank:
        raise ConfigError(
            f"parallel.device: local rank ({local_rank}) < GPUs of this machine ({count}) does not hold; "
            "start fewer ranks, or set parallel.device=cpu"
        )
    return torch.device("cuda", local_rank) if choice != "cpu" and count else torch.device("cpu")


def start(device_choice: str, timeout_s: float) -> torch.device:
    """Initialize the default group unless it is there already: NCCL on GPUs, gloo on CPUs.

    Returns this rank's device.

    Raises:
        ConfigError: no GPU for this rank, see `choose_device`; or see `find_launcher`.
    """
    if not dist.is_initialized():
        find_launcher()
    device = choose_device(device_choice, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
            **_store_of_this_attempt(timeout_s),
        )
    return device


def _store_of_this_attempt(timeout_s: float) -> dict[str, Any]:
    """Arguments of init_process_group under torchrun on one node: its store, with names for each restart.

    Left to itself, a restarted rank finds the addresses of its predecessors there (PyTorch 2.13). On several
    nodes the launchers count restarts apart; launch/torchrun.sh gives every restart a store of its own.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return {
        "store": dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }
