"""Corpora as JSON lines: the built-in one from this machine's Python documentation, or a folder of one's own.

    python -m data_tools.corpus python-docs --out DIR [--source]
    python -m data_tools.corpus folder SRC --out DIR [--validation-fraction 0.01]

Contract: writes train.jsonl and validation.jsonl (`{"id", "text"}`, from a folder also `{"id", "messages"}`), for
python-docs also instructions-train.jsonl and instructions-validation.jsonl (`{"id", "messages"}`). Which half a
document belongs to follows from its id (python-docs) or its text (folder), not from chance. Either all files of a
command appear, whole, or none changes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_tools.instructions import build_instructions, entry_id_of
from data_tools.python_docs import is_held_out, normalized, parse, read_entries, source_files
from data_tools.readers import PIECE_BYTES, Document, document_texts, iterate_documents
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import sync_file
from minillm.utils.logging import say, warn

PYTHON_DOCS_FILES = ("train.jsonl", "validation.jsonl", "instructions-train.jsonl", "instructions-validation.jsonl")


class JsonlFiles:
    """Several .jsonl files of one folder that appear together, at the end of a `with` block.

    Until then the documents stand in hidden temporary files; after an error nothing is left.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self.num_documents = dict.fromkeys(names, 0)
        self.num_bytes = dict.fromkeys(names, 0)  # UTF-8 bytes of the texts, without ids and JSON

    def __enter__(self) -> JsonlFiles:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--out {self.folder} is a file, and a folder is needed: name another one") from None
        self._stack = contextlib.ExitStack()
        self._temporary = {name: self.folder / f".{name}.{os.getpid()}.tmp" for name in self.names}
        self._files = {name: self._stack.enter_context(open(path, "wb")) for name, path in self._temporary.items()}
        return self

    def add(self, name: str, document: Document) -> None:
        """Append a document to the file `name`."""
        self._files[name].write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        self.num_documents[name] += 1
        self.num_bytes[name] += sum(len(text.encode()) for text in document_texts(document))

    def clear(self) -> None:
        """Begin again with empty files."""
        for name, file in self._files.items():
            file.seek(0)
            file.truncate()
            self.num_documents[name] = self.num_bytes[name] = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._stack.close()
            if kind is None:
                for path in self._temporary.values():
                    sync_file(path)
                for name, path in self._temporary.items():
                    os.replace(path, self.folder / name)
                sync_file(self.folder)
        finally:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def report(self, folder: Path) -> None:
        """Say what was written, a line a file, under the name `folder`."""
        for name in self.names:
            size = f"{self.num_bytes[name] / 1e6:.2f} MB of text"
            say(f"{folder / name}: {self.num_documents[name]:,} documents, {size}")


def build_python_docs(out: Path, source: bool = False) -> JsonlFiles:
    """Write the built-in corpus and its instruction set into the folder `out`.

    Args:
        source: add the standard library's source (about 12 MB), without the docstrings that are held out.
    """
    entries = read_entries()
    with JsonlFiles(out, PYTHON_DOCS_FILES) as files:
        for entry in entries:
            half = "validation" if is_held_out(entry.id) else "train"
            files.add(f"{half}.jsonl", {"id": entry.id, "text": entry.text})
        if source:
            held_out = {normalized(entry.doc) for entry in entries if is_held_out(entry.id)}
            for document in _source_documents(held_out):
                half = "validation" if is_held_out(str(document["id"])) else "train"
                files.add(f"{half}.jsonl", document)
        for example in build_instructions(entries):
            half = "validation" if is_held_out(entry_id_of(str(example["id"]))) else "train"
            files.add(f"instructions-{half}.jsonl", example)
    return files


def _source_documents(held_out: set[str]) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for _, path in source_files():
        tree = parse(path)
        if tree is None:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            warn(f"{path} is not UTF-8 and is left out of the corpus")
            continue
        if text.strip():
            identity = f"source:{path.relative_to(root).as_posix()}"
            yield {"id": identity, "text": _without_docstrings(text, tree, held_out)}


def _without_docstrings(text: str, tree: ast.Module, held_out: set[str]) -> str:
    """The source with `...` in the place of each docstring whose text is held out; it stays valid Python."""
    lines = text.encode().split(b"\n")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node)
            if doc and normalized(doc) in held_out:
                place = node.body[0]
                first, last = place.lineno - 1, place.end_lineno - 1  # type: ignore[operator]
                joined = lines[first][: place.col_offset] + b"..." + lines[last][place.end_col_offset :]
                # emptied, not removed, so that the line numbers of the other nodes stay right
                lines[first : last + 1] = [joined] + [b""] * (last - first)
    return b"\n".join(lines).decode()


def build_folder(
    source: Path, out: Path, validation_fraction: float = 0.01, piece_bytes: int = PIECE_BYTES
) -> JsonlFiles:
    """Write the documents of a file or folder into `out`, split by a hash of the text.

    Equal texts fall into the same half, whatever their names. Where a small corpus leaves the validation half empty,
    the document with the lowest hash goes there (the corpus is then read twice).

    Args:
        piece_bytes: a text file longer than this becomes several documents, cut at line ends.

    Raises:
        UserError: a fraction outside [0, 1), an empty corpus, a half without a document, unreadable content.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction is {validation_fraction}: it must be at least 0 and below 1")
    if piece_bytes < 1:
        raise UserError(f"--piece-bytes is {piece_bytes}: it must be positive")
    names = ["train.jsonl", "validation.jsonl"] if validation_fraction else ["train.jsonl"]
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies inside {source} and would be read as a part of it: name another folder")
    with JsonlFiles(out, names) as files:
        lowest = 1.0
        for document in iterate_documents(source, piece_bytes):
            place = _unit_hash(document_texts(document))
            lowest = min(lowest, place)
            files.add(names[place < validation_fraction], document)
        if 0 in files.num_documents.values() and lowest >= validation_fraction:
            files.clear()
            for document in iterate_documents(source, piece_bytes):
                files.add(names[_unit_hash(document_texts(document)) <= lowest], document)
        for name in names:
            if not files.num_documents[name]:
                raise UserError(
                    f"{name} would be empty: the corpus has {sum(files.num_documents.values())} documents and "
                    f"--validation-fraction is {validation_fraction}. Cut long files with --piece-bytes 65536, choose "
                    "another fraction, or 0 for no validation file"
                )
    return files


def _unit_hash(texts: Iterable[str]) -> float:
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.corpus", description="Build a corpus of JSON lines.")
    commands = parser.add_subparsers(dest="command", required=True)
    docs = commands.add_parser("python-docs", help="this machine's Python documentation, with an instruction set")
    docs.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the four .jsonl files")
    docs.add_argument("--source", action="store_true", help="add the standard library's source code (about 12 MB)")
    folder = commands.add_parser("folder", help="a folder of .txt, .md and .jsonl (text or messages) files")
    folder.add_argument("source", type=Path, metavar="SRC", help="folder, or one file")
    folder.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two .jsonl files")
    folder.add_argument("--validation-fraction", type=float, default=0.01, metavar="F",
                        help="share of the documents held out (default 0.01)")  # fmt: skip
    folder.add_argument("--piece-bytes", type=int, default=PIECE_BYTES, metavar="N",
                        help=f"cut longer text files at line ends (default {PIECE_BYTES})")  # fmt: skip
    arguments = parser.parse_args()
    with exit_on_user_error():
        if arguments.command == "python-docs":
            files = build_python_docs(arguments.out, arguments.source)
        else:
            files = build_folder(arguments.source, arguments.out, arguments.validation_fraction, arguments.piece_bytes)
        files.report(arguments.out)


if __name__ == "__main__":
    main()
