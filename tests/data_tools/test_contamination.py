"""Evaluation items in a corpus: against brute force, planted in real texts, the rule for common n-grams, kills."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from data_tools import contamination
from data_tools.contamination import check_contamination, main
from data_tools.deduplication import contamination as passes
from data_tools.deduplication.evaluation import Lookup, build_index, read_sets
from data_tools.records import TextField
from minillm.utils.errors import UserError
from tests.data_tools.killing import killed_runs
from tests.data_tools.planted_duplicates import real_texts, tokens
from tests.support.launching import ROOT

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data in {SHARED} is not there")


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found_in(out: Path) -> dict[str, set[str]]:
    """Items of each contaminated document."""
    return {line["id"]: {item["item"] for item in line["items"]} for line in lines_of(out / "contaminated.jsonl")}


def words(number: int, seed: int, vocabulary: int = 5000) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(vocabulary)}" for _ in range(number)]


def check(tmp_path: Path, corpus: list[str], items: list[dict], name: str = "out", **options) -> Path:
    """Run it on texts and items; ids are numbers."""
    source = write_lines(tmp_path / "corpus.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(corpus)])
    sets = write_lines(tmp_path / "items.jsonl", [{"id": f"q{n}", **item} for n, item in enumerate(items)])
    check_contamination([source], [sets], tmp_path / name, workers=options.pop("workers", 1), **options)
    return tmp_path / name


# -- against brute force -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, max_documents, min_share", [(3, 0, 0), (3, 4, 0), (2, 6, 0), (4, 0, 0.3), (3, 3, 0.2)])
def test_hits_are_those_of_sets_of_tuples(tmp_path, monkeypatch, n, max_documents, min_share):
    corpus = [" ".join(words(random.Random(n).randrange(5, 40), number, 12)) for number in range(60)]
    items = [{"text": " ".join(words(number % 9 + 1, 1000 + number, 12))} for number in range(40)]

    def grams(text):
        found = text.split()
        return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}

    held = [grams(text) for text in corpus]
    count = defaultdict(int)
    for document in held:
        for gram in document:
            count[gram] += 1
    expected = {}
    for number, document in enumerate(held):
        left = {gram for gram in document if not max_documents or count[gram] <= max_documents}
        share = {
            f"q{q}": len(grams(i["text"]) & left) / len(grams(i["text"]))
            for q, i in enumerate(items)
            if grams(i["text"])
        }
        if max(share.values()) >= max(min_share, 1e-9):
            expected[str(number)] = {item for item, value in share.items() if value > 0}
    assert 0 < len(expected)
    monkeypatch.setattr(passes, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(passes, "LISTED_ITEMS", 1000)
    out = check(tmp_path, corpus, items, words=(n, n), max_documents=max_documents, min_share=min_share)
    assert found_in(out) == expected
    summary = json.loads((out / "summary.json").read_text())
    assert summary["contaminated"] == len(expected)
    eval_grams = {gram for item in items for gram in grams(item["text"])}
    assert summary["common_ngrams"] == sum(count[g] > max_documents for g in eval_grams) * (max_documents > 0)
    assert summary["sets"][0]["too_short"] == sum(len(item["text"].split()) < n for item in items)
    assert {line["item"] for line in lines_of(out / "items.jsonl")} == {
        item for one in expected.values() for item in one
    }


def test_lookup_is_membership():
    rng = np.random.default_rng(0)
    grams = np.unique(rng.integers(0, 1 << 63, 5000, np.uint64) * np.uint64(2))
    hashes = np.concatenate([rng.choice(grams, 3000), rng.integers(0, 1 << 63, 3000, np.uint64)])
    places, found = Lookup(grams).find(hashes)
    assert places.tolist() == np.flatnonzero(np.isin(hashes, grams)).tolist()
    assert (grams[found] == hashes[places]).all()
    for edge in (np.zeros(1, np.uint64), np.full(1, (1 << 64) - 1, np.uint64)):
        assert len(Lookup(edge).find(edge)[0]) == 1


# -- rules -------------------------------------------------------------------------------------------------------------


def test_thirteen_words_in_a_row_are_needed(tmp_path):
    item = words(40, 1)
    corpus = [
        " ".join(["before", *item[5:18], "after"]),
        " ".join(["before", *item[5:17], "after"]),
        " ".join([*item[5:12], "between", *item[12:18]]),
        " -- ".join(item[20:33]).upper() + "!",
    ]
    out = check(tmp_path, corpus, [{"text": " ".join(item)}, {"text": " ".join(words(40, 2))}])
    assert found_in(out) == {"0": {"q0"}, "3": {"q0"}}
    shown = lines_of(out / "contaminated.jsonl")[0]["items"][0]
    assert shown["ngram"] == " ".join(item[5:18]) and shown["ngrams"] == 1
    assert shown["share"] == pytest.approx(1 / 28, abs=1e-4)
    (line,) = lines_of(out / "items.jsonl")
    assert (line["item"], line["ngrams"], line["found"], line["documents"]) == ("q0", 28, 2, 2)


@pytest.mark.parametrize("length, n", [(5, 8), (8, 8), (10, 10), (13, 13), (90, 13)])
def test_n_is_the_fifth_percentile_of_the_lengths(tmp_path, length, n):
    """Brown et al. 2020, appendix C: from 8 to 13 words."""
    items = [{"id": f"{i}", "question": " ".join(words(length if i < 10 else 50, i))} for i in range(100)]
    path = write_lines(tmp_path / "set.jsonl", items)
    assert build_index(read_sets([path])).sets[0].ngrams == {"words": n}


def test_chinese_by_characters(tmp_path):
    poem = "床前看月光疑是地上霜舉頭望山月低頭思故鄉" + "白日依山盡黃河入海流欲窮千里目更上一層樓"
    corpus = [
        "前言：" + "，".join([poem[3:13], poem[13:23]]) + "。後記",
        poem[3:22],
        "Translated: " + poem + " (Li Bai)",
    ]
    out = check(tmp_path, corpus, [{"question": "誰寫的？", "text": poem}])
    assert found_in(out) == {"0": {"q0"}, "2": {"q0"}}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sets"][0]["n"] == {"characters": 20}
    assert lines_of(out / "contaminated.jsonl")[0]["items"][0]["ngram"] == poem[3:23]


def test_an_english_item_with_a_chinese_word_is_of_words(tmp_path):
    item = [*words(12, 1), "雙龍", *words(12, 2)]
    out = check(tmp_path, [" ".join(item[6:20])], [{"text": " ".join(item)}])
    assert json.loads((out / "summary.json").read_text())["sets"][0]["n"] == {"words": 13}
    assert found_in(out) == {"0": {"q0"}}


def test_common_n_grams_count_for_nothing(tmp_path):
    phrase = " ".join(words(13, 1))
    corpus = [f"{phrase} {' '.join(words(20, 100 + n))}" for n in range(11)]
    item = {"text": f"{phrase} {' '.join(words(20, 5))}"}
    out = check(tmp_path, corpus, [item])
    assert found_in(out) == {}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["common_ngrams"] == 1 and summary["sets"][0]["only_common"] == 1
    assert summary["common_examples"] == [{"ngram": phrase, "documents": 11}]
    assert len(found_in(check(tmp_path, corpus[:10], [item], "ten"))) == 10
    assert len(found_in(check(tmp_path, corpus, [item], "all", max_documents=0))) == 11


def test_all_texts_of_an_item_are_looked_for(tmp_path):
    a, b, c, d = (" ".join(words(20, seed)) for seed in range(4))
    item = {
        "question": a, "choices": {"text": ["yes no", b], "label": ["A", "B"]},
        "messages": [{"role": "user", "content": c}], "number": 3, "nothing": None,
    }  # fmt: skip
    assert len(found_in(check(tmp_path, [a, b, c, d], [item]))) == 3
    assert list(found_in(check(tmp_path, [a, b, c, d], [item], "one", fields=["question"]))) == ["0"]
    with pytest.raises(UserError, match="answer"):
        check(tmp_path, [a], [item], "none", fields=["question", "answer"])


def test_too_short_items_are_an_error_where_all_are(tmp_path, capsys):
    with pytest.raises(UserError, match="lower --ngram"):
        check(tmp_path, ["a b c d"], [{"text": "a b c"}])
    out = check(tmp_path, ["x a b c d", "b c"], [{"text": "a b c"}], "low", words=(3, 5))
    assert found_in(out) == {"0": {"q0"}}
    check(tmp_path, ["x"], [{"text": "a b c"}, {"text": "a"}, {"text": " ".join(words(20, 1))}], "warn")
    assert "2 items of items.jsonl are shorter" in capsys.readouterr().err


def test_conversations_and_bad_records(tmp_path):
    item = " ".join(words(20, 1))
    corpus = write_lines(
        tmp_path / "chat.jsonl",
        [
            {"messages": [{"role": "user", "content": "Repeat"}, {"role": "assistant", "content": item}]},
            {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "no"}]},
            {"nothing": 1},
        ],
    )
    sets = write_lines(tmp_path / "set.jsonl", [{"question": item}])
    summary = check_contamination([corpus], [sets], tmp_path / "out", remove=True, workers=1)
    assert found_in(tmp_path / "out") == {"chat.jsonl:1": {"set.jsonl:1"}}
    assert summary["rejected"] == {"contaminated": 1, "no_text": 1}
    assert (summary["records_in"], summary["records_out"], summary["contaminated"]) == (3, 1, 1)
    assert [line["id"] for line in lines_of(tmp_path / "out" / "part-00000.jsonl")] == ["chat.jsonl:2"]


# -- the command -------------------------------------------------------------------------------------------------------


def planted(folder: Path) -> tuple[list[Path], Path]:
    """Three files of texts, some of which hold an item."""
    folder.mkdir()
    items = [{"id": f"q{n}", "question": " ".join(words(30, n))} for n in range(20)]
    rng = random.Random(0)
    paths = []
    for name in "abc":
        texts = []
        for number in range(30):
            text = words(60, rng.random())
            if number % 4 == 0:
                text[10:10] = items[rng.randrange(20)]["question"].split()[3:25]
            texts.append({"id": f"{name}{number}", "text": " ".join(text), "kept": number})
        paths.append(write_lines(folder / f"{name}.jsonl", texts))
    return paths, write_lines(folder / "items.jsonl", items)


def result_of(out: Path) -> tuple:
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    summary = {key: value for key, value in summary.items() if key not in ("seconds", "examples")}
    parts = "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("part-*")))
    return parts, summary, *((out / name).read_text(encoding="utf-8") for name in ("contaminated.jsonl", "items.jsonl"))


def test_workers_and_units_change_nothing(tmp_path, monkeypatch):
    paths, items = planted(tmp_path / "in")
    options = dict(remove=True, unit_bytes=4000)
    check_contamination(paths, [items], tmp_path / "one", workers=1, **options)
    check_contamination(paths, [items], tmp_path / "two", workers=2, **options)
    check_contamination(paths, [items], tmp_path / "whole", workers=1, remove=True)
    assert result_of(tmp_path / "one") == result_of(tmp_path / "two")
    for part in (0, 2, 3):
        assert result_of(tmp_path / "one")[part] == result_of(tmp_path / "whole")[part]
    assert len(found_in(tmp_path / "one")) == 24 and len(result_of(tmp_path / "one")[0].splitlines()) == 66


def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    paths, items = planted(tmp_path / "in")
    line = [*map(str, paths), "--eval", str(items), "--remove", "--workers", "1", "--unit-bytes", "4000", "--out"]
    main([*line, str(tmp_path / "whole")])
    assert len(list(killed_runs("data_tools.contamination", [*line, str(tmp_path / "killed")], 17))) >= 2
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")


def test_wrong_options(tmp_path, capsys):
    paths, items = planted(tmp_path / "in")
    line = [str(paths[0]), "--eval", str(items), "--workers", "1", "--out", str(tmp_path / "out")]
    for wrong in (
        ["--ngram", "0"],
        ["--ngram", "9-8"],
        ["--characters", "x"],
        ["--min-share", "2"],
        ["--max-documents", "-1"],
    ):
        with pytest.raises(SystemExit):
            main([*line, *wrong])
    main(line)
    main(line)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*line, "--remove"])
    with pytest.raises(SystemExit):
        main([str(paths[0]), "--eval", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "other")])
    assert "does not exist" in capsys.readouterr().err


# -- real texts --------------------------------------------------------------------------------------------------------


@needs_shared
def test_gsm8k_questions_planted_in_real_pages(tmp_path):
    """100 questions, in another case and with other marks, in abstracts and pages: all found, nothing else."""
    texts = real_texts(SHARED, chinese_poems=0)
    pages = [*texts["abstracts"][:600], *texts["pages"]]
    rng = random.Random(0)
    items = lines_of(SHARED / "gsm8k" / "train.jsonl")
    chosen = rng.sample(range(len(items)), 100)
    places = rng.sample(range(len(pages)), 100)
    for place, number in zip(places, chosen):
        asked = items[number]["question"].upper().replace(",", " -").replace(".", " ;")
        pages[place] = f"{pages[place][:300]}\n{asked}\n{pages[place][300:]}"
    source = write_lines(tmp_path / "pages.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(pages)])
    summary = check_contamination([source], [SHARED / "gsm8k" / "train.jsonl"], tmp_path / "out", workers=1)
    assert summary["sets"][0]["n"] == {"words": 13}
    found = {line["id"]: line["items"][0] for line in lines_of(tmp_path / "out" / "contaminated.jsonl")}
    expected = {
        str(p): f"train.jsonl:{n + 1}" for p, n in zip(places, chosen) if len(tokens(items[n]["question"])) >= 13
    }
    assert {identity: item["item"] for identity, item in found.items()} == expected


@needs_shared
def test_poems_are_found_in_their_own_collection(tmp_path):
    first, second = sorted((SHARED / "tang-poems").glob("*.json"))[:2]
    summary = check_contamination(
        [first, second], [first], tmp_path / "out", fields=["paragraphs"], text=TextField("paragraphs"), workers=1
    )
    (one,) = summary["sets"]
    assert one["n"] == {"characters": 20} and one["items"] == 1000
    assert one["found"] + one["too_short"] == 1000 and one["found_four_fifths"] == one["found"]
    assert one["found"] <= summary["contaminated"] <= one["found"] + 100
    assert contamination.MAX_DOCUMENTS == 10
