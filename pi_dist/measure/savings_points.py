"""Points of `pi-dist savings`, a method on so many GPUs: measured where this machine can, else predicted."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pi_dist.config import EXACT_METHODS, Config, num_chunks
from pi_dist.measure.fake_ranks import Request, few_chunks, typical_rank
from pi_dist.measure.profile import Network, Profile
from pi_dist.measure.step_model import communication_seconds, compute_seconds, memory, step_time, work
from pi_dist.measure.workers import OUT_OF_MEMORY, Worker, measured_apart

MEASURED, PREDICTED = "measured", "predicted"
COMPOSED = "composed"  # time: of one rank, measured, and communication, predicted
_TIMED_STEPS = 3
_START_S = 8.0  # of a point, before its steps: a model, an engine, compiling
_PATIENT = 3.0  # times the patience with a step: that with memory alone


@dataclass(frozen=True)
class Point:
    """One method on so many GPUs: what a rank needs, and the step's time, each with its source.

    host_mib: predicted, of rows that chunks keep in host memory, or of offloaded inputs of blocks. problem:
    why what should have been measured was not.
    """

    num_gpus: int
    peak_mib: float | None
    seconds: float | None
    fits: bool
    memory_source: str
    time_source: str
    predicted_mib: float
    predicted_seconds: float
    host_mib: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Lab:
    """How a point is found: a GPU and a network in numbers, and whether this machine's GPU is asked.

    Attributes:
        measures: measure what can be: time, of steps within `patience_s` seconds, and memory.
        real_ranks: GPUs of this machine, on which whole jobs run.
    """

    profile: Profile
    network: Network
    measures: bool = False
    real_ranks: int = 1
    patience_s: float = 20.0

    def predict(self, config: Config, num_gpus: int) -> Point:
        """By the cost model.

        Raises:
            ConfigError: the GPU would have no room for the rows that chunks keep, and the run be refused.
        """
        need = memory(config, num_gpus, self.profile)
        mib = need.total
        seconds = step_time(config, num_gpus, self.profile, self.network).total
        fits = mib <= self.profile.tensors_mib
        return Point(num_gpus, mib, seconds, fits, PREDICTED, PREDICTED, mib, seconds, need.host)

    def request(self, config: Config, num_gpus: int) -> tuple[Request | None, float]:
        """(what to measure, None: nothing; seconds that it will take).

        Exact attention on one GPU is dense, whatever its method.
        """
        done = work(config, num_gpus, self.profile)
        whole = compute_seconds(done, self.profile)
        brief = compute_seconds(
            replace(done, exact_forward_flops=0.0, exact_backward_flops=0.0), self.profile
        )  # of a step that only takes the memory of exact attention
        first = last = brief
        if few_chunks(config, num_gpus) is not None:
            first = whole * 3 / num_chunks(config.training)
            last = 0.3 * whole  # keys and values of all chunks, and two of them backward
        timed = _TIMED_STEPS if whole <= self.patience_s else 0
        if not self.measures or (not timed and last > _PATIENT * self.patience_s):
            return None, 0.0
        real = timed > 0 and 1 < num_gpus <= self.real_ranks
        if num_gpus == 1 and set(config.model.methods) <= set(EXACT_METHODS):
            config = replace(config, model=replace(config.model, method="dense"))
        rank = None if real else typical_rank(config, num_gpus)
        request = Request(config, num_gpus, rank, self.profile.usable_mib, timed, forward_too=False)
        if real:
            first = last = whole
        return request, _START_S + first + (whole + min(3.0, timed * whole) if timed else last)


class OutOfTime(Exception):
    """What is asked for next would end after the time that there is."""


class Bench:
    """Finds points. What is measured is said and kept, so that it is not measured again; a context manager.

    Args:
        known: measured points, to which others are added.
        save: called after each.
        say: is told of each in a line.
        until: of `time.monotonic`; no point is begun that would end later, but for the first.
    """

    def __init__(
        self,
        lab: Lab,
        known: list[dict[str, Any]] | None = None,
        save: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
        until: float = math.inf,
    ) -> None:
        self.lab, self.known = lab, [] if known is None else known
        self._save, self._say, self._until = save, say, until
        self._worker, self._began = Worker(), False

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()

    def point(self, config: Config, num_gpus: int, what: str) -> Point:
        """Measured as far as this machine can; `what` names it.

        Raises:
            OutOfTime: it is too late to measure it.
        """
        lab = self.lab
        guess = lab.predict(config, num_gpus)
        request, expected_s = lab.request(config, num_gpus)
        if request is None:
            return guess
        row = self._known(request) or self._measured(request, expected_s, what, guess)
        if row["status"] == OUT_OF_MEMORY:
            return replace(guess, peak_mib=None, seconds=None, fits=False, memory_source=MEASURED)
        if row["status"] != "ok":
            return replace(guess, problem=row["status"])
        fits = row["peak_mib"] <= lab.profile.usable_mib
        guess = replace(guess, peak_mib=row["peak_mib"], fits=fits, memory_source=MEASURED)
        if row["ms"] is None:
            return guess
        alone = request.rank is None or num_gpus == 1
        waits = 0.0 if alone else communication_seconds(config, num_gpus, lab.profile, lab.network)
        return replace(guess, seconds=row["ms"] / 1e3 + waits, time_source=MEASURED if alone else COMPOSED)

    def _known(self, request: Request) -> dict[str, Any] | None:
        job = _job(request)
        for row in self.known:
            if row["job"] == job and (
                row["status"] != "ok" or row["ms"] is not None or not request.timed_steps
            ):
                return row
        return None

    def _measured(self, request: Request, expected_s: float, what: str, guess: Point) -> dict[str, Any]:
        began = time.monotonic()
        if self._began and began + expected_s > self._until:
            raise OutOfTime
        self._began = True
        timeout_s = 180.0 + 10 * expected_s
        if request.rank is None:
            (row,) = measured_apart([request], timeout_s)
        else:
            row = self._worker.ask(request, timeout_s)
        took = time.monotonic() - began
        self._say(_line(what, row, guess, took))
        if row["status"] in ("ok", OUT_OF_MEMORY):
            job, empty = _job(request), {"peak_mib": None, "ms": None}
            self.known[:] = [other for other in self.known if other["job"] != job]
            self.known.append({"what": what, "job": job, "took_s": round(took, 1)} | empty | row)
            self._save()
        return row


def _job(request: Request) -> str:
    """A name for what is measured: equal jobs have equal ones."""
    values = [request.config.to_dict(), request.world_size, request.rank, request.limit_mib]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _line(what: str, row: dict[str, Any], guess: Point, took: float) -> str:
    said = row["status"]
    if said == "ok":
        said = f"{row['peak_mib']:,.0f} MiB"
    said += f" ({guess.predicted_mib:,.0f} predicted)"
    if row.get("ms") is not None:
        said += f", {row['ms']:,.1f} ms ({1e3 * guess.predicted_seconds:,.1f} predicted with communication)"
    return f"{what}: {said}; {took:.1f} s"
