"""What a command has started and left behind, told by its session: start it with start_new_session=True."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

GONE = 120  # seconds within which the rest of a command must have left


def session_of(process: subprocess.Popen) -> list[int]:
    """The living processes that this command started, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            except OSError:
                continue
            if int(session) == process.pid and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def wait_until_alone(process: subprocess.Popen, log: Callable[[], str] = str) -> float:
    """Until every process of the command is gone; the seconds it took.

    Raises:
        AssertionError: some are there after GONE seconds; they are killed.
    """
    start = time.monotonic()
    while left := session_of(process):
        if time.monotonic() - start > GONE:
            names = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left]
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"still alive after {GONE} s: {names}\n{log()}")
        time.sleep(0.02)
    return time.monotonic() - start
