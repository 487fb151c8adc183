"""Token shards: documents as token ids in WebDataset tars whose every byte has a place that is arithmetic.

Contract: a token shard is an uncompressed tar of

    00000000.tokens.npy   [C] uint16 or uint32      chunk 0 of the shard's token stream (C = chunk_tokens)
    00000000.mask.npy     [C] uint8                 only for conversations: 1 where the token is to be learned
    00000001.tokens.npy ...                         every chunk takes the same bytes; the last is filled up with eos
    borders.npy           [num_documents] uint32    where each document ends in the stream, its eos included
    crc32.npy             [num_chunks] uint32       zlib.crc32 of a chunk's tokens and then its mask

so that token t stands in chunk t // C at a fixed offset and shards can be memory-mapped. Documents end with eos and are
never cut by the end of a shard. index.json beside the shards:

    {"format": "minillm-tokens-1", "dtype", "chunk_tokens", "has_loss_mask", "tokenizer" (fingerprint), "vocab_size",
     "eos_token_id", "source_key" (what it was compiled from), "num_documents", "num_tokens" (eos included),
     "num_target_tokens" (tokens with a predecessor in their document and mask 1), "num_target_bytes" (UTF-8 bytes of
     what is learned), "num_bad_samples",
     "shards": [{"name", "num_tokens", "num_documents", "bytes", "sha256", "tail_crc32"}, ...]}

Chunks are checked against their crc32 when they are first touched, borders when the shard is opened.
"""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import zlib
from bisect import bisect_right
from pathlib import Path

import numpy as np

from minillm.data.tar import BLOCK, member_header, padded

CHUNK_TOKENS = 8192  # a small chunk is quickly verified by the first row that touches it; 6 % of headers at uint16
SHARD_TOKENS = 1 << 25  # 64 MiB of uint16
_NPY_HEADER = 128


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def chunk_stride(chunk_tokens: int, itemsize: int, has_loss_mask: bool) -> int:
    """Bytes of a chunk in the tar, headers and padding included."""
    stride = BLOCK + padded(_NPY_HEADER + chunk_tokens * itemsize)
    return stride + (BLOCK + padded(_NPY_HEADER + chunk_tokens) if has_loss_mask else 0)


def shard_bytes(num_tokens: int, num_documents: int, chunk_tokens: int, dtype: str, has_loss_mask: bool) -> int:
    """Bytes of a whole shard."""
    num_chunks = -(-num_tokens // chunk_tokens)
    chunks = num_chunks * chunk_stride(chunk_tokens, np.dtype(dtype).itemsize, has_loss_mask)
    tables = sum(BLOCK + padded(_NPY_HEADER + 4 * length) for length in (num_documents, num_chunks))
    return chunks + tables + 2 * BLOCK


class TokenShardWriter:
    """Writes documents to `folder` as token shards; the bytes depend only on the documents and their order.

    `append` whole documents, then `close`; the caller publishes the folder with the index.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: np.dtype,
        eos_token_id: int,
        has_loss_mask: bool,
        chunk_tokens: int = CHUNK_TOKENS,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._folder = folder
        self._dtype, self._eos, self._has_mask = dtype, eos_token_id, has_loss_mask
        self._shard_tokens = shard_tokens
        self._tokens = np.empty(chunk_tokens, dtype)
        self._mask = np.empty(chunk_tokens, np.uint8)
        self._file: io.BufferedWriter | None = None
        self.shards: list[dict] = []

    def append(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Add documents.

        Args:
            tokens: [sum of lengths], each document with its eos.
            lengths: [documents].
            mask: uint8, as long as tokens; required exactly when the shards have a loss mask.
        """
        while len(lengths):
            if self._file is None:
                self._open_shard()
            ends = np.cumsum(lengths)
            count = int(np.searchsorted(ends, self._shard_tokens - self._num_tokens)) + 1
            taken = int(ends[min(count, len(ends)) - 1])
            self._borders.append((self._num_tokens + ends[:count]).astype(np.uint32))
            self._fill(tokens[:taken], None if mask is None else mask[:taken])
            tokens, lengths, mask = tokens[taken:], lengths[count:], None if mask is None else mask[taken:]
            if self._num_tokens >= self._shard_tokens:
                self._close_shard()

    def close(self) -> list[dict]:
        """Finish the last shard; the entries of index.json."""
        if self._file is not None:
            self._close_shard()
        return self.shards

    def _open_shard(self) -> None:
        self._name = f"tokens-{len(self.shards):06d}.tar"
        self._file = open(self._folder / self._name, "wb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self._num_tokens = self._num_bytes = self._filled = 0
        self._borders: list[np.ndarray] = []
        self._checksums: list[int] = []

    def _fill(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        done = 0
        while done < len(tokens):
            count = min(len(tokens) - done, len(self._tokens) - self._filled)
            place = slice(self._filled, self._filled + count)
            self._tokens[place] = tokens[done : done + count]
            if mask is not None:
                self._mask[place] = mask[done : done + count]
            done += count
            self._filled += count
            if self._filled == len(self._tokens):
                self._flush_chunk()
        self._num_tokens += len(tokens)

    def _flush_chunk(self) -> None:
        key = f"{len(self._checksums):08d}"
        checksum = zlib.crc32(self._tokens.data)
        self._write_member(f"{key}.tokens.npy", self._tokens)
        if self._has_mask:
            checksum = zlib.crc32(self._mask.data, checksum)
            self._write_member(f"{key}.mask.npy", self._mask)
        self._checksums.append(checksum)
        self._filled = 0

    def _close_shard(self) -> None:
        if self._filled:
            self._tokens[self._filled :] = self._eos
            self._mask[self._filled :] = 0
            self._flush_chunk()
        borders = np.concatenate(self._borders)
        checksums = np.asarray(self._checksums, dtype=np.uint32)
        self._write_member("borders.npy", borders)
        self._write_member("crc32.npy", checksums)
        self._write(bytes(2 * BLOCK))
        self._file.close()
        self._file = None
        self.shards.append(
            {
                "name": self._name,
                "num_tokens": self._num_tokens,
                "num_documents": len(borders),
                "bytes": self._num_bytes,
                "sha256": self._digest.hexdigest(),
                "tail_crc32": zlib.crc32(checksums.data, zlib.crc32(borders.data)),
            }
        )

    def _write_member(self, name: str, array: np.ndarray) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        assert header.tell() == _NPY_HEADER, "numpy changed the size of a one-dimensional array's header"
        size = _NPY_HEADER + array.nbytes
        self._write(member_header(name, size))
        self._write(header.getvalue())
        self._write(array.data)
        self._write(bytes(padded(size) - size))

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._num_bytes += len(data) if isinstance(data, bytes) else data.nbytes
        self._file.write(data)


class TokenShard:
    """One token shard, memory-mapped when it is first touched.

    `problem` is None or the sentence that says why nothing of the shard can be read; its counts hold either way.
    """

    def __init__(self, path: Path, entry: dict, index: dict) -> None:
        self.path = path
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.sha256: str = entry["sha256"]
        self.chunk_tokens: int = index["chunk_tokens"]
        self.num_chunks = -(-self.num_tokens // self.chunk_tokens)
        self.has_loss_mask: bool = index["has_loss_mask"]
        self.dtype = np.dtype(index["dtype"])
        self._vocab_size: int | None = index.get("vocab_size")
        self._entry = entry
        self._map: mmap.mmap | None = None
        self._checked = bytearray(self.num_chunks)  # 1 where the checksum was found right
        self.problem = self._size_problem()

    def _size_problem(self) -> str | None:
        try:
            size = self.path.stat().st_size
        except OSError as error:
            reason = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
            return f"{self.path} {reason}"
        if size != self._entry["bytes"]:
            cut = "was cut short" if size < self._entry["bytes"] else "was changed"
            return f"{self.path} {cut}: it has {size} bytes, its index.json says {self._entry['bytes']}"
        return None

    def open(self) -> bool:
        """Map the file if that has not happened; False when the shard cannot be read (see `problem`)."""
        if self._map is not None or self.problem is not None:
            return self.problem is None
        self.problem = self._size_problem()  # it may have changed since
        if self.problem is not None:
            return False
        try:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            self.problem = f"{self.path} cannot be read ({error.strerror})"
            return False
        tail = self.num_chunks * chunk_stride(self.chunk_tokens, self.dtype.itemsize, self.has_loss_mask)
        borders = np.ndarray(self.num_documents, np.uint32, mapped, tail + BLOCK + _NPY_HEADER)
        tail += BLOCK + padded(_NPY_HEADER + borders.nbytes)
        checksums = np.ndarray(self.num_chunks, np.uint32, mapped, tail + BLOCK + _NPY_HEADER)
        if zlib.crc32(checksums.data, zlib.crc32(borders.data)) != self._entry["tail_crc32"]:
            self.problem = f"{self.path}: the document borders do not match their checksum"
            return False
        if borders[-1] != self.num_tokens or not borders[0] or (borders[1:] <= borders[:-1]).any():
            self.problem = f"{self.path}: the document borders do not ascend to its {self.num_tokens} tokens"
            return False
        self._checksums = checksums
        self.borders = borders
        self._border_values = memoryview(borders)
        self._set_views(mapped)
        self._map = mapped
        return True

    def _set_views(self, mapped: mmap.mmap) -> None:
        stride = chunk_stride(self.chunk_tokens, self.dtype.itemsize, self.has_loss_mask)
        shape = (self.num_chunks, self.chunk_tokens)
        first = BLOCK + _NPY_HEADER
        self._tokens = np.ndarray(shape, self.dtype, mapped, first, (stride, self.dtype.itemsize))
        if self.has_loss_mask:
            first = chunk_stride(self.chunk_tokens, self.dtype.itemsize, False) + BLOCK + _NPY_HEADER
            self._mask = np.ndarray(shape, np.uint8, mapped, first, (stride, 1))

    def read(self, start: int, out: np.ndarray, mask: np.ndarray | None = None) -> str | None:
        """out[i] = token start + i, mask[i] = its loss mask (for shards that have one).

        Returns:
            None, or the sentence that says what is wrong with the chunks these tokens stand in.
        """
        chunk, offset = divmod(start, self.chunk_tokens)
        done = 0
        while done < len(out):
            if not self._checked[chunk] and (problem := self.chunk_problem(chunk)) is not None:
                return problem
            stop = min(offset + len(out) - done, self.chunk_tokens)
            after = done + stop - offset
            out[done:after] = self._tokens[chunk, offset:stop]
            if mask is not None:
                mask[done:after] = self._mask[chunk, offset:stop]
            done, chunk, offset = after, chunk + 1, 0
        return None

    def chunk_problem(self, chunk: int) -> str | None:
        """None when a chunk holds what was written (checked the first time), else what is wrong."""
        if not self.open():
            return self.problem
        if self._checked[chunk]:
            return None
        checksum = zlib.crc32(self._tokens[chunk].data)
        if self.has_loss_mask:
            checksum = zlib.crc32(self._mask[chunk].data, checksum)
        if checksum != self._checksums[chunk]:
            first = chunk * self.chunk_tokens
            return (
                f"{self.path}: chunk {chunk} (tokens from {first} to {first + self.chunk_tokens - 1}) does not match "
                "its checksum"
            )
        if self._vocab_size is not None and (highest := int(self._tokens[chunk].max())) >= self._vocab_size:
            return f"{self.path}: chunk {chunk} holds token {highest}, the vocabulary ends at {self._vocab_size - 1}"
        self._checked[chunk] = 1
        return None

    def borders_within(self, start: int, stop: int) -> np.ndarray:
        """The document ends b with start < b <= stop (uint32)."""
        low = bisect_right(self._border_values, start)
        high = bisect_right(self._border_values, stop, low, min(len(self._border_values), low + stop - start))
        return self.borders[low:high]

    def document(self, number: int) -> tuple[int, int]:
        """Where document `number` begins and ends (its eos included)."""
        return (int(self.borders[number - 1]) if number else 0), int(self.borders[number])

    def release(self) -> None:
        """Give mapped pages back, so that a process's memory does not grow with what it has read; they stay cached."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
