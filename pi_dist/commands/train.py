"""`pi-dist train`: train, or resume, the run of a configuration."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import ConfigFile, check_written, config_of
from pi_dist.config import Config, ConfigError, check, resolve
from pi_dist.training.stop_request import StopRequest, early_signals

UNFINISHED = 75  # EX_TEMPFAIL: `pi-dist train --status` of a run that has steps left


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Train a π-Transformer, or resume the run of --run_dir. Start it with torchrun (or "
        "launch/torchrun.sh) for several ranks; alone it is one rank.",
        exit_on_error=False,
    )
    p.add_argument(
        "--config", action=ConfigFile, help="YAML with any of the fields below; later flags override it"
    )
    p.add_argument("--record", type=str | None, default=None, help="add times and memory there, as JSON")
    p.add_argument(
        "--check",
        type=int | None,
        default=None,
        metavar="RANKS",
        help="only check configuration and data for so many ranks, and leave",
    )
    p.add_argument(
        "--status",
        action="store_true",
        help=f"only tell how far the run is, and leave: exit status 0 if it is complete, {UNFINISHED} if not "
        "(a run that a signal stopped has saved its state and ends with exit status 0 too)",
    )
    p.add_argument(
        "--ranks",
        type=int | None,
        default=None,
        help="refuse to start unless there are so many ranks",
    )
    p.add_class_arguments(Config)
    return p


def read_config(flags: list[str]) -> Config:
    """The configuration that `pi-dist train` makes of these flags.

    Raises:
        argparse.ArgumentError: an unknown key or a value of another type.
    """
    return config_of(parser().parse_args(flags))


def run(arguments: Namespace) -> int:
    check_written("record", arguments.record)
    if arguments.check is not None:
        check_run(config_of(arguments), arguments.check)
        return 0
    if arguments.status:
        return _status(config_of(arguments))
    is_launched = not os.environ.keys().isdisjoint(("RANK", "OMPI_COMM_WORLD_RANK"))
    # before imports that take seconds
    launcher = os.getppid() if is_launched else None
    stop = StopRequest(early_signals() if is_launched else ())
    import torch.distributed as dist

    from pi_dist.parallel.process_group import check_world_size, rank_from_launcher
    from pi_dist.training.rank_log import keep_stderr
    from pi_dist.training.trainer import train

    if arguments.record is not None:
        from pi_dist.measure.record import training_record

        training_record(arguments.record)  # refuses one of another device before any work
    if arguments.ranks is not None:
        check_world_size(arguments.ranks)

    config = config_of(arguments)
    if is_launched and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun keeps them
        keep_stderr(config.run_dir, rank_from_launcher())
    config, outcome = train(config, launcher, stop)
    if dist.get_rank() == 0:
        print(_closing(config, outcome))
        if arguments.record is not None and outcome.losses:
            from pi_dist.measure.record import add_training_run

            add_training_run(arguments.record, config, dist.get_world_size(), outcome)
    return 0


def check_run(config: Config, ranks: int) -> None:
    """Raise ConfigError or ShardError unless the run can be trained, and saved, on so many ranks."""
    from pi_dist.data.shards import open_splits

    check(config, ranks)
    index, _ = open_splits(config.data)
    resolve(config, index.vocab_size)
    for place in (config.run_dir, f"{config.run_dir}/checkpoints"):
        _check_writable(place)


def _check_writable(run_dir: str) -> None:
    """Raise ConfigError unless a directory of the run, or the nearest that there is above it, takes files."""
    path = Path(run_dir).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ConfigError(f"run_dir: {run_dir} cannot be written: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir: {run_dir} cannot be written: {nearest} is read-only for this user")


def _status(config: Config) -> int:
    from pi_dist.training.checkpoint import find_newest, warn_of

    found, refused = find_newest(config.run_dir)
    warn_of(refused)
    step = 0 if found is None else found.step
    print(f"{config.run_dir}: step {step} of {config.training.steps} is saved")
    return 0 if step >= config.training.steps else UNFINISHED


def _closing(config: Config, outcome: Any) -> str:
    from pi_dist.data.shards import unigram_entropy
    from pi_dist.measure.reach import report

    if outcome.stopped_by is not None:
        return (
            f"stopped by {outcome.stopped_by} after step {outcome.step}; checkpoint {outcome.checkpoint}\n"
            "run the same command again to go on"
        )
    lines = [
        "" if outcome.losses else f"the run is done already: {outcome.step} of {config.training.steps} steps"
    ]
    if outcome.skipped:
        lines.append(f"skipped            {outcome.skipped} steps, whose loss or gradient was not finite")
    if outcome.heldout_loss is not None:
        entropy = unigram_entropy(config.data.heldout)
        lines.append(
            f"held-out loss      {outcome.heldout_loss:.3f} nats/token, "
            f"{abs(entropy - outcome.heldout_loss):.3f} "
            f"{'below' if outcome.heldout_loss < entropy else 'above'} the text's own unigram entropy of "
            f"{entropy:.3f}"
        )
    reach = report(config.model, config.training.context)
    lines += [
        f"reach              {reach.reach_in_context:,} tokens to the left at a context of "
        f"{config.training.context:,}; the last token can see {reach.covered_share:.1%} of what is before it",
        f"checkpoint         {outcome.checkpoint}",
        f"TensorBoard        tensorboard --logdir {shlex.quote(config.run_dir + '/tensorboard')}",
    ]
    return "\n".join(lines)
