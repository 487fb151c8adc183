"""Texts to hashed n-grams (shingles), many texts at a time, in numpy.

Contract: `shingle_hashes(texts, n)` gives 64 well-mixed bits for every n-gram of every text, the same in every process
and for every grouping of texts. A token is a word (a run of letters, digits and combining marks, in lower case) or one
single character of a script that writes no spaces (Chinese, kana, Thai, Lao, Khmer, Myanmar); punctuation and spaces
only separate. So an n-gram is n words of English, n characters of Chinese, and n of both where they are mixed. A text
of fewer than n tokens has one shingle, all its tokens; a text without any token has none.

How: the characters of a batch lie in one array of code points; each has 64 random bits v(c), and the hash of the word
c_0 ... c_k is sum v(c_i) * B^i modulo 2^64 with B odd. Prefix sums over the batch give every word's hash without a
loop: (P[end] - P[start]) * B^-start. Two different words collide with probability of about 2^-60, and n-grams are
combined from word hashes by the same polynomial with another base.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.data.permutation import hash_array, hash_key

BATCH_CHARS = 1 << 16  # characters hashed at a time: the arrays of a batch stay in the processor's cache
_MASK = (1 << 64) - 1
_WORD_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_WORD_BASE_INVERSE = pow(_WORD_BASE, -1, 1 << 64)
_GRAM_BASE = 0xD6E8FEB86659FD93
_CHARACTER_KEY = hash_key(0x7368696E)  # any constant: it makes v(c)
_TOKEN_KEY = hash_key(0x67726C65)
_SHINGLE_KEY = hash_key(0x736D6978)

# scripts without spaces between words: a character is a token of its own
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),  # 々 〆 〇
    (0x3021, 0x30FF),  # Hangzhou numerals, kana
    (0x31F0, 0x31FF),  # small kana
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xF900, 0xFAFF),  # compatibility forms
    (0x1AFF0, 0x1B16F),  # historic kana
    (0x20000, 0x3347F),  # CJK extensions B to J
)


@dataclass(frozen=True)
class Tokens:
    """Token hashes of several texts, one after the other.

    Attributes:
        hashes: uint64 [tokens].
        bounds: int64 [texts + 1]; the tokens of text i are hashes[bounds[i]:bounds[i + 1]].
        unspaced: int64 [texts]; how many tokens of each text are single characters.
    """

    hashes: np.ndarray
    bounds: np.ndarray
    unspaced: np.ndarray


@dataclass(frozen=True)
class Shingles:
    """Hashed n-grams of several texts (repeats included), one text after the other.

    Attributes:
        hashes: uint64 [shingles].
        bounds: int64 [texts + 1]; those of text i are hashes[bounds[i]:bounds[i + 1]].
    """

    hashes: np.ndarray
    bounds: np.ndarray


def tokenize(texts: Sequence[str]) -> Tokens:
    """Token hashes of `texts`; memory is about 8 bytes a token and a few MB, however long a text is."""
    folded = [_fold(text) for text in texts]
    hashes, counts, unspaced = [], np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
    for members, pieces in _batches(folded):
        piece_hashes, piece_counts, piece_unspaced = _hash_tokens(pieces)
        hashes.append(piece_hashes)
        np.add.at(counts, members, piece_counts)
        np.add.at(unspaced, members, piece_unspaced)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return Tokens(np.concatenate(hashes) if hashes else np.empty(0, np.uint64), bounds, unspaced)


def words_of(text: str) -> list[str]:
    """The tokens that `tokenize` hashes, one by one: for showing an n-gram, not for speed."""
    tokens: list[str] = []
    kinds = _character_kinds()
    before = _SEPARATOR
    for character in _fold(text):
        kind = kinds[ord(character)]
        if kind == _LETTER and before == _LETTER:
            tokens[-1] += character
        elif kind != _SEPARATOR:
            tokens.append(character)
        before = kind
    return tokens


def shingles_of(tokens: Tokens, n: int, *, short: bool = True) -> Shingles:
    """The n-grams of every text.

    Args:
        n: tokens in a shingle, at least 1.
        short: give a text of 1 to n - 1 tokens one shingle of all its tokens (else it has none).
    """
    lengths = np.diff(tokens.bounds)
    counts = np.maximum(lengths - n + 1, 0)
    is_short = (lengths > 0) & (lengths < n) if short else np.zeros(len(lengths), bool)
    grams = tokens.hashes[: max(len(tokens.hashes) - n + 1, 0)].copy()
    base = np.uint64(_GRAM_BASE)
    for place in range(1, n):
        grams *= base
        grams += tokens.hashes[place : place + len(grams)]
    bounds = np.concatenate([[0], np.cumsum(counts + is_short)])
    if not is_short.any() and (counts > 0).all():
        # drop the n - 1 starts before each end, whose n-gram would reach into the next text
        keep = np.ones(len(tokens.hashes), bool)
        ends = tokens.bounds[1:]
        for back in range(1, n):
            keep[ends - back] = False
        return Shingles(_mix(grams[keep[: len(grams)]], n), bounds)
    result = np.empty(bounds[-1], np.uint64)
    starts = np.repeat(tokens.bounds[:-1] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    long_places = np.repeat(bounds[:-1] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    order = np.arange(counts.sum())
    result[order + long_places] = _mix(grams[order + starts], n)
    for number in np.flatnonzero(is_short):
        gram = 0
        for token in tokens.hashes[tokens.bounds[number] : tokens.bounds[number + 1]].tolist():
            gram = (gram * _GRAM_BASE + token) & _MASK
        result[bounds[number]] = _mix(np.array([gram], np.uint64), int(lengths[number]))[0]
    return Shingles(result, bounds)


def shingle_hashes(texts: Sequence[str], n: int) -> Shingles:
    """Hashed n-grams of texts; see the module."""
    return shingles_of(tokenize(texts), n)


def _mix(grams: np.ndarray, n: int) -> np.ndarray:
    return hash_array(grams, _SHINGLE_KEY ^ n)  # n: shingles of different lengths never meet


def _fold(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text.lower())


def _batches(texts: list[str]) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Group texts to about BATCH_CHARS characters: (number of the text of each piece, pieces).

    A longer text comes in pieces that are cut where no word is (at a hard cut only inside a word longer than a batch).
    """
    members: list[int] = []
    pieces: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        start = 0
        while start < len(text):
            stop = _cut(text, start)
            if pieces and size + stop - start > BATCH_CHARS:
                yield np.array(members), pieces
                members, pieces, size = [], [], 0
            members.append(number)
            pieces.append(text[start:stop] if stop - start < len(text) else text)
            size += stop - start + 1
            start = stop
    if pieces:
        yield np.array(members), pieces


def _cut(text: str, start: int) -> int:
    if len(text) - start <= BATCH_CHARS:
        return len(text)
    stop = start + BATCH_CHARS
    for place in range(stop, start, -1):
        kind = _character_kinds()[ord(text[place - 1])]
        if kind != _LETTER:
            return place
    return stop


_SEPARATOR, _LETTER, _ALONE = 0, 1, 2


@functools.cache
def _character_kinds() -> np.ndarray:
    """uint8 [0x110000]: separator, letter of a word, token of its own."""
    kinds = np.zeros(0x110000, np.uint8)
    category = unicodedata.category
    is_word = [category(chr(code))[0] in "LNM" for code in range(0x323B0)]  # above are no letters, only selectors
    kinds[: len(is_word)] = is_word
    for first, last in UNSPACED:
        inside = kinds[first : last + 1]
        inside[inside == _LETTER] = _ALONE
    return kinds


@functools.cache
def _character_values() -> np.ndarray:
    """v(c), uint64 [0x110000]; 0 for separators."""
    values = hash_array(np.arange(0x110000, dtype=np.uint64), _CHARACTER_KEY)
    values[_character_kinds() == _SEPARATOR] = 0
    return values


@functools.cache
def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _hash_tokens(pieces: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes, number of tokens of each piece, number of single-character tokens of each piece)."""
    joined = "\n".join([*pieces, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _character_kinds()[codes]
    begins = kinds != _SEPARATOR
    # inside a word: a letter after a letter
    begins[1:] &= (kinds[1:] == _ALONE) | (kinds[:-1] != _LETTER)
    starts = np.flatnonzero(begins)
    ends = np.cumsum([len(piece) + 1 for piece in pieces])
    bounds = np.concatenate([[0], np.searchsorted(starts, ends)])
    alone = np.concatenate([[0], np.cumsum(kinds[starts] == _ALONE)])
    unspaced = np.diff(alone[bounds])
    size = 1 << max(len(codes) - 1, 1).bit_length()
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_character_values()[codes] * _powers(_WORD_BASE, size)[: len(codes)], out=sums[1:])
    # separators add nothing, so a token's sum may run up to the next token's start
    edges = np.append(starts, len(codes))
    hashes = (sums[edges[1:]] - sums[edges[:-1]]) * _powers(_WORD_BASE_INVERSE, size)[starts]
    return hash_array(hashes, _TOKEN_KEY), np.diff(bounds), unspaced
