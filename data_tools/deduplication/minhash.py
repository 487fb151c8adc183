"""MinHash signatures and their bands (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3).

Contract: of two sets of shingles with Jaccard similarity s, each of the P entries of their signatures is equal with
probability s, so the share of equal entries estimates s with standard deviation sqrt(s (1 - s) / P) (0.038 for s = 0.8
and P = 112). Signatures are cut into b bands of r rows; two texts are candidates when all rows of one band agree, which
happens with probability 1 - (1 - s^r)^b (`candidate_probability`).

How: permutation i sends a shingle x (32 well-mixed bits) to a_i x + b_i modulo 2^32 with a_i odd, a bijection; entry i
is the least value over the text's shingles. 32-bit products are what the vector unit is fast at, and since x is itself
as good as random, the least element is a uniformly chosen shingle. Two different texts of n shingles agree in an entry
by accident with probability of about n / 2^32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from data_tools.deduplication.shingles import Shingles
from minillm.data.permutation import hash_array, hash_key
from minillm.utils.errors import UserError

DEFAULT_PERMUTATIONS = 112
BLOCK = 1 << 13  # shingles at a time: a block of 32 kB stays in the first-level cache for all permutations
RECALL_AT_THRESHOLD = 0.9
NO_ENTRY = np.uint32(0xFFFFFFFF)  # what a text without shingles has everywhere


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `bands` groups of `rows` entries."""

    bands: int
    rows: int

    @property
    def permutations(self) -> int:
        return self.bands * self.rows


def choose_bands(
    threshold: float, permutations: int | None = None, bands: int | None = None, rows: int | None = None
) -> Bands:
    """The bands a user asked for; where they left it open, the most rows that still find 90% at the threshold.

    More rows make fewer candidates to verify, and miss more. For 112 permutations and a threshold of 0.8 these are 14
    bands of 8 rows (datatrove's default too). Where the rows do not divide the permutations, those left over are not
    used.

    Raises:
        UserError: numbers that do not fit together.
    """
    if bands and rows:
        if permutations and permutations != bands * rows:
            raise UserError(
                f"--permutations {permutations} is not --bands {bands} times --rows {rows}: give two of the three"
            )
        return _checked(Bands(bands, rows))
    count = permutations or DEFAULT_PERMUTATIONS
    given = bands or rows
    if given:
        if count % given:
            name = "bands" if bands else "rows"
            raise UserError(f"--permutations {count} cannot be divided by --{name} {given}: give --bands and --rows")
        return _checked(Bands(given, count // given) if bands else Bands(count // given, given))
    cuts = [Bands(count // rows, rows) for rows in range(count, 0, -1)]
    found = (cut for cut in cuts if candidate_probability(threshold, cut) >= RECALL_AT_THRESHOLD)
    return _checked(next(found, cuts[-1]))


def _checked(bands: Bands) -> Bands:
    if min(bands.bands, bands.rows) < 1 or bands.permutations > 4096 or bands.bands > 512:
        raise UserError(f"{bands.bands} bands of {bands.rows} rows: from 1 to 512 bands and up to 4096 permutations")
    return bands


def candidate_probability(similarity: float, bands: Bands) -> float:
    """1 - (1 - s^r)^b: how likely two texts of this Jaccard similarity share a band."""
    return 1 - (1 - similarity**bands.rows) ** bands.bands


def signatures(shingles: Shingles, permutations: int, seed: int) -> np.ndarray:
    """Signature of every text: uint32 [texts, permutations]; NO_ENTRY everywhere for a text without shingles."""
    result = np.full((permutations, len(shingles.bounds) - 1), NO_ENTRY, np.uint32)
    values = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    factors, offsets = _permutations(permutations, seed)
    filled = np.flatnonzero(np.diff(shingles.bounds))  # reduceat knows no empty segments
    starts = shingles.bounds[:-1][filled]
    products = np.empty(BLOCK, np.uint32)
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK]
        held = products[: len(block)]
        first = np.searchsorted(starts, begin, side="right") - 1  # the text that a block begins in
        last = np.searchsorted(starts, begin + len(block))
        cuts = np.maximum(starts[first:last] - begin, 0)
        texts = filled[first:last]
        lowest = np.empty((permutations, len(texts)), np.uint32)
        for number, (factor, offset) in enumerate(zip(factors, offsets)):
            np.multiply(block, factor, out=held)
            np.add(held, offset, out=held)
            np.minimum.reduceat(held, cuts, out=lowest[number])
        columns = slice(texts[0], texts[-1] + 1) if len(texts) == texts[-1] - texts[0] + 1 else texts
        result[:, columns] = np.minimum(result[:, columns], lowest)
    return np.ascontiguousarray(result.T)


@functools.cache
def _permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    bits = hash_array(np.arange(count, dtype=np.uint64), hash_key(seed, 0x6D696E))
    return (bits >> np.uint64(32)).astype(np.uint32) | np.uint32(1), bits.astype(np.uint32)


def band_keys(signature: np.ndarray, bands: Bands) -> np.ndarray:
    """64 bits for each band: uint32 [texts, permutations] -> uint64 [bands, texts]."""
    rows = np.ascontiguousarray(signature.T).reshape(bands.bands, bands.rows, -1)
    keys = np.zeros((bands.bands, signature.shape[0]), np.uint64)
    for row in range(bands.rows):
        keys = hash_array(keys + rows[:, row], 0x62616E64 + row)
    return keys


def estimated_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of equal entries of signatures that stand in the same row: float64 [pairs]."""
    return np.count_nonzero(first == second, axis=1) / first.shape[1]
