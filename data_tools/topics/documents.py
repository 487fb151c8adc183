"""The topics of every document of a corpus: the table, examples of each topic, shares over time.

Contract: one pass over the corpus on disk for the shares (kept in a mapped file), one for the table; memory does not
grow with the number of documents.
"""

from __future__ import annotations

import csv
import heapq
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.extras import require
from data_tools.topics.corpus import Corpus
from data_tools.topics.engines import Fitted
from data_tools.topics.model import shares

_CHUNK = 4096
EXAMPLES = 5
PARQUET_FROM = 200_000  # documents from which the table is .parquet, unless told
_MAX_PERIODS = 60


def document_shares(corpus: Corpus, fitted: Fitted, path: Path) -> np.ndarray:
    """[documents, topics] float32 in a mapped file: the share of each topic in each document."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(corpus.bags), len(fitted.topics)))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(out), _CHUNK):
            part = corpus.bags.part(start, min(start + _CHUNK, len(out)))
            out[start : start + len(part)] = shares(part, fitted, pool)
    out.flush()
    return out


def reorder(share: np.ndarray, order: np.ndarray) -> None:
    """Put the columns of a mapped table into another order, in place, a chunk at a time."""
    for start in range(0, len(share), _CHUNK):
        share[start : start + _CHUNK] = share[start : start + _CHUNK][:, order]


def lengths_of(corpus: Corpus) -> np.ndarray:
    """[documents] words of the vocabulary in each document."""
    lengths = np.empty(len(corpus.bags), dtype=np.int64)
    for start in range(0, len(lengths), _CHUNK):
        part = corpus.bags.part(start, min(start + _CHUNK, len(lengths)))
        lengths[start : start + len(part)] = np.add.reduceat(part.counts, part.offsets[:-1])
    return lengths


class Found:
    """What a pass over the documents' shares gathers.

    Attributes:
        documents: [topics] documents whose first topic it is.
        examples: per topic the documents with the largest share of it, the largest first.
        by_date: per date the words of each topic in the documents of that date.
    """

    def __init__(self, num_topics: int) -> None:
        self.documents = np.zeros(num_topics, dtype=np.int64)
        self.by_date: dict[str, np.ndarray] = {}
        self.num_dated = 0
        self._best: list[list[tuple]] = [[] for _ in range(num_topics)]

    @property
    def examples(self) -> list[list[dict]]:
        ordered = (sorted(best, key=lambda entry: entry[:2], reverse=True) for best in self._best)
        return [[about for _, _, about in best] for best in ordered]

    def add(self, number: int, about: dict, row: np.ndarray, topic: int, words: int) -> None:
        """One more document."""
        self.documents[topic] += 1
        share = float(row[topic])
        # short documents reach a high share with three words: the length counts too
        entry = (share * (1 - 0.5 ** (words / 20)), -number)
        best = self._best[topic]
        if len(best) < EXAMPLES or entry > best[0][:2]:
            example = {"id": about["id"], "share": round(share, 4), "beginning": about["beginning"]}
            (heapq.heappush if len(best) < EXAMPLES else heapq.heappushpop)(best, (*entry, example))
        if date := about.get("date"):
            self.num_dated += 1
            self.by_date.setdefault(date, np.zeros(len(row)))
            self.by_date[date] += row * words


def write_table(out: Path, abouts: Iterable[dict], corpus: Corpus, share: np.ndarray, kind: str) -> tuple[Path, Found]:
    """document_topics.csv (or .parquet): id, topic, probability and the share of every topic, a line a document.

    Args:
        abouts: what is known of every document read; those of the corpus are picked by their numbers.
        kind: csv, parquet or auto.
    """
    lengths = lengths_of(corpus)
    found = Found(share.shape[1])
    if kind == "auto":
        kind = "parquet" if len(share) > PARQUET_FROM else "csv"
    path = out / f"document_topics.{kind}"
    temporary = path.with_name(f".{path.name}.tmp")
    rows = _rows(abouts, corpus, share, lengths, found)
    (_write_csv if kind == "csv" else _write_parquet)(temporary, rows, share.shape[1])
    os.replace(temporary, path)
    path.with_name(f"document_topics.{'parquet' if kind == 'csv' else 'csv'}").unlink(missing_ok=True)
    return path, found


def _rows(
    abouts: Iterable[dict], corpus: Corpus, share: np.ndarray, lengths: np.ndarray, found: Found
) -> Iterator[tuple[str, int, float, np.ndarray]]:
    wanted = 0
    for place, about in enumerate(abouts):
        if wanted == len(share):
            break
        if corpus.numbers[wanted] != place:
            continue
        row = np.asarray(share[wanted])
        topic = int(row.argmax())
        found.add(wanted, about, row, topic, int(lengths[wanted]))
        wanted += 1
        yield about["id"], topic, float(row[topic]), row


def _write_csv(path: Path, rows: Iterable[tuple], num_topics: int) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "topic", "probability", *(f"topic_{topic}" for topic in range(num_topics))])
        for identity, topic, probability, row in rows:
            table.writerow([identity, topic, f"{probability:.4f}", *(f"{value:.4f}" for value in row.tolist())])


def _write_parquet(path: Path, rows: Iterable[tuple], num_topics: int) -> None:
    arrow = require("pyarrow")
    parquet = require("pyarrow.parquet", "pyarrow")
    names = [f"topic_{topic}" for topic in range(num_topics)]
    schema = arrow.schema(
        [("id", arrow.string()), ("topic", arrow.int32()), ("probability", arrow.float32()),
         *((name, arrow.float32()) for name in names)]
    )  # fmt: skip
    with parquet.ParquetWriter(path, schema) as writer:

        def write(held: list[tuple]) -> None:
            values = np.stack([row for *_, row in held])
            columns = [[entry[field] for entry in held] for field in range(3)]
            writer.write_table(arrow.table([*columns, *values.T], schema=schema))

        held: list[tuple] = []
        for row in rows:
            held.append(row)
            if len(held) == _CHUNK * 4:
                write(held)
                held = []
        if held:
            write(held)


def over_time(by_date: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """(periods, [periods, topics] shares of the words): days, months, years or decades, as many as can be looked at."""
    for length in (10, 7, 4):
        grouped = _grouped(by_date, length)
        if length == 4 or len(grouped) <= _MAX_PERIODS and min(map(len, by_date)) >= length:
            break
    if len(grouped) > _MAX_PERIODS:
        grouped = _grouped({f"{date[:3]}0": words for date, words in grouped.items()}, 4)
    periods = sorted(grouped)
    words = np.stack([grouped[period] for period in periods])
    return periods, words / np.maximum(words.sum(axis=1, keepdims=True), 1e-9)


def _grouped(by_date: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    grouped: dict[str, np.ndarray] = {}
    for date in sorted(by_date):
        grouped[date[:length]] = grouped.get(date[:length], 0) + by_date[date]
    return grouped
