"""Text shards: WebDataset tars of documents, their index, and reading them without trusting them.

Contract: a text shard is an uncompressed tar of samples, KEY.json ({"text": str} or {"messages": [...]}) or KEY.txt;
any WebDataset reader opens it. index.json beside the shards,

    {"format": "minillm-text-1", "documents": "texts" | "conversations", "num_samples": int,
     "shards": [{"name": str, "num_samples": int, "bytes": int, "sha256": hex}, ...]}

makes a missing or cut shard visible; tars of others have no index and must end with their end-of-archive block. Only
json and txt are decoded (nothing is unpickled, nothing is run), and no key or name from a shard becomes part of a path.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minillm.data.tar import DamagedTar, iterate_members
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, sha256_file

INDEX = "index.json"
TEXT_FORMAT = "minillm-text-1"
TOKEN_FORMAT = "minillm-tokens-1"
TEXTS, CONVERSATIONS = "texts", "conversations"

# keys an index must have beside those of every index: (of its own, of each shard)
_REQUIRED = {
    TEXT_FORMAT: ((), ("num_samples",)),
    TOKEN_FORMAT: (
        ("dtype", "chunk_tokens", "has_loss_mask", "tokenizer", "eos_token_id", "num_bad_samples", "num_tokens",
         "num_documents"),
        ("num_tokens", "num_documents", "tail_crc32"),
    ),
}  # fmt: skip
_OPTIONAL = ("documents", "num_samples", "vocab_size")
# what they hold, where it is not a count
_VALID: dict[str, Callable[[object], bool]] = {
    "sha256": lambda value: isinstance(value, str),
    "tokenizer": lambda value: isinstance(value, str),
    "dtype": lambda value: value in ("<u2", "<u4"),
    "has_loss_mask": lambda value: isinstance(value, bool),
    "documents": lambda value: value in (TEXTS, CONVERSATIONS),
    "chunk_tokens": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
}
_SHARD_NAME = re.compile(r"[^./\\\x00][^/\\\x00]*\.tar")

Document = dict[str, object]


class BadSample(ValueError):
    """One sample that is not a document; the message says why."""


class TextShard(NamedTuple):
    """A text shard and what its index says of it (None where there is no index)."""

    path: Path
    num_samples: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None

    def problem(self, check_content: bool = True) -> str | None:
        """What is wrong with the file as a whole, or None. Without an index only its absence can be seen here."""
        try:
            if not self.path.is_file():
                return f"{self.path} is missing"
            size = self.path.stat().st_size
            if self.num_bytes is not None and size != self.num_bytes:
                cut = "was cut short" if size < self.num_bytes else "was changed"
                return f"{self.path} {cut}: it has {size} bytes, its {INDEX} says {self.num_bytes}"
            if check_content and self.sha256 is not None and sha256_file(self.path) != self.sha256:
                return f"{self.path} does not match the checksum in its {INDEX}"
        except OSError as error:
            return f"{self.path} cannot be read ({error.strerror})"
        return None


class FoundShards(NamedTuple):
    """Shards of one folder: their names in order, and the folder's checked index if it has one."""

    folder: Path
    names: list[str]
    index: dict | None


def read_shard_index(folder: Path) -> dict | None:
    """The index.json of a folder of shards, or None where there is none.

    Raises:
        UserError: it is not JSON, of a format this version does not know, or names a file outside its folder.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        return None
    try:
        return check_shard_index(read_json(path), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): write the shards again") from error


def check_shard_index(index: object, where: str) -> dict:
    """Return `index` when it is one of the two known formats with harmless names; `where` names it in errors."""
    known = (TEXT_FORMAT, TOKEN_FORMAT)
    found = index.get("format") if isinstance(index, dict) else None
    if found not in known:
        raise UserError(f"{where} has format {found!r}, known are {' and '.join(known)}: is this a folder of shards?")
    header, entry = _REQUIRED[found]
    try:
        for key in (*header, *(key for key in _OPTIONAL if key in index)):
            _check(index, key)
        if not index.get("eos_token_id", 0) < index.get("vocab_size", math.inf):
            raise ValueError(f"eos_token_id is {index['eos_token_id']}, above its vocabulary")
        names = set()
        for shard in index["shards"]:
            if not _SHARD_NAME.fullmatch(shard["name"]):
                raise UserError(f"{where} names a shard {shard['name']!r}: names must be plain NAME.tar")
            if shard["name"] in names:
                raise ValueError(f"{shard['name']} is listed twice")
            names.add(shard["name"])
            for key in ("bytes", "sha256", *entry):
                _check(shard, key)
            if found == TOKEN_FORMAT:
                _check_size(shard, index)
    except KeyError as error:
        raise UserError(f"{where} is damaged (no {error}): write the shards again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is damaged ({error}): write the shards again") from error
    return index


def _check(values: dict, key: str) -> None:
    """An index's value under `key`: a count where nothing else is said of it."""
    value = values[key]
    if key in _VALID:
        if not _VALID[key](value):
            raise ValueError(f"{key} is {value!r}")
    elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} is {value!r}: it must be a whole number, 0 or more")


def _check_size(shard: dict, index: dict) -> None:
    from minillm.data.token_shards import shard_bytes

    counts = shard["num_tokens"], shard["num_documents"]
    if min(counts) < 1 or counts[0] < counts[1]:
        raise ValueError(f"{shard['name']} has {counts[0]} tokens in {counts[1]} documents")
    needed = shard_bytes(*counts, index["chunk_tokens"], index["dtype"], index["has_loss_mask"])
    if needed != shard["bytes"]:
        raise ValueError(f"{shard['name']} has {shard['bytes']} bytes, its counts take {needed}")


def text_shards_of_index(folder: Path, index: dict) -> list[TextShard]:
    """The shards an index lists, in its order."""
    return [
        TextShard(folder / entry["name"], entry["num_samples"], entry["bytes"], entry["sha256"])
        for entry in index["shards"]
    ]


class Sample(NamedTuple):
    """A run of members with one key, standing in [start, end) of its tar; `size` is the bytes of their data.

    `twice` is the extension of a member that is there twice: which of them is meant, nobody knows.
    """

    key: str
    start: int
    end: int
    size: int
    fields: dict[str, bytes | None]
    twice: str | None = None

    def document(self) -> Document:
        """The document in it; raises BadSample as `decode_sample` does."""
        if self.twice is not None:
            raise BadSample(f"it has two members .{self.twice}")
        return decode_sample(self.fields)


def iterate_samples(
    file: BinaryIO, start: int = 0, end: int | None = None, content: bool = True
) -> Iterator[Sample]:
    """Yield the samples of a tar whose headers stand in [start, end); fields hold None where `content` is False.

    The key is the member's name up to the first dot of its last component, as in WebDataset.
    Raises DamagedTar as `iterate_members` does, after the samples that are known to be whole.
    """
    key, first, last, size, twice = None, start, start, 0, None
    fields: dict[str, bytes | None] = {}
    for member in iterate_members(file, start, end, content):
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if fields and folder + slash + stem != key:
            yield Sample(key, first, last, size, fields, twice)
            fields, size, twice = {}, 0, None
        if not fields:
            key, first = folder + slash + stem, member.start
        if extension.lower() in fields:
            twice = extension.lower()
        fields[extension.lower()] = member.data
        last = member.end
        size += member.size
    if fields:
        yield Sample(key, first, last, size, fields, twice)


def decode_sample(fields: dict[str, bytes | None]) -> Document:
    """The document in a sample: its json with "text" or "messages", else its txt.

    Raises:
        BadSample: neither is there, not UTF-8, not JSON, or text that is not valid Unicode.
    """
    raw = fields.get("json")
    if raw is not None:
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSample(f"not UTF-8 at byte {error.start}") from error
        except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
            raise BadSample(f"not JSON ({error})") from error
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            return {"messages": value["messages"]}
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return {"text": _unicode(value["text"])}
    if (raw := fields.get("txt")) is not None:
        try:
            return {"text": raw.decode("utf-8")}
        except UnicodeDecodeError as error:
            raise BadSample(f"not UTF-8 at byte {error.start}") from error
    if "json" in fields:
        raise BadSample('its json has neither a "text" string nor a "messages" list')
    tokens = "; token shards are read with their index.json" if any(name.endswith("npy") for name in fields) else ""
    raise BadSample(f"no .json or .txt member, only {', '.join('.' + name for name in sorted(fields))}{tokens}")


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"half of a surrogate pair at character {error.start}") from error
    return text


def kind_of_documents(shards: Iterable[TextShard]) -> str:
    """TEXTS or CONVERSATIONS, by the first sample that can be decoded (shards without an index do not say)."""
    for shard in shards:
        if not shard.path.is_file():
            continue
        try:
            with open(shard.path, "rb") as file:
                for sample in iterate_samples(file):
                    try:
                        return CONVERSATIONS if "messages" in sample.document() else TEXTS
                    except BadSample:
                        continue
        except (OSError, DamagedTar):
            continue  # named and counted where the shards are read in earnest
    return TEXTS
