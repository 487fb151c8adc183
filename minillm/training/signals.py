"""SIGINT and SIGTERM: remembered, agreed on by all ranks, obeyed between two steps."""

from __future__ import annotations

import signal


class StopRequest:
    """Holds the number of the first stop signal this rank received, 0 before.

    A handler only notes the number: the step in flight is finished and a checkpoint saved by the loop. A second signal
    of the same kind gets Python's default treatment, for whoever does not want to wait.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: object) -> None:
        self.number = self.number or number
        signal.signal(number, self._before[number])

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
