"""What a person sees of a run: TensorBoard points and a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _has_terminal() -> bool:
    """Whether a bar can be drawn on stderr: a terminal that knows its width."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Metrics:
    """Writes the points of one run; only rank 0 has one.

    Args:
        start_step: points from here on replace those of an earlier attempt.
    """

    def __init__(self, run_dir: str | Path, start_step: int, steps: int, log_every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory = Path(run_dir) / "tensorboard"
        self._writer = SummaryWriter(str(self.directory), purge_step=start_step + 1 if start_step else None)
        self._start, self._steps, self._log_every = start_step, steps, log_every
        self._tokens, self._seconds, self._writes = 0, 0.0, True
        self._bar = tqdm(
            total=steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not _has_terminal()
        )

    def step(
        self, step: int, loss: float, tokens: int, seconds: float, learning_rate: float, gradient_norm: float
    ) -> None:
        """Optimizer step `step` (1 is the first) is done; `loss` in nats a token, `tokens` in `seconds`."""
        rate = tokens / seconds
        self._tokens += tokens
        self._seconds += seconds
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        if step % self._log_every and step != self._steps:
            return
        for name, value in (
            ("train/loss", loss),
            ("train/tokens_per_second", rate),
            ("train/learning_rate", learning_rate),
            ("train/gradient_norm", gradient_norm),
        ):
            self._point(name, value, step)
        if self._bar.disable:
            left = self._seconds / (step - self._start) * (self._steps - step)
            average = self._tokens / self._seconds
            print(
                f"step {step}/{self._steps}  loss {loss:.4f}  {average:,.0f} tokens/s  "
                f"{_duration(left)} left",
                flush=True,
            )

    def heldout(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps, in nats a token."""
        self._point("heldout/loss", loss, step)
        self.say(f"step {step}: held-out loss {loss:.4f} nats/token")

    def skipped(self, step: int, text: str, in_all: int) -> None:
        """Optimizer step `step` made no update, as `text` tells; so did `in_all` steps of the run."""
        self._point("train/skipped_steps", in_all, step)
        self.say(f"warning: {text}")

    def _point(self, name: str, value: float, step: int) -> None:
        self._try(lambda: self._writer.add_scalar(name, value, step))

    def _try(self, write: Callable[[], object]) -> None:
        """Points are not worth a run: where they cannot be written, that is said once, and none are."""
        if self._writes:
            try:
                write()
            except OSError as error:
                self._writes = False
                self.say(f"warning: {self.directory}: {error.strerror}; no more points for TensorBoard")

    @staticmethod
    def say(text: str) -> None:
        """A line above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def flush(self) -> None:
        """Write all points so far to their file."""
        self._try(self._writer.flush)

    def close(self) -> None:
        """Nothing more will come."""
        self._bar.close()
        self._try(self._writer.close)
