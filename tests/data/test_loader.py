"""Batches: the same global batch whatever the ranks and micro-batches, and every document exactly once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from minillm.data.loader import BatchLoader, document_borders
from minillm.data.sequence_stream import build_stream
from minillm.models.attention import document_borders_of
from minillm.utils.errors import UserError
from tests.support.token_data import IGNORED, open_folder, random_documents, write_token_folder

BATCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # the first token of a document is its number: with packing "none" a row tells which document it is
    documents = [[number + 1, *document] for number, document in enumerate(random_documents(100, longest=90))]
    return write_token_folder(tmp_path_factory.mktemp("loader") / "tokens", documents)


def make_loader(folder, packing="concat", rank=0, world_size=1, micro=2, **options):
    stream = build_stream([open_folder(folder)], seq_len=32, packing=packing, seed=5)
    return BatchLoader(
        stream, train_batch_size=BATCH, micro_batch_size=micro, rank=rank, world_size=world_size, **options
    )


def rows_of(batch):
    """The rows of a batch as tuples of their targets without padding."""
    return [tuple(row.tolist()) for micro in batch.micro_batches for row in micro["shift_labels"]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_global_batch_is_the_same_for_every_split(folder, world_size, micro):
    reference = make_loader(folder).stream
    loaders = [make_loader(folder, rank=rank, world_size=world_size, micro=micro) for rank in range(world_size)]
    for step in (0, 1, 7):  # 7 is in the second epoch
        batches = [loader.batch_at(step) for loader in loaders]
        expected = reference.rows(step * BATCH, BATCH)["shift_labels"]
        assert Counter(row for batch in batches for row in rows_of(batch)) == Counter(map(tuple, expected.tolist()))
        # micro-step m of rank r holds rows (m * world + r) * micro onwards
        for rank, batch in enumerate(batches):
            assert len(batch.micro_batches) == BATCH // (world_size * micro)
            for m, part in enumerate(batch.micro_batches):
                first = (m * world_size + rank) * micro
                np.testing.assert_array_equal(part["shift_labels"].numpy(), expected[first : first + micro])
        assert sum(batch.num_target_tokens for batch in batches) == np.count_nonzero(expected != IGNORED)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_document_exactly_once_an_epoch(folder, world_size, micro):
    loaders = [make_loader(folder, "none", rank, world_size, micro) for rank in range(world_size)]
    seen = []
    for step in range(2 * 100 // BATCH + 1):
        batches = [loader.batch_at(step) for loader in loaders]
        for m in range(len(batches[0].micro_batches)):
            for batch in batches:
                seen += batch.micro_batches[m]["input_ids"][:, 0].tolist()
    assert sorted(seen[:100]) == sorted(seen[100:200]) == list(range(1, 101))
    assert seen[:100] != seen[100:200]


def test_batches_are_tensors_the_model_takes(folder):
    batch = make_loader(folder, micro=4).batch_at(3)
    for micro in batch.micro_batches:
        borders = micro.pop("document_borders")
        assert torch.equal(borders.unique_consecutive(), document_borders_of(micro["document_ids"]))
        assert borders.dtype == torch.int32 and len(borders) == 64  # 128 tokens
        assert sorted(micro) == ["document_ids", "input_ids", "position_ids", "shift_labels"]
        for value in micro.values():
            assert value.dtype == torch.int64 and value.shape == (4, 32) and value.is_contiguous()


def test_borders_come_in_few_sizes():
    """A power of two above the number of documents, so that compiled shapes repeat, whatever the documents."""
    for documents, size in ((1, 64), (62, 64), (64, 128), (200, 256)):
        ids = np.arange(400).reshape(2, 200) * documents // 400
        borders = document_borders(ids)
        expected = document_borders_of(torch.from_numpy(ids))
        assert len(borders) == size and borders[len(expected) - 1 :].min() == 400
        assert torch.equal(torch.from_numpy(borders[: len(expected)]), expected)


def test_any_step_at_any_time(folder):
    loader, fresh = make_loader(folder), make_loader(folder)
    for step in (0, 1, 2, 10**9, 10**9 + 1, 1, 0):
        assert rows_of(loader.batch_at(step)) == rows_of(fresh.build(step))
    loader.close()
    assert rows_of(loader.batch_at(4)) == rows_of(fresh.build(4))  # closing only stops reading ahead


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_rows_past_the_end_are_empty(folder, packing):
    end = BATCH + 5
    loaders = [make_loader(folder, packing, rank, 2, max_sequences=end) for rank in range(2)]
    stream = loaders[0].stream
    for step, expected in ((0, BATCH), (1, 5), (2, 0)):
        batches = [loader.batch_at(step) for loader in loaders]
        rows = [row for batch in batches for row in rows_of(batch) if any(label != IGNORED for label in row)]
        real = stream.rows(step * BATCH, expected)["shift_labels"] if expected else np.full((1, 1), IGNORED)
        assert len(rows) == np.count_nonzero((real != IGNORED).any(axis=1))
        assert sum(batch.num_target_tokens for batch in batches) == np.count_nonzero(real != IGNORED)


def test_without_packing_micro_batches_are_cut_to_a_multiple_of_64(tmp_path):
    documents = [[1] * length for length in (3, 60, 64, 65, 66, 100, 128, 129, 150, 300)] * 2
    source = open_folder(write_token_folder(tmp_path / "tokens", documents))
    stream = build_stream([source], seq_len=160, packing="none", seed=0)
    loader = BatchLoader(stream, train_batch_size=10, micro_batch_size=2, rank=0, world_size=1)
    widths = set()
    for step in range(2):
        full = stream.rows(step * 10, 10)
        for m, micro in enumerate(loader.batch_at(step).micro_batches):
            longest = int(full["lengths"][2 * m : 2 * m + 2].max())
            width = micro["input_ids"].shape[1]
            widths.add(width)
            assert longest <= width <= 160 and width < longest + 64 and (width % 64 == 0 or width == 160)
            np.testing.assert_array_equal(micro["shift_labels"], full["shift_labels"][2 * m : 2 * m + 2, :width])
            assert (full["shift_labels"][2 * m : 2 * m + 2, width:] == IGNORED).all()
    assert len(widths) > 1


def test_unreadable_rows_stop_the_run_past_the_limit(tmp_path):
    folder = write_token_folder(tmp_path / "tokens", random_documents(60))
    path = folder / "tokens-000000.tar"
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 700] ^= 1  # chunk 2
    path.write_bytes(data)
    steps = -(-build_stream([open_folder(folder)], seq_len=32, packing="concat", seed=5).num_sequences // BATCH)

    patient = make_loader(folder, max_bad_rows=8)
    total = sum(patient.batch_at(step).num_bad_rows for step in range(steps))
    assert 2 <= total <= 4  # 64 tokens lie in two rows of 32, and a row's last target may reach into the chunk
    again = sum(patient.batch_at(step).num_bad_rows for step in range(steps))
    assert again == total  # and what was met before is not counted again
    strict = make_loader(folder)
    with pytest.raises(UserError, match="tokens-000000.tar: chunk 2.*data.max_bad_samples"):
        for step in range(steps):
            strict.batch_at(step)


def test_sizes_that_do_not_divide_are_refused(folder):
    with pytest.raises(UserError, match="train_batch_size 16 is not a multiple of micro-batch 3 x 2 ranks"):
        make_loader(folder, micro=3, world_size=2)
