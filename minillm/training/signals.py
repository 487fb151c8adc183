"""SIGINT, SIGTERM, SIGUSR1 and the launcher's death: remembered, agreed on by all ranks, obeyed between two steps.

Imported before torch, which takes seconds to load: a launcher that dies meanwhile is missed too.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path


def _parent_of(pid: int) -> int | None:
    """None where the process is gone, or the system has no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _is_deepspeed_command(pid: int | None) -> bool:
    """The `deepspeed` command: its launch.py, the ranks' parent, would outlive it and wait for the ranks."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return "deepspeed.launcher.runner" in words[1:3] or "deepspeed" in (Path(word).name for word in words[:2])


_LAUNCHER = os.getppid()
_COMMAND = _parent_of(_LAUNCHER)
_WATCH_COMMAND = _is_deepspeed_command(_COMMAND)


class StopRequest:
    """`number` is that of the first stop signal this rank received, 0 before.

    A handler only notes the number: the step in flight is finished and a checkpoint saved by the loop. A second signal
    of the same kind gets Python's default treatment, for whoever does not want to wait. A rank whose launcher died
    counts that as SIGTERM, and so it does when the `deepspeed` command above its launcher died: a signal to either
    reaches no rank, and nothing should train on as an orphan.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: SLURM's warning before the time limit

    def __init__(self, launched: bool):
        self._received = 0
        self._launched = launched
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    @property
    def number(self) -> int:
        if self._received == 0 and self._launched and _is_orphan():
            self._received = signal.SIGTERM
        return self._received

    def _note(self, number: int, frame: object) -> None:
        self._received = self._received or number
        signal.signal(number, self._before[number])

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _is_orphan() -> bool:
    return os.getppid() != _LAUNCHER or (_WATCH_COMMAND and _parent_of(_LAUNCHER) != _COMMAND)
