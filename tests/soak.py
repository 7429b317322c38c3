"""Kills random ranks of a training run at random moments; it must end as an undisturbed one, bit for bit.

    .venv/bin/python tests/soak.py --kills 100 --seed 0      from the top of the repository

Ranks are forked from a server that has imported everything, so that a restart takes seconds. As torchrun
does, the script sends SIGTERM to the other ranks when one has failed, kills those that do not end, and starts
all of them again, from the last checkpoint. One rank gets SIGKILL, so many times in all; or, in between,
SIGSTOP, or SIGTERM, after which the run saves and ends by itself; at the start, in a step, or in a save while
its files are written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import yaml
from corpus import prepare_speeches
from distributed import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import config_for

from pi_dist.config import Config
from pi_dist.training.checkpoint import directory, find_newest

SIGNALS = {"SIGKILL": 6, "SIGTERM": 2, "SIGSTOP": 2}  # and how often, in proportion
PHASES = {"start": 1, "step": 2, "save": 2}
STEPS_PER_KILL = 9  # of the whole run: more than attempts get ahead on average between two SIGKILL
TIMEOUT_S = 5.0  # parallel.timeout_s
PATIENCE_S = 30.0  # with ranks that do not end
ATTEMPT_S = 1800.0  # the longest that an attempt may take


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was done to which rank, in which phase of the run, and what came of it.

    `seconds`: until all ranks had ended. `forced`: ranks that did not end and were killed in the end.
    """

    signal: str
    phase: str
    rank: int
    seconds: float
    forced: tuple[int, ...]


class Attempt:
    """All ranks of a run, started once; a context manager, after which none is left.

    `enter(rank)`, in the rank's process, makes it one of another host; it returns what the environment is
    there.
    """

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        world_size: int,
        log: Path,
        enter: Callable[[int], dict[str, str]] | None = None,
    ) -> None:
        multiprocessing.set_forkserver_preload(["tests_preload", "pi_dist.cli"])
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the fork server's
        self.log, self._checkpoints, self._began = log, directory(run_dir), time.time()
        context = multiprocessing.get_context("forkserver")
        arguments = (world_size, free_port(), str(config), str(log), enter)
        self.ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world_size)]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    @property
    def steps(self) -> int:
        """Steps that this attempt has done."""
        return len(re.findall(r"^step \d+/", self.log.read_text(), re.M)) if self.log.exists() else 0

    @property
    def saving(self) -> bool:
        """Whether files of a checkpoint are being written; a killed attempt may have left some."""
        with contextlib.suppress(FileNotFoundError):
            return any(p.stat().st_mtime > self._began for p in self._checkpoints.glob(".step-*.building"))
        return False

    @property
    def phase(self) -> str:
        """start, step or save."""
        return "save" if self.saving else "step" if self.steps else "start"

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]

    def until(self, holds: Callable[[], bool]) -> bool:
        """Wait until it holds; False if a rank ends before."""
        while len(self.running()) == len(self.ranks):
            if holds():
                return True
            time.sleep(0.002)
        return False

    def join(self) -> tuple[int, ...]:
        """Wait for all ranks, the way torchrun does; returns those that had to be killed."""
        deadline = time.monotonic() + ATTEMPT_S
        while running := self.running():
            wait([self.ranks[rank].sentinel for rank in running], timeout=1.0)
            if any(process.exitcode for process in self.ranks):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {running} run on:\n{self.log.read_text()}")
        deadline = time.monotonic() + PATIENCE_S
        for rank in self.running():
            self.ranks[rank].terminate()
        while (running := self.running()) and time.monotonic() < deadline:
            wait([self.ranks[rank].sentinel for rank in running], timeout=1.0)
        for rank in running:
            self.ranks[rank].kill()
        for process in self.ranks:
            process.join()
        return tuple(running)


def _rank(
    rank: int,
    world_size: int,
    port: int,
    config: str,
    log: str,
    enter: Callable[[int], dict[str, str]] | None,
) -> None:
    """`pi-dist train`, as a launcher starts it."""
    from pi_dist.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in other processes
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    if enter is not None:
        os.environ |= enter(rank)
    main(["train", "--config", config])


def _drawn(generator: random.Random, weights: dict[str, int]) -> str:
    return generator.choices(list(weights), list(weights.values()))[0]


def _strike(attempt: Attempt, generator: random.Random, start_s: float) -> Kill | None:
    """Wait for a random moment, hit a random rank, wait for the end; None if the ranks had ended before."""
    wanted, name = _drawn(generator, PHASES), _drawn(generator, SIGNALS)
    rank, steps, delay = generator.randrange(len(attempt.ranks)), generator.randint(1, 8), generator.random()
    moments = {"start": lambda: True, "step": lambda: attempt.steps >= steps, "save": lambda: attempt.saving}
    if not attempt.until(moments[wanted]):
        return None
    time.sleep(delay * (start_s if wanted == "start" else 0.1))
    phase, began = attempt.phase, time.monotonic()
    if attempt.ranks[rank].exitcode is not None:
        return None
    os.kill(attempt.ranks[rank].pid, signal.Signals[name])
    forced = attempt.join()
    return Kill(name, phase, rank, time.monotonic() - began, forced)


def _losses(config: Config) -> dict[int, float]:
    """The loss of every step, as TensorBoard shows it; of a step made again the later one's."""
    events = EventAccumulator(f"{config.run_dir}/tensorboard")
    events.Reload()
    return {point.step: point.value for point in events.Scalars("train/loss")}


def _state(config: Config) -> dict[str, str]:
    """SHA-256 of the weights and of the optimizer's moments at the end."""
    path = directory(config.run_dir) / f"step-{config.training.steps:08d}" / "manifest.json"
    files = yaml.safe_load(path.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def newest_step(run_dir: str) -> int:
    """The step of a run's newest checkpoint by its name, unread; 0 if there is none."""
    names = [path.name for path in directory(run_dir).glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def soak(
    corpus: Path, folder: Path, kills: int, seed: int, world_size: int, say: Callable[[str], None]
) -> list[Kill]:
    """Train one run undisturbed and one with so many SIGKILL, and other signals in between; returns all.

    Raises:
        AssertionError: the two differ in a weight, a moment or a loss; or a kill left a damaged checkpoint,
            or a rank that was not hit did not end by itself.
    """
    generator = random.Random(seed)
    configs = [
        config_for(
            corpus,
            folder / name,
            sp=world_size,
            steps=kills * STEPS_PER_KILL,
            workers=1,
            context=64 * world_size,
            batch_size=2,
            eval_every=10,
            save_every=4,
            log_every=1,
        )
        for name in ("undisturbed", "killed")
    ]
    configs = [
        dataclasses.replace(c, parallel=dataclasses.replace(c.parallel, timeout_s=TIMEOUT_S)) for c in configs
    ]
    for config in configs:
        Path(f"{config.run_dir}.yaml").write_text(yaml.safe_dump(config.to_dict()))

    def attempt(config: Config, number: int = 0) -> Attempt:
        log = Path(f"{config.run_dir}-{number:04d}.log")
        return Attempt(Path(f"{config.run_dir}.yaml"), Path(config.run_dir), world_size, log)

    whole, disturbed = configs
    began = time.monotonic()
    with attempt(whole) as run:
        assert run.until(lambda: run.steps > 0), run.log.read_text()
        start_s = time.monotonic() - began
        run.join()
        assert newest_step(whole.run_dir) == whole.training.steps, run.log.read_text()
    say(
        f"undisturbed: {whole.training.steps} steps in {time.monotonic() - began:.0f} s, "
        f"{start_s:.1f} s to start"
    )
    done: list[Kill] = []

    def left() -> int:
        return kills - sum(kill.signal == "SIGKILL" for kill in done)

    number = 0
    while newest_step(disturbed.run_dir) < disturbed.training.steps:
        with attempt(disturbed, number) as run:
            kill = _strike(run, generator, start_s) if left() else None
            if kill is None:
                run.join()
                assert newest_step(disturbed.run_dir) == disturbed.training.steps, run.log.read_text()
                break
        number += 1
        done.append(kill)
        found, refused = find_newest(disturbed.run_dir)
        reached = 0 if found is None else found.step
        say(
            f"{len(done):4}: {kill.signal} to rank {kill.rank} in {kill.phase}, ended in {kill.seconds:.1f} s"
            f"{f', killed {list(kill.forced)}' if kill.forced else ''}; step {reached} is saved"
        )
        assert not refused, refused
        assert set(kill.forced) <= ({kill.rank} if kill.signal == "SIGSTOP" else set()), run.log.read_text()
    assert not left(), f"the run ended with {left()} of {kills} kills left"
    assert _state(whole) == _state(disturbed), "weights or moments differ"
    assert _losses(whole) == _losses(disturbed) and len(_losses(whole)) == whole.training.steps, (
        "losses differ"
    )
    return done


def table(kills: list[Kill]) -> str:
    """Signals by kind and phase: how many, and the median and the longest time until all ranks had ended."""
    groups: dict[tuple[str, str], list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[kill.signal, kill.phase].append(kill)
    lines = ["signal   phase  times  seconds to the end: median, most"]
    for (name, phase), group in sorted(groups.items()):
        seconds = [kill.seconds for kill in group]
        lines.append(
            f"{name:8} {phase:6} {len(group):5}  {statistics.median(seconds):.1f}, {max(seconds):.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; other signals come in between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=3)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        corpus = prepare_speeches(Path(folder))
        kills = soak(
            corpus,
            Path(folder),
            arguments.kills,
            arguments.seed,
            arguments.ranks,
            lambda text: print(text, flush=True),
        )
    print(table(kills))
    others = len(kills) - arguments.kills
    print(
        f"{arguments.kills} kills of {arguments.ranks} ranks and {others} other signals, "
        f"seed {arguments.seed}, {time.monotonic() - began:.0f} s: "
        "weights, moments and losses are those of an undisturbed run"
    )


if __name__ == "__main__":
    main()
