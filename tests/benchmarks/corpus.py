"""Text for the benchmarks: the standard library's source, cut into documents."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path


def standard_library_documents(num_bytes: int, document_chars: int = 3000) -> list[str]:
    """About `num_bytes` of the standard library's source in documents; fewer where it is smaller."""
    documents: list[str] = []
    total = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files of the test-suite of lib2to3 are in other encodings
        for start in range(0, len(text), document_chars):
            documents.append(text[start : start + document_chars])
            total += len(documents[-1].encode())
            if total >= num_bytes:
                return documents
    return documents


def write_jsonl(path: Path, texts: list[str]) -> None:
    """One {"text"} object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
