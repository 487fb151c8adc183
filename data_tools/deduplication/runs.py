"""What is known of every document, on disk: runs of up to RUN_DOCUMENTS documents, sorted for external merging.

Contract: a run NAME of n documents is
    NAME.documents.npy  [n] in input order: 128-bit hash of the text, length, where its id and shingles are, signature
    NAME.keys.npy       [1 + bands, n] uint64, each row sorted: row 0 the first half of the hash, then the bands' keys
    NAME.order.npy      [1 + bands, n] uint32: which document of the run a key is of
    NAME.ids.npy        the ids, UTF-8, one after the other
    NAME.shingles.npy   sorted distinct shingles of each document (only where true Jaccard is asked for)
A document without shingles has no band keys: its places in the band rows are left at the end with NO_DOCUMENT.
Documents have global numbers in input order. A range of keys is read from every run by bisection, so a merge of all
runs needs no other sorting on disk and reads every key once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.deduplication.arrays import ArrayFile, close_arrays, open_array, save_array
from data_tools.deduplication.minhash import Bands, band_keys

RUN_DOCUMENTS = 1 << 16
NO_DOCUMENT = np.uint32(0xFFFFFFFF)


def document_type(permutations: int) -> np.dtype:
    """One row of NAME.documents.npy."""
    return np.dtype(
        [
            ("hash", "<u8", (2,)),
            ("length", "<i8"),
            ("id_end", "<i8"),
            ("shingles_end", "<i8"),
            ("signature", "<u4", (permutations,)),
        ]
    )


def write_run(
    path: Path, documents: np.ndarray, ids: list[bytes], bands: Bands | None, shingles: list[np.ndarray] | None
) -> None:
    """Write a run; each file appears when it is whole.

    Args:
        path: the folder and name.
        documents: rows of `document_type`; id_end and shingles_end are filled in here.
        bands: None where only exact duplicates are looked for.
        shingles: sorted distinct ones of every document, or None.
    """
    count = len(documents)
    documents["id_end"] = np.cumsum([len(identity) for identity in ids])
    save_array(path.with_name(f"{path.name}.ids.npy"), np.frombuffer(b"".join(ids), np.uint8))
    if shingles is not None:
        documents["shingles_end"] = np.cumsum([len(one) for one in shingles])
        save_array(path.with_name(f"{path.name}.shingles.npy"), np.concatenate(shingles))
    rows = 1 + (bands.bands if bands else 0)
    keys = np.full((rows, count), np.iinfo(np.uint64).max, np.uint64)
    order = np.full((rows, count), NO_DOCUMENT, np.uint32)
    order[0] = np.argsort(documents["hash"][:, 0], kind="stable")
    keys[0] = documents["hash"][order[0], 0]
    if bands:
        signed = np.flatnonzero(has_signature(documents["signature"]))
        for row, unsorted in enumerate(band_keys(documents["signature"][signed], bands), 1):
            places = np.argsort(unsorted, kind="stable")
            keys[row, : len(signed)] = unsorted[places]
            order[row, : len(signed)] = signed[places]
    save_array(path.with_name(f"{path.name}.documents.npy"), documents)
    save_array(path.with_name(f"{path.name}.keys.npy"), keys)
    save_array(path.with_name(f"{path.name}.order.npy"), order)


def has_signature(signature: np.ndarray) -> np.ndarray:
    """bool [documents]: whether a document had any shingle (a real signature is not all ones)."""
    return ~(signature == np.uint32(0xFFFFFFFF)).all(axis=1)


def clear_work(work: Path) -> None:
    """Delete what the passes left, when the summary is written; another command in the folder is still refused."""
    close_arrays(work)
    for path in work.iterdir():
        if path.name not in ("command.json", "lock"):
            path.unlink()


@dataclass(frozen=True)
class Runs:
    """All runs of a corpus in input order, read without holding them.

    Attributes:
        folder: where they are.
        names: of the runs.
        counts: documents of each.
    """

    folder: Path
    names: tuple[str, ...]
    counts: tuple[int, ...]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int64 [runs + 1]: number of the first document of each run; the last is the number of documents."""
        return np.concatenate([[0], np.cumsum(np.array(self.counts, np.int64))])

    @property
    def num_documents(self) -> int:
        return int(self.starts[-1])

    def slice_of(self, row: int, low: int, high: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(keys, global document numbers) of a row with low <= key < high; in input order for each key and run."""
        keys, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number, (name, count) in enumerate(zip(self.names, self.counts)):
            stored, first, last = self._open(f"{name}.keys"), row * count, (row + 1) * count
            start = stored.bisect(low, first, last) if low else first
            stop = stored.bisect(high, start, last) if high is not None else last
            order = self._open(f"{name}.order").read(start, stop)
            real = order != NO_DOCUMENT
            keys.append(stored.read(start, stop)[real])
            numbers.append(order[real].astype(np.int64) + self.starts[number])
        return np.concatenate(keys), np.concatenate(numbers)

    def documents(self, numbers: np.ndarray, field: str) -> np.ndarray:
        """A field of documents given by their global numbers, in that order."""
        runs = np.searchsorted(self.starts, numbers, side="right") - 1
        order = np.lexsort((numbers, runs))
        bounds = np.flatnonzero(np.diff(runs[order], prepend=-1, append=-1))
        parts = [np.empty(0)]
        for first, last in zip(bounds[:-1], bounds[1:]):
            places = order[first:last]
            run = int(runs[places[0]])
            parts.append(self._open(f"{self.names[run]}.documents").field(field, numbers[places] - self.starts[run]))
        if len(parts) == 1:
            return parts[0]
        found = np.concatenate(parts[1:])
        result = np.empty_like(found)
        result[order] = found
        return result

    def id_of(self, number: int) -> str:
        """The id of a document."""
        return self._piece(number, "ids", "id_end").tobytes().decode(errors="surrogatepass")

    def shingles_of(self, number: int) -> np.ndarray:
        """Sorted distinct shingles of a document."""
        return self._piece(number, "shingles", "shingles_end")

    def _piece(self, number: int, kind: str, end: str) -> np.ndarray:
        run = int(np.searchsorted(self.starts, number, side="right")) - 1
        local = int(number - self.starts[run])
        ends = self._open(f"{self.names[run]}.documents").field(end, np.arange(max(local - 1, 0), local + 1)).tolist()
        return self._open(f"{self.names[run]}.{kind}").read(ends[0] if local else 0, ends[-1])

    def _open(self, name: str) -> ArrayFile:
        return open_array(self.folder / f"{name}.npy")


def key_ranges(parts: int) -> Iterator[tuple[int, int | None]]:
    """The 64-bit keys in equal ranges: (first, first of the next or None)."""
    edges = [part * (1 << 64) // parts for part in range(parts)]
    yield from zip(edges, [*edges[1:], None])
