"""How far a long transfer is: one line that is rewritten on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from minillm.utils.logging import say

_REDRAW_S = 0.2
_LOG_S = 30.0
_RATE_WINDOW_S = 15.0


class Line:
    """Shows a text now and then: rewritten in place on a terminal, as lines of their own elsewhere.

    Args:
        text: makes the line; called only when one is shown.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (0 if self._terminal else _LOG_S)
        self._lock = threading.Lock()

    def tick(self) -> None:
        """Show the line if it is due."""
        now = time.monotonic()
        if now < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            self._next = now + (_REDRAW_S if self._terminal else _LOG_S)
            if self._terminal:
                print(f"\r\x1b[K{self._text()}", end="", file=sys.stderr, flush=True)
            else:
                say(self._text())
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the rewritten line."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Progress:
    """Bytes of several files together: how many, how fast, how long still.

    Args:
        sizes: of the files, None where it is not known yet.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self.num_files = len(sizes)
        self._total = sum(size or 0 for size in sizes)
        self._unknown = sum(size is None for size in sizes)
        self.have = self.done = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        self._line = Line(self.text)

    def add(self, num_bytes: int) -> None:
        """Count bytes that are on the disk now (negative: dropped again)."""
        with self._lock:
            self.have += num_bytes
            now = time.monotonic()
            self._recent.append((now, self.have))
            while now - self._recent[0][0] > _RATE_WINDOW_S:
                self._recent.popleft()
        self._line.tick()

    def learn(self, size: int) -> None:
        """A size that was not known is."""
        with self._lock:
            self._total, self._unknown = self._total + size, self._unknown - 1

    def file_done(self) -> None:
        """Count a finished file."""
        with self._lock:
            self.done += 1

    def text(self) -> str:
        """The line: `2 of 14 files, 1.20 GB of 7.50 GB (16 %), 24.1 MB/s, 4 min 22 s left`."""
        with self._lock:
            rate = 0.0
            if len(self._recent) > 1:
                (begin, first), (end, last) = self._recent[0], self._recent[-1]
                rate = max(0.0, (last - first) / (end - begin)) if end > begin else 0.0
            have, done, total = self.have, self.done, 0 if self._unknown else self._total
        parts = [size_text(have), f"{rate / 1e6:.1f} MB/s"]
        if total:
            parts[0] += f" of {size_text(total)} ({100 * have / total:.0f} %)"
            if rate > 0:
                parts.append(f"{duration((total - have) / rate)} left")
        return ", ".join([f"{done} of {self.num_files} files"] * (self.num_files > 1) + parts)

    def close(self) -> None:
        self._line.close()


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size_text(num_bytes: int | None) -> str:
    """A size for people: `1.62 GB`, `340 MB`, `?`."""
    if num_bytes is None:
        return "?"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{num_bytes} B"
