"""Checkpoints under faults really injected: bits flipped, files cut, disks full, processes killed."""

import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import Ranks
from test_trainer import config_for

from pi_dist.cli import main
from pi_dist.commands.train import UNFINISHED
from pi_dist.config import resolve
from pi_dist.data.shards import ShardIndex
from pi_dist.model.transformer import PiTransformer
from pi_dist.parallel.mesh import make_mesh
from pi_dist.training import checkpoint
from pi_dist.training.checkpoint import (
    CheckpointError,
    directory,
    find_newest,
    load_model,
    open_checkpoint,
    verify,
)
from pi_dist.training.deepspeed_engine import Engine
from pi_dist.training.metrics import Metrics
from pi_dist.training.trainer import train


def make_engine(config):
    mesh = make_mesh(config.parallel.sp_degree, torch.device("cpu"))
    return Engine(PiTransformer(config.model, config.training.context, 1), config, mesh)


def write_manifest(path, files):
    """With the right hash of its own."""
    checkpoint._write_json(path / "manifest.json", {"files": files, "sha256": checkpoint._self_hash(files)})


def on_one_rank(config):
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sp_degree=1))


def state_of(config, step):
    return {
        "step": step,
        "heldout_loss": None,
        "config": config.to_dict(),
        "data": "0" * 64,
        "end_of_text": 0,
    }


def save_steps(config, steps, keep, file_limit=None):
    """Save checkpoints of these steps, from the second on with a limit on file size. Returns the errors."""
    engine = make_engine(config)
    tokenizer = ShardIndex.open(config.data.train).tokenizer
    errors = []
    for step in steps:
        try:
            checkpoint.save(engine, config.run_dir, state_of(config, step), tokenizer, keep)
        except CheckpointError as error:
            errors.append(str(error))
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    return errors


@pytest.fixture
def config(corpus, tmp_path):
    found = config_for(corpus, tmp_path / "run")
    return resolve(found, ShardIndex.open(corpus / "train").vocab_size)


@pytest.fixture
def saved(config):
    """Checkpoints of steps 1 and 2, by two ranks."""
    with Ranks(2) as ranks:
        ranks.run(save_steps, config, [1, 2], 2)
    return Path(config.run_dir)


def test_any_flipped_bit_is_refused_by_name_and_the_previous_one_used(saved, tmp_path):
    newest = directory(saved) / "step-00000002"
    files = sorted(path.name for path in newest.iterdir())
    assert {"manifest.json", "model.safetensors", "state.json", "tokenizer.json"} < set(files) and len(
        files
    ) == 6
    generator = random.Random(0)
    for name in files:
        path = newest / name
        content = path.read_bytes()
        for position in {0, len(content) - 2, generator.randrange(len(content))}:
            flipped = bytearray(content)
            flipped[position] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            found, refused = find_newest(saved)
            assert found.step == 1, (name, position)
            assert len(refused) == 1 and name in refused[0]
        path.write_bytes(content[:-1])
        assert find_newest(saved)[0].step == 1
        path.unlink()
        assert find_newest(saved)[0].step == 1
        path.write_bytes(content)
        assert find_newest(saved)[0].step == 2


def test_what_is_no_checkpoint_under_the_name_of_a_newer_one_is_refused(saved, tmp_path):
    """There is no pointer to the latest that could dangle; names are all that is looked at."""
    (directory(saved) / "step-00000003").mkdir()
    (directory(saved) / "step-00000004").symlink_to(tmp_path / "gone")
    (directory(saved) / "step-00000005").write_bytes(b"")
    found, refused = find_newest(saved)
    assert found.step == 2
    assert [text.split("/manifest.json: ")[0][-1] for text in refused] == ["5", "4", "3"]


@pytest.mark.parametrize("files", [["state.json"], {"state.json": 3}, {"state.json": {"bytes": 3}}, 7, None])
def test_a_manifest_of_another_shape_is_refused_in_words(tmp_path, files):
    """Its own hash right, as no accident leaves it."""
    write_manifest(tmp_path, files)
    with pytest.raises(CheckpointError, match="missing or not a manifest"):
        verify(tmp_path)


def test_a_manifest_nested_too_deep_is_refused_and_the_previous_checkpoint_used(saved):
    (directory(saved) / "step-00000002" / "manifest.json").write_text("[" * 100_000)
    found, refused = find_newest(saved)
    assert found.step == 1 and "step-00000002/manifest.json: missing or not a manifest" in refused[0]


def test_a_damaged_checkpoint_that_is_passed_over_is_told_of(saved, capsys, monkeypatch):
    state = directory(saved) / "step-00000002" / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    warning = f"warning: refused {state}: bytes"
    for arguments, status in (
        (["generate", str(saved), "--prompt=x", "--max-new-tokens=0"], 0),
        (["train", f"--run_dir={saved}", "--training.steps=2", "--status"], UNFINISHED),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        assert stopped.value.code == status, err
        assert err.startswith(warning) and err.count("\n") == 1
    assert out == f"{saved}: step 1 of 2 is saved\n"
    assert open_checkpoint(saved).step == 1  # as `pi-dist eval` opens it
    assert capsys.readouterr().err.startswith(warning)
    monkeypatch.setenv("RANK", "1")
    assert open_checkpoint(saved).step == 1
    assert capsys.readouterr().err == ""


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return Path.touch, (self.trap,)


def read_all(config, path):
    """The errors of reading a checkpoint as `pi-dist eval` and as a resumed run do."""
    errors = []
    for read in (
        lambda: load_model(verify(path), torch.device("cpu")),
        lambda: checkpoint.load(make_engine(config), verify(path)),
    ):
        try:
            read()
        except Exception as error:
            errors.append(error)
    return [str(error) for error in errors]


def test_a_hostile_pickle_is_not_executed(saved, config, tmp_path):
    """In place of any file that is read of a checkpoint, whose manifest was made to fit."""
    trap, path = tmp_path / "trap", directory(saved) / "step-00000002"
    hostile = pickle.dumps(Hostile(trap))
    pickle.loads(hostile)
    assert trap.exists()
    trap.unlink()
    contents = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "tokenizer.json"}
    alone = on_one_rank(config)
    with Ranks(1) as ranks:
        assert ranks.run(read_all, alone, path) == [[]]
        for name in contents:
            (path / name).write_bytes(hostile)
            if name != "manifest.json":
                files = {n: checkpoint._entry(path / n) for n in contents if n != "manifest.json"}
                write_manifest(path, files)
            (errors,) = ranks.run(read_all, alone, path)
            assert len(errors) == (1 if name.startswith("optimizer") else 2) and not trap.exists(), (
                name,
                errors,
            )
            for other, content in contents.items():
                (path / other).write_bytes(content)


def test_without_a_whole_checkpoint_the_run_does_not_start_anew(saved):
    for path in directory(saved).glob("step-*/state.json"):
        path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="no checkpoint of the run is whole"):
        find_newest(saved)


def test_only_the_newest_are_kept(config):
    with Ranks(1) as ranks:
        alone = on_one_rank(config)
        ranks.run(save_steps, alone, [1, 2, 3, 4], 2)
    names = sorted(path.name for path in directory(config.run_dir).iterdir())
    assert names == ["step-00000003", "step-00000004"]


def test_steps_of_more_than_eight_digits_are_numbers_too(config):
    with Ranks(1) as ranks:
        alone = on_one_rank(config)
        ranks.run(save_steps, alone, [99_999_998, 99_999_999, 100_000_000], 2)
    assert find_newest(config.run_dir)[0].step == 100_000_000
    names = sorted(path.name for path in directory(config.run_dir).iterdir())
    assert names == ["step-100000000", "step-99999999"]


def test_what_is_no_directory_does_not_stand_in_the_way_of_a_checkpoint(config, tmp_path):
    """A file or a link in the name of the new one, of one to prune, and of one that was being written."""
    precious = tmp_path / "elsewhere" / "precious"
    precious.parent.mkdir()
    precious.write_text("kept")
    place = directory(config.run_dir)
    place.mkdir(parents=True)
    (place / ".step-00000004.building").write_text("")
    (place / "step-00000001").write_text("")
    (place / "step-00000002").symlink_to(precious.parent)
    (place / "step-00000003").symlink_to("gone")
    alone = on_one_rank(config)
    with Ranks(1) as ranks:
        for step in (4, 5, 6):
            if step == 5:
                (place / "step-00000005").write_text("")
            if step == 6:
                (place / "step-00000006").symlink_to(precious.parent)
            assert ranks.run(save_steps, alone, [step], 1) == [[]]
            assert [path.name for path in place.iterdir()] == [f"step-{step:08d}"]
            assert not (place / f"step-{step:08d}").is_symlink() and find_newest(config.run_dir)[1] == []
    assert precious.read_text() == "kept"


def test_a_new_checkpoint_is_kept_although_a_refused_one_has_a_later_step(saved, config):
    """The run went back to step 1 because 2 was damaged; the new step 1 must not be pruned in 2's favour."""
    (directory(saved) / "step-00000002" / "state.json").write_bytes(b"{}")
    with Ranks(2) as ranks:
        ranks.run(save_steps, config, [1], 1)
    found, refused = find_newest(saved)
    assert found.step == 1 and not refused


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(config):
    """The kernel refuses to write files beyond 10 kB from the second save on, on every rank."""
    with Ranks(2) as ranks:
        errors = ranks.run(save_steps, config, [1, 2], 2, 10_000)
    assert all(len(of_rank) == 1 and "checkpoint of step 2 not written" in of_rank[0] for of_rank in errors)
    found, refused = find_newest(config.run_dir)
    assert found.step == 1 and not refused
    assert [path.name for path in directory(config.run_dir).iterdir()] == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for two checkpoints of `config_for` and not for three."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("a file system that is full needs root and mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def train_saying(config):
    """(error of a run, what rank 0 says)."""
    said = []
    Metrics.say = staticmethod(said.append)
    return resume(config), said


def test_training_goes_on_while_the_disk_is_full_and_says_so(corpus, small_disk):
    """Two checkpoints are kept while the third is written; without that of the last step a run fails."""
    options = {"steps": 4, "save_every": 1, "eval_every": 0, "keep_checkpoints": 2}
    with Ranks(2) as ranks:
        outcomes = ranks.run(train_saying, config_for(corpus, small_disk / "run", **options))
    assert all("checkpoint of step 4 not written" in error for error, _ in outcomes)
    warnings = [
        text for text in outcomes[0][1] if text.startswith("warning: checkpoint of step 3 not written")
    ]
    assert len(warnings) == 1 and warnings[0].endswith("training goes on")
    found, refused = find_newest(small_disk / "run")
    assert found.step == 2 and not refused


SAVE_FOREVER = """
import sys
sys.path[:0] = {paths!r}
import pickle
from test_checkpoint import save_steps
from pi_dist.parallel.process_group import start
start("cpu", 60.0)
save_steps(pickle.loads({config!r}), range(1, 10**6), 2)
"""


def test_killed_while_saving_the_last_complete_checkpoint_loads(config):
    """What SIGKILL leaves at twelve random moments of an endless series of saves: the files are copied then.

    The process stands still meanwhile. The last time it is killed.
    """
    alone = on_one_rank(config)
    code = SAVE_FOREVER.format(paths=sys.path, config=pickle.dumps(alone))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    snapshots = []
    generator = random.Random(1)
    try:
        deadline = time.monotonic() + 240
        while not list(directory(config.run_dir).glob("step-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for number in range(12):
            time.sleep(generator.random() * 0.1)
            process.send_signal(signal.SIGSTOP)
            snapshot = Path(config.run_dir).parent / f"killed-{number}"
            shutil.copytree(config.run_dir, snapshot)
            snapshots.append(snapshot)
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    for snapshot in [*snapshots, Path(config.run_dir)]:
        found, refused = find_newest(snapshot)
        assert found is not None and not refused
        model, _ = load_model(found, torch.device("cpu"))
        assert all(torch.isfinite(p).all() for p in model.parameters())


def save_copied_at_every_point(config, folder):
    """Save a second checkpoint; before and after each of its calls that change the disk, copy run_dir.

    Returns (where, what a kill at this point leaves) in order.
    """
    engine = make_engine(config)
    tokenizer = ShardIndex.open(config.data.train).tokenizer
    checkpoint.save(engine, config.run_dir, state_of(config, 1), tokenizer, 1)
    points = []

    def watched(owner, name):
        call = getattr(owner, name)

        def around(*arguments, **options):
            for when in ("before", "after"):
                copy = folder / f"rank-{engine.mesh.rank}-point-{len(points)}"
                shutil.copytree(config.run_dir, copy)
                path = next(argument for argument in arguments if isinstance(argument, Path))
                points.append((f"{when} {name} of {path.name}", copy))
                if when == "before":
                    result = call(*arguments, **options)
            return result

        setattr(owner, name, around)

    checkpoint.shutil = SimpleNamespace(rmtree=shutil.rmtree)
    for name in ("save_file", "fsync", "_write_json"):
        watched(checkpoint, name)
    watched(checkpoint.shutil, "rmtree")
    for name in ("write_bytes", "rename"):
        watched(Path, name)
    checkpoint.save(engine, config.run_dir, state_of(config, 2), tokenizer, 1)
    return points


def test_whatever_a_kill_leaves_at_every_point_of_a_save_has_a_whole_checkpoint(config, tmp_path):
    alone = on_one_rank(config)
    with Ranks(1) as ranks:
        (points,) = ranks.run(save_copied_at_every_point, alone, tmp_path)
    steps = []
    for where, copy in points:
        found, refused = find_newest(copy)
        assert found is not None and not refused, (where, refused)
        steps.append(found.step)
    assert steps == sorted(steps) and set(steps) == {1, 2}
    calls = {where for where, _ in points}
    files = ("model.safetensors", "optimizer-00000-of-00001.safetensors", "tokenizer.json", "state.json")
    synced = {f"{when} fsync of {name}" for when in ("before", "after") for name in (*files, "manifest.json")}
    assert synced | {"before rename of .step-00000002.building", "after rmtree of step-00000001"} <= calls


def train_while_its_tokenizer_goes(config):
    """A run in whose first step the data's tokenizer.json is another one, and in whose second there is none.

    Returns the steps done.
    """
    from pi_dist.training import trainer

    original, tokenizer = trainer._Run._step, Path(config.data.train) / "tokenizer.json"

    def step(self, number, *others):
        if number == 0:
            tokenizer.write_text("{}")
        else:
            tokenizer.unlink()
        return original(self, number, *others)

    trainer._Run._step = step
    return train(config)[1].step


def test_checkpoints_have_the_tokenizer_of_the_data_that_were_opened(corpus, tmp_path):
    data = shutil.copytree(corpus / "train", tmp_path / "train")
    config = on_one_rank(config_for(corpus, tmp_path / "run", steps=2, save_every=1, eval_every=0))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(data), heldout=None))
    with Ranks(1) as ranks:
        assert ranks.run(train_while_its_tokenizer_goes, config) == [2]
    expected = (corpus / "train" / "tokenizer.json").read_bytes()
    saved = sorted(directory(config.run_dir).iterdir())
    assert [(path / "tokenizer.json").read_bytes() for path in saved] == [expected, expected]


def test_exported_weights_are_the_model(saved, config):
    model, found = load_model(open_checkpoint(saved), torch.device("cpu"))
    assert found == config
    expected = PiTransformer(config.model, config.training.context, 1)
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert open_checkpoint(directory(saved) / "step-00000001").step == 1
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        open_checkpoint(saved.parent)


def resume(config):
    try:
        return train(config)[1].losses
    except CheckpointError as error:
        return str(error)


def test_damage_is_refused_on_all_ranks(saved, config):
    for path in directory(saved).glob("step-*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    with Ranks(2) as ranks:
        errors = ranks.run(resume, config)
    assert all(
        "model.safetensors" in error and "no checkpoint of the run is whole" in error for error in errors
    )


def test_verify_names_a_future_format(saved):
    path = directory(saved) / "step-00000002"
    assert verify(path).state["format"] == 1
    state = path / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 2}))
    files = {f.name: checkpoint._entry(f) for f in path.iterdir() if f.name != "manifest.json"}
    write_manifest(path, files)
    with pytest.raises(CheckpointError, match=r"format \(2\) == 1 does not hold"):
        verify(path)
