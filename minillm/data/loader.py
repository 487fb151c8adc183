"""Batches for one rank: `batch_at(step)` is pure, and the next step is made ready in a background thread.

Contract: the global batch of `step` is sequences [step * B, (step + 1) * B) of the stream, whatever the ranks:
micro-step m of rank r takes [(m * world_size + r) * micro, ...). Sequences at or past `max_sequences` are empty rows
(all targets ignored), so that a last batch that is not full keeps its shape. Micro-batches are dicts of int64 tensors
[micro, T]; without packing T is the micro-batch's longest row rounded up to a multiple of 64. With `document_ids` come
`document_borders`, int32: where documents begin in the flattened micro-batch, then its length until their number is a
power of two, so that few shapes occur. Found here, they spare the GPU a wait in each forward pass.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from minillm.data.sequence_stream import IGNORED, SequenceStream
from minillm.utils import distributed
from minillm.utils.errors import UserError

_LENGTH_STEP = 64
_FEWEST_BORDERS = 64
_MODEL_INPUTS = ("input_ids", "shift_labels", "position_ids", "document_ids")


class Batch(NamedTuple):
    """This rank's share of a global batch; the counts are of this rank's rows.

    Attributes:
        num_tokens: inputs of documents, padding left out (of packed rows every token).
    """

    micro_batches: list[dict[str, torch.Tensor]]
    num_target_tokens: int
    num_bad_rows: int
    num_tokens: int


class BatchLoader:
    """See the module.

    Args:
        train_batch_size: sequences in a global batch; a multiple of micro_batch_size * world_size.
        max_sequences: end of the stream (for validation); None is endless.
        max_bad_rows: unreadable sequences this rank may meet before `batch_at` raises.

    Raises:
        UserError: sizes that do not divide; from `batch_at`, too many unreadable sequences.
    """

    def __init__(
        self,
        stream: SequenceStream,
        *,
        train_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        max_sequences: int | None = None,
        max_bad_rows: int = 0,
    ) -> None:
        if train_batch_size < 1 or train_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"train_batch_size {train_batch_size} is not a multiple of micro-batch {micro_batch_size} x "
                f"{world_size} ranks: choose a batch that divides"
            )
        self.stream = stream
        self._batch_size, self._micro = train_batch_size, micro_batch_size
        self.max_sequences, self._max_bad_rows = max_sequences, max_bad_rows
        first = np.arange(0, train_batch_size, micro_batch_size * world_size) + rank * micro_batch_size
        self._rows = (first[:, None] + np.arange(micro_batch_size)).reshape(-1)
        self._bad_rows: dict[int, int] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future] | None = None

    @property
    def num_steps(self) -> int:
        """Batches up to `max_sequences`, a last one that is not full included."""
        if self.max_sequences is None:
            raise ValueError("this loader is endless: it was built without max_sequences")
        return -(-self.max_sequences // self._batch_size)

    def batch_at(self, step: int) -> Batch:
        """The batch of `step` (from 0), whatever was asked for before."""
        if self._next is not None and self._next[0] == step:
            batch = self._next[1].result()
        else:
            batch = self.build(step)
        if batch.num_bad_rows:
            self._check_bad_rows(step, batch.num_bad_rows)
        self._prefetch(step + 1)
        return batch

    def _check_bad_rows(self, step: int, count: int) -> None:
        self._bad_rows[step] = count  # a step asked for again, as in validation, counts once
        total = sum(self._bad_rows.values())
        if total > self._max_bad_rows:
            raise UserError(
                f"{total} sequences cannot be read, {self._max_bad_rows} may be skipped: "
                f"{'; '.join(self.stream.problems)}. Write the shards again, or raise data.max_bad_samples"
            )

    def places_of(self, step: int) -> list[dict[str, object]]:
        """Where the sequences of the global batch of `step` are from (SequenceStream.places)."""
        numbers = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        return self.stream.places(numbers if self.max_sequences is None else numbers[numbers < self.max_sequences])

    def extend(self, num_batches: int) -> None:
        """Move the end of the stream, where it has one: batches of the next epoch take the place of such left out."""
        if self.max_sequences is not None:
            self.max_sequences += num_batches * self._batch_size
            self._next = None  # it may hold rows that were past the end

    def close(self) -> None:
        """Stop the background thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = self._next = None

    def _prefetch(self, step: int) -> None:
        self._next = None
        if self.max_sequences is not None and step * self._batch_size >= self.max_sequences:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="minillm-loader")
        self._next = step, self._thread.submit(self.build, step)

    def build(self, step: int) -> Batch:
        numbers = step * self._batch_size + self._rows
        if self.max_sequences is not None:
            numbers[numbers >= self.max_sequences] = -1
        rows = self.stream.take(numbers)
        micro_batches = []
        for start in range(0, len(numbers), self._micro):
            part = slice(start, start + self._micro)
            length = self.stream.seq_len
            if "lengths" in rows:
                longest = max(1, int(rows["lengths"][part].max()))
                length = min(length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
            inputs = {name: np.ascontiguousarray(rows[name][part, :length]) for name in _MODEL_INPUTS if name in rows}
            if "document_ids" in inputs:
                inputs["document_borders"] = document_borders(inputs["document_ids"])
            tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
            if distributed.default_device().type == "cuda":  # so that copies to it do not wait
                tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            micro_batches.append(tensors)
        num_targets = int(np.count_nonzero(rows["shift_labels"] != IGNORED))
        packed = np.count_nonzero(numbers >= 0) * self.stream.seq_len
        num_tokens = int(rows["lengths"].sum()) if "lengths" in rows else int(packed)
        return Batch(micro_batches, num_targets, int(rows["num_bad_rows"]), num_tokens)


def document_borders(document_ids: np.ndarray) -> np.ndarray:
    """int32 [2^n]: where runs of equal numbers begin in document_ids [micro, T], rows end to end, then their length."""
    begins = np.ones(document_ids.shape, dtype=bool)
    np.not_equal(document_ids[:, 1:], document_ids[:, :-1], out=begins[:, 1:])
    places = np.flatnonzero(begins)
    size = max(_FEWEST_BORDERS, 1 << len(places).bit_length())  # at least one more than documents
    return np.pad(places, (0, size - len(places)), constant_values=document_ids.size).astype(np.int32)
