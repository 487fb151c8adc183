"""The second pass: equal keys to pairs of documents, one range of the keys of one band at a time.

Contract: `match_keys` reads a range of one row of keys from all runs (it fits in memory: about PART_DOCUMENTS keys),
groups equal ones, and writes the pairs that hold as LABEL-00007.pairs.npy: (first document in input order, other,
similarity). Row 0 joins equal 128-bit hashes. In a band, candidates are verified, by the share of equal signature
entries or by true Jaccard, so that a bucket's common rows alone join nothing.

Within a bucket the pairs written connect exactly what all pairs above the threshold would connect, but a member that is
already connected is not compared again: a bucket of n equal texts costs n comparisons. Only a bucket in which many are
not alike could cost n^2 / 2; there MAX_LEADERS members are compared with all the others, and what was left out is
counted ("not_compared").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_tools.deduplication.arrays import save_array
from data_tools.deduplication.minhash import estimated_similarity
from data_tools.deduplication.runs import Runs, key_ranges

PART_DOCUMENTS = 1 << 21  # keys sorted at a time: about 100 MB in a process
MAX_LEADERS = 64
_PAIRS_AT_A_TIME = 1 << 14
PAIR = np.dtype([("first", "<i8"), ("other", "<i8"), ("similarity", "<f4")])


@dataclass(frozen=True)
class KeyRange:
    """A piece of work for `run_units`: the keys of `row` in the part `part` of `parts`."""

    number: int
    size: int
    row: int
    part: int
    parts: int


def key_work(num_documents: int, rows: range) -> list[KeyRange]:
    """Every row of keys in parts that fit in memory."""
    parts = -(-num_documents // PART_DOCUMENTS) or 1
    work = [(row, part) for row in rows for part in range(parts)]
    size = num_documents * 12 // parts
    return [KeyRange(number, size, row, part, parts) for number, (row, part) in enumerate(work)]


def runs_of(arguments: dict, work: Path) -> Runs:
    """The runs that the arguments of a pass name."""
    return Runs(work, tuple(arguments["runs"]["names"]), tuple(arguments["runs"]["counts"]))


def match_keys(unit: KeyRange, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    """Pairs of one range of keys; see the module."""
    runs = runs_of(arguments, work)
    low, high = list(key_ranges(unit.parts))[unit.part]
    keys, numbers = runs.slice_of(unit.row, low, high)
    if unit.row and (work / "repeated.npy").is_file():
        # exact copies were joined already: in a bucket they would only repeat what their first one says
        fresh = ~np.load(work / "repeated.npy", mmap_mode="r")[numbers]
        keys, numbers = keys[fresh], numbers[fresh]
    order = np.lexsort((numbers, keys))
    keys, numbers = keys[order], numbers[order]
    del order
    if unit.row:
        finder = PairFinder(runs, arguments["threshold"], arguments["verify"])
        batches = [finder.pairs(*bucket) for bucket in buckets(keys, numbers)]
        statistics = asdict(finder.counts)
    else:
        batches = [equal_hashes(runs, *bucket) for bucket in buckets(keys, numbers)]
        statistics = {}
    pairs = np.concatenate([np.empty(0, PAIR), *batches])
    save_array(work / f"{arguments['label']}-{unit.number:05d}.pairs.npy", pairs)
    progress(unit.size)
    return {"pairs": len(pairs), **statistics}


def buckets(keys: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sorted keys to batches of whole buckets of two and more: (numbers, bucket of each from 0)."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(starts, append=len(keys))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    ends = np.cumsum(sizes)
    first = 0
    while first < len(starts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _PAIRS_AT_A_TIME, side="right")))
        bucket = np.repeat(np.arange(last - first), sizes[first:last])
        offset = np.arange(len(bucket)) - np.repeat(ends[first:last] - sizes[first:last] - done, sizes[first:last])
        yield numbers[np.repeat(starts[first:last], sizes[first:last]) + offset], bucket
        first = last


def equal_hashes(runs: Runs, numbers: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """Pairs (first, other) of equal 128-bit hashes; a bucket has equal first halves."""
    second = runs.documents(numbers, "hash")[:, 1]
    order = np.lexsort((numbers, second, bucket))
    numbers, second, bucket = numbers[order], second[order], bucket[order]
    begins = np.concatenate([[True], (second[1:] != second[:-1]) | (bucket[1:] != bucket[:-1])])
    first = numbers[begins][np.cumsum(begins) - 1]
    pairs = np.zeros(int((~begins).sum()), PAIR)
    pairs["first"], pairs["other"], pairs["similarity"] = first[~begins], numbers[~begins], 1
    return pairs


@dataclass
class Counts:
    """What happened in the buckets: pairs compared, found alike, and pairs that MAX_LEADERS left out."""

    buckets: int = 0
    largest_bucket: int = 0
    compared: int = 0
    alike: int = 0
    not_compared: int = 0


class PairFinder:
    def __init__(self, runs: Runs, threshold: float, verify: str):
        self._runs, self._threshold, self._verify = runs, threshold, verify
        self.counts = Counts()

    def pairs(self, numbers: np.ndarray, bucket: np.ndarray) -> np.ndarray:
        """Verified pairs that connect the members of each bucket."""
        sizes = np.bincount(bucket)
        self.counts.buckets += len(sizes)
        self.counts.largest_bucket = max(self.counts.largest_bucket, int(sizes.max()))
        found = []
        for _ in range(MAX_LEADERS):
            # the first of every bucket with all its others, all buckets at once
            begins = np.concatenate([[True], bucket[1:] != bucket[:-1]])
            leader = numbers[begins][np.cumsum(begins) - 1]
            pairs, alike = self._compare(leader[~begins], numbers[~begins])
            found.append(pairs)
            num_buckets = bucket[-1] + 1
            num_alike = np.bincount(bucket[~begins][alike], minlength=num_buckets)
            num_others = np.bincount(bucket[~begins], minlength=num_buckets)
            mixed = (num_alike > 0) & (num_alike < num_others)
            for number in np.flatnonzero(mixed):
                inside = bucket == number
                joined = np.ones(int(inside.sum()), bool)
                joined[1:] = alike[bucket[~begins] == number]
                found.append(self._connect(numbers[inside], joined))
            # go on where the leader was like nobody, without it, unless only one is left then
            stay = ~begins & ((num_alike == 0) & (num_others > 1))[bucket]
            numbers, bucket = numbers[stay], np.unique(bucket[stay], return_inverse=True)[1]
            if not len(numbers):
                break
        for size in np.bincount(bucket):
            self.counts.not_compared += int(size) * (int(size) - 1) // 2
        return np.concatenate(found)

    def _connect(self, numbers: np.ndarray, joined: np.ndarray) -> np.ndarray:
        """A bucket of which the first member is connected with those in `joined`, itself among them."""
        component = np.where(joined, 0, np.arange(len(numbers)))
        asked = np.zeros(len(numbers), bool)
        asked[0] = True
        found = [np.empty(0, PAIR)]
        for _ in range(MAX_LEADERS):
            if (component == component[0]).all() or asked.all():
                return np.concatenate(found)
            sizes = np.bincount(component, minlength=len(numbers))
            # those connected with nobody first: each of them may join many
            leader = int(np.lexsort((np.arange(len(numbers)), sizes[component] > 1, asked))[0])
            asked[leader] = True
            others = np.flatnonzero((component != component[leader]) & ~asked)
            if not len(others):
                continue
            pairs, alike = self._compare(np.full(len(others), numbers[leader]), numbers[others])
            found.append(pairs)
            for other in np.unique(component[others[alike]]):
                component[component == other] = component[leader]
        left = ~asked
        sizes = np.bincount(component[left])
        self.counts.not_compared += int(left.sum()) * (int(left.sum()) - 1) // 2 - int((sizes * (sizes - 1) // 2).sum())
        return np.concatenate(found)

    def _compare(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the pairs that are alike, bool for all pairs)."""
        similarity = np.ones(len(first))
        if self._verify != "none":
            measure = self._jaccard if self._verify == "jaccard" else self._estimate
            for start in range(0, len(first), _PAIRS_AT_A_TIME):
                part = slice(start, start + _PAIRS_AT_A_TIME)
                similarity[part] = measure(first[part], second[part])
        alike = similarity >= self._threshold
        pairs = np.zeros(int(alike.sum()), PAIR)
        pairs["first"] = np.minimum(first, second)[alike]
        pairs["other"] = np.maximum(first, second)[alike]
        pairs["similarity"] = similarity[alike]
        self.counts.compared += len(first)
        self.counts.alike += len(pairs)
        return pairs, alike

    def _estimate(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return estimated_similarity(self._runs.documents(first, "signature"), self._runs.documents(second, "signature"))

    def _jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.array([jaccard(self._runs.shingles_of(a), self._runs.shingles_of(b)) for a, b in zip(first, second)])


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sorted arrays of distinct shingles."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)
