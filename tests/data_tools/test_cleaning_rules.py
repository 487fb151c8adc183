"""Rules and measures of data_tools.cleaning against values worked out by hand or published.

The n-gram measures have a slow, obvious oracle here; thresholds are typed from the papers.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data_tools.cleaning.lines import LINE_RULES, LineRules, is_navigation, is_notice
from data_tools.cleaning.page import Page
from data_tools.cleaning.repetition import NGrams
from data_tools.cleaning.rules import CHARACTERS_OF, MEASURES, RuleBook
from minillm.utils.errors import UserError

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "sft-samples"
needs_shared = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/data is not here")

# Rae et al. 2021 (arXiv:2112.11446), appendix A.1.1 with table A1; Raffel et al. 2020, section 2.2, with the constants
# of c4_utils.py; Penedo et al. 2024 (arXiv:2406.17557), section 3.6
PUBLISHED = {
    "gopher_words": (50, 100_000),
    "gopher_word_length": (3, 10),
    "gopher_hashes": (None, 0.1),
    "gopher_ellipses": (None, 0.1),
    "gopher_bullet_lines": (None, 0.9),
    "gopher_ellipsis_lines": (None, 0.3),
    "gopher_alphabetic": (0.8, None),
    "gopher_stop_words": (2, None),
    "gopher_duplicate_lines": (None, 0.30),
    "gopher_duplicate_paragraphs": (None, 0.30),
    "gopher_duplicate_line_characters": (None, 0.20),
    "gopher_duplicate_paragraph_characters": (None, 0.20),
    "gopher_top_2_gram": (None, 0.20),
    "gopher_top_3_gram": (None, 0.18),
    "gopher_top_4_gram": (None, 0.16),
    "gopher_duplicate_5_grams": (None, 0.15),
    "gopher_duplicate_6_grams": (None, 0.14),
    "gopher_duplicate_7_grams": (None, 0.13),
    "gopher_duplicate_8_grams": (None, 0.12),
    "gopher_duplicate_9_grams": (None, 0.11),
    "gopher_duplicate_10_grams": (None, 0.10),
    "c4_sentences": (3, None),
    "c4_line_words": (5, None),
    "c4_line_long_word": (None, 1000),
    "c4_lorem_ipsum": (None, 0),
    "c4_curly_brackets": (None, 0),
    "fineweb_ended_lines": (0.12, None),
    "fineweb_duplicate_line_characters": (None, 0.1),
    "fineweb_short_lines": (None, 0.67),
}


def value(rule: str, text: str, language: str = "en") -> float:
    """A rule's measure of a text."""
    book = RuleBook.load(rules=[rule])
    return next(verdict.value for verdict in book.judge(Page(text, language)))


def test_published_thresholds():
    book = RuleBook.load(rules=["gopher", "c4", "fineweb"])
    assert {rule: book.words[rule] for rule in PUBLISHED} == PUBLISHED
    assert set(book.rules) - set(PUBLISHED) == {
        "c4_bad_words", "c4_citations", "c4_line_end", "c4_line_javascript", "c4_line_policy",
    }  # fmt: skip
    assert book.stop_words["en"] == {"the", "be", "to", "of", "and", "that", "have", "with"}


# -- quality -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text", "language", "expected"),
    [
        ("gopher_words", "one two  three\nfour", "en", 4),
        ("gopher_words", "春眠不覺曉，\n處處聞啼鳥。 end", "zh", 15),  # 5 + 1 + 5 + 1 characters and e, n, d
        ("gopher_word_length", "a bbb cc", "en", 2.0),
        ("gopher_hashes", "#a b #c d", "en", 0.5),
        ("gopher_hashes", "#春天#来了", "zh", 2 / 6),
        ("gopher_ellipses", "well... so… end four", "en", 0.5),
        ("gopher_ellipses", "他说……走了", "zh", 1 / 6),  # …… is one ellipsis, two of six characters are its dots
        ("gopher_bullet_lines", "• one\n- two\nthree\n\n* four", "en", 0.75),
        ("gopher_ellipsis_lines", "more...\nmore…\nend.\n\nlast", "en", 0.5),
        ("gopher_alphabetic", "one 2 3a -- (four)", "en", 0.6),
        ("gopher_alphabetic", "三加2等于5。", "zh", 4 / 7),
        ("gopher_stop_words", "The cat AND the dog of them", "en", 3),
        ("gopher_stop_words", "我的书是新的", "zh", 3),  # 我 的 是
        ("gopher_duplicate_lines", "a\nb\na\n\na", "en", 0.5),
        ("gopher_duplicate_line_characters", "aaaa\nbb\naaaa", "en", 0.4),
        ("gopher_duplicate_paragraphs", "a b\nc\n\nd\n\na b\nc\n\ne", "en", 0.25),
        ("gopher_duplicate_paragraph_characters", "abc\n\nabcd\n\nabc", "en", 0.3),
        ("c4_sentences", 'One. Two! "Three?" Four\nFive.', "en", 5),
        ("c4_sentences", "一。二！三？四。\n五", "zh", 5),
        ("c4_sentences", "他说：“好。”然后走了。", "zh", 2),
        ("c4_lorem_ipsum", "Lorem Ipsum dolor, lorem ipsum", "en", 2),
        ("c4_curly_brackets", "if (a) { b }", "en", 1),
        ("fineweb_ended_lines", "One.\ntwo\nthree!\nfour", "en", 0.5),
        ("fineweb_ended_lines", "第一行。\n第二行", "zh", 0.5),
        ("fineweb_short_lines", "short\n" + "x" * 30, "en", 0.5),
        ("fineweb_short_lines", "短" * 14 + "\n" + "长" * 15, "zh", 0.5),
    ],
)
def test_measures_by_hand(rule, text, language, expected):
    assert value(rule, text, language) == pytest.approx(expected)


def test_bounds_are_kept_at_and_left_beyond():
    book = RuleBook.load(rules=["gopher_words"])
    verdict = {n: book.judge(Page("word " * n, "en"))[0] for n in (49, 50, 100_000, 100_001)}
    assert [verdict[n].failed for n in verdict] == [True, False, False, True]
    assert verdict[49].detail == "gopher_words is 49, allowed is 50 to 100000"
    assert [book.judge(Page("字" * n, "zh"))[0].failed for n in (79, 80, 160_000, 160_001)] == [
        True,
        False,
        False,
        True,
    ]


def test_stop_words_are_asked_only_where_there_is_a_list():
    book = RuleBook.load(rules=["gopher_stop_words"])
    assert book.judge(Page("de kat zit op de mat", "nl")) == []
    more = RuleBook.load(rules=["gopher_stop_words"], config={"stop_words": {"nl": ["de", "het", "een"]}})
    assert more.judge(Page("de kat zit op de mat", "nl"))[0].value == 1


def test_bad_words_single_words_phrases_and_chinese():
    book = RuleBook.load(rules=["c4_bad_words"])
    listed = frozenset(["darn", "two words", "坏话"])
    assert book.judge(Page("Darn, darning is two WORDS", "en", listed))[0].value == 2
    assert book.judge(Page("他说坏话", "zh", listed))[0].value == 1
    assert book.judge(Page("darning", "en", listed))[0].value == 0
    assert book.judge(Page("darn", "en")) == []  # without a list the rule is not asked


# -- repetition --------------------------------------------------------------------------------------------------------


def slow_top(units, n: int) -> float:
    """By the definition: the most frequent n-gram, of equally frequent ones the longest."""
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    counts = Counter(grams)
    if not counts or max(counts.values()) < 2:
        return 0.0
    most = max(counts.values())
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return min(1.0, most * longest / sum(map(len, units)))


def slow_duplicate(units, n: int) -> float:
    """By the definition: units inside n-grams that occurred before, each once."""
    covered, seen = set(), set()
    for i in range(len(units) - n + 1):
        if tuple(units[i : i + n]) in seen:
            covered.update(range(i, i + n))
        seen.add(tuple(units[i : i + n]))
    return sum(len(units[i]) for i in covered) / sum(map(len, units)) if covered else 0.0


def test_repetition_by_hand():
    words = "the cat sat on the mat the cat ran".split()  # 26 characters; "the cat" twice, 6 each
    assert NGrams(words).top(2) == pytest.approx(12 / 26)
    again = "one two three four five six one two three four five".split()  # the last five of 41 characters: 19
    assert NGrams(again).duplicate(5) == pytest.approx(19 / 41)
    assert NGrams(again).duplicate(6) == 0
    poem = "春眠不觉晓春眠不觉晓处处闻啼鸟"  # 15 characters, five of them a second time
    assert NGrams(poem).duplicate(5) == pytest.approx(5 / 15)
    assert NGrams(poem).top(3) == pytest.approx(6 / 15)
    assert NGrams("a b".split()).top(2) == 0 and NGrams([]).duplicate(5) == 0 and NGrams("").top(2) == 0
    assert NGrams(["no"] * 50).top(2) == 1.0  # it overlaps itself
    assert NGrams(["no"] * 50).duplicate(5) == pytest.approx(49 / 50)


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_repetition_against_the_oracle(kind):
    random.seed(7)
    for _ in range(120):
        size, letters = random.choice([3, 20, 60, 200]), random.choice([2, 5, 30])
        words = [random.choice("ab") * random.randint(1, 3) + str(random.randrange(letters)) for _ in range(size)]
        if random.random() < 0.5:
            start = random.randrange(size)
            words += words[start : start + 40]
        units = words if kind == "words" else "".join(words)[:300]
        ngrams = NGrams(units)
        found = [ngrams.top(n) for n in (2, 3, 4)] + [ngrams.duplicate(n) for n in (5, 6, 8, 10)]
        expected = [slow_top(units, n) for n in (2, 3, 4)] + [slow_duplicate(units, n) for n in (5, 6, 8, 10)]
        assert found == pytest.approx(expected)


def test_repetition_asks_in_rising_order_and_skips_freely():
    words = "a b c d e f".split() * 3
    ngrams = NGrams(words)
    assert ngrams.duplicate(9) == pytest.approx(slow_duplicate(words, 9))
    with pytest.raises(ValueError, match="rising order"):
        ngrams.top(2)


@needs_shared
def test_repetition_rules_on_real_pages_equal_the_oracle():
    lines = (SAMPLES / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    for text in (json.loads(line)["text"] for line in lines[:40]):
        words = text.split()
        for rule in (r for r in MEASURES if "_gram" in r):
            n = int(next(part for part in rule.split("_") if part.isdigit()))
            slow = slow_top if "top" in rule else slow_duplicate
            assert value(rule, text) == pytest.approx(slow(words, n))


def test_chinese_n_grams_are_as_long_as_english_ones():
    text = "今天天气很好我们去公园" * 2
    for n in (2, 5):
        rule = f"gopher_top_{n}_gram" if n < 5 else f"gopher_duplicate_{n}_grams"
        slow = slow_top if n < 5 else slow_duplicate
        assert value(rule, text, "zh") == pytest.approx(slow(text, CHARACTERS_OF[n]))


def test_datatrove_finds_the_same_duplicates():
    theirs = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter", reason="datatrove is not here")
    again = "one two three four five six one two three four five".split()
    assert theirs.find_all_duplicate(again, 5) == 19  # characters; test_repetition_by_hand has 19 of 41
    assert theirs.find_duplicates("aaaa\nbb\naaaa".split("\n")) == (1, 4)


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("c4_line_words", "Only four words here"),
        ("c4_line_words", "好的，谢谢。"),
        ("c4_line_end", "This line has no mark at its end"),
        ("c4_line_end", "This line trails off into nothing..."),
        ("c4_line_end", "这一行没有句末标点"),
        ("c4_line_javascript", "Please enable JavaScript in your browser first."),
        ("c4_line_policy", "By going on you accept our Terms of Use and more."),
        ("c4_line_policy", "继续使用即表示您同意我们的隐私政策。"),
        ("c4_line_long_word", "see " + "x" * 1001 + " here it is so long."),
        ("boilerplate_notice", "Copyright © 2019 Example Inc. All rights reserved."),
        ("boilerplate_notice", "Click here to see all our other articles of last year"),
        ("boilerplate_notice", "版权所有 © 2020 某某公司 京ICP备12345678号"),
        ("boilerplate_notice", "点击查看更多精彩内容！"),
        ("boilerplate_navigation", "Home | About us | Contact"),
        ("boilerplate_navigation", "Read more »"),
        ("boilerplate_navigation", "上一篇 下一篇"),
        ("boilerplate_navigation", "【返回顶部】"),
    ],
)
def test_lines_that_go(rule, line):
    good = "The quick brown fox jumps over the lazy dog."
    text, counts, gone = LineRules([rule])(f"{good}\n{line}\n{good}")
    assert text == f"{good}\n{good}" and counts == {rule: 1} and gone == [(rule, line)]


@pytest.mark.parametrize(
    "line",
    [
        "He went home and read more about us than he had ever contacted before.",
        "这条规则只允许经过授权的用户访问数据，未经授权的访问会被拒绝。",
        "打开网站主页并找到注册链接，点击进入注册页面。",
        "春眠不覺曉，處處聞啼鳥。",
        'She said "we have to go now, before it is dark."',
    ],
)
def test_lines_that_stay(line):
    assert not is_notice(line) and not is_navigation(line)
    assert LineRules(LINE_RULES)(line)[0] == line


def test_lines_without_spaces_are_measured_in_characters():
    rules = LineRules(["c4_line_words"])
    for line in ("วันนี้อากาศดีมากเราไปเดินเล่นกันเถอะ", "今天天气很好我们", "公園へ行きましょう"):
        assert rules(line)[0] == line
    assert rules("好的，谢谢你")[0] == "" and rules("one two three four")[0] == ""


def test_citations_go_and_lines_stay():
    text, counts, _ = LineRules(["c4_citations"])("Rome[1] was old [citation needed] indeed[[2]3].[来源请求]")
    assert text == "Rome was old  indeed." and counts == {"c4_citations": 5}


# -- rule books --------------------------------------------------------------------------------------------------------


def test_presets_and_changes():
    web = RuleBook.load()
    assert "c4_line_end" not in web.rules and "c4_line_words" in web.rules and web.mask == ("email", "phone", "id")
    assert RuleBook.load("none").rules == ()
    assert RuleBook.load("book").words["gopher_words"] == (50, None)
    assert RuleBook.load("short").characters["gopher_words"] == (10, 160_000)
    assert RuleBook.load("none", rules=["gopher", "-gopher_words"]).rules[0] == "gopher_word_length"
    changed = RuleBook.load(changes={"gopher_words.min": 20, "gopher_words.characters.min": 30})
    assert changed.words["gopher_words"][0] == 20 and changed.characters["gopher_words"][0] == 30
    config = {"thresholds": {"gopher_words": {"min": 7}}, "presets": {"mine": {"rules": ["gopher_words"]}}}
    mine = RuleBook.load("mine", config=config)
    assert mine.rules == ("gopher_words",) and mine.words["gopher_words"] == (7, 100_000)
    assert RuleBook.load().words["gopher_words"] == (50, 100_000)  # the defaults were not changed by it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "wep"}, "--preset wep: known are web, short, book, none"),
        ({"rules": ["gofer"]}, "--rules: unknown 'gofer': did you mean gopher"),
        ({"changes": {"gopher_wrods.min": 1}}, "'gopher_wrods' has no threshold: did you mean gopher_words"),
        ({"changes": {"gopher_words.least": 1}}, "gopher_words.least is unknown"),
        ({"changes": {"gopher_words.min": 200_000}}, "min 200000 above max 100000"),
        ({"config": {"threshold": {}}}, "unknown part 'threshold': did you mean thresholds"),
        ({"config": {"thresholds": {"gopher_words": 5}}}, "gopher_words is 5: write"),
        ({"config": {"thresholds": {"gopher_words": {"min": "x"}}}}, "a bound of gopher_words is 'x'"),
    ],
)
def test_wrong_rule_books(arguments, message):
    with pytest.raises(UserError, match=message):
        RuleBook.load(**arguments)
