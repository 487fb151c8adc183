"""The document rules: a measure of a Page, held against bounds that differ by preset and by script.

Contract: `RuleBook.load(...)` resolves preset, rule names, --config and --set to the rules that are switched on and
their bounds; unknown names are UserErrors with the nearest one. `judge(page)` is a Verdict for every document rule, in
a fixed order, computed from one shared set of words and lines.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from data_tools.cleaning.lines import LINE_RULES
from data_tools.cleaning.page import Page
from minillm.utils.errors import UserError

DEFAULTS = Path(__file__).with_name("rules.yaml")
# Gopher's n in words, and as many characters of a script without spaces: a Chinese word has about 1.6
CHARACTERS_OF = {2: 3, 3: 5, 4: 6, 5: 8, 6: 10, 7: 11, 8: 13, 9: 14, 10: 16}


def _n(page: Page, words: int) -> int:
    return CHARACTERS_OF[words] if page.in_characters else words


def _top(words: int) -> Callable[[Page], float]:
    return lambda page: page.ngrams.top(_n(page, words))


def _duplicate(words: int) -> Callable[[Page], float]:
    return lambda page: page.ngrams.duplicate(_n(page, words))


# in the order they are asked; n-grams in rising order of n (data_tools/cleaning/repetition.py)
MEASURES: dict[str, Callable[[Page], float]] = {
    "gopher_words": lambda page: page.num_units,
    "gopher_word_length": Page.word_length,
    "gopher_hashes": lambda page: page.symbols("#"),
    "gopher_ellipses": Page.ellipses,
    "gopher_bullet_lines": Page.bullet_lines,
    "gopher_ellipsis_lines": Page.ellipsis_lines,
    "gopher_alphabetic": Page.alphabetic,
    "gopher_stop_words": lambda page: 0,  # needs the list: see RuleBook._value
    "gopher_duplicate_lines": Page.duplicate_lines,
    "gopher_duplicate_paragraphs": Page.duplicate_paragraphs,
    "gopher_duplicate_line_characters": Page.duplicate_line_characters,
    "gopher_duplicate_paragraph_characters": Page.duplicate_paragraph_characters,
    **{f"gopher_top_{n}_gram": _top(n) for n in (2, 3, 4)},
    **{f"gopher_duplicate_{n}_grams": _duplicate(n) for n in (5, 6, 7, 8, 9, 10)},
    "c4_sentences": Page.sentences,
    "c4_lorem_ipsum": lambda page: page.lower.count("lorem ipsum"),
    "c4_curly_brackets": lambda page: page.text.count("{"),
    "c4_bad_words": Page.bad_words,
    "fineweb_ended_lines": Page.ended_lines,
    "fineweb_duplicate_line_characters": Page.duplicate_line_characters,
    "fineweb_short_lines": Page.short_lines,
}
RULES = (*MEASURES, *LINE_RULES)
Bounds = tuple[float | None, float | None]


class Verdict(NamedTuple):
    """A rule's measure of a document and the bounds it was held against."""

    rule: str
    value: float
    low: float | None
    high: float | None

    @property
    def failed(self) -> bool:
        return self.low is not None and self.value < self.low or self.high is not None and self.value > self.high

    @property
    def allowed(self) -> str:
        """Such as "50 to 100000", "at most 0.2"."""
        if self.low is not None and self.high is not None:
            return f"{show(self.low)} to {show(self.high)}"
        if self.low is None and self.high is None:
            return "anything"
        return f"at least {show(self.low)}" if self.low is not None else f"at most {show(self.high)}"

    @property
    def detail(self) -> str:
        """Such as "gopher_words is 12, allowed is 50 to 100000"."""
        return f"{self.rule} is {show(self.value)}, allowed is {self.allowed}"


def show(value: float | None) -> str:
    """A measure for people: whole numbers whole, shares with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class RuleBook:
    """What is asked of a document.

    Attributes:
        rules: names switched on, document and line rules, in the order of RULES.
        words, characters: bounds by rule, for languages written with and without spaces.
        stop_words: by language.
        mask: kinds of personal data.
        spaces: collapse or keep.
    """

    rules: tuple[str, ...]
    words: dict[str, Bounds]
    characters: dict[str, Bounds]
    stop_words: dict[str, frozenset[str]]
    mask: tuple[str, ...]
    spaces: str

    @classmethod
    def load(
        cls,
        preset: str = "web",
        rules: Iterable[str] | None = None,
        config: Mapping | None = None,
        changes: Mapping[str, float | None] | None = None,
    ) -> RuleBook:
        """The rules of a preset with what differs.

        Args:
            rules: in the place of the preset's: names of rules and families, "-NAME" leaves one out.
            config: of the form of rules.yaml.
            changes: such as {"gopher_words.min": 20, "gopher_words.characters.min": 30}; the last word.

        Raises:
            UserError: names or values that mean nothing.
        """
        book = _merged(copy.deepcopy(_defaults()), config or {})
        if preset not in book["presets"]:
            raise UserError(f"--preset {preset}: known are {', '.join(book['presets'])}")
        chosen = book["presets"][preset]
        thresholds = book["thresholds"]
        for source in (chosen.get("thresholds") or {}, (config or {}).get("thresholds") or {}):
            _merge_thresholds(thresholds, source)
        for key, value in (changes or {}).items():
            _merge_thresholds(thresholds, _nested(key.split("."), value))
        names = _resolve(list(chosen["rules"]) if rules is None else list(rules), book["families"])
        return cls(
            names,
            {rule: _bounds(rule, thresholds.get(rule, {})) for rule in RULES},
            {rule: _bounds(rule, {**thresholds.get(rule, {}), **(thresholds.get(rule, {}).get("characters") or {})})
             for rule in RULES},
            {language: frozenset(map(str, words)) for language, words in book["stop_words"].items()},
            tuple(chosen.get("mask") or ()),
            str(chosen.get("spaces", "collapse")),
        )  # fmt: skip

    @property
    def line_rules(self) -> tuple[str, ...]:
        return tuple(rule for rule in self.rules if rule in LINE_RULES)

    def judge(self, page: Page) -> list[Verdict]:
        """Every document rule that applies to the page's language."""
        bounds = self.characters if page.in_characters else self.words
        verdicts = []
        for rule in self.rules:
            if rule not in MEASURES:
                continue
            low, high = bounds[rule]
            if low is None and high is None or rule == "c4_bad_words" and not page.listed_bad_words:
                continue
            if rule == "gopher_stop_words":
                listed = self.stop_words.get(page.language)
                if listed:
                    verdicts.append(Verdict(rule, page.stop_words(listed), low, high))
            else:
                verdicts.append(Verdict(rule, MEASURES[rule](page), low, high))
        return verdicts


@lru_cache(maxsize=1)
def _defaults() -> dict:
    return yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))


def load_config(path: Path) -> dict:
    """A YAML file of the form of rules.yaml.

    Raises:
        UserError: it is missing, no YAML, or not of that form.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"--config {path} holds no settings: its keys are {', '.join(_defaults())}")
    return found


def _merged(book: dict, config: Mapping) -> dict:
    for part, content in config.items():
        if part not in book:
            raise UserError(f"rules: unknown part {part!r}{_nearest(part, book)}")
        if not isinstance(content, Mapping):
            raise UserError(f"rules: {part} is {type(content).__name__}, not a table of names")
        if part != "thresholds":
            book[part].update({
                name: {**book[part].get(name, {}), **value} if isinstance(value, Mapping) else value
                for name, value in content.items()
            })  # fmt: skip
    return book


def _merge_thresholds(thresholds: dict, source: Mapping) -> None:
    for rule, bounds in source.items():
        if rule not in thresholds:
            raise UserError(f"rules: {rule!r} has no threshold{_nearest(rule, thresholds)}")
        if not isinstance(bounds, Mapping):
            raise UserError(f"rules: {rule} is {bounds!r}: write {{min: ..., max: ...}}")
        mine = thresholds[rule]
        for key, value in bounds.items():
            if key == "characters" and isinstance(value, Mapping):
                mine["characters"] = {**(mine.get("characters") or {}), **value}
            elif key in ("min", "max"):
                mine[key] = value
            else:
                raise UserError(f"rules: {rule}.{key} is unknown: known are min, max, characters.min, characters.max")


def _nested(keys: list[str], value: object) -> dict:
    return {keys[0]: _nested(keys[1:], value)} if len(keys) > 1 else {keys[0]: value}


def _bounds(rule: str, found: Mapping) -> Bounds:
    low, high = found.get("min"), found.get("max")
    for value in (low, high):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"rules: a bound of {rule} is {value!r}: it is a number or null")
    if low is not None and high is not None and low > high:
        raise UserError(f"rules: {rule} has min {low} above max {high}: nothing would stay")
    return low, high


def _resolve(names: list[str], families: Mapping[str, list[str]]) -> tuple[str, ...]:
    wanted: set[str] = set()
    for name in names:
        bare = name.removeprefix("-")
        members = _members(bare, families)
        wanted = wanted - members if name.startswith("-") else wanted | members
    return tuple(rule for rule in RULES if rule in wanted)


def _members(name: str, families: Mapping[str, list[str]]) -> set[str]:
    if name in families:
        return set().union(*(_members(member, families) for member in families[name]))
    if name not in RULES:
        known = [*families, *RULES]
        raise UserError(f"--rules: unknown {name!r}{_nearest(name, known)}; families are {', '.join(families)}")
    return {name}


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f": did you mean {near[0]}?" if near else f": known are {', '.join(known)}"
