"""`pi-dist bench`: kernels and training steps timed on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import (
    NETWORK_FLAGS,
    UNFINISHED_RECORD,
    add_network,
    check_plot,
    check_written,
    network_of,
    print_or_write,
    sizes,
)
from pi_dist.config import ConfigError, UserError

_TAKES = {
    "kernel": ("json", "head_dim", "minutes", "plot"),
    "blocks": ("json", "head_dim", "entries"),
    "sp": ("json", "presets", "contexts", "methods", "minutes", "device", "trace", "plot"),
    "sp --ranks": ("json", "presets", "contexts", "methods", "ranks", "gpu", *NETWORK_FLAGS),
    "step": ("json", "presets", "contexts", "streamed", "minutes", "device", "plot"),
    "faults": ("json", "presets", "contexts", "device", "directory"),
}


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Measure on this machine. kernel: the operator beside its floor and other kernels. "
        "blocks: tile sizes of the kernels, written to the table that they are read from. "
        "sp: training steps of every method on the ranks of the launcher "
        "(torchrun --nproc-per-node 2 -m pi_dist bench sp ...), and with one rank their baseline. "
        "step: a step of each preset on one device, what it is spent on, and how far chunks carry. "
        "faults: seconds of a checkpoint, of a restart and of the watchdog, on the ranks of the launcher.",
        exit_on_error=False,
    )
    p.add_argument("what", type=Literal["kernel", "blocks", "sp", "step", "faults"], help="what to measure")
    p.add_argument(
        "--json",
        type=str | None,
        default=None,
        help="the record to make, or to go on with; blocks: another table; faults: the figures",
    )
    p.add_argument(
        "--head-dim",
        type=int | None,
        default=None,
        help="blocks: the head_dim to choose tile sizes for, by default 64; kernel: default all",
    )
    p.add_argument(
        "--entries", type=str | None, default=None, help="blocks: of the table, with commas; default: all"
    )
    p.add_argument(
        "--minutes", type=float, default=8.0, help="kernel, sp, step: stop after so long; run again to go on"
    )
    p.add_argument(
        "--plot",
        type=str | None,
        default=None,
        help="kernel, step: draw the record there; sp: what ran when, of --trace (.svg, .png)",
    )
    p.add_argument(
        "--presets",
        type=str | None,
        default=None,
        help="tiny, small, medium, large, with commas; "
        "default: small,medium (sp), and large (step); one, small (faults)",
    )
    p.add_argument(
        "--contexts",
        type=str | None,
        default=None,
        help="tokens of a sequence, over all ranks, with commas; "
        "default: 32k to 1M (sp), 8k to 1M (step); one, 8k (faults)",
    )
    p.add_argument(
        "--streamed",
        type=str,
        default="1048576,4194304,16777216,134217728",
        help="step: contexts to train in chunks, with commas",
    )
    p.add_argument(
        "--methods",
        type=str,
        default="pi,window,ring,ulysses,dense",
        help="sp: which methods; dense runs on one rank, ring and ulysses on several",
    )
    p.add_argument(
        "--ranks",
        type=str | None,
        default=None,
        help="sp: run nothing, predict steps of so many ranks of --gpu by the cost model; with commas",
    )
    p.add_argument("--gpu", type=str, default="H100", help="sp, --ranks: as of `pi-dist savings`")
    p.add_argument(
        "--device",
        type=Literal["auto", "cpu", "cuda"],
        default="auto",
        help="sp, step, faults: as parallel.device",
    )
    p.add_argument(
        "--directory", type=str, default=".", help="faults: where, on the file system of your checkpoints"
    )
    p.add_argument(
        "--trace",
        type=str | None,
        default=None,
        help="sp: write the kernels of the first measured step there (JSON)",
    )
    add_network(p)
    return p


def run(arguments: Namespace) -> int:
    what = "sp --ranks" if arguments.what == "sp" and arguments.ranks is not None else arguments.what
    for name, default in parser().get_defaults().as_dict().items():
        if name not in (*_TAKES[what], "what") and arguments[name] != default:
            raise ConfigError(f"bench {what}: there is no --{name.replace('_', '-')} of it")
    check_plot(arguments.plot)
    check_written("json", arguments.json, printed=arguments.what == "faults")
    check_written("trace", arguments.trace)
    if arguments.what == "blocks":
        from pi_dist.measure.kernel_tuning import tune

        entries = arguments.entries and arguments.entries.split(",")
        tune(arguments.head_dim or 64, entries, arguments.json)
        return 0
    if arguments.what == "faults":
        _faults(arguments)
        return 0
    if arguments.json is None:
        raise ConfigError(
            f"bench {arguments.what}: --json FILE is needed; the record is written there row by row"
        )
    complete = {"kernel": _kernel, "sp": _sp, "step": _step}[arguments.what](arguments)
    return 0 if complete else UNFINISHED_RECORD


def _faults(arguments: Namespace) -> None:
    import torch.distributed as dist

    from pi_dist.measure.fault_bench import describe, measure

    presets = (arguments.presets or "small").split(",")
    contexts = sizes("contexts", arguments.contexts or "8192")
    for name, found in (("presets", presets), ("contexts", contexts)):
        if len(found) > 1:
            raise ConfigError(f"bench faults: number of {name} ({len(found)}) == 1 does not hold")
    cost = measure(presets[0], contexts[0], arguments.device, arguments.directory)
    if dist.get_rank() == 0:
        print_or_write(cost, arguments.json, describe(cost))


def _kernel(arguments: Namespace) -> bool:
    from pi_dist.measure.figures import draw_kernels
    from pi_dist.measure.kernel_bench import HEADS, bench

    head_dims = tuple(HEADS) if arguments.head_dim is None else (arguments.head_dim,)
    complete = bench(arguments.json, arguments.minutes, head_dims)
    if arguments.plot is not None:
        draw_kernels(arguments.json, arguments.plot)
    return complete


def _sp(arguments: Namespace) -> bool:
    from pi_dist.measure.figures import draw_timeline
    from pi_dist.measure.profile import load_profile
    from pi_dist.measure.sp_bench import bench, is_last_rank, predict
    from pi_dist.parallel.process_group import world_size_from_launcher

    if arguments.plot is not None and arguments.trace is None:
        raise ConfigError("bench sp: --plot FILE needs --trace FILE, which it draws")
    alone = world_size_from_launcher() < 2 or arguments.device == "cpu"
    if arguments.plot is not None and alone:
        raise ConfigError("bench sp: --plot FILE needs two ranks on GPUs: it draws what they exchange")
    what = (
        arguments.json,
        (arguments.presets or "small,medium").split(","),
        sizes("contexts", arguments.contexts or "32768,65536,131072,262144,1048576"),
        arguments.methods.split(","),
    )
    if arguments.ranks is not None:
        ranks, profile = sizes("ranks", arguments.ranks), load_profile(arguments.gpu)
        predict(*what, ranks, profile, network_of(arguments))
        return True
    complete = bench(
        *what,
        minutes=arguments.minutes,
        device=arguments.device,
        trace=arguments.trace,
    )
    if arguments.plot is not None and is_last_rank():  # which wrote the trace
        if not Path(arguments.trace).exists():
            raise UserError(
                f"bench sp: nothing was left to measure, so there is no {arguments.trace} to draw"
            )
        draw_timeline(arguments.trace, arguments.plot)
    return complete


def _step(arguments: Namespace) -> bool:
    from pi_dist.measure.figures import draw_steps
    from pi_dist.measure.step_bench import bench

    complete = bench(
        arguments.json,
        (arguments.presets or "small,medium,large").split(","),
        sizes("contexts", arguments.contexts or "8192,32768,131072,1048576"),
        sizes("streamed", arguments.streamed),
        minutes=arguments.minutes,
        device=arguments.device,
    )
    if arguments.plot is not None:
        draw_steps(arguments.json, arguments.plot)
    return complete
