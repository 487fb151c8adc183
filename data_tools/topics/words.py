"""Text to words: English by letters, Chinese by jieba or character by character, both in one text.

Contract: `Tokenizer(mode).chunks(text)` gives the words of a text as runs of neighbours: a stop word, a formula, an
address or punctuation ends a run, so that a phrase never spans one. Words are NFKC, lower case, at least two characters
(one, where Chinese is read by characters) and hold a letter. Modes:

    words       letters and digits between anything else; Han runs stay whole (text with spaces between its words)
    jieba       as `words`, and Han runs are cut by jieba's dictionary (simplified Chinese; it comes with the package)
    characters  as `words`, and every Han character is a word (classical and traditional Chinese: jieba's own dictionary
                knows simplified words; phrases join the characters that belong together)
    auto        `jieba`, or `characters` where the sample is mostly Han with traditional forms: see `choose_mode`
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from data_tools.topics.stop_words import classical_characters, stop_words

MODES = ("auto", "words", "jieba", "characters")
_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_NOISE = re.compile(
    r"https?://\S+|www\.\S+|\S+@\S+\.\w+"  # addresses
    r"|\$\$.{1,400}?\$\$|\$[^$\n]{1,200}\$|\\[A-Za-z]+"  # TeX
    r"|state[- ]of[- ]the[- ]art|<[a-z/][^<>]{0,80}>",  # praise without content; tags
    re.IGNORECASE | re.DOTALL,
)
# A run of Han | a word with its apostrophe part | what joins words of a phrase | anything else
_PIECES = re.compile(rf"([{_HAN}]+)|([^\W_{_HAN}]+)(?:['’][^\W_]+)?|([\s\-‐‑/_]+)|[^\w\s]+", re.UNICODE)
_HAN_RUN = re.compile(rf"[{_HAN}]")
# Frequent characters that simplified Chinese does not have.
_TRADITIONAL = frozenset("國學說這個們來時會對爲為與東無風雲馬龍門開關見長萬還過邊聲舊書鄉處歸盡須難題樹葉飛鳥")


class Tokenizer:
    """Cuts texts as the module's contract says.

    Args:
        mode: one of MODES but `auto`.
        extra_stop_words: more words to leave out, in any case.
    """

    def __init__(self, mode: str, extra_stop_words: Iterable[str] = ()) -> None:
        if mode not in MODES or mode == "auto":
            raise ValueError(f"mode {mode!r} is none of {MODES[1:]}")
        self.mode = mode
        self._stop = stop_words() | {word.lower() for word in extra_stop_words}
        self._stop_characters = classical_characters() | self._stop
        self._cut = _jieba_cut() if mode == "jieba" else None

    def chunks(self, text: str) -> list[list[str]]:
        """The words of `text` in order, as runs of neighbours."""
        text = _NOISE.sub(" . ", unicodedata.normalize("NFKC", text)).lower()
        stop = self._stop
        out: list[list[str]] = []
        run: list[str] = []
        for match in _PIECES.finditer(text):
            kind = match.lastindex
            if kind == 2:
                word = match.group(2)
                if word not in stop and len(word) > 1 and not word.isdigit():
                    run.append(word)
                    continue
            elif kind == 3:
                continue
            elif kind == 1:
                run = self._add_han(match.group(1), out, run)
                continue
            if run:
                out.append(run)
                run = []
        if run:
            out.append(run)
        return out

    def _add_han(self, text: str, out: list[list[str]], run: list[str]) -> list[str]:
        """Append the words of a run of Han characters to `run`; finished runs go to `out`."""
        if self.mode == "characters":
            words, stop, shortest = text, self._stop_characters, 1
        elif self._cut is not None:
            words, stop, shortest = self._cut(text), self._stop, 2
        else:
            words, stop, shortest = (text,), self._stop, 2
        for word in words:
            if len(word) >= shortest and word not in stop:
                run.append(word)
            elif run:
                out.append(run)
                run = []
        return run


def _jieba_cut():
    from data_tools.extras import require

    jieba = require("jieba")
    jieba.setLogLevel(60)  # it prints how it loads its dictionary
    jieba.initialize()
    return jieba.lcut


def choose_mode(texts: Iterable[str]) -> tuple[str, str]:
    """The mode `auto` stands for, and why, from a sample of texts.

    Characters where at least a third of all letters are Han and more than 2 % of the Han ones are on a list of
    frequent traditional forms (simplified text has about 0.0 %, Tang poems 7 %).
    """
    han = letters = traditional = 0
    for text in texts:
        found = _HAN_RUN.findall(text)
        han += len(found)
        letters += sum(character.isalpha() for character in text)
        traditional += sum(character in _TRADITIONAL for character in found)
    if han == 0:
        return "words", "no Chinese in the sample"
    share, old = han / max(letters, 1), traditional / han
    if share >= 1 / 3 and old > 0.02:
        return "characters", f"{share:.0%} of the letters are Han, {old:.1%} of them traditional forms"
    return "jieba", f"{share:.0%} of the letters are Han, simplified"
