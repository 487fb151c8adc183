"""Corpora on disk as one stream of documents: .txt and .md files, .jsonl files, folders of them.

Contract: `iterate_documents(paths)` yields `{"id": str, "text": str}` or `{"id": str, "messages": [...]}` in a fixed
order (paths as given, folders in sorted order), holding one document at a time. Every text is valid Unicode; what
cannot be read is a UserError that names the file with its byte offset or line. Whitespace-only documents are left out
and counted in one warning. Ids do not depend on where the corpus lies:

    text file    path below the folder that was named (the file's name, when the file itself was); a file above
                 PIECE_BYTES is cut at line ends into pieces `ID#1`, `ID#2`, ... so that memory stays flat
    .jsonl line  its own "id" (string or whole number), else `ID:LINE`; "messages" (OpenAI form) or "text"; other
                 keys are metadata and are not passed on
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.data.chat_template import check_messages
from minillm.utils.errors import UserError
from minillm.utils.logging import warn

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
PIECE_BYTES = 1 << 20  # a text file above this many bytes becomes several documents

Document = dict[str, object]


def iterate_documents(
    paths: Iterable[Path | str] | Path | str, piece_bytes: int = PIECE_BYTES
) -> Iterator[Document]:
    """Yield the documents of files and folders.

    Args:
        paths: .txt, .md or .jsonl files, or folders searched recursively for them (names beginning with a dot are
            left out); one path or several.
        piece_bytes: a text file longer than this becomes several documents.

    Raises:
        UserError: a path that does not exist or has another suffix, content that is not UTF-8, a .jsonl line that is
            no document, or nothing to read in all the paths together (raised where the stream ends).
    """
    paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    num_documents = num_blank = 0
    first_blank = ""
    for file, name in corpus_files(paths):
        for document in _documents_of_file(file, name, piece_bytes):
            if any(text.strip() for text in document_texts(document)):
                num_documents += 1
                yield document
            else:
                num_blank += 1
                first_blank = first_blank or str(document["id"])
    if num_blank:
        warn(f"{num_blank} documents without any text were left out, the first is {first_blank}")
    if num_documents == 0:
        raise UserError(
            f"the corpus {', '.join(map(str, paths))} is empty: no document with text in it. Name a folder or a file "
            f"with text in {', '.join(SUFFIXES)} files."
        )


def document_texts(document: Document) -> list[str]:
    """The texts in a document: its text, or the contents of its messages in order."""
    if "messages" in document:
        return [message["content"] for message in document["messages"]]  # type: ignore[attr-defined]
    return [document["text"]]  # type: ignore[list-item]


def corpus_files(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield (file, name used in ids) for files and, in sorted order, for the readable files of folders."""
    for path in paths:
        if path.is_dir():
            below = ((file, file.relative_to(path)) for file in path.rglob("*"))
            found = [
                (relative.as_posix(), file)
                for file, relative in below
                if file.suffix in SUFFIXES and file.is_file() and not any(p.startswith(".") for p in relative.parts)
            ]
            yield from ((file, name) for name, file in sorted(found))
        elif not path.exists():
            raise UserError(f"{path} does not exist: name a {', '.join(SUFFIXES)} file or a folder of them")
        elif path.suffix not in SUFFIXES:
            raise UserError(f"{path} cannot be read as a corpus: known are {', '.join(SUFFIXES)} files and folders")
        else:
            yield path, path.name


def _documents_of_file(path: Path, name: str, piece_bytes: int) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        for number, line in _lines(path):
            yield _document_of_line(line, f"{path}:{number}", f"{name}:{number}")
        return
    several = path.stat().st_size > piece_bytes
    for number, text in enumerate(read_text_pieces(path, piece_bytes), 1):
        yield {"id": f"{name}#{number}" if several else name, "text": text}


def read_text_pieces(path: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """A UTF-8 file (a byte order mark is dropped) as consecutive pieces of about `piece_bytes`, cut after line ends.

    Only a line longer than a piece is cut inside. A file of up to `piece_bytes` comes as one piece.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte not yet decoded
    carry = ""  # the unfinished last line
    with open(path, "rb") as file:
        while True:
            block = file.read(piece_bytes)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.start counts from the bytes the decoder had kept from the block before
                raise _not_utf8(path, offset + error.start, error.object[error.start]) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset = file.tell() - len(decoder.getstate()[0])
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of the lines that are not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bom = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
                raise _not_utf8(path, offset + bom + error.start, error.object[error.start], number) from None
            offset += len(raw)
            if line.strip():
                yield number, line


def _document_of_line(line: str, place: str, default_id: str) -> Document:
    fix = 'every line is an object with a "text" string or a "messages" list'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error.msg}, column {error.colno}): {fix}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place} is {type(record).__name__}, not an object: {fix}")
    identity = record.get("id", default_id)
    document: Document = {"id": str(identity) if isinstance(identity, (str, int)) else default_id}
    if "messages" in record:
        check_messages(record["messages"], where=place)
        document["messages"] = record["messages"]
    elif isinstance(record.get("text"), str):
        document["text"] = record["text"]
    else:
        found = f'"text" of type {type(record["text"]).__name__}' if "text" in record else f"keys {sorted(record)}"
        raise UserError(f"{place} has neither text nor messages ({found}): {fix}")
    for text in (*document_texts(document), document["id"]):
        try:
            text.encode()  # type: ignore[union-attr]
        except UnicodeEncodeError as error:
            bad = text[error.start]  # type: ignore[index]
            raise UserError(
                f"{place} holds half of a surrogate pair ({bad!r}, character {error.start}), which is no Unicode text: "
                "write the line again with both halves, or leave the escape out"
            ) from None
    return document


def _not_utf8(path: Path, offset: int, byte: int, line: int | None = None) -> UserError:
    where = f"{path}{f':{line}' if line else ''}"
    if offset == 0 and byte in (0xFF, 0xFE):
        guess, said = "UTF-16", " (the file looks like UTF-16)"
    else:
        guess, said = "LATIN1", " (put the file's real encoding, for example GB18030 or CP1252, in the place of LATIN1)"
    return UserError(
        f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}. "
        f"Convert it: iconv -f {guess} -t UTF-8 {path.name} > utf8-{path.name}{said}"
    )
