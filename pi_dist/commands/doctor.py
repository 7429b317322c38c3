"""`pi-dist doctor`: what this machine, or the ranks of a launcher, have for training."""

from __future__ import annotations

import os
import sys

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import check_written, print_or_write
from pi_dist.config import ConfigError


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="What this machine has for training, and what is missing; exit status 1 if it cannot "
        "train. Under a launcher also whether ranks see each other, and how fast neighbours do.",
        exit_on_error=False,
    )
    p.add_argument(
        "--json", type=str | None, default=None, help="write JSON there instead; - is standard output"
    )
    p.add_argument(
        "--timeout", type=float, default=30.0, help="seconds after which a rank that does not answer is named"
    )
    return p


def run(arguments: Namespace) -> int:
    from pi_dist.measure.doctor import Diagnosis, describe, diagnose, to_json
    from pi_dist.parallel.process_group import world_size_from_launcher

    check_written("json", arguments.json, printed=True)
    if not arguments.timeout > 0:
        raise ConfigError(f"timeout: timeout ({arguments.timeout}) > 0 does not hold")
    diagnosis = diagnose()
    if world_size_from_launcher() > 1:
        from pi_dist.measure.links import examine

        found = examine(arguments.timeout)
        diagnosis = Diagnosis((*diagnosis.findings, *found))
        if os.environ["RANK"] != "0":  # it speaks only of what rank 0 does not hear of
            print("".join(f"{finding.detail}\n" for finding in found), end="", file=sys.stderr)
            return 1 if found else 0
    print_or_write(to_json(diagnosis), arguments.json, describe(diagnosis))
    return 0 if diagnosis.ok else 1
