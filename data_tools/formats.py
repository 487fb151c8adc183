"""One reader per file format: parts of files to raw records, one in memory at a time.

Contract: FORMATS maps a suffix to its Format. `read` yields (place, default id, fields) for every record of a span, or
a Rejected for one that cannot be read; a file that is not what its name says, or breaks off, is a UserError. `split`
cuts a file into spans that may be read alone. Ids do not depend on where a file lies nor on how it was cut:

    .txt .md            the name; above PIECE_BYTES pieces cut at line ends, NAME#1, NAME#2, ...  (.gz and .zst too)
    .jsonl              "id" of the line (string or whole number), else NAME:LINE                 (.gz and .zst too)
    .csv .tsv .parquet  the column "id", else NAME:ROW                      (.csv and .tsv with .gz and .zst too)
    .json               a list of objects: "id", else NAME:NUMBER
    .tar                WebDataset: a sample is the members with one key; "id" of KEY.json, else NAME/KEY
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.extras import require
from data_tools.files import (
    COMPRESSIONS,
    PIECE_BYTES,
    NotUtf8,
    Progress,
    Raw,
    Record,
    Rejected,
    Span,
    damage_is_told,
    not_utf8,
    open_binary,
)
from minillm.data.tar import DamagedTar, iterate_members
from minillm.utils.errors import UserError

MAX_RECORD_BYTES = 32 << 20  # a longer line or field is refused: the memory of every later step depends on it


@dataclass(frozen=True)
class Format:
    """How a kind of file is read and cut."""

    read: Callable[[Span, Progress], Iterator[Raw | Rejected]]
    split: Callable[[Span, int], list[Span]] = lambda span, size: [span]
    compressible: bool = False


def suffix_of(path: Path | str) -> str:
    """The part of the name that says what it is: ".jsonl", ".jsonl.gz", ...; "" where nothing here reads it."""
    name = Path(path).name.lower()
    found = [suffix for suffix in SUFFIXES if name.endswith(suffix) and len(name) > len(suffix)]
    return max(found, key=len, default="")


def is_text(path: Path | str) -> bool:
    """Whether a file is text, compressed or not."""
    suffix = suffix_of(path)
    return bool(suffix) and format_of(suffix).read is _read_text


def format_of(suffix: str) -> Format:
    """The format behind a suffix, compressed or not."""
    for compression in COMPRESSIONS:
        suffix = suffix.removesuffix(compression)
    return FORMATS[suffix]


# -- text --------------------------------------------------------------------------------------------------------------


def _read_text(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    pieces = read_text_pieces(Path(span.path), span.piece_bytes, progress)
    number = 0
    try:
        held = next(pieces, None)
        while held is not None:
            following = next(pieces, None)
            number += 1
            several = number > 1 or following is not None
            yield Raw(span.path, f"{span.name}#{number}" if several else span.name, {"text": held})
            held = following
    except NotUtf8 as error:
        yield Rejected(span.name, "not_utf8", str(error))


def read_text_pieces(
    path: Path, piece_bytes: int = PIECE_BYTES, progress: Progress = lambda size: None
) -> Iterator[str]:
    """A UTF-8 file (a byte order mark is dropped) as consecutive pieces of about `piece_bytes`, cut after line ends.

    Only a line longer than a piece is cut inside. A file of up to `piece_bytes` comes as one piece.

    Raises:
        UserError: it is not UTF-8; the message has the byte's offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte not yet decoded
    position = 0
    carry = ""  # the unfinished last line
    with damage_is_told(path), open_binary(path, progress) as file:
        while True:
            block = file.read(piece_bytes)
            position += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.start counts from the bytes the decoder had kept from the block before
                raise not_utf8(path, offset + error.start, error.object[error.start]) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset = position - len(decoder.getstate()[0])
            carry += text
            if not block or len(block) < piece_bytes and not decoder.getstate()[0]:
                break
            end = carry.rfind("\n") + 1 or len(carry)
            # a file of exactly one piece must stay one piece: hand out only when more is known to follow
            if file.peek(1):
                yield carry[:end]
                carry = carry[end:]
    if carry:
        yield carry


# -- lines -------------------------------------------------------------------------------------------------------------


def _read_jsonl(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    for number, offset, line in _lines(span, progress):
        place, name = f"{span.path}:{number}", f"{span.name}:{number}"
        if line is None:
            yield Rejected(name, "too_long", f"{place} is longer than {MAX_RECORD_BYTES:,} bytes")
            continue
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line, offset = line[len(codecs.BOM_UTF8) :], offset + len(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        try:
            fields = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problem = not_utf8(span.path, offset + error.start, line[error.start], number)
            yield Rejected(name, "not_utf8", str(problem))
        except (ValueError, RecursionError) as error:
            said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield Rejected(name, "not_json", f"{place} is not JSON ({said})", line[:200].decode(errors="replace"))
        else:
            yield from _raw(place, name, fields)


def _raw(place: str, name: str, fields: object) -> Iterator[Raw | Rejected]:
    if isinstance(fields, dict):
        yield Raw(place, name, fields)
    else:
        yield Rejected(name, "not_an_object", f"{place} is {type(fields).__name__}, not an object")


def _lines(span: Span, progress: Progress) -> Iterator[tuple[int, int, bytes | None]]:
    """(number, offset, line) of the lines that begin in the span; None for a line above MAX_RECORD_BYTES."""
    with damage_is_told(span.path), open_binary(span.path, progress) as file:
        if span.start:
            file.seek(span.start)
        offset, number = span.start, span.first
        while offset < span.stop:
            line = file.readline(MAX_RECORD_BYTES)
            if not line:
                return
            size, whole = len(line), line
            if not line.endswith(b"\n") and size == MAX_RECORD_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                    size += len(line)
                whole = None
            yield number, offset, whole
            offset, number = offset + size, number + 1


def _split_jsonl(span: Span, unit_bytes: int) -> list[Span]:
    """Cut at line ends; the lines are counted on the way, since ids have their numbers."""
    if span.suffix != ".jsonl":
        return [replace(span, stop=1 << 62)]  # compressed: read from its beginning to its end
    if span.size <= unit_bytes:
        return [span]
    spans: list[Span] = []
    start, first, lines, position = 0, 1, 0, 0
    with open(span.path, "rb") as file:
        while block := file.read(1 << 20):
            while (cut := start + unit_bytes) <= position + len(block):
                end = block.find(b"\n", max(0, cut - position - 1)) + 1
                if not end:
                    break  # the line does not end in this block
                lines += block.count(b"\n", 0, end)
                spans.append(_part(span, start, position + end, first))
                start, first = position + end, 1 + lines
                position, block = position + end, block[end:]
            lines += block.count(b"\n")
            position += len(block)
    if start < position:
        spans.append(_part(span, start, position, first))
    return spans


def _part(span: Span, start: int, stop: int, first: int) -> Span:
    return replace(span, start=start, stop=stop, first=first, size=stop - start)


# -- tables ------------------------------------------------------------------------------------------------------------


def _read_csv(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    delimiter = "\t" if ".tsv" in span.suffix else ","
    with damage_is_told(span.path), open_binary(span.path, progress) as file:
        # surrogateescape lets a row with foreign bytes through, to be rejected alone
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(lines, delimiter=delimiter, strict=False)
        try:
            header = next(rows, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise UserError(f"{span.path}: the header names a column twice: {header}")
            for number, row in enumerate(rows, 1):
                place, name = f"{span.path}, row {number} (line {rows.line_num})", f"{span.name}:{number}"
                if not row:
                    continue
                if len(row) != len(header):
                    said = f"{place} has {len(row)} fields, the header {len(header)}"
                    yield Rejected(name, "wrong_columns", said, " ".join(row)[:200])
                elif bad := next((cell for cell in row if not _is_unicode(cell)), None):
                    yield Rejected(name, "not_utf8", f"{place} is not UTF-8: {bad[:40]!a}")
                else:
                    yield Raw(place, name, dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise UserError(
                f"{span.path}, line {rows.line_num}: {error}; is a quotation mark before it left open?"
            ) from None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _read_parquet(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    require("pyarrow")
    file = _parquet(span.path)
    number = span.first
    for group in range(span.start, span.stop):
        for batch in file.iter_batches(batch_size=256, row_groups=[group]):
            for fields in batch.to_pylist():
                yield Raw(f"{span.path}, row {number}", f"{span.name}:{number}", fields)
                number += 1
        progress(_group_bytes(file, group))


def _split_parquet(span: Span, unit_bytes: int) -> list[Span]:
    require("pyarrow")
    file = _parquet(span.path)
    spans: list[Span] = []
    start, first, size, rows = 0, 1, 0, 0
    for group in range(file.num_row_groups):
        size += _group_bytes(file, group)
        rows += file.metadata.row_group(group).num_rows
        if size >= unit_bytes or group == file.num_row_groups - 1:
            spans.append(replace(span, start=start, stop=group + 1, first=first, size=size))
            start, first, size = group + 1, 1 + rows, 0
    return spans


def _parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is damaged or cut off ({error}): fetch it again") from error


def _group_bytes(file, group: int) -> int:
    of_group = file.metadata.row_group(group)
    return sum(of_group.column(column).total_compressed_size for column in range(of_group.num_columns))


def _read_json(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    ijson = require("ijson")
    with open_binary(span.path, progress) as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            empty = True
            for number, fields in enumerate(ijson.items(file, "item", use_float=True), 1):
                empty = False
                yield from _raw(f"{span.path}, entry {number}", f"{span.name}:{number}", fields)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise UserError(f"{span.path} is not a complete JSON file ({str(error).splitlines()[0]})") from None
    if empty and not is_json_list(Path(span.path)):
        raise UserError(f"{span.path} is no JSON list of objects: one object a line is a .jsonl")


def is_json_list(path: Path) -> bool:
    """Whether the first character of a .json opens a list."""
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


# -- WebDataset --------------------------------------------------------------------------------------------------------


def _read_tar(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    """A sample is consecutive members with one key: by WebDataset's rule the name up to its last part's first dot."""
    key, parts = "", {}
    with open_binary(span.path, progress) as file:
        try:
            for member in iterate_members(file):
                folder, _, last = member.name.rpartition("/")
                stem, _, extension = last.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if parts and this != key:
                    yield from _sample(span, key, parts)
                    parts = {}
                key = this
                if extension in parts:
                    yield Rejected(f"{span.name}/{key}", "double_member", f"{span.path} has {member.name} twice")
                parts[extension] = member.data
        except DamagedTar as error:
            raise UserError(f"{span.path} is damaged: {error}; fetch it again") from None
        if parts:
            yield from _sample(span, key, parts)


def _sample(span: Span, key: str, parts: dict[str, bytes]) -> Iterator[Raw | Rejected]:
    place, name = f"{span.path}: {key}", f"{span.name}/{key}"
    fields: Record = {}
    try:
        for extension, data in parts.items():
            if extension == "json":
                found = json.loads(data.decode())
                if not isinstance(found, dict):
                    yield from _raw(place, name, found)
                    return
                fields = {**found, **fields}
            elif extension in ("txt", "text", "md"):
                fields["text"] = data.decode()
            elif extension in ("cls", "id", "lang"):
                fields[extension] = data.decode()
    except UnicodeDecodeError as error:
        yield Rejected(name, "not_utf8", f"{place} is not UTF-8 ({error.reason})")
    except ValueError as error:
        yield Rejected(name, "not_json", f"{place} is not JSON ({error})")
    else:
        yield Raw(place, name, fields)


FORMATS = {
    ".txt": Format(_read_text, compressible=True),
    ".md": Format(_read_text, compressible=True),
    ".jsonl": Format(_read_jsonl, _split_jsonl, compressible=True),
    ".json": Format(_read_json),
    ".csv": Format(_read_csv, compressible=True),
    ".tsv": Format(_read_csv, compressible=True),
    ".parquet": Format(_read_parquet, _split_parquet),
    ".tar": Format(_read_tar),
}
SUFFIXES = tuple(FORMATS) + tuple(s + end for s, of in FORMATS.items() if of.compressible for end in COMPRESSIONS)
