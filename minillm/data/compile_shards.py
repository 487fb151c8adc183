"""Text shards -> token shards, on all cores, in memory that does not grow with the corpus.

Contract: the output depends only on the text shards and their order and on the tokenizer, byte for byte, whatever the
number of workers: they encode pieces of tars (UNIT_BYTES of text between two samples, so that a single tar keeps all
cores busy) and one writer puts the results down in order. `out` appears whole or not at all. Bad samples are named,
counted and left out up to a limit, past which the compilation stops.
"""

from __future__ import annotations

import errno
import shutil
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minillm.data.chat_template import check_chat_tokenizer, check_messages, encode_conversations
from minillm.data.tar import DamagedTar
from minillm.data.text_encoding import encode_texts, fingerprint, vocabulary_size
from minillm.data.text_shards import (
    CONVERSATIONS,
    INDEX,
    TOKEN_FORMAT,
    BadSample,
    Document,
    TextShard,
    iterate_samples,
)
from minillm.data.token_shards import CHUNK_TOKENS, SHARD_TOKENS, TokenShardWriter, token_dtype
from minillm.data.worker_pool import available_cores, shared_with_workers, worker_pool
from minillm.utils.errors import UserError
from minillm.utils.files import publish_directory, write_json
from minillm.utils.logging import say, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNIT_BYTES = 512 << 10  # an Encoding takes some 150 bytes a token, so this much text is about 30 MB in a worker
_MAX_NAMED = 10


class Unit(NamedTuple):
    """The samples of a text shard whose headers begin in [start, end)."""

    path: Path
    start: int
    end: int
    num_bytes: int


class Plan(NamedTuple):
    """What a text shard turned out to hold: its pieces, and what is wrong with it (`num_bad` samples are lost)."""

    units: list[Unit]
    problem: str | None
    num_bad: int


class Encoded(NamedTuple):
    """A unit's documents, each with its eos: tokens [sum of lengths], lengths [documents], mask as tokens or None."""

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    num_target_bytes: int
    bad: list[str]


@dataclass
class BadSamples:
    """Counts what is left out; the one that exceeds `limit` raises."""

    limit: int
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, problem: str, count: int = 1) -> None:
        """Count `count` samples lost to `problem`."""
        self.count += count
        if self.count > self.limit:
            rest = f" ({self.count} bad samples so far)" if self.count > 1 else ""
            raise UserError(
                f"{problem}{rest}; allowed are {self.limit}: write the shards again, or raise data.max_bad_samples"
            )
        if len(self.named) < _MAX_NAMED:
            self.named.append(problem)
            warn(f"left out {count} sample{'s' * (count != 1)}: {problem}")


def compile_text_shards(
    shards: list[TextShard],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    kind: str,
    source_key: str,
    workers: int | None = None,
    max_bad_samples: int = 0,
) -> None:
    """Write `out`, a folder of token shards that must not exist, from text shards.

    Args:
        kind: TEXTS or CONVERSATIONS (`kind_of_documents`).
        source_key: identity of shards and tokenizer, kept in the index.
        workers: processes; None uses every core this process may use.

    Raises:
        UserError: more bad samples than allowed, texts mixed with conversations, no document, a full disk.
    """
    began = time.monotonic()
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run; the caller holds the lock
    temporary.mkdir(parents=True)
    try:
        index = _compile(shards, tokenizer, temporary, kind, workers or available_cores(), max_bad_samples)
        write_json(temporary / INDEX, {"format": TOKEN_FORMAT, "source_key": source_key, **index})
        publish_directory(temporary, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left for token shards in {out.parent}: free some, or name another folder") from error
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process was killed, most likely for want of memory: use fewer workers") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - began
    say(
        f"{out}: {index['num_documents']:,} documents, {index['num_tokens']:,} tokens in {len(index['shards'])} token "
        f"shards ({index['num_tokens'] / max(seconds, 1e-9):,.0f} tokens/s)"
    )


def _compile(
    shards: list[TextShard], tokenizer: PreTrainedTokenizerFast, folder: Path, kind: str, workers: int, max_bad: int
) -> dict:
    from tqdm import tqdm

    bad = BadSamples(max_bad)
    conversations = kind == CONVERSATIONS
    if conversations:
        check_chat_tokenizer(tokenizer)
    dtype = token_dtype(vocabulary_size(tokenizer))
    writer = TokenShardWriter(
        folder, dtype=dtype, eos_token_id=tokenizer.eos_token_id, has_loss_mask=conversations
    )
    counts = {"num_documents": 0, "num_tokens": 0, "num_target_tokens": 0, "num_target_bytes": 0}
    encode_texts(tokenizer, [""])  # what it keeps between calls is built here once, not in every worker
    with worker_pool(workers, (tokenizer, conversations, dtype)) as pool:
        units = []
        for plan in pool.in_order(plan_shard, shards):
            units += plan.units
            if plan.problem is not None:
                bad.add(plan.problem, plan.num_bad)
        total = sum(unit.num_bytes for unit in units)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None, file=sys.stderr)
        with bar:
            for unit, encoded in zip(units, pool.in_order(encode_unit, units)):
                for problem in encoded.bad:
                    bad.add(problem)
                writer.append(encoded.tokens, encoded.lengths, encoded.mask)
                targets = encoded.tokens.size - encoded.lengths.size if encoded.mask is None else encoded.mask.sum()
                counts["num_documents"] += encoded.lengths.size
                counts["num_tokens"] += encoded.tokens.size
                counts["num_target_tokens"] += int(targets)
                counts["num_target_bytes"] += encoded.num_target_bytes
                bar.update(unit.num_bytes)
                rate = counts["num_tokens"] / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
    if counts["num_documents"] == 0:
        raise UserError(f"{shards[0].path.parent} holds no document: there is nothing to tokenize")
    if counts["num_target_tokens"] == 0:
        raise UserError(f"{shards[0].path.parent} holds empty documents only: there is nothing to learn from")
    return {
        "dtype": dtype.str,
        "chunk_tokens": CHUNK_TOKENS,
        "has_loss_mask": conversations,
        "tokenizer": fingerprint(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        **counts,
        "num_bad_samples": bad.count,
        "shards": writer.close(),
    }


def plan_shard(shard: TextShard) -> Plan:
    """Check a text shard against its index and find the borders of its units, reading headers only."""
    problem = shard.problem()
    if problem is not None:
        return Plan([], problem, shard.num_samples or 1)
    units: list[Unit] = []
    start = end = size = 0
    num_samples = 0
    try:
        with open(shard.path, "rb", buffering=0) as file:
            for sample in iterate_samples(file, content=False):
                if size >= UNIT_BYTES:
                    units.append(Unit(shard.path, start, end, size))
                    start, size = sample.start, 0
                end = sample.end
                size += sample.size
                num_samples += 1
    except DamagedTar as error:
        problem = f"{shard.path}: {error}"
    except OSError as error:
        problem = f"{shard.path} cannot be read ({error.strerror})"
    if num_samples:
        units.append(Unit(shard.path, start, end, size))
    if problem is None and shard.num_samples not in (None, num_samples):
        problem = f"{shard.path} holds {num_samples} samples, its {INDEX} says {shard.num_samples}"
    return Plan(units, problem, 1)


def encode_unit(unit: Unit) -> Encoded:
    tokenizer, conversations, dtype = shared_with_workers()
    documents: list[Document] = []
    bad: list[str] = []
    with open(unit.path, "rb", buffering=1 << 20) as file:
        for sample in iterate_samples(file, unit.start, unit.end):
            where = f"{unit.path}: sample {sample.key!r}"
            try:
                documents.append(_checked(sample.document(), conversations, where))
            except BadSample as error:
                bad.append(f"{where}: {error}")
    encode = _encode_conversations if conversations else _encode_texts
    flat, lengths, mask, num_bytes = encode(tokenizer, documents)
    return Encoded(
        np.array(flat, dtype=dtype),
        np.array(lengths, dtype=np.int64),
        np.array(mask, dtype=np.uint8) if conversations else None,
        num_bytes,
        bad,
    )


def _checked(document: Document, conversations: bool, where: str) -> Document:
    if ("messages" in document) != conversations:
        raise UserError(
            f"{where} is a {'text' if conversations else 'conversation'}, the samples before it are not: texts and "
            "conversations need shards of their own; name both in data.train"
        )
    if conversations:
        try:
            check_messages(document["messages"])
        except UserError as error:
            raise BadSample(str(error)) from error
    return document


def _encode_texts(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> tuple:
    texts = [document["text"] for document in documents]
    flat: list[int] = []
    lengths = []
    for ids in encode_texts(tokenizer, texts):
        flat += ids
        flat.append(tokenizer.eos_token_id)
        lengths.append(len(ids) + 1)
    return flat, lengths, None, sum(len(text.encode()) for text in texts)


def _encode_conversations(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> tuple:
    conversations = [document["messages"] for document in documents]
    flat: list[int] = []
    mask: list[int] = []
    lengths = []
    for ids, learned in encode_conversations(tokenizer, conversations):
        flat += ids
        flat.append(tokenizer.eos_token_id)
        mask += learned
        mask.append(0)
        lengths.append(len(ids) + 1)
    num_bytes = sum(
        len(message["content"].encode())
        for messages in conversations
        for message in messages
        if message["role"] == "assistant"
    )
    return flat, lengths, mask, num_bytes


def source_key_of(shards: list[TextShard], tokenizer_fingerprint: str) -> list:
    """What decides the content of the token shards of text shards, as a JSON value."""
    files = []
    for shard in shards:
        if shard.sha256 is not None:
            files.append([shard.path.name, shard.num_bytes, shard.sha256])
        elif shard.path.is_file():
            status = shard.path.stat()
            files.append([shard.path.name, status.st_size, status.st_mtime_ns])
        else:
            files.append([shard.path.name, None, None])
    return [TOKEN_FORMAT, CHUNK_TOKENS, SHARD_TOKENS, tokenizer_fingerprint, files]
