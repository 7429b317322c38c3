"""What surviving faults costs: a save and a restart, their hashes, and the watchdog in every step."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pi_dist.config import Config, ParallelConfig, TrainingConfig, check
from pi_dist.data.shards import sha256_of
from pi_dist.measure.record import device_name, versions
from pi_dist.measure.steps import WIDE, Steps, check_presets, model_of
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.mesh import make_mesh
from pi_dist.parallel.process_group import of_rank_zero, start
from pi_dist.training import checkpoint as checkpoints
from pi_dist.training.deepspeed_engine import Engine
from pi_dist.training.watchdog import SECTIONS, Watchdog

_REPEATS = 5
_CALLS = 1000


def _median(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(preset: str, context: int, device_choice: str, directory: str) -> dict:
    """Seconds of saving and loading the preset's state on the file system of `directory`; collective.

    Sequences of `context` random tokens are split over all ranks of the launcher, ZeRO 1.

    Returns:
        step_s, save_s, hash_s (SHA-256 of all its files), load_s, restart_s (both), medians over 5 of rank 0;
        watchdog_step_s: what it adds to a step of the main thread; beat_s, every beat_every_s in its thread;
        checkpoint_bytes; grace_s, of a preemption: a step and a save, and as much again for what varies.

    Raises:
        ConfigError: the preset cannot be split over so many ranks.
        OSError: on every rank, where `directory` takes no files.
    """
    check_presets("bench faults", [preset])
    timeout_s = ParallelConfig().timeout_s
    device = start(device_choice, timeout_s)
    world_size = dist.get_world_size()
    config = Config(
        model=model_of(preset, **WIDE),
        parallel=ParallelConfig(sp_degree=world_size, zero_stage=1, device=device_choice),
        training=TrainingConfig(
            context=context,
            batch_size=1,
            micro_batch_size=1,
            precision="bf16" if device.type == "cuda" else "fp32",
        ),
    )
    check(config, world_size)
    mesh = make_mesh(world_size, device)
    model = PiTransformer.of_run(config, device.type)
    parameters = model.num_parameters()
    engine = Engine(model, config, mesh)
    steps = Steps(engine, mesh, config)
    folder = Path(of_rank_zero(lambda: tempfile.mkdtemp(prefix=".faults-", dir=directory), OSError))
    saved: list[Path] = []

    def save() -> None:
        state = {"step": len(saved) + 1, "config": config.to_dict()}
        saved.append(checkpoints.save(engine, folder, state, b"{}", keep=1))

    def one_step() -> None:
        steps.one()
        if device.type == "cuda":
            torch.cuda.synchronize()

    try:
        one_step()
        step_s = _median(one_step)
        save_s = _median(save)
        files = sorted(saved[-1].iterdir())
        hash_s = _median(lambda: [sha256_of(path) for path in files])
        found = checkpoints.verify(saved[-1])
        load_s = _median(lambda: checkpoints.load(engine, found))
        watch = Watchdog(folder / "stacks", timeout_s, None)
        beat_s = _median(watch.beat)
        with watch:
            began = time.perf_counter()
            for number in range(_CALLS):
                for section in (*SECTIONS, None):
                    watch.at(number, section)
            watchdog_s = (time.perf_counter() - began) / _CALLS
        size = sum(path.stat().st_size for path in files)
    finally:
        dist.barrier()
        if mesh.rank == 0:
            shutil.rmtree(folder)
    return {
        "device": device_name(),
        "versions": versions(),
        "preset": preset,
        "context": context,
        "ranks": world_size,
        "parameters": parameters,
        "checkpoint_bytes": size,
        "step_s": step_s,
        "save_s": save_s,
        "hash_s": hash_s,
        "load_s": load_s,
        "restart_s": hash_s + load_s,
        "watchdog_step_s": watchdog_s,
        "beat_s": beat_s,
        "beat_every_s": watch.interval_s,
        "grace_s": 2 * (step_s + save_s),
    }


def describe(cost: dict) -> str:
    """The figures of `measure` for a person."""
    c, size = cost, cost["checkpoint_bytes"] / 1e6
    return "\n".join(
        [
            f"{c['preset']}, {c['parameters']:,} parameters, {c['ranks']} ranks on {c['device']}; "
            f"a step at a context of {c['context']:,}: {c['step_s']:.3g} s",
            f"save      {c['save_s']:.3g} s, {size:,.0f} MB at {size / c['save_s']:,.0f} MB/s; "
            f"SHA-256 of all files, by one process: {c['hash_s']:.3g} s",
            f"restart   {c['restart_s']:.3g} s to check and load it, once the processes have started",
            f"grace     {c['grace_s']:.3g} s: a step and a save, and as much again (pi-dist submit --grace)",
            f"watchdog  {c['watchdog_step_s'] * 1e6:.3g} µs a step, "
            f"{c['watchdog_step_s'] / c['step_s']:.1e} of it; a beat of {c['beat_s'] * 1e3:.2g} ms "
            f"every {c['beat_every_s']:g} s in its thread",
        ]
    )
