"""What a rank says besides on the terminal: its stderr in a file of its own, its error for torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pi_dist.config import ConfigError

# In the background, so that it is no child of the rank, which a launcher would end too; deaf, for signals to
# a job reach all of its processes; and it goes on when the terminal, or what reads in its place, is gone.
_COPY = 'exec 3<&0; (trap "" HUP INT QUIT TERM USR1 USR2 PIPE; exec tee -a -- "$1" <&3 3<&-) &'


def keep_stderr(run_dir: str, rank: int) -> None:
    """From here on `run_dir/logs/rank-N.log` also gets what this process, or its children, write on stderr.

    For launchers that keep no such files. On a terminal rank 0 has none: it draws its bar there. A process
    that copies it goes on until all have closed it, so that a killed rank's last words are there.

    Raises:
        ConfigError: the file cannot be written.
    """
    if rank == 0 and sys.stderr.isatty():
        return
    path = Path(run_dir) / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"run_dir: {path} cannot be written: {error.strerror}") from error
    sys.stderr.flush()
    reader, writer = os.pipe()
    subprocess.run(
        ["sh", "-c", _COPY, "sh", path], stdin=reader, stdout=2, start_new_session=True, check=True
    )
    os.close(reader)
    os.dup2(writer, 2)
    os.close(writer)


def tell_launcher(text: str, seconds_ago: int = 0) -> None:
    """Let torchrun, which has the last word, say what happened rather than the exit status alone.

    Of several errors it takes the first, by seconds.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError), open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            text = f"rank {os.environ['RANK']}: {text}"
            json.dump(
                {"message": text, "timestamp": int(time.time()) - seconds_ago}, file, ensure_ascii=False
            )
