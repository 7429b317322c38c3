"""What a rank says on stderr in a file of its own, for launchers that keep none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pi_dist.config import ConfigError


def keep_stderr(run_dir: str, rank: int) -> None:
    """From here on `run_dir/logs/rank-N.log` also gets what this process writes on stderr, or its children.

    Not if stderr is a terminal, on which a bar is drawn. A process that copies it goes on until all have
    closed it, so that a killed rank's last words are there.

    Raises:
        ConfigError: the file cannot be written.
    """
    if sys.stderr.isatty():
        return
    path = Path(run_dir) / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"run_dir: {path} cannot be written: {error.strerror}") from error
    sys.stderr.flush()
    # out of the group that a launcher kills, or Ctrl-C reaches
    reader, writer = os.pipe()
    subprocess.Popen(["tee", "-a", path], stdin=reader, stdout=2, start_new_session=True)
    os.close(reader)
    os.dup2(writer, 2)
    os.close(writer)
