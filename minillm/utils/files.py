"""Writing that survives a kill: temporary name, sync, rename, sync of the parent; checksums; locks between processes.

Contract: after any function here returns, the final name holds the whole new content; if the process dies at any
moment before that, the final name holds what it held before. Stdlib only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minillm.utils.errors import UserError

MANIFEST = "manifest.json"


def sync_file(path: Path) -> None:
    """fsync a file or a directory by path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Replace `path` by `content`: readers see the old or the new file, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a write that fails does not say of which file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(path.parent)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> object:
    """Read a JSON file; a UserError names the file and the place when it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def sha256_file(path: Path | str) -> str:
    """Hex digest of a file's content, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def publish_directory(temporary: Path, final: Path) -> None:
    """Sync everything in `temporary`, rename it to `final` (which must not exist) and sync the parent."""
    for root, _, names in os.walk(temporary):
        for name in names:
            sync_file(Path(root) / name)
        sync_file(Path(root))
    os.rename(temporary, final)
    sync_file(final.parent)


def remove_directory(path: Path) -> None:
    """Rename to `.NAME.deleted`, then delete, so that a kill halfway cannot leave it looking whole.

    A file or a link by that name goes too; what a link leads to stays.
    """
    grave = path.with_name(f".{path.name}.deleted")
    _delete(grave)
    os.rename(path, grave)
    _delete(grave)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(directory: Path, header: dict[str, object], checksums: dict[str, str] | None = None) -> None:
    """List every file of `directory` with size and sha256 in manifest.json.

    Args:
        header: extra keys of the manifest (format, step, ...).
        checksums: digests already known by file name (computed while writing); the rest are read back.
    """
    files = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file() and p.name != MANIFEST):
        digest = (checksums or {}).get(path.name) or sha256_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    write_json(directory / MANIFEST, {**header, "files": files})


def manifest_problems(directory: Path, largest: int | None = None, needed: Sequence[str] = ()) -> list[str]:
    """What is wrong with a directory that has a manifest, one sentence a problem; an empty list means it is whole.

    Args:
        largest: bytes up to which the content of a file is compared; None for all. Sizes always are.
        needed: names of files that the manifest has to list.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return [f"{path} is missing"]
    try:
        files = read_json(path)["files"]
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror})"]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} is damaged ({error})"]
    problems = [f"{path} does not list {name}" for name in needed if name not in entries]
    for name, (size, digest) in entries.items():
        file = directory / name
        try:
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif file.stat().st_size != size:
                problems.append(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
            elif (largest is None or size <= largest) and sha256_file(file) != digest:
                problems.append(f"{file} does not match its checksum")
        except OSError as error:
            problems.append(f"{file} cannot be read ({error.strerror})")
    return problems


@contextlib.contextmanager
def file_lock(path: Path | str, busy: Callable[[], None] | None = None, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if needed); the kernel drops it when the process ends, however it ends.

    Args:
        busy: called once when another process holds the lock; raise from it to refuse, or print and wait.
        wait: with False a busy lock raises BlockingIOError (after `busy`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is not None:
                busy()
            if not wait:
                raise
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
