"""Which documents of a corpus hold n-grams of evaluation items.

Contract: `find_hits` looks a unit of the corpus up in the index and leaves WORK/hits-00007.npy, (document of the unit,
n-gram) once each, and WORK/hits-00007.jsonl, the documents that have any. `judge` then leaves out n-grams that more
than `max_documents` documents of the whole corpus hold (Brown et al. 2020: legal and cultural phrases, not the item)
and decides by what remains. `Remover` writes the documents that are clean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.deduplication.arrays import save_array
from data_tools.deduplication.evaluation import Index, Lookup
from data_tools.deduplication.shingles import shingles_of, tokenize
from data_tools.records import Record, Rejected, TextField, Unit, read_unit, record_text
from data_tools.workshop import Stage
from minillm.utils.files import write_atomic

BATCH_CHARACTERS = 1 << 20
SHOWN_CHARACTERS = 200
LISTED_ITEMS = 20  # of a document, in contaminated.jsonl
HIT = np.dtype([("document", "<u4"), ("gram", "<u4")])


def find_hits(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    """Hits of a unit of the corpus; see the module."""
    lookup = Lookup(np.load(work / "grams.npy", mmap_mode="r"))
    hits: list[np.ndarray] = [np.empty(0, HIT)]
    lines: list[str] = []
    rejected: dict[str, int] = {}
    total = first = size = 0
    held: list[tuple[str, str]] = []

    def look_up() -> None:
        found = hits_of([text for _, text in held], lookup, arguments["lengths"])
        for local in np.unique(found["document"]).tolist():
            identity, text = held[local]
            line = {"document": first + local, "id": identity, "text": text[:SHOWN_CHARACTERS]}
            lines.append(json.dumps(line) + "\n")
        found["document"] += first
        hits.append(found)

    for record in read_unit(unit, TextField(**arguments["text"]), progress):
        if isinstance(record, Rejected):
            rejected[record.reason] = rejected.get(record.reason, 0) + 1
            continue
        held.append((str(record["id"]), record_text(record)))
        total += 1
        size += len(held[-1][1])
        if size >= BATCH_CHARACTERS:
            look_up()
            first, size, held = total, 0, []
    look_up()
    save_array(work / f"hits-{unit.number:05d}.npy", np.concatenate(hits))
    write_atomic(work / f"hits-{unit.number:05d}.jsonl", "".join(lines))
    return {"records": total, "rejected": rejected, "bytes_in": unit.size}


def hits_of(texts: list[str], lookup: Lookup, lengths: list[int]) -> np.ndarray:
    """(text, n-gram) once each, sorted, for n-grams of all lengths."""
    tokens = tokenize(texts)
    found = [np.empty((0, 2), np.int64)]
    for n in lengths:
        shingles = shingles_of(tokens, n, short=False)
        places, grams = lookup.find(shingles.hashes)
        documents = np.searchsorted(shingles.bounds, places, side="right") - 1
        found.append(np.stack([documents, grams], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    hits = np.zeros(len(pairs), HIT)
    hits["document"], hits["gram"] = pairs[:, 0], pairs[:, 1]
    return hits


@dataclass
class Verdict:
    """What was found in the whole corpus.

    Attributes:
        counts: int64 [n-grams], documents that hold each.
        common: bool [n-grams], left out because too many do.
        covered: bool [pairs of the index], the n-grams of items that a contaminated document holds.
        documents: int64 [items], contaminated documents that hold some of the item.
        contaminated: documents in all.
    """

    counts: np.ndarray
    common: np.ndarray
    covered: np.ndarray
    documents: np.ndarray
    contaminated: int = 0


def count_documents(index: Index, work: Path, num_units: int) -> np.ndarray:
    """int64 [n-grams]: documents of the corpus that hold each."""
    counts = np.zeros(len(index.grams), np.int64)
    for number in range(num_units):
        counts += np.bincount(np.load(work / f"hits-{number:05d}.npy")["gram"], minlength=len(counts))
    return counts


def judge(index: Index, work: Path, num_units: int, max_documents: int, min_share: float) -> Verdict:
    """Decide about every document with hits; WORK/judged-00007.jsonl has a line for each contaminated one.

    Args:
        max_documents: n-grams in more documents than this are left out; 0 leaves none out.
        min_share: least share of one item's n-grams that a document must hold.
    """
    counts = count_documents(index, work, num_units)
    common = counts > max_documents if max_documents else np.zeros(len(counts), bool)
    verdict = Verdict(counts, common, np.zeros(len(index.pair_gram), bool), np.zeros(len(index.items), np.int64))
    starts = np.searchsorted(index.pair_gram, np.arange(len(index.grams) + 1))
    sizes = np.bincount(index.pair_item, minlength=len(index.items))
    for number in range(num_units):
        lines = []
        for document, grams in _by_document(work, number, common):
            pairs = np.concatenate([np.arange(starts[gram], starts[gram + 1]) for gram in grams])
            items, held = np.unique(index.pair_item[pairs], return_counts=True)
            share = held / sizes[items]
            order = np.lexsort((items, -share))
            if share[order[0]] < min_share:
                continue
            verdict.contaminated += 1
            verdict.documents[items] += 1
            verdict.covered[pairs] = True
            listed = [_match(index, int(items[place]), int(held[place]), float(share[place]), grams, pairs)
                      for place in order[:LISTED_ITEMS]]  # fmt: skip
            lines.append({**document, "num_items": len(items), "items": listed})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(work / f"judged-{number:05d}.jsonl", text.encode(errors="replace"))
    return verdict


def _by_document(work: Path, number: int, common: np.ndarray) -> Iterator[tuple[dict, np.ndarray]]:
    hits = np.load(work / f"hits-{number:05d}.npy")
    hits = hits[~common[hits["gram"]]]
    edges = np.flatnonzero(np.diff(hits["document"].astype(np.int64), prepend=-1, append=-1))
    with open(work / f"hits-{number:05d}.jsonl", encoding="utf-8") as file:
        documents = map(json.loads, file)
        for start, stop in zip(edges[:-1], edges[1:]):
            wanted = int(hits["document"][start])
            document = next(one for one in documents if one["document"] == wanted)
            yield document, hits["gram"][start:stop].astype(np.int64)


def _match(index: Index, item: int, held: int, share: float, grams: np.ndarray, pairs: np.ndarray) -> dict:
    name, identity = index.item_name(item)
    first = index.pair_gram[pairs[index.pair_item[pairs] == item][0]]
    return {
        "set": name,
        "item": identity,
        "ngrams": held,
        "share": round(share, 4),
        "ngram": index.gram_text(int(first)),
    }


class Remover(Stage):
    """Leave out the contaminated documents of a unit, which `judge` has listed."""

    name = "contamination"

    def begin_unit(self, unit: Unit, work: Path) -> None:
        self._number = 0
        self._contaminated: dict[int, str] = {}
        with open(work / f"judged-{unit.number:05d}.jsonl", encoding="utf-8") as file:
            for line in map(json.loads, file):
                best = line["items"][0]
                self._contaminated[line["document"]] = f"{best['share']:.0%} of {best['set']} {best['item']}"

    def process(self, record: Record) -> Record | Rejected:
        number = self._number
        self._number += 1
        if number in self._contaminated:
            return Rejected(str(record["id"]), "contaminated", f"holds {self._contaminated[number]}")
        return record


def item_lines(index: Index, verdict: Verdict) -> Iterator[dict]:
    """A line for each evaluation item of which something was found, by the share found."""
    sizes = np.bincount(index.pair_item, minlength=len(index.items))
    found = np.bincount(index.pair_item[verdict.covered], minlength=len(index.items))
    share = found / np.maximum(sizes, 1)
    for item in np.lexsort((np.arange(len(share)), -share))[: int((found > 0).sum())].tolist():
        name, identity = index.item_name(item)
        yield {
            "set": name,
            "item": identity,
            "ngrams": int(sizes[item]),
            "found": int(found[item]),
            "share": round(float(share[item]), 4),
            "documents": int(verdict.documents[item]),
        }


def set_summaries(index: Index, verdict: Verdict) -> list[dict]:
    """Counts for each evaluation set: items, those too short, those found, to one half and to four fifths."""
    sizes = np.bincount(index.pair_item, minlength=len(index.items))
    found = np.bincount(index.pair_item[verdict.covered], minlength=len(index.items))
    seen_common = np.bincount(index.pair_item[verdict.common[index.pair_gram]], minlength=len(index.items)) > 0
    share = found / np.maximum(sizes, 1)
    owner = np.array([number for number, _ in index.items])
    return [
        {
            "set": one.name,
            "n": one.ngrams,
            "items": len(one.ids),
            "too_short": int(((sizes == 0) & mine).sum()),
            "found": int(((found > 0) & mine).sum()),
            "found_half": int(((share >= 0.5) & mine).sum()),
            "found_four_fifths": int(((share >= 0.8) & mine).sum()),
            "only_common": int(((found == 0) & seen_common & mine).sum()),
            "not_read": one.rejected,
        }
        for number, one in enumerate(index.sets)
        for mine in [owner == number]
    ]


def common_examples(index: Index, verdict: Verdict, count: int = 10) -> list[dict]:
    """The n-grams left out because most documents hold them."""
    order = np.lexsort((np.arange(len(verdict.counts)), -verdict.counts))[:count]
    return [
        {"ngram": index.gram_text(int(gram)), "documents": int(verdict.counts[gram])}
        for gram in order
        if verdict.common[gram]
    ]
