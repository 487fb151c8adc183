"""One text or record through the whole of cleaning: repair, masks, lines, language, rules.

Contract: `Cleaner(options)` is made of what JSON can hold; `clean(text)` gives a Cleaned with everything that was
found, `clean_record(record)` the record to write and its Cleaned. The result, cleaned again, is the same and passes the
same rules: repair and masks are stable, lines are judged alone and until nothing changes, language and rules see the
text that is written.

A conversation ("messages") is repaired and masked message by message, keeps its lines, and is judged as its messages
joined by line ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.cleaning.language import identify
from data_tools.cleaning.lines import LineRules
from data_tools.cleaning.masking import Masker, parse_kinds
from data_tools.cleaning.page import Page
from data_tools.cleaning.repair import ROUNDS, Repair
from data_tools.cleaning.rules import RuleBook, Verdict
from data_tools.records import Record
from minillm.utils.errors import UserError


@dataclass
class Cleaned:
    """What became of a text.

    Attributes:
        reason, detail: why it is left out, or "".
        lines: how much each line rule took.
        gone: (rule, line) of the lines that went.
        verdicts: of every document rule; empty where the text is.
    """

    text: str
    language: str = "und"
    score: float = 0.0
    repaired: bool = False
    masks: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    gone: list[tuple[str, str]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    reason: str = ""
    detail: str = ""


class Cleaner:
    """Cleaning as the options say.

    Args:
        options: preset, rules, config (content), changes, mask, languages, min_score, form, entities, spaces,
            bad_words (a list), fields (names of the other fields that the text was made of); all may be missing.

    Raises:
        UserError: an option that means nothing.
    """

    def __init__(self, options: dict):
        self.book = RuleBook.load(
            str(options.get("preset") or "web"), options.get("rules"), options.get("config"), options.get("changes")
        )
        mask = options.get("mask")
        self._mask = Masker(parse_kinds(self.book.mask if mask is None else mask))
        self._repair = Repair(
            options.get("form") or "NFC", options.get("entities") or "keep", options.get("spaces") or self.book.spaces
        )
        self._lines = LineRules(
            self.book.line_rules,
            _low(self.book.words["c4_line_words"][0]),
            _low(self.book.characters["c4_line_words"][0]),
            _low(self.book.words["c4_line_long_word"][1], 1 << 30),
        )
        self._languages = frozenset(options.get("languages") or ())
        self._min_score = float(options.get("min_score") or 0)
        self._bad_words = frozenset(options.get("bad_words") or ())
        self._fields = tuple(options.get("fields") or ())

    def clean(self, text: str) -> Cleaned:
        """A text through everything."""
        found = Cleaned("")
        found.text = self._repaired_and_masked(text, found)
        repaired = found.repaired
        for _ in range(ROUNDS if self.book.line_rules else 0):
            after, counts, gone = self._lines(found.text)
            if not counts:
                break
            found.lines.update(counts)
            found.gone += gone
            # what is side by side now may be personal data or mojibake that was apart before
            found.text = self._repaired_and_masked(after, found)
        found.repaired = repaired
        return self._judged(found)

    def clean_record(self, record: Record) -> tuple[Record, Cleaned]:
        """A record with its text, or its messages, cleaned."""
        if "text" in record:
            found = self.clean(str(record["text"]))
            changed: dict = {"text": found.text}
            # the parts of a template stay in the record: personal data goes there too
            for name in self._fields:
                if name in record:
                    changed[name] = self._of_field(record[name], Cleaned(""))
        else:
            found = Cleaned("")
            messages = [
                {**message, "content": self._repaired_and_masked(message["content"], found)}
                for message in record["messages"]
            ]
            found.text = "\n".join(message["content"] for message in messages)
            changed = {"messages": messages}
            self._judged(found)
        return {**record, **changed, "language": found.language, "language_score": found.score}, found

    def _repaired_and_masked(self, text: str, found: Cleaned) -> str:
        repaired = self._repair(text)
        found.repaired |= repaired != text
        masked, counts = self._mask(repaired)
        found.masks.update(counts)
        return masked

    def _of_field(self, value: object, uncounted: Cleaned) -> object:
        if isinstance(value, str):
            return self._repaired_and_masked(value, uncounted)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return [self._repaired_and_masked(part, uncounted) for part in value]
        return value

    def _judged(self, found: Cleaned) -> Cleaned:
        if not found.text.strip():
            went = f": its lines went to {', '.join(found.lines)}" if found.lines else ""
            found.reason, found.detail = "empty", f"nothing is left{went}"
            return found
        found.language, found.score = identify(found.text)
        if self._languages and found.language not in self._languages:
            found.reason = "language"
            kept = ", ".join(sorted(self._languages))
            found.detail = f"language is {found.language} ({found.score:.2f}), kept are {kept}"
        elif found.score < self._min_score:
            found.reason = "language_score"
            found.detail = f"language is {found.language} with {found.score:.2f}, allowed is at least {self._min_score}"
        found.verdicts = self.book.judge(Page(found.text, found.language, self._bad_words))
        if not found.reason and (failed := next((v for v in found.verdicts if v.failed), None)):
            found.reason, found.detail = failed.rule, failed.detail
        return found


def _low(bound: float | None, otherwise: int = 0) -> int:
    return otherwise if bound is None else int(bound)


def read_bad_words(path: Path) -> list[str]:
    """One word or phrase a line, in lower case; lines that begin with # are comments.

    Raises:
        UserError: it cannot be read, or has no word.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--bad-words {path} cannot be read ({error}): it is UTF-8 text, a word a line") from None
    words = sorted({line.strip().lower() for line in lines if line.strip() and not line.startswith("#")})
    if not words:
        raise UserError(f"--bad-words {path} has no word in it: write one a line")
    return words


def check_languages(names: Iterable[str]) -> None:
    """Raise a UserError for a code that is never the answer."""
    from data_tools.cleaning.language import known_languages

    known = known_languages()
    for name in names:
        if name not in known:
            raise UserError(f"--language {name}: known are {' '.join(known)} (ISO 639-1)")
