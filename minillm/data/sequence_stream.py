"""Training sequences by number: row n is a pure function of (sources, seq_len, packing, seed, n).

Contract: a stream is an endless list of sequences numbered 0, 1, 2, ...; any of them can be asked for at any time by
any process, so resuming is a jump and ranks need not speak to each other. Within one source every sequence comes
exactly once an epoch, in an order seeded by (seed, source, epoch). Sources are interleaved by weight in blocks of fixed
composition; each runs through its own epochs. Memory does not grow with the data.

    concat   each shard's token stream is read in windows that begin every `stride` tokens; row: inputs t .. t+T-1,
             targets t+1 .. t+T. With stride = T (the default) every token is an input once. With a smaller stride
             windows overlap, for corpora so small that each token is wanted in several contexts: a target counts in
             an epoch, and in its loss, once for every window that covers it (T / stride times; fewer in the first
             and last T tokens of a shard). The last row of a shard is padded.
    none     one document a row, cut to T inputs, padded. (Documents cut this way: `num_truncated`.)

A target is ignored (IGNORED) where it is padding, the first token of the next document, or masked by the source. The
eos that ends a document is a target; the row after it starts at position 0 in a new document.
Shapes: n rows, T = seq_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from minillm.data.permutation import hash_key, permute
from minillm.data.token_shards import TokenShard
from minillm.data.token_source import TokenSource
from minillm.utils.errors import UserError
from minillm.utils.logging import warn

IGNORED = -100
PACKINGS = ("concat", "none")
_MAX_BLOCK = 1 << 16
_WINDOW = 1024
_RELEASE_BYTES = 32 << 20
_FAULT_BYTES = 64 << 10  # the kernel maps 16 pages around a touched one

Rows = dict[str, np.ndarray]


def build_stream(
    sources: Sequence[TokenSource],
    *,
    seq_len: int,
    packing: str = "concat",
    stride: int | None = None,
    seed: int,
    shuffle: bool = True,
) -> SequenceStream:
    """A stream over token sources; raises UserError when they hold nothing to train on or do not go together.

    Args:
        stride: tokens between the beginnings of two windows of "concat", 1 .. seq_len; None is seq_len.
    """
    if packing not in PACKINGS:
        raise UserError(f"data.packing is {packing!r}: it must be one of {', '.join(PACKINGS)}")
    if seq_len < 1:
        raise UserError(f"data.seq_len is {seq_len}: it must be at least 1")
    if stride is not None and packing != "concat":
        raise UserError(f"data.stride is {stride}: only packing concat has windows, packing is {packing}; leave it out")
    if stride is not None and not 1 <= stride <= seq_len:
        raise UserError(f"data.stride is {stride}: it must be from 1 to data.seq_len = {seq_len}")
    if len({source.eos_token_id for source in sources}) != 1:
        raise UserError("the sources of one run must have the same tokenizer; tokenize them again with one")
    return SequenceStream(
        sources, seq_len=seq_len, packing=packing, stride=stride or seq_len, seed=seed, shuffle=shuffle
    )


class SequenceStream:
    """See the module. `num_sequences` is the number of different sequences of all sources together: one epoch's worth.

    `problems` holds one sentence for each unreadable shard or chunk met so far.
    """

    def __init__(
        self, sources: Sequence[TokenSource], *, seq_len: int, packing: str, stride: int, seed: int, shuffle: bool
    ) -> None:
        self.seq_len, self.packing, self.seed, self.shuffle = seq_len, packing, seed, shuffle
        self.pad_token_id = sources[0].eos_token_id
        self.problems: list[str] = []
        self._layouts: list[_Layout] = [
            _ConcatLayout(source.shards, seq_len, stride)
            if packing == "concat"
            else _DocumentLayout(source.shards, seq_len)
            for source in sources
        ]
        for source, rows in zip(sources, self._layouts):
            if rows.num_rows == 0:
                raise UserError(f"data source {source.name} is empty: there is no document in it; check its path")
        self.num_sequences = sum(rows.num_rows for rows in self._layouts)
        self.num_truncated = sum(rows.num_truncated for rows in self._layouts)
        self._dtype = np.result_type(*(shard.dtype for source in sources for shard in source.shards))
        self._has_loss_mask = any(source.has_loss_mask for source in sources)
        self._block = block_of_weights([source.weight for source in sources])
        self._names = [source.name for source in sources]
        self._columns = np.arange(seq_len)
        self._located_window = lru_cache(4)(
            lambda window: self._locate_each(np.arange(window * _WINDOW, (window + 1) * _WINDOW))
        )
        self._mapped_bytes = 0

    def rows(self, start: int, count: int) -> Rows:
        """Sequences start .. start + count - 1; see `take`."""
        return self.take(np.arange(start, start + count))

    def take(self, numbers: np.ndarray) -> Rows:
        """Sequences by number.

        Args:
            numbers: int64 [n]; a negative number makes an empty row (all targets ignored).

        Returns:
            input_ids, shift_labels, position_ids: int64 [n, T]; document_ids int64 [n, T] for concat;
            lengths int64 [n], the inputs that are not padding, for none; num_bad_rows, an int64 scalar: rows that
            cannot be read, whose targets are all ignored.
        """
        source, rows = self._locate(numbers)
        shape = (len(numbers), self.seq_len + 1)
        # one token more than a row is long: inputs are all but the last, targets all but the first
        tokens = np.empty(shape, self._dtype)
        mask = np.ones(shape, np.uint8) if self._has_loss_mask else None
        lengths = np.zeros(len(numbers), np.int64)
        starts = np.zeros(len(numbers), np.int64)
        borders: list[np.ndarray] = [np.empty(0, np.uint32)] * len(numbers)
        num_bad = 0
        for number, layout in enumerate(self._layouts):
            places = np.flatnonzero(source == number)
            for place, shard, row in zip(places.tolist(), *layout.locate(rows[places])):
                start, stop = layout.span(shard, row)
                count = stop - start
                problem = shard.problem or shard.read(
                    start, tokens[place, :count], mask[place, :count] if shard.has_loss_mask else None
                )
                if problem is not None:
                    num_bad += 1
                    self._name_problem(problem)
                    continue
                lengths[place] = count - 1
                if layout.packed:
                    starts[place] = start
                    borders[place] = shard.borders_within(start, start + self.seq_len)
        self._release_pages(len(numbers))
        out = self._inputs_and_labels(tokens, mask, lengths)
        if self.packing == "concat":
            self._mark_documents(out, starts, borders)
        else:
            out["position_ids"] = np.tile(self._columns, (len(numbers), 1))
            out["lengths"] = lengths
        out["num_bad_rows"] = np.int64(num_bad)
        return out

    def places(self, numbers: np.ndarray) -> list[dict[str, object]]:
        """Where sequences are from: `source`, `shard` (file name) and `documents`, the first and last in that shard."""
        found = []
        for number, row_of_source in zip(*(part.tolist() for part in self._locate(numbers))):
            if number < 0:
                continue
            layout = self._layouts[number]
            (shard,), (row,) = layout.locate(np.array([row_of_source]))
            documents = None
            if shard.open():
                start, stop = layout.span(shard, row)
                documents = np.searchsorted(shard.borders, [start, stop - 1], side="right").tolist()
            found.append({"source": self._names[number], "shard": shard.path.name, "documents": documents})
        return found

    def _inputs_and_labels(self, tokens: np.ndarray, mask: np.ndarray | None, lengths: np.ndarray) -> Rows:
        """Inputs and targets from rows [n, T + 1] of which lengths + 1 tokens are filled."""
        inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        if mask is not None:
            np.copyto(labels, IGNORED, where=mask[:, 1:] == 0)
        if len(lengths) and lengths.min() < self.seq_len:
            padding = self._columns >= lengths[:, None]
            np.copyto(inputs, self.pad_token_id, where=padding)
            np.copyto(labels, IGNORED, where=padding)
        return {"input_ids": inputs, "shift_labels": labels}

    def _mark_documents(self, out: Rows, starts: np.ndarray, borders: list[np.ndarray]) -> None:
        """Documents in packed rows: no target across a border, positions from each start, document_ids from 0."""
        num_rows, seq_len = out["input_ids"].shape
        row = np.repeat(np.arange(num_rows), [len(ends) for ends in borders])
        column = np.concatenate(borders) - starts[row]  # 1 .. T: where the next document begins
        out["shift_labels"][row, column - 1] = IGNORED
        inside = column < seq_len
        # segments: every row's beginning and the borders inside rows, as places in the flattened rows
        row_starts = np.arange(num_rows) * seq_len
        segments = np.sort(np.concatenate([row_starts, row_starts[row[inside]] + column[inside]]))
        sizes = np.diff(segments, append=num_rows * seq_len)
        first_of_row = np.searchsorted(segments, row_starts)
        number = np.arange(len(segments)) - first_of_row[segments // seq_len]
        out["document_ids"] = np.repeat(number, sizes).reshape(num_rows, seq_len)
        positions = np.repeat(segments, sizes)
        np.subtract(np.arange(len(positions)), positions, out=positions)
        out["position_ids"] = positions.reshape(num_rows, seq_len)

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_locate_each`, from a window of consecutive sequences that the batches before and after need as well."""
        windows = numbers // _WINDOW
        low, high = windows.min(), windows.max()
        if low != high or low < 0:
            return self._locate_each(numbers)
        source, rows = self._located_window(int(low))
        places = numbers - low * _WINDOW
        return source[places], rows[places]

    def _locate_each(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source) of each sequence, -1 for negative numbers."""
        slots, quotas = self._block
        block, slot = np.divmod(numbers, len(slots))
        source = np.where(numbers < 0, -1, slots[slot, 0])
        local = block * quotas[source] + slots[slot, 1]
        rows = np.full(len(numbers), -1, np.int64)
        for number, layout in enumerate(self._layouts):
            places = np.flatnonzero(source == number)
            epochs, index = np.divmod(local[places], layout.num_rows)
            for epoch in range(epochs.min(), epochs.max() + 1) if len(places) else ():
                same = epochs == epoch
                rows[places[same]] = self._permuted(index[same], layout.num_rows, number, epoch)
        return source, rows

    def _permuted(self, index: np.ndarray, size: int, source: int, epoch: int) -> np.ndarray:
        return permute(index, size, hash_key(self.seed, source, epoch)) if self.shuffle else index

    def _name_problem(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            warn(f"{problem}; the sequences from it are skipped")

    def _release_pages(self, num_rows: int) -> None:
        self._mapped_bytes += num_rows * max(_FAULT_BYTES, 4 * self.seq_len)
        if self._mapped_bytes > _RELEASE_BYTES:
            self._mapped_bytes = 0
            for layout in self._layouts:
                for shard in layout.shards:
                    shard.release()


def block_of_weights(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A block of slots in which each source has exactly its share, spread evenly.

    Returns:
        slots int64 [M, 2]: (source, how many slots of this source come before it in the block), and quotas int64
        [sources]. M is the smallest number of slots in which all shares are whole (weights 0.7 and 0.3: 10), at most
        65,536; shares that need more are rounded to that.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    size = min(lcm(*(share.denominator for share in shares)), _MAX_BLOCK)
    quotas = [max(1, int(share * size)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: quotas[k] - shares[k] * size)
    for number in range(size - sum(quotas)):
        quotas[by_remainder[number % len(quotas)]] += 1
    # source k's i-th slot belongs at (i + 1/2) / quota_k of the block
    source = np.repeat(np.arange(len(quotas)), quotas)
    turn = np.concatenate([np.arange(quota) for quota in quotas])
    order = np.lexsort((source, (2 * turn + 1) / np.repeat(2 * np.array(quotas), quotas)))
    return np.stack([source, turn], axis=1)[order], np.array(quotas, dtype=np.int64)


class _Layout:
    """Which row of a source stands where: rows are numbered through its shards."""

    packed = True
    num_truncated = 0

    def __init__(self, shards: Sequence[TokenShard], seq_len: int, rows_of_shards: Sequence[int]) -> None:
        self.shards = shards
        self._seq_len = seq_len
        self._ends = np.cumsum(np.asarray(rows_of_shards, dtype=np.int64))
        self._starts = self._ends - rows_of_shards
        self.num_rows = int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, rows: np.ndarray) -> tuple[list[TokenShard], list[int]]:
        """The shard of each row and the row's number in it."""
        number = np.searchsorted(self._ends, rows, side="right")
        return [self.shards[n] for n in number.tolist()], (rows - self._starts[number]).tolist()


class _ConcatLayout(_Layout):
    def __init__(self, shards: Sequence[TokenShard], seq_len: int, stride: int) -> None:
        super().__init__(shards, seq_len, [_num_windows(shard.num_tokens - 1, seq_len, stride) for shard in shards])
        self._stride = stride

    def span(self, shard: TokenShard, row: int) -> tuple[int, int]:
        """The tokens of a row in its shard, the target of its last input included."""
        start = row * self._stride
        return start, min(start + self._seq_len + 1, shard.num_tokens)


def _num_windows(num_targets: int, seq_len: int, stride: int) -> int:
    """Windows that begin every `stride` tokens until one reaches the last target (a shard's first token is none)."""
    if num_targets < 1:
        return 0
    return 1 + max(0, -(-(num_targets - seq_len) // stride))


class _DocumentLayout(_Layout):
    packed = False

    def __init__(self, shards: Sequence[TokenShard], seq_len: int) -> None:
        super().__init__(shards, seq_len, [shard.num_documents for shard in shards])
        for shard in shards:
            if shard.open():
                # the eos at the end is a target only, so a document of T + 1 tokens fits
                lengths = np.diff(shard.borders, prepend=np.uint32(0))
                self.num_truncated += int(np.count_nonzero(lengths > seq_len + 1))
                shard.release()

    def span(self, shard: TokenShard, row: int) -> tuple[int, int]:
        """The tokens of a row's document, cut to the row."""
        start, end = shard.document(row) if shard.open() else (0, 1)
        return start, min(end, start + self._seq_len + 1)
