"""`pi-dist submit` without a SLURM: the script it writes, its quoting, what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pi_dist.cli import main
from pi_dist.commands.train import UNFINISHED
from pi_dist.config import ConfigError
from pi_dist.launching.submit import seconds_of
from pi_dist.training import checkpoint

HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` %j #1 ; touch pwned & \u03c0'


def run_main(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture
def submit(corpus, tmp_path, monkeypatch):
    """`submit(options, overrides)`: the command on a small run, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    config = {
        "run_dir": "runs/small",
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4},
        "data": {"train": str(corpus / "train")},
        "parallel": {"sp_degree": 2},
        "training": {"context": 128, "batch_size": 8, "steps": 6},
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))

    def call(*options: str, overrides: tuple[str, ...] = ()) -> int | str | None:
        asked = ["--nodes=2", "--gpus-per-node=4", "--time=1:00:00", *options]
        return run_main("submit", "--config=c.yaml", *asked, *(["--", *overrides] if overrides else []))

    return call


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch that keeps its arguments and prints a job id; returns the file of arguments."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >sbatch.arguments\necho "77;local"\n')
    (bin_dir / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    return tmp_path / "sbatch.arguments"


def sbatch_words(line: str) -> str:
    """The value of a `#SBATCH --option=value` line, by sbatch's rules (SLURM's _get_argument)."""
    text, value, quote, position = line.split("=", 1)[1], "", None, 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
            value += text[position]
        elif character == quote:
            quote = None
        elif quote is None and character in "\"'":
            quote = character
        elif character == "#" or (quote is None and character.isspace()):
            break
        else:
            value += character
        position += 1
    return value


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {line.split("=")[0]: sbatch_words(line) if "=" in line else "" for line in lines}


def settings_of(script: str, *names: str) -> list[str]:
    """What bash makes of the script's settings."""
    between = script.split("# settings\n")[1].split("# end of settings")[0]
    shown = "".join(f'printf "%s\\0" "${{{name}[@]}}"\n' for name in names)
    done = subprocess.run(["bash", "-euc", between + shown], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_a_dry_run_prints_a_valid_script_and_writes_nothing(submit, capsys, tmp_path):
    assert submit("--dry-run", "--partition=gpu", overrides=("--training.steps=9",)) == 0
    script, said = capsys.readouterr()
    assert said.startswith("nothing was written; ") and said.count("\n") == 1
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    options = options_of(script)
    assert options["nodes"] == "2" and options["gpus-per-node"] == "4" and options["partition"] == "gpu"
    assert options["time"] == "1:00:00" and options["signal"] == "USR1@300" and options["job-name"] == "small"
    assert {"requeue", "exclusive", "open-mode"} <= options.keys() and "account" not in options
    run_dir = tmp_path / "runs" / "small"
    names = ("nodes", "ranks_per_node", "python", "arguments", "logs")
    *values, arguments, logs = settings_of(script, *names)
    assert values == ["2", "4", sys.executable] and logs == f"{run_dir}/logs"
    assert re.fullmatch(re.escape(f"--config={run_dir}/job-") + r"\d{8}-\d{6}\.yaml", arguments)
    assert os.listdir(tmp_path) == ["c.yaml"]


def test_ranks_and_cpus_may_be_given(submit, capsys):
    assert submit("--gpus-per-node=0", "--ranks-per-node=1", "--cpus-per-node=8", "--dry-run") == 0
    script = capsys.readouterr().out
    options = options_of(script)
    assert options["cpus-per-task"] == "8" and not {"exclusive", "gpus-per-node", "mem"} & options.keys()
    assert settings_of(script, "ranks_per_node")[0] == "1"


def test_what_is_submitted_is_kept_and_said(submit, sbatch, capsys, tmp_path):
    assert submit(overrides=("--training.steps=9",)) == 0
    run_dir = tmp_path / "runs" / "small"
    (script,), (config,) = run_dir.glob("job-*.sbatch"), run_dir.glob("job-*.yaml")
    assert sbatch.read_text().splitlines() == ["--parsable", str(script)]
    assert yaml.safe_load(config.read_text())["training"]["steps"] == 9
    out = capsys.readouterr().out
    assert "submitted job 77" in out and f"tail -F {run_dir}/job-77.log" in out and "scancel 77" in out


def test_what_sbatch_answers_is_read_with_care(submit, sbatch, capsys, tmp_path):
    """A site's greeting and warnings; and an answer without a number, of which the files stay."""
    script = tmp_path / "bin" / "sbatch"
    script.write_text("#!/bin/sh\necho warning: few hours left >&2\necho welcome\necho '78;local'\n")
    assert submit() == 0
    out, err = capsys.readouterr()
    assert "submitted job 78:" in out and err == "warning: few hours left\n"
    for path in (tmp_path / "runs" / "small").iterdir():
        path.unlink()
    script.write_text("#!/bin/sh\necho welcome\n")
    assert submit() == 2
    assert "sbatch: 'welcome\\n' ends with the job's number, does not hold" in capsys.readouterr().err
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 2


def test_variables_of_sbatch_do_not_overrule_what_was_asked_for(
    submit, sbatch, capsys, tmp_path, monkeypatch
):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\nenv | grep ^SBATCH_ | sort >environment\necho 7\n")
    for name in ("TIMELIMIT", "NO_REQUEUE", "ARRAY_INX", "PARTITION", "ACCOUNT", "RESERVATION"):
        monkeypatch.setenv(f"SBATCH_{name}", "3")
    assert submit("--partition=gpu") == 0
    assert (tmp_path / "environment").read_text() == "SBATCH_ACCOUNT=3\nSBATCH_RESERVATION=3\n"


def test_nothing_in_names_is_run(submit, sbatch, capsys, tmp_path):
    run_dir = f"runs/{HOSTILE}"
    assert submit(f"--job-name={HOSTILE}\\", f"--account={HOSTILE}", overrides=(f"--run_dir={run_dir}",)) == 0
    (script,) = (path.read_text() for path in (tmp_path / run_dir).glob("job-*.sbatch"))
    (config,) = (tmp_path / run_dir).glob("job-*.yaml")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    options = options_of(script)
    assert options["job-name"] == HOSTILE + "\\" and options["account"] == HOSTILE
    assert options["chdir"] == str(tmp_path)
    assert options["output"] == f"{tmp_path}/{run_dir}/job-%j.log".replace("%j #", "%%j #")
    arguments, logs = settings_of(script, "arguments", "logs")
    assert arguments == f"--config={config}" and logs == f"{tmp_path}/{run_dir}/logs"
    shown = re.search(r"follow   (.*)", capsys.readouterr().out)[1]
    assert shlex.split(shown) == ["tail", "-F", f"{tmp_path}/{run_dir}/job-77.log"]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("options", "overrides", "named"),
    [
        (["--nodes=0"], [], "nodes: nodes (0) >= 1 does not hold"),
        (["--gpus-per-node=0"], [], "ranks_per_node (0) >= 1"),
        (
            ["--gpus-per-node=3"],
            ["--parallel.sp_degree=4"],
            "world size (6) % sp_degree (4) == 0 does not hold",
        ),
        (["--ranks-per-node=8"], [], "ranks_per_node (8) <= gpus_per_node (4) does not hold"),
        (["--gpus-per-node=16"], [], "batch_size (8) % (dp_degree (16)"),
        ([], ["--training.context=129"], "training.context (129) % sp_degree (2) == 0"),
        ([], ["--model.num_heads=5"], "hidden_size (32) % num_heads (5) == 0"),
        ([], ["--model.windw=5"], "windw"),
        ([], ["--data.train=no/such"], "no/such"),
        (["--config=none.yaml"], [], "none.yaml"),
        (["--time=soon"], [], "time: 'soon' is none of"),
        (["--time=0:04:00"], [], "time: grace (300) < seconds of the time limit (240) does not hold"),
        (["--job-name=a\nb"], [], "'a\\nb' has printable characters only"),
        (["--job-name="], [], "job_name"),
        (["--partition="], [], "partition: length of partition (0) >= 1 does not hold"),
        (["--time=\u0663:00:00"], [], "is none of"),
        ([], ["--check=3"], "overrides: --check=3 is no field"),
        ([], ["--status"], "overrides: --status is no field"),
        ([], ["--run_dir=a\\b"], "no backslash in"),
    ],
)
def test_what_cannot_work_is_one_line_and_nothing_is_submitted(
    submit, sbatch, capsys, tmp_path, options, overrides, named
):
    assert submit(*options, overrides=tuple(overrides)) == 2
    captured = capsys.readouterr()
    assert named in captured.err and len(captured.err.strip().splitlines()) == 1 and captured.out == ""
    assert not sbatch.exists() and not (tmp_path / "runs").exists()


def test_sbatch_that_refuses_or_is_not_there_is_one_line(submit, sbatch, capsys, tmp_path, monkeypatch):
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    )
    assert submit() == 2
    assert capsys.readouterr().err == "pi-dist submit: error: sbatch: error: invalid partition\n"
    (tmp_path / "bin" / "sbatch").write_text("no program")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert submit() == 2
    assert capsys.readouterr().err == "pi-dist submit: error: sbatch: Exec format error\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit() == 2
    assert "no sbatch on PATH" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "small").iterdir())


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:00:30", 3630),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-0:0:5", 86405),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "-5", "1-", "infinite"])
def test_other_time_limits_are_refused(time):
    with pytest.raises(ConfigError, match="is none of"):
        seconds_of(time)


def test_status_tells_whether_steps_are_left(submit, capsys, tmp_path):
    flags = ["train", "--config=c.yaml", "--status"]
    assert run_main(*flags) == UNFINISHED
    saved = tmp_path / "runs" / "small" / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text('{"format": 1, "step": 4}')
    files = {"state.json": checkpoint._entry(saved / "state.json")}
    checkpoint._write_json(saved / "manifest.json", {"files": files, "sha256": checkpoint._self_hash(files)})
    (saved.parent / "step-00000006").mkdir()
    assert run_main(*flags) == UNFINISHED
    out, err = capsys.readouterr()
    assert "step 4 of 6 is saved" in out
    assert err.startswith("warning: refused runs/small/checkpoints/step-00000006/manifest.json: missing")
    assert run_main(*flags, "--training.steps=4") == 0
    (saved / "state.json").unlink()
    assert run_main(*flags) == 2
    assert "no checkpoint of the run is whole" in capsys.readouterr().err


def test_another_number_of_ranks_than_asked_for_is_refused(submit, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_main("train", "--config=c.yaml", "--ranks=4") == 2
    assert "launch: world size (2) == ranks (4) does not hold" in capsys.readouterr().err
