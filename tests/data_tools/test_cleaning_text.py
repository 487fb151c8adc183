"""Masks, Unicode repair, languages and the stability of cleaning, on examples and on real text.

Expected values are worked out by hand or come from the standards; mojibake is made with Python's own codecs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_tools.cleaning.cleaner import Cleaner
from data_tools.cleaning.explain import shorten, table, width
from data_tools.cleaning.language import identify
from data_tools.cleaning.masking import KINDS, Masker, luhn_holds, parse_kinds, resident_number_holds
from data_tools.cleaning.repair import Repair
from minillm.utils.errors import UserError

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "sft-samples"
needs_shared = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/data is not here")


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("email", "write to a.b+c@mail.example.co.uk, please", "write to <EMAIL>, please"),
        ("email", "邮箱zhang_san@qq.com，欢迎", "邮箱<EMAIL>，欢迎"),
        ("phone", "call +44 20 7946 0958 now", "call <PHONE> now"),
        ("phone", "call (780) 800-7092 or 780-800-7093.", "call <PHONE> or <PHONE>."),
        ("phone", "手机13812345678联系", "手机<PHONE>联系"),
        ("phone", "手机：138 1234 5678，电话010-62345678", "手机：<PHONE>，电话<PHONE>"),
        ("phone", "+86 138-1234-5678", "<PHONE>"),
        ("phone", "客服400-820-8820", "客服<PHONE>"),
        ("resident_id", "身份证11010519491231002X。", "身份证<ID>。"),  # the example of GB 11643-1999
        ("ssn", "SSN 219-09-9999 is his", "SSN <ID> is his"),
        ("card", "card 4111 1111 1111 1111 ok", "card <CARD> ok"),
        ("card", "5500005555555559", "<CARD>"),
        ("ip", "from 8.8.8.8 to 93.184.216.34", "from <IP> to <IP>"),
    ],
)
def test_masks(kind, text, expected):
    masked, counts = Masker([kind])(text)
    assert masked == expected and counts == {kind: expected.count("<")}
    assert Masker(KINDS)(masked) == (masked, {})


@pytest.mark.parametrize(
    "text",
    [
        "In 1999-2000 it was 1,234,567 people, 3.14159265 on average, 2021-03-04 12:30:45.",
        "ISBN 978-3-16-148410-0, version 1.2.3.4, 10.0.0.1, 192.168.1.1 and 127.0.0.1",
        "身份证110105194912310021和订单号12345678901234567890",  # wrong check digit; too long
        "4111 1111 1111 1112 is no card",  # Luhn does not hold
        "a@b, @name, user@localhost",
        "12812345678 是一个号码",  # Chinese mobiles begin with 13 to 19
        "000-12-3456 666-12-3456 900-12-3456",  # never given out
    ],
)
def test_what_is_no_personal_data_stays(text):
    assert Masker(KINDS)(text) == (text, {})


def test_check_digits():
    assert resident_number_holds("11010519491231002X") and resident_number_holds("440524188001010014")
    assert not resident_number_holds("110105194912310021") and not resident_number_holds("11010519491331002X")
    assert luhn_holds("79927398713") and not luhn_holds("79927398710")  # the example of the Luhn article


def test_mask_names():
    assert parse_kinds(["id"]) == ("resident_id", "card", "ssn", "ip")
    assert parse_kinds(["none"]) == () and parse_kinds(["all"]) == tuple(KINDS)
    with pytest.raises(UserError, match="--mask mail: known are email"):
        parse_kinds(["mail"])


# -- repair ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("schÃ¶n â€” dâ€™accord", "schön — d’accord"),
        ("ä¸­æ–‡ and ok\nplain", "中文 and ok\nplain"),
        ("e\u0301te\u0301", "été"),
        ("\ufeffa\u200bb\u00adc\x00d\x07", "abcd"),
        ("one\r\ntwo\rthree\u2028four\x0bfive", "one\ntwo\nthree\nfour\nfive"),
        ("a\u00a0b\u2003c  d\te", "a b c d e"),
        ("a  \n\n\n\n\nb\n", "a\n\nb"),
        ("\n\n  indented\n    more", "  indented\n    more"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("ﬁne oﬃce", "fine office"),
        ("ＡＢＣ，１２３。　好", "ＡＢＣ，１２３。　好"),  # full-width letters and the ideographic space stay
        ("می\u200cخواهم 👩\u200d👩", "می\u200cخواهم 👩\u200d👩"),  # joiners that mean something
        ("a\u200cb 中\u200d文", "ab 中文"),
        ("&amp;lt; stays", "&amp;lt; stays"),
        ("’quoted’ “text” – naïve café, €5, 20°", "’quoted’ “text” – naïve café, €5, 20°"),
    ],
)
def test_repair(broken, whole):
    assert Repair()(broken) == whole
    assert Repair()(whole) == whole


def test_repair_options():
    assert Repair(form="NFKC")("ＡＢＣ，１２３") == "ABC,123"
    assert Repair(form="none")("e\u0301") == "e\u0301"
    assert Repair(entities="decode")("a &amp;amp;&lt;b&gt; &nbsp;c") == "a &<b> c"
    assert Repair(spaces="keep")("x  =  1\t# one  \n") == "x  =  1\t# one"


NASTY = [
    *("the", "a", "and", "中文", "，", "。", "\n", "\n", "  ", "\t", " ", " ", "\r\n", "\u200b", "\ufeff", "\u00a0"),
    *("é", "e\u0301", "schÃ¶n", "â€™", "&amp;amp;", "&#8217;", "&lt;b&gt;", "\x00", "\x1b[1m", "ﬁ", "Â", "\u200d"),
    *("👩", "می", "\u2028", "İ", "[1]", "[[2]", "]", "[edit]", "a@b.com", "13812345678", "+1 780 800 7092", "8.8.8.8"),
    *("4111111111111111", "-", "(", "All rights reserved.", "Home |", "点击查看", "javascript", "...", "…", "{"),
    *("\u3000", "ｱ", "\x85", "Ã", "\ufffd", "1", "7"),
]


def nasty_texts(count: int) -> list[str]:
    random.seed(11)
    return ["".join(random.choices(NASTY, k=random.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"form": "NFKC"}, {"entities": "decode"}, {"spaces": "keep"}])
def test_repair_is_stable(options):
    repair = Repair(**options)
    for text in nasty_texts(1500):
        once = repair(text)
        assert repair(once) == once, repr(text)
        assert not any(c in once for c in "\r\x00\ufeff\u200b\u2028\x85") and not once.endswith((" ", "\n"))


@pytest.mark.parametrize("options", [{}, {"rules": ["gopher", "c4", "boilerplate"], "entities": "decode"}])
def test_cleaning_is_stable(options):
    cleaner = Cleaner(options)
    for text in nasty_texts(600):
        once = cleaner.clean(text)
        again = cleaner.clean(once.text)
        assert again.text == once.text, repr(text)
        assert (again.reason, again.language, again.verdicts) == (once.reason, once.language, once.verdicts)
        assert not again.masks and not again.lines and not again.repaired


# -- languages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。", "zh"),
        ("我们今天去公园。", "zh"),
        ("今日は天気がいいですね。公園へ行きましょう。", "ja"),
        ("東京都知事選挙の結果", "ja"),
        ("我们看了《となりのトトロ》这部电影，非常好看，大家都很喜欢，还想再看一次，明天就去电影院买票吧，好不好呢？你觉得怎么样，"
         "要不要一起去？", "zh"),
        ("오늘은 날씨가 좋습니다. 공원에 갑시다.", "ko"),
        ("It is the first of many books that she wrote about her family, and it was printed in London in the year of "
         "the great fire, which they say began in a bakery.", "en"),
        ("Het is het eerste van de vele boeken die zij over haar familie schreef, en het is gedrukt in Londen.", "nl"),
        ("Das ist das erste von vielen Büchern, die sie über ihre Familie schrieb, gedruckt in London.", "de"),
        ("C'est le premier des nombreux livres qu'elle a écrits sur sa famille, imprimé à Londres.", "fr"),
        ("Это первая из многих книг, которые она написала о своей семье.", "ru"),
        ("123 456 ... 789", "und"),
        ("", "und"),
    ],
)  # fmt: skip
def test_languages(text, language):
    found, score = identify(text)
    assert found == language and 0 <= score <= 1


def test_language_of_a_long_text_looks_at_its_middle_too():
    french = "Les enfants jouent dans le jardin avec leurs amis pendant que les parents préparent le repas. " * 40
    assert identify(french)[0] == "fr"


# -- real data ---------------------------------------------------------------------------------------------------------


def c4_texts() -> list[str]:
    return [json.loads(line)["text"] for line in (SAMPLES / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]


@needs_shared
def test_real_pages_are_english_and_cleaning_them_is_stable():
    cleaner = Cleaner({"rules": ["gopher", "c4", "fineweb", "boilerplate"]})
    for text in c4_texts():
        once = cleaner.clean(text)
        again = cleaner.clean(once.text)
        assert once.language == "en" or not once.text
        assert (again.text, again.reason) == (once.text, once.reason)
        assert not again.masks and not again.lines and not again.repaired


@needs_shared
def test_real_chinese_answers_are_stable():
    cleaner = Cleaner({"rules": ["gopher", "c4", "boilerplate"]})
    for record in json.loads((SAMPLES / "alpaca_zh_demo.json").read_text(encoding="utf-8")):
        once = cleaner.clean(record["instruction"] + "\n" + record["output"])
        again = cleaner.clean(once.text)
        assert (again.text, again.reason, again.lines) == (once.text, once.reason, {})


@needs_shared
def test_mojibake_made_of_real_text_is_repaired():
    texts = [text for text in c4_texts() if "’" in text][:30]
    assert texts
    for text in texts:
        line = next(line for line in text.split("\n") if "’" in line)
        broken = line.encode().decode("windows-1252", errors="replace")
        if "\ufffd" not in broken:
            assert Repair()(broken) == Repair()(line)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_align_by_places_on_the_screen():
    assert width("中a") == 3 and width("e\u0301") == 1
    assert shorten("床前明月光", 7) == "床前明…"
    lines = table([("rule", "值"), ("春眠", "1"), ("abc", "22")], "")
    assert lines == ["rule  值", "春眠  1", "abc   22"]
