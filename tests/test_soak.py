"""A few of the kills of `soak.py`, and one at a moment that chance seldom meets."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from soak import Attempt, soak
from test_trainer import config_for

from pi_dist.training.checkpoint import find_newest
from pi_dist.training.watchdog import HUNG


def hurried(_rank):
    """In a rank: its time limit is long while a slow machine starts, and 5 s from step 2 on."""
    from pi_dist.training import watchdog

    watchdog.LONGEST_INTERVAL_S, at = 0.625, watchdog.Watchdog.at

    def at_or_hurried(self, step, section):
        if step == 2:
            self._timeout_s = 5.0
        at(self, step, section)

    watchdog.Watchdog.at = at_or_hurried
    return {}


@pytest.fixture
def saving(corpus, tmp_path):
    """Two ranks that are writing a checkpoint."""
    config = config_for(corpus, tmp_path / "run", steps=100_000, workers=1, save_every=2, eval_every=0)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, timeout_s=60.0))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with Attempt(tmp_path / "c.yaml", Path(config.run_dir), 2, tmp_path / "log", hurried) as run:
        assert run.until(lambda: run.saving), run.log.read_text()
        yield run


def test_a_rank_that_is_stopped_while_saving_is_named_and_ended(saving):
    """Outside of a step no time limit holds, but whoever gives no sign of life is ended after timeout_s."""
    os.kill(saving.ranks[1].pid, signal.SIGSTOP)
    assert saving.join() == (), saving.log.read_text()
    assert [rank.exitcode for rank in saving.ranks] == [HUNG, -signal.SIGKILL]
    assert "rank 1: no sign of life; last seen " in saving.log.read_text()


def test_signals_while_saving_and_twice_end_the_run_with_a_checkpoint(saving, tmp_path):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.kill(saving.ranks[1].pid, number)
    assert saving.join() == () and [rank.exitcode for rank in saving.ranks] == [0, 0], saving.log.read_text()
    found, refused = find_newest(tmp_path / "run")
    said = re.search(f"stopped by SIG(TERM|USR1) after step {found.step}; checkpoint", saving.log.read_text())
    assert said and not refused


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_as_if_undisturbed(corpus, tmp_path):
    kills = soak(corpus, tmp_path, kills=6, seed=0, world_size=2, say=print)
    assert sum(kill.signal == "SIGKILL" for kill in kills) == 6
