"""Checkpoints that are either whole or not there, independent of the number of ranks and of the ZeRO stage.

A checkpoint is a directory `step-00000100`: fp32 weights (`model.safetensors`, also the exported model),
AdamW moments by parameter name (`optimizer-*.safetensors`, one file a rank), `state.json`, `tokenizer.json`
and `manifest.json` with the SHA-256 of every file and of itself. It is written beside its place, synced, and
renamed into it. Nothing in it is ever unpickled; a file that differs from the manifest by one bit is refused
by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pi_dist.config import Config, ConfigError, UserError
from pi_dist.data.shards import fsync, sha256_of
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.process_group import rank_from_launcher
from pi_dist.training.deepspeed_engine import MOMENTS, Engine

FORMAT = 1
# what the state or the order of the data depends on: another value would silently be another run
_FIXED = (
    "model.",
    "data.packing",
    "data.shuffle",
    "training.context",
    "training.batch_size",
    "training.seed",
)
# what changes how the run goes on: allowed, and said
_ANNOUNCED = ("training.", "parallel.sp_degree", "parallel.zero_stage")
_QUIET = (
    "training.kept_rows",
    "training.eval_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.log_every",
)


class CheckpointError(UserError):
    """A checkpoint cannot be written or is not what was written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint."""

    path: Path
    state: dict
    files: tuple[str, ...]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    @property
    def updates(self) -> int:
        """Those of them that changed the weights; others were not finite."""
        return self.state.get("updates", self.step)  # older checkpoints are of runs that such a step ended


def directory(run_dir: str | Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(run_dir) / "checkpoints"


def check_writable(run_dir: str | Path) -> None:
    """Make the place of a run's checkpoints, and write a file there that is deleted again.

    Raises:
        ConfigError: that cannot be done, so that the run would be lost at its first save.
    """
    place = directory(run_dir)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".probe-") as probe:
            probe.write(b"probe")
    except OSError as failure:
        raise ConfigError(f"run_dir: {place} cannot be written: {failure.strerror}") from failure


def _self_hash(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: dict) -> None:
    """Compact, so that no byte can change or be missing without being noticed."""
    path.write_text(json.dumps(value, separators=(",", ":"), sort_keys=True))
    fsync(path)


def save(
    engine: Engine,
    run_dir: str | Path,
    state: dict,
    tokenizer: bytes,
    keep: int,
    tell: Callable[[bool], None] = lambda _: None,
) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the newest `keep`; collective.

    `tokenizer` is what `tokenizer.json` will hold.
    `tell` is called with True where this rank begins to write, and with False where it waits for others.

    Returns the new checkpoint's path.

    Raises:
        CheckpointError: a rank could not write (the disk is full, say); nothing is left of the new checkpoint
            and the old ones are as they were. Raised on every rank.
    """
    rank, world_size = engine.mesh.rank, engine.mesh.world_size
    place = directory(run_dir) / f"step-{state['step']:08d}"
    building = place.with_name(f".{place.name}.building")
    error = None
    if rank == 0:
        try:
            for left in directory(run_dir).glob(".step-*.building"):  # by a process that was killed
                _remove(left)
            building.mkdir(parents=True)
        except OSError as failure:
            error = f"{building}: {failure.strerror}"
    dist.barrier()
    tell(True)
    weights, moments = {}, {}
    for number, (name, tensors) in enumerate(engine.state()):
        if rank == 0:
            weights[name] = tensors["weight"].detach().to("cpu", copy=True).contiguous()
        if number % world_size == rank:
            for key in MOMENTS:
                moments[f"{name}.{key}"] = tensors[key].detach().to("cpu", copy=True).contiguous()
    written = {f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors": moments}
    if rank == 0:
        written["model.safetensors"] = weights
    entries = {}
    try:
        for filename, tensors in written.items() if error is None else ():
            save_file(tensors, building / filename, metadata={"format": "pt"})
            fsync(building / filename)
            entries[filename] = _entry(building / filename)
        if rank == 0 and error is None:
            (building / "tokenizer.json").write_bytes(tokenizer)
            fsync(building / "tokenizer.json")
            _write_json(building / "state.json", {"format": FORMAT, **state})
            entries |= {name: _entry(building / name) for name in ("tokenizer.json", "state.json")}
    except (OSError, SafetensorError) as failure:
        error = f"{building}: rank {rank} could not write: {failure}"
    tell(False)
    gathered: list = [None] * world_size
    dist.all_gather_object(gathered, (error, entries))
    error = next((of_rank[0] for of_rank in gathered if of_rank[0]), None)
    if rank == 0 and error is None:
        try:
            files = {name: entry for _, of_rank in gathered for name, entry in of_rank.items()}
            _write_json(building / "manifest.json", {"files": files, "sha256": _self_hash(files)})
            fsync(building)
            _remove(place)  # a refused one of the same step
            building.rename(place)
            fsync(place.parent)
        except OSError as failure:
            error = f"{building}: {failure}"
    verdict = [error]
    dist.broadcast_object_list(verdict, src=0)
    if rank == 0 and verdict[0] is not None:
        shutil.rmtree(building, ignore_errors=True)
    if verdict[0] is not None:
        raise CheckpointError(f"checkpoint of step {state['step']} not written: {verdict[0]}")
    if rank == 0:
        # one of a later step was refused, or the run would have gone on from it
        older = [path for path in _candidates(run_dir) if _step_of(path) < state["step"]]
        for path in {*_candidates(run_dir)} - {place, *older[: keep - 1]}:
            _remove(path)
    return place


def _remove(path: Path) -> None:
    """Delete, as far as that works, a checkpoint or what has its name; of a link, not where it leads."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _candidates(run_dir: str | Path) -> list[Path]:
    """Checkpoint directories, newest first; unfinished ones have another name."""
    named = [path for path in directory(run_dir).glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(named, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def verify(path: str | Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest, before anything is read from it.

    Raises:
        CheckpointError: a file is missing, changed or cut; names it.
    """
    path = Path(path)
    manifest = path / "manifest.json"
    try:
        content = json.loads(manifest.read_bytes())
        files = content["files"]
        if content["sha256"] != _self_hash(files):
            raise CheckpointError(f"{manifest}: its SHA-256 is not the one it states")
        stated = {name: (entry["bytes"], entry["sha256"]) for name, entry in dict(files).items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as failure:
        if isinstance(failure, CheckpointError):
            raise
        raise CheckpointError(f"{manifest}: missing or not a manifest ({failure})") from failure
    for name, (expected, expected_digest) in stated.items():
        try:
            size = (path / name).stat().st_size
            if size != expected:
                raise CheckpointError(
                    f"{path / name}: bytes ({size}) == {expected} does not hold; it is cut or grown"
                )
            digest = sha256_of(path / name)
        except OSError as failure:
            raise CheckpointError(f"{path / name}: {failure.strerror}") from failure
        if digest != expected_digest:
            raise CheckpointError(
                f"{path / name}: its SHA-256 is not the manifest's; it has changed since it was written"
            )
    state = json.loads((path / "state.json").read_bytes())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path}: format ({state['format']}) == {FORMAT} does not hold")
    return Checkpoint(path, state, tuple(stated))


def find_newest(run_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run (None if it has none yet), and what was refused on the way to it.

    Raises:
        CheckpointError: there are checkpoints and none is whole; starting anew would lose them silently.
    """
    refused: list[str] = []
    for path in _candidates(run_dir):
        try:
            return verify(path), refused
        except CheckpointError as failure:
            refused.append(str(failure))
    if refused:
        raise CheckpointError("no checkpoint of the run is whole: " + "; ".join(refused))
    return None, []


def warn_of(refused: list[str]) -> None:
    """Say on stderr, of all ranks on the first, which checkpoints `find_newest` has passed over."""
    if rank_from_launcher() == 0:
        for text in refused:
            print(f"warning: refused {text}", file=sys.stderr)


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put a verified checkpoint's weights and moments into the engine; collective.

    Works on any number of ranks and in any ZeRO stage.
    """
    with contextlib.ExitStack() as opened:
        holder = {}  # of each tensor, by its stored name: the open file
        for name in checkpoint.files:
            if name.endswith(".safetensors"):
                file = opened.enter_context(safe_open(checkpoint.path / name, "pt"))
                holder |= dict.fromkeys(file.keys(), file)

        def read(name: str, key: str) -> torch.Tensor:
            stored = name if key == "weight" else f"{name}.{key}"
            return holder[stored].get_tensor(stored)

        engine.load_state(read, checkpoint.updates)


def flatten(config: dict, prefix: str = "") -> dict:
    """{"training": {"seed": 1}} as {"training.seed": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_resumable(checkpoint: Checkpoint, config: Config, data_digest: str) -> list[str]:
    """Changes since the checkpoint that alter how the run goes on, as text.

    Raises:
        ConfigError: a change after which the run would not be the same run; names every such key.
    """
    before, now = flatten(checkpoint.state["config"]), flatten(config.to_dict())
    changed = {key: f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]}
    fixed = [text for key, text in changed.items() if key.startswith(_FIXED)]
    if checkpoint.state["data"] != data_digest:
        fixed.append(f"data.train: content {checkpoint.state['data'][:12]} -> {data_digest[:12]}")
    if fixed:
        raise ConfigError(
            f"run_dir: {checkpoint.path} cannot be resumed with {'; '.join(fixed)}; "
            "choose another run_dir to start anew"
        )
    return [text for key, text in changed.items() if key.startswith(_ANNOUNCED) and key not in _QUIET]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint directory, or the newest whole one of a run directory; newer ones are warned of.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (Path(path) / "manifest.json").exists():
        return verify(path)
    found, refused = find_newest(path)
    warn_of(refused)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint there, and no run with one")
    return found


def load_model(checkpoint: Checkpoint, device: torch.device) -> tuple[PiTransformer, Config]:
    """The model of a checkpoint with its fp32 weights, and the configuration that it was trained with."""
    config = Config.from_dict(checkpoint.state["config"])
    model = PiTransformer(config.model, config.training.context)
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    return model.to(device).eval(), config
