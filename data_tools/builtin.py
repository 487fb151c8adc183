"""The built-in data, made whole on first use: corpus, instruction set, tokenizer, text shards.

Contract: after `prepare_builtin(root)` the folder `root` holds

    corpus/{train,validation,instructions-train,instructions-validation}.jsonl    tokenizer/
    shards/{train,validation,instructions-train,instructions-validation}/

Each part appears by a rename, so what is there is finished and is skipped; a part that a kill cut short is made again.
A lock lets any number of processes call this at once: one works, the others wait.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from data_tools.corpus import PYTHON_DOCS_FILES, build_python_docs
from data_tools.shards import build_shards
from data_tools.tokenizer import build_tokenizer
from minillm.utils.commands import command_name
from minillm.utils.errors import exit_on_user_error
from minillm.utils.files import file_lock, publish_directory
from minillm.utils.logging import say

VOCAB_SIZE = 4096


def prepare_builtin(root: Path) -> None:
    """Make what is missing of the built-in data under `root` (about half a minute on two cores, nothing downloaded)."""
    root = Path(root)
    corpus, shards = root / "corpus", root / "shards"
    texts = [corpus / "train.jsonl", corpus / "instructions-train.jsonl"]
    with file_lock(root / ".lock", busy=lambda: say(f"another process prepares {root}, waiting for it")):
        for folder in (root, shards):  # what a killed process left; the lock says that nobody is writing there
            for leftover in folder.glob(".*.tmp"):
                shutil.rmtree(leftover)
        _make(corpus, "this Python's documentation as a corpus", _build_corpus)
        _make(root / "tokenizer", "a tokenizer", lambda out: build_tokenizer(texts, out, VOCAB_SIZE))
        for name in PYTHON_DOCS_FILES:
            source = corpus / name
            _make(shards / source.stem, "text shards", lambda out, source=source: build_shards([source], out))


def _make(out: Path, what: str, build: Callable[[Path], None]) -> None:
    """Let `build` make the folder `out` (all at once, by a rename) unless it is there."""
    if not out.exists():
        say(f"making {what}: {out}")
        started = time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        build(out)
        say(f"made {out} in {time.perf_counter() - started:.1f} s")


def _build_corpus(out: Path) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    build_python_docs(temporary).report(out)
    publish_directory(temporary, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog=command_name("data_tools.builtin"), description="Prepare the built-in data.")
    parser.add_argument("--out", type=Path, default=Path("data/python-docs"), help="default: data/python-docs")
    arguments = parser.parse_args()
    with exit_on_user_error():
        prepare_builtin(arguments.out)


if __name__ == "__main__":
    main()
