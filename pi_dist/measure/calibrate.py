"""`pi-dist calibrate`: the constants of `step_model`, fitted to steps that this machine's GPU makes.

Steps of one rank are measured by `fake_ranks` at a few sizes and methods. The GPU's time is linear in its
constants, and so is memory; both fits minimize the squares of relative errors over constants >= 0.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pi_dist.config import Config, Method, UserError, num_chunks
from pi_dist.measure.fake_ranks import Request, typical_rank
from pi_dist.measure.profile import Profile, attention_costs, load_profile, profile_names, write_profile
from pi_dist.measure.record import RANK, device_name, kept_records, resume, write
from pi_dist.measure.savings import Terms, config_of
from pi_dist.measure.step_model import MIB, compute_seconds, gpu_seconds, memory, work
from pi_dist.measure.workers import OUT_OF_MEMORY, Worker

GPU_CONSTANTS = 3  # of a step's time: of what moves tensors, of layers, of exact attention
TERMS = Terms(chunk_tokens=2048)  # short enough that the host paces what no graph launches
# method, streamed, tokens, ranks: each constant stands out in some of them
_POINTS: tuple[tuple[Method, bool, int, int], ...] = (
    ("pi", False, 32768, 1),
    ("dense", False, 32768, 1),
    ("pi", True, 65536, 1),
    ("pi", False, 131072, 1),
    ("dense", False, 8192, 1),
    ("window", False, 65536, 1),
    ("ring", False, 131072, 4),
    ("pi", False, 131072, 4),
)


def points(presets: Sequence[str]) -> Iterator[tuple[str, Method, bool, int, int]]:
    """(preset, method, streamed, tokens, ranks) of the steps."""
    for preset, (method, streamed, context, ranks) in itertools.product(presets, _POINTS):
        yield preset, method, streamed, context, ranks


def least_squares(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 [c] with the least |columns·x - target|², columns [r, c]; few columns: every subset is tried."""
    best, least = np.zeros(columns.shape[1]), float(np.sum(target**2))
    for size in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            part, *_ = np.linalg.lstsq(columns[:, chosen], target, rcond=None)
            left = float(np.sum((columns[:, chosen] @ part - target) ** 2))
            if np.all(part >= 0) and left < least * (1 - 1e-9):
                best, least = np.zeros(columns.shape[1]), left
                best[list(chosen)] = part
    return best


def fit_time(profile: Profile, jobs: list[tuple[Config, int, float]]) -> Profile:
    """The profile with the constants of time that fit (config, ranks, seconds without communication) best.

    Steps in chunks that the host paces tell of it alone. Which those are is tried: none, then the one with
    the least work a launch, and so on.
    """

    def work_of_a_launch(job: tuple[Config, int, float]) -> float:
        if num_chunks(job[0].training) == 1:
            return math.inf
        done = work(job[0], job[1], profile)
        return gpu_seconds(done, profile) / done.launched_layers

    def error(found: Profile) -> float:
        times = ((compute_seconds(work(config, ranks, found), found), s) for config, ranks, s in jobs)
        return sum((time / seconds - 1) ** 2 for time, seconds in times)

    jobs = sorted(jobs, key=work_of_a_launch)
    found = []
    can_be_paced = sum(work_of_a_launch(job) < math.inf for job in jobs)
    for paced in range(min(can_be_paced, len(jobs) - GPU_CONSTANTS - 1) + 1):
        launched = [
            1e6 * s / work(config, ranks, profile).launched_layers for config, ranks, s in jobs[:paced]
        ]
        host_us = statistics.fmean(launched) if launched else 0.0
        found.append(replace(fit_gpu(profile, jobs[paced:]), host_layer_us=host_us))
    best = min(found, key=error)
    # without a step that tells of the host, as it was
    return best if best.host_layer_us else replace(best, host_layer_us=profile.host_layer_us)


def fit_gpu(profile: Profile, jobs: list[tuple[Config, int, float]]) -> Profile:
    """The constants of the GPU's time, from steps that the host does not pace.

    That of products is given: the same tokens are multiplied and moved, so steps do not tell them apart.
    """
    rows, target = [], []
    for config, ranks, seconds in jobs:
        done = work(config, ranks, profile)
        exact = gpu_seconds(
            replace(done, matmul_flops=0, moved_bytes=0, layers=0, fixed_seconds=0), profile
        )  # in the ratio of forward and backward that the profile has
        products = done.matmul_flops / (profile.matmul_share * profile.matmul_flops_per_s)
        parts = (done.moved_bytes / profile.copy_bytes_per_s, 1e-6 * done.layers, exact)
        rows.append([part / seconds for part in parts])
        target.append(1 - (products + done.fixed_seconds) / seconds)
    moves, layer_us, exact = least_squares(np.array(rows), np.array(target))
    return replace(
        profile,
        block_moves=float(moves),
        gpu_layer_us=float(layer_us),
        exact_forward_flops_per_s=profile.exact_forward_flops_per_s / (float(exact) or 1.0),
        exact_backward_flops_per_s=profile.exact_backward_flops_per_s / (float(exact) or 1.0),
    )


def fit_memory(profile: Profile, jobs: list[tuple[Config, int, float]]) -> Profile:
    """The profile with the block_copies and fixed_mib that fit (config, ranks, peak MiB) best.

    Memory is linear in both, but for the steps whose peak is not in an MLP, where block_copies say nothing;
    which these are depends on it, so the fit is repeated.
    """
    tried: set[float] = set()
    while profile.block_copies not in tried:
        tried.add(profile.block_copies)
        rows, target = [], []
        for config, ranks, peak in jobs:
            at, above = (
                memory(config, ranks, replace(profile, block_copies=copies, fixed_mib=0.0)).total
                for copies in (profile.block_copies, profile.block_copies + 1e-3)
            )
            slope = (above - at) / 1e-3
            rows.append([slope / peak, 1 / peak])
            target.append(1 - (at - slope * profile.block_copies) / peak)
        copies, fixed = least_squares(np.array(rows), np.array(target))
        profile = replace(profile, block_copies=round(float(copies), 6), fixed_mib=float(fixed))
    return profile


def jobs_of(record: dict[str, Any], value: str) -> list[tuple[Config, int, float]]:
    """(config, ranks, row[value]) of every step in a record of `calibrate` that has it."""
    jobs = []
    for row in record["rows"]:
        if row["status"] == "ok" and row[value] is not None:
            what = (row["preset"], row["method"], row["streamed"], row["context"], row["world_size"])
            jobs.append((config_of(*what, TERMS), row["world_size"], row[value]))
    return jobs


def fitted(profile: Profile, record: dict[str, Any], source: str) -> Profile:
    """The profile with constants from a record, its ceilings included.

    Raises:
        UserError: fewer steps than constants.
    """
    times = [(config, ranks, ms / 1e3) for config, ranks, ms in jobs_of(record, "ms")]
    least = GPU_CONSTANTS + 2  # of which the host paces one
    if len(times) < least:
        raise UserError(f"calibrate: measured steps ({len(times)}) >= {least} does not hold")
    settings = record["settings"]
    rates = {name: settings[name] for name in ("copy_bytes_per_s", "matmul_flops_per_s", "memory_mib")}
    found = fit_memory(fit_time(replace(profile, **rates), times), jobs_of(record, "peak_mib"))
    names = [*rates, "block_moves", "gpu_layer_us", "exact_forward_flops_per_s",
             "exact_backward_flops_per_s", "block_copies", "fixed_mib"]  # fmt: skip
    if found.host_layer_us != profile.host_layer_us:
        names.append("host_layer_us")
    return replace(found, sources=profile.sources | dict.fromkeys(names, source))


def describe_fit(profile: Profile, record: dict[str, Any]) -> str:
    """Every measured step beside the prediction of the fitted profile."""
    lines = ["step                                            measured     predicted   error"]
    for unit, key in (("ms", "ms"), ("MiB", "peak_mib")):
        for config, ranks, value in jobs_of(record, key):
            if unit == "ms":
                predicted = 1e3 * compute_seconds(work(config, ranks, profile), profile)
            else:
                predicted = memory(config, ranks, profile).total
            t, m = config.training, config.model
            what = f"{m.num_layers:>2} layers {m.method:<8}{' chunks' if t.chunk_tokens else ''}"
            what += f" {t.context:>8,} on {ranks}"
            lines.append(
                f"{what:<42} {value:>10,.1f} {unit:<3} {predicted:>10,.1f}  {predicted / value - 1:+.1%}"
            )
    return "\n".join(lines)


def _base(device: str) -> Profile:
    """A profile to start from: the shipped one of this GPU, else the H100's under the device's name."""
    for name in profile_names():
        profile = load_profile(name)
        if device == profile.device:
            return profile
    h100 = load_profile("H100")
    sources = {name: f"the H100's ({source})" for name, source in h100.sources.items()}
    return replace(h100, name=device, device=device, sources=sources)


def calibrate(profile_path: str, record_path: str, presets: Sequence[str], minutes: float) -> str:
    """Measure what the record at `record_path` lacks, write the fitted profile; returns the fit in words.

    Raises:
        UserError: there is no GPU, or too little could be measured.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "calibrate: GPUs of this machine (0) >= 1 does not hold; savings --predict needs none"
        )
    from pi_dist.measure.kernel_bench import ceilings

    until = time.monotonic() + 60 * minutes
    copy, matmul = ceilings()
    torch.cuda.empty_cache()
    settings = {
        "copy_bytes_per_s": float(round(copy)),
        "matmul_flops_per_s": float(round(matmul)),
        "memory_mib": round(torch.cuda.get_device_properties(0).total_memory / MIB, 1),
        "data": "random tokens",
    }
    record = resume(record_path, settings, RANK)
    known = {tuple(row[key] for key in _KEYS) for row in record["rows"]}
    left = [point for point in points(presets) if point not in known]
    with Worker() as worker:
        for point in left:
            seconds = until - time.monotonic()
            if seconds <= 0:
                break
            empty = {"ms": None, "peak_mib": None}
            row = dict(zip(_KEYS, point, strict=True)) | empty | worker.ask(_request(point), seconds)
            if row["status"] in ("ok", OUT_OF_MEMORY):  # what had no time is measured the next time
                record["rows"].append(row)
                write(record, record_path)
            print(_line(row), flush=True)
    base = _base(device_name())
    for kernels in kept_records().values():
        if "floor_ms" in kernels["rows"][0] and kernels["device"] == base.device:
            base = replace(base, attention=attention_costs(kernels))
    profile = fitted(base, record, f"fitted to {record_path.rsplit('/', 1)[-1]}")
    write_profile(profile, profile_path)
    return f"{describe_fit(profile, record)}\nwritten to {profile_path}"


def _request(point: tuple[str, Method, bool, int, int]) -> Request:
    config, ranks = config_of(*point, TERMS), point[-1]
    return Request(config, ranks, typical_rank(config, ranks), timed_steps=3, forward_too=False)


_KEYS = ("preset", "method", "streamed", "context", "world_size")


def _line(row: dict[str, Any]) -> str:
    what = f"{row['preset']:<7} {row['method']:<8} {'chunks' if row['streamed'] else '':<7}"
    what += f"{row['context']:>9,} on {row['world_size']}"
    if row["status"] != "ok":
        return f"{what}  {row['status']}"
    return f"{what}  {row['ms']:10.1f} ms {row['peak_mib']:10,.0f} MiB"
