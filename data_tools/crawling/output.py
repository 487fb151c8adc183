"""The records of a crawl as OUT/part-00000.jsonl, ..., written page by page and safe against a kill.

Contract: the open part is OUT/.work/part.jsonl; the frontier keeps its number and length in the transaction of the page
that was appended, and what lies behind that length is cut off when the crawl goes on. A part gets its name when it is
full or the crawl ends.
"""

from __future__ import annotations

import os
from pathlib import Path

from data_tools.crawling.frontier import Frontier
from data_tools.workshop import encode
from minillm.utils.files import sync_file
from minillm.utils.logging import warn

PART_BYTES = 64 << 20


class Output:
    """Appends records; see the module."""

    def __init__(self, out: Path, work: Path, frontier: Frontier) -> None:
        self._out, self._open, self._frontier = out, work / "part.jsonl", frontier
        self.number, self.length = int(frontier.get("part", 0)), int(frontier.get("length", 0))
        if self.length and not self._open.exists() and self._part().exists():
            self._forget()  # killed between the renaming and its note
        found = self._open.stat().st_size if self._open.exists() else 0
        if found < self.length:
            warn(f"{self._open} lost {self.length - found:,} bytes, as after a power failure: those pages are missing")
            self.length = found
        self._file = open(self._open, "ab")
        self._file.truncate(self.length)
        self._file.seek(0, os.SEEK_END)

    def add(self, record: dict[str, object]) -> int:
        """Append a record, inside the frontier's transaction; its bytes."""
        line = encode(record)
        self._file.write(line)
        self._file.flush()
        self.length += len(line)
        self._frontier.put("length", self.length)
        return len(line)

    def roll(self, least: int = PART_BYTES) -> None:
        """Give the open part its name if it has at least so many bytes; outside a transaction."""
        if self.length < max(1, least):
            return
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._open, self._part())
        sync_file(self._out)
        self._forget()
        self._file = open(self._open, "ab")

    def close(self) -> None:
        self._file.close()

    def _part(self) -> Path:
        return self._out / f"part-{self.number:05d}.jsonl"

    def _forget(self) -> None:
        with self._frontier as frontier:
            self.number, self.length = self.number + 1, 0
            frontier.put("part", self.number)
            frontier.put("length", 0)
