"""Real ranks for tests: processes over gloo, forked from a server that has imported torch once.

`Ranks(n).run(function, *args)` calls `function(*args)` on every rank and returns what each one returned. A
rank that raises, dies or hangs fails the test with its traceback; nothing survives the test run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import socket
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    """Below those that systems give to connections, so that none takes it before someone listens there."""
    while True:
        port = 10_000 + secrets.randbelow(6_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


def _serve(rank: int, world_size: int, port: int, backend: str, timeout_s: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {  # what torchrun would set
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        while (task := pipe.recv()) is not None:
            function, args = task
            try:
                pipe.send((True, function(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
    except EOFError:
        pass
    finally:
        os._exit(0)  # some DeepSpeed runs abort in their destructors


class Ranks:
    """`world_size` processes with an initialized group (gloo, or nccl with a GPU each); a context manager."""

    def __init__(self, world_size: int, backend: str = "gloo", timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        # CUDA cannot fork
        context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        multiprocessing.set_forkserver_preload(["tests_preload"])
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the fork server's
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, backend, timeout_s, there))
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Any, *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            waiting = [p for rank, p in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=self._timeout_s)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(set(range(len(self._pipes))) - set(results))} hang")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    fine, value = pipe.recv()
                except EOFError:
                    fine, value = False, f"exited with code {self._processes[rank].exitcode}"
                if not fine:
                    self.close()
                    raise AssertionError(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
