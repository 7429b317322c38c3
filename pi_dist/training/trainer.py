"""The training loop."""

from __future__ import annotations

import fcntl
import hashlib
import math
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.distributed as dist

from pi_dist.config import Config, ConfigError, UserError, check, num_chunks, resolve
from pi_dist.data.loader import Batch, SequenceLoader
from pi_dist.data.shards import ShardIndex, open_splits, sha256_of
from pi_dist.model.loss import IGNORE
from pi_dist.model.transformer import PiTransformer
from pi_dist.ops.dropout import derive_seed
from pi_dist.parallel.mesh import Mesh, make_mesh
from pi_dist.parallel.process_group import of_rank_zero, start, world_size_from_launcher
from pi_dist.training import checkpoint as checkpoints
from pi_dist.training.compile_ahead import compile_ahead
from pi_dist.training.deepspeed_engine import Engine
from pi_dist.training.evaluate import heldout_loss, make_loader
from pi_dist.training.kept_memory import KeptPlan, check_offload, memory_of_ranks, plan_kept_rows
from pi_dist.training.metrics import Metrics
from pi_dist.training.optimizer import learning_rate
from pi_dist.training.stop_request import LAUNCHER_LOST, STOP_SIGNALS, StopRequest
from pi_dist.training.streaming import ON_DEVICE, streamed_losses
from pi_dist.training.watchdog import COLLECTIVES_LATER_S, Watchdog, found_in_time


class TrainingError(UserError):
    """Training cannot go on; the message names the step and why."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: optimizer steps done.
        losses: training loss of each step of this call, nats a token.
        step_seconds: the time of each, data included, evaluation and checkpoints not.
        heldout_loss: nats a token, None without held-out data.
        checkpoint: the last one.
        stopped_by: name of the signal that ended it early, None if it is complete.
        kept: what is kept for later chunks and where, None if sequences are not in chunks.
        skipped: steps of the whole run whose loss or gradient was not finite, which made no update.
    """

    step: int
    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    num_parameters: int
    heldout_loss: float | None
    checkpoint: Path
    stopped_by: str | None
    kept: KeptPlan | None = None
    skipped: int = 0


def _versions() -> dict[str, str]:
    """What the arithmetic of a run depends on beside its configuration."""
    return {name: version(name) for name in ("torch", "deepspeed")}


def _source() -> str:
    """SHA-256 of the Python files of pi_dist on this host, kernels included."""
    root = Path(__file__).parents[1]
    paths = sorted(glob("**/*.py", root_dir=root, recursive=True))
    hashes = [f"{path} {sha256_of(root / path)}" for path in paths]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _check_agreement(facts: dict) -> None:
    """Raise ConfigError on every rank unless all ranks state the same facts."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    for rank, other in enumerate(gathered):
        keys = [key for key in gathered[0] if gathered[0][key] != other.get(key)]
        different = [f"{key}: {gathered[0][key]} != {other.get(key)}" for key in keys]
        if different:
            raise ConfigError(f"rank 0 and rank {rank} do not run the same: {'; '.join(different)}")


def train(
    config: Config, launcher: int | None = None, stop: StopRequest | None = None
) -> tuple[Config, Outcome]:
    """Train, or go on training, the run of `config.run_dir`. Every rank calls it.

    Args:
        launcher: the parent process, if the run is to save and fail when that has ended.
        stop: signals that have been heeded since before; one among them ends the run after a step.

    Returns:
        The resolved configuration and how it ended.

    Raises:
        ConfigError: the configuration cannot work, or is not that of the run found there.
        ShardError: the data are not what was prepared.
        CheckpointError: there are checkpoints and none is whole, or the last one could not be written.
        TrainingError: the loss or the gradient is not finite, more often in a row than the configuration
            allows; no checkpoint is made of it. Or a rank's launcher has ended; there is a checkpoint.
    """
    check(config, world_size_from_launcher())
    index, heldout_index = open_splits(config.data)
    config = resolve(config, index.vocab_size)
    stacks, timeout_s = Path(config.run_dir) / "stacks", config.parallel.timeout_s + COLLECTIVES_LATER_S
    with ExitStack() as stack:
        with found_in_time(2 * timeout_s, stacks):
            device = start(config.parallel.device, timeout_s)
            check(config, dist.get_world_size())
            data = {"data": index.fingerprint, "held-out data": heldout_index and heldout_index.fingerprint}
            source = {"source of pi_dist": _source()}
            _check_agreement(checkpoints.flatten(config.to_dict()) | data | _versions() | source)
            mesh = make_mesh(config.parallel.sp_degree, device, timeout_s)
            say = Metrics.say if mesh.rank == 0 else None
            watch = Watchdog(stacks, config.parallel.timeout_s, say, launcher)
            stack.enter_context(watch)
        return config, _train(config, mesh, watch, index, heldout_index, stop or StopRequest(()))


def _train(
    config: Config,
    mesh: Mesh,
    watch: Watchdog,
    index: ShardIndex,
    heldout_index: ShardIndex | None,
    stop: StopRequest,
) -> Outcome:
    """`train`, once all ranks see each other and agree."""
    kept = None
    if config.training.chunk_tokens is not None:
        kept = plan_kept_rows(config, memory_of_ranks(mesh))
    if config.training.activation_offload:
        check_offload(config, memory_of_ranks(mesh).host)
    lock = _lock(config, mesh)
    of_rank_zero(lambda: checkpoints.check_writable(config.run_dir), ConfigError)
    found, refused = _find_checkpoint(config)
    notes = [f"refused {text}" for text in refused]
    if kept is not None:
        chunks = f"{num_chunks(config.training)} chunks of {config.training.chunk_tokens} tokens"
        notes.append(f"{chunks}; a rank {kept.describe()}")
    if config.training.warmup_steps >= config.training.steps:
        notes.append(
            f"warning: warmup_steps ({config.training.warmup_steps}) < steps ({config.training.steps}) "
            "does not hold; the peak learning rate is never reached"
        )
    if found is not None:
        notes += [f"changed {text}" for text in checkpoints.check_resumable(found, config, index.fingerprint)]
    first = 0 if found is None else found.step

    model = PiTransformer.of_run(config, mesh.device.type)
    num_parameters = model.num_parameters()
    engine = Engine(model, config, mesh)
    if found is not None:
        checkpoints.load(engine, found)
    compiled = compile_ahead(config, model.patterns, mesh)
    if compiled is not None:
        notes.append(compiled)
    loader = make_loader(index, config, mesh)
    heldout_loader = None if heldout_index is None else make_loader(heldout_index, config, mesh)
    metrics = None
    if mesh.rank == 0:
        _write_config(config)
        metrics = Metrics(config.run_dir, first, config.training.steps, config.training.log_every)
        metrics.say(_opening(config, mesh, loader, num_parameters))
        for note in notes:
            metrics.say(note)
        if found is not None:
            metrics.say(f"resuming at step {found.step} from {found.path}")
    run = _Run(config, mesh, engine, loader, heldout_loader, metrics, watch, index, num_parameters, kept)
    try:
        outcome = run.loop(first, found, stop)
        engine.close()
        return outcome
    finally:
        if metrics is not None:
            metrics.close()
        if lock is not None:
            lock.close()


def _lock(config: Config, mesh: Mesh) -> TextIO | None:
    """Keep a second run out of run_dir: rank 0 holds a lock on a file there as long as this stays open.

    A holder on another host may be cut off. Its watchdog ends it in time, and so long it is waited for.

    Raises:
        ConfigError: on every rank, if another process holds it.
    """
    held, error = None, [None]
    if mesh.rank == 0:
        path = Path(config.run_dir) / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = path.open("a+")
            _acquire(held, config.parallel.timeout_s + COLLECTIVES_LATER_S / 2)
        except BlockingIOError:
            error = [f"run_dir: another process is training in {config.run_dir}"]
        except OSError as failure:
            if held is None:
                error = [f"run_dir: {path}: {failure.strerror}"]
            else:  # a file system without locks
                said = f"{path}: {failure.strerror}: a second run in here would not be noticed"
                Metrics.say(f"warning: {said}")
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise ConfigError(error[0])
    return held


def _acquire(file: TextIO, patience_s: float) -> None:
    """Lock a file and write this host's name into it.

    Raises:
        BlockingIOError: another process of this host has it, or one of another host for so long.
    """
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            if holder in ("", socket.gethostname()) or time.monotonic() > deadline:
                raise
        if not told:
            told = True
            Metrics.say(f"{file.name}: a rank holds the lock on {holder}; it has {patience_s:g} s to end")
        time.sleep(1.0)
    file.truncate(0)
    file.write(socket.gethostname())
    file.flush()


def _find_checkpoint(config: Config) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    """The newest whole checkpoint, searched for and verified by rank 0 for all."""
    return of_rank_zero(lambda: checkpoints.find_newest(config.run_dir), checkpoints.CheckpointError)


def _write_config(config: Config) -> None:
    """Keep the resolved configuration with the run, as YAML that `--config` takes."""
    import yaml

    path = Path(config.run_dir) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(".config.yaml.part")
    part.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    part.replace(path)


def _opening(config: Config, mesh: Mesh, loader: SequenceLoader, num_parameters: int) -> str:
    t, p = config.training, config.parallel
    text = loader.index.num_tokens
    repeated = f"a text of {text:,} tokens, as one document: " if config.data.packing == "join" else ""
    return (
        f"{num_parameters:,} parameters, context {t.context}, {mesh.world_size} ranks on {mesh.device.type} "
        f"(dp {mesh.dp_degree} × sp {p.sp_degree}), ZeRO {p.zero_stage}, {t.precision}\n"
        f"{repeated}{loader.num_tokens:,} tokens in {loader.num_sequences:,} sequences an epoch "
        f"({loader.padding_share:.1%} padding), {t.batch_size} sequences a step, "
        f"{t.steps * t.batch_size / loader.num_sequences:.2f} epochs in {t.steps} steps"
    )


class _StepResult(NamedTuple):
    loss: float  # nats a token, over the whole global batch
    tokens: int  # with a label, in the whole global batch
    gradient_norm: float  # before clipping
    stopped_by: str | None  # the signal that some rank received
    not_finite: str | None  # what, where, in which sequences: no update was made


@dataclass
class _Run:
    config: Config
    mesh: Mesh
    engine: Engine
    loader: SequenceLoader
    heldout_loader: SequenceLoader | None
    metrics: Metrics | None
    watch: Watchdog
    index: ShardIndex
    num_parameters: int
    kept: KeptPlan | None

    def __post_init__(self) -> None:
        self.placement = ON_DEVICE if self.kept is None else self.kept.placement()

    def loop(self, first: int, found: checkpoints.Checkpoint | None, stop: StopRequest) -> Outcome:
        t = self.config.training
        stop.heed(STOP_SIGNALS)
        losses: list[float] = []
        seconds: list[float] = []
        step = first
        updates = first if found is None else found.updates
        skipped_in_a_row = 0 if found is None else found.state.get("skipped_in_a_row", 0)
        stopped_by = None
        saved = None if found is None else found.path
        heldout, heldout_step = None, -1
        if found is not None and found.state["heldout_data"] == self._heldout_data():
            heldout, heldout_step = found.state["heldout_loss"], found.state["heldout_step"]
        if first > 0 and self._is_measured(first) and heldout_step != first:  # stopped before, or other data
            heldout, heldout_step = self._heldout_loss(first), first
        batches = self.loader.iterate(first)
        try:
            while step < t.steps and stopped_by is None:
                began = time.perf_counter()
                self.watch.at(step + 1, "data")
                done = self._step(step, next(batches), stop)
                self.watch.at(step + 1, None)
                seconds.append(time.perf_counter() - began)
                losses.append(done.loss)
                if done.not_finite is None:
                    updates, skipped_in_a_row = updates + 1, 0
                else:
                    skipped_in_a_row += 1
                    self._skip(step, done.not_finite, skipped_in_a_row, step + 1 - updates)
                stopped_by = done.stopped_by
                if self.metrics is not None:
                    rate = learning_rate(t, step)
                    self.metrics.step(step + 1, done.loss, done.tokens, seconds[-1], rate, done.gradient_norm)
                step += 1
                last = step == t.steps or stopped_by is not None
                if self._is_measured(step) and (step == t.steps or stopped_by is None):
                    heldout, heldout_step = self._heldout_loss(step), step
                if last or (t.save_every and step % t.save_every == 0):
                    counts = {"step": step, "updates": updates, "skipped_in_a_row": skipped_in_a_row}
                    saved = self._save(counts, heldout, heldout_step, last) or saved
        finally:
            batches.close()
            stop.restore()
        stopped_by = stopped_by if step < t.steps else None
        if stopped_by == LAUNCHER_LOST.name:
            raise TrainingError(f"the launcher of a rank has ended; step {step} is saved in {saved}")
        return Outcome(
            step,
            tuple(losses),
            tuple(seconds),
            self.num_parameters,
            heldout,
            saved,
            stopped_by,
            self.kept,
            step - updates,
        )

    def _skip(self, step: int, what: str, in_a_row: int, in_all: int) -> None:
        """Say that a step was not finite and made no update; one too many in a row is a TrainingError."""
        most = self.config.training.max_nonfinite_steps
        if in_a_row > most:
            many = f"; {in_a_row} in a row <= training.max_nonfinite_steps ({most}) does not hold"
            raise TrainingError(f"{what} and nothing was saved{many if most else ''}")
        if self.metrics is not None:
            self.metrics.skipped(step + 1, f"{what} ({in_a_row} in a row, at most {most})", in_all)

    def _step(self, step: int, batches: list[Batch], stop: StopRequest) -> _StepResult:
        """One optimizer step; it changes nothing if its loss or gradient is not finite."""
        self.watch.at(step + 1, "forward and backward")
        parallel, training = self.config.parallel, self.config.training
        valid = self.mesh.put(sum((batch.labels != IGNORE).sum() for batch in batches).double())
        dist.all_reduce(valid)
        seed = derive_seed(training.seed, step)
        total = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        losses = (
            loss_sum
            for batch in batches
            for loss_sum in streamed_losses(
                self.engine, self.mesh, batch, parallel, seed, training.chunk_tokens, self.placement
            )
        )
        last = len(batches) * num_chunks(training) - 1
        for number, loss_sum in enumerate(losses):
            self.watch.at(step + 1, "forward and backward")
            total += loss_sum.detach()
            self.engine.backward(loss_sum, valid.to(loss_sum.dtype))
            if number < last:
                self.engine.step(step)
        self.watch.at(step + 1, "update")
        asked = torch.tensor([stop.number == number for number in STOP_SIGNALS], dtype=torch.float64)
        sums = torch.cat([total, self.mesh.put(asked)])  # loss, and ranks that got each signal
        dist.all_reduce(sums)
        mean = sums[0] / valid.clamp(min=1)
        self.engine.step(step, mean)
        norm = self.engine.gradient_norm()
        # the step's only wait for the device
        loss, tokens, norm, *asked = torch.stack([mean, valid, norm.double(), *sums[1:]]).tolist()
        not_finite = None
        for name, value in (("gradient norm", norm), ("loss", loss)):
            if not math.isfinite(value):
                not_finite = f"the {name} is {value}"
        if not_finite is not None:
            where = self._where(step, total)
            not_finite = f"step {step + 1}: {not_finite}, {where}; the update was not made"
        signals = [number.name for number, ranks in zip(STOP_SIGNALS, asked, strict=True) if ranks]
        return _StepResult(loss, int(tokens), norm, signals[0] if signals else None, not_finite)

    def _where(self, step: int, loss_sum: torch.Tensor) -> str:
        """The ranks whose own loss is not finite, all if there is none, and their sequences; collective."""
        own = (bool(loss_sum.isfinite()), self.loader.sequences(step))
        gathered: list = [None] * self.mesh.world_size
        dist.all_gather_object(gathered, own)
        ranks = [rank for rank, (finite, _) in enumerate(gathered) if not finite]
        sequences = sorted({number for rank in ranks or range(len(gathered)) for number in gathered[rank][1]})
        where = f"on ranks {ranks}" if ranks else "with a finite loss on every rank"
        return f"{where}, in sequences {sequences}"

    def _is_measured(self, step: int) -> bool:
        """Whether held-out data are measured after so many steps."""
        t = self.config.training
        return step >= t.steps or (t.eval_every > 0 and step % t.eval_every == 0)

    def _heldout_data(self) -> str | None:
        """Which held-out data the run measures."""
        return None if self.heldout_loader is None else self.heldout_loader.index.fingerprint

    def _heldout_loss(self, step: int) -> float | None:
        """Measure the held-out loss after `step` steps; None without held-out data."""
        if self.heldout_loader is None:
            return None
        loss = heldout_loss(
            self.engine,
            self.mesh,
            self.heldout_loader,
            self.config.parallel,
            self.config.training.chunk_tokens,
            self.placement,
            lambda: self.watch.at(step, "evaluation"),
        )
        self.watch.at(step, None)
        if self.metrics is not None:
            self.metrics.heldout(step, loss)
        return loss

    def _save(
        self, counts: dict[str, int], heldout: float | None, heldout_step: int, last: bool
    ) -> Path | None:
        """Write a checkpoint; a failure is said and survived, unless it is the last."""
        state = {
            **counts,
            "heldout_loss": heldout,
            "heldout_step": heldout_step,
            "config": self.config.to_dict(),
            "data": self.index.fingerprint,
            "heldout_data": self._heldout_data(),
            "end_of_text": self.index.end_of_text,
            "versions": _versions(),
        }
        keep = self.config.training.keep_checkpoints
        if self.metrics is not None:
            self.metrics.flush()  # what comes before a checkpoint is not made again
        try:
            return checkpoints.save(
                self.engine,
                self.config.run_dir,
                state,
                self.index.tokenizer,
                keep,
                lambda writes: self.watch.at(counts["step"], "checkpoint" if writes else None),
            )
        except checkpoints.CheckpointError as failure:
            if last:
                raise
            if self.metrics is not None:
                self.metrics.say(f"warning: {failure}; training goes on")
            return None
