"""Signals that ask a run to save and stop. Imports nothing slow: they are heeded before anything else is."""

from __future__ import annotations

import signal
from collections.abc import Iterable

LAUNCHER_LOST = signal.SIGUSR2  # of the watchdog, once a rank's launcher has ended
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, LAUNCHER_LOST)


def early_signals() -> list[signal.Signals]:
    """What a rank heeds from its start, since a cluster sends it once: SIGUSR1, and SIGTERM if it is ignored.

    Else SIGTERM, by which torchrun ends the others when a rank has failed, ends one that is still starting.
    """
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    return [signal.SIGUSR1, signal.SIGTERM] if ignored else [signal.SIGUSR1]


class StopRequest:
    """Remembers that a signal asked this process to stop at the next step boundary."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self.number = 0
        self._before: dict[signal.Signals, object] = {}
        self.heed(signals)

    def heed(self, signals: Iterable[signal.Signals]) -> None:
        """These too, from here on."""
        for number in signals:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self.number == 0 or number == LAUNCHER_LOST:  # the first is why; it may come again and again
            self.number = number

    def restore(self) -> None:
        """Heed none any more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
