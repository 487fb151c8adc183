"""One text measured: words, lines and paragraphs are made once and shared by all rules.

Contract: `Page(text, language)`; every measure of the rules is a function of a Page. Where words are not written apart
(data_tools/cleaning/language.py, UNSPACED) the units are characters without white space, else what stands between white
space, as in Gopher.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

from data_tools.cleaning.language import UNSPACED
from data_tools.cleaning.repetition import NGrams

_LETTER_WORD = re.compile(r"[^\W\d_]\S*")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPHS = re.compile(r"\n{2,}")
# the end of a sentence inside a line: a mark, maybe a closing quote, a space; in Chinese no space
_SENTENCE_ENDS = (". ", "! ", "? ", '." ', '!" ', '?" ')
_CURLY_SENTENCE_ENDS = (".” ", "!” ", "?” ")
_CHINESE_SENTENCE_ENDS = re.compile(r"[。！？]+[”’」』）\"]*(?=[^\s])")
_BULLETS = tuple("•‣▪●○■◦⁃·-*–")
_ELLIPSES = ("...", "…")
_SHORT_LINE = 30  # characters: FineWeb
_LINE_ENDS = tuple(".?!\"'”’。！？…”』」;；:：")


class Page:
    """A text and its language, with everything that is measured of it."""

    def __init__(self, text: str, language: str, bad_words: frozenset[str] = frozenset()):
        self.text, self.language = text, language
        self.in_characters = language in UNSPACED
        self.listed_bad_words = bad_words

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @cached_property
    def compact(self) -> str:
        """The text without white space."""
        return "".join(self.words)

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def num_units(self) -> int:
        """Words, or characters without white space."""
        return len(self.compact) if self.in_characters else len(self.words)

    @cached_property
    def lines(self) -> list[str]:
        """Lines with something in them, without the spaces around it."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between blank lines."""
        return _PARAGRAPHS.split(self.text) if "\n\n" in self.text else [self.text]

    @cached_property
    def ngrams(self) -> NGrams:
        return NGrams(self.compact if self.in_characters else self.words)

    # -- Gopher quality

    def word_length(self) -> float:
        """Mean characters of a word."""
        return len(self.compact) / max(1, len(self.words))

    def symbols(self, *symbols: str) -> float:
        """Occurrences of symbols, to words or characters."""
        return sum(map(self.text.count, symbols)) / max(1, self.num_units)

    def ellipses(self) -> float:
        """Occurrences of the ellipsis, to words or characters; the Chinese …… is one."""
        count = self.text.count("...") + self.text.count("…") - self.text.count("……")
        return count / max(1, self.num_units)

    def bullet_lines(self) -> float:
        """Share of lines that begin with a bullet point."""
        return sum(line.startswith(_BULLETS) for line in self.lines) / max(1, len(self.lines))

    def ellipsis_lines(self) -> float:
        """Share of lines that end with an ellipsis."""
        return sum(line.endswith(_ELLIPSES) for line in self.lines) / max(1, len(self.lines))

    def alphabetic(self) -> float:
        """Share of words with a letter in them, or of characters that are letters."""
        if self.in_characters:
            return len(_LETTER.findall(self.compact)) / max(1, self.num_units)
        rest = [word for word in self.words if not word.isalpha()]
        with_letter = len(self.words) - len(rest) + len(_LETTER_WORD.findall(" ".join(rest)))
        return with_letter / max(1, self.num_units)

    def stop_words(self, words: frozenset[str]) -> int:
        """How many different ones of the stop words occur (as parts of the text, where words are not written apart)."""
        if self.in_characters:
            return sum(word in self.text for word in words)
        found = _in_all_cases(words).intersection(self.words)
        return len(found) if len(found) < 2 else len(set(map(str.lower, found)))

    # -- Gopher repetition

    def duplicate_lines(self) -> float:
        """Share of lines that occurred before."""
        return 1 - len(set(self.lines)) / max(1, len(self.lines)) if self.lines else 0.0

    def duplicate_line_characters(self) -> float:
        """Share of the lines' characters in lines that occurred before."""
        return _repeated_characters(self.lines)

    def duplicate_paragraphs(self) -> float:
        """Share of paragraphs that occurred before."""
        return 1 - len(set(self.paragraphs)) / len(self.paragraphs)

    def duplicate_paragraph_characters(self) -> float:
        """Share of the paragraphs' characters in paragraphs that occurred before."""
        return _repeated_characters(self.paragraphs)

    # -- C4 and FineWeb

    def sentences(self) -> int:
        """Marks of a sentence's end inside lines, and the lines."""
        chinese = len(_CHINESE_SENTENCE_ENDS.findall(self.text)) if "。" in self.text or "！" in self.text else 0
        ends = _SENTENCE_ENDS + _CURLY_SENTENCE_ENDS if "”" in self.text else _SENTENCE_ENDS
        return len(self.lines) + sum(map(self.text.count, ends)) + chinese

    def bad_words(self) -> int:
        """How many different ones of the list given by the user occur: words, and phrases or Chinese words anywhere."""
        if not self.listed_bad_words:
            return 0
        single = self.listed_bad_words.intersection(re.findall(r"\w+", self.lower))
        others = (word for word in self.listed_bad_words if not (word.isascii() and word.isalnum()))
        inside = {word for word in others if word in self.lower}
        return len(single | inside)

    def ended_lines(self) -> float:
        """Share of lines that end with punctuation."""
        return sum(line.endswith(_LINE_ENDS) for line in self.lines) / max(1, len(self.lines))

    def short_lines(self) -> float:
        """Share of lines of fewer than 30 characters (15 where words are not written apart)."""
        limit = _SHORT_LINE // 2 if self.in_characters else _SHORT_LINE
        return sum(len(line) < limit for line in self.lines) / max(1, len(self.lines))


@lru_cache(maxsize=64)
def _in_all_cases(words: frozenset[str]) -> frozenset[str]:
    """the, The and THE."""
    return words.union(map(str.capitalize, words), map(str.upper, words))


def _repeated_characters(parts: list[str]) -> float:
    different = set(parts)
    if len(different) == len(parts):
        return 0.0
    whole = sum(map(len, parts))
    return (whole - sum(map(len, different))) / whole
