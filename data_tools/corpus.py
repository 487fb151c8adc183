"""Corpora as JSON lines: this machine's Python documentation, a folder or file of one's own, or tasks made from a seed.

    python -m data_tools.corpus python-docs --out DIR [--source]
    python -m data_tools.corpus folder SRC --out DIR [--validation-fraction 0.01]
    python -m data_tools.corpus synthetic --out DIR [--documents N] [--seed S] [--tasks repetition,counting,...]

`synthetic` is described in synthetic.py. It also writes summary.json with `entropy_floor_nats_per_token` (characters
are the tokens, data.seq_len is 128): the loss that a model of the tasks approaches, and cannot go below on documents it
has not seen.

Contract: writes train.jsonl and validation.jsonl (`{"id", "text"}`, from a folder also `{"id", "messages"}`), for
python-docs also instructions-train.jsonl and instructions-validation.jsonl (`{"id", "messages"}`). Which half a
document belongs to follows from its id (python-docs) or its text (folder, synthetic), not from chance, so that no text
stands in both. A folder that comes to one text has no documents to choose from: its last part, from a paragraph's or
line's beginning on, is held out. Either all files of a command appear, whole, or none changes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.files import PIECE_BYTES
from data_tools.formats import is_text
from data_tools.instructions import build_instructions, entry_id_of
from data_tools.python_docs import is_held_out, normalized, parse, read_entries, source_files
from data_tools.readers import Document, document_texts, iterate_documents
from data_tools.records import HUB, TEXT, TextField, corpus_files, known_suffixes
from data_tools.synthetic import DOCUMENT_CHARACTERS, TASKS, Example, example_at
from data_tools.workshop import add_text_options, text_field
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import read_json, sync_file, write_json
from minillm.utils.logging import say, warn

PYTHON_DOCS_FILES = ("train.jsonl", "validation.jsonl", "instructions-train.jsonl", "instructions-validation.jsonl")
HALVES = ("train.jsonl", "validation.jsonl")
VALIDATION_FRACTION = 0.01  # of many documents
TAIL_FRACTION = 0.1  # of a single text


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
                first, last = place.lineno - 1, place.end_lineno - 1
                joined = lines[first][: place.col_offset] + b"..." + lines[last][place.end_col_offset :]
                # emptied, not removed, so that the line numbers of the other nodes stay right
                lines[first : last + 1] = [joined] + [b""] * (last - first)
    return b"\n".join(lines).decode()


def build_folder(
    source: Path,
    out: Path,
    validation_fraction: float | None = None,
    piece_bytes: int | None = None,
    text: TextField = TEXT,
) -> JsonlFiles:
    """Write the documents of a file or folder into `out`, split by a hash of the text.

    Equal texts fall into the same half, whatever their names. Where a small corpus leaves the validation half empty,
    the document with the lowest hash goes there (the corpus is then read twice). A single text file, or a single
    document, is split by place instead: its end is held out.

    Args:
        validation_fraction: of the documents (None: 0.01), or of a single text's bytes (None: 0.1); 0 holds out
            nothing.
        piece_bytes: a text file longer than this becomes several documents, cut at line ends. None is PIECE_BYTES;
            given, the pieces of a single file are split by hash like other documents.
        text: the field with the text.

    Raises:
        UserError: a fraction outside [0, 1), an empty corpus, a half without a document, unreadable content.
    """
    if validation_fraction is not None and not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction is {validation_fraction}: it must be at least 0 and below 1")
    if piece_bytes is not None and piece_bytes < 1:
        raise UserError(f"--piece-bytes is {piece_bytes}: it must be positive")
    tail_fraction = TAIL_FRACTION if validation_fraction is None else validation_fraction
    validation_fraction = VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    names = HALVES if validation_fraction else HALVES[:1]
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies inside {source} and would be read as a part of it: name another folder")
    single = _single_text_file(source) if piece_bytes is None and validation_fraction else None
    piece_bytes = piece_bytes or PIECE_BYTES
    with JsonlFiles(out, names) as files:
        if single is not None:
            num_bytes = int(single.stat().st_size * (1 - tail_fraction))
            _add_head_and_tail(files, iterate_documents(source, piece_bytes, text), num_bytes)
            return _checked(files, tail_fraction)
        lowest = 1.0
        for document in iterate_documents(source, piece_bytes, text):
            place = _unit_hash(document_texts(document))
            lowest = min(lowest, place)
            files.add(names[place < validation_fraction], document)
        if 0 in files.num_documents.values() and lowest >= validation_fraction:
            num_documents, num_bytes = sum(files.num_documents.values()), sum(files.num_bytes.values())
            files.clear()
            if num_documents == 1:
                _add_head_and_tail(
                    files, iterate_documents(source, piece_bytes, text), int(num_bytes * (1 - tail_fraction))
                )
            else:
                for document in iterate_documents(source, piece_bytes, text):
                    files.add(names[_unit_hash(document_texts(document)) <= lowest], document)
        return _checked(files, validation_fraction)


def _checked(files: JsonlFiles, validation_fraction: float) -> JsonlFiles:
    for name in files.names:
        if not files.num_documents[name]:
            raise UserError(
                f"{name} would be empty: the corpus has {sum(files.num_documents.values())} documents and "
                f"--validation-fraction is {validation_fraction}. Cut long files with --piece-bytes 65536, choose "
                "another fraction, or 0 for no validation file"
            )
    return files


def _single_text_file(source: Path) -> Path | None:
    """The one file of a corpus that is a single text file."""
    if str(source).startswith(HUB):
        return None
    files = list(itertools.islice((file for file, _ in corpus_files([source])), 2))
    return files[0] if len(files) == 1 and is_text(files[0]) else None


def _add_head_and_tail(files: JsonlFiles, documents: Iterable[Document], head_bytes: int) -> None:
    """Texts up to about `head_bytes` go to train, the rest, from the nearest border before that on, to validation."""
    train, validation = files.names
    for document in documents:
        if "messages" in document:
            files.add(train, document)
            continue
        text = str(document["text"])
        cut = _border_before(text, head_bytes)
        for name, part, suffix in ((train, text[:cut], ""), (validation, text[cut:], "#end" if cut else "")):
            if part.strip():
                files.add(name, {"id": f"{document['id']}{suffix}", "text": part})
        head_bytes = 0 if cut < len(text) else head_bytes - len(text.encode())


def _border_before(text: str, num_bytes: int) -> int:
    """A paragraph's beginning at or shortly before `num_bytes` of UTF-8, else a line's, as a place in `text`."""
    encoded = text.encode()
    if num_bytes >= len(encoded):
        return len(text)
    place = len(encoded[: max(0, num_bytes)].decode(errors="ignore"))
    near = max(0, place - 2000)
    for border in ("\n\n", "\n"):
        found = text.rfind(border, near, place)
        if found >= 0:
            return found + len(border)
    return place


def build_synthetic(
    out: Path,
    num_documents: int = 20_000,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    validation_fraction: float = 0.05,
) -> JsonlFiles:
    """Write documents of `tasks` and summary.json into `out`.

    A text belongs to one half by its hash, so that no validation text was trained on, however often it is drawn.

    Raises:
        UserError: an unknown task, a fraction outside (0, 1), too few documents for both halves.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks names {unknown or 'none'}: valid are {','.join(TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise UserError(f"--tasks names a task twice: {','.join(tasks)}")
    if not 0 < validation_fraction < 1:
        raise UserError(f"--validation-fraction is {validation_fraction}: it must be above 0 and below 1")
    floors = {name: {task: Floor() for task in tasks} for name in HALVES}
    with JsonlFiles(out, HALVES) as files:
        for number in range(num_documents):
            example = example_at(seed, number, tasks)
            name = HALVES[_unit_hash([example.text]) < validation_fraction]
            files.add(name, {"id": f"{example.task}/{number}", "text": example.text})
            floors[name][example.task].add(example)
        for name in HALVES:
            if not files.num_documents[name]:
                raise UserError(f"{name} would be empty: raise --documents ({num_documents})")
        summary = {
            "seed": seed,
            "tasks": list(tasks),
            "document_characters": DOCUMENT_CHARACTERS,
            **{
                name.removesuffix(".jsonl"): {
                    **sum(of_tasks.values(), Floor()).summary(),
                    "by_task": {task: floor.summary() for task, floor in of_tasks.items()},
                }
                for name, of_tasks in floors.items()
            },
        }
    summary["entropy_floor_nats_per_token"] = summary["train"]["entropy_floor_nats_per_token"]
    write_json(out / "summary.json", summary)
    return files


@dataclass
class Floor:
    """Entropy and targets of documents: with characters for tokens, all characters but the first, and the end."""

    num_documents: int = 0
    num_targets: int = 0
    nats: float = 0.0

    def add(self, example: Example) -> None:
        self.num_documents += 1
        self.num_targets += len(example.text)
        self.nats += example.nats

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.num_documents + other.num_documents, self.num_targets + other.num_targets, self.nats + other.nats
        )

    def summary(self) -> dict[str, float]:
        return {
            "num_documents": self.num_documents,
            "num_target_tokens": self.num_targets,
            "entropy_floor_nats_per_token": round(self.nats / max(1, self.num_targets), 5),
        }


def _unit_hash(texts: Iterable[str]) -> float:
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.corpus"), description="Build a corpus of JSON lines."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    docs = commands.add_parser("python-docs", help="this machine's Python documentation, with an instruction set")
    docs.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the four .jsonl files")
    docs.add_argument("--source", action="store_true", help="add the standard library's source code (about 12 MB)")
    folder = commands.add_parser("folder", help="your own files, or a folder of them")
    folder.add_argument("source", type=Path, metavar="SRC",
                        help=f"folder, one file, or hf:OWNER/NAME[:CONFIG][:SPLIT]; {known_suffixes()}")  # fmt: skip
    add_text_options(folder)
    folder.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two .jsonl files")
    folder.add_argument("--validation-fraction", type=float, metavar="F",
                        help=f"share held out (default {VALIDATION_FRACTION} of the documents, or the last "
                        f"{TAIL_FRACTION} of a single text file)")  # fmt: skip
    folder.add_argument("--piece-bytes", type=int, metavar="N",
                        help=f"cut longer text files at line ends (default {PIECE_BYTES})")  # fmt: skip
    synthetic = commands.add_parser("synthetic", help="tasks made from a seed, whose lowest loss is known")
    synthetic.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    synthetic.add_argument("--documents", type=int, default=20_000, metavar="N", help="of 127 characters (20000)")
    synthetic.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other documents (0)")
    synthetic.add_argument("--tasks", default=",".join(TASKS), metavar="A,B", help=f"default: {','.join(TASKS)}")
    synthetic.add_argument("--validation-fraction", type=float, default=0.05, metavar="F",
                           help="share of the documents held out (default 0.05)")  # fmt: skip
    arguments = parser.parse_args()
    with exit_on_user_error():
        if arguments.command == "python-docs":
            files = build_python_docs(arguments.out, arguments.source)
        elif arguments.command == "synthetic":
            tasks = [task for task in arguments.tasks.split(",") if task]
            files = build_synthetic(
                arguments.out, arguments.documents, arguments.seed, tasks, arguments.validation_fraction
            )
            floor = read_json(arguments.out / "summary.json")["entropy_floor_nats_per_token"]
            say(f"{arguments.out / 'summary.json'}: the lowest loss is {floor} nats a character")
        else:
            files = build_folder(
                arguments.source,
                arguments.out,
                arguments.validation_fraction,
                arguments.piece_bytes,
                text_field(arguments),
            )
        files.report(arguments.out)


if __name__ == "__main__":
    main()
