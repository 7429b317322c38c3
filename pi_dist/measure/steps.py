"""Whole training steps on random tokens, and the record of a benchmark that is made of them."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pi_dist.config import PRESETS, Config, ModelConfig, UserError, num_chunks
from pi_dist.data.loader import Batch
from pi_dist.measure.record import STEP, resume, write
from pi_dist.parallel.exchange_plan import shard_starts
from pi_dist.parallel.mesh import Mesh
from pi_dist.parallel.process_group import of_rank_zero
from pi_dist.training.streaming import streamed_losses

PAPER = {"window": 4, "stride": 16, "num_skips": 1}  # the pattern of the paper
WIDE = {"window": 64, "stride": 65, "num_skips": 16}  # that of the shipped configurations, in every layer
VOCABULARY = 50304  # where the preset names none

Row = dict[str, Any]


class Trains(Protocol):
    """What of an engine a step needs; see `Engine`."""

    def __call__(self, *args: Any) -> torch.Tensor: ...
    def backward(self, loss_sum: torch.Tensor, valid_tokens: torch.Tensor) -> None: ...
    def step(self, step: int) -> None: ...


def model_of(preset: str, **changes: Any) -> ModelConfig:
    """A preset with a vocabulary and these changes."""
    return replace(PRESETS[preset], **{"vocab_size": PRESETS[preset].vocab_size or VOCABULARY} | changes)


def check_presets(command: str, presets: list[str]) -> None:
    """Raise UserError for a preset that is not known."""
    if not set(presets) <= set(PRESETS):
        raise UserError(f"{command}: presets ({', '.join(presets)}) in {tuple(PRESETS)} does not hold")


def random_batch(config: Config, mesh: Mesh) -> Batch:
    """This rank's tokens of sequences of random tokens, of one document."""
    t, generator = config.training, torch.Generator().manual_seed(mesh.sp_rank)
    shape = (t.micro_batch_size, t.context // mesh.sp_degree)
    tokens, labels = (torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in range(2))
    starts = shard_starts(t.context, mesh.sp_degree, mesh.sp_rank, config.balanced, t.chunk_tokens)
    return Batch(tokens, labels, None, starts=starts, row_start=0)


class Steps:
    """Steps of one engine at one context, one micro-batch a step."""

    def __init__(self, engine: Trains, mesh: Mesh, config: Config) -> None:
        self.engine, self.mesh, self.config = engine, mesh, config
        self.batch = random_batch(config, mesh)
        self.valid = torch.tensor(
            float(config.training.context * config.training.batch_size), device=mesh.device
        )

    def gradients(self) -> None:
        """All of a step but the update."""
        parallel, chunk_tokens = self.config.parallel, self.config.training.chunk_tokens
        losses = streamed_losses(self.engine, self.mesh, self.batch, parallel, 0, chunk_tokens)
        last = num_chunks(self.config.training) - 1
        for number, loss_sum in enumerate(losses):
            self.engine.backward(loss_sum, self.valid)
            if number < last:
                self.engine.step(0)

    def update(self) -> None:
        self.engine.step(0)

    def one(self) -> None:
        self.gradients()
        self.update()

    def timed(self) -> float:
        """Seconds of one step, of the slowest rank."""
        self._wait()
        dist.barrier()
        began = time.perf_counter()
        self.one()
        self._wait()
        return most(time.perf_counter() - began, self.mesh)

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()


def collect_garbage() -> None:
    """Free the engines that nothing holds any more.

    Their tensors refer to each other out of Python's sight, so that one collection frees what only the next
    can reach: after a single one, parameters and gradients of a closed engine would be left.
    """
    for _ in range(8):
        if gc.collect() == 0:
            break


def end_with_parent() -> None:
    """End this process when the one that started it is gone: a launcher that is killed ends no ranks.

    They would wait for each other on the GPUs, which others then share with them.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def most(value: float, mesh: Mesh) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def agreed(here: bool) -> bool:
    """What rank 0 finds."""
    return of_rank_zero(lambda: here)


def identity(setup: type, row: Row) -> list[Any]:
    """What a row says of the fields of a dataclass of setups, or their default, if it is older than they."""
    return [row.get(name, field.default) for name, field in setup.__dataclass_fields__.items()]


class Record:
    """The record on rank 0; every rank knows its rows.

    Args:
        settings: of the benchmark; those of a record that is gone on with are the same.
        line: what is printed of a row.
        source: files that rows depend on, by patterns: they are the same, too.

    Raises:
        UserError: on every rank, for a record of another device, of other versions or of other settings, such
            as that of another benchmark.
        OSError: on every rank, where there can be no such file.
    """

    def __init__(
        self,
        path: str,
        mesh: Mesh,
        settings: Row,
        line: Callable[[Row], str],
        source: tuple[str, ...] = STEP,
    ) -> None:
        self.path, self.writes, self._line = path, mesh.rank == 0, line

        def begin() -> dict[str, Any]:
            found = resume(path, settings | {"attempting": None}, source)
            for key, value in settings.items():
                theirs = found["settings"].get(key)
                if theirs != value:
                    raise UserError(
                        f"{path}: {key} of the record ({theirs}) == that of this benchmark ({value}) "
                        "does not hold"
                    )
            write(found, path)
            return found

        self.content: dict[str, Any] = of_rank_zero(begin, UserError, OSError)
        self.begun = False  # whether this process has measured anything

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def attempt(self, what: list[Any] | None) -> None:
        """Note what is about to run: if it takes the process with it, it is not tried again."""
        self.content["settings"]["attempting"] = what
        self.begun |= what is not None
        if self.writes:
            write(self.content, self.path)

    def attempted(self, what: list[Any]) -> bool:
        """Whether it took a process with it."""
        return self.content["settings"].get("attempting") == what  # a kept record says nothing of it

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.attempt(None)
        if self.writes:
            print(self._line(row), flush=True)

    def close(self, complete: bool) -> None:
        """Say how far it is."""
        if self.writes:
            print(f"{len(self.rows)} rows in {self.path}" + ("" if complete else "; run it again to go on"))
