"""Streams against a token-by-token reading of the same documents; epochs, mixtures, unreadable chunks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from minillm.data.sequence_stream import block_of_weights, build_stream
from minillm.utils.errors import UserError
from tests.support.token_data import (
    EOS,
    IGNORED,
    expected_packed_rows,
    open_folder,
    random_documents,
    write_token_folder,
)

PACKED = ("input_ids", "shift_labels", "position_ids", "document_ids")


def random_masks(documents, seed=5):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 2, len(document)).tolist() for document in documents]


def all_rows(stream, epoch=0):
    return stream.rows(epoch * stream.num_sequences, stream.num_sequences)


def keys_of(rows, names=("input_ids", "shift_labels")):
    """Each row as bytes, to compare sets of rows."""
    return [b"".join(rows[name][n].tobytes() for name in names) for n in range(len(rows["input_ids"]))]


@pytest.mark.parametrize("seq_len", [1, 7, 16, 64, 100, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_rows_equal_the_obvious_reading(tmp_path, seq_len, masked):
    documents = random_documents(80)
    masks = random_masks(documents) if masked else None
    source = open_folder(write_token_folder(tmp_path / "tokens", documents, masks))
    assert len(source.shards) > 2
    stream = build_stream([source], seq_len=seq_len, packing="concat", seed=0, shuffle=False)
    expected = expected_packed_rows(documents, seq_len, masks)
    rows = all_rows(stream)
    assert stream.num_sequences == len(expected)
    for name in PACKED:
        assert rows[name].dtype == np.int64
        np.testing.assert_array_equal(rows[name], [row[name] for row in expected], err_msg=name)
    assert rows["num_bad_rows"] == 0


@pytest.mark.parametrize("seq_len, stride", [(16, 16), (16, 8), (16, 1), (64, 48), (300, 7), (7, 3)])
def test_overlapping_rows_equal_the_obvious_reading(tmp_path, seq_len, stride):
    documents = random_documents(50)
    source = open_folder(write_token_folder(tmp_path / "tokens", documents))
    options = {"seq_len": seq_len, "packing": "concat", "stride": stride}
    expected = expected_packed_rows(documents, seq_len, stride=stride)
    stream = build_stream([source], seed=0, shuffle=False, **options)
    rows = all_rows(stream)
    assert stream.num_sequences == len(expected)
    for name in PACKED:
        np.testing.assert_array_equal(rows[name], [row[name] for row in expected], err_msg=name)
    shuffled = build_stream([source], seed=3, **options)
    epochs = [keys_of(all_rows(shuffled, epoch)) for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(keys_of(rows)) and epochs[0] != epochs[1]
    far = shuffled.num_sequences - 2  # asked for alone or across the epochs' border: the same
    np.testing.assert_array_equal(shuffled.rows(far, 4)["input_ids"][3:], shuffled.rows(far + 3, 1)["input_ids"])


def test_a_target_counts_once_for_each_window_over_it(tmp_path):
    """One document of 40 tokens and its eos in windows of 16 every 4."""
    source = open_folder(write_token_folder(tmp_path / "tokens", [list(range(1, 41))]))
    labels = all_rows(build_stream([source], seq_len=16, stride=4, seed=0))["shift_labels"]
    counts = Counter(labels[labels != IGNORED].tolist())
    windows = [range(start + 1, start + 17) for start in range(0, 28, 4)]  # the last, from 24, reaches the eos at 40
    tokens = [*range(1, 41), EOS]
    assert counts == {tokens[place]: sum(place in window for window in windows) for place in range(1, 41)}
    assert max(counts.values()) == 4 and min(counts.values()) == 1


def test_every_token_after_the_first_of_a_document_is_a_target_once(tmp_path):
    documents = random_documents(60, seed=2)
    source = open_folder(write_token_folder(tmp_path / "tokens", documents))
    labels = all_rows(build_stream([source], seq_len=32, packing="concat", seed=4))["shift_labels"]
    expected = Counter(token for document in documents for token in [*document[1:], EOS])
    assert Counter(labels[labels != IGNORED].tolist()) == expected


@pytest.mark.parametrize("masked", [False, True])
def test_one_document_a_row(tmp_path, masked):
    documents = random_documents(50, longest=40)
    masks = random_masks(documents) if masked else None
    source = open_folder(write_token_folder(tmp_path / "tokens", documents, masks))
    stream = build_stream([source], seq_len=24, packing="none", seed=0, shuffle=False)
    rows = all_rows(stream)
    assert stream.num_sequences == 50
    assert stream.num_truncated == sum(len(document) > 24 for document in documents) > 0
    for number, document in enumerate(documents):
        inputs = document[:24]
        targets = [*document, EOS][1:25]
        learned = [*(masks[number] if masks else [1] * len(document)), 0 if masks else 1][1:25]
        padding = 24 - len(inputs)
        assert rows["input_ids"][number].tolist() == inputs + [EOS] * padding
        expected = [token if learn else IGNORED for token, learn in zip(targets, learned)]
        assert rows["shift_labels"][number].tolist() == expected + [IGNORED] * padding
        assert rows["position_ids"][number].tolist() == list(range(24))
        assert rows["lengths"][number] == len(inputs)


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_every_epoch_holds_every_row_once_in_another_order(tmp_path, packing):
    source = open_folder(write_token_folder(tmp_path / "tokens", random_documents(70)))
    stored = keys_of(all_rows(build_stream([source], seq_len=16, packing=packing, seed=0, shuffle=False)))
    stream = build_stream([source], seq_len=16, packing=packing, seed=3)
    epochs = [keys_of(all_rows(stream, epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(stored)
    other_seed = keys_of(all_rows(build_stream([source], seq_len=16, packing=packing, seed=4)))
    orders = [stored, *epochs, other_seed]
    assert all(orders[i] != orders[j] for i in range(5) for j in range(i))


def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path):
    source = open_folder(write_token_folder(tmp_path / "tokens", random_documents(70)))
    stream = build_stream([source], seq_len=16, packing="concat", seed=1)
    size = stream.num_sequences
    across = stream.rows(size - 5, 12)  # the last five rows of an epoch and the first seven of the next
    one_by_one = [stream.rows(size - 5 + n, 1) for n in reversed(range(12))][::-1]
    for name in PACKED:
        np.testing.assert_array_equal(across[name], np.concatenate([rows[name] for rows in one_by_one]))
    far = stream.rows(10**15, 2)
    np.testing.assert_array_equal(far["input_ids"][1:], stream.rows(10**15 + 1, 1)["input_ids"])


def test_negative_numbers_are_empty_rows(tmp_path):
    source = open_folder(write_token_folder(tmp_path / "tokens", random_documents(20)))
    for packing in ("concat", "none"):
        stream = build_stream([source], seq_len=16, packing=packing, seed=1)
        rows = stream.take(np.array([3, -1, 4]))
        assert (rows["shift_labels"][1] == IGNORED).all() and (rows["input_ids"][1] == EOS).all()
        np.testing.assert_array_equal(rows["input_ids"][[0, 2]], stream.rows(3, 2)["input_ids"])
        assert (stream.take(np.array([-1, -1]))["shift_labels"] == IGNORED).all()


@pytest.mark.parametrize(
    "weights, quotas",
    [([0.7, 0.3], [7, 3]), ([1, 1, 1], [1, 1, 1]), ([3, 1], [3, 1]), ([0.125, 0.25, 0.625], [1, 2, 5]), ([5], [1])],
)
def test_blocks_have_exact_shares(weights, quotas):
    slots, counts = block_of_weights(weights)
    assert counts.tolist() == quotas
    for source, quota in enumerate(quotas):
        assert slots[slots[:, 0] == source, 1].tolist() == list(range(quota))


def test_shares_that_no_small_block_holds_are_rounded_and_none_is_lost():
    slots, counts = block_of_weights([1 / 3, 0.123456789, 1e-9])
    assert len(slots) == counts.sum() and counts.min() == 1
    assert abs(counts[0] / counts.sum() - (1 / 3) / (1 / 3 + 0.123456789)) < 1e-4


def test_mixture_keeps_its_shares_and_each_source_its_epochs(tmp_path):
    parts = {}
    for number, (name, weight, count) in enumerate([("a", 0.5, 30), ("b", 0.3, 90), ("c", 0.2, 40)]):
        documents = [[number * 300 + token % 300 + 1 for token in d] for d in random_documents(count, seed=number)]
        parts[name] = (write_token_folder(tmp_path / name, documents), weight)
    sources = [open_folder(folder, name=name, weight=weight) for name, (folder, weight) in parts.items()]
    stream = build_stream(sources, seq_len=16, packing="none", seed=9)
    assert stream.num_sequences == 160
    rows = stream.rows(0, 600)
    which = (rows["input_ids"][:, 0] - 1) // 300
    for block in range(0, 600, 10):
        assert np.bincount(which[block : block + 10], minlength=3).tolist() == [5, 3, 2]
    for number, source in enumerate(sources):
        mine = [key for key, n in zip(keys_of(rows), which) if n == number]
        size = source.num_documents
        stored = sorted(keys_of(all_rows(build_stream([source], seq_len=16, packing="none", seed=0, shuffle=False))))
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == stored
    np.testing.assert_array_equal(stream.rows(333, 50)["input_ids"], rows["input_ids"][333:383])


def corrupt(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_a_corrupt_chunk_takes_only_its_rows_and_always_the_same(tmp_path, packing, capsys):
    documents = random_documents(60)
    folder = write_token_folder(tmp_path / "tokens", documents)

    def stream():
        return build_stream([open_folder(folder)], seq_len=16, packing=packing, seed=1)

    whole = all_rows(stream())
    # chunk 3 of the second shard: a chunk of 64 uint16 takes a header block and 256 bytes in one block
    corrupt(folder / "tokens-000001.tar", 3 * 1024 + 512 + 128 + 20)
    first, second = stream(), stream()
    rows = all_rows(first)
    ignored = (rows["shift_labels"] == IGNORED).all(axis=1) & (whole["shift_labels"] != IGNORED).any(axis=1)
    assert 1 <= ignored.sum() <= rows["num_bad_rows"] <= 7
    for name in PACKED:
        if name in rows:
            np.testing.assert_array_equal(rows[name][~ignored], whole[name][~ignored])
    for n in reversed(range(first.num_sequences)):  # another order of reading, as after a resume
        np.testing.assert_array_equal(second.rows(n, 1)["shift_labels"][0], rows["shift_labels"][n])
    (problem,) = first.problems
    assert "tokens-000001.tar" in problem and "chunk 3" in problem
    assert capsys.readouterr().err.count("chunk 3") == 2  # named once a stream


def test_a_missing_or_cut_shard_is_refused_or_skipped(tmp_path):
    folder = write_token_folder(tmp_path / "tokens", random_documents(60))
    size = open_folder(folder).num_tokens
    path = folder / "tokens-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(UserError, match="tokens-000001.tar was cut short.*data.max_bad_samples"):
        open_folder(folder)
    path.unlink()
    with pytest.raises(UserError, match="tokens-000001.tar is missing"):
        open_folder(folder)
    for packing in ("concat", "none"):
        source = open_folder(folder, max_bad_samples=1000)
        assert source.num_tokens == size
        stream = build_stream([source], seq_len=16, packing=packing, seed=1)
        rows = all_rows(stream)
        shard = source.shards[1]
        expected = -(-(shard.num_tokens - 1) // 16) if packing == "concat" else shard.num_documents
        assert rows["num_bad_rows"] == expected


def test_damaged_borders_are_noticed(tmp_path):
    folder = write_token_folder(tmp_path / "tokens", random_documents(60))
    source = open_folder(folder)
    corrupt(folder / "tokens-000000.tar", source.shards[0].num_chunks * 1024 + 512 + 128 + 5)
    stream = build_stream([open_folder(folder)], seq_len=16, packing="concat", seed=1, shuffle=False)
    assert stream.rows(0, 4)["num_bad_rows"] == 4
    assert "borders" in stream.problems[0]


def test_uint32_shards_and_mixing_them_with_uint16(tmp_path):
    documents = random_documents(30)
    narrow = open_folder(write_token_folder(tmp_path / "narrow", documents), name="narrow")
    large = [[token + 100_000 for token in document] for document in documents]
    wide = open_folder(write_token_folder(tmp_path / "wide", large, dtype="<u4"), name="wide")
    stream = build_stream([narrow, wide], seq_len=16, packing="none", seed=0, shuffle=False)
    rows = stream.rows(0, 2)
    assert sorted(rows["input_ids"][:, 0].tolist()) == [documents[0][0], documents[0][0] + 100_000]


def test_wrong_settings_are_named(tmp_path):
    source = open_folder(write_token_folder(tmp_path / "tokens", random_documents(5)))
    with pytest.raises(UserError, match="packing is 'tight'.*concat, none"):
        build_stream([source], seq_len=8, packing="tight", seed=0)
    for stride in (0, 9):
        with pytest.raises(UserError, match=f"data.stride is {stride}: it must be from 1 to data.seq_len = 8"):
            build_stream([source], seq_len=8, stride=stride, seed=0)
    with pytest.raises(UserError, match="data.stride is 4: only packing concat"):
        build_stream([source], seq_len=8, packing="none", stride=4, seed=0)
    with pytest.raises(UserError, match="seq_len is 0"):
        build_stream([source], seq_len=0, packing="none", seed=0)
