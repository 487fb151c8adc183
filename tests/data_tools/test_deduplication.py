"""The parts of deduplication: shingles, signatures, bands, runs, buckets and clusters against brute force."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from data_tools.deduplication import arrays, buckets, shingles
from data_tools.deduplication.arrays import close_arrays
from data_tools.deduplication.clusters import Clusters, keep_longest, largest_clusters
from data_tools.deduplication.fingerprints import exact_hash
from data_tools.deduplication.minhash import (
    Bands,
    band_keys,
    candidate_probability,
    choose_bands,
    estimated_similarity,
    signatures,
)
from data_tools.deduplication.runs import Runs, document_type, key_ranges, write_run
from data_tools.deduplication.shingles import Shingles, shingle_hashes, shingles_of, tokenize, words_of
from minillm.utils.errors import UserError
from tests.data_tools.planted_duplicates import components, tokens

MIXED = [
    "The quick brown fox jumps over the lazy dog, and the quick brown fox jumps again.",
    "今天天氣很好，我們去公園玩。今天天氣很好！",
    "用 PyTorch 2.0 訓練 a small language model，然後 evaluate 它。",
    "Ünïcödé wörds, straße, ΣΊΣΥΦΟΣ and Привет мир; 한국어 문장은 띄어 씁니다.",
    "カタカナとひらがな、漢字も。snake_case don't e-mail 3.14",
    "用GPU加速x3倍，abc漢字def",
    "one two three",
    "短",
    "?!... -- ,",
    "",
]


# -- shingles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_shingles_are_equal_where_n_grams_are(n):
    """One hash for each distinct n-gram, and the other way round; the n-grams are made with `re`."""
    texts = [text for text in MIXED if "ー" not in text]
    found = shingle_hashes(texts, n)
    meaning: dict[int, tuple[str, ...]] = {}
    for number, text in enumerate(texts):
        hashes = found.hashes[found.bounds[number] : found.bounds[number + 1]].tolist()
        words = tokens(text)
        grams = [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))] if words else []
        assert len(hashes) == len(grams)
        for value, gram in zip(hashes, grams):
            assert meaning.setdefault(value, gram) == gram
    assert len(set(meaning.values())) == len(meaning)


def test_words_are_what_is_hashed():
    for text in MIXED:
        assert len(words_of(text)) == len(tokenize([text]).hashes)
    assert words_of("Don't stop 你好!") == ["don", "t", "stop", "你", "好"]


def test_case_marks_spaces_and_composition_do_not_count():
    texts = ["Café au lait, s'il vous plaît", "CAFE\u0301   au-lait s il\nvous plaît!", "cafe au lait s il vous plaît"]
    first, second, third = (shingle_hashes([text], 5).hashes.tolist() for text in texts)
    assert first == second
    assert first != third


def test_grouping_of_texts_does_not_matter():
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["alpha", "beta", "gamma", "詩", "山水", "x"], k=rng.randrange(40))) for _ in range(300)
    ]
    together = shingle_hashes(texts, 5)
    alone = [shingle_hashes([text], 5).hashes for text in texts]
    assert np.array_equal(together.hashes, np.concatenate(alone))
    assert np.array_equal(np.diff(together.bounds), [len(one) for one in alone])


def test_a_long_text_has_the_tokens_of_its_parts(monkeypatch):
    rng = random.Random(1)
    text = "".join(rng.choice(["word", "月", "Tree", "12"]) + rng.choice([" ", " ", ". "]) for _ in range(5000))
    whole = tokenize([text]).hashes
    monkeypatch.setattr(shingles, "BATCH_CHARS", 97)
    assert np.array_equal(tokenize([text, "more"]).hashes[:-1], whole)


def test_short_texts_have_one_shingle_or_none():
    found = shingles_of(tokenize(["a b c", "a b c d e", "", "a b c d e f"]), 5)
    assert np.diff(found.bounds).tolist() == [1, 1, 0, 2]
    found = shingles_of(tokenize(["a b c", "a b c d e", "", "a b c d e f"]), 5, short=False)
    assert np.diff(found.bounds).tolist() == [0, 1, 0, 2]
    a, b, c = (shingle_hashes([text], 5).hashes.tolist() for text in ("a b c", "A, b, c!", "a b"))
    assert a == b != c


# -- signatures --------------------------------------------------------------------------------------------------------


def test_signatures_are_least_values_of_the_permutations():
    """Against the definition in plain integers, for sets of one to three blocks."""
    rng = np.random.default_rng(0)
    sizes = [1, 5, 0, 8192, 3, 20000, 8191, 0, 2]
    hashes = rng.integers(0, 1 << 63, sum(sizes), np.uint64) * np.uint64(2)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    signature = signatures(Shingles(hashes, bounds), 4, seed=3)
    # a permutation is known by where it sends 0 and 1
    zero, one = (signatures(Shingles(np.array([x << 32], np.uint64), np.array([0, 1])), 4, 3)[0] for x in (0, 1))
    for number in range(len(sizes)):
        values = [x >> 32 for x in hashes[bounds[number] : bounds[number + 1]].tolist()]
        for place in range(4):
            b, a = int(zero[place]), int(one[place]) - int(zero[place])
            assert a % 2 == 1
            expected = min(((a * x + b) % (1 << 32) for x in values), default=0xFFFFFFFF)
            assert signature[number, place] == expected


def overlapping_sets(pairs: int, size: int, similarity: float) -> tuple[float, Shingles]:
    """Pairs of random sets of about this Jaccard similarity, which is returned exactly."""
    rng = np.random.default_rng(int(similarity * 100))
    common = round(2 * size * similarity / (1 + similarity))
    sets = []
    for _ in range(pairs):
        elements = rng.integers(0, 1 << 63, 2 * size - common, np.uint64) * np.uint64(2)
        sets += [elements[:size], elements[size - common :]]
    return common / (2 * size - common), Shingles(np.concatenate(sets), np.arange(2 * pairs + 1) * size)


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.95])
def test_the_estimate_has_binomial_error(similarity):
    """Mean and spread over 400 pairs of sets of 200 elements are those of independent permutations."""
    permutations, pairs, size = 112, 400, 200
    exact, sets = overlapping_sets(pairs, size, similarity)
    signature = signatures(sets, permutations, seed=0)
    estimate = estimated_similarity(signature[::2], signature[1::2])
    deviation = (exact * (1 - exact) / permutations) ** 0.5
    assert abs(estimate.mean() - exact) < 4 * deviation / pairs**0.5
    assert abs(estimate.std() / deviation - 1) < 4 / (2 * pairs) ** 0.5


@pytest.mark.parametrize("bands", [Bands(14, 8), Bands(20, 5)])
@pytest.mark.parametrize("similarity", [0.4, 0.6, 0.75, 0.9])
def test_pairs_meet_as_the_s_curve_says(bands, similarity):
    pairs, size = 1500, 60
    exact, sets = overlapping_sets(pairs, size, similarity)
    signature = signatures(sets, bands.permutations, seed=1)
    keys = band_keys(signature, bands)
    met = (keys[:, ::2] == keys[:, 1::2]).any(axis=0).mean()
    expected = 1 - (1 - exact**bands.rows) ** bands.bands
    assert candidate_probability(exact, bands) == pytest.approx(expected)
    assert abs(met - expected) < 4 * (expected * (1 - expected) / pairs) ** 0.5 + 1e-3


def test_bands_by_the_threshold():
    assert choose_bands(0.8) == Bands(14, 8)
    assert choose_bands(0.5) == Bands(37, 3)  # 1 - (1 - 0.5^3)^37 = 0.993; 28 bands of 4 find 0.84
    assert choose_bands(0.7) == Bands(22, 5)
    assert choose_bands(0.8, 128, bands=16) == Bands(16, 8)
    assert choose_bands(0.8, bands=20, rows=5) == Bands(20, 5)
    assert choose_bands(0.7, rows=4) == Bands(28, 4)


@pytest.mark.parametrize(
    "given", [dict(permutations=112, bands=20, rows=5), dict(permutations=100, bands=7), dict(bands=1000, rows=1)]
)
def test_bands_that_do_not_fit_are_refused(given):
    with pytest.raises(UserError, match="band"):
        choose_bands(0.8, **given)


def test_exact_hash_folds_spaces_and_composition():
    assert exact_hash("Caf\u00e9  au\n lait ") == exact_hash("Cafe\u0301 au lait")
    assert exact_hash("A b") != exact_hash("a b")
    assert exact_hash("A b", ignore_case=True) == exact_hash("a B", ignore_case=True)
    assert exact_hash("a, b") != exact_hash("a b")


# -- buckets and clusters ----------------------------------------------------------------------------------------------


class FakeRuns:
    """One field of documents, in memory."""

    def __init__(self, values):
        self._values = values

    def documents(self, numbers, field):
        return self._values[numbers]


def test_all_128_bits_of_a_hash_count():
    hashes = np.array([[7, 1], [7, 2], [7, 1], [8, 1], [7, 2]], np.uint64)
    keys = np.sort(hashes[:, 0])
    numbers = np.array([0, 1, 2, 4, 3])
    found = [buckets.equal_hashes(FakeRuns(hashes), *bucket) for bucket in buckets.buckets(keys, numbers)]
    assert [(int(pair["first"]), int(pair["other"])) for pair in np.concatenate(found)] == [(0, 2), (1, 4)]


@pytest.mark.parametrize("seed", range(8))
def test_buckets_connect_what_all_pairs_would(seed):
    rng = np.random.default_rng(seed)
    signature = rng.integers(0, 2, (60, 8)).astype(np.uint32)
    keys = np.sort(rng.integers(0, 6, 60)).astype(np.uint64)
    numbers = np.concatenate(
        [np.sort(part) for part in np.split(rng.permutation(60), np.flatnonzero(np.diff(keys)) + 1)]
    )
    finder = buckets.PairFinder(FakeRuns(signature), 0.75, "signature")
    found = np.concatenate([finder.pairs(*bucket) for bucket in buckets.buckets(keys, numbers)])
    wanted = [
        (a, b)
        for x, a in enumerate(numbers)
        for y, b in enumerate(numbers[:x])
        if keys[x] == keys[y] and (signature[a] == signature[b]).mean() >= 0.75
    ]
    assert components(60, zip(found["first"], found["other"])) == components(60, wanted)
    for pair in found:
        assert pair["first"] < pair["other"]
        assert pair["similarity"] == (signature[pair["first"]] == signature[pair["other"]]).mean() >= 0.75
    assert finder.counts.not_compared == 0


def test_a_bucket_of_unlike_texts_costs_a_bounded_number_of_comparisons(monkeypatch):
    """2,000 members of one bucket, all different: what is left out is counted."""
    count = 2000
    signature = np.arange(count, dtype=np.uint32)[:, None] * np.ones(8, np.uint32)
    finder = buckets.PairFinder(FakeRuns(signature), 0.8, "signature")
    found = finder.pairs(np.arange(count), np.zeros(count, np.int64))
    assert len(found) == 0
    assert finder.counts.compared <= buckets.MAX_LEADERS * count
    assert finder.counts.compared + finder.counts.not_compared == count * (count - 1) // 2


def test_a_bucket_of_two_kinds_is_joined_within_the_kinds():
    signature = np.repeat(np.array([[0] * 8, [1] * 8], np.uint32), [900, 100], axis=0)
    finder = buckets.PairFinder(FakeRuns(signature), 0.8, "signature")
    found = finder.pairs(np.arange(1000), np.zeros(1000, np.int64))
    assert Counter(components(1000, zip(found["first"], found["other"]))) == {0: 900, 900: 100}


@pytest.mark.parametrize("seed", range(5))
def test_clusters_against_a_plain_union_find(seed):
    rng = np.random.default_rng(seed)
    clusters = Clusters(500)
    edges = [rng.integers(0, 500, (2, 60)) for _ in range(6)]
    for first, second in edges:
        clusters.join(first, second)
    assert clusters.roots().tolist() == components(500, np.concatenate(edges, axis=1).T.tolist())


def test_chains_and_stars_are_one_cluster():
    for first, second in [(np.arange(9999), np.arange(1, 10000)), (np.arange(9999), np.full(9999, 9999))]:
        clusters = Clusters(10000)
        order = np.random.default_rng(0).permutation(9999)
        clusters.join(first[order], second[order])
        assert (clusters.roots() == 0).all()


def test_the_longest_stays_or_the_reference():
    roots = np.array([0, 0, 2, 0, 2, 5])
    lengths = np.array([3, 9, 4, 9, 8, 1])
    longest = roots.copy()
    keep_longest(longest, lambda numbers: lengths[numbers])
    assert longest.tolist() == [1, 1, 4, 1, 4, 5]
    keep_longest(roots, lambda numbers: lengths[numbers], protected=1)
    assert roots.tolist() == [0, 0, 4, 0, 4, 5]
    assert largest_clusters(roots, 5) == [(0, 2), (4, 1)]


def test_documents_are_read_back_from_runs(tmp_path, monkeypatch):
    """Rows, ids and key ranges of three runs, with two files open at a time."""
    monkeypatch.setattr(arrays, "OPEN_FILES", 2)
    rng = np.random.default_rng(0)
    sizes, rows, ids = (5, 1, 70), [], []
    for number, size in enumerate(sizes):
        documents = np.zeros(size, document_type(6))
        documents["hash"] = rng.integers(0, 1 << 62, (size, 2), np.uint64) * np.uint64(4)
        documents["signature"] = rng.integers(0, 1 << 32, (size, 6), np.uint32)
        documents["length"] = rng.integers(0, 1000, size)
        names = [f"名{number}-{i}".encode() for i in range(size)]
        write_run(tmp_path / f"r{number}", documents, names, Bands(2, 3), [np.arange(i % 4) for i in range(size)])
        rows.append(documents)
        ids += names
    runs, every = Runs(tmp_path, ("r0", "r1", "r2"), sizes), np.concatenate(rows)
    numbers = rng.integers(0, 76, 200)
    for name in ("hash", "signature", "length"):
        assert np.array_equal(runs.documents(numbers, name), every[name][numbers])
    assert [runs.id_of(number).encode() for number in range(76)] == ids
    for number in (0, 5, 6, 75):
        assert runs.shingles_of(number).tolist() == list(
            range((number - runs.starts[:-1])[number >= runs.starts[:-1]][-1] % 4)
        )
    keys = [every["hash"][:, 0], *band_keys(every["signature"], Bands(2, 3))]
    for row in range(3):
        seen = []
        for low, high in key_ranges(5):
            found, documents = runs.slice_of(row, low, high)
            assert (keys[row][documents] == found).all()
            assert ((found >= low) & (found < (high or 1 << 64))).all()
            seen += documents.tolist()
        assert sorted(seen) == list(range(76))
    close_arrays(tmp_path)
    (tmp_path / "r1.documents.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="damaged"):
        runs.documents(np.array([5]), "hash")
