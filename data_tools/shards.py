"""Shards from the command line: `python -m data_tools.shards build | tokenize | verify`.

Contract:
    build     corpus -> text shards (WebDataset tars of KEY.json, shuffled over the whole corpus) and index.json
    tokenize  text shards -> token shards on all cores (the same compiler a training run uses by itself)
    verify    every size, checksum and count of a folder of shards against its index.json; exit 2 where one is wrong
Output folders appear whole or not at all. Memory does not grow with the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import publish_directory, write_json
from minillm.utils.logging import say

if TYPE_CHECKING:
    from data_tools.readers import Document

DEFAULT_SHARD_BYTES = 64 << 20
_TAR_BLOCK = 512


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command_name("data_tools.shards"), description="Write and check shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="corpus files -> text shards")
    build.add_argument("--corpus", required=True, nargs="+", type=Path, metavar="PATH",
                       help="files, folders, or hf:OWNER/NAME[:CONFIG][:SPLIT]")  # fmt: skip
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the shards")
    build.add_argument("--shard-size", type=_size, default=DEFAULT_SHARD_BYTES, metavar="BYTES", help="64M by default")
    build.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
    build.set_defaults(run=lambda o: build_shards(o.corpus, o.out, shard_size=o.shard_size, seed=o.seed))

    tokenize = commands.add_parser("tokenize", help="text shards -> token shards")
    tokenize.add_argument("--shards", required=True, metavar="SPEC", help="folder, glob, brace pattern or URL")
    tokenize.add_argument("--tokenizer", required=True, type=Path, metavar="DIR")
    tokenize.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the token shards")
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    tokenize.add_argument("--max-bad-samples", type=int, default=0, metavar="N", help="skip up to N bad samples")
    tokenize.set_defaults(run=_tokenize)

    verify = commands.add_parser("verify", help="check shards against their index.json")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.set_defaults(run=lambda o: verify_shards(o.folder))
    return parser


def _size(text: str) -> int:
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    if not number.isdigit() or int(number) * unit < 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: a size of at least 4096 bytes, such as 64M or 500000")
    return int(number) * unit


def build_shards(
    corpus: list[Path] | Path, out: Path, *, shard_size: int = DEFAULT_SHARD_BYTES, seed: int = 0
) -> None:
    """Write text shards of a corpus, its documents shuffled over the whole of it.

    Args:
        corpus: files and folders that `data_tools.readers.iterate_documents` reads.
        out: folder to make; it must not exist or be empty.
        shard_size: bytes a tar may have.

    Raises:
        UserError: nothing to read, a document longer than a shard, texts mixed with conversations, `out` in use.
    """
    from tqdm import tqdm

    from data_tools.readers import iterate_documents
    from data_tools.records import find_units
    from data_tools.shuffle import num_buckets_for, shuffled_records

    corpus = [Path(corpus)] if isinstance(corpus, (str, Path)) else [Path(path) for path in corpus]
    out = Path(out)
    temporary = _new_folder(out)
    try:
        num_buckets = num_buckets_for(sum(unit.size for unit in find_units(corpus)))
        kinds: set[str] = set()
        documents = tqdm(iterate_documents(corpus), desc="reading", unit=" documents", disable=None, file=sys.stderr)
        records = _records(documents, shard_size, kinds)
        buckets = temporary / ".buckets"
        buckets.mkdir()
        shuffled = shuffled_records(records, buckets, num_buckets=num_buckets, seed=seed)
        shards = _write_shards(
            tqdm(shuffled, desc="writing", unit=" documents", disable=None, file=sys.stderr), temporary, shard_size
        )
        buckets.rmdir()
        if not shards:
            raise UserError(f"the corpus {', '.join(map(str, corpus))} is empty: name files with text in them")
        num_samples = sum(shard["num_samples"] for shard in shards)
        index = {"format": "minillm-text-1", "documents": kinds.pop(), "num_samples": num_samples, "shards": shards}
        write_json(temporary / "index.json", index)
        publish_directory(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(shard["bytes"] for shard in shards)
    say(f"{out}: {num_samples:,} documents in {len(shards)} text shards, {num_bytes / 1e6:,.1f} MB")


def _new_folder(out: Path) -> Path:
    """A temporary folder beside `out`, which must be free; what killed runs left is removed."""
    if out.exists():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"{out} exists already: remove it or choose another --out")
        out.rmdir()
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        if not _is_running(leftover.name.split(".")[-2]):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    return temporary


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return int(pid) != os.getpid()


def _records(documents: Iterator[Document], shard_size: int, kinds: set[str]) -> Iterator[bytes]:
    """Documents as JSON bytes; `kinds` takes the one kind they have."""
    for document in documents:
        kinds.add("conversations" if "messages" in document else "texts")
        if len(kinds) > 1:
            raise UserError(
                f"document {document['id']}: texts and conversations are mixed in one corpus; build one folder of "
                "shards for each and name both in data.train"
            )
        record = json.dumps(document, ensure_ascii=False).encode("utf-8")
        if _tar_bytes(len(record)) + 2 * _TAR_BLOCK > shard_size:
            raise UserError(
                f"document {document['id']} has {len(record)} bytes, longer than a shard of {shard_size} bytes: "
                "raise --shard-size or split the document"
            )
        yield record


def _tar_bytes(size: int) -> int:
    """Bytes of a member with its header and padding."""
    return _TAR_BLOCK + -(-size // _TAR_BLOCK) * _TAR_BLOCK


class _HashingFile:
    """What TarWriter writes to: a file that knows the digest of its content."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def _write_shards(records: Iterator[bytes], folder: Path, shard_size: int) -> list[dict]:
    """Fill one tar after the other; the entries of index.json."""
    from webdataset import TarWriter  # imports torch: seconds that --help should not take

    shards: list[dict] = []
    file = tar = None
    used = total = 0

    def finish() -> None:
        tar.close()
        file.close()
        shards[-1] |= {"bytes": file.num_bytes, "sha256": file.digest.hexdigest()}

    for record in records:
        # a tar ends with two zero blocks, and TarWriter fills up to 10,240 bytes after them
        if tar is None or used + _tar_bytes(len(record)) + 2 * _TAR_BLOCK > shard_size:
            if tar is not None:
                finish()
            name = f"text-{len(shards):06d}.tar"
            file = _HashingFile(folder / name)
            tar = TarWriter(file, encoder=False, compress=False, mtime=0)
            shards.append({"name": name, "num_samples": 0})
            used = 0
        tar.write({"__key__": f"{total:09d}", "json": record})
        used += _tar_bytes(len(record))
        total += 1
        shards[-1]["num_samples"] += 1
    if tar is not None:
        finish()
    return shards


def _tokenize(options: argparse.Namespace) -> None:
    from minillm.data.sources import tokenize_shards

    tokenize_shards(
        options.shards,
        tokenizer_path=options.tokenizer,
        out=options.out,
        workers=options.workers,
        max_bad_samples=options.max_bad_samples,
    )


def verify_shards(folder: Path) -> None:
    """Check every file of a folder of shards; print what is there, raise a UserError that lists what is wrong."""
    from data_tools.shard_verification import shard_problems

    summary, problems = shard_problems(folder)
    if problems:
        raise UserError(f"{folder}: {len(problems)} problems\n  " + "\n  ".join(problems))
    say(f"{folder}: {summary}, all whole")


if __name__ == "__main__":
    main()
