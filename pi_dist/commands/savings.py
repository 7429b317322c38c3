"""`pi-dist savings`: the fewest GPUs of every method for a context, as JSON, a report and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import (
    UNFINISHED_RECORD,
    add_network,
    check_plot,
    check_written,
    network_of,
    sizes,
)
from pi_dist.config import ConfigError

if TYPE_CHECKING:
    from pi_dist.measure.savings_points import Lab


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="The fewest GPUs that train a context, for every method: within memory, or within a "
        "time of a step too. What this machine's GPU can measure is measured, if it is the one asked for; "
        "the rest is predicted, and each figure says which. A record is resumed, without measuring a point "
        "again; it is of one GPU and one state of the code. Exit status 3: rows are left. --from "
        "joins several.",
        exit_on_error=False,
    )
    p.add_argument("--preset", type=str, default="small", help="small, medium, large, with commas")
    p.add_argument("--context", type=str, default="131072", help="tokens of a sequence, with commas")
    p.add_argument("--methods", type=str, default="pi,window,dense,ring,ulysses", help="with commas")
    p.add_argument(
        "--budget", type=str, default="memory", help="memory, step_ms=NUMBER or tokens_per_s=NUMBER"
    )
    p.add_argument(
        "--gpu", type=str, default="H100", help="H100, H200, A100, a file of `pi-dist calibrate`, or this"
    )
    p.add_argument("--predict", action="store_true", help="measure nothing")
    p.add_argument("--patience", type=float, default=20.0, help="predict the time of steps of more seconds")
    p.add_argument(
        "--minutes", type=float | None, default=None, help="stop after so long; run again to go on"
    )
    p.add_argument("--zero-stage", type=Literal[0, 1, 2, 3], default=1, help="of every method")
    p.add_argument("--chunk-tokens", type=int, default=32768, help="of a GPU, where π and window stream")
    p.add_argument("--window", type=int, default=4, help="k of π and of the window")
    p.add_argument("--stride", type=int, default=16, help="π: base stride in tokens")
    p.add_argument("--num-skips", type=int, default=1, help="M: skips of a token")
    p.add_argument(
        "--schedule", type=Literal["fixed", "doubling", "per_head"], default="fixed", help="strides"
    )
    p.add_argument(
        "--activation-offload",
        action="store_true",
        help="inputs of blocks in host memory, of every method, but where it streams",
    )
    p.add_argument(
        "--mlp-tile-tokens",
        type=int | None,
        default=None,
        help="the MLP in tiles of so many, of every method",
    )
    p.add_argument("--max-gpus", type=int, default=1024, help="no more than so many")
    p.add_argument("--json", type=str | None, default=None, help="the record to make, or to go on with")
    p.add_argument("--report", type=str | None, default=None, help="write the report there, as Markdown")
    p.add_argument("--plot", type=str | None, default=None, help="draw GPUs against context (.png, .svg)")
    p.add_argument(
        "--from",
        type=str,
        default=None,
        nargs="+",
        help="only join these records",
    )
    add_network(p)
    return p


def run(arguments: Namespace) -> int:
    import json
    import math
    import sys
    from pathlib import Path

    from pi_dist.measure.record import write
    from pi_dist.measure.savings import Terms, begun, merged, sweep
    from pi_dist.measure.savings_report import draw, markdown

    a = arguments
    check_plot(a.plot)
    check_written("json", a.json, printed=True)
    check_written("report", a.report)
    if a.minutes is not None and not a.minutes > 0:
        raise ConfigError(f"minutes: minutes ({a.minutes}) > 0 does not hold")
    path, complete = None if a.json == "-" else a.json, True
    if a["from"]:
        record = merged(a["from"])
        complete = record["settings"]["complete"]
        if path is not None:
            write(record, path)
    else:
        for key in ("chunk_tokens", "max_gpus", "mlp_tile_tokens"):
            if a[key] is not None and a[key] < 1:
                raise ConfigError(f"{key}: {key} ({a[key]}) >= 1 does not hold")
        terms = Terms(
            zero_stage=a.zero_stage,
            chunk_tokens=a.chunk_tokens,
            window=a.window,
            stride=a.stride,
            num_skips=a.num_skips,
            schedule=a.schedule,
            activation_offload=a.activation_offload,
            mlp_tile_tokens=a.mlp_tile_tokens,
            max_gpus=a.max_gpus,
        )
        lab = _lab(a)
        record = begun(path, lab)
        what = a.preset.split(","), sizes("context", a.context), a.methods.split(",")
        minutes = math.inf if a.minutes is None else a.minutes
        complete = sweep(path, *what, a.budget, terms, lab, record, minutes)
        if not complete:
            print(f"{len(record['rows'])} rows; run it again to go on", file=sys.stderr)
    if not record["rows"]:
        return UNFINISHED_RECORD
    text = markdown(record)
    if a.report is not None:
        Path(a.report).write_text(text, encoding="utf-8")
    if a.plot is not None:
        draw(record, a.plot)
    print(json.dumps(record, indent=1) if a.json == "-" else text)
    return 0 if complete else UNFINISHED_RECORD


def _lab(a: Namespace) -> Lab:
    """The GPU and network that are asked for; it measures if this machine has such a GPU."""
    import torch

    from pi_dist.measure.profile import load_profile, profile_names
    from pi_dist.measure.record import device_name
    from pi_dist.measure.savings_points import Lab

    here, name = device_name(), a.gpu
    if name == "this" and not torch.cuda.is_available():
        raise ConfigError(
            f"gpu: GPUs of this machine (0) >= 1 does not hold; or name one of {', '.join(profile_names())}"
        )
    if name == "this":
        name = next((n for n in profile_names() if here == load_profile(n).device), None)
        if name is None:
            raise ConfigError(f"gpu: no profile of {here}; make one with `pi-dist calibrate --json FILE`")
    profile = load_profile(name)
    measures = not a.predict and here == profile.device
    real_ranks = torch.cuda.device_count() if measures else 1
    return Lab(profile, network_of(a), measures, real_ranks, patience_s=a.patience)
