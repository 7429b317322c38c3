"""The launch scripts, as one node and as two: all end with the training of ranks without a launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from distributed import Ranks, free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_dist.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig

ROOT = Path(__file__).parents[1]
UNSET = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "HOSTFILE", "MAX_RESTARTS")


def config_for(corpus: Path, run_dir: Path, steps: int = 8) -> Config:
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(num_layers=2, hidden_size=32, num_heads=4),
        data=DataConfig(train=str(corpus / "train")),
        parallel=ParallelConfig(sp_degree=2, zero_stage=2, device="cpu", timeout_s=60),
        training=TrainingConfig(context=128, batch_size=4, steps=steps, warmup_steps=2, save_every=4),
    )


def losses(run_dir: Path) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {point.step: point.value for point in events.Scalars("train/loss")}


def train(config: Config) -> None:
    from pi_dist.training.trainer import train

    train(config)


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("launch") / "run"
    with Ranks(2) as ranks:
        ranks.run(train, config_for(corpus, run_dir))
    return losses(run_dir)


@pytest.fixture
def launch(corpus, tmp_path):
    """`launch(script, nproc, *environments)`: the script on one or several "nodes" of this machine."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_for(corpus, tmp_path / "run").to_dict()))
    started = []

    def call(script: str, nproc: int, *environments: dict[str, str]) -> list[subprocess.Popen]:
        base = {name: value for name, value in os.environ.items() if name not in UNSET}
        command = ["bash", str(ROOT / "launch" / script), str(nproc), str(tmp_path / "c.yaml")]
        for environment in environments:
            own = base | {"OMP_NUM_THREADS": "1"} | environment
            log = (tmp_path / f"log-{len(started)}").open("w")
            started.append(
                subprocess.Popen(
                    command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        return started

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(processes: list[subprocess.Popen], folder: Path) -> None:
    for number, process in enumerate(processes):
        assert process.wait(timeout=150) == 0, (folder / f"log-{number}").read_text()


def nodes(**common: str) -> list[dict[str, str]]:
    """The environments of two nodes: MASTER_* are the same, NODE_RANK is not."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [where | common | {"NODE_RANK": str(rank)} for rank in range(2)]


def test_deepspeeds_launcher_on_one_node(launch, expected, tmp_path):
    finish(launch("deepspeed.sh", 2, {"MASTER_PORT": str(free_port())}), tmp_path)
    assert losses(tmp_path / "run") == expected


def test_deepspeeds_launcher_with_a_hostfile(launch, expected, tmp_path):
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    finish(launch("deepspeed.sh", 1, *nodes(HOSTFILE=str(tmp_path / "hosts"))), tmp_path)
    assert losses(tmp_path / "run") == expected


def test_torchrun_with_static_rendezvous(launch, expected, tmp_path):
    finish(launch("torchrun.sh", 1, *nodes(NNODES="2")), tmp_path)
    assert losses(tmp_path / "run") == expected


def test_the_first_error_of_four_ranks_is_the_last_thing_said(launch, tmp_path):
    """Rank 2 raises in its second step; the collectives of the others fail then, and they say why."""
    (tmp_path / "sitecustomize.py").write_text(BREAKS_IN_RANK_2)
    (process,) = launch("torchrun.sh", 4, {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert process.wait(timeout=150) == 1
    log = (tmp_path / "log-0").read_text()
    end = log[log.rindex("Root Cause") :]
    assert "rank      : 2 " in end and "traceback : rank 2: KeyError: 'injected'" in end, log
    files = {int(path.parent.name): path for path in (tmp_path / "run" / "logs").rglob("stderr.log")}
    assert files.keys() == {0, 1, 2, 3} and "KeyError: 'injected'" in files[2].read_text()
    said = [path.read_text() for rank, path in files.items() if rank != 2]
    assert all("Traceback" not in text or "the first to fail was rank 2: KeyError" in text for text in said)


BREAKS_IN_RANK_2 = """
import os, sys, threading, time

def break_it():
    while not hasattr(sys.modules.get("pi_dist.training.trainer"), "_Run"):
        time.sleep(0.01)
    run = sys.modules["pi_dist.training.trainer"]._Run
    step = run._step

    def broken(self, number, *others):
        if number == 1:
            raise KeyError("injected")
        return step(self, number, *others)

    run._step = broken

if os.environ.get("RANK") == "2":
    threading.Thread(target=break_it, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("unheard-of.invalid", "the name unheard-of.invalid resolves to no address"),
        ("localhost", "localhost resolves to 127.0.0.1, which other nodes cannot reach"),
        ("127.0.0.1", "of 127.0.0.1 is taken"),
    ],
)
def test_a_head_node_that_cannot_be_used_is_an_error_in_seconds(launch, tmp_path, address, named):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        where = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": port}
        (process,) = launch("torchrun.sh", 1, where)
        assert process.wait(timeout=30) == 2
    assert named in (tmp_path / "log-0").read_text()


def test_torchrun_with_c10d_rendezvous_starts_again_when_a_rank_is_killed(launch, expected, tmp_path):
    two = nodes(NNODES="2", RDZV_ID="test", MAX_RESTARTS="1")
    processes = launch("torchrun.sh", 1, *({k: v for k, v in n.items() if k != "NODE_RANK"} for n in two))
    saved = tmp_path / "run" / "checkpoints" / "step-00000004"
    deadline = time.monotonic() + 100
    while not saved.exists():
        assert time.monotonic() < deadline, (tmp_path / "log-0").read_text()
        time.sleep(0.02)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().split("\0")
            parent = int((folder / "stat").read_text().split(")")[1].split()[1])
        except OSError:
            continue
        if "pi_dist" in command and parent == processes[0].pid:
            os.kill(int(folder.name), signal.SIGKILL)
            break
    finish(processes, tmp_path)
    assert losses(tmp_path / "run") == expected
    log = (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert "resuming at step 4 from" in log
