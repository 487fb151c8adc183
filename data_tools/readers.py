"""Corpora on disk as one stream of documents for tokenizers, shards and training: strict, unlike the workshop's stages.

Contract: `iterate_documents(paths)` yields `{"id": str, "text": str}` or `{"id": str, "messages": [...]}` in a fixed
order (paths as given, folders in sorted order), holding one document at a time. Every text is valid Unicode; what
cannot be read is a UserError that names the file with its byte offset or line. Whitespace-only documents are left out
and counted in one warning. Formats and ids are those of data_tools/formats.py; other fields are metadata and are not
passed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools.records import (
    TEXT,
    Record,
    Rejected,
    TextField,
    corpus_files,
    iterate_records,
    known_suffixes,
)
from minillm.utils.errors import UserError
from minillm.utils.logging import warn

Document = Record


def iterate_documents(
    paths: Iterable[Path | str] | Path | str, piece_bytes: int | None = None, text: TextField = TEXT
) -> Iterator[Document]:
    """Yield the documents of files and folders.

    Args:
        paths: files, folders searched recursively for known ones (names beginning with a dot are left out), or hub
            names hf:OWNER/NAME; one path or several.
        piece_bytes: a text file longer than this becomes several documents; None is formats.PIECE_BYTES.
        text: the field with the text.

    Raises:
        UserError: a path that does not exist or has another suffix, content that is not UTF-8, a record that is no
            document, or nothing to read in all the paths together (raised where the stream ends).
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    num_documents = num_blank = 0
    first_blank = ""
    for record in iterate_records(paths, text, piece_bytes):
        if isinstance(record, Rejected):
            if record.reason != "empty":
                raise UserError(f"{record.detail}{_fix(record, text)}")
        elif any(one.strip() for one in document_texts(record)):
            num_documents += 1
            kind = "text" if "text" in record else "messages"
            yield {"id": record["id"], kind: record[kind]}
            continue
        num_blank += 1
        first_blank = first_blank or str(record.id if isinstance(record, Rejected) else record["id"])
    if num_blank:
        warn(f"{num_blank} documents without any text were left out, the first is {first_blank}")
    if num_documents == 0:
        raise UserError(
            f"the corpus {', '.join(map(str, paths))} is empty: no document with text in it. Name a folder or a file "
            f"with text in {known_suffixes()} files."
        )


def _fix(rejected: Rejected, text: TextField) -> str:
    if rejected.reason in ("no_text", "not_text"):
        named = f'a "{text.column}" string or a "messages" list' if text == TEXT else "the text that was asked for"
        return (
            f": every record is an object with {named}; --text-column names another field, data_tools.clean sorts out"
        )
    if rejected.reason in ("not_json", "not_an_object"):
        return ': every line is an object with a "text" string or a "messages" list'
    return ""


def document_texts(document: Document) -> list[str]:
    """The texts in a document: its text, or the contents of its messages in order."""
    if "messages" in document and "text" not in document:
        return [message["content"] for message in document["messages"]]
    return [document["text"]]


__all__ = ["Document", "corpus_files", "document_texts", "iterate_documents"]
