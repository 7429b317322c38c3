"""A run as a SLURM job: a batch script made of the template `slurm/train.sbatch`, and its submission.

Whatever the user names (paths, job name, partition) is quoted: for bash in the script's settings, for sbatch,
which has rules of its own, in `#SBATCH` lines.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pi_dist.config import Config, ConfigError, UserError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?", re.ASCII)


class SubmissionError(UserError):
    """SLURM did not take the job; the message is its own."""


@dataclass(frozen=True)
class Job:
    """What a run asks of SLURM.

    Attributes:
        name: of the job.
        run_dir: where the script, the configuration and the logs of the job go.
        work_dir: relative paths of the configuration start there.
        stamp: part of the names of the job's files, so that a job that waits keeps its own.
        ranks_per_node: processes that torchrun starts on each node.
        time: limit, as sbatch takes it: minutes, H:M:S, days-hours, …
        grace: seconds before the limit at which the run is told to save.
        max_requeues: after so many requeues the job ends.
        cpus_per_node: None takes whole nodes, with all their CPUs and memory.
        partition, account, qos, constraint: as sbatch has them; None leaves the cluster's default.
    """

    name: str
    run_dir: Path
    work_dir: Path
    stamp: str
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time: str
    grace: int = 300
    max_requeues: int = 20
    cpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node

    @property
    def script(self) -> Path:
        """Where the batch script is written."""
        return self.run_dir / f"job-{self.stamp}.sbatch"

    @property
    def config(self) -> Path:
        """Where the configuration is kept as submitted: a requeued job is the same run, whatever changed."""
        return self.run_dir / f"job-{self.stamp}.yaml"


def seconds_of(time: str) -> int:
    """Seconds of a time limit of sbatch: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is none of these.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"time: {time!r} is none of M, M:S, H:M:S, D-H, D-H:M, D-H:M:S")
    numbers = [int(number) for number in match.group("a", "b", "c") if number is not None]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return hours * 3600 + minutes * 60 + seconds


def check_job(job: Job) -> None:
    """Raise ConfigError unless SLURM could understand the job."""
    for key, least in (("nodes", 1), ("gpus_per_node", 0), ("max_requeues", 0), ("grace", 1)):
        _require(getattr(job, key) >= least, key, f"{key} ({getattr(job, key)}) >= {least}")
    _require(job.ranks_per_node >= 1, "ranks_per_node", f"ranks_per_node ({job.ranks_per_node}) >= 1")
    _require(
        job.ranks_per_node <= job.gpus_per_node or job.gpus_per_node == 0,
        "ranks_per_node",
        f"ranks_per_node ({job.ranks_per_node}) <= gpus_per_node ({job.gpus_per_node})",
    )
    if job.cpus_per_node is not None:
        _require(job.cpus_per_node >= 1, "cpus_per_node", f"cpus_per_node ({job.cpus_per_node}) >= 1")
    limit = seconds_of(job.time)
    _require(job.grace < limit, "time", f"grace ({job.grace}) < seconds of the time limit ({limit})")
    _require(job.grace <= 65535, "grace", f"grace ({job.grace}) <= 65535")
    _require(bool(job.name), "job_name", "length of the job's name (0) >= 1")
    for key in ("run_dir", "work_dir", "name", "partition", "account", "qos", "constraint"):
        text = str(getattr(job, key))
        _require(text.isprintable(), key, f"{text!r} has printable characters only")
        _require(text != "", key, f"length of {key} (0) >= 1")
    _require(
        "\\" not in str(job.run_dir), "run_dir", f"no backslash in {job.run_dir}, the path of a log of SLURM,"
    )


def _require(holds: bool, key: str, equation: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: {equation} does not hold")


def _sbatch_quoted(text: str) -> str:
    """For a `#SBATCH` line: spaces need quotes; within them # still begins a comment, a backslash escapes."""
    return '"' + re.sub(r"([\"'#\\])", r"\\\1", text) + '"'


def _header(job: Job) -> list[str]:
    """The `#SBATCH` lines; in the name of the log % stands for something, and %% for itself."""
    options: dict[str, object] = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_node,
        "time": job.time,
        "signal": f"USR1@{job.grace}",
        "open-mode": "append",
        "chdir": job.work_dir,
        "output": f"{str(job.run_dir).replace('%', '%%')}/job-%j.log",
    }
    lines = [f"--{key}={_sbatch_quoted(str(value))}" for key, value in options.items() if value is not None]
    lines += ["--requeue"] + (["--exclusive", "--mem=0"] if job.cpus_per_node is None else [])
    return [f"#SBATCH {line}" for line in lines]


def _settings(job: Job) -> list[str]:
    """The lines of bash between `# settings` and `# end of settings`."""
    words = {"python": sys.executable, "logs": str(job.run_dir / "logs")}
    numbers = {
        "nodes": job.nodes,
        "ranks_per_node": job.ranks_per_node,
        "max_requeues": job.max_requeues,
    }
    return [
        *(f"{name}={shlex.quote(word)}" for name, word in words.items()),
        *(f"{name}={number}" for name, number in numbers.items()),
        f"arguments=({shlex.quote(f'--config={job.config}')})",
    ]


def batch_script(job: Job) -> str:
    """The template with the job's `#SBATCH` lines and settings."""
    lines = (files("pi_dist") / "slurm" / "train.sbatch").read_text("utf-8").splitlines()
    body = [line for line in lines if not line.startswith("#SBATCH ")]
    first, last = body.index("# settings"), body.index("# end of settings")
    script = [body[0], *_header(job), *body[1 : first + 1], *_settings(job), *body[last:]]
    return "\n".join(script) + "\n"


def submit(job: Job, config: Config) -> str:
    """Write the job's files into its run directory and hand the script to sbatch; returns the job's id.

    What sbatch says besides is passed on to standard error.

    Raises:
        SubmissionError: there is no sbatch, or it refuses the job; the files are removed again.
        UserError: sbatch gives no id; the files stay, for the job may be queued.
        FileExistsError: a job with the same stamp was written there.
    """
    import yaml

    job.run_dir.mkdir(parents=True, exist_ok=True)
    with job.config.open("x", encoding="utf-8") as file:
        yaml.safe_dump(config.to_dict(), file, sort_keys=False)
    job.script.write_text(batch_script(job), encoding="utf-8")
    try:
        said = _sbatch(job)
    except SubmissionError:
        job.script.unlink()
        job.config.unlink()
        raise
    last = said.strip().rpartition("\n")[2]  # a site may have sbatch say more
    if re.fullmatch(r"\d+(;.*)?", last, re.ASCII) is None:
        raise UserError(f"sbatch: {said!r} ends with the job's number, does not hold; see squeue --me")
    return last.partition(";")[0]


def _sbatch(job: Job) -> str:
    """What sbatch answers to the job's script, or SubmissionError in its own words."""
    command = ["sbatch", "--parsable", str(job.script)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, env=_environment(job), **options)
    except FileNotFoundError as failure:
        raise SubmissionError("no sbatch on PATH: submit from a login node of the cluster") from failure
    except OSError as failure:
        raise SubmissionError(f"sbatch: {failure.strerror}") from failure
    if done.returncode != 0:
        raise SubmissionError(done.stderr.strip() or f"sbatch ended with exit status {done.returncode}")
    sys.stderr.write(done.stderr)
    return done.stdout


def _environment(job: Job) -> dict[str, str]:
    """Without the variables that sbatch heeds more than `#SBATCH` lines, but for what the job leaves open."""
    left = {key for key in ("partition", "account", "qos", "constraint") if getattr(job, key) is None}
    kept = {f"SBATCH_{key.upper()}" for key in (*left, "reservation", "clusters")}
    return {name: text for name, text in os.environ.items() if name in kept or name[:7] != "SBATCH_"}
