"""Points of TensorBoard on a disk that is full."""

import errno
import os

import pytest

from pi_dist.training.metrics import Metrics


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is missing")
def test_points_that_cannot_be_written_are_said_once_and_stop_nothing(tmp_path, capsys):
    """The file of events is /dev/full, whose every write fails as on a full disk."""
    metrics = Metrics(tmp_path, 0, 100, 1)
    (events,) = metrics.directory.iterdir()
    metrics.flush()
    events.unlink()
    events.symlink_to("/dev/full")
    for step in range(1, 60):
        metrics.step(step, 1.0, 10, 1.0, 1e-3, 1.0)
        metrics.flush()
    metrics.close()
    out = capsys.readouterr().out
    assert out.count("no more points for TensorBoard") == 1 and "step 59/100" in out
    assert os.strerror(errno.ENOSPC) in out
