"""A whole-corpus shuffle that holds one bucket's offsets in memory, never the corpus.

Contract: `shuffled_records(records, folder, ...)` yields the same byte strings in an order that depends only on the
seed, their number and sequence. Each record goes to a bucket file by a hash of its number; the buckets are then read
one after the other, each in a seeded permutation. Disk: one copy of the records in `folder`, deleted as it is read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from minillm.data.permutation import hash_key, permute

BUCKET_BYTES = 64 << 20  # a bucket is read in random order: small enough to stay in the page cache
MAX_BUCKETS = 256  # files open at once
_LENGTH_BYTES = 8


def num_buckets_for(corpus_bytes: int) -> int:
    """Buckets of about BUCKET_BYTES, at most MAX_BUCKETS."""
    return min(MAX_BUCKETS, corpus_bytes // BUCKET_BYTES + 1)


def shuffled_records(records: Iterator[bytes], folder: Path, *, num_buckets: int, seed: int) -> Iterator[bytes]:
    """Yield `records` in random order.

    Args:
        folder: an existing folder for the bucket files, left empty at the end.
    """
    paths = [folder / f"bucket-{number:03d}" for number in range(num_buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb", buffering=1 << 16)) for path in paths]
        for number, record in enumerate(records):
            file = files[hash_key(seed, number) % num_buckets]
            file.write(len(record).to_bytes(_LENGTH_BYTES, "little"))
            file.write(record)
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            starts = _record_starts(file, path.stat().st_size)
            for index in permute(np.arange(len(starts)), len(starts), hash_key(seed, 1, number)):
                file.seek(starts[index])
                yield file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little"))
        path.unlink()


def _record_starts(file, size: int) -> array:
    starts = array("q")
    offset = 0
    while offset < size:
        starts.append(offset)
        file.seek(offset)
        offset += _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
    return starts
