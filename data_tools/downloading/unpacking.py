"""Downloaded files as the workshop's readers take them: archives unpacked, names that say what is inside.

Contract: `corpus_view` makes DIR/.corpus, where every downloaded file with records stands under the path it has in the
dataset: as a link, or unpacked (.tar.gz, .tar.bz2, .tar.xz, .tgz, .zip, .bz2, .xz), a member at a time and whole or not
at all. A `.json` with an object a line is linked as .jsonl. Members that would lie outside the folder, links and
devices are refused.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data_tools.formats import is_json_list, suffix_of
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_json
from minillm.utils.logging import say

TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SINGLE = {".bz2": bz2.open, ".xz": lzma.open}
_BLOCK_BYTES = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError, NotImplementedError, RuntimeError)


def corpus_view(folder: Path, paths: list[str]) -> Path:
    """The folder that readers are given; see the module.

    Args:
        folder: where the files were downloaded to.
        paths: the files, relative to it.

    Raises:
        UserError: no file with records among them, or a damaged archive.
    """
    view = folder / ".corpus"
    for path in paths:
        source = folder / path
        if not source.is_file():
            raise UserError(f"{source} is not there: run the same `download get` again")
        if _is_archive(path):
            _unpack(source, view / path)
        elif suffix := suffix_of(path):
            # a dataset card is text for people, not a document of the corpus
            if PurePosixPath(path).name.lower() in ("readme.md", "license.txt", "license.md"):
                continue
            lines = suffix == ".json" and not is_json_list(source)
            _link(source, view / (f"{path}l" if lines else path))
    if not view.exists():
        raise UserError(f"{folder} holds no file with records: {', '.join(paths) or 'nothing was downloaded'}")
    return view


def _is_archive(path: str) -> bool:
    return path.lower().endswith((*TARS, ".zip", *SINGLE))


def _link(source: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(source, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _unpack(source: Path, folder: Path) -> None:
    """Unpack into `folder` unless that was done from this very file."""
    found = source.stat()
    mark, identity = folder / ".unpacked.json", {"bytes": found.st_size, "time": found.st_mtime_ns}
    if mark.is_file() and read_json(mark) == identity:
        return
    shutil.rmtree(folder, ignore_errors=True)
    say(f"unpacking {source}")
    count = 0
    try:
        for name, stream in _members(source):
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or "\\" in name or not parts:
                raise UserError(f"{source} holds {name!r}, which would lie outside its folder: it is not unpacked")
            if any(part.startswith(".") for part in parts) or "__MACOSX" in parts or not suffix_of(name):
                continue
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            with open(temporary, "wb") as file:
                shutil.copyfileobj(stream, file, _BLOCK_BYTES)
            os.replace(temporary, target)
            if suffix_of(target) == ".json" and not is_json_list(target):
                os.replace(target, target.with_name(f"{target.name}l"))
            count += 1
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"no space is left to unpack {source}: make room, then run the command again") from None
        said = " ".join(str(error).split())
        raise UserError(f"{source} is damaged or cut off ({said or type(error).__name__}): fetch it again") from None
    if not count:
        raise UserError(f"{source} holds no file that can be read as records")
    write_json(mark, identity)


def _members(source: Path) -> Iterator[tuple[str, BinaryIO]]:
    name = source.name.lower()
    if name.endswith(TARS):
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                if member.issym() or member.islnk() or member.isdev():
                    raise UserError(f"{source} holds {member.name!r}, a link or device: it is not unpacked")
                if member.isfile():
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield member.name, stream
    elif name.endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as stream:
                        yield info.filename, stream
    else:
        suffix = next(suffix for suffix in SINGLE if name.endswith(suffix))
        with contextlib.closing(SINGLE[suffix](source, "rb")) as stream:
            yield source.name[: -len(suffix)], stream
