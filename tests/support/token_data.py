"""Token shards made without a tokenizer, and the slow, obvious reading that streams are checked against."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from minillm.data.text_shards import FoundShards, read_shard_index
from minillm.data.token_shards import TokenShardWriter
from minillm.data.token_source import TokenSource, open_token_source
from minillm.utils.files import write_json

EOS = 0
IGNORED = -100


def random_documents(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Documents of 1 .. longest ids from 1 to 999, without eos; some are a single token."""
    draw = random.Random(seed)
    return [[draw.randint(1, 999) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def write_token_folder(
    folder: Path,
    documents: list[list[int]],
    masks: list[list[int]] | None = None,
    *,
    dtype: str = "<u2",
    chunk_tokens: int = 64,
    shard_tokens: int = 700,
) -> Path:
    """Token shards of documents (eos is added); fingerprint "test"."""
    folder.mkdir(parents=True)
    writer = TokenShardWriter(
        folder,
        dtype=np.dtype(dtype),
        eos_token_id=EOS,
        has_loss_mask=masks is not None,
        chunk_tokens=chunk_tokens,
        shard_tokens=shard_tokens,
    )
    for number, document in enumerate(documents):  # one by one: how they come in parts must not matter
        mask = None if masks is None else np.array([*masks[number], 0], np.uint8)
        writer.append(np.array([*document, EOS], dtype), np.array([len(document) + 1]), mask)
    shards = writer.close()
    index = {
        "format": "minillm-tokens-1",
        "source_key": "",
        "dtype": dtype,
        "chunk_tokens": chunk_tokens,
        "has_loss_mask": masks is not None,
        "tokenizer": "test",
        "vocab_size": 1000 if dtype == "<u2" else 200_000,
        "eos_token_id": EOS,
        "num_documents": len(documents),
        "num_tokens": sum(len(document) + 1 for document in documents),
        "num_bad_samples": 0,
        "shards": shards,
    }
    write_json(folder / "index.json", index)
    return folder


def open_folder(folder: Path, *, name: str = "test", weight: float = 1.0, max_bad_samples: int = 0) -> TokenSource:
    index = read_shard_index(folder)
    found = FoundShards(folder, [shard["name"] for shard in index["shards"]], index)
    return open_token_source(
        [found],
        name=name,
        weight=weight,
        fingerprint="test",
        tokenizer_path=Path("tokenizer"),
        max_bad_samples=max_bad_samples,
    )


def split_into_shards(documents: list[list[int]], shard_tokens: int = 700) -> list[list[int]]:
    """Which documents stand in which shard: a shard is full with the document that reaches its size."""
    shards: list[list[int]] = [[]]
    used = 0
    for number, document in enumerate(documents):
        if used >= shard_tokens:
            shards.append([])
            used = 0
        shards[-1].append(number)
        used += len(document) + 1
    return shards


def expected_packed_rows(
    documents: list[list[int]],
    seq_len: int,
    masks: list[list[int]] | None = None,
    shard_tokens: int = 700,
    stride: int | None = None,
) -> list[dict[str, list[int]]]:
    """The rows of one epoch of "concat" in stored order, token by token."""
    stride = stride or seq_len
    rows = []
    for shard in split_into_shards(documents, shard_tokens):
        flat = []  # (token, document, position, may be learned)
        for number in shard:
            learned = masks[number] + [0] if masks else [1] * (len(documents[number]) + 1)
            for position, token in enumerate([*documents[number], EOS]):
                flat.append((token, number, position, learned[position]))
        for start in range(0, len(flat) - 1, stride):
            if start and start - stride + seq_len >= len(flat) - 1:
                break  # the row before reached the last target
            row = {key: [] for key in ("input_ids", "shift_labels", "position_ids", "document_ids")}
            seen: list[int] = []
            first_position = 0
            for place in range(start, start + seq_len):
                token, document, position, _ = flat[place] if place < len(flat) else (EOS, -1, place - len(flat), 0)
                if document not in seen:
                    seen.append(document)
                    first_position = position
                row["input_ids"].append(token)
                row["position_ids"].append(position - first_position)
                row["document_ids"].append(len(seen) - 1)
                target = flat[place + 1] if place + 1 < len(flat) else None
                learn = target is not None and target[1] == document and target[3]
                row["shift_labels"].append(target[0] if learn else IGNORED)
            rows.append(row)
    return rows
