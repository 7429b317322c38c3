"""Whole training runs on real ranks: resume, other splits, TensorBoard, signals, what must stop a run."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import math
import os
import shutil
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import Ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_dist.config import Config, ConfigError, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from pi_dist.training.checkpoint import directory, find_newest
from pi_dist.training.trainer import TrainingError, _acquire, _lock, train


def config_for(corpus, run_dir, *, sp=2, stage=2, steps=6, workers=0, **training):
    """A small run; without loader processes, which take longer to end than such a run."""
    train, heldout = str(corpus / "train"), str(corpus / "heldout")
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            window=4,
            stride=16,
            attention_dropout=0.1,
        ),
        data=DataConfig(train=train, heldout=heldout, num_workers=workers),
        parallel=ParallelConfig(sp_degree=sp, zero_stage=stage, device="cpu"),
        training=TrainingConfig(
            **{
                "context": 128,
                "batch_size": 4,
                "steps": steps,
                "learning_rate": 3e-3,
                "warmup_steps": 2,
                "eval_every": 3,
                "save_every": 3,
                "seed": 5,
            }
            | training
        ),
    )


def run(config):
    """`train` on one rank."""
    try:
        return train(config)[1]
    except (ConfigError, TrainingError) as error:
        return error


def train_on(world_size, config):
    with Ranks(world_size) as ranks:
        return ranks.run(run, config)


def weights(run_dir, step):
    return load_file(directory(run_dir) / f"step-{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """Six steps without a stop, sp 2, ZeRO-2."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    outcomes = train_on(2, config_for(corpus, run_dir))
    return run_dir, outcomes[0]


def test_training_learns_and_ranks_agree(undisturbed, corpus):
    run_dir, outcome = undisturbed
    assert outcome.step == 6 and outcome.stopped_by is None and len(outcome.losses) == 6
    assert outcome.losses[-1] < outcome.losses[0] - 0.05
    assert outcome.heldout_loss < outcome.losses[0]
    assert outcome.checkpoint == directory(run_dir) / "step-00000006"
    assert (run_dir / "config.yaml").exists()


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_resume_is_bit_equal(corpus, tmp_path, stage):
    """Three steps, a new set of processes, three more: every weight and loss equals the undisturbed run's."""
    straight = train_on(2, config_for(corpus, tmp_path / "straight", stage=stage))[0]
    config = config_for(corpus, tmp_path / "resumed", stage=stage)
    half = dataclasses.replace(config, training=dataclasses.replace(config.training, save_every=3))
    with Ranks(2) as ranks:
        first = ranks.run(run_three, half)[0]
    second = train_on(2, config)[0]
    assert first + second.losses == straight.losses
    a, b = weights(tmp_path / "straight", 6), weights(tmp_path / "resumed", 6)
    assert all(torch.equal(a[name], b[name]) for name in a)


def run_and_tell(config):
    """(losses, what is said)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        losses = train(config)[1].losses
    return losses, said.getvalue()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_names_that(corpus, tmp_path):
    config = config_for(corpus, tmp_path / "run")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, save_every=3))
    with Ranks(2) as ranks:
        whole = ranks.run(run_and_tell, config)
    path = directory(tmp_path / "run") / "step-00000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with Ranks(2) as ranks:
        (losses, said), (others, _) = ranks.run(run_and_tell, config)
    assert losses == others == whole[0][0][3:] and len(losses) == 3
    assert "refused" in said and "step-00000006/model.safetensors" in said, said
    assert "resuming at step 3 from" in said, said


def run_three(config):
    """The first three steps of a run of six, then the process is gone: stops itself through the signal."""
    from pi_dist.training import trainer

    original = trainer._Run._step

    def stop_at_three(self, step, batches, stop):
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, step, batches, stop)

    trainer._Run._step = stop_at_three
    outcome = train(config)[1]
    assert outcome.stopped_by == "SIGUSR1" and outcome.step == 3
    return outcome.losses


def test_a_file_system_without_locks_is_said(corpus, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    mesh = SimpleNamespace(rank=0)
    assert _lock(config_for(corpus, tmp_path), mesh) is not None
    assert "a second run in here would not be noticed" in capsys.readouterr().out


def heldout_points(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {point.step: point.value for point in events.Scalars("heldout/loss")}


def test_a_stop_saves_at_once_and_what_was_to_be_measured_is_when_it_is_resumed(
    undisturbed, corpus, tmp_path
):
    """The signal comes in step 3, after which held-out data are measured."""
    config = config_for(corpus, tmp_path)
    with Ranks(2) as ranks:
        ranks.run(run_three, config)
    assert find_newest(tmp_path)[0].state["heldout_step"] == -1
    train_on(2, config)
    assert heldout_points(tmp_path) == heldout_points(undisturbed[0])


@pytest.mark.parametrize(
    ("world_size", "sp", "stage", "micro_batch_size"),
    [(1, 1, 0, 4), (4, 4, 1, 1), (4, 2, 3, 2), (2, 1, 2, 1)],
)
def test_resume_on_another_number_of_ranks(
    undisturbed, corpus, tmp_path, world_size, sp, stage, micro_batch_size
):
    """From the third step of the sp 2, ZeRO-2 run: same data, same dropout, same losses up to rounding."""
    run_dir, outcome = undisturbed
    (tmp_path / "checkpoints").mkdir()
    os.symlink(directory(run_dir) / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    config = config_for(corpus, tmp_path, sp=sp, stage=stage, micro_batch_size=micro_batch_size)
    resumed = train_on(world_size, config)[0]
    assert resumed.losses == pytest.approx(outcome.losses[3:], rel=1e-5)
    assert resumed.heldout_loss == pytest.approx(outcome.heldout_loss, rel=1e-5)


def test_a_finished_run_says_so_and_keeps_its_result(undisturbed, corpus, tmp_path):
    finished, outcome = undisturbed
    run_dir = shutil.copytree(finished, tmp_path / "run")
    again = train_on(2, config_for(corpus, run_dir))[0]
    assert again.losses == () and again.step == 6
    assert again.heldout_loss == outcome.heldout_loss and again.checkpoint.name == "step-00000006"
    config = config_for(corpus, run_dir)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=config.data.train))
    assert train_on(2, other)[0].heldout_loss != outcome.heldout_loss  # measured anew, not remembered


def test_tensorboard_files_are_read_back(undisturbed):
    run_dir, outcome = undisturbed
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = {
        "train/loss",
        "train/tokens_per_second",
        "train/learning_rate",
        "train/gradient_norm",
        "heldout/loss",
    }
    assert set(events.Tags()["scalars"]) == tags
    losses = events.Scalars("train/loss")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6]
    assert [point.value for point in losses] == pytest.approx(outcome.losses, rel=1e-6)
    assert [point.step for point in events.Scalars("heldout/loss")] == [3, 6]
    assert events.Scalars("heldout/loss")[-1].value == pytest.approx(outcome.heldout_loss, rel=1e-6)


def run_with_a_sigterm(config):
    """Of a run in whose third step rank 1 gets SIGTERM."""
    from pi_dist.training import trainer

    step = trainer._Run._step

    def stopped(self, number, *others):
        if number == 2 and self.mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *others)

    trainer._Run._step = stopped
    return run(config)


def test_sigterm_to_one_rank_saves_at_the_next_step_boundary(corpus, tmp_path):
    config = config_for(corpus, tmp_path, steps=100_000, eval_every=0, save_every=0)
    with Ranks(2) as ranks:
        outcomes = ranks.run(run_with_a_sigterm, config)
    assert [(o.stopped_by, o.step) for o in outcomes] == [("SIGTERM", 3)] * 2
    found, refused = find_newest(tmp_path)
    assert found.step == 3 and not refused


def test_a_loss_that_is_not_finite_stops_the_run_without_a_checkpoint(corpus, tmp_path):
    outcomes = train_on(
        2, config_for(corpus, tmp_path, steps=50, learning_rate=1e30, warmup_steps=0, save_every=0)
    )
    assert all(isinstance(o, TrainingError) and "nothing was saved" in str(o) for o in outcomes)
    assert find_newest(tmp_path) == (None, [])


def run_with_a_broken_loss(config):
    """(error of a run whose loss is not finite on rank 1 in the third step, the sequences read there)."""
    from pi_dist.training import trainer

    original, step = trainer._Run._step, [0]
    losses = trainer.streamed_losses

    def broken(engine, mesh, *others):
        for loss in losses(engine, mesh, *others):
            yield loss * float("nan") if mesh.rank == 1 and step[0] == 2 else loss

    def noting(self, number, *others):
        step[0:] = number, self.loader.sequences(number)
        return original(self, number, *others)

    trainer.streamed_losses, trainer._Run._step = broken, noting
    return run(config), step[1]


@pytest.mark.parametrize(("sp", "stage", "precision"), [(1, 2, "fp32"), (2, 0, "fp32"), (1, 1, "bf16")])
def test_a_broken_loss_of_one_rank_stops_all_and_names_the_rank_and_its_sequences(
    corpus, tmp_path, sp, stage, precision
):
    config = config_for(corpus, tmp_path, sp=sp, stage=stage, precision=precision, save_every=1)
    with Ranks(2) as ranks:
        outcomes = ranks.run(run_with_a_broken_loss, config)
    sequences = sorted(outcomes[1][1])
    assert len(set(sequences)) == (2 if sp == 1 else 4)
    for error, _ in outcomes:
        assert isinstance(error, TrainingError)
        assert f"step 3: the loss is nan, on ranks [1], in sequences {sequences};" in str(error)
    assert find_newest(tmp_path)[0].step == 2


def run_with_a_broken_gradient(config):
    """(error of a run with a finite loss but, on rank 1, no finite gradient in step 2, is all as before).

    All: weights and moments of every parameter.
    """
    from pi_dist.training.deepspeed_engine import Engine

    original, before, engines = Engine.step, [], []

    def state_of(engine):
        return [value.clone() for _, state in engine.state() for value in state.values()]

    def step(self, number, loss=None):
        original(self, number, loss)
        if loss is not None and number == 0:
            engines.append(self)
            before.extend(state_of(self))
            if self.mesh.rank == 1:
                self._names["norm.weight"].register_hook(lambda gradient: gradient * float("nan"))

    Engine.step = step
    try:
        error = run(config)
    finally:
        Engine.step = original
    return error, all(map(torch.equal, before, state_of(engines[0])))


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_a_gradient_that_is_not_finite_changes_nothing(corpus, tmp_path, stage, precision):
    config = config_for(corpus, tmp_path, stage=stage, save_every=2, precision=precision)
    with Ranks(2) as ranks:
        outcomes = ranks.run(run_with_a_broken_gradient, config)
    for error, unchanged in outcomes:
        assert isinstance(error, TrainingError) and "step 2: the gradient norm is" in str(error)
        assert "with a finite loss on every rank, in sequences [" in str(error)
        assert unchanged
    assert find_newest(tmp_path) == (None, [])


def runs_with_broken_steps(configs, broken_losses, broken_gradients, stop_at=None):
    """[(outcome or error, what rank 0 says)] of runs: in some steps rank 1 has a broken loss or gradient.

    That is NaN; a run stops itself through the signal in step `stop_at`.
    """
    from pi_dist.training import trainer
    from pi_dist.training.deepspeed_engine import Engine
    from pi_dist.training.metrics import Metrics

    now, said = [None], []
    step, losses, initialize = trainer._Run._step, trainer.streamed_losses, Engine.__init__

    def noting(self, number, *others):
        now[0] = number
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, number, *others)

    def broken(engine, mesh, *others):
        for loss in losses(engine, mesh, *others):
            yield loss * float("nan") if mesh.rank == 1 and now[0] in broken_losses else loss

    def hooked(self, *others):
        initialize(self, *others)
        if self.mesh.rank == 1:
            factor = lambda: float("nan") if now[0] in broken_gradients else 1.0  # noqa: E731
            self._names["norm.weight"].register_hook(lambda gradient: gradient * factor())

    trainer._Run._step, trainer.streamed_losses, Engine.__init__ = noting, broken, hooked
    Metrics.say = staticmethod(said.append)
    found = []
    for config in configs:
        said.clear()
        found.append((run(config), tuple(said)))
    return found


def skipping(corpus, run_dir, most, **options):
    """A run of few parts that goes on after so many steps in a row that are not finite."""
    config = config_for(corpus, run_dir, max_nonfinite_steps=most, eval_every=0, **options)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=None))


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_resumed_bit_equal(corpus, tmp_path):
    """The first step's loss and the fourth's gradient, in every ZeRO stage; nothing is left of them."""
    kinds = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
    straight, resumed = (
        [
            skipping(corpus, tmp_path / f"{name}-{s}", 1, stage=s, precision=precision)
            for s, precision in kinds
        ]
        for name in ("straight", "resumed")
    )
    resumed = resumed[:2]
    with Ranks(2) as ranks:
        whole = ranks.run(runs_with_broken_steps, straight, (0,), (3,))[0]
        half = ranks.run(runs_with_broken_steps, resumed, (0,), (3,), 3)[0]
    with Ranks(2) as ranks:
        rest = ranks.run(runs_with_broken_steps, resumed, (0,), (3,))[0]
    for (outcome, said), (_, precision) in zip(whole, kinds, strict=True):
        assert outcome.step == 6 and outcome.skipped == 2 and math.isnan(outcome.losses[0])
        tolerance = 1e-5 if precision == "fp32" else 1e-2
        assert outcome.losses[1:] == pytest.approx(whole[0][0].losses[1:], rel=tolerance)
        warnings = [text for text in said if text.startswith("warning: step")]
        assert len(warnings) == 2 and "step 1: the loss is nan, on ranks [1], in sequences [" in warnings[0]
        assert "step 4: the gradient norm is " in warnings[1] and "with a finite loss on every" in warnings[1]
        assert all(text.endswith("the update was not made (1 in a row, at most 1)") for text in warnings)
    for (outcome, _), (first, _), (second, _) in zip(whole, half, rest, strict=False):
        assert (first.step, first.stopped_by, second.step) == (4, "SIGUSR1", 6)
        assert first.skipped == second.skipped == 2 and math.isnan(first.losses[0])
        assert first.losses[1:] + second.losses == outcome.losses[1:]
    for a, b in zip(straight, resumed, strict=False):
        found = [find_newest(config.run_dir)[0] for config in (a, b)]
        assert [checkpoint.updates for checkpoint in found] == [4, 4]
        for name in found[0].files:
            if name.endswith(".safetensors"):
                of_a, of_b = (load_file(checkpoint.path / name) for checkpoint in found)
                assert all(torch.equal(of_a[key], of_b[key]) and of_a[key].isfinite().all() for key in of_a)
    events = EventAccumulator(f"{straight[0].run_dir}/tensorboard")
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/skipped_steps")] == [(1, 1), (4, 2)]


def test_no_more_steps_are_skipped_in_a_row_than_allowed_also_after_a_restart(corpus, tmp_path):
    """Of three in a row the third ends the run; a checkpoint lies between the first and the second."""
    config = skipping(corpus, tmp_path, 2, steps=50)
    with Ranks(2) as ranks:
        outcomes = ranks.run(runs_with_broken_steps, [config, config], (2, 3, 4), ())
    for error, _ in (outcome for of_rank in outcomes for outcome in of_rank):
        assert isinstance(error, TrainingError) and str(error).startswith(
            "step 5: the loss is nan, on ranks [1]"
        )
        assert str(error).endswith("3 in a row <= training.max_nonfinite_steps (2) does not hold")
    found = find_newest(tmp_path)[0]
    assert (found.step, found.updates, found.state["skipped_in_a_row"]) == (3, 2, 1)


@pytest.mark.parametrize(("world_size", "sp"), [(2, 2), (2, 1), (4, 2)])
def test_steps_with_much_padding_equal_one_rank(corpus, tmp_path, world_size, sp):
    """Padding lies at the ends of sequences, so ranks hold very different numbers of valid tokens."""
    sizes = {"context": 3072, "batch_size": 2, "steps": 2, "save_every": 0, "eval_every": 0}
    alone = train_on(1, config_for(corpus, tmp_path / "alone", sp=1, stage=0, **sizes))[0]
    split = train_on(world_size, config_for(corpus, tmp_path / "split", sp=sp, **sizes))[0]
    assert split.losses == pytest.approx(alone.losses, rel=1e-5)
    assert split.heldout_loss == pytest.approx(alone.heldout_loss, rel=1e-5)
    a, b = weights(tmp_path / "alone", 2), weights(tmp_path / "split", 2)
    assert all((a[name] - b[name]).norm() < 1e-4 * a[name].norm() for name in a if a[name].dim() == 2)


def noted_seeds(config):
    """The dropout seeds of every micro-step of a run on this rank."""
    from pi_dist.training import trainer

    seeds, original = [], trainer.streamed_losses

    def noting(model, mesh, batch, parallel, seed, *others):
        seeds.append(seed)
        return original(model, mesh, batch, parallel, seed, *others)

    trainer.streamed_losses = noting
    train(config)
    return seeds


def test_every_step_has_its_own_dropout_and_ranks_share_it(corpus, tmp_path):
    with Ranks(2) as ranks:
        seeds = ranks.run(noted_seeds, config_for(corpus, tmp_path, steps=3, batch_size=2))
    assert seeds[0] == seeds[1] and len(seeds[0]) == 6 and len(set(seeds[0])) == 3


def test_a_second_run_in_the_same_directory_is_refused(corpus, tmp_path):
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        outcomes = train_on(2, config_for(corpus, tmp_path))
    assert all(isinstance(o, ConfigError) and "another process is training" in str(o) for o in outcomes)


def test_a_run_whose_checkpoints_cannot_be_written_is_refused_before_it_trains(corpus, tmp_path):
    place = directory(tmp_path)
    place.symlink_to("gone")
    errors = train_on(2, config_for(corpus, tmp_path))
    for error in errors:
        assert isinstance(error, ConfigError)
        assert str(error) == f"run_dir: {place} cannot be written: File exists"


def run_with_a_lock_elsewhere(config):
    """Of a run whose lock another process, said to be on another host, has; what is said goes to said.txt."""
    from pi_dist.training.metrics import Metrics

    def say(text):
        with open(f"{config.run_dir}/said.txt", "a") as file:
            print(text, file=file, flush=True)

    Metrics.say = staticmethod(say)
    return run(config)


@pytest.mark.slow
def test_a_lock_of_another_host_is_waited_for_as_its_rank_may_be_cut_off(corpus, tmp_path):
    said, waits = tmp_path / "said.txt", "a rank holds the lock on elsewhere; it has 615 s to end\n"
    with (tmp_path / ".lock").open("w") as held:
        held.write("elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)

        def release():
            until = time.monotonic() + 100
            while not (said.exists() and waits in said.read_text()) and time.monotonic() < until:
                time.sleep(0.1)
            fcntl.flock(held, fcntl.LOCK_UN)

        threading.Thread(target=release, daemon=True).start()
        with Ranks(2) as ranks:
            outcomes = ranks.run(run_with_a_lock_elsewhere, config_for(corpus, tmp_path))
        assert [outcome.step for outcome in outcomes] == [6, 6]
        assert waits in said.read_text()
        assert (tmp_path / ".lock").read_text() == socket.gethostname()


def test_a_lock_of_another_host_is_not_waited_for_for_ever(tmp_path, capsys):
    with (tmp_path / ".lock").open("w") as held, (tmp_path / ".lock").open("a+") as wanted:
        held.write("elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            _acquire(wanted, 1.0)
    assert capsys.readouterr().out.endswith("a rank holds the lock on elsewhere; it has 1 s to end\n")


def run_with_own(what, config):
    """A run in which rank 1 has another seed, other data behind the same path, or another version."""
    from pi_dist.training import trainer

    if torch.distributed.get_rank() == 1:
        open_splits = trainer.open_splits
        if what == "training.seed":
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=6))
        elif what == "data":
            trainer.open_splits = lambda data: open_splits(dataclasses.replace(data, train=data.heldout))
        elif what == "deepspeed":
            trainer._versions = lambda: {"torch": torch.__version__, "deepspeed": "0"}
        else:
            trainer._source = lambda: "0" * 64
    return run(config)


@pytest.mark.parametrize("what", ["training.seed", "data", "deepspeed", "source of pi_dist"])
def test_a_rank_with_another_configuration_data_or_code_is_refused(corpus, tmp_path, what):
    with Ranks(2) as ranks:
        outcomes = ranks.run(run_with_own, what, config_for(corpus, tmp_path))
    for error in outcomes:
        assert isinstance(error, ConfigError)
        assert f"rank 0 and rank 1 do not run the same: {what}: " in str(error)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"seed": 6}}, "training.seed: 5 -> 6"),
        ({"training": {"batch_size": 2}}, "training.batch_size: 4 -> 2"),
        ({"model": {"window": 8}}, "model.window: 4 -> 8"),
        ({"data": {"train": "heldout"}}, "data.train: content"),
    ],
)
def test_resuming_as_another_run_is_refused(undisturbed, corpus, change, named):
    run_dir, _ = undisturbed
    config = config_for(corpus, run_dir)
    for part, values in change.items():
        if part == "data":
            values = {"train": str(corpus / values["train"])}
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})
    error = train_on(2, config)[0]
    assert isinstance(error, ConfigError) and named in str(error)
