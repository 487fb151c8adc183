"""Opening the files of a corpus: what a part of a file is, decompression, and content that belies the name.

Contract: `open_binary` gives a file's bytes, decompressed by its suffix; damage is an error, never a short file.
`check_content` compares the first bytes with the name before anything is read.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools.extras import require
from minillm.utils.errors import UserError

COMPRESSIONS = (".gz", ".zst")
PIECE_BYTES = 1 << 20  # a text file above this many bytes becomes several documents

Record = dict[str, object]
Progress = Callable[[int], None]  # called with the bytes read from the disk since its last call


@dataclass(frozen=True)
class Rejected:
    """A record that is left out.

    Attributes:
        reason: a short stable name that is counted, such as "not_json".
        detail: one sentence with the place.
        text: the beginning of its text, where there is one.
    """

    id: str
    reason: str
    detail: str
    text: str = ""


class Raw(NamedTuple):
    """A record as the file has it; `place` is for messages, `default_id` for records without one."""

    place: str
    default_id: str
    fields: Record


@dataclass(frozen=True)
class Span:
    """A part of a file that is read alone: bytes of a .jsonl, row groups of a .parquet, else the whole file.

    Attributes:
        name: of the file in ids.
        start, stop: bytes, row groups, or shards of a hub data set.
        first: number of its first record in the file, from 1.
        size: bytes to read, about.
        piece_bytes: a text file longer than this becomes several documents.
    """

    path: str
    name: str
    suffix: str
    start: int
    stop: int
    first: int
    size: int
    piece_bytes: int = PIECE_BYTES


def open_binary(path: Path | str, progress: Progress = lambda size: None) -> BinaryIO:
    """A file's bytes, decompressed by its suffix; `progress` hears of the bytes as they are on the disk."""
    raw = _Counted(path, progress)
    if str(path).lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 18))
    if str(path).lower().endswith(".zst"):
        return io.BufferedReader(_Zstandard(io.BufferedReader(raw, 1 << 18)), 1 << 18)
    return io.BufferedReader(raw, 1 << 18)


class _Counted(io.FileIO):
    def __init__(self, path: Path | str, progress: Progress):
        super().__init__(path, "r")
        self._progress = progress

    def readinto(self, buffer) -> int:
        size = super().readinto(buffer)
        self._progress(size or 0)
        return size


class _DamagedZstandard(Exception):
    """Not zstandard data, or the end is missing."""


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame. The library's own stream_reader takes a file that was cut off for a short one."""

    def __init__(self, raw: io.BufferedReader):
        self._library = require("zstandard")
        self._raw, self._frame, self._held, self._rest = raw, None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._held:
            block = self._rest or self._raw.read(1 << 17)
            self._rest = b""
            if not block:
                if self._frame is not None:
                    raise _DamagedZstandard("a frame without its end")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._held = self._frame.decompress(block)
            except self._library.ZstdError as error:
                raise _DamagedZstandard(error) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


# -- does the content fit the name? ------------------------------------------------------------------------------------

_MAGIC = [  # (bytes, offset, what it is, suffix that would be right)
    (b"\x1f\x8b", 0, "gzip data", ".gz"),
    (b"\x28\xb5\x2f\xfd", 0, "zstandard data", ".zst"),
    (b"PAR1", 0, "a Parquet file", ".parquet"),
    (b"ustar", 257, "a tar", ".tar"),
    (b"PK\x03\x04", 0, "a zip archive", "no known suffix: unpack it"),
    (b"%PDF", 0, "a PDF", "no known suffix: take the text out of it first"),
    (b"SQLite format 3", 0, "an SQLite database", "no known suffix: export its table as CSV"),
    (b"\x89HDF", 0, "an HDF5 file", "no known suffix: export it as JSON lines"),
]


def check_content(path: Path, suffix: str) -> None:
    """Compare a file's first bytes with what its name says.

    Raises:
        UserError: it is something else.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    wanted = next((end for end in (*COMPRESSIONS, ".parquet", ".tar") if suffix.endswith(end)), None)
    found = next((entry for entry in _MAGIC if head[entry[1] : entry[1] + len(entry[0])] == entry[0]), None)
    if wanted is None and found is None or found is not None and found[3] == wanted or not head and wanted is None:
        return
    if wanted == ".tar" and found is None and head.startswith(b"\0" * 512):
        return  # an empty tar
    what = found[2] if found else "empty" if not head else f"no {wanted.removeprefix('.')} data"
    fix = f"its suffix should be {found[3]}" if found else "is the download whole?"
    raise UserError(f"{path} is not what its name says ({suffix}): it is {what}; {fix}")


@contextlib.contextmanager
def damage_is_told(path: Path | str) -> Iterator[None]:
    """A damaged .gz or .zst is the user's file, not a traceback."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedZstandard) as error:
        raise UserError(f"{path} is damaged or cut off ({error}): fetch it again") from error


class NotUtf8(UserError):
    """A byte that is no UTF-8."""


def not_utf8(path: Path | str, offset: int, byte: int, line: int | None = None) -> NotUtf8:
    """The error for a byte that is no UTF-8, with a guess what the file is."""
    where = f"{path}{f':{line}' if line else ''}"
    if offset == 0 and byte in (0xFF, 0xFE):
        guess, said = "UTF-16", " (the file looks like UTF-16)"
    else:
        guess, said = "LATIN1", " (put the file's real encoding, for example GB18030 or CP1252, in the place of LATIN1)"
    name = Path(path).name
    return NotUtf8(
        f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}. "
        f"Convert it: iconv -f {guess} -t UTF-8 {name} > utf8-{name}{said}"
    )
