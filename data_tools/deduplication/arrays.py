"""Arrays in .npy files that are read by row, without mapping them.

Contract: `open_array` gives an ArrayFile, of which a few hundred are kept open. A mapped file would count as this
process's memory page by page (the kernel maps 16 around each one that is read); what is read here is copied, and the
rest stays in the kernel's cache, so that memory does not follow the size of the files.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from minillm.utils.errors import UserError

OPEN_FILES = 200


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save under a temporary name, then a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)


class ArrayFile:
    """A .npy file of one or two dimensions, open for reading."""

    def __init__(self, path: Path):
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                self.shape, _, self.dtype = read_header[version](file)
                self._start = file.tell()
                self._file = os.dup(file.fileno())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}): remove the output folder and begin again") from None

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the array, counted over its rows."""
        size = self.dtype.itemsize
        return np.frombuffer(self._bytes((stop - start) * size, self._start + start * size), self.dtype)

    def _bytes(self, size: int, offset: int) -> bytes:
        data = os.pread(self._file, size, offset)
        while len(data) < size:  # a single call reads 2 GB at most
            more = os.pread(self._file, size - len(data), offset + len(data))
            if not more:
                raise UserError("a file of the work folder is too short: remove the output folder and begin again")
            data += more
        return data

    def field(self, name: str, places: np.ndarray) -> np.ndarray:
        """A field of the elements at `places` (int64 [n]) of an array of records: [n, ...]."""
        kind, offset = self.dtype.fields[name][:2]
        offsets = self._start + offset + places * self.dtype.itemsize
        data = b"".join([os.pread(self._file, kind.itemsize, place) for place in offsets.tolist()])
        return np.frombuffer(data, kind.base).reshape(len(places), *kind.shape)

    def bisect(self, value: int, start: int, stop: int) -> int:
        """The first of the sorted elements [start, stop) that is not below `value`."""
        while start < stop:
            middle = (start + stop) // 2
            if int(self.read(middle, middle + 1)[0]) < value:
                start = middle + 1
            else:
                stop = middle
        return start


_open: OrderedDict[str, ArrayFile] = OrderedDict()


def open_array(path: Path) -> ArrayFile:
    """The file at `path`, open already or not; the one that was not used for longest is closed."""
    key = str(path)
    if key not in _open:
        if len(_open) >= OPEN_FILES:
            _open.popitem(last=False)[1].close()
        _open[key] = ArrayFile(path)
    _open.move_to_end(key)
    return _open[key]


def close_arrays(folder: Path) -> None:
    """Close the files below a folder: another run may write the same names."""
    for key in [key for key in _open if Path(key).is_relative_to(folder)]:
        _open.pop(key).close()
