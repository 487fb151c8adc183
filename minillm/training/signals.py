"""SIGINT, SIGTERM, SIGUSR1 and the launcher's death: remembered, agreed on by all ranks, obeyed between two steps."""

from __future__ import annotations

import os
import signal


class StopRequest:
    """`number` is that of the first stop signal this rank received, 0 before.

    A handler only notes the number: the step in flight is finished and a checkpoint saved by the loop. A second signal
    of the same kind gets Python's default treatment, for whoever does not want to wait. A rank whose launcher died
    counts that as SIGTERM: a signal to the deepspeed runner reaches no rank, and nothing should train on as an orphan.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: SLURM's warning before the time limit

    def __init__(self, launched: bool):
        self._received = 0
        self._launcher = os.getppid() if launched else None
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    @property
    def number(self) -> int:
        if self._received == 0 and self._launcher is not None and os.getppid() != self._launcher:
            self._received = signal.SIGTERM
        return self._received

    def _note(self, number: int, frame: object) -> None:
        self._received = self._received or number
        signal.signal(number, self._before[number])

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
