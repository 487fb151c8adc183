"""The command that removes duplicates: rules, order, kills, real texts against brute force."""

from __future__ import annotations

import json
import os
import random
import statistics
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data_tools.dedup import Duplicates, deduplicate, main
from data_tools.deduplication import buckets, fingerprints
from data_tools.deduplication.minhash import (
    Bands,
    candidate_probability,
)
from data_tools.deduplication.passes import Passes
from data_tools.records import TextField
from minillm.utils.errors import UserError
from tests.data_tools.killing import killed_runs
from tests.data_tools.planted_duplicates import (
    components,
    distinct_texts,
    measure_quality,
    peak_of_command,
    plant,
    real_texts,
    shingle_set,
    similar_pairs,
)
from tests.support.launching import ROOT

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data in {SHARED} is not there")

# -- the command -------------------------------------------------------------------------------------------------------


def write_records(path: Path, texts, **fields) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": f"{path.stem}-{number}", "text": text, **fields}, ensure_ascii=False) + "\n")
    return path


def result_of(out: Path) -> tuple[str, str, dict]:
    """What a run left: all records, the list of duplicates, the summary without what differs by nature."""
    parts = "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("part-*")))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for key in ("seconds", "bytes_in", "inputs"):
        summary.pop(key)
    return parts, (out / "duplicates.jsonl").read_text(encoding="utf-8"), summary


def kept_ids(out: Path) -> list[str]:
    return [json.loads(line)["id"] for line in result_of(out)[0].splitlines()]


def words(number: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(number))


def test_exact_duplicates_are_those_of_a_dictionary(tmp_path):
    rng = random.Random(3)
    texts = [" ".join(rng.choices(["a", "b", "é", "e\u0301", "B", " ", "\n"], k=3)) + "x" for _ in range(600)]
    write_records(tmp_path / "in.jsonl", texts)
    deduplicate([tmp_path / "in.jsonl"], tmp_path / "out", Duplicates(method="exact"), workers=1)
    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        seen.setdefault(" ".join(unicodedata.normalize("NFC", text).split()), number)
    assert kept_ids(tmp_path / "out") == [f"in-{number}" for number in sorted(seen.values())]
    summary = result_of(tmp_path / "out")[2]
    assert summary["rejected"] == {"exact_duplicate": 600 - len(seen)}
    assert summary["records_in"] == 600 == summary["records_out"] + 600 - len(seen)


def test_near_duplicates_go_and_fields_stay(tmp_path):
    text = words(300)
    other = words(300, 1)
    near = text.replace(text.split()[150], "changed", 1)
    write_records(tmp_path / "in.jsonl", [text, other, near, text, near.upper()], source="web", score=0.5)
    main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
    parts, duplicates, summary = result_of(tmp_path / "out")
    assert [json.loads(line) for line in parts.splitlines()] == [
        {"id": "in-0", "text": text, "source": "web", "score": 0.5},
        {"id": "in-1", "text": other, "source": "web", "score": 0.5},
    ]
    lines = [json.loads(line) for line in duplicates.splitlines()]
    assert [(line["id"], line["kept"], line["kind"]) for line in lines] == [
        ("in-2", "in-0", "near"), ("in-3", "in-0", "exact"), ("in-4", "in-0", "near"),
    ]  # fmt: skip
    assert all(line["similarity"] >= 0.9 for line in lines)
    (cluster,) = summary["largest_clusters"]
    assert cluster["removed_documents"] == 3 and cluster["kept"]["text"] == text[:200]
    assert summary["rejected"] == {"near_duplicate": 2, "exact_duplicate": 1}


def test_the_longest_of_a_cluster_stays(tmp_path):
    text = words(200)
    write_records(tmp_path / "in.jsonl", [text, text + " and more", words(50, 2)])
    main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--keep", "longest", "--workers", "1"])
    assert kept_ids(tmp_path / "out") == ["in-1", "in-2"]


def test_against_another_corpus(tmp_path):
    text, other = words(200), words(200, 1)
    write_records(tmp_path / "reference.jsonl", [text, "short one", words(80, 9)])
    write_records(tmp_path / "in.jsonl", [other, text + " tail", "short one", other, words(90, 4)])
    deduplicate(
        [tmp_path / "in.jsonl"], tmp_path / "out", Duplicates(keep="longest"), against=[tmp_path / "reference.jsonl"],
        workers=1,
    )  # fmt: skip
    parts, duplicates, summary = result_of(tmp_path / "out")
    assert kept_ids(tmp_path / "out") == ["in-0", "in-4"]
    lines = [json.loads(line) for line in duplicates.splitlines()]
    assert [(line["kept"], line.get("reference", False)) for line in lines] == [
        ("reference-0", True), ("reference-1", True), ("in-0", False),
    ]  # fmt: skip
    assert summary["rejected"] == {
        "near_duplicate_of_reference": 1, "exact_duplicate_of_reference": 1, "exact_duplicate": 1
    }  # fmt: skip
    assert summary["reference_records"] == 3


def test_conversations_are_compared_by_their_texts(tmp_path):
    def conversation(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    records = [
        conversation("Who wrote it?", words(100)), conversation("Who wrote it?", words(100)),
        conversation("Who wrote it?", words(100, 1)), conversation("Who wrote this?", words(100)),
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    deduplicate([tmp_path / "in.jsonl"], tmp_path / "out", workers=1)
    assert kept_ids(tmp_path / "out") == ["in.jsonl:1", "in.jsonl:3"]


@pytest.mark.parametrize(
    "texts, kept",
    [
        (["only one"], [0]),
        (["a b", "A, b!", "a b", "b a", "。", "。", "…"], [0, 3, 4, 6]),  # short: all tokens must agree; marks: exactly
        (["一二三四", "一二，三四", "一二三五"], [0, 2]),
        (["same text again and again"] * 50, [0]),
    ],
)
def test_small_inputs(tmp_path, texts, kept):
    write_records(tmp_path / "in.jsonl", texts)
    deduplicate([tmp_path / "in.jsonl"], tmp_path / "out", workers=1)
    assert kept_ids(tmp_path / "out") == [f"in-{number}" for number in kept]


def test_nothing_but_rejected_records(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ""}\nnot json\n{"text": {"a": 1}}\n')
    summary = deduplicate([tmp_path / "in.jsonl"], tmp_path / "out", workers=1)
    assert (summary["records_in"], summary["records_out"], sum(summary["rejected"].values())) == (3, 0, 3)
    assert "largest_clusters" in summary and summary["statistics"]["clusters"] == 0


@pytest.mark.parametrize("method", ["minhash", "both"])
def test_ten_thousand_equal_texts_cost_ten_thousand_comparisons(tmp_path, method):
    write_records(tmp_path / "in.jsonl", [words(20)] * 10_000 + [words(20, 1)])
    summary = deduplicate([tmp_path / "in.jsonl"], tmp_path / "out", Duplicates(method=method), workers=1)
    assert summary["records_out"] == 2
    assert summary["statistics"]["compared"] <= 14 * 10_000
    assert summary["largest_clusters"][0]["removed_documents"] == 9_999


def corpus(folder: Path, seed: int = 0) -> list[Path]:
    """Three files of texts with exact and near copies across them."""
    rng = random.Random(seed)
    texts = [words(rng.randrange(30, 90), number) for number in range(60)]
    for number in range(60):
        copy = texts[rng.randrange(60)].split()
        if number % 3:
            copy[rng.randrange(len(copy))] = "other"
        texts.append(" ".join(copy))
    rng.shuffle(texts)
    folder.mkdir()
    return [
        write_records(folder / f"{name}.jsonl", texts[start : start + 40])
        for start, name in ((0, "a"), (40, "b"), (80, "c"))
    ]


@pytest.mark.parametrize("method", ["exact", "minhash", "both"])
def test_workers_units_runs_and_parts_change_nothing(tmp_path, monkeypatch, method):
    paths = corpus(tmp_path / "in")
    what = Duplicates(method=method)
    deduplicate(paths, tmp_path / "one", what, workers=1)
    expected = result_of(tmp_path / "one")
    assert expected[2]["records_out"] < 100
    if method == "both":
        monkeypatch.setattr("data_tools.deduplication.passes.SMALL", 0)
        deduplicate(paths, tmp_path / "three", what, workers=2, unit_bytes=16000)
        assert result_of(tmp_path / "three") == expected
    monkeypatch.setattr(fingerprints, "RUN_DOCUMENTS", 7)
    monkeypatch.setattr(fingerprints, "BATCH_BYTES", 500)
    monkeypatch.setattr(buckets, "PART_DOCUMENTS", 25)
    monkeypatch.setattr(buckets, "_PAIRS_AT_A_TIME", 5)
    deduplicate(paths, tmp_path / "parts", what, workers=1, unit_bytes=3000)
    found = result_of(tmp_path / "parts")
    assert found == expected


def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    """SIGKILL at every 23rd file that is about to get its name, in all passes, until the command comes through."""
    paths = corpus(tmp_path / "in")
    line = [*map(str, paths), "--workers", "1", "--unit-bytes", "6000", "--out"]
    main([*line, str(tmp_path / "whole")])
    reached = []
    for _ in killed_runs("data_tools.dedup", [*line, str(tmp_path / "killed")], 23):
        reached.append({path.name.split("-")[0] for path in (tmp_path / "killed" / ".work").glob("*-*.json")})
        assert not (tmp_path / "killed" / "summary.json").exists()
    assert reached[0] == {"run"} and {"run", "exact", "near"} in reached and "dedup" in reached[-1]
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed" / ".work")) == ["command.json", "lock"]


def test_another_command_in_the_same_folder_is_refused(tmp_path, capsys):
    write_records(tmp_path / "in.jsonl", [words(20)])
    line = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    main(line)
    main(line)  # finished already
    with pytest.raises(SystemExit):
        main([*line, "--threshold", "0.7"])
    assert "another command" in capsys.readouterr().err
    for wrong in (["--threshold", "1.5"], ["--bands", "0"], ["--ngram", "x"]):
        with pytest.raises(SystemExit):
            main([*line, *wrong])


def test_input_that_changes_between_two_passes_is_an_error(tmp_path, monkeypatch):
    path = write_records(tmp_path / "in.jsonl", [words(20), words(20, 1)])
    decide = Passes.decide

    def then_change(self, *arguments):
        decide(self, *arguments)
        path.write_text(path.read_text().splitlines(keepends=True)[0])

    monkeypatch.setattr(Passes, "decide", then_change)
    with pytest.raises(UserError, match="changed between two passes"):
        deduplicate([path], tmp_path / "out", workers=1)


# -- real texts --------------------------------------------------------------------------------------------------------


@needs_shared
def test_planted_duplicates_are_found_as_the_s_curve_says(tmp_path):
    """English and Chinese: candidates by Jaccard range within 4 standard deviations; verified ones by true Jaccard."""
    found = real_texts(SHARED, chinese_poems=300)
    pairs = plant(distinct_texts(found["abstracts"][:500]) + distinct_texts(found["poems"]))
    met, _ = measure_quality(pairs, tmp_path, "none", workers=1)
    similarities = np.array([pair[3] for pair in pairs])
    assert (similarities == 1).sum() > 150
    for low, high in [(0, 0.4), (0.4, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 0.99), (0.99, 1.01)]:
        inside = np.flatnonzero((similarities >= low) & (similarities < high))
        expected = [candidate_probability(similarities[i], Bands(14, 8)) for i in inside]
        deviation = sum(p * (1 - p) for p in expected) ** 0.5
        assert len(inside) >= 10
        assert abs(sum(met[i] for i in inside) - sum(expected)) <= 4 * deviation + 0.5, (low, high)
    true, removals = measure_quality(pairs, tmp_path, "jaccard", workers=1)
    for i, pair in enumerate(pairs):
        assert true[i] == (met[i] and pair[3] >= 0.8) or not true[i] and pair[3] >= 0.8 and not met[i]
    estimated, removals = measure_quality(pairs, tmp_path, "signature", workers=1)
    sure = [i for i in range(len(pairs)) if pairs[i][3] >= 0.8]
    assert statistics.fmean(estimated[i] for i in sure) > 0.93
    assert statistics.fmean(pairs[a // 2][3] >= 0.75 for a, b in removals if a // 2 == b // 2) > 0.98


@needs_shared
def test_poems_against_all_pairs(tmp_path):
    """Five files of Tang poems as they are: removed with true Jaccard is what comparing all pairs finds, but for the
    pairs that no band holds."""
    paths = sorted((SHARED / "tang-poems").glob("*.json"))[:6]
    poems = [poem for path in paths for poem in json.loads(path.read_text(encoding="utf-8"))]
    poems = [poem for poem in poems if poem["paragraphs"]]
    texts = ["\n".join(poem["paragraphs"]) for poem in poems]
    what = Duplicates(method="both", verify="jaccard")
    summary = deduplicate(paths, tmp_path / "out", what, text=TextField("paragraphs"), workers=1)
    place = {poem["id"]: number for number, poem in enumerate(poems)}
    lines = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    for line in lines:
        a, b = (shingle_set(texts[place[line[key]]]) for key in ("id", "kept"))
        if a or b:
            assert line["similarity"] == pytest.approx(len(a & b) / len(a | b), abs=1e-4)
    expected = list(similar_pairs(texts, 0.8))
    roots = components(len(texts), [(a, b) for a, b, _ in expected])
    removed = {place[line["id"]] for line in lines}
    should = {number for number, root in enumerate(roots) if root != number}
    marks_only = {number for number, text in enumerate(texts) if not shingle_set(text)}
    assert removed - marks_only <= should
    missed = sum(1 - candidate_probability(similarity, Bands(14, 8)) for _, _, similarity in expected)
    assert len(should - removed) <= missed + 4 * max(missed, 1) ** 0.5
    assert len(should) > 20 and summary["records_in"] >= len(texts)


@pytest.mark.slow
def test_memory_does_not_follow_the_input(tmp_path):
    """Peak memory of the command for three units of text and for twelve."""
    peaks = []
    for units in (3, 12):
        path = write_records(tmp_path / f"{units}.jsonl", (words(400, number) for number in range(1700 * units)))
        peaks.append(peak_of_command([path, "--unit-bytes", "4M", "--out", tmp_path / f"out-{units}"]))
    assert peaks[1] < peaks[0] + 10, peaks
