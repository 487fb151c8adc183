"""The third pass: pairs to clusters, and which document of each cluster stays.

Contract: `Clusters.join` takes pairs in any order and number; `roots()` then gives for every document the first one, in
input order, that it is connected with. The array of 8 bytes a document is the only thing in the whole of
deduplication that grows with the corpus in memory.
"""

from __future__ import annotations

import numpy as np


class Clusters:
    """Union-find over documents 0 ... n - 1, vectorised: the root of a cluster is its least member."""

    def __init__(self, num_documents: int):
        self._parent = np.arange(num_documents, dtype=np.int64)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Connect first[i] with second[i] (int64 [pairs])."""
        while len(first):
            first, second = self._find(first), self._find(second)
            apart = first != second
            low, high = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
            # where several want to hang a root elsewhere, the least wins; the others are asked again
            np.minimum.at(self._parent, high, low)
            first, second = low, high

    def _find(self, members: np.ndarray) -> np.ndarray:
        roots = self._parent[members]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                self._parent[members] = roots
                return roots
            roots = above

    def roots(self) -> np.ndarray:
        """int64 [documents]; this ends the object: it is its own array."""
        size = 1 << 20
        for start in range(0, len(self._parent), size):  # in order: what lies below is final already
            part = self._parent[start : start + size]
            inside = part
            while True:
                above = self._parent[inside]
                if (above == inside).all():
                    break
                inside = above
            self._parent[start : start + size] = inside
        return self._parent


def removed_documents(roots: np.ndarray) -> np.ndarray:
    """int64 [k]: the documents that another one of their cluster stands for."""
    size = 1 << 20
    found = [np.empty(0, np.int64)]
    for start in range(0, len(roots), size):
        part = roots[start : start + size]
        found.append(np.flatnonzero(part != np.arange(start, start + len(part))) + start)
    return np.concatenate(found)


def keep_longest(roots: np.ndarray, lengths_of, protected: int = 0) -> None:
    """Let the longest of each cluster stay (the first of several) in the place of the first, in `roots` itself.

    Args:
        lengths_of: int64 [k] document numbers -> their lengths.
        protected: documents below this number stay whatever their length (a reference corpus).
    """
    others = removed_documents(roots)
    members = np.union1d(others, roots[others])
    if not len(members):
        return
    root = roots[members]
    lengths = np.where(members < protected, np.iinfo(np.int64).max, lengths_of(members))
    order = np.lexsort((members, -lengths, root))
    begins = np.concatenate([[True], root[order][1:] != root[order][:-1]])
    best = members[order][begins][np.cumsum(begins) - 1]
    roots[members[order]] = best


def largest_clusters(roots: np.ndarray, count: int, reference: int = 0) -> list[tuple[int, int]]:
    """(document that stays, documents removed) of the largest clusters, by size, then in input order.

    Args:
        reference: documents below this number are not removed from anything, and not counted.
    """
    removed = removed_documents(roots)
    heads, sizes = np.unique(roots[removed[removed >= reference]], return_counts=True)
    order = np.lexsort((heads, -sizes))[:count]
    return [(int(heads[place]), int(sizes[place])) for place in order]
