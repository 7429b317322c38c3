"""Ends a run that hangs: stacks of every rank in a file, the rank that does not move by name, exit status 74.
When a rank fails, the others, whose collectives then fail too, name it last.

A thread of every rank writes a beat into the store of the process group: which section of which step its main
thread is in. If the main thread stays in a section for too long, the thread reads everybody's beats twice:
ranks whose beat stands still are stopped or cut off, and ranks in an earlier section keep the others waiting.
Outside of sections (at the start, while others write their part of a checkpoint) any time may pass, but not
without beats.
Where rank 0 itself hosts the store and is the one that is stopped, the store does not answer, which says it.

Before there is a process group, a rank only knows how long it has waited for the others (`found_in_time`).

A rank whose launcher has ended, killed say, gets LAUNCHER_LOST from that thread: the run saves and fails, so
that the launchers of other nodes start it again, if they may.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from pi_dist.config import ConfigError, UserError
from pi_dist.parallel.process_group import rank_from_launcher
from pi_dist.training.rank_log import tell_launcher
from pi_dist.training.stop_request import LAUNCHER_LOST

HUNG = 74  # EX_IOERR
SECTIONS = ("data", "forward and backward", "update", "evaluation", "checkpoint")  # of a step, in order
LONGER = {"checkpoint": 10.0}  # times as long as others may take: what a rank writes of one
LONGEST_INTERVAL_S = 5.0  # between beats
_SPEAKS_WITHIN = 5  # intervals from when a rank is late: it looks after one at most, for three
COLLECTIVES_LATER_S = 30.0  # a collective's own time-out, which knows no names, comes so much later
LAST_WORD_S = (
    3.0  # ranks that fail after another leave so much later: launchers report the end they see first
)

Beat = dict[str, Any]


class Watchdog:
    """Watches this rank's training; a context manager. Every rank of the default group makes one.

    An error of a rank that left it after another's is given a note: which rank failed first, and how.

    Args:
        directory: where the stacks go, `rank_N.txt` each, if it comes to that.
        timeout_s: the longest that a section may take, but for LONGER ones; of an evaluation, a micro-batch.
        say: on rank 0, tells the user of a rank that keeps the others waiting; None: says nothing.
        launcher: the parent process that must outlive this rank, if there is one.
    """

    def __init__(
        self,
        directory: str | Path,
        timeout_s: float,
        say: Callable[[str], None] | None,
        launcher: int | None = None,
    ) -> None:
        self._launcher = launcher
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._path = Path(directory) / f"rank_{self._rank}.txt"
        self._timeout_s, self._say = timeout_s, say
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / 8)
        self._step, self._section, self._since = 0, None, time.monotonic()
        self._count, self._armed, self._told = 0, 0.0, (0, None)
        self._leaves = False
        self._patience_s = max(2.0, self.interval_s)
        self._asking = threading.Thread()  # the last question to the store
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store = self._connect()

    def _connect(self) -> dist.Store:
        """A connection of its own to the store of the process group, under a name for this call alone."""
        name = [uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        patience = timedelta(seconds=self._patience_s)
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                "launch: MASTER_ADDR and MASTER_PORT are not set; the ranks watch each other there"
            )
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        return dist.PrefixStore(f"watchdog {name[0]}", store)

    def __enter__(self) -> Watchdog:
        self.beat()
        dist.barrier()  # everybody's first beat is there
        self._processes = [beat["process"] for beat in self._beats()]
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=10 * self.interval_s)
        self._leaves = True
        with contextlib.suppress(RuntimeError):
            self.beat()
        if isinstance(error, Exception):
            first = self._failed_before(error) or self._waited_for(error)
            if first is not None and not isinstance(error, UserError):  # whose own words suffice
                error.add_note(first)
                # a launcher that ends all ranks when one has failed does not cut off what this one has to say
                before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(LAST_WORD_S)
                signal.signal(signal.SIGTERM, before)

    def _failed_before(self, error: Exception) -> str | None:
        """Which rank failed before this error of this one, and how; None: this one is the first."""
        mine = f"rank {self._rank}: {type(error).__name__}: {_first_line(error)}"
        dead = [rank for rank, process in enumerate(self._processes) if _has_ended(process)]
        if dead:
            mine = f"rank {dead[0]}: its process {self._processes[dead[0]][0]} has ended"
        try:
            first = self._asked(lambda: self._store.compare_set("error", "", mine)).decode()
        except RuntimeError:
            first = "rank 0, which may have hosted the store of the process group: no answer"
        return f"the first to fail was {first}" if dead or first != mine else None

    def _waited_for(self, error: Exception) -> str | None:
        """Which ranks were behind, if this error is of a collective that took too long."""
        if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            return None
        try:
            beats = self._beats()
        except RuntimeError:
            return None
        here = self._step, SECTIONS.index(self._section) if self._section else len(SECTIONS)
        behind = [
            f"rank {rank}, {_place(beat)}"
            for rank, beat in enumerate(beats)
            if beat["section"] and (beat["step"], SECTIONS.index(beat["section"])) < here
        ]
        return f"it may have waited for {'; '.join(behind)}" if behind else None

    def at(self, step: int, section: str | None) -> None:
        """The main thread enters a section of SECTIONS in optimizer step `step`; None: what may take long."""
        self._step, self._section, self._since = step, section, time.monotonic()
        if section is None:
            faulthandler.cancel_dump_traceback_later()
            self._armed = 0.0
        elif section in LONGER or self._since - self._armed > self._timeout_s / 8:
            self._armed = self._since  # for a main thread that lets no other run
            faulthandler.dump_traceback_later(2 * self._limit_s(section) + 60, exit=True)

    def _limit_s(self, section: str) -> float:
        return self._timeout_s * LONGER.get(section, 1.0)

    def beat(self) -> None:
        """Tell the others where this rank is."""
        self._count += 1
        beat = {
            "count": self._count,
            "process": _process(os.getpid()),
            "step": self._step,
            "section": self._section,
            "seconds": time.monotonic() - self._since,
            "leaves": self._leaves,
        }
        self._asked(lambda: self._store.set(str(self._rank), json.dumps(beat)))

    def _beats(self) -> list[Beat]:
        names = [str(rank) for rank in range(self._size)]
        return [json.loads(value) for value in self._asked(lambda: self._store.multi_get(names))]

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What the store answers, or RuntimeError; its own time-out may last until its process goes on."""
        answer: list[Any] = []

        def ask() -> None:
            try:
                answer.append((call(), None))
            except RuntimeError as error:
                answer.append((None, error))

        if not self._asking.is_alive():  # else it still waits for the answer to the one before
            self._asking = threading.Thread(target=ask, daemon=True)
            self._asking.start()
            self._asking.join(2 * self._patience_s)
        if not answer:
            raise RuntimeError(f"no answer in {2 * self._patience_s:g} s")
        value, error = answer[0]
        if error is not None:
            raise error
        return value

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._look_for_launcher()
            since, section = self._since, self._section
            late = time.monotonic() - since > self._timeout_s
            try:
                self.beat()
                if self._say is not None and not late:
                    self._tell_of_slow_ranks(self._beats())
                if late:
                    silent, lines = self._standing_still()
                    over = section is not None and time.monotonic() - since > self._limit_s(section)
                    if self._since == since and (silent or over):  # else it goes on
                        self._end(silent, lines)
            except RuntimeError as error:
                if late:
                    text = f"the store of the process group, which rank 0 may host: {_first_line(error)}"
                    self._end([] if self._rank == 0 else [self._processes[0]], [text])

    def _look_for_launcher(self) -> None:
        """Once its launcher has ended, end this rank: at its next step boundary, if it has come so far."""
        if self._launcher is None or os.getppid() == self._launcher:
            return
        with contextlib.suppress(OSError):  # what the launcher read
            text = f"rank {self._rank}: its launcher, process {self._launcher}, has ended; so does this rank"
            print(f"error: {text}", file=sys.stderr, flush=True)
        self._launcher = None
        os.kill(os.getpid(), LAUNCHER_LOST)

    def _tell_of_slow_ranks(self, beats: list[Beat]) -> None:
        """Say, once for each, that ranks have kept the others waiting for several beats."""
        places = [(b["step"], SECTIONS.index(b["section"])) if b["section"] else None for b in beats]
        if None in places:
            return
        first = max(places)
        waited = max(b["seconds"] for b, place in zip(beats, places, strict=True) if place == first)
        behind = [
            rank
            for rank, (beat, place) in enumerate(zip(beats, places, strict=True))
            if place < first and min(waited, beat["seconds"]) > 3 * self.interval_s  # beats differ in age
        ]
        if behind and self._told != (behind, beats[behind[0]]["step"]):
            self._told = (behind, beats[behind[0]]["step"])
            self._say("warning: " + "; ".join(f"rank {r} is behind, {_place(beats[r])}" for r in behind))

    def _standing_still(self) -> tuple[list[list[Any]], list[str]]:
        """(processes without a beat for a while, what this rank is to say of all)."""
        before = self._beats()
        for _ in range(3):
            time.sleep(self.interval_s)
            self.beat()
        after = self._beats()
        silent = [
            r for r in range(self._size) if before[r]["count"] == after[r]["count"] and not after[r]["leaves"]
        ]
        gone = [after[r]["process"] for r in silent]
        moving = [r for r in range(self._size) if r not in silent]
        late = [r for r in moving if after[r]["seconds"] > self._timeout_s]
        if late and self._rank != late[0]:
            return gone, []  # that one speaks
        lines = [f"rank {r}: no sign of life; last seen {_place(after[r])}" for r in silent]
        return gone, lines + [f"rank {r}: {_place(after[r])}" for r in moving]

    def _end(self, silent: list[list[Any]], lines: list[str]) -> None:
        for process in silent:  # a stopped process would outlive its launcher's patience
            if _process(process[0]) == process:
                with contextlib.suppress(OSError):
                    os.kill(process[0], signal.SIGKILL)
        if not lines:  # a launcher ends all where one ends: not before the one that speaks has noticed
            time.sleep(_SPEAKS_WITHIN * self.interval_s)
        place = f"in {self._section!r} of step {self._step}" if self._section else f"after step {self._step}"
        said = [f"error: no step for {self._timeout_s:g} s", *lines] if lines else []
        _die(said, self._path, f"rank {self._rank}, pid {os.getpid()}, {place}:")


@contextlib.contextmanager
def found_in_time(timeout_s: float, directory: str | Path) -> Iterator[None]:
    """In here ranks find each other; a rank for which it takes longer leaves its stack and ends.

    torch.distributed has time-outs of its own, but none where the process that hosts the store is stopped.
    """

    def end() -> None:
        rank = rank_from_launcher()
        said = f"error: rank {rank}: the ranks have not found each other in {timeout_s:g} s; one of them, or "
        said += f"what hosts their store, on {os.environ.get('MASTER_ADDR')}, does not answer"
        path = Path(directory) / f"rank_{rank}.txt"
        _die([said], path, f"rank {rank}, pid {os.getpid()}, before the process group:")

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(timeout_s + 60, exit=True)  # for a main thread that lets no other run
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _die(lines: list[str], path: Path, title: str) -> None:
    """Say these lines, if any, and where stacks are; add those here; end this process with status HUNG."""
    threading.Timer(10.0, os._exit, (HUNG,)).start()  # if a file system hangs too
    try:
        if lines:
            lines = [*lines, f"stacks of the ranks: {path.parent}"]
            tell_launcher("; ".join(lines).removeprefix("error: "), seconds_ago=1)  # before those killed here
            _say("\n  ".join(lines))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            print(title, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        _say(f"no stacks of process {os.getpid()}: {error}")
    finally:
        os._exit(HUNG)


def _say(text: str) -> None:
    """On stderr, if there is still someone who reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _process(pid: int) -> list[Any]:
    """What no other process has: its id, host, name space of ids, and start; if it is gone, the id alone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return [pid]
    if state[0] in "ZX":
        return [pid]
    return [pid, socket.gethostname(), os.readlink("/proc/self/ns/pid"), state[19]]


def _has_ended(process: list[Any]) -> bool:
    """Whether a process of this host has ended; False for those of other hosts."""
    return process[1:3] == _process(os.getpid())[1:3] and _process(process[0]) != process


def _place(beat: Beat) -> str:
    if beat["section"] is None:
        return f"after step {beat['step']}, for {beat['seconds']:.0f} s" if beat["step"] else "before step 1"
    return f"in {beat['section']!r} of step {beat['step']} for {beat['seconds']:.0f} s"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
