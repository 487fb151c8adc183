"""The first pass: texts to hashes and signatures, one unit of input at a time.

Contract: `fingerprint_unit` reads a unit and writes its runs (data_tools/deduplication/runs.py); the result says how
many documents each has, and how many of them have no word. Memory is that of one run, RUN_DOCUMENTS documents, and of
one batch of texts.

Two texts are exact duplicates when they agree after NFC normalisation and folding of white space (and of case, where
asked for). The hash is BLAKE2b with 128 bits: that two of 10^12 different texts collide has a probability of 10^-15.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data_tools.deduplication.minhash import Bands, signatures
from data_tools.deduplication.runs import RUN_DOCUMENTS, document_type, write_run
from data_tools.deduplication.shingles import shingle_hashes
from data_tools.records import Rejected, TextField, Unit, read_unit, record_text

BATCH_BYTES = 1 << 20  # characters of texts that are signed together


@dataclass(frozen=True)
class Fingerprint:
    """What is taken of a text.

    Attributes:
        bands: None for exact duplicates only.
        ngram: tokens in a shingle.
        seed: of the permutations.
        ignore_case: fold case for the exact hash (signatures always do).
        keep_shingles: also the shingles themselves, for true Jaccard.
    """

    bands: Bands | None
    ngram: int
    seed: int
    ignore_case: bool
    keep_shingles: bool


def exact_hash(text: str, ignore_case: bool = False) -> bytes:
    """128 bits of a text as exact duplicates are compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if ignore_case:
        text = text.casefold()
    return blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=16).digest()


def fingerprint_unit(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    """Runs of a unit; the result has their sizes, and the records that could not be read by reason."""
    bands = Bands(*arguments["bands"]) if arguments["bands"] else None
    how = Fingerprint(bands, arguments["ngram"], arguments["seed"], arguments["ignore_case"], arguments["jaccard"])
    writer = _Writer(work / f"{arguments['label']}-{unit.number:05d}", how)
    for record in read_unit(unit, TextField(**arguments["text"]), progress):
        if not isinstance(record, Rejected):
            writer.add(str(record["id"]), record_text(record))
    writer.flush()
    return {"runs": writer.counts, "without_words": writer.without_words}


class _Writer:
    def __init__(self, path: Path, how: Fingerprint):
        self._path, self._how = path, how
        self._type = document_type(how.bands.permutations if how.bands else 0)
        self._begin_run()
        self.counts: list[int] = []
        self.without_words = 0

    def _begin_run(self) -> None:
        self._ids: list[bytes] = []
        self._rows: list[np.ndarray] = []
        self._shingles: list[np.ndarray] = []
        self._texts: list[str] = []
        self._size = 0

    def add(self, identity: str, text: str) -> None:
        self._ids.append(identity.encode(errors="surrogatepass"))
        self._texts.append(text)
        self._size += len(text)
        if len(self._ids) == RUN_DOCUMENTS:
            self.flush()
        elif self._size >= BATCH_BYTES:
            self._sign()

    def flush(self) -> None:
        """Write what there is as a run."""
        self._sign()
        if self._ids:
            name = f"{self._path.name}-{len(self.counts):03d}"
            kept = self._shingles if self._how.keep_shingles else None
            write_run(self._path.with_name(name), np.concatenate(self._rows), self._ids, self._how.bands, kept)
            self.counts.append(len(self._ids))
        self._begin_run()

    def _sign(self) -> None:
        how, texts = self._how, self._texts
        rows = np.zeros(len(texts), self._type)
        digests = b"".join(exact_hash(text, how.ignore_case) for text in texts)
        rows["hash"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
        rows["length"] = [len(text) for text in texts]
        if how.bands and texts:
            shingles = shingle_hashes(texts, how.ngram)
            rows["signature"] = signatures(shingles, how.bands.permutations, how.seed)
            self.without_words += int((np.diff(shingles.bounds) == 0).sum())
            if how.keep_shingles:
                self._shingles += [np.unique(one) for one in np.split(shingles.hashes, shingles.bounds[1:-1])]
        self._rows.append(rows)
        self._texts, self._size = [], 0
