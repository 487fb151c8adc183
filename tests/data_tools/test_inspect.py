"""Numbers of a corpus against a plain count in memory; the page; bounded memory; any number of processes."""

from __future__ import annotations

import json
import re
import statistics
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser

import pytest

from data_tools.inspect import inspect, main
from data_tools.inspection.measures import BoundedCounter, Measures, merge, quantile
from data_tools.records import TextField
from minillm.data.tokenizer import load_tokenizer
from minillm.utils.errors import UserError
from tests.support.launching import run

ENGLISH = "The committee has said that the report which they were given is not what it had asked for, {n} times. "
TEXTS = [
    *(f"{ENGLISH.format(n=n) * (n % 7 + 1)}\nA line that comes again.\n<b>{n}</b> & more" for n in range(60)),
    *(f"秦川雄帝宅，函谷壯皇居。第{n}首" for n in range(30)),
    *["the same text again"] * 10,
]


@pytest.fixture
def corpus(tmp_path):
    rows = [{"text": text, "source": "a" if n % 2 else 7} for n, text in enumerate(TEXTS)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ['{"text": 5}', "not json"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "x.jsonl")


def test_numbers_are_those_of_a_plain_count(corpus, tmp_path):
    one = inspect([corpus], tmp_path / "one", workers=1)
    two = inspect([corpus], tmp_path / "two", workers=2, unit_bytes=3000)
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["records"] == 100 and one["records_in"] == 102
    assert one["rejected"] == {"not_text": 1, "not_json": 1}
    assert one["characters"] == sum(map(len, TEXTS)) and one["bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert one["languages"]["en"]["records"] == 70 and one["languages"]["zh"]["records"] == 30
    assert one["characters_a_record"]["p50"] == pytest.approx(statistics.median(map(len, TEXTS)), rel=0.03)
    assert one["equal_texts"] == 0.09
    assert one["lines"]["A line that comes again."] == 60
    assert one["fields"]["source"] == {"int": 50, "str": 50}
    words = Counter(w for t in TEXTS if t.isascii() for w in re.findall("[a-z]+", t.lower()))
    assert one["ngrams"]["words"]["the"] == words["the"] and one["ngrams"]["3 words"]["a line that"] == 60
    pairs = Counter(run[i : i + 2] for t in TEXTS if not t.isascii() for run in re.split(r"[\W\d]+", t)
                    for i in range(len(run) - 1))  # fmt: skip
    assert one["ngrams"]["2 characters"]["秦川"] == pairs["秦川"] == 30
    assert set(map(len, one["ngrams"]["4 characters"])) == {4}
    compressed = [f"{len(zlib.compress(t.encode())) / len(t.encode()):.2f}" for t in TEXTS if len(t.encode()) >= 200]
    assert one["compression"] == Counter(compressed)
    han = sum("\u4e00" <= c <= "\u9fff" for t in TEXTS for c in t)
    assert one["character_classes"]["Han"] == pytest.approx(han / one["characters"], abs=1e-5)
    assert one["longest"][0]["characters"] == max(map(len, TEXTS))
    assert one["shortest"][0]["characters"] == min(map(len, TEXTS))
    assert len(one["samples"]) == 12


class Page(HTMLParser):
    """Collects the text, and whatever would be loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.text, self.loaded = "", []

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.loaded += [v for k, v in attrs if k in ("src", "href")]


def test_the_page_holds_everything_and_escapes_texts(corpus, tmp_path):
    inspect([corpus], tmp_path / "out")
    page = Page()
    page.feed((tmp_path / "out" / "index.html").read_text())
    assert page.loaded == []
    assert "100 records inspected" in page.text and "秦川" in page.text
    assert re.search(r"<b>\d+</b> & more", page.text)  # as text, not as markup


def test_tokens_are_those_of_the_tokenizer(corpus, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    words = ["train", "--kind", "char", "--corpus", str(tmp_path / "t.txt"), "--out", str(tmp_path / "tok")]
    run([sys.executable, "-m", "data_tools.tokenizer", *words])
    found = inspect([corpus], tmp_path / "out", tokenizer=tmp_path / "tok")
    own = load_tokenizer(tmp_path / "tok")
    assert found["tokens"] == sum(len(own(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)


def test_counters_are_bounded_and_say_how_far_they_are_off():
    counter = BoundedCounter(max_keys=100)
    for n in range(5000):
        counter.add([f"rare {n}", "common", "often" if n % 3 == 0 else "common"])
    found = counter.result()
    assert len(counter.counts) <= 100 and found["error"] > 0
    true = Counter(common=5000 + 3333, often=1667)
    for key, count in true.items():
        assert count <= found["top"][key] <= count + found["error"]


def test_equal_texts_are_estimated_when_there_are_many(monkeypatch):
    monkeypatch.setattr("data_tools.inspection.measures.HASHES", 500)
    halves = [Measures(), Measures()]
    for n in range(6000):
        halves[n % 2].add({"id": str(n), "text": f"text {n % 4500}"})  # a quarter repeats another
    assert all(len(half.hashes) == 500 for half in halves)
    assert merge([half.result() for half in halves])["equal_texts"] == pytest.approx(0.25, abs=0.04)


def test_quantiles():
    assert quantile({"0": 1, "320": 1}, 0.5) == 1 and quantile({"0": 1, "320": 1}, 0.9) == 2**10


def test_mistakes(corpus, tmp_path):
    with pytest.raises(UserError, match=r"none of 102 records has text.*--text-column names the field"):
        inspect([corpus], tmp_path / "out", text=TextField("abstract"))
    with pytest.raises(SystemExit):
        main([corpus, "--out", str(tmp_path / "out2"), "--tokenizer", str(tmp_path / "nothing")])
