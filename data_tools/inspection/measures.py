"""What is counted of a corpus, in numbers that add up: over records, units and whole corpora alike.

Contract: `Measures.add(record)` for every record, `Measures.result()` is JSON, `merge(results)` adds results up. Memory
is bounded whatever the input: counters of n-grams and lines are pruned at MAX_KEYS (their counts are then too
high by at most the `error` beside them), lengths are logarithmic bins of 2 %, equal texts are estimated from a sample
of hashes (bottom-k: Bar-Yossef et al. 2002).
"""

from __future__ import annotations

import heapq
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator

from data_tools.cleaning.language import UNSPACED, identify
from data_tools.extras import require
from data_tools.records import Record, record_text

MAX_KEYS = 400_000
KEPT = 3_000  # keys of a counter that a unit hands on
BINS_PER_OCTAVE = 32
HASHES = 4_096
SAMPLES, EXTREMES = 12, 3
COMPRESSED_BYTES = 1 << 16  # looked at of a text
_SAMPLE_CHARACTERS = 1_000
_SHORTEST_COMPRESSED = 200  # bytes: below that zlib's header decides
_LINE = range(8, 301)  # characters of a line that is counted
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_KINDS = {"Cc": "control character", "Co": "private use", "Cn": "unassigned"}
_NOT_LETTERS = re.compile(r"[\W\d_]+")


class BoundedCounter:
    """Counts of at most MAX_KEYS keys; each may be low by up to `error`, which is added to those that are left.

    Lossy counting (Manku and Motwani 2002).
    """

    def __init__(self, max_keys: int = MAX_KEYS):
        self.counts: Counter[str] = Counter()
        self.error, self._max_keys = 0, max_keys

    def add(self, keys: Iterable[str]) -> None:
        self.counts.update(keys)
        while len(self.counts) > self._max_keys:
            self.error += 1
            self.counts = Counter({key: count - 1 for key, count in self.counts.items() if count > 1})

    def result(self) -> dict[str, object]:
        """The most common; ties by the key, so that the same input gives the same."""
        top = heapq.nsmallest(KEPT, self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {"error": self.error, "top": {key: count + self.error for key, count in top}}


def bin_of(number: int) -> int:
    """The logarithmic bin of a length."""
    return round(BINS_PER_OCTAVE * math.log2(max(1, number)))


def quantile(bins: dict[str, int], share: float) -> float:
    """The length below which `share` of the texts are, to 2 %."""
    wanted, seen = share * sum(bins.values()), 0
    for number in sorted(map(int, bins)):
        seen += bins[str(number)]
        if seen >= wanted:
            return 2 ** (number / BINS_PER_OCTAVE)
    return 0.0


class Measures:
    """Of one unit of input.

    Args:
        tokenizer: a tokenizer folder of the project, to count tokens; None counts none.
    """

    def __init__(self, tokenizer: str | None = None):
        self._hash = require("xxhash").xxh64_intdigest
        self._tokenizer = _load(tokenizer) if tokenizer else None
        self.numbers = Counter(records=0, characters=0, bytes=0, lines=0, tokens=0, conversations=0)
        self.lengths: Counter[str] = Counter()
        self.languages: dict[str, Counter[str]] = {}
        self.compression: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.fields: dict[str, Counter[str]] = {}
        self.ngrams = {name: BoundedCounter() for name in ("words", "2 words", "3 words")}
        self.ngrams |= {f"{n} characters": BoundedCounter() for n in (2, 3, 4)}
        self.lines = BoundedCounter()
        self.hashes: dict[int, int] = {}
        self._largest: list[int] = []  # the hashes kept, negative: the largest first
        self.samples: list[tuple] = []
        self.longest: list[tuple] = []
        self.shortest: list[tuple] = []

    def add(self, record: Record) -> None:
        """Count one record."""
        text = record_text(record)
        encoded = text.encode()
        language, _ = identify(text)
        self.numbers.update(records=1, characters=len(text), bytes=len(encoded), conversations="messages" in record)
        self.lengths[str(bin_of(len(text)))] += 1
        self.languages.setdefault(language, Counter()).update(records=1, bytes=len(encoded))
        if self._tokenizer is not None:
            self.numbers["tokens"] += len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if len(encoded) >= _SHORTEST_COMPRESSED:
            head = encoded[:COMPRESSED_BYTES]
            self.compression[f"{len(zlib.compress(head, 6)) / len(head):.2f}"] += 1
        self.characters.update(text)
        for name, value in record.items():
            self.fields.setdefault(name, Counter())[type(value).__name__] += 1
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        self.numbers["lines"] += len(lines)
        self.lines.add(line for line in lines if len(line) in _LINE)
        for name, grams in _ngrams(text, language in UNSPACED).items():
            self.ngrams[name].add(grams)
        self._keep(self._hash(encoded), str(record["id"]), text)

    def _keep(self, value: int, identity: str, text: str) -> None:
        entry = {"id": identity, "characters": len(text), "text": text[:_SAMPLE_CHARACTERS]}
        for heap, key, size in (
            (self.samples, -value, SAMPLES),  # the smallest hashes: any record is as likely
            (self.longest, len(text), EXTREMES),
            (self.shortest, -len(text), EXTREMES),
        ):
            if len(heap) < size:
                heapq.heappush(heap, (key, identity, entry))
            elif (key, identity) > heap[0][:2]:
                heapq.heapreplace(heap, (key, identity, entry))
        if value in self.hashes:
            self.hashes[value] += 1
        elif len(self.hashes) < HASHES or value < -self._largest[0]:
            self.hashes[value] = 1
            heapq.heappush(self._largest, -value)
            if len(self.hashes) > HASHES:
                del self.hashes[-heapq.heappop(self._largest)]

    def result(self) -> dict[str, object]:
        """Everything counted, as JSON."""
        return {
            "numbers": dict(self.numbers),
            "lengths": dict(self.lengths),
            "languages": {name: dict(found) for name, found in self.languages.items()},
            "compression": dict(self.compression),
            "characters": dict(self.characters),
            "fields": {name: dict(found) for name, found in self.fields.items()},
            "ngrams": {name: counter.result() for name, counter in self.ngrams.items()},
            "lines": self.lines.result(),
            "hashes": {str(value): count for value, count in self.hashes.items()},
            "samples": [[key, identity, entry] for key, identity, entry in self.samples],
            "longest": [[key, identity, entry] for key, identity, entry in self.longest],
            "shortest": [[key, identity, entry] for key, identity, entry in self.shortest],
        }


def _load(folder: str):
    from minillm.data.tokenizer import load_tokenizer

    return load_tokenizer(folder).backend_tokenizer


def _ngrams(text: str, in_characters: bool) -> dict[str, Iterator[str]]:
    if in_characters:
        runs = [run for run in _NOT_LETTERS.split(text) if run]
        return {f"{n} characters": _pieces(runs, n) for n in (2, 3, 4)}
    words = _WORD.findall(text.lower())
    return {
        "words": iter(words),
        "2 words": map(" ".join, zip(words, words[1:])),
        "3 words": map(" ".join, zip(words, words[1:], words[2:])),
    }


def _pieces(runs: list[str], size: int) -> Iterator[str]:
    return (run[start : start + size] for run in runs for start in range(len(run) - size + 1))


def merge(results: list[dict]) -> dict:
    """The results of all units as one: tables for the summary and the page."""
    from data_tools.workshop import add_up

    total: dict = {}
    for result in results:
        add_up(total, {key: value for key, value in result.items() if isinstance(value, dict) and key != "hashes"})
    numbers, lengths = total["numbers"], total["lengths"]
    entries = {
        name: [entry for _, _, entry in heapq.nlargest(size, _all(results, name), key=lambda item: item[:2])]
        for name, size in (("samples", SAMPLES), ("longest", EXTREMES), ("shortest", EXTREMES))
    }
    quantiles = {f"p{share}": round(quantile(lengths, share / 100)) for share in (1, 5, 25, 50, 75, 95, 99)}
    return {
        **numbers,
        "characters_a_record": quantiles,
        "bytes_a_character": round(numbers["bytes"] / max(1, numbers["characters"]), 3),
        "bytes_a_token": round(numbers["bytes"] / numbers["tokens"], 3) if numbers["tokens"] else None,
        "equal_texts": _equal_texts(results),
        "languages": dict(sorted(total["languages"].items(), key=lambda item: -item[1]["records"])),
        "lengths": {str(number): lengths[str(number)] for number in sorted(map(int, lengths))},
        "compression": dict(sorted(total["compression"].items())),
        "character_classes": _classes(total["characters"]),
        "rare_characters": _rare(total["characters"]),
        "fields": total["fields"],
        "ngrams": {name: _top(found) for name, found in total["ngrams"].items() if found["top"]},
        "lines": {line: count for line, count in _top(total["lines"]).items() if count > 1},
        **entries,
    }


def _all(results: list[dict], name: str) -> Iterator[tuple]:
    return (tuple(item) for result in results for item in result[name])


def _top(found: dict, size: int = 50) -> dict[str, int]:
    return dict(sorted(found["top"].items(), key=lambda item: (-item[1], item[0]))[:size])


def _equal_texts(results: list[dict]) -> float:
    """The share of records that repeat another's text, estimated from the records with the smallest hashes."""
    counts: Counter[int] = Counter()
    bounds = []
    for result in results:
        found = {int(value): count for value, count in result["hashes"].items()}
        counts.update(found)
        if len(found) == HASHES:
            bounds.append(max(found))
    bound = min(bounds, default=math.inf)
    sampled = {value: count for value, count in counts.items() if value <= bound}
    return round(1 - len(sampled) / max(1, sum(sampled.values())), 4)


def _classes(characters: dict[str, int]) -> dict[str, float]:
    """Shares of all characters."""
    found: Counter[str] = Counter()
    for character, count in characters.items():
        found[_class_of(character)] += count
    total = max(1, sum(found.values()))
    return {name: round(count / total, 5) for name, count in found.most_common()}


def _class_of(character: str) -> str:
    kind = unicodedata.category(character)
    if character in " \n\t":
        return "white space"
    if kind in ("Cc", "Cf", "Co", "Cn", "Cs"):
        return "control and unassigned"
    if kind == "Lo" and unicodedata.name(character, "").startswith("CJK"):
        return "Han"
    if kind[0] == "L":
        name = unicodedata.name(character, "").split(" ")[0]
        return name.capitalize() if name in ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HANGUL", "HIRAGANA", "KATAKANA",
                                             "HEBREW", "THAI", "DEVANAGARI") else "other letters"  # fmt: skip
    return {"N": "digits", "P": "punctuation", "S": "symbols", "Z": "white space", "M": "marks"}.get(kind[0], "other")


def _rare(characters: dict[str, int]) -> dict[str, int]:
    """Control characters, replacement characters and private ones: signs of a wrong decoding."""
    wrong = {c: n for c, n in characters.items() if c == "\ufffd" or _class_of(c) == "control and unassigned"}
    top = sorted(wrong.items(), key=lambda item: -item[1])[:20]
    return {f"U+{ord(character):04X} {_name_of(character)}": count for character, count in top}


def _name_of(character: str) -> str:
    return unicodedata.name(character, _KINDS.get(unicodedata.category(character), ""))
