"""`pi-dist bench step`: a whole step of each preset on one device, and what it is spent on.

Random tokens, at least TOKENS of them a step. Beside DeepSpeed's ZeRO 1: the same model in a plain loop, with
bf16 parameters, fused AdamW on them and no masters, which is the least that an optimizer can cost; and blocks
that are not compiled. Long contexts also in chunks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import torch

from pi_dist.config import Config, ParallelConfig, TrainingConfig, UserError, check
from pi_dist.measure.record import step_row
from pi_dist.measure.steps import (
    PAPER,
    WIDE,
    Record,
    Row,
    Steps,
    check_presets,
    collect_garbage,
    identity,
    model_of,
)
from pi_dist.measure.timeline import PARTS, Profile, busy_ms, parts_ms, profiled
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.mesh import Mesh, make_mesh
from pi_dist.parallel.process_group import start, world_size_from_launcher
from pi_dist.training.deepspeed_engine import Engine
from pi_dist.training.optimizer import guard_update, make_optimizer

TOKENS = 32768  # of a step, at least
COMPARED_AT = 32768  # the context of the other engine, the other pattern and eager blocks
CHUNK_TOKENS = {"small": 131072, "medium": 65536, "large": 32768}  # that a GPU of 80 GB has the memory for
TIMED_STEPS = 5
SLOWEST_S = 360.0  # a step expected to take longer is not made
Recompute = Literal["selective"] | bool


@dataclass(frozen=True)
class Setup:
    """A row of the record: a preset at a context, and how its step is made.

    engine: "deepspeed", or "torch" for the plain loop.
    """

    preset: str
    tokens: int
    activation_checkpointing: Recompute = False
    chunk_tokens: int | None = None
    engine: str = "deepspeed"
    eager: bool = False
    cuda_graphs: bool | None = None
    window: int = PAPER["window"]
    stride: int = PAPER["stride"]
    num_skips: int = PAPER["num_skips"]

    def config(self, device: str) -> Config:
        """The run's configuration; compiled on a GPU only."""
        pattern = {"window": self.window, "stride": self.stride, "num_skips": self.num_skips}
        batch = max(1, TOKENS // self.tokens) if device == "cuda" else 1
        config = Config(
            model=model_of(self.preset, **pattern),
            parallel=ParallelConfig(device=device, zero_stage=1),
            training=TrainingConfig(
                context=self.tokens,
                batch_size=batch,
                micro_batch_size=batch,
                precision="bf16" if device == "cuda" else "fp32",
                activation_checkpointing=self.activation_checkpointing,
                chunk_tokens=self.chunk_tokens,
                compile=False if self.eager else None,
                cuda_graphs=self.cuda_graphs,
            ),
        )
        check(config)
        return config


def setups(presets: list[str], contexts: list[int], streamed: list[int]) -> Iterator[Setup]:
    """What is measured, in order: of each series the short contexts first."""
    for preset in presets:
        compared = min((n for n in contexts if n >= COMPARED_AT), default=max(contexts))
        for recompute in (False, "selective", True):
            for tokens in sorted(contexts):
                yield Setup(preset, tokens, recompute)
        yield Setup(preset, compared, engine="torch")
        yield Setup(preset, compared, eager=True)
        yield Setup(preset, min(contexts), cuda_graphs=False)
        yield Setup(preset, compared, **WIDE)
        for tokens in sorted(streamed):
            yield Setup(preset, tokens, chunk_tokens=min(CHUNK_TOKENS.get(preset, 32768), tokens))


class PlainEngine:
    """The plain loop: parameters in the precision of the run, no DeepSpeed, no masters."""

    def __init__(self, model: PiTransformer, config: Config, mesh: Mesh) -> None:
        bf16 = config.training.precision == "bf16"
        self.model = model.to(mesh.device, torch.bfloat16 if bf16 else torch.float32)
        self.optimizer = make_optimizer(model, config.training)
        self.clip_norm = config.training.clip_norm

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.model(*args)

    def backward(self, loss_sum: torch.Tensor, valid_tokens: torch.Tensor) -> None:
        (loss_sum / valid_tokens).backward()

    def step(self, _step: int) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        guard_update(self.optimizer, norm, None, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    replays = False

    def as_it_is(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """It holds nothing."""


class _Running:
    """The engine of one setup and its steps; a context manager, after which nothing holds on to them."""

    def __init__(self, setup: Setup, mesh: Mesh) -> None:
        self.config = setup.config(mesh.device.type)
        model = PiTransformer.of_run(self.config, mesh.device.type)
        self.num_parameters = model.num_parameters()
        self.engine = (Engine if setup.engine == "deepspeed" else PlainEngine)(model, self.config, mesh)
        self.steps = Steps(self.engine, mesh, self.config)

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def measure(setup: Setup, mesh: Mesh) -> Row:
    """The row of a setup, after steps that compile and warm up."""
    cuda = mesh.device.type == "cuda"
    if setup.chunk_tokens is None:
        torch.compiler.reset()  # a graph for this length alone
    else:
        with _Running(replace(setup, tokens=2 * setup.chunk_tokens), mesh) as short:
            short.steps.timed()  # all that is compiled, in two chunks
        del short
        collect_garbage()
    with _Running(setup, mesh) as running:
        steps = running.steps
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if setup.chunk_tokens is None:
            steps.timed()
        first = steps.timed()
        seconds = median(steps.timed() for _ in range(TIMED_STEPS)) if first < 5 else first
        row = step_row(running.config, 1, seconds, running.num_parameters)
        row["replays"] = running.engine.replays
        if setup.engine == "torch":
            row["zero_stage"] = None
        if cuda and setup.chunk_tokens is None:
            with running.engine.as_it_is():  # kernels of a graph do not tell which product they are
                gradients = profiled(steps.gradients)
            row |= shares(gradients, profiled(steps.update), running.config, row["ms"])
    return row


def shares(gradients: Profile, update: Profile, config: Config, ms: float) -> Row:
    """Milliseconds of the kernels of a step's parts, and of its rest, in which the GPU waits for the host."""
    found, of_update = (
        parts_ms(profile, config.model.hidden_size, config.model.vocab_size)
        for profile in (gradients, update)
    )
    found["communication"] += of_update.pop("communication")
    found["optimizer"] += sum(of_update.values())
    idle = max(0.0, ms - busy_ms(gradients.kernels) - busy_ms(update.kernels))
    return {f"{part}_ms": round(found[part], 3) for part in PARTS} | {"idle_ms": round(idle, 3)}


def bench(
    path: str,
    presets: list[str],
    contexts: list[int],
    streamed: list[int],
    *,
    minutes: float = 8.0,
    device: str = "auto",
) -> bool:
    """Measure what the record at `path` lacks, for about so many minutes; True if all is there.

    Raises:
        UserError: an unknown preset, several ranks, or a record of another device or of other versions.
    """
    check_presets("bench step", presets)
    if (ranks := world_size_from_launcher()) > 1:
        raise UserError(f"bench step: ranks ({ranks}) == 1 does not hold; `bench sp` takes several")
    until = time.monotonic() + 60 * minutes
    mesh = make_mesh(1, start(device, 600.0))
    settings = {"zero_stage": 1, "data": "random tokens", "least_tokens_a_step": TOKENS}
    record = Record(path, mesh, settings, _line)
    done = [identity(Setup, row) for row in record.rows]
    left = [s for s in setups(presets, contexts, streamed) if identity(Setup, vars(s)) not in done]
    while left:
        setup, what = left[0], identity(Setup, vars(left[0]))
        series = _series(setup, record)
        speeds = [row["tokens_per_s"] for row in series if row["ms"] is not None]
        expected = setup.tokens / speeds[-1] if speeds else 0.0  # seconds
        row: Row = {"ms": None, "measured": False, "fits": None}
        if record.attempted(what):
            row["note"] = "the process ended while this was measured"
        elif any(shorter["fits"] is False for shorter in series):
            row |= {"fits": False, "note": "out of memory at a shorter context"}
        elif expected > SLOWEST_S:
            row["note"] = f"a step of about {expected:.0f} s is not made"
        elif time.monotonic() + (expected if record.begun else 0.0) > until:
            break
        else:
            record.attempt(what)
            try:
                row = measure(setup, mesh) | {"fits": True}
            except torch.OutOfMemoryError:
                row |= {"measured": True, "fits": False, "note": "out of memory"}
            except BaseException:
                record.attempt(None)
                raise
        collect_garbage()  # the next setup's memory is to be its own
        record.add(row | vars(setup))
        left.pop(0)
    record.close(not left)
    return not left


def _series(setup: Setup, record: Record) -> list[Row]:
    """The rows of a setup at shorter contexts."""
    series = identity(Setup, vars(setup) | {"tokens": None})
    rows = (row for row in record.rows if identity(Setup, row | {"tokens": None}) == series)
    return sorted((row for row in rows if row["tokens"] < setup.tokens), key=lambda row: row["tokens"])


def _line(row: Row) -> str:
    chunks = "" if row["chunk_tokens"] is None else f" in chunks of {row['chunk_tokens']:,}"
    what = f"{row['preset']:<7} n {row['tokens']:>11,}{chunks} k {row['window']} M {row['num_skips']} "
    what += f"{row['engine']}{', eager' if row['eager'] else ''}"
    what += f"{', graphs' if row.get('replays') else ''}, "
    what += f"recompute {str(row['activation_checkpointing']).lower()}"
    if row["ms"] is None:
        return f"{what}: {row['note']}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    memory = "" if row["peak_mib"] is None else f", {row['peak_mib']:,.0f} MiB"
    parts = ", ".join(f"{part} {row[f'{part}_ms']:.1f}" for part in (*PARTS, "idle") if f"{part}_ms" in row)
    return f"{what}: {row['ms']:,.1f} ms, {row['tokens_per_s']:,} tokens/s{mfu}{memory}" + (
        f"\n    {parts}" if parts else ""
    )
