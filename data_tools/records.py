"""Corpora of any format as records: what the tools of the workshop read.

Contract: `find_units(paths)` lists what there is to read as units of about the same size, each read alone by
`read_unit`; every record has an "id" (string) and keeps all fields of its source. Where a TextField is given, "text" is
a non-empty string of valid Unicode, or the record is a conversation ("messages") that has no such field. What cannot
be read comes as Rejected, in its place; nothing is left out without a word. One record is in memory at a time.

A folder is searched for the known suffixes. In the output folder of a tool (its summary.json names the tool) only the
part-* files are read, in a folder of shards (index.json) only the .tar files. hf:OWNER/NAME[:CONFIG][:SPLIT] is a data
set of the Hugging Face hub, or of a local folder of that form (hf:./FOLDER), streamed by the library `datasets`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.extras import require
from data_tools.files import PIECE_BYTES, Progress, Raw, Record, Rejected, Span, check_content
from data_tools.formats import FORMATS, format_of, is_json_list, suffix_of
from minillm.utils.errors import UserError

UNIT_BYTES = 16 << 20
HUB = "hf:"
_FIELD = re.compile(r"\{([^{}]+)\}")

__all__ = ["Record", "Rejected", "TextField", "Unit", "find_units", "iterate_records", "read_unit", "record_text"]


@dataclass(frozen=True)
class TextField:
    """Where a record's text is.

    Attributes:
        column: a string, or a list of strings that is joined by newlines; it becomes "text".
        template: such as "{title}\\n{paragraphs}", in the place of a column; the fields it is made of stay.
    """

    column: str = "text"
    template: str | None = None

    @property
    def names(self) -> list[str]:
        """The fields it reads."""
        return [self.column] if self.template is None else _FIELD.findall(self.template)

    def take(self, raw: Raw, identity: str) -> Record | Rejected:
        """The record with its text in "text", or why it has none."""
        fields = {**raw.fields, "id": identity}
        if self.template is not None:
            found = {name: _as_text(fields.get(name)) for name in self.names}
            missing = [name for name in self.names if found[name] is None]
            if missing:
                return _no_text(raw, identity, missing[0])
            text = _FIELD.sub(lambda match: found[match.group(1)] or "", self.template)
        elif self.column == "text" and "messages" in fields:
            return _checked_conversation(raw, identity, fields)
        else:
            text = _as_text(fields.get(self.column))
            if text is None:
                return _no_text(raw, identity, self.column)
            fields.pop(self.column)
        if not text.strip():
            return Rejected(identity, "empty", f"{raw.place} has no text in it")
        if (problem := _half_surrogate(text)) is not None:
            return Rejected(identity, "not_unicode", f"{raw.place} {problem}")
        return {**fields, "text": text}


TEXT = TextField()


def record_text(record: Record) -> str:
    """A record's text; of a conversation the contents of its messages, a line each."""
    if "text" in record:
        return str(record["text"])
    return "\n".join(message["content"] for message in record["messages"])


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return None


def _no_text(raw: Raw, identity: str, name: str) -> Rejected:
    lacking = "neither text nor messages" if name == "text" else f"no text in {name!r}"
    if name not in raw.fields:
        return Rejected(identity, "no_text", f"{raw.place} has {lacking} (keys {sorted(raw.fields)})")
    value = raw.fields[name]
    if value in (None, []):
        return Rejected(identity, "empty", f"{raw.place} has no text in {name!r}")
    kind = "a list of other things than strings" if isinstance(value, list) else f"of type {type(value).__name__}"
    return Rejected(identity, "not_text", f'{raw.place} has {lacking} ("{name}" {kind})')


def _checked_conversation(raw: Raw, identity: str, fields: Record) -> Record | Rejected:
    """A record with messages is a conversation: a text beside them is not read."""
    from minillm.data.chat_template import check_messages

    fields.pop("text", None)
    try:
        check_messages(fields["messages"], where=raw.place)
    except UserError as error:
        return Rejected(identity, "wrong_messages", str(error))
    for message in fields["messages"]:
        if (problem := _half_surrogate(message["content"])) is not None:
            return Rejected(identity, "not_unicode", f"{raw.place} {problem}")
    return fields


def _half_surrogate(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"holds half of a surrogate pair ({text[error.start]!r}, character {error.start}), which is no Unicode "
            "text: write the line again with both halves, or leave the escape out"
        )
    return None


# -- units -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """About UNIT_BYTES of input: a part of a large file, or several small ones."""

    number: int
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)


def find_units(paths: Iterable[Path | str] | Path | str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut files and folders into units, in the order given, folders in sorted order.

    Raises:
        UserError: nothing there, a suffix that is not known, a file that is not what its name says.
    """
    spans = [part for span in _spans(paths) for part in _split(span, unit_bytes)]
    units: list[Unit] = []
    held: list[Span] = []
    size = 0
    for span in spans:
        if held and size + span.size > unit_bytes:
            units.append(Unit(len(units), tuple(held)))
            held, size = [], 0
        held.append(span)
        size += span.size
    return [*units, Unit(len(units), tuple(held))] if held else units


def read_unit(
    unit: Unit, text: TextField | None, progress: Progress = lambda size: None
) -> Iterator[Record | Rejected]:
    """The records of a unit.

    Args:
        text: None takes records as they are, with an "id" and maybe without any text.
        progress: called with the bytes read since its last call.

    Raises:
        UserError: a file that breaks off or is not of its kind.
    """
    for span in unit.spans:
        read = _read_hub if span.suffix == HUB else format_of(span.suffix).read
        try:
            for raw in read(span, progress):
                yield raw if isinstance(raw, Rejected) else _record(raw, text)
        except UnicodeDecodeError as error:  # pragma: no cover - a format that forgot
            raise UserError(f"{span.path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _record(raw: Raw, text: TextField | None) -> Record | Rejected:
    identity = raw.fields.get("id")
    known = isinstance(identity, str) and identity or isinstance(identity, int) and not isinstance(identity, bool)
    identity = str(identity) if known else raw.default_id
    return text.take(raw, identity) if text else {**raw.fields, "id": identity}


def iterate_records(
    paths: Iterable[Path | str] | Path | str, text: TextField | None = TEXT, piece_bytes: int | None = None
) -> Iterator[Record | Rejected]:
    """All records of files and folders in order; a text file longer than `piece_bytes` becomes several."""
    for span in _spans(paths):
        span = replace(span, piece_bytes=piece_bytes or PIECE_BYTES)
        for part in _split(span, 1 << 62):
            yield from read_unit(Unit(0, (part,)), text)


def _split(span: Span, unit_bytes: int) -> list[Span]:
    return _split_hub(span) if span.suffix == HUB else format_of(span.suffix).split(span, unit_bytes)


def _spans(paths: Iterable[Path | str] | Path | str) -> Iterator[Span]:
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if str(path).startswith(HUB):
            yield Span(str(path), str(path).removeprefix(HUB), HUB, 0, 1, 1, 0)
            continue
        for file, name in corpus_files([Path(path)]):
            suffix = suffix_of(file)
            check_content(file, suffix)
            size = file.stat().st_size
            yield Span(str(file), name, suffix, 0, size, 1, size)


def corpus_files(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield (file, name used in ids) for files and, in sorted order, for the readable files of folders.

    Raises:
        UserError: a path that does not exist, or a file of an unknown kind.
    """
    for path in paths:
        if path.is_dir():
            yield from _files_below(path)
        elif not path.exists():
            raise UserError(f"{path} does not exist: name a {known_suffixes()} file or a folder of them")
        elif not suffix_of(path):
            raise UserError(f"{path} cannot be read as a corpus: known are {known_suffixes()} files and folders")
        else:
            yield path, path.name


def known_suffixes() -> str:
    """For messages: ".txt, .md, ... (some with .gz or .zst)"."""
    compressible = ", ".join(suffix for suffix, of in FORMATS.items() if of.compressible)
    return f"{', '.join(FORMATS)} ({compressible} also with .gz or .zst)"


def _files_below(folder: Path) -> list[tuple[Path, str]]:
    rules: dict[Path, str] = {}
    found = []
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not suffix_of(file) or not file.is_file():
            continue
        if file.parent not in rules:
            rules[file.parent] = _rule_of(file.parent)
        by_rule = {"parts": file.name.startswith("part-"), "tars": file.suffix == ".tar"}
        if by_rule.get(rules[file.parent], True) and (suffix_of(file) != ".json" or is_json_list(file)):
            found.append((relative.as_posix(), file))
    return [(file, name) for name, file in sorted(found)]


def _rule_of(folder: Path) -> str:
    """What counts in a folder: "" everything, "parts" the output of a tool, "tars" a folder of shards."""
    summary = folder / "summary.json"
    if summary.is_file():
        try:
            if "tool" in json.loads(summary.read_text(encoding="utf-8")):
                return "parts"
        except (ValueError, TypeError):
            pass
    return "tars" if (folder / "index.json").is_file() else ""


# -- the hub -----------------------------------------------------------------------------------------------------------


def _hub_dataset(name: str):
    datasets = require("datasets")
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    if not path:
        raise UserError("hf: needs a name: hf:OWNER/NAME[:CONFIG][:SPLIT], for example hf:roneneldan/TinyStories")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # requests, httpx, hub, fsspec and datasets errors alike
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data set {path} cannot be opened on the Hugging Face hub ({type(error).__name__}: {said}). Check the "
            "name, configuration and split; without a network, fetch its files elsewhere and name the folder; a mirror "
            "is chosen with HF_ENDPOINT"
        ) from error


def _split_hub(span: Span) -> list[Span]:
    shards = _hub_dataset(span.name).num_shards
    return [Span(span.path, span.name, HUB, shard, shards, 1, UNIT_BYTES) for shard in range(shards)]


def _read_hub(span: Span, progress: Progress) -> Iterator[Raw | Rejected]:
    data = _hub_dataset(span.name)
    for number, fields in enumerate(data.shard(span.stop, span.start) if span.stop > 1 else data, 1):
        name = f"{span.name}:{span.start}:{number}"
        yield Raw(name, name, fields)
    progress(span.size)
