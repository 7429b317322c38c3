"""Training through a real SLURM of four nodes on this machine: submit, preempt, requeue, lose a node, refuse.

Nodes are network namespaces with addresses and host names of their own where root may make them, else names
of this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from soak import Attempt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch import in_a_step

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
STEPS = 60
RESUMED = re.compile("resuming at step [1-5]0 from")  # saved before a fault after step 15, however late it is
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000  # of Linux
NO_SLURM = 3  # local_cluster.sh: it is not here and cannot be installed
HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` %j #1 ; touch pwned & \u03c0'


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running cluster: `on` gives what a command prints on one of its hosts ("ctl" is the login node)."""

    directory: Path
    namespaces: bool

    def on(self, host: str, *command: object, **options) -> str:
        words = [str(self.directory / "on"), host, *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=180, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        text = self.on("ctl", "scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split(" ") if "=" in word)

    def ended(self, number: str, timeout_s: float) -> str:
        """Wait for a job's end; returns its state."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.job(number)["JobState"] in states, timeout_s, lambda: str(self.job(number)))
        return self.job(number)["JobState"]


@dataclasses.dataclass(frozen=True)
class Submitted:
    number: str
    run_dir: Path

    @property
    def script(self) -> Path:
        (path,) = self.run_dir.glob("job-*.sbatch")
        return path

    @property
    def log(self) -> str:
        path = self.run_dir / f"job-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def reaches(self, text: str, timeout_s: float = 240) -> None:
        until(lambda: text in self.log, timeout_s, lambda: self.log)


def until(holds: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what()}"
        time.sleep(0.1)


def local_cluster(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "slurm" / "local_cluster.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="pi-slurm-"))
    probe = ["unshare", "-mnu", "true"]
    namespaces = os.geteuid() == 0 and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0
    options = ["--nodes", 4, "--dir", directory, *(["--netns"] if namespaces else [])]
    try:
        started = local_cluster("up", *options)
        if started.returncode == NO_SLURM:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stderr
        yield Cluster(directory, namespaces)
    finally:
        stopped = local_cluster("down", "--wipe", "--dir", directory)
        shutil.rmtree(directory, ignore_errors=True)
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture
def submit(cluster, corpus, tmp_path):
    """`submit(name, *options, overrides)`: a small run of 60 steps on 2 nodes, two ranks, sp 2."""
    return make_submit(cluster, corpus, tmp_path)


def config_of(corpus: Path, timeout_s: float) -> dict:
    return {
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "attention_dropout": 0.1},
        "data": {"train": str(corpus / "train")},
        "parallel": {"sp_degree": 2, "zero_stage": 2, "device": "cpu", "timeout_s": timeout_s},
        "training": {"context": 128, "batch_size": 4, "steps": STEPS, "warmup_steps": 2, "save_every": 10},
    }


def make_submit(cluster: Cluster, corpus: Path, folder: Path) -> Callable[..., Submitted]:
    (folder / "a config.yaml").write_text(yaml.safe_dump(config_of(corpus, 60)))

    def submit(
        name: str, *options: str, overrides: tuple[str, ...] = (), env: dict | None = None
    ) -> Submitted:
        asked = ["--config=a config.yaml", "--gpus-per-node=1", "--time=0:20:00", "--grace=60", *options]
        if not any(option.startswith("--nodes") for option in options):
            asked.append("--nodes=2")
        command = (sys.executable, "-m", "pi_dist", "submit", *asked, "--", f"--run_dir={name}", *overrides)
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
        out = cluster.on("ctl", *command, cwd=folder, env=environment)
        return Submitted(out.split("submitted job ")[1].split(":")[0], folder / name)

    return submit


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of every step; of a step made twice, the later one's."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {point.step: point.value for point in events.Scalars("train/loss")}


def assert_same_training(run_dir: Path, other: Path) -> None:
    """Bit for bit: every loss and every weight."""
    assert losses(run_dir) == losses(other) and len(losses(run_dir)) == STEPS
    a, b = (
        load_file(d / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors") for d in (run_dir, other)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def ranks_of(job: Submitted) -> dict[int, int]:
    """Process numbers of a job's ranks (their loader processes were started later)."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e
            )
        except (OSError, UnicodeDecodeError):
            continue
        if environment.get("SLURM_JOB_ID") == job.number and "LOCAL_RANK" in environment:
            rank, number = int(environment["RANK"]), int(folder.name)
            found[rank] = min(found.get(rank, number), number)
    return found


@pytest.fixture(scope="module")
def undisturbed(cluster, corpus, tmp_path_factory) -> Submitted:
    """The run that the others must equal, in a directory and under a name that bash must not read."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = make_submit(cluster, corpus, folder)(HOSTILE, "--gpus-per-node=1")
    assert cluster.ended(job.number, 300) == "COMPLETED", job.log
    assert not list(folder.rglob("pwned"))
    return job


def test_a_submitted_run_trains_on_two_nodes(cluster, undisturbed):
    assert f"step {STEPS}/{STEPS}  loss " in undisturbed.log and "Traceback" not in undisturbed.log
    assert "2 ranks on cpu (dp 1 × sp 2)" in undisturbed.log
    assert f"step {STEPS} of {STEPS} is saved" in undisturbed.log
    assert len(losses(undisturbed.run_dir)) == STEPS
    name = cluster.on("ctl", "squeue", "--states=all", "-h", "-j", undisturbed.number, "-o", "%j")
    assert name == HOSTILE + "\n"
    logs = {p.parent.name for p in undisturbed.run_dir.glob("logs/*/attempt_0/*/stdout.log")}
    assert logs == {"0"} and len(list(undisturbed.run_dir.glob("logs/*"))) == 2  # one rank on each node


@pytest.fixture(scope="module")
def on_four_nodes(cluster, corpus, tmp_path_factory) -> Submitted:
    job = make_submit(cluster, corpus, tmp_path_factory.mktemp("four"))("run", "--nodes=4")
    assert cluster.ended(job.number, 300) == "COMPLETED", job.log
    return job


def test_four_nodes_train_the_same(undisturbed, on_four_nodes):
    assert "4 ranks on cpu (dp 2 × sp 2)" in on_four_nodes.log
    assert losses(on_four_nodes.run_dir) == pytest.approx(losses(undisturbed.run_dir), rel=1e-5)


def enter_host(namespaces: list[str], rank: int) -> dict[str, str]:
    """Make this process one of the host of a network namespace, with its name; returns its environment."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespaces[rank]}") as namespace:
        failed = libc.setns(namespace.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS)
    if failed:
        raise OSError(ctypes.get_errno(), namespaces[rank])
    socket.sethostname(f"node{rank + 1}")
    return {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0"}


def test_one_of_four_hosts_is_cut_off_and_the_run_goes_on_when_it_is_back(
    cluster, corpus, on_four_nodes, tmp_path
):
    """Without SLURM or torchrun, which would end ranks: those of all hosts end by themselves."""
    if not cluster.namespaces:
        pytest.skip("a link that is cut needs root and network namespaces")
    config = config_of(corpus, timeout_s=5) | {"run_dir": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    identify = ("bash", "-c", "ip netns identify $$")
    names = [cluster.on(f"node{number}", *identify).strip() for number in range(1, 5)]

    def attempt(number: int) -> Attempt:
        log = tmp_path / f"log-{number}"
        return Attempt(tmp_path / "c.yaml", tmp_path / "run", 4, log, partial(enter_host, names))

    with attempt(0) as run:
        assert run.until(lambda: run.steps >= 15), run.log.read_text()
        cluster.on("node3", "ip", "link", "set", "eth0", "down")
        try:
            until(lambda: not run.running(), 120, lambda: f"ranks {run.running()}: {run.log.read_text()}")
        finally:
            cluster.on("node3", "ip", "link", "set", "eth0", "up")
        assert all(rank.exitcode for rank in run.ranks) and "rank 2: no sign of life" in run.log.read_text()
    with attempt(1) as run:
        run.join()
        assert RESUMED.search(run.log.read_text()), run.log.read_text()
    assert_same_training(tmp_path / "run", on_four_nodes.run_dir)


def preempt(cluster: Cluster) -> None:
    """By a job of higher priority, for a second."""
    cluster.on("ctl", "sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


def requeued(cluster: Cluster, job: Submitted, times: int) -> None:
    """Wait until it has been so many times. It starts again some seconds later."""
    until(lambda: cluster.job(job.number)["Restarts"] == str(times), 120, lambda: job.log)


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_preempted_run_saves_requeues_and_ends_as_if_nothing_had_been(
    cluster, undisturbed, on_four_nodes, submit, nodes
):
    """While it starts, and in a step."""
    job = submit("run", f"--nodes={nodes}")
    for times, reached in enumerate((f"{nodes} nodes with 1 ranks each", "step 15/"), 1):
        job.reaches(reached)
        preempt(cluster)
        requeued(cluster, job, times)
    assert cluster.ended(job.number, 300) == "COMPLETED", job.log
    assert "stopped by SIGUSR1 after step" in job.log and "requeued, to go on from there" in job.log
    assert "resuming at step" in job.log and "requeued 2 times" in job.log
    assert_same_training(job.run_dir, (undisturbed if nodes == 2 else on_four_nodes).run_dir)


# A mock: SLURM refuses steps once the job's time is over, in the second or so before it ends the job.
SRUN = """#!/usr/bin/env bash
if [[ "$*" == *--status* && -z "${{SLURM_RESTART_COUNT:-}}" ]]; then
    echo "srun: error: Unable to create step: Job/step already completing or completed" >&2
    exit "${{SLURM_EXIT_ERROR:-1}}"
fi
exec {srun} "$@"
"""


def test_a_run_whose_time_is_over_when_it_has_saved_is_requeued(cluster, undisturbed, submit, tmp_path):
    wrapper = tmp_path / "bin" / "srun"
    wrapper.parent.mkdir()
    wrapper.write_text(SRUN.format(srun=shutil.which("srun")))
    wrapper.chmod(0o755)
    job = submit("run", env={"PATH": f"{wrapper.parent}:{os.environ['PATH']}"})
    requeued(cluster, job, 1)
    assert cluster.ended(job.number, 300) == "COMPLETED", job.log
    assert "Unable to create step" in job.log and "requeued 1 times" in job.log
    assert_same_training(job.run_dir, undisturbed.run_dir)


def test_a_lost_node_requeues_the_run(cluster, undisturbed, submit):
    if not cluster.namespaces:
        pytest.skip("a node that can be lost whole needs root and network namespaces")
    job = submit("run")
    job.reaches("step 15/")
    last = cluster.on("ctl", "scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()[-1]
    # like a power cut: the node's slurmd, its steps and its ranks, in the order of their start
    numbers = cluster.on(last, "bash", "-c", "ip netns pids $(ip netns identify $$)").split()
    mine = {str(os.getpid())}
    for number in sorted(map(int, set(numbers) - mine)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    requeued(cluster, job, 1)
    assert cluster.ended(job.number, 300) == "COMPLETED", job.log
    assert RESUMED.search(job.log) and "NODE FAILURE" in job.log
    assert_same_training(job.run_dir, undisturbed.run_dir)
    assert local_cluster("up", "--nodes", 4, "--netns", "--dir", cluster.directory).returncode == 0


def test_a_head_node_that_is_cut_off_does_not_keep_the_run_from_going_on(cluster, undisturbed, submit):
    """Its rank 0 lives and holds the lock of the run until its watchdog ends it: others wait for that."""
    if not cluster.namespaces:
        pytest.skip("a link that is cut needs root and network namespaces")
    job = submit("run", overrides=("--parallel.timeout_s=30",))
    job.reaches("step 15/")
    head = cluster.on("ctl", "scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()[0]
    cluster.on(head, "ip", "link", "set", "eth0", "down")
    try:
        requeued(cluster, job, 1)
        job.reaches("resuming at step ", 120)
        assert cluster.ended(job.number, 300) == "COMPLETED" and RESUMED.search(job.log), job.log
    finally:
        cluster.on(head, "ip", "link", "set", "eth0", "up")
        assert local_cluster("up", "--nodes", 4, "--netns", "--dir", cluster.directory).returncode == 0
    assert_same_training(job.run_dir, undisturbed.run_dir)


@dataclasses.dataclass(frozen=True)
class Torchrun:
    """launch/torchrun.sh with one rank on a host of the cluster, without SLURM."""

    process: subprocess.Popen
    log: Path

    def reaches(self, text: str, times: int = 1, timeout_s: float = 120) -> None:
        until(lambda: self.log.read_text().count(text) >= times, timeout_s, self.log.read_text)


@pytest.fixture
def torchrun(cluster, tmp_path):
    """`torchrun(host, config)`: started there, to train on one node or two, as many as there are."""
    if not cluster.namespaces:
        pytest.skip("a link that is cut needs root and network namespaces")
    started: list[Torchrun] = []
    environment = os.environ | {
        "NNODES": "1:2",
        "RDZV_ID": "elastic",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "MAX_RESTARTS": "5",
    }

    def start(host: str, config: Path) -> Torchrun:
        log = tmp_path / f"{host}-{len(started)}.log"
        command = [cluster.directory / "on", host, "bash", ROOT / "launch" / "torchrun.sh", "1", config]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(Torchrun(process, log))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def test_without_slurm_a_cut_off_node_is_left_out_and_taken_in_again(cluster, corpus, tmp_path, torchrun):
    """torchrun's elastic launch on two hosts, with one rank each; the other's link is cut in a step.

    All along, losses are those of one rank that nothing disturbs.
    """
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4},
        "data": {"train": str(corpus / "train")},
        "parallel": {"zero_stage": 2, "device": "cpu", "timeout_s": 10},
        "training": {"context": 128, "batch_size": 4, "steps": 100_000, "save_every": 10, "log_every": 1},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    first, second = torchrun("node1", tmp_path / "c.yaml"), torchrun("node2", tmp_path / "c.yaml")
    first.reaches("step 15/")
    assert "2 ranks on cpu" in first.log.read_text()
    cluster.on("node2", "ip", "link", "set", "eth0", "down")
    try:
        began = time.monotonic()
        first.reaches("1 ranks on cpu")
        assert time.monotonic() - began < 90
        first.reaches("resuming at step")
        assert second.process.wait(timeout=120) != 0, "the cut-off launcher has nothing to go on with"
    finally:
        cluster.on("node2", "ip", "link", "set", "eth0", "up")
    torchrun("node2", tmp_path / "c.yaml")
    first.reaches("2 ranks on cpu", times=2)
    first.reaches("resuming at step", times=2)

    def steps_of(text: str) -> dict[int, float]:
        return {
            int(step): float(loss) for step, loss in re.findall(r"step (\d+)/100000  loss ([\d.]+)", text)
        }

    until(
        lambda: len(steps_of(first.log.read_text().split("resuming at step")[2])) > 10,
        60,
        first.log.read_text,
    )
    os.killpg(first.process.pid, signal.SIGKILL)
    text = first.log.read_text()
    assert "rank 1: no sign of life" in text and "refused" not in text
    found, alone = steps_of(text), tmp_path / "alone.log"
    command = (sys.executable, "-m", "pi_dist", "train", f"--config={tmp_path / 'c.yaml'}")
    with alone.open("w") as file:
        process = subprocess.Popen([*command, f"--run_dir={tmp_path / 'alone'}"], stdout=file, stderr=file)
        try:
            until(lambda: max(found) in steps_of(alone.read_text()), 120, alone.read_text)
        finally:
            process.kill()
            process.wait()
    expected = steps_of(alone.read_text())
    assert found.keys() == set(range(1, max(found) + 1))
    assert found == pytest.approx({step: expected[step] for step in found}, abs=2e-4)


def test_a_killed_rank_is_started_again_with_the_others(cluster, undisturbed, submit):
    job = submit("run")
    job.reaches("step 15/")
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    assert cluster.ended(job.number, 300) == "COMPLETED", job.log
    assert RESUMED.search(job.log) and "requeued 1 times" not in job.log
    assert_same_training(job.run_dir, undisturbed.run_dir)


def test_the_first_error_of_four_ranks_is_the_last_thing_said(cluster, submit, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(in_a_step(2, 1, "raise KeyError('injected')"))
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    job = submit("run", "--gpus-per-node=2", env=environment)
    cluster.on("ctl", "scancel", job.number)
    job.script.write_text(job.script.read_text().replace("max_restarts=3", "max_restarts=0"))
    stale = job.run_dir / "logs" / f"{int(job.number) + 99}-0_x" / "attempt_7" / "0" / "error.json"
    stale.parent.mkdir(parents=True)  # of another job of the run
    stale.write_text('{"message": "rank 0: of another job", "timestamp": 1}')
    os.utime(stale, (2**32, 2**32))
    sbatch = ("sbatch", "--parsable", job.script)
    job = Submitted(cluster.on("ctl", *sbatch, env=os.environ | environment).strip(), job.run_dir)
    assert cluster.ended(job.number, 300) == "FAILED"
    assert job.log.endswith("\nrank 2: KeyError: 'injected'\n"), job.log


def test_before_the_time_limit_the_run_saves_and_goes_on_and_requeues_are_bounded(cluster, submit):
    options = ("--max-requeues=1", "--grace=110")
    job = submit("run", *options, overrides=("--training.steps=100000", "--training.save_every=0"))
    job.reaches("step 3/")
    cluster.on("ctl", "scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    job.reaches("stopped by SIGUSR1 after step", 90)  # SLURM looks every 30 s
    job.reaches("requeued 1 times", 120)
    job.reaches("resuming at step", 120)
    cluster.on("ctl", "scancel", "--signal=USR1", job.number)
    assert cluster.ended(job.number, 120) == "FAILED"
    assert "requeues (1) < max_requeues (1) does not hold; state is saved" in job.log
    assert cluster.job(job.number)["ExitCode"] == "75:0"
    assert len(list(job.run_dir.glob("checkpoints/step-*"))) == 2


def test_a_cancelled_run_saves_and_is_not_requeued(cluster, submit):
    job = submit("run", overrides=("--training.steps=100000", "--training.save_every=0"))
    job.reaches("step 3/")
    cluster.on("ctl", "scancel", job.number)
    assert cluster.ended(job.number, 120) == "CANCELLED"
    until(lambda: "stopped by SIGTERM after step" in job.log, 60, lambda: job.log)
    assert list(job.run_dir.glob("checkpoints/step-*")) and "requeued, to go on" not in job.log
    until(lambda: not ranks_of(job), 60, lambda: f"left: {ranks_of(job)}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--nodes=1"], "nodes of the job (1) == nodes (2) does not hold"),
        (["--ntasks-per-node=2"], "tasks (4) == nodes (2) does not hold"),
    ],
)
def test_a_script_for_another_world_size_is_refused(cluster, submit, options, named):
    job = submit("run", overrides=("--training.steps=100000",))
    cluster.on("ctl", "scancel", job.number)
    number = cluster.on("ctl", "sbatch", "--parsable", *options, job.script).strip()
    assert cluster.ended(number, 180) == "FAILED"
    log = Submitted(number, job.run_dir).log
    assert named in log and "loss" not in log


@pytest.mark.parametrize(
    ("getent", "named"),
    [
        ("exit 2", "resolves to no address, and neither does its NodeAddr"),
        (
            '[[ "$2" == "$SLURMD_NODENAME" ]] && echo 127.0.1.1 || echo 10.77.0.2',
            "the head node resolves to 127.0.1.1",
        ),
    ],
)
def test_a_head_node_that_cannot_be_reached_is_an_error_in_seconds(cluster, submit, tmp_path, getent, named):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "getent").write_text(f"#!/usr/bin/env bash\n{getent}\n")
    (tmp_path / "bin" / "getent").chmod(0o755)
    job = submit("run", env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert cluster.ended(job.number, 180) == "FAILED"
    assert named in job.log and "loss" not in job.log


def test_a_taken_port_is_an_error_in_seconds(cluster, submit):
    job = submit("run")
    cluster.on("ctl", "scancel", job.number)
    sbatch = ("sbatch", "--parsable", "--hold", "--nodelist=node1,node2", job.script)
    number = cluster.on("ctl", *sbatch).strip()
    port = 20000 + int(number) % 10000
    code = f"import socket, time; s = socket.create_server(('', {port})); print(flush=True); time.sleep(600)"
    listener = subprocess.Popen(
        [str(cluster.directory / "on"), "node1", sys.executable, "-c", code], stdout=subprocess.PIPE
    )
    try:
        listener.stdout.readline()
        cluster.on("ctl", "scontrol", "release", number)
        assert cluster.ended(number, 180) == "FAILED"
    finally:
        listener.kill()
        listener.wait()
    assert f"port {port} of the head node" in Submitted(number, job.run_dir).log


def test_what_the_interactive_shell_is_said_to_run_runs_on_every_node(cluster):
    """The commands at the top of the script, on nodes with one rank each."""
    top = (ROOT / "slurm" / "interactive.sh").read_text().split("set -euo")[0].replace("\n#   ", "\n")
    one, doctor = re.findall(r"^(srun (?:.*\\\n)*.*)$", top, re.MULTILINE)
    one = one.replace("nvidia-smi -L     on every node", "hostname")
    doctor = doctor.replace(".venv/bin/python", sys.executable).replace(
        "--nproc-per-node=8", "--nproc-per-node=1"
    )
    command = ("script", "-qec", f"bash {ROOT}/slurm/interactive.sh --nodes=2", "/dev/null")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = cluster.on(
        "ctl", *command, input=f"{one} </dev/null | sort\n{doctor} </dev/null\nexit\n", env=environment
    )
    assert "node1\nnode2\n" in said and "2 on 2 hosts see each other over gloo" in said, said


def test_an_interactive_allocation_is_a_shell_on_a_node(cluster):
    shell = ("script", "-qec", f"bash {ROOT}/slurm/interactive.sh --nodelist=node2", "/dev/null")
    said = cluster.on("ctl", *shell, input="echo on $SLURMD_NODENAME of $SLURM_JOB_NAME; exit\n")
    assert "on node2 of pi-dist-shell" in said


def test_doctor_names_the_nodes_that_do_not_see_each_other(cluster, tmp_path):
    """As slurm/interactive.sh shows it; between two of four nodes nothing passes."""
    if not cluster.namespaces:
        pytest.skip("a link that is cut needs root and network namespaces")
    script = tmp_path / "doctor.sh"
    script.write_text(
        "#!/usr/bin/env bash\n"
        f"exec srun --cpu-bind=none {sys.executable} -m torch.distributed.run --nnodes=4 --nproc-per-node=1 "
        "--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID "
        "--rdzv-endpoint=$(scontrol show hostnames | head -n 1):29400 "
        f"-m pi_dist doctor --timeout 8 --json {tmp_path}/found.json\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    routes = [("node2", "10.77.0.3/32"), ("node3", "10.77.0.2/32")]
    for node, other in routes:
        cluster.on(node, "ip", "route", "add", "unreachable", other)
    try:
        options = ("--parsable", "-N4", "--ntasks-per-node=1", "-o", tmp_path / "log")
        number = cluster.on("ctl", "sbatch", *options, script, env=environment).strip()
        assert cluster.ended(number, 240) == "FAILED"
    finally:
        for node, other in routes:
            cluster.on(node, "ip", "route", "del", "unreachable", other)
    found = json.loads((tmp_path / "found.json").read_text())
    missing = {f["name"]: f["detail"] for f in found["findings"] if f["state"] == "missing" and f["required"]}
    assert not found["ok"] and missing.keys() == {"rank 1", "rank 2"}
    assert "rank 1 on node2" in missing["rank 1"] and "rank 2 on node3" in missing["rank 2"]


@pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="needs .venv, as made by install.sh"
)
def test_a_sweep_of_savings_is_an_array_whose_records_join(cluster, tmp_path):
    """Submitted again, it finds its rows made."""
    output, rows = tmp_path / "a sweep", []
    log, flags = f"--output={tmp_path}/%a.log", ("--preset=small", "--predict")
    for _ in range(2):
        asked = ("--parsable", "--array=3,8", log, "slurm/savings.sbatch", output, *flags)
        number = cluster.on("ctl", "sbatch", *asked, cwd=ROOT).strip()
        for task in (3, 8):
            assert cluster.ended(f"{number}_{task}", 120) == "COMPLETED", (
                tmp_path / f"{task}.log"
            ).read_text()
        rows.append(
            [json.loads((output / f"{context}.json").read_text())["rows"] for context in (32768, 1048576)]
        )
    assert rows[0] == rows[1] and all(rows[0])
    joined, report = tmp_path / "all.json", tmp_path / "savings.md"
    command = (sys.executable, "-m", "pi_dist", "savings", "--from", *output.glob("*.json"))
    subprocess.run([*command, f"--json={joined}", f"--report={report}"], check=True, cwd=ROOT)
    assert {row["context"] for row in json.loads(joined.read_text())["rows"]} == {32768, 1048576}
    assert "1,048,576 tokens" in report.read_text()
