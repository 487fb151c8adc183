"""A tokenised corpus on disk: word numbers of every document in order, and the same as bags of words.

Contract: made once in a folder by `write_corpus`, opened by `open_corpus` without reading it: every array is mapped, so
that memory does not grow with the corpus. Documents in which no word of the vocabulary is left are not in it;
`numbers` says which of the documents that were read each one is. Folder:

    tokens.i32, token_offsets.i64         word numbers in order, -1 for a word that was left out
    ids.i32, counts.i32, offsets.i64      bags of words, ids ascending in every document
    numbers.i64                           place of each document among those read
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.topics.inference import Bags

_TYPES = {"i32": np.dtype("<i4"), "i64": np.dtype("<i8")}
_FILES = ("tokens.i32", "token_offsets.i64", "ids.i32", "counts.i32", "offsets.i64", "numbers.i64")
_FLUSH = 1 << 20  # values held before they are written


@dataclass(frozen=True)
class Corpus:
    """An opened corpus and the words its numbers stand for."""

    words: list[str]
    bags: Bags
    tokens: np.ndarray
    token_offsets: np.ndarray
    numbers: np.ndarray

    def sequences(self, step: int = 1) -> Iterator[np.ndarray]:
        """Word numbers of every `step`-th document, in order, -1 where a word was left out."""
        for document in range(0, len(self.bags), step):
            yield np.asarray(self.tokens[self.token_offsets[document] : self.token_offsets[document + 1]])

    def word_counts(self) -> np.ndarray:
        """[words] occurrences of each word."""
        counts = np.zeros(len(self.words), dtype=np.int64)
        for start in range(0, len(self.bags.ids), _FLUSH):
            part = slice(start, start + _FLUSH)
            counts += np.bincount(self.bags.ids[part], self.bags.counts[part], len(self.words)).astype(np.int64)
        return counts


class _Column:
    """One file that grows."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self._values = array("i" if path.suffix == ".i32" else "q")
        assert self._values.itemsize == _TYPES[path.suffix[1:]].itemsize

    def extend(self, values: Iterable[int]) -> None:
        self._values.extend(values)
        if len(self._values) > _FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._values.tofile(self._file)
        del self._values[:]

    def close(self) -> None:
        self._flush()
        self._file.close()


def write_corpus(documents: Iterable[list[int]], folder: Path) -> None:
    """Write documents given as word numbers in order; `folder` appears when it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    columns = {name: _Column(temporary / name) for name in _FILES}
    columns["token_offsets.i64"].extend([0])
    columns["offsets.i64"].extend([0])
    num_tokens = num_words = 0
    for number, tokens in enumerate(documents):
        counts: dict[int, int] = {}
        for token in tokens:
            counts[token] = counts.get(token, 0) + 1
        counts.pop(-1, None)
        if not counts:
            continue
        ids = sorted(counts)
        num_tokens += len(tokens)
        num_words += len(ids)
        columns["tokens.i32"].extend(tokens)
        columns["token_offsets.i64"].extend([num_tokens])
        columns["ids.i32"].extend(ids)
        columns["counts.i32"].extend(counts[word] for word in ids)
        columns["offsets.i64"].extend([num_words])
        columns["numbers.i64"].extend([number])
    for column in columns.values():
        column.close()
    os.rename(temporary, folder)


def open_corpus(folder: Path, words: list[str]) -> Corpus:
    """Map the files of a corpus."""
    found = {}
    for name in _FILES:
        path = folder / name
        kind = _TYPES[path.suffix[1:]]
        found[path.stem] = np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, kind)
    bags = Bags(np.asarray(found["offsets"]), found["ids"], found["counts"])
    return Corpus(words, bags, found["tokens"], found["token_offsets"], found["numbers"])
