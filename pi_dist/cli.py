"""The command `pi-dist`: parse, then one call. Bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from argparse import ArgumentError
from types import ModuleType

from jsonargparse import set_parsing_settings

from pi_dist.commands import (
    bench,
    calibrate,
    doctor,
    evaluate,
    generate,
    paper,
    plan,
    prepare,
    reach,
    savings,
    submit,
    train,
)
from pi_dist.commands.shared import UNFINISHED_RECORD
from pi_dist.config import UserError
from pi_dist.training.rank_log import tell_launcher

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # as shells say of SIGINT

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "prepare": (prepare, "text, JSONL or directories to shards of tokens"),
    "train": (train, "train or resume a run"),
    "eval": (evaluate, "loss of a checkpoint on prepared data"),
    "generate": (generate, "continue a text with a trained model"),
    "submit": (submit, "check a run and submit it to SLURM"),
    "reach": (reach, "how far back a configuration can see"),
    "bench": (bench, "time kernels beside their floor, or training steps of every method"),
    "savings": (savings, "the fewest GPUs of every method for a context"),
    "plan": (plan, "memory and time of a run before it is queued"),
    "paper": (paper, "the paper's table of efficiency and its claims, measured here"),
    "calibrate": (calibrate, "fit the cost model to this machine's GPU"),
    "doctor": (doctor, "what this machine has, and what is missing"),
}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pi-dist` and `python -m pi_dist`; leaves with an exit status."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # PyTorch 2.13 renames collectives that DeepSpeed (and PyTorch 2.11) knows by their old names only
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*deprecated", category=FutureWarning)
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: pi-dist COMMAND ...   (pi-dist COMMAND --help tells more)\n")
        print("\n".join(f"  {name:{width}}  {help_text}" for name, (_, help_text) in COMMANDS.items()))
        sys.exit(0 if argv else BAD_INPUT)
    if argv[0] not in COMMANDS:
        print(f"pi-dist: error: {argv[0]!r} is not one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    command, _ = COMMANDS[argv[0]]
    parser = command.parser()
    parser.prog = f"pi-dist {argv[0]}"
    try:
        status = command.run(parser.parse_args(argv[1:]))
    except (ArgumentError, UserError, OSError) as error:
        print(f"pi-dist {argv[0]}: error: {_one_line(error)}", file=sys.stderr)
        tell_launcher(_one_line(error))
        status = BAD_INPUT
    except KeyboardInterrupt:  # `train` takes it for a signal to save
        print(f"pi-dist {argv[0]}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        tell_launcher("".join(traceback.format_exception_only(error)).strip())
        status = FAILED
    if status == UNFINISHED_RECORD:
        tell_launcher("rows are left, run it again to go on")
    _leave(status)


def _leave(status: int) -> None:
    """Exit; a process that holds a process group leaves without destructors, in which DeepSpeed may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if status == 0 and "mpi4py.MPI" in sys.modules:  # else mpirun takes the exit for a crash
            sys.modules["mpi4py.MPI"].Finalize()
        os._exit(status)
    sys.exit(status)
