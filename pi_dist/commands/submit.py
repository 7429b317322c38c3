"""`pi-dist submit`: a run as a SLURM job."""

from __future__ import annotations

import shlex
import sys

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.train import check_run, read_config
from pi_dist.config import ConfigError


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Check a run, then submit it to SLURM: one torchrun on each node, saved and requeued "
        "before the time limit and when preempted. Overrides of the configuration follow after --.",
        exit_on_error=False,
    )
    p.add_argument("--config", type=str, required=True, help="YAML as `pi-dist train` takes it")
    p.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    p.add_argument("--gpus-per-node", type=int, required=True, help="GPUs to ask for on each; 0: none")
    p.add_argument(
        "--ranks-per-node",
        type=int | None,
        default=None,
        help="ranks on each node; default: one for each GPU",
    )
    p.add_argument(
        "--cpus-per-node", type=int | None, default=None, help="default: whole nodes, with all they have"
    )
    p.add_argument("--time", type=str, required=True, help="limit as sbatch takes it: H:M:S, D-H, minutes")
    p.add_argument(
        "--grace",
        type=int,
        default=300,
        help="so many seconds before the limit the run saves and is requeued",
    )
    p.add_argument("--max-requeues", type=int, default=20, help="the job ends after so many")
    p.add_argument("--partition", type=str | None, default=None, help="default: the cluster's")
    p.add_argument("--account", type=str | None, default=None, help="default: the user's")
    p.add_argument("--qos", type=str | None, default=None, help="default: the user's")
    p.add_argument("--constraint", type=str | None, default=None, help="features of nodes; default: any")
    p.add_argument("--job-name", type=str | None, default=None, help="default: the run directory's")
    p.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    p.add_argument("overrides", nargs="*", default=[], help="after --: as `pi-dist train` takes them")
    return p


def run(arguments: Namespace) -> int:
    import time
    from pathlib import Path

    from pi_dist.launching.submit import Job, batch_script, check_job, submit

    asked = arguments.as_dict()
    for word in asked["overrides"]:
        if word.partition("=")[0] in ("--check", "--status", "--ranks", "--record"):
            raise ConfigError(
                f"overrides: {word} is no field of a run's configuration; a job has none of these"
            )
    config = read_config([f"--config={asked.pop('config')}", *asked.pop("overrides")])
    dry_run, name, run_dir = asked.pop("dry_run"), asked.pop("job_name"), Path(config.run_dir).absolute()
    if asked["ranks_per_node"] is None:
        asked["ranks_per_node"] = asked["gpus_per_node"]
    name, stamp = run_dir.name if name is None else name, time.strftime("%Y%m%d-%H%M%S")
    job = Job(name=name, run_dir=run_dir, work_dir=Path.cwd(), stamp=stamp, **asked)
    check_job(job)
    check_run(config, job.ranks)
    if dry_run:
        print(batch_script(job), end="")
        print(
            f"nothing was written; when it is submitted, the script reads {job.config} and logs there",
            file=sys.stderr,
        )
        return 0
    number = submit(job, config)
    print(
        f"submitted job {number}: {job.nodes} nodes with {job.ranks_per_node} ranks each, {job.script}\n"
        f"  follow   tail -F {shlex.quote(str(run_dir / f'job-{number}.log'))}\n"
        f"  state    squeue --jobs={number}\n"
        f"  cancel   scancel {number}"
    )
    return 0
