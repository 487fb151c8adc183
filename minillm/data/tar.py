"""Uncompressed tar files read by the byte: members with their places, and an error where the file was cut.

Contract: `iterate_members` yields every regular file of a tar (ustar, GNU and pax headers) in order, or raises
DamagedTar. webdataset's and tarfile's stream readers take a truncated tar for a short one; here a tar without its
end-of-archive block is an error. Names are data: nothing here joins one to a path.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block".
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512


# What is often named .tar and is not one, by its first bytes.
_OTHERS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}


class DamagedTar(ValueError):
    """The bytes are not a whole tar; the message says where it stops making sense."""


class Member(NamedTuple):
    """A regular file in a tar: its headers and data stand in [start, end); `data` is None when only scanned."""

    name: str
    start: int
    end: int
    size: int
    data: bytes | None


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def member_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header WebDataset's own writer makes for a member, with time 0."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = size, 0, 0o444, "bigdata", "bigdata"
    return info.tobuf(tarfile.USTAR_FORMAT)


def iterate_members(file: BinaryIO, start: int = 0, end: int | None = None, content: bool = True) -> Iterator[Member]:
    """Yield the regular files whose headers stand in [start, end).

    Args:
        start: offset of a header (a Member's `start`).
        end: stop at the first header at or after this offset; None reads to the end-of-archive block and demands it.
        content: False skips the data (scanning costs one block a member).

    Raises:
        DamagedTar: something that is not a header, a member that runs past the end, no end-of-archive block.
    """
    file.seek(0, 2)
    file_size = file.tell()
    offset = first_header = start
    override: dict[str, str] = {}
    if start == 0:
        _refuse_others(file)
    while end is None or offset < end:
        block = _read_at(file, offset, BLOCK)
        if not any(block):
            return
        info = _header(block, offset)
        kind = info.type
        size = _size(override.get("size"), info, offset)
        body = offset + BLOCK
        if kind in b"123456":  # links, devices and folders carry no data
            size = 0
        if body + padded(size) > file_size:
            raise DamagedTar(f"it is cut at byte {file_size} inside the member at byte {offset}")
        offset = body + padded(size)
        if kind in (b"x", b"L"):
            override |= _extension(kind, _read_at(file, body, size))
            continue
        if kind in (b"g", b"K"):
            continue
        if kind in (b"0", b"\0", b"7"):
            data = _read_at(file, body, size) if content else None
            yield Member(override.get("path") or info.name, first_header, offset, size, data)
        elif kind == b"S":
            raise DamagedTar(f"the member at byte {first_header} is a GNU sparse file, which is not supported")
        override = {}
        first_header = offset


def _refuse_others(file: BinaryIO) -> None:
    file.seek(0)
    first = file.read(8)
    for magic, name in _OTHERS.items():
        if first.startswith(magic):
            raise DamagedTar(f"it is a {name} file, whatever its name: unpack it, shards are uncompressed tars")


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise DamagedTar(f"it is cut at byte {offset + len(data)}: the end-of-archive blocks are missing")
    return data


def _header(block: bytes, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        raise DamagedTar(f"there is no tar header at byte {offset} ({error})") from error


def _size(announced: str | None, info: tarfile.TarInfo, offset: int) -> int:
    """A member's size: a pax header's, else its own."""
    if announced is None:
        size = info.size
    else:
        size = int(announced) if announced.isascii() and announced.isdigit() else -1
    if size < 0:
        raise DamagedTar(f"the member at byte {offset} has a size that is not a number")
    return size


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """The path and size that a GNU long-name or a pax header announces for the member after it."""
    if kind == b"L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "replace")}
    fields = {}
    while data:
        length = data.split(b" ", 1)[0]
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise DamagedTar("a pax header in it makes no sense")
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 :].removesuffix(b"\n").partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
    return {key: fields[key] for key in ("path", "size") if key in fields}
