"""The launch scripts, as one node and as two: all end with the training of ranks without a launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml
from distributed import Ranks, free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_dist.commands.train import UNFINISHED
from pi_dist.config import Config, ConfigError, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from pi_dist.parallel import process_group
from pi_dist.training.checkpoint import find_newest

ROOT = Path(__file__).parents[1]
UNSET = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "HOSTFILE", "MAX_RESTARTS")


def config_for(corpus: Path, run_dir: Path, device: str = "cpu") -> Config:
    sizes = {"context": 128, "batch_size": 4, "steps": 8, "warmup_steps": 2, "save_every": 4}
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(num_layers=2, hidden_size=32, num_heads=4),
        data=DataConfig(train=str(corpus / "train")),
        parallel=ParallelConfig(sp_degree=2, zero_stage=2, device=device, timeout_s=60),
        training=TrainingConfig(**sizes, compile=False),
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

    def call(
        script: str, nproc: int, *environments: dict[str, str], overrides: Iterable[str] = ()
    ) -> list[subprocess.Popen]:
        base = {name: value for name, value in os.environ.items() if name not in UNSET}
        command = ["bash", str(ROOT / "launch" / script), str(nproc), str(tmp_path / "c.yaml")]
        command += overrides
        for environment in environments:
            own = base | {"OMP_NUM_THREADS": "1"} | environment
            log = (tmp_path / f"log-{len(started)}").open("w")
            started.append(
                subprocess.Popen(
                    command,
                    env=own,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=heed_all,
                )
            )
        return started

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for number in started_from(tmp_path):  # the scripts start them in process groups of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def started_from(folder: Path) -> dict[int, str]:
    """The processes that name a folder, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_text(errors="replace")
            if f"{folder}/" in command and int(path.parent.name) != os.getpid():
                found[int(path.parent.name)] = command
    return found


def wait_for(happened: Callable[[], object], folder: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, (folder / "log-0").read_text()
        time.sleep(0.05)


def finish(processes: list[subprocess.Popen], folder: Path) -> None:
    for number, process in enumerate(processes):
        assert process.wait(timeout=300) == 0, (folder / f"log-{number}").read_text()


def speaking(folder: Path) -> dict[str, str]:
    """The environment of ranks of which the second says something on stderr."""
    (folder / "sitecustomize.py").write_text(in_a_step(1, 1, r"os.write(2, b'said by rank 1\n')"))
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def check_logs(folder: Path) -> None:
    """Each of the two ranks has a file of its own, and what it said was shown too."""
    files = sorted((folder / "run" / "logs").iterdir())
    assert [path.name for path in files] == ["rank-0.log", "rank-1.log"]
    said = [path.read_text().count("said by rank 1\n") for path in (*files, folder / "log-0")]
    assert said == [0, 1, 1]


def nodes(**common: str) -> list[dict[str, str]]:
    """The environments of two nodes: MASTER_* are the same, NODE_RANK is not."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [where | common | {"NODE_RANK": str(rank)} for rank in range(2)]


def test_mpirun(launch, expected, tmp_path):
    finish(launch("mpirun.sh", 2, speaking(tmp_path)), tmp_path)
    assert losses(tmp_path / "run") == expected
    check_logs(tmp_path)


@pytest.fixture
def two_hosts(tmp_path):
    """`two_hosts(host, command)`: a command line on `host1` or `host2`, which are network namespaces.

    A script in the test's folder that does it, as ssh would.
    """
    names = [f"pi-mpi-{os.getpid()}-host{number}" for number in (1, 2)]
    probe = subprocess.run(["unshare", "-mnu", "true"], stderr=subprocess.DEVNULL)
    if os.geteuid() != 0 or probe.returncode or not shutil.which("ip"):
        pytest.skip("hosts need root and network namespaces")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.78.0.1 host1\n10.78.0.2 host2\n")
    agent = tmp_path / "agent"
    enter = f'mount --bind {tmp_path}/hosts /etc/hosts && hostname "$0" && exec bash -c "$1"'
    agent.write_text(
        f"""#!/usr/bin/env bash
exec nsenter --net="/run/netns/pi-mpi-{os.getpid()}-$1" unshare -mu --propagation private \\
    bash -c '{enter}' "$1" "${{*:2}}"
"""
    )
    agent.chmod(0o755)
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        link = ["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1]]
        subprocess.run(["ip", "-n", names[0], *link], check=True)
        for number, name in enumerate(names, 1):
            for change in (
                ["addr", "add", f"10.78.0.{number}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", name, *change], check=True)
        yield agent
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def test_mpirun_on_two_hosts(two_hosts, corpus, expected, tmp_path):
    """Hosts are network namespaces, and the agent that enters them stands for ssh."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, socket\n"
        "if 'OMPI_COMM_WORLD_RANK' in os.environ:\n"
        f"    said = pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ['OMPI_COMM_WORLD_RANK'])\n"
        "    said.write_text(socket.gethostname())\n"
    )
    (tmp_path / "nodes").write_text("host1 slots=1\nhost2 slots=1\n")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_for(corpus, tmp_path / "run").to_dict()))
    environment = {
        "PRTE_MCA_plm_ssh_agent": str(two_hosts),
        "PRTE_MCA_prte_default_hostfile": str(tmp_path / "nodes"),
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    command = f"bash {ROOT}/launch/mpirun.sh 2 {tmp_path}/c.yaml"
    done = subprocess.run(
        [two_hosts, "host1", command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["host1", "host2"]
    assert losses(tmp_path / "run") == expected
    alone = config_for(corpus, tmp_path / "alone")
    with Ranks(1) as ranks:
        parallel = dataclasses.replace(alone.parallel, sp_degree=1)
        ranks.run(train, dataclasses.replace(alone, parallel=parallel))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_deepspeeds_launcher_on_one_node(launch, expected, tmp_path):
    finish(launch("deepspeed.sh", 2, speaking(tmp_path) | {"MASTER_PORT": str(free_port())}), tmp_path)
    assert losses(tmp_path / "run") == expected
    check_logs(tmp_path)


def test_deepspeeds_launcher_with_a_hostfile(launch, expected, tmp_path):
    (tmp_path / "hosts").write_text("# first slots=1\nfirst slots=1\nsecond slots=1\n")
    finish(launch("deepspeed.sh", 1, *nodes(HOSTFILE=str(tmp_path / "hosts"))), tmp_path)
    assert losses(tmp_path / "run") == expected


def heed_all() -> None:
    """In a child: signals that this process ignores, as under nohup, no shell could trap."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


ENDLESS = ("--training.steps=100000", "--training.save_every=100000")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["deepspeed.sh", "mpirun.sh"])
def test_a_signal_to_the_launcher_saves_and_ends_all_ranks(launch, tmp_path, script, number):
    """To its process group, as Ctrl-C does."""
    log = tmp_path / "log-0"
    (process,) = launch(script, 2, {"MASTER_PORT": str(free_port())}, overrides=ENDLESS)
    wait_for(lambda: "step 2/" in log.read_text(), tmp_path)
    os.killpg(process.pid, number)
    assert process.wait(timeout=180) == 0, log.read_text()
    wait_for(lambda: not started_from(tmp_path), tmp_path)  # processes of the loader
    step = find_newest(tmp_path / "run")[0].step
    assert step >= 2 and f" after step {step}; checkpoint" in log.read_text(), log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_launcher_waits_after_each_signal(tmp_path, number):
    told = "trap 'echo told; sleep 0.4; exit 5' USR1; echo ready; while :; do sleep 0.05; done"
    script = f'set -eu; source "$0"; run_and_forward USR1 bash -c "{told}"; echo "$status $signalled"'
    command = ["bash", "-c", script, str(ROOT / "launch" / "forward_signals.sh")]
    options = {"start_new_session": True, "preexec_fn": heed_all}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "told\n"
        process.send_signal(number)
        assert process.stdout.read().split("\n")[-2] == f"5 {number.name[3:]}"


def test_deepspeeds_launcher_does_not_hide_that_it_was_killed(launch, tmp_path):
    log = tmp_path / "log-0"
    (process,) = launch("deepspeed.sh", 2, {"MASTER_PORT": str(free_port())}, overrides=ENDLESS)
    wait_for(lambda: "step 1/" in log.read_text(), tmp_path)
    commands = started_from(tmp_path).items()
    (launcher,) = [n for n, command in commands if "\0deepspeed.launcher.launch\0" in command]
    os.kill(launcher, signal.SIGKILL)
    assert process.wait(timeout=180) == UNFINISHED, log.read_text()
    assert "launch/deepspeed.sh: the run ended early: " in log.read_text()


def test_deepspeeds_launcher_over_ssh_keeps_arguments_as_they_are(launch, tmp_path):
    """A pdsh that runs the remote command here; the names have what a shell would execute or replace."""
    (tmp_path / "bin").mkdir()
    pdsh = """#!/usr/bin/env bash
[[ "$1 $2 $4" == "-S -f -w" ]] || exit 9
shift 5
remote="$*"
remote="${remote//%n/0}"
exec bash -c "${remote//%%/%}"
"""
    for name, text in (("pdsh", pdsh), ("ssh", "#!/usr/bin/env bash\necho 127.0.0.1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hosts").write_text("one slots=1\n")
    name = """it's"$(touch${IFS}x)`touch${IFS}x`%h\\"""
    run_dir, record = tmp_path / name / "run", tmp_path / name / 'a  "b\\" $(touch x) `touch x` %h.json'
    run_dir.mkdir(parents=True)
    overrides = [f"--run_dir={run_dir}", f"--record={record}", "--parallel.sp_degree=1"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_PORT": str(free_port()), "PATH": path}
    finish(launch("deepspeed.sh", 1, environment, overrides=overrides), tmp_path)
    assert find_newest(run_dir)[0].step == 8 and record.exists()
    assert not (Path.cwd() / "x").exists()


def test_an_mpi_that_is_not_known_is_refused(launch, tmp_path):
    """Its ranks would each be a run of one rank."""
    root = tmp_path / "root"
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", root / "launch")
    mpirun = """if [[ "$1" == --version ]]; then echo "another MPI" && exit; fi
for ((rank = 0; rank < $2; rank++)); do PMI_RANK=$rank PMI_SIZE=$2 "${@:3}" & started+=" $!"; done
for number in $started; do wait "$number" || status=$?; done
exit "${status:-0}"
"""
    (root / "launch" / "install.sh").write_text("")
    for name, text in (("mpirun", mpirun), ("python", f'exec "{sys.executable}" "$@"\n')):
        (root / ".venv" / "bin" / name).write_text("#!/usr/bin/env bash\n" + text)
        (root / ".venv" / "bin" / name).chmod(0o755)
    (process,) = launch(str(root / "launch" / "mpirun.sh"), 2, {}, overrides=["--parallel.sp_degree=1"])
    assert process.wait(timeout=180) != 0
    lines = (tmp_path / "log-0").read_text().splitlines()
    assert len(lines) == 2 and all("error: launch: " in line for line in lines), lines
    assert not (tmp_path / "run").exists()


def test_torchrun_with_static_rendezvous(launch, expected, tmp_path):
    finish(launch("torchrun.sh", 1, *nodes(NNODES="2")), tmp_path)
    assert losses(tmp_path / "run") == expected


def two_torchruns(config: Config, folder: Path, environments: list[dict[str, str]]) -> list[int]:
    """Train on two nodes of one rank; returns the exit status of each node's torchrun. It writes log-N."""
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    base = {name: value for name, value in os.environ.items() if name not in UNSET}
    started = []
    try:
        for node, environment in enumerate(environments):
            path = ":".join(filter(None, [str(folder), str(ROOT), base.get("PYTHONPATH")]))
            own = base | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
            torchrun = [sys.executable, "-m", "torch.distributed.run", f"--node-rank={node}", *where]
            command = [*torchrun, "-m", "pi_dist", "train", f"--config={folder / 'c.yaml'}"]
            with (folder / f"log-{node}").open("a") as log:
                started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        try:
            return [process.wait(timeout=300) for process in started]
        except subprocess.TimeoutExpired as error:
            said = [(folder / f"log-{node}").read_text() for node in range(len(environments))]
            raise AssertionError("\n".join(said)) from error
    finally:
        for process in started:
            process.kill()  # its rank ends then by itself
            process.wait()


def check_a_lost_node(
    corpus: Path,
    folder: Path,
    device: str,
    environments: list[dict[str, str]],
    expected: dict[int, float],
    tolerance: float,
) -> str:
    """All processes of one of two nodes are killed in step 6; both, started again, train as if undisturbed.

    Returns what the nodes say.
    """
    config = config_for(corpus, folder / "run", device)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, timeout_s=20))
    folder.mkdir(exist_ok=True)
    kill = "os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)"
    (folder / "sitecustomize.py").write_text(in_a_step(1, 5, kill))
    first, second = two_torchruns(config, folder, environments)
    log = folder / "log-0"
    assert first not in (0, -signal.SIGKILL) and second == -signal.SIGKILL, log.read_text()
    assert "step 5/8" in log.read_text() and "step 6/8" not in log.read_text()
    (folder / "sitecustomize.py").unlink()
    assert two_torchruns(config, folder, environments) == [0, 0], log.read_text()
    assert "resuming at step 4 from" in log.read_text()
    assert losses(folder / "run") == pytest.approx(expected, rel=tolerance, abs=0)
    return log.read_text() + (folder / "log-1").read_text()


def test_a_lost_node_of_two_comes_back(corpus, expected, tmp_path):
    """As `test_nccl.py` does with a GPU on each node."""
    check_a_lost_node(corpus, tmp_path, "cpu", [{}, {}], expected, 0)


def test_the_first_error_of_four_ranks_is_the_last_thing_said(launch, tmp_path):
    """Rank 2 raises in its second step; the collectives of the others fail then, and they say why."""
    (tmp_path / "sitecustomize.py").write_text(in_a_step(2, 1, "raise KeyError('injected')"))
    (process,) = launch("torchrun.sh", 4, {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert process.wait(timeout=300) == 1
    log = (tmp_path / "log-0").read_text()
    end = log[log.rindex("Root Cause") :]
    assert "rank      : 2 " in end and "traceback : rank 2: KeyError: 'injected'" in end, log
    files = {int(path.parent.name): path for path in (tmp_path / "run" / "logs").rglob("stderr.log")}
    assert files.keys() == {0, 1, 2, 3} and "KeyError: 'injected'" in files[2].read_text()
    said = [path.read_text() for rank, path in files.items() if rank != 2]
    assert all("Traceback" not in text or "the first to fail was rank 2: KeyError" in text for text in said)


def test_deepspeeds_launcher_does_not_cut_off_what_ranks_say_at_their_end(launch, tmp_path):
    """It ends the children of the other ranks at once, and of these what still says which rank failed."""
    (tmp_path / "sitecustomize.py").write_text(in_a_step(1, 1, "raise KeyError('injected')"))
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MASTER_PORT": str(free_port())}
    (process,) = launch("deepspeed.sh", 2, environment)
    assert process.wait(timeout=300) != 0
    logs = [(tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert "KeyError: 'injected'" in logs[1] and "the first to fail was rank 1: KeyError" in logs[0]
    shown = (tmp_path / "log-0").read_text()
    assert all(line in shown for log in logs for line in log.splitlines())


def test_a_ranks_file_gets_its_last_words_also_when_nobody_else_reads_them(tmp_path):
    script = f"""import os, signal
from pi_dist.training.rank_log import keep_stderr
keep_stderr({str(tmp_path)!r}, 1)
os.write(2, b"first\\n")
children = open(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read()
os.write(1, children.encode() + b"\\n")
os.read(0, 1)
os.write(2, b"second\\n")
os.kill(os.getpid(), signal.SIGKILL)"""
    pipe = subprocess.PIPE
    rank = subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT)
    assert rank.stdout.readline() == b"\n"  # no children, which a launcher might end
    assert rank.stderr.readline() == b"first\n"
    rank.stderr.close()
    rank.communicate(b"x")
    log = tmp_path / "logs" / "rank-1.log"
    wait_for(lambda: log.read_text() == "first\nsecond\n", tmp_path)


def in_a_step(rank: int, step: int, statement: str) -> str:
    """A sitecustomize.py by which a rank executes a statement in an optimizer step (0 is the first)."""
    return IN_A_STEP.format(rank=rank, step=step, statement=statement)


IN_A_STEP = """
import os, signal, sys, threading, time

def break_it():
    while not hasattr(sys.modules.get("pi_dist.training.trainer"), "_Run"):
        time.sleep(0.01)
    run = sys.modules["pi_dist.training.trainer"]._Run
    step = run._step

    def broken(self, number, *others):
        if number == {step}:
            {statement}
        return step(self, number, *others)

    run._step = broken

if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "{rank}":
    threading.Thread(target=break_it, daemon=True).start()
"""


KILLED_ONCE = "os.unlink(__file__); os.kill(os.getpid(), signal.SIGKILL)"  # a statement for `in_a_step`


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("unheard-of.invalid", "the name unheard-of.invalid resolves to no address"),
        ("localhost", "localhost resolves to 127.0.0.1, which other nodes cannot reach"),
        ("127.0.0.1", "of 127.0.0.1 is taken"),
    ],
)
def test_a_head_node_that_cannot_be_used_is_an_error_in_seconds(launch, tmp_path, address, named, script):
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        where = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": port}
        (process,) = launch(script, 1, where | {"HOSTFILE": str(tmp_path / "hosts")})
        assert process.wait(timeout=120) == 2
    assert named in (tmp_path / "log-0").read_text()


@pytest.mark.parametrize(
    ("where", "named"),
    [
        pytest.param({"RDZV_ID": "x"}, "is taken, and not by torchrun", marks=pytest.mark.slow),
        ({"NODE_RANK": "2"}, "0 <= NODE_RANK (2) < NNODES (2) does not hold"),
        ({"NODE_RANK": "0", "NNODES": "1:2"}, "a range (1:2) needs RDZV_ID, not NODE_RANK"),
        ({"NODE_RANK": "0", "MASTER_PORT": "99999"}, "1 <= MASTER_PORT (99999) <= 65535 does not hold"),
        ({"RDZV_ID": "x", "NNODES": "two"}, "two is no number of nodes, and no range MIN:MAX"),
    ],
)
def test_nodes_that_cannot_meet_are_an_error_in_seconds(launch, tmp_path, where, named):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        whole = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | where
        (process,) = launch("torchrun.sh", 1, whole)
        assert process.wait(timeout=180) == 2
    assert named in (tmp_path / "log-0").read_text()


def test_torchrun_with_c10d_rendezvous_starts_again_when_a_rank_is_killed(launch, expected, tmp_path):
    """Rank 1, in step 6; a checkpoint is made of step 4."""
    (tmp_path / "sitecustomize.py").write_text(in_a_step(1, 5, KILLED_ONCE))
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    two = nodes(NNODES="2", RDZV_ID="test", MAX_RESTARTS="1", **path)
    processes = launch("torchrun.sh", 1, *({k: v for k, v in n.items() if k != "NODE_RANK"} for n in two))
    finish(processes, tmp_path)
    assert losses(tmp_path / "run") == expected
    log = (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert "resuming at step 4 from" in log


def test_deepspeeds_launcher_refuses_a_port_that_is_taken(launch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        (process,) = launch("deepspeed.sh", 1, {"MASTER_PORT": port})
        assert process.wait(timeout=120) == 2
    said = (tmp_path / "log-0").read_text()
    assert said.startswith(f"launch/deepspeed.sh: port {port} of 127.0.0.1 is taken; set MASTER_PORT"), said


@pytest.mark.parametrize("address", ["127.0.1.1", "10.0.0.1"])
def test_a_name_that_other_hosts_cannot_reach_is_refused(monkeypatch, address):
    monkeypatch.setattr(process_group.socket, "gethostbyname", lambda _: address)
    problem = process_group._unreachable()
    assert (problem is None) == (address == "10.0.0.1")
    assert problem is None or "resolves to 127.0.1.1 on rank 0's host" in problem


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"WORLD_SIZE": "abc"}, r"WORLD_SIZE \('abc'\) is a number from 0 on"),
        ({"RANK": ""}, r"RANK \(''\) is a number"),
        ({"MASTER_PORT": "x"}, r"MASTER_PORT \('x'\) is a number"),
        ({"MASTER_ADDR": ""}, "RANK is set and MASTER_ADDR is not"),
    ],
)
def test_launchers_that_set_half_of_it_are_refused(monkeypatch, wrong, said):
    right = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, text in (right | wrong).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"launch: {said}"):
        process_group.find_launcher()


def test_ranks_that_an_unknown_mpi_starts_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(ConfigError, match=r"PMI_SIZE \(4\) == 1 does not hold; Open MPI's mpirun is needed"):
        process_group.world_size_from_launcher()
