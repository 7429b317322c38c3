"""Ranks that are stopped, killed or slow, in real jobs: named, ended in bounded time, restarted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import Ranks, free_port
from safetensors.torch import load_file
from test_cli import ENVIRONMENT, ROOT, SMALL
from test_launch import KILLED_ONCE, in_a_step
from test_trainer import config_for

from pi_dist.data.loader import SequenceLoader
from pi_dist.training import watchdog
from pi_dist.training.checkpoint import find_newest
from pi_dist.training.metrics import Metrics
from pi_dist.training.trainer import train
from pi_dist.training.watchdog import HUNG


def hurried(*limits):
    """Code by which the ranks have these seconds from step 2 on, and before what a slow machine may need.

    They look every half second.
    """
    return f"""
import os, time
if "RANK" in os.environ:
    from pi_dist.training import watchdog
    watchdog.LONGEST_INTERVAL_S = 0.5
    at = watchdog.Watchdog.at

    def at_or_hurried(self, step, section):
        if step == 2:
            self._timeout_s = {limits}[self._rank]
        at(self, step, section)

    watchdog.Watchdog.at = at_or_hurried
"""


def with_site(folder, code):
    """The environment of processes that execute this first."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def start_job(corpus, run_dir, *overrides, restarts=0, environment=None):
    """Two ranks under torchrun; lines of its output can be read."""
    where = [f"--data.train={corpus}/train", "--data.heldout=null", f"--run_dir={run_dir}"]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
    ]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "pi_dist", "train", *SMALL, *where, *overrides],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(job, text):
    """Read the job's output up to a line with this text."""
    seen = []
    for line in job.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} not in {''.join(seen)}, {job.stderr.read()}")


def process_of(job, rank):
    """The process id of a rank of a job."""
    for entry in (entry for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == job.pid and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


def end(job):
    """Nothing of a job survives its test."""
    for rank in (0, 1):
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(process_of(job, rank), signal.SIGKILL)
    job.kill()


def is_alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def stop_a_rank(corpus, run_dir, rank, environment):
    """(what the job says on stderr, the process of the rank) of a job whose rank is stopped in step 4."""
    limits = ("--training.steps=100000", "--parallel.timeout_s=60")
    job = start_job(
        corpus, run_dir, *limits, environment=environment | with_site(run_dir.parent, hurried(4.0, 4.0))
    )
    try:
        wait_for(job, "step 3/")
        stopped = process_of(job, rank)
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        _, err = job.communicate(timeout=240)
        assert time.monotonic() - began < 180 and job.returncode != 0
    finally:
        end(job)
    assert "error: no step for 4 s" in err and f"exitcode  : {HUNG}" in err
    assert "no step for 4 s" in err[err.rindex("Root Cause") :], err  # the last that is said
    return err, stopped


def test_a_stopped_rank_is_named_and_the_job_ends_with_stacks(corpus, tmp_path):
    err, stopped = stop_a_rank(corpus, tmp_path / "run", 1, {})
    assert "rank 1: no sign of life; last seen" in err and "rank 0: in" in err, err
    stacks = (tmp_path / "run" / "stacks" / "rank_0.txt").read_text()
    assert "rank 0, pid " in stacks and "trainer.py" in stacks and "watchdog.py" in stacks
    assert not is_alive(stopped)


def test_a_stopped_rank_that_hosts_the_store_ends_the_job_too(corpus, tmp_path):
    """As under mpirun and launch/torchrun.sh."""
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    err, stopped = stop_a_rank(corpus, tmp_path / "run", 0, own_store)
    assert "which rank 0 may host: no answer" in err, err
    assert "trainer.py" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()
    assert not is_alive(stopped)


STORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
while True:
    print(store.num_keys(), flush=True)
    time.sleep(0.05)
"""
IMPATIENT = "from pi_dist.training import trainer; trainer.COLLECTIVES_LATER_S = 1.0\n"
IMPATIENT += "import sys; from pi_dist.cli import main; main(sys.argv[1:])"


def test_a_store_that_stops_while_ranks_find_each_other_ends_them(corpus, tmp_path):
    """PyTorch's own time-out would never come: it waits for the store to take the question back."""
    port = free_port()
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    flags = [f"--data.train={corpus}/train", "--data.heldout=null", f"--run_dir={tmp_path}/run"]
    flags += ["--parallel.sp_degree=2", "--parallel.timeout_s=2"]
    store = subprocess.Popen([sys.executable, "-c", STORE, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        at_first = int(store.stdout.readline())
        rank = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "train", *SMALL, *flags],
            env=ENVIRONMENT | launched,
            stderr=subprocess.PIPE,
            text=True,
        )
        while int(store.stdout.readline()) == at_first:  # until the rank has said where it is
            assert rank.poll() is None, rank.stderr.read()
        store.send_signal(signal.SIGSTOP)
        said = rank.communicate(timeout=240)[1]
    finally:
        store.kill()
        store.wait()
        rank.kill()
    assert rank.returncode == HUNG, said
    assert "error: rank 1: the ranks have not found each other in 6 s" in said
    assert "init_process_group" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()


def test_stacks_are_kept_also_when_nobody_reads_what_is_said(tmp_path):
    """And torchrun, if it is there, is told what was said."""
    script = f"""from pathlib import Path
from pi_dist.training.watchdog import _die
input()
_die(["error: rank 1 is stopped"], Path({str(tmp_path)!r}) / "stacks" / "rank_0.txt", "rank 0")"""
    environment = os.environ | {"RANK": "0", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    rank = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
    )
    rank.stderr.close()
    rank.communicate(b"\n", timeout=60)
    assert (
        rank.returncode == HUNG and "most recent call first" in (tmp_path / "stacks/rank_0.txt").read_text()
    )
    assert '"message": "rank 0: rank 1 is stopped; stacks' in (tmp_path / "error.json").read_text()


def test_a_killed_rank_ends_the_job_and_its_restart_leaves_no_trace(corpus, tmp_path):
    """In step 5, between checkpoints; the final weights equal those of an undisturbed run bit by bit."""
    options = ["--training.steps=12", "--training.save_every=3", "--training.batch_size=2"]
    site = with_site(tmp_path, in_a_step(1, 4, KILLED_ONCE))
    job = start_job(corpus, tmp_path / "killed", *options, restarts=1, environment=site)
    try:
        out, err = job.communicate(timeout=300)
    finally:
        end(job)
    assert job.returncode == 0 and "resuming at step 3" in out, out + err
    assert "failed (exitcode: -9) local_rank: 1" in err, err
    undisturbed = start_job(corpus, tmp_path / "whole", *options)
    undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0
    newest = [find_newest(tmp_path / name)[0] for name in ("killed", "whole")]
    assert [checkpoint.step for checkpoint in newest] == [12, 12]
    found, expected = (load_file(checkpoint.path / "model.safetensors") for checkpoint in newest)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_ranks_whose_launcher_is_killed_save_and_fail(corpus, tmp_path):
    """Without torchrun, whose store is gone with it, they would train on unseen."""
    limits = ("--training.steps=100000", "--training.save_every=0", "--parallel.timeout_s=60")
    job = start_job(corpus, tmp_path / "run", *limits, environment=with_site(tmp_path, hurried(4.0, 4.0)))
    ranks = []
    try:
        wait_for(job, "step 3/")
        ranks = [process_of(job, rank) for rank in (0, 1)]
        job.kill()
        out, err = job.communicate(timeout=180)  # until the ranks have let go of its pipes
    finally:
        for pid in filter(is_alive, ranks):
            os.kill(pid, signal.SIGKILL)
        end(job)
    found, refused = find_newest(tmp_path / "run")
    assert f"has ended; step {found.step} is saved in {found.path}" in err and not refused, out + err
    assert any(f"rank {rank}: its launcher, process {job.pid}, has ended" in err for rank in (0, 1)), err


def train_with_a_slow_loader(config):
    """What rank 0 says while rank 1 waits for its third batch, until rank 0 has said so."""
    said, iterate, told = [], SequenceLoader.iterate, Path(config.run_dir) / "told"
    watchdog.LONGEST_INTERVAL_S = 0.5

    def say(text):
        said.append(text)
        if NAMED in text:
            told.touch()

    def slow(self, first):
        for number, batches in enumerate(iterate(self, first)):
            until = time.monotonic() + 50
            while number == 2 and dist.get_rank() == 1 and not told.exists() and time.monotonic() < until:
                time.sleep(0.05)
            yield batches

    SequenceLoader.iterate, Metrics.say = slow, staticmethod(say)
    train(config)
    return said


NAMED = "rank 1 is behind, in 'data' of step 3 for"


def test_a_slow_rank_is_named_with_its_section(corpus, tmp_path):
    config = config_for(corpus, tmp_path, steps=4, eval_every=0, save_every=0)
    with Ranks(2) as ranks:
        said, _ = ranks.run(train_with_a_slow_loader, config)
    assert any(text.startswith("warning: rank") and NAMED in text for text in said), said


def hung_job(corpus, run_dir, tmp_path, module, name, *overrides, site):
    """What a job says whose rank 1, alive, hangs where this function is called."""
    hanging = (
        "if os.environ.get('RANK') == '1':\n"
        f"    import {module} as module\n"
        f"    module.{name} = lambda *_, **__: time.sleep(600)\n"
    )
    limits = ("--training.steps=100000", *overrides)
    job = start_job(corpus, run_dir, *limits, environment=with_site(tmp_path, site + hanging))
    try:
        _, err = job.communicate(timeout=300)
        assert job.returncode != 0
    finally:
        end(job)
    return err


@pytest.mark.slow  # torchrun waits for the rank that hangs
def test_a_live_rank_that_hangs_in_an_evaluation_is_named(corpus, tmp_path):
    options = (f"--data.heldout={corpus}/heldout", "--training.eval_every=2", "--parallel.timeout_s=60")
    where = ("pi_dist.training.evaluate", "evaluated_loss")
    site = hurried(5.0, 4.0)  # rank 0 speaks for both, though it is late later
    err = hung_job(corpus, tmp_path / "run", tmp_path, *where, *options, site=site)
    assert "error: no step for 5 s" in err and "rank 1: in 'evaluation' of step 2" in err, err
    assert "evaluate.py" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()


SOON = """
import os, time
if "RANK" in os.environ:
    from pi_dist.training import trainer
    trainer.COLLECTIVES_LATER_S = 2.0
"""


@pytest.mark.slow  # torchrun waits for the rank that hangs
def test_a_live_rank_that_hangs_in_a_checkpoint_is_named(corpus, tmp_path):
    """Others wait in a collective, whose own time-out knows no names."""
    where, options = ("pi_dist.training.checkpoint", "_entry"), ("--training.save_every=2",)
    options += ("--parallel.timeout_s=8",)
    err = hung_job(corpus, tmp_path / "run", tmp_path, *where, *options, site=SOON)
    assert "it may have waited for rank 1, in 'checkpoint' of step 2 for" in err, err


def test_a_signal_before_the_first_step_is_not_lost(corpus, tmp_path):
    """As a cluster sends it, once: while the ranks import, to each of them."""
    job = start_job(corpus, tmp_path / "run", "--training.steps=100000", "--training.save_every=0")
    try:
        ranks = []
        while len(ranks) < 2:
            with contextlib.suppress(AssertionError):
                ranks = [process_of(job, rank) for rank in (0, 1)]
        heeded = 1 << (signal.SIGUSR1 - 1)
        for rank in ranks:
            while not heeded & int(status_of(rank, "SigCgt"), 16):
                time.sleep(0.01)
            os.kill(rank, signal.SIGUSR1)
        out, err = job.communicate(timeout=300)
    finally:
        end(job)
    assert job.returncode == 0 and "stopped by SIGUSR1 after step 1" in out, out + err
    assert find_newest(tmp_path / "run")[0].step == 1


def status_of(pid, name):
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
