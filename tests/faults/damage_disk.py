"""A small disk of its own for a test: a tmpfs that fills, grows, and can be made read-only.

Contract: needs root and a kernel that mounts; otherwise the test is skipped with the reason. Nothing stays mounted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILLER = "filler.bin"


class Disk:
    """A tmpfs mounted at `path`."""

    def __init__(self, path: Path, size: int):
        self.path, self._binds = path, []
        path.mkdir(parents=True, exist_ok=True)
        done = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")

    @property
    def used(self) -> int:
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    @property
    def inodes_used(self) -> int:
        status = os.statvfs(self.path)
        return status.f_files - status.f_ffree

    def leave(self, room: int) -> None:
        """Make the disk as large as what is on it and `room` bytes."""
        self._remount(f"size={self.used + room}")

    def leave_inodes(self, count: int) -> None:
        self._remount(f"nr_inodes={self.inodes_used + count}")

    def fill(self) -> None:
        """Write a file until no byte is left."""
        with contextlib.suppress(OSError), open(self.path / FILLER, "ab", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    def free(self) -> None:
        """Room enough for everything."""
        (self.path / FILLER).unlink(missing_ok=True)
        self._remount("size=256m,nr_inodes=100000")

    @contextlib.contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """`folder` cannot be written inside the block, not by root either."""
        self._checked("--bind", str(folder), str(folder))
        try:
            self._checked("-o", "remount,bind,ro", str(folder))
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True)

    def _remount(self, options: str) -> None:
        self._checked("-o", f"remount,{options}", str(self.path))

    def _checked(self, *words: str) -> None:
        done = mount(*words)
        assert done.returncode == 0, done.stderr


def mount(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def small_disk(path: Path, size: int = 256 << 20) -> Iterator[Disk]:
    disk = Disk(path, size)
    try:
        yield disk
    finally:
        disk.close()
