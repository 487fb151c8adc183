"""The disk under a folder: speed, room for the planned checkpoints, and whether sync, rename and locks work there.

Contract: stdlib only; the folder is left as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minillm.preflight.rows import FAIL, OK, WARN, Row
from minillm.utils.files import sync_file

GIB, MIB = 2**30, 2**20
WRITE_BYTES = 64 * MIB  # enough to get past small caches, quick on a slow disk
SLOW_CHECKPOINT = 120  # seconds one checkpoint may take to write without a warning


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed afterwards, with those of its parents that had to be made."""
    made = []
    for folder in (parent, *parent.parents):
        if folder.exists():
            break
        made.append(folder)
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".preflight-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for one in made:
            with contextlib.suppress(OSError):  # something else has come into it
                one.rmdir()


def disk_row(name: str, folder: Path, planned: tuple[int, int, int] | None) -> Row:
    """Speed, free space, sync, rename and locks of the file system under `folder`.

    Args:
        planned: bytes of one checkpoint, how many are kept, and bytes already there; room is needed for two more than
            are kept: the best one, and the one being written.
    """
    try:
        with scratch_folder(folder) as scratch:
            free, total = space(scratch)
            lock = lock_problem(scratch)
            speed = write_speed(scratch, min(WRITE_BYTES, free // 4))
            sync_seconds = rename_seconds(scratch)
            kind = file_system(scratch)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        fixes = {
            errno.EROFS: "it is mounted read-only: remount it, or choose another folder",
            errno.ENOSPC: "the disk is full: make room, or choose a folder on another disk",
            errno.EDQUOT: "your quota is used up: make room, or choose a folder on another disk",
            errno.ENOTDIR: "a part of this path is a file: remove it, or choose another folder",
            errno.EEXIST: "there is a file of this name: remove it, or choose another folder",
        }
        fix = fixes.get(error.errno, f"make it writable for {_user()}, or choose another folder")
        return Row(name, FAIL, f"{folder}: {reason}", fix)
    found = f"{folder} ({kind}): {speed / 1e6:,.0f} MB/s, {free / GIB:,.1f} of {total / GIB:,.1f} GiB free, "
    found += f"sync and rename {1000 * sync_seconds:.1f} ms, locks {'work' if lock is None else lock}"
    values = {"bytes_per_s": speed, "free": free, "sync_seconds": sync_seconds}
    if lock is not None:
        fix = (
            "a run folder needs flock: mount it with locks (Lustre: -o flock; NFS: without nolock or local_lock=all), "
            "or choose a folder on another file system"
        )
        return Row(name, FAIL, found, fix, values)
    return judge_space(Row(name, OK, found, values=values), planned)


def judge_space(row: Row, planned: tuple[int, int, int] | None) -> Row:
    """Compare a disk with the planned checkpoints."""
    if planned is None:
        return row
    size, keep, held = planned
    needed = max(size, size * (keep + 2) - held)
    seconds = size / max(1, row.values["bytes_per_s"])
    row.found += (
        f"\ncheckpoints: {_bytes(size)} each, {keep} kept + best + the one being written: {_bytes(needed)} "
        f"{'more ' if held else ''}needed, about {seconds:.2g} s each at this speed"
    )
    row.values |= {"checkpoint_bytes": size, "needed": needed}
    if row.values["free"] < needed:
        row.verdict = FAIL
        row.fix = f"free {_bytes(needed - row.values['free'])}, lower checkpoint.keep, or set run_root to another disk"
    elif row.values["free"] < 1.5 * needed:
        row.verdict, row.fix = WARN, "little room is left beside the checkpoints: lower checkpoint.keep or make room"
    elif seconds > SLOW_CHECKPOINT:
        row.verdict = WARN
        row.fix = "put run_root on a faster disk, or save less often (checkpoint.every)"
    return row


def _bytes(number: float) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / MIB:,.1f} MiB"


def _user() -> str:
    return os.environ.get("USER") or f"user {os.getuid()}"


def space(folder: Path) -> tuple[int, int]:
    """(bytes free for this user, bytes in all)."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def write_speed(folder: Path, num_bytes: int) -> float:
    """Bytes a second for one new file, synced."""
    block = os.urandom(min(MIB, max(1, num_bytes)))  # file systems that compress would look fast with zeros
    start = time.perf_counter()
    with open(folder / "speed", "wb", buffering=0) as file:
        written = 0
        while written < num_bytes:
            written += file.write(block)
        os.fsync(file.fileno())
    return written / (time.perf_counter() - start)


def rename_seconds(folder: Path) -> float:
    """Seconds of what publishes a checkpoint: sync the file, rename its folder, sync the parent."""
    temporary, final = folder / "step.tmp", folder / "step"
    temporary.mkdir()
    (temporary / "file").write_text("content")
    start = time.perf_counter()
    sync_file(temporary / "file")
    sync_file(temporary)
    os.rename(temporary, final)
    sync_file(folder)
    seconds = time.perf_counter() - start
    if (final / "file").read_text() != "content":
        raise OSError(errno.EIO, "a renamed folder lost its file")
    return seconds


def lock_problem(folder: Path) -> str | None:
    """None where one lock keeps another out (two open files of one process are two owners to flock)."""
    with open(folder / "lock", "w") as one, open(folder / "lock", "w") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # ENOSYS on Lustre without -o flock, ENOLCK on NFS without a lock server
            return f"are refused ({os.strerror(error.errno)})"
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return "keep nobody out"


def file_system(folder: Path) -> str:
    """The type of the file system, from the longest mount point above the folder."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, name, *_ = line.split()
            if (str(folder.resolve()) + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                best, kind = point, name
    return kind
