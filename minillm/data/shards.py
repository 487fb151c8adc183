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
import re
from collections.abc import Iterable, Iterator
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
        ("dtype", "chunk_tokens", "has_loss_mask", "tokenizer", "eos_token_id", "num_bad_samples"),
        ("num_tokens", "num_documents", "tail_crc32"),
    ),
}
_SHARD_NAME = re.compile(r"[^./\\\x00][^/\\\x00]*\.tar")

Document = dict[str, object]


class BadSample(ValueError):
    """One sample that is no document; the message says why."""


class TextShard(NamedTuple):
    """A text shard and what its index says of it (None where there is no index)."""

    path: Path
    num_samples: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None

    def problem(self, check_content: bool = True) -> str | None:
        """What is wrong with the file as a whole, or None. Without an index only its absence can be seen here."""
        if not self.path.is_file():
            return f"{self.path} is missing"
        size = self.path.stat().st_size
        if self.num_bytes is not None and size != self.num_bytes:
            cut = "was cut short" if size < self.num_bytes else "was changed"
            return f"{self.path} {cut}: it has {size} bytes, its {INDEX} says {self.num_bytes}"
        if check_content and self.sha256 is not None and sha256_file(self.path) != self.sha256:
            return f"{self.path} does not match the checksum in its {INDEX}"
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
    if not path.is_file():
        return None
    return check_shard_index(read_json(path), str(path))


def check_shard_index(index: object, where: str) -> dict:
    """Return `index` when it is one of the two known formats with harmless names; `where` names it in errors."""
    known = (TEXT_FORMAT, TOKEN_FORMAT)
    found = index.get("format") if isinstance(index, dict) else None
    if found not in known:
        raise UserError(f"{where} has format {found!r}, known are {' and '.join(known)}: is this a folder of shards?")
    header, entry = _REQUIRED[found]
    try:
        for key in header:
            index[key]  # type: ignore[index]  # noqa: B018
        for shard in index["shards"]:  # type: ignore[index]
            if not _SHARD_NAME.fullmatch(shard["name"]):
                raise UserError(f"{where} names a shard {shard['name']!r}: names must be plain NAME.tar")
            if not isinstance(shard["bytes"], int) or not isinstance(shard["sha256"], str):
                raise TypeError("bytes or sha256")
            for key in entry:
                shard[key]  # noqa: B018
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error}): write the shards again") from error
    return index  # type: ignore[return-value]


def text_shards_of_index(folder: Path, index: dict) -> list[TextShard]:
    """The shards an index lists, in its order."""
    return [
        TextShard(folder / entry["name"], entry["num_samples"], entry["bytes"], entry["sha256"])
        for entry in index["shards"]
    ]


class Sample(NamedTuple):
    """A run of members with one key, standing in [start, end) of its tar; `size` is the bytes of their data."""

    key: str
    start: int
    end: int
    size: int
    fields: dict[str, bytes | None]


def iterate_samples(
    file: BinaryIO, start: int = 0, end: int | None = None, content: bool = True
) -> Iterator[Sample]:
    """Yield the samples of a tar whose headers stand in [start, end); fields hold None where `content` is False.

    The key is the member's name up to the first dot of its last component, as in WebDataset.
    Raises DamagedTar as `iterate_members` does, after the samples that are known to be whole.
    """
    key, first, last, size = None, start, start, 0
    fields: dict[str, bytes | None] = {}
    for member in iterate_members(file, start, end, content):
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if fields and folder + slash + stem != key:
            yield Sample(key, first, last, size, fields)
            fields, size = {}, 0
        if not fields:
            key, first = folder + slash + stem, member.start
        fields[extension.lower()] = member.data
        last = member.end
        size += member.size
    if fields:
        yield Sample(key, first, last, size, fields)


def decode_sample(fields: dict[str, bytes | None]) -> Document:
    """The document in a sample: its json with "text" or "messages", else its txt.

    Raises:
        BadSample: neither is there, not UTF-8, not JSON, or text that is no valid Unicode.
    """
    raw = fields.get("json")
    if raw is not None:
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSample(f"not UTF-8 at byte {error.start}") from error
        except (json.JSONDecodeError, RecursionError) as error:
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
    raise BadSample(f"no .json or .txt member, only {', '.join('.' + name for name in sorted(fields))}")


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"half of a surrogate pair at character {error.start}") from error
    return text


def kind_of_documents(shards: Iterable[TextShard]) -> str:
    """TEXTS or CONVERSATIONS, by the first sample that can be decoded (shards without an index do not say)."""
    for shard in shards:
        try:
            with open(shard.path, "rb") as file:
                for sample in iterate_samples(file):
                    try:
                        return CONVERSATIONS if "messages" in decode_sample(sample.fields) else TEXTS
                    except BadSample:
                        continue
        except (OSError, DamagedTar):
            continue  # named and counted where the shards are read in earnest
    return TEXTS
