"""Processes in which ranks are measured: running out of memory there ends nothing else.

A process is kept for the next measurement, as long as nothing of the last one is left in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any

import torch
import torch.distributed as dist

from pi_dist.config import Config, UserError
from pi_dist.measure.fake_ranks import Request, let_go, measure, pins_memory
from pi_dist.measure.steps import collect_garbage, end_with_parent
from pi_dist.parallel.process_group import choose_device
from pi_dist.training.deepspeed_engine import forget_groups

OUT_OF_MEMORY = "out of memory"
_MARK = "measured rank: "  # before the row, on standard output, which DeepSpeed writes to as well
_GRACE_S = 45.0  # torchrun gives its ranks 30
_LEFT_MIB = 80.0  # that one measurement may leave to the next: as a fresh one, it has cuBLAS's workspaces


class Worker:
    """A process that measures one rank, request after request, each of any rank of any number of ranks.

    A new one takes its place when it ends, does not answer in time, or holds on to memory. A context manager.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._said = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, request: Request, timeout_s: float = 600.0) -> dict[str, Any]:
        """A row as of `measured_apart`, and left_mib, what the process holds after it.

        An exception that passes through, Ctrl-C too, ends the process.
        """
        if self._process is None:
            self._start()
        try:
            row = self._answer(request, time.monotonic() + timeout_s)
        except BaseException:
            self._end()
            raise
        if row is None:
            row = {"status": f"no answer within {timeout_s:.0f} s"}
            self._end()
        elif row.pop("leaves", True):
            code = self._end(wait_s=_GRACE_S)
            if not row:
                row = {"status": f"ended with exit status {code}: {self._last_words}"}
        return row

    def _start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_NAMES}
        self._errors, self._said = tempfile.TemporaryFile(), b""  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pi_dist.measure.workers"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def _answer(self, request: Request, until: float) -> dict[str, Any] | None:
        """The row; {}: the process ended; None: it is late."""
        assert self._process is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as reading tells
            self._process.stdin.write(_as_json(request).encode() + b"\n")
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                while b"\n" in self._said:
                    line, self._said = self._said.split(b"\n", 1)
                    if _MARK.encode() in line:
                        return json.loads(line.split(_MARK.encode())[1])
                left_s = until - time.monotonic()
                if selector.select(min(1.0, max(0.0, left_s))):
                    more = os.read(self._process.stdout.fileno(), 65536)
                    if not more:
                        return {}
                    self._said += more
                elif self._process.poll() is not None:  # a process that it left holds its output open
                    return {}
                elif left_s <= 0:
                    return None

    def _end(self, wait_s: float = 0.0) -> int | None:
        """End the process, after it had so long to end by itself; its exit status."""
        if self._process is None:
            return None
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._errors.seek(0)
        self._last_words = (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        self._errors.close()
        self._process = None
        return code


def _as_json(request: Request) -> str:
    return json.dumps(asdict(request) | {"config": request.config.to_dict()})


def _from_json(values: dict[str, Any]) -> Request:
    return Request(**values | {"config": Config.from_dict(values["config"])})


def measured_apart(requests: Sequence[Request], timeout_s: float = 600.0) -> list[dict[str, Any]]:
    """`measure` in a new process, or with real ranks under a new torchrun on this machine.

    Args:
        requests: all of one rank alone, or all of the same number of real ranks.
        timeout_s: for all of them.

    Returns:
        For each request a row with "status": "ok", or only the status: OUT_OF_MEMORY, or in words what ended
        the process. Of real ranks it is the row with the highest peak.
    """
    if any(request.rank is None for request in requests):
        return _of_real_ranks(requests, timeout_s)
    until = time.monotonic() + timeout_s
    with Worker() as worker:
        return [worker.ask(request, max(0.0, until - time.monotonic())) for request in requests]


def _of_real_ranks(requests: Sequence[Request], timeout_s: float) -> list[dict[str, Any]]:
    ((_, world_size),) = {(request.rank, request.world_size) for request in requests}
    text = f"[{','.join(map(_as_json, requests))}]"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *launcher, "-m", "pi_dist.measure.workers", text]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_NAMES}
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


def _row(request: Request) -> dict[str, Any]:
    try:
        return {"status": "ok"} | measure(request)
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    except UserError as error:
        return {"status": str(error)}


def of_real_ranks(text: str) -> None:
    """One of the real ranks: measure what requests in JSON ask for, one by one, and print a row for each."""
    end_with_parent()
    for index, values in enumerate(json.loads(text)):
        row = _row(_from_json(values))
        print(_MARK + json.dumps(row | {"request": index}), flush=True)
        collect_garbage()  # the next one's memory is to be its own
        if row["status"] == OUT_OF_MEMORY:
            break  # the others may be in a collective


def serve() -> None:
    """Answer requests in JSON, a line each, until there are no more, or one leaves something in memory."""
    end_with_parent()
    for line in sys.stdin:
        request = _from_json(json.loads(line))
        ranks = {"RANK": request.rank, "WORLD_SIZE": request.world_size, "LOCAL_RANK": 0}
        os.environ |= {name: str(value) for name, value in ranks.items()}  # DeepSpeed asks for these
        row = _row(request)
        if dist.is_initialized():
            dist.destroy_process_group()
        forget_groups()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # every request has graphs for its own shapes
        device = choose_device(request.config.parallel.device, 0)
        left_mib = round(let_go(device), 2)
        leaves = left_mib > _LEFT_MIB or (
            row["status"] in ("ok", OUT_OF_MEMORY) and pins_memory(request, device)
        )
        print(_MARK + json.dumps(row | {"left_mib": left_mib, "leaves": leaves}), flush=True)
        if leaves:
            break


if __name__ == "__main__":
    if len(sys.argv) > 1:
        of_real_ranks(sys.argv[1])
    else:
        serve()
    os._exit(0)  # DeepSpeed may abort in its destructors; the others of a real group may hang
