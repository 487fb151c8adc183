"""Draws of exact size, the same for any number of processes; the best by a score; the same share of every value."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from data_tools.records import iterate_records
from data_tools.sample import draw, main
from minillm.utils.errors import UserError

KINDS = ["a"] * 700 + ["b"] * 250 + [None] * 50


@pytest.fixture
def corpus(tmp_path):
    rows = [{"id": str(n), "text": f"text {n}", "kind": KINDS[n * 7 % 1000], "score": (n * 37) % 1000 / 10}
            for n in range(1000)]  # fmt: skip
    for row in rows:
        if row["kind"] is None:
            del row["kind"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "x.jsonl")]


def drawn(out) -> list[dict]:
    return list(iterate_records(out))


def test_a_share_is_exact_and_random(corpus, tmp_path):
    summary = draw(corpus, tmp_path / "a", share=0.05, unit_bytes=5000, workers=1)
    draw(corpus, tmp_path / "b", share=0.05, unit_bytes=5000, workers=2)
    draw(corpus, tmp_path / "c", share=0.05, unit_bytes=5000, seed=1)
    one, two, other = (drawn(tmp_path / name) for name in "abc")
    assert one == two and len(one) == len(other) == 50 == summary["records_out"]
    assert one != other
    numbers = [int(r["id"]) for r in one]
    assert numbers == sorted(numbers) and 350 < sum(numbers) / 50 < 650
    assert summary["drawn"] == {"(none)": {"records": 1000, "drawn": 50}}


def test_every_value_gets_its_share(corpus, tmp_path):
    draw(corpus, tmp_path / "a", share=0.2, by="kind", unit_bytes=3000)
    assert Counter(r.get("kind") for r in drawn(tmp_path / "a")) == {"a": 140, "b": 50, None: 10}
    draw(corpus, tmp_path / "b", records=33, by="kind")  # 23.1, 8.25, 1.65
    assert Counter(r.get("kind") for r in drawn(tmp_path / "b")) == {"a": 23, "b": 8, None: 2}


def test_the_best_by_a_score(corpus, tmp_path):
    everything = list(iterate_records(corpus))
    draw(corpus, tmp_path / "a", records=100, best="score", unit_bytes=3000)
    expected = sorted(everything, key=lambda r: -r["score"])[:100]
    assert drawn(tmp_path / "a") == sorted(expected, key=lambda r: int(r["id"]))
    draw(corpus, tmp_path / "b", least=90, best="score")
    assert drawn(tmp_path / "b") == [r for r in everything if r["score"] >= 90]
    draw(corpus, tmp_path / "c", share=0.02, best="score", by="kind")
    found = drawn(tmp_path / "c")
    assert Counter(r.get("kind") for r in found) == {"a": 14, "b": 5, None: 1}
    best_b = sorted((r for r in everything if r.get("kind") == "b"), key=lambda r: -r["score"])[:5]
    assert [r for r in found if r.get("kind") == "b"] == sorted(best_b, key=lambda r: int(r["id"]))


def test_records_without_text_can_be_drawn(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"instruction": str(n)} for n in range(100)]))
    main([str(tmp_path / "x.json"), "--out", str(tmp_path / "out"), "--records", "10"])
    found = list(iterate_records(tmp_path / "out", None))
    assert len(found) == 10 and all("instruction" in r for r in found)


@pytest.mark.parametrize("options, said", [
    ({}, "either --share"), ({"share": 0.1, "records": 3}, "either --share"), ({"share": 0.0}, "above 0"),
    ({"share": 1.5}, "at most 100%"), ({"records": 1001}, "the corpus has 1,000 records"),
    ({"share": 0.1, "by": "nothing"}, "no record has the field 'nothing'"),
    ({"share": 0.1, "best": "kind"}, "no record has a number in the field 'kind'"),
    ({"share": 0.1, "least": 3}, "--least needs --best"),
])  # fmt: skip
def test_mistakes(corpus, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        draw(corpus, tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("part-*"))
