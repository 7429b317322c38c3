"""`pi-dist calibrate`: fit the cost model to this machine's GPU."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import check_written


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Measure copy and matrix rates and single steps of this machine's GPU, and fit the "
        "constants of the cost model to them: a profile for --gpu of savings and plan. A few minutes.",
        exit_on_error=False,
    )
    p.add_argument("--json", type=str, required=True, help="write the profile there")
    p.add_argument("--record", type=str, required=True, help="of measured steps, to make or to go on with")
    p.add_argument("--presets", type=str, default="small,medium", help="whose steps, with commas")
    p.add_argument("--minutes", type=float, default=5.0, help="measure no further point after so long")
    return p


def run(arguments: Namespace) -> int:
    from pi_dist.measure.calibrate import calibrate

    check_written("json", arguments.json)
    check_written("record", arguments.record)
    print(calibrate(arguments.json, arguments.record, arguments.presets.split(","), arguments.minutes))
    return 0
