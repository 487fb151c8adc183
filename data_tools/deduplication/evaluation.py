"""The n-grams of evaluation sets, as an index that a corpus is looked up in.

Contract: an evaluation set is a file; an item is a record of it, with every string in it (or in the chosen fields) as a
text. The length of the n-grams of a set follows Brown et al. 2020 (GPT-3, appendix C): the 5th percentile of the length
of its items in words, no less than 8 and no more than 13. Texts that are mostly Chinese (or in another script without
spaces) have n-grams of characters, from 13 to 20: 8 to 13 English words are about as long. A text of fewer than n
tokens has no n-grams; an item without any is "too short" and is never found.

The index holds 8 bytes for each n-gram and the items it is in; its size follows the evaluation sets, not the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.deduplication.shingles import Tokens, shingles_of, tokenize, words_of
from data_tools.records import Rejected, Unit, find_units, read_unit
from minillm.utils.errors import UserError
from minillm.utils.logging import warn

WORDS, CHARACTERS = "words", "characters"
_SHORT_ITEMS = 5  # percentile of the lengths of items that gives n


@dataclass
class EvaluationSet:
    """One file of items.

    Attributes:
        ids: of the items.
        texts: (item, text), with at least one token.
        rejected: records that could not be read.
        ngrams: n for "words" and "characters", once it is known.
    """

    name: str
    ids: list[str] = field(default_factory=list)
    texts: list[tuple[int, str]] = field(default_factory=list)
    rejected: int = 0
    ngrams: dict[str, int] = field(default_factory=dict)


def read_sets(paths: Sequence[Path | str], fields: Sequence[str] = ()) -> list[EvaluationSet]:
    """The evaluation sets in files and folders.

    Args:
        fields: whose strings are texts; all (without the id) when empty.

    Raises:
        UserError: nothing to read, or a field that a set does not have.
    """
    sets: dict[str, EvaluationSet] = {}
    for unit in find_units(paths, 1 << 62):
        for span in unit.spans:
            found = sets.setdefault(span.path, EvaluationSet(span.name))
            missing = set(fields)
            for record in read_unit(Unit(0, (span,)), None):
                if isinstance(record, Rejected):
                    found.rejected += 1
                    continue
                missing -= record.keys()
                for name, value in record.items():
                    if name in fields or not fields and name != "id":
                        found.texts += [(len(found.ids), text) for text in _strings(value)]
                found.ids.append(str(record["id"]))
            if missing and found.ids:
                raise UserError(f"no item of {span.path} has the field {sorted(missing)[0]!r}: see --eval-fields")
            if found.rejected:
                warn(f"{span.path}: {found.rejected} records cannot be read and are not looked for")
    if not any(one.ids for one in sets.values()):
        raise UserError(f"{', '.join(map(str, paths))}: there is no evaluation item in it")
    return list(sets.values())


def _strings(value: object) -> Iterator[str]:
    """Texts in a field: a string, a list of strings as one, the strings in what is nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(part, str) for part in value):
        yield "\n".join(value)
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


@dataclass(frozen=True)
class Index:
    """N-grams of all sets.

    Attributes:
        grams: uint64 [grams], sorted and distinct.
        lengths: the values of n that occur.
        pair_gram, pair_item: int64 [pairs]; which n-gram is in which item (counted over all sets), sorted by n-gram.
        items: (set, number in the set) of every item.
        sets: with their `ngrams`.
    """

    grams: np.ndarray
    lengths: tuple[int, ...]
    pair_gram: np.ndarray
    pair_item: np.ndarray
    items: list[tuple[int, int]]
    sets: list[EvaluationSet]
    _first_text: np.ndarray
    _first_place: np.ndarray
    _length: np.ndarray
    _texts: list[str]

    def gram_text(self, gram: int) -> str:
        """The n-gram as it stands in the first item that has it."""
        place, length = int(self._first_place[gram]), int(self._length[gram])
        words = words_of(self._texts[self._first_text[gram]])[place : place + length]
        spaced = sum(len(word) for word in words) > 2 * len(words)
        return (" " if spaced else "").join(words)

    def item_name(self, item: int) -> tuple[str, str]:
        """(set, id) of an item."""
        number, place = self.items[item]
        return self.sets[number].name, self.sets[number].ids[place]


def build_index(
    sets: list[EvaluationSet], words: tuple[int, int] = (8, 13), characters: tuple[int, int] = (13, 20)
) -> Index:
    """The index of evaluation sets.

    Args:
        words, characters: the least and the greatest n.

    Raises:
        UserError: all items are shorter than the least n.
    """
    limits = {WORDS: words, CHARACTERS: characters}
    items: list[tuple[int, int]] = []
    texts: list[str] = []
    found: list[tuple[np.ndarray, ...]] = []
    for number, one in enumerate(sets):
        first_item, first_text = len(items), len(texts)
        items += [(number, place) for place in range(len(one.ids))]
        texts += [text for _, text in one.texts]
        tokens = tokenize([text for _, text in one.texts])
        owner = np.array([item for item, _ in one.texts], np.int64)
        sizes = np.diff(tokens.bounds)
        by_character = 2 * tokens.unspaced > sizes
        for kind, chosen in ((WORDS, ~by_character), (CHARACTERS, by_character)):
            if not sizes[chosen].any():
                continue
            longest = np.zeros(len(one.ids), np.int64)
            np.maximum.at(longest, owner[chosen], sizes[chosen])
            usual = int(np.percentile(longest[longest > 0], _SHORT_ITEMS, method="lower"))
            n = one.ngrams[kind] = min(max(usual, limits[kind][0]), limits[kind][1])
            shingles = shingles_of(_only(tokens, chosen), n, short=False)
            counts = np.diff(shingles.bounds)
            text = np.repeat(np.arange(len(counts)), counts)
            place = np.arange(len(text)) - np.repeat(shingles.bounds[:-1], counts)
            found.append((shingles.hashes, owner[text] + first_item, text + first_text, place, np.full(len(text), n)))
    hashes, item, text, place, length = (
        (np.concatenate(column) for column in zip(*found)) if found else [np.empty(0)] * 5
    )
    if not len(hashes):
        raise UserError(
            f"every evaluation item is shorter than {words[0]} words or {characters[0]} characters: lower --ngram or "
            "--characters"
        )
    grams, first, gram = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = np.unique(np.stack([gram, item], axis=1), axis=0)
    lengths = tuple(sorted({n for one in sets for n in one.ngrams.values()}))
    return Index(grams, lengths, pairs[:, 0], pairs[:, 1], items, sets, text[first], place[first], length[first], texts)


def _only(tokens: Tokens, chosen: np.ndarray) -> Tokens:
    """The same texts, those that are not chosen without tokens."""
    sizes = np.diff(tokens.bounds)
    kept = tokens.hashes[np.repeat(chosen, sizes)]
    return Tokens(kept, np.concatenate([[0], np.cumsum(sizes * chosen)]), tokens.unspaced * chosen)


class Lookup:
    """Finds which of many hashes are in a sorted array: a bit table first, which most fail, then bisection."""

    def __init__(self, grams: np.ndarray):
        bits = min(max(int(len(grams)).bit_length() + 4, 16), 27)
        self._grams, self._shift = grams, np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[grams >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in `hashes`, which of the sorted array) for all that are in it."""
        places = np.flatnonzero(self._table[hashes >> self._shift])
        candidates = hashes[places]
        grams = np.minimum(np.searchsorted(self._grams, candidates), len(self._grams) - 1)
        equal = self._grams[grams] == candidates
        return places[equal], grams[equal]
