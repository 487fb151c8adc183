"""How much of a text is repeated n-grams: the two measures of Gopher (Rae et al. 2021, appendix A.1.1).

Contract: `NGrams(units)` takes a text's words, or a string whose characters are the units (scripts without spaces).

    top(n)         share of characters in the most frequent n-gram, all its occurrences; 0 where none occurs twice;
                   of equally frequent ones the longest; at most 1 (it may overlap itself)
    duplicate(n)   share of characters covered by n-grams that occurred before, no character counted twice

Shares are of the characters of all units, without white space. An n-gram that occurs twice begins with a shorter one
that does: each n looks only at the places where the n before it found a repetition, so n is asked in rising order.
The first, long lists of places are sorted by a 64-bit code of their n-gram; short ones are counted as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_UNITS = 1 << 18  # longer texts are measured on their beginning, so that memory does not grow with them
_BASE = 0x9E3779B97F4A7C15  # odd: every unit reaches every bit above its own
_FEW = 40  # places: below it sorting in numpy costs more than counting in Python


class NGrams:
    """The n-grams of one text."""

    def __init__(self, units: Sequence[str]):
        self._units = units[:MAX_UNITS]
        self._total = sum(map(len, self._units)) if not isinstance(units, str) else len(self._units)
        self._last_n = 0
        self._places: list[int] | None = None  # where an n-gram of the last n stands that occurs twice; None: all
        self._codes: np.ndarray | None = None  # of the units

    def top(self, n: int) -> float:
        """Share of characters in the most frequent n-gram."""
        grams = self._repeated(n)
        if not grams:
            return 0.0
        counts = Counter(grams)
        most = max(counts.values())
        places = {gram: place for gram, place in zip(grams, self._places or []) if counts[gram] == most}
        longest = max(self._length(place, place + n) for place in places.values())
        return min(1.0, most * longest / self._total)

    def duplicate(self, n: int) -> float:
        """Share of characters covered by n-grams that occurred before."""
        grams = self._repeated(n)
        if not grams:
            return 0.0
        seen: set = set()
        covered, end = 0, 0
        for place, gram in zip(self._places or [], grams):
            if gram in seen:
                covered += self._length(max(place, end), place + n)
                end = place + n
            seen.add(gram)
        return covered / self._total

    def _length(self, start: int, stop: int) -> int:
        return stop - start if isinstance(self._units, str) else sum(map(len, self._units[start:stop]))

    def _repeated(self, n: int) -> list:
        """Set `_places` to where n-grams stand that occur at least twice, in rising order; a key of each."""
        if n <= self._last_n:
            raise ValueError(f"{n}-grams after {self._last_n}-grams: ask in rising order")
        self._last_n = n
        last = len(self._units) - n
        places = range(max(0, last + 1)) if self._places is None else [p for p in self._places if p <= last]
        count = self._count if len(places) <= _FEW else self._sort
        self._places, keys = count(places, n)
        return keys

    def _count(self, places: Sequence[int], n: int) -> tuple[list[int], list]:
        """The places whose n-gram stands at another of the places too, and these n-grams."""
        if len(places) < 2:
            return [], []
        units = self._units
        grams = [units[p : p + n] if isinstance(units, str) else tuple(units[p : p + n]) for p in places]
        counts = Counter(grams)
        if len(counts) == len(grams):
            return [], []
        kept = [(place, gram) for place, gram in zip(places, grams) if counts[gram] > 1]
        return [place for place, _ in kept], [gram for _, gram in kept]

    def _sort(self, places: Sequence[int], n: int) -> tuple[list[int], list[int]]:
        """As _count, with 64-bit codes in the place of n-grams."""
        import numpy as np

        of_unit, base = self._codes_of_units(), np.uint64(_BASE)
        everywhere = isinstance(places, range)  # then slices do, which cost less than picking
        at = np.arange(len(places)) if everywhere else np.array(places)
        codes = of_unit[at]
        for offset in range(1, n):
            codes = codes * base + (of_unit[offset : offset + len(at)] if everywhere else of_unit[at + offset])
        order = codes.argsort()
        in_order = codes[order]
        same = in_order[1:] == in_order[:-1]
        more = np.zeros(len(at), bool)
        more[order[1:][same]] = True
        more[order[:-1][same]] = True
        return at[more].tolist(), codes[more].tolist()

    def _codes_of_units(self) -> np.ndarray:
        import numpy as np

        if self._codes is None:
            if isinstance(self._units, str):
                characters = np.frombuffer(self._units.encode("utf-32-le"), np.uint32)
                self._codes = characters.astype(np.uint64) * np.uint64(_BASE)
                self._codes ^= self._codes >> np.uint64(29)
            else:
                self._codes = np.fromiter(map(hash, self._units), np.int64, len(self._units)).view(np.uint64)
        return self._codes
