"""Ways to damage files, and what a folder holds, for the damage campaign.

Contract: every function changes only the path it is given; `contents` reads and never follows a link.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm.utils.files import MANIFEST, read_json, write_manifest


def flip(path: Path, place: float) -> None:
    """Flip one bit at `place`: an offset, or a part of the file where it is below 1."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if 0 < place < 1 else int(place)] ^= 0x10
    path.write_bytes(content)


def cut(path: Path, part: float) -> None:
    """Keep the first `part` of a file's bytes."""
    os.truncate(path, int(path.stat().st_size * part))


def relist(folder: Path, **header: object) -> None:
    """A manifest that fits what the folder holds now: damage that no checksum shows."""
    known = {key: value for key, value in read_json(folder / MANIFEST).items() if key != "files"}
    write_manifest(folder, {**known, **header})


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder with what it is: a digest, a link's target, or its kind. Locks are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if path.name == ".lock":
            continue
        if stat.S_ISLNK(mode):
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = f"kind {stat.S_IFMT(mode):o}"
    return found


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """A process group for training inside the test's process, the one of this session where there is one.

    Its models are so small that a second thread waits more than it computes, above all on a busy machine.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    from minillm.training.engine import process_group

    threads = torch.get_num_threads()
    if dist.is_initialized():
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
        return
    with process_group():
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
    for name, value in vars(groups).items():  # DeepSpeed keeps them, and another group may follow in this process
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything; inside the block this process may not."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"this machine does not let go of root: {error}")
    try:
        yield
    finally:
        os.seteuid(0)
