"""Measured results as data: one JSON record per command, one flat row per measurement."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pi_dist.config import Config, UserError, compiles, num_chunks, replays_graphs
from pi_dist.data.shards import ShardIndex
from pi_dist.measure.reach import report
from pi_dist.model.flops import (
    keys_flops_per_token,
    recomputed_flops_per_token,
    training_flops_per_token,
)

if TYPE_CHECKING:
    from pi_dist.training.trainer import Outcome


# dense bf16 matrix FLOP/s by the vendors' data sheets, by the device's name: other forms have other rates
PEAK_BF16 = dict.fromkeys(("NVIDIA H200", "NVIDIA H100 80GB HBM3"), 989e12) | dict.fromkeys(
    ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    312e12,
)
WARM_UP_STEPS = 5
ATTENTION_KERNELS = (
    *("kernels/pi_attention_*.py", "kernels/gradients.py", "kernels/tiles.py", "kernels/block_sizes.*"),
    *("ops/triton_bands.py", "ops/triton_launches.py", "ops/triton_backend.py"),
)
STEP = (
    *("kernels/*.*", "ops/*.py", "model/*.py", "parallel/*.py", "training/cuda_graph.py"),
    *("training/deepspeed_engine.py", "training/optimizer.py", "training/streaming.py"),
)
RANK = (*STEP, "measure/fake_ranks.py", "measure/stand_ins.py")  # a step of one rank, alone
PREDICTION = ("measure/cost_model.py", "measure/profile.py", "measure/step_model.py")


def device_name() -> str:
    """The GPU's name, or the processor's kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()})"


def device_type(config: Config) -> str:
    """Of the device that a run takes here."""
    return "cuda" if torch.cuda.is_available() and config.parallel.device != "cpu" else "cpu"


def step_row(
    config: Config,
    world_size: int,
    seconds: float,
    num_parameters: int | None,
    predicted_on: str | None = None,
) -> dict:
    """What every row about training steps has; predicted_on: the GPU of a prediction, which is not here.

    Memory is this rank's peak since the statistics were last reset, in MiB; what is allocated does not count
    passes that are replayed, what is reserved does. mfu is a share of the data
    sheet's dense bf16 rate, null where that is not known; hfu counts what is recomputed too. seconds: of one
    optimizer step.
    """
    t, model = config.training, config.model
    tokens = t.context * t.batch_size
    device = predicted_on or device_name()
    peak = PEAK_BF16.get(device)
    flops = training_flops_per_token(model, t.context)
    recomputed = 0.0
    if t.activation_checkpointing is True:
        recomputed += recomputed_flops_per_token(model, t.context)
    if num_chunks(t) > 1:  # all chunks but the last make their keys first
        recomputed += keys_flops_per_token(model, t.context) * (1 - t.chunk_tokens / t.context)
    rate = tokens / seconds / world_size / peak if peak and t.precision == "bf16" else None
    reach = report(model, t.context)
    kind = "cuda" if predicted_on else device_type(config)
    here = kind == "cuda" and not predicted_on
    return {
        "method": "+".join(dict.fromkeys(model.methods)),
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_parameters": num_parameters,
        "window": model.window,
        "stride": model.stride,
        "num_skips": model.num_skips,
        "tokens": t.context,
        "batch": t.batch_size,
        "sp_degree": config.parallel.sp_degree,
        "world_size": world_size,
        "zero_stage": config.parallel.zero_stage,
        "precision": t.precision,
        "activation_checkpointing": t.activation_checkpointing,
        "chunk_tokens": t.chunk_tokens,
        "compiled": compiles(config, kind),
        "exchange": config.parallel.exchange,
        "overlap": config.parallel.overlap,
        "ms": round(seconds * 1e3, 2),
        "tokens_per_s": round(tokens / seconds),
        "mfu": round(flops * rate, 4) if rate else None,
        "hfu": round((flops + recomputed) * rate, 4) if rate else None,
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1) if here else None,
        "reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20, 1) if here else None,
        "reach": reach.reach_in_context,
        "covered_share": reach.covered_share,
        "measured": not predicted_on,
    }


def training_record(path: str) -> dict:
    """The record of training runs at `path`, or a fresh one.

    Raises:
        UserError: it is of another device or of other versions, or of something else.
    """
    record = resume(path, {})
    if any("heldout_loss" not in row for row in record["rows"]):
        raise UserError(f"{path}: not a record of `pi-dist train`")
    return record


def add_training_run(path: str, config: Config, world_size: int, outcome: Outcome) -> None:
    """Add a row of one training run to the record at `path`; its time is the median without the first steps.

    Those are five, or half of a short run; the first of them compiles. The run must have made a step. Losses
    are finite ones. text_tokens are those of the training text: with "join", a context of more repeats it.

    Raises:
        UserError: see `training_record`.
    """
    t, record = config.training, training_record(path)
    losses = [loss for loss in outcome.losses if math.isfinite(loss)] or [None]
    seconds = statistics.median(outcome.step_seconds[min(WARM_UP_STEPS, len(outcome.step_seconds) // 2) :])
    row = step_row(config, world_size, seconds, outcome.num_parameters) | {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "heldout_loss": outcome.heldout_loss,
        "packing": config.data.packing,
        "text_tokens": ShardIndex.open(config.data.train).num_tokens,
        "kept_rows": outcome.kept and ("host" if outcome.kept.host else "device"),
        "kept_mib": outcome.kept and round(outcome.kept.size.rows / 2**20, 1),
        "host_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        "replays": replays_graphs(config, device_type(config)),
        "steps": len(outcome.step_seconds),
        "seed": t.seed,
        "data": Path(config.data.train).parent.name,
        "command": _command(),
    }
    record["rows"].append(row)
    write(record, path)


def _command() -> str:
    return " ".join(["pi-dist", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of what a figure depends on; of the attention kernels, a hash of their files."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    found["kernels"] = source_hash(ATTENTION_KERNELS)
    for package in ("torch", "triton", "deepspeed", "pi-dist"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def source_hash(names: tuple[str, ...]) -> str:
    """The beginning of the SHA-256 of files of this package, by patterns."""
    folder = Path(__file__).parents[1]
    paths = sorted({path for name in names for path in folder.glob(name) if path.suffix != ".pyc"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def resume(path: str | None, settings: dict, source: tuple[str, ...] = ()) -> dict:
    """The record at `path`, to go on with, or a fresh one with these settings, also where there is no path.

    Args:
        source: files that its figures depend on, by patterns; their hash is a setting.

    Raises:
        UserError: it is no record, or one of another device, of other versions or of another source.
    """
    if source:
        settings = settings | {"source": source_hash(source)}
    fresh = {
        "command": _command(),
        "device": device_name(),
        "versions": versions(),
        "settings": settings,
        "rows": [],
    }
    if path is None or not Path(path).exists():
        return fresh
    try:
        record = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a record: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a record: type ({type(record).__name__}) == object does not hold")
    for key in ("device", "versions"):
        if record.get(key) != fresh[key]:
            raise UserError(
                f"{path}: {key} of the record ({record.get(key)}) == here ({fresh[key]}) does not hold"
            )
    rows = record.get("rows")
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    for holds, equation in (
        (isinstance(record.get("settings"), dict), "type of settings == object"),
        (listed, "type of rows == list of objects"),
    ):
        if not holds:
            raise UserError(f"{path}: not a record: {equation} does not hold")
    theirs = record["settings"].get("source")
    if source and theirs != settings["source"]:
        raise UserError(
            f"{path}: source of the record ({theirs}) == here ({settings['source']}) does not hold"
        )
    return record


def write(record: dict, path: str) -> None:
    """Write a record as JSON, a row a line; a kill while it writes leaves the former one."""
    lists = {key: record[key] for key in ("points", "rows") if key in record}
    text = json.dumps({key: value for key, value in record.items() if key not in lists}, indent=1)[:-2]
    for key, rows in lists.items():
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text += f',\n "{key}": [\n{lines}\n ]'
    part = Path(f"{path}.part")
    part.write_text(f"{text}\n}}\n")
    part.replace(path)


def kept_records() -> dict[str, dict]:
    """The records that ship with the package, by name."""
    folder = Path(__file__).parent / "records"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
