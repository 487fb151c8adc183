"""The last pass: the documents that stay go to the output, those that go are listed with what stands for them.

Contract: `Keeper` sees the documents of one unit in the order of the first pass and knows each by its global number;
`roots.npy` says which document stands for it. It writes WORK/duplicates-00007.jsonl, a line for every document removed:
    {"id", "kept": id of the document that stays, "kind": exact or near, "similarity"}   (and "reference": true)
The similarity is that of the two (estimated from the signatures, true Jaccard with --verify jaccard); in a cluster that
hangs together by others between them it can lie below the threshold. WORK/shown-00007.json has the documents that the
summary shows, by number.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from data_tools.deduplication.buckets import jaccard, runs_of
from data_tools.deduplication.minhash import estimated_similarity
from data_tools.records import Record, Rejected, Unit, record_text
from data_tools.workshop import Stage
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_json

SHOWN_CHARACTERS = 200
PLAN = "keeping.json"
_BATCH = 1 << 13


def write_plan(work: Path, *, runs: dict, starts: list[int], reference: int, verify: str, wanted: list[int]) -> None:
    """Leave what `Keeper` needs in the work folder.

    Args:
        starts: number of the first document of every unit, and of all at the end.
        reference: documents below this number are of another corpus, which is not written.
        verify: how similarities are measured; "exact" where there are no signatures.
        wanted: documents that the summary shows.
    """
    write_json(
        work / PLAN, {"runs": runs, "starts": starts, "reference": reference, "verify": verify, "wanted": wanted}
    )


def duplicates_file(work: Path, unit: int) -> Path:
    """The list of the documents that a unit lost."""
    return work / f"duplicates-{unit:05d}.jsonl"


def shown_file(work: Path, unit: int) -> Path:
    """The documents of a unit that the summary shows."""
    return work / f"shown-{unit:05d}.json"


class Keeper(Stage):
    """Keep or remove the documents of a unit. What it needs of the passes before is in WORK/keeping.json."""

    name = "dedup"

    def begin_unit(self, unit: Unit, work: Path) -> None:
        plan = read_json(work / PLAN)
        self._verify, self._reference = plan["verify"], plan["reference"]
        self._next, self._stop = plan["starts"][unit.number : unit.number + 2]
        self._runs = runs_of(plan, work)
        self._roots = np.load(work / "roots.npy", mmap_mode="r")
        self._wanted = set(plan["wanted"])
        self._shown: dict[str, dict] = {}
        self._histogram: dict[str, int] = {}
        self._from = self._next
        self._exact, self._similarity = np.empty(0, bool), np.empty(0)
        self._list, self._shown_file = duplicates_file(work, unit.number), shown_file(work, unit.number)
        self._unfinished = self._list.with_name(f".{self._list.name}.{os.getpid()}.tmp")
        self._file = open(self._unfinished, "w", encoding="utf-8")  # closed by finish_unit

    def process(self, record: Record) -> Record | Rejected:
        number = self._next
        self._next += 1
        if number >= self._stop:
            raise self._changed()
        if number >= self._from + len(self._exact):
            self._compare_from(number)
        root = int(self._roots[number])
        if root == number:
            self._show(number, {"id": record["id"]}, record)
            return record
        exact, similarity = bool(self._exact[number - self._from]), float(self._similarity[number - self._from])
        kind, kept = "exact" if exact else "near", self._runs.id_of(root)
        line = {"id": record["id"], "kept": kept, "kind": kind, "similarity": round(similarity, 4)}
        if root < self._reference:
            line["reference"] = True
        self._show(number, line, record)
        self._file.write(json.dumps(line) + "\n")
        if not exact:
            low = min(int(similarity * 20), 19) * 5
            place = f"{low / 100:.2f}-{low / 100 + 0.05:.2f}"
            self._histogram[place] = self._histogram.get(place, 0) + 1
        reason = f"{kind}_duplicate" + ("_of_reference" if root < self._reference else "")
        return Rejected(str(record["id"]), reason, f"{'equal to' if exact else f'{similarity:.2f} like'} {kept}")

    def _show(self, number: int, line: dict, record: Record) -> None:
        if number in self._wanted:
            self._shown[str(number)] = {**line, "text": record_text(record)[:SHOWN_CHARACTERS]}

    def finish_unit(self) -> dict[str, object]:
        self._file.close()
        if self._next != self._stop:
            raise self._changed()
        os.replace(self._unfinished, self._list)
        write_json(self._shown_file, self._shown)
        return {"similarity": self._histogram}

    def _compare_from(self, number: int) -> None:
        """Similarity of the next documents with those that stand for them."""
        numbers = np.arange(number, min(number + _BATCH, self._stop))
        self._from, kept = number, np.array(self._roots[numbers])
        gone = np.flatnonzero(kept != numbers)
        numbers, kept = numbers[gone], kept[gone]
        equal = (self._runs.documents(numbers, "hash") == self._runs.documents(kept, "hash")).reshape(-1, 2).all(axis=1)
        similarity = np.ones(len(numbers))
        if self._verify == "jaccard":
            for place in np.flatnonzero(~equal):
                similarity[place] = jaccard(self._runs.shingles_of(numbers[place]), self._runs.shingles_of(kept[place]))
        elif self._verify != "exact" and not equal.all():
            first = self._runs.documents(numbers[~equal], "signature")
            similarity[~equal] = estimated_similarity(first, self._runs.documents(kept[~equal], "signature"))
        size = min(_BATCH, self._stop - number)
        self._exact, self._similarity = np.zeros(size, bool), np.ones(size)
        self._exact[gone], self._similarity[gone] = equal, similarity

    def _changed(self) -> UserError:
        return UserError("the input changed between two passes: remove the output folder and begin again")
