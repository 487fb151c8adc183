"""The passes of a deduplication in their order, up to which document stands for which; what the summary says of it.

Contract: `Passes.decide` leaves in the work folder what `Keeper` (keeping.py) writes the output by. Each pass finds
what the passes before left there, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.deduplication.arrays import save_array
from data_tools.deduplication.buckets import key_work, match_keys, runs_of
from data_tools.deduplication.clusters import Clusters, keep_longest, largest_clusters, removed_documents
from data_tools.deduplication.fingerprints import fingerprint_unit
from data_tools.deduplication.keeping import duplicates_file, shown_file, write_plan
from data_tools.parallel import run_units
from data_tools.records import Unit
from minillm.utils.files import read_json

SHOWN_CLUSTERS = 10
SMALL = 100_000  # so many documents are matched sooner than processes start
_SHOWN_MEMBERS = 3
_PAIRS_AT_A_TIME = 1 << 20


class Passes:
    """One deduplication.

    Args:
        what: the fields of `data_tools.dedup.Duplicates`, the bands chosen.
        text: the fields of a TextField.
        work: the open work folder.
    """

    def __init__(self, what: dict, text: dict, work: Path, workers: int | None):
        self._what, self._text, self._work, self._workers = what, text, work, workers
        self._statistics: dict = {}
        self._runs: dict = {}
        self._reference = 0
        self._clusters: list[tuple[int, int, list[int]]] = []

    def decide(self, units: list[Unit], references: list[Unit]) -> None:
        """All passes but the last.

        Args:
            references: of another corpus, which wins over `units`.
        """
        first, second = self._fingerprint(references, "reference"), self._fingerprint(units, "run")
        counted = [(label, found) for label, found in (("reference", first), ("run", second))]
        self._runs = {
            "names": [
                f"{label}-{unit:05d}-{number:03d}"
                for label, found in counted
                for unit, result in enumerate(found)
                for number in range(len(result["runs"]))
            ],
            "counts": [count for _, found in counted for result in found for count in result["runs"]],
        }
        self._reference = sum(sum(result["runs"]) for result in first)
        self._statistics["without_words"] = sum(result["without_words"] for result in second)
        self._match()
        self._join()
        write_plan(
            self._work,
            runs=self._runs,
            starts=np.cumsum([self._reference, *(sum(result["runs"]) for result in second)]).tolist(),
            reference=self._reference,
            verify=self._what["verify"] if self._what["method"] != "exact" else "exact",
            wanted=[number for head, _, others in self._clusters for number in (head, *others)],
        )

    def summary(self, summary: dict, units: list[Unit], out: Path) -> dict:
        """Write OUT/duplicates.jsonl; what is to be added to the summary."""
        temporary = out / ".duplicates.jsonl.tmp"
        with open(temporary, "wb") as whole:
            for unit in units:
                with open(duplicates_file(self._work, unit.number), "rb") as part:
                    shutil.copyfileobj(part, whole)
        temporary.replace(out / "duplicates.jsonl")
        return {
            "statistics": {**summary["statistics"], **self._statistics},
            "reference_records": self._reference,
            "largest_clusters": self._shown(units),
        }

    def _units(self, function: Callable, units: list, arguments: dict, label: str, small: bool = False) -> list[dict]:
        workers = 1 if small else self._workers
        return run_units(function, units, arguments, self._work, workers=workers, label=label)

    def _fingerprint(self, units: list[Unit], label: str) -> list[dict]:
        what = self._what
        minhash = what["method"] != "exact"
        arguments = {
            "label": label,
            "bands": (what["bands"], what["rows"]) if minhash else None,
            "ngram": what["ngram"],
            "seed": what["seed"],
            "ignore_case": what["ignore_case"],
            "jaccard": minhash and what["verify"] == "jaccard",
            "text": self._text,
        }
        return self._units(fingerprint_unit, units, arguments, label) if units else []

    def _match(self) -> None:
        """Pairs by hash, then by bands, as files."""
        what, num_documents = self._what, sum(self._runs["counts"])
        arguments = {"runs": self._runs, "threshold": what["threshold"], "verify": what["verify"]}
        small = num_documents < SMALL
        if what["method"] != "minhash":
            work = key_work(num_documents, range(1))
            self._units(match_keys, work, {**arguments, "label": "exact"}, "exact", small)
            if what["method"] == "both" and not (self._work / "repeated.npy").is_file():
                repeated = np.zeros(num_documents, bool)
                repeated[removed_documents(self._joined("exact"))] = True
                save_array(self._work / "repeated.npy", repeated)
        if what["method"] != "exact":
            work = key_work(num_documents, range(1, what["bands"] + 1))
            results = self._units(match_keys, work, {**arguments, "label": "near"}, "near", small)
            for name in ("buckets", "compared", "alike", "not_compared"):
                self._statistics[name] = sum(result[name] for result in results)
            self._statistics["largest_bucket"] = max(result["largest_bucket"] for result in results)

    def _joined(self, *labels: str) -> np.ndarray:
        clusters = Clusters(sum(self._runs["counts"]))
        for label in labels:
            for path in sorted(self._work.glob(f"{label}-*.pairs.npy")):
                pairs = np.load(path, mmap_mode="r", allow_pickle=False)
                for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
                    part = pairs[start : start + _PAIRS_AT_A_TIME]
                    clusters.join(part["first"].copy(), part["other"].copy())
        return clusters.roots()

    def _join(self) -> None:
        """Write roots.npy, and pick the largest clusters: (document that stays, documents removed, some of them)."""
        path = self._work / "roots.npy"
        if path.is_file():
            roots = np.load(path)
        else:
            roots = self._joined("exact", "near")
            if self._what["keep"] == "longest":
                stored = runs_of({"runs": self._runs}, self._work)
                keep_longest(roots, lambda numbers: stored.documents(numbers, "length"), self._reference)
            save_array(path, roots)
        removed = removed_documents(roots)
        removed = removed[removed >= self._reference]
        heads = roots[removed]
        self._statistics["clusters"] = len(np.unique(heads))
        self._clusters = [
            (head, size, removed[heads == head][:_SHOWN_MEMBERS].tolist())
            for head, size in largest_clusters(roots, SHOWN_CLUSTERS, self._reference)
        ]

    def _shown(self, units: list[Unit]) -> list[dict]:
        stored = runs_of({"runs": self._runs}, self._work)
        shown: dict[str, dict] = {}
        for unit in units:
            shown |= read_json(shown_file(self._work, unit.number))
        return [
            {
                "removed_documents": size,
                "kept": shown.get(str(head)) or {"id": stored.id_of(head), "reference": True},
                "removed": [shown[str(number)] for number in others],
            }
            for head, size, others in self._clusters
        ]
