"""Cleaning by data_tools.clean against `datatrove` with the same rules, on the same files and cores.

    python tests/benchmarks/bench_clean.py [--copies 8] [--cores 0,1] [--datatrove-python PYTHON] [FILE.jsonl ...]

Both read .jsonl, repair Unicode (ftfy), mask e-mail and IP addresses, apply C4's rules (but the end of lines), Gopher's
repetition and Gopher's quality rules with the published thresholds, and write .jsonl. Ours finds each text's language
too (datatrove's needs a model from the network). datatrove splits English words and sentences with spaCy; it is timed a
second time with words split at white space, as ours are.
datatrove stands in an environment of its own: `pip install "datatrove[processing]" spacy`. The second rate is by
processor time of all processes, which other work on the machine disturbs less; start-up is in both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, SHARED, parser_of, timed

PAGES = SHARED / "sft-samples" / "c4_demo.jsonl"
RULES = "gopher,c4,-c4_line_end"


def run(command: list[object]) -> None:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-3000:]}")


def datatrove_side(paths: list[Path], out: Path, workers: int, plain_words: bool) -> None:
    """Run in datatrove's own environment."""
    import re

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import filters
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    if plain_words:
        ends = re.compile(r"(?<=[.!?])\s+")
        from datatrove.pipeline.filters import c4_filters, gopher_quality_filter, gopher_repetition_filter

        for module in (gopher_quality_filter, gopher_repetition_filter):
            module.split_into_words = lambda text, language: text.split()
        c4_filters.split_into_sentences = lambda text, language: ends.split(text)
    pipeline = [
        JsonlReader(str(paths[0].parent), glob_pattern="*.jsonl"),
        FTFYFormatter(unescape_html=False),
        PIIFormatter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False, min_words_per_line=5, min_num_sentences=3),
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        JsonlWriter(str(out / "data"), compression=None),
    ]
    LocalPipelineExecutor(
        pipeline, tasks=workers, workers=workers, logging_dir=str(out / "logs"), start_method="fork"
    ).run()


def kept(folder: Path) -> set[str]:
    """Ids of the records in the .jsonl files below a folder."""
    return {
        json.loads(line)["id"] for file in folder.rglob("*.jsonl") if ".work" not in file.parts for line in open(file)
    }


def main() -> None:
    parser = parser_of(__doc__, copies=8, workers=2)
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help="(the C4 sample of ../shared/data)")
    parser.add_argument("--cores", help="comma-separated, such as 0,1 (default: all this process may use)")
    parser.add_argument(
        "--datatrove-python", default=os.environ.get("DATATROVE_PYTHON", "datatrove-venv/bin/python"),
        help="interpreter of an environment with datatrove and spacy",
    )  # fmt: skip
    parser.add_argument("--datatrove-side", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain-words", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.datatrove_side:
        datatrove_side(options.paths, options.datatrove_side, options.workers, options.plain_words)
        return
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = copies(options.paths or [PAGES], folder / "in", options.copies, options.workers)
        num_bytes = sum(path.stat().st_size for path in paths)
        ours = [sys.executable, "-m", "data_tools.clean", *paths, "--workers", options.workers, "--rules", RULES,
                "--mask", "email,ip", "--unit-bytes", max(1, num_bytes // (4 * options.workers)), "--out"]  # fmt: skip
        theirs = [options.datatrove_python, Path(__file__).resolve(), *paths, "--workers", options.workers]
        sides = {"data_tools.clean": ours}
        if shutil.which(options.datatrove_python):
            sides |= {"datatrove": [*theirs, "--datatrove-side"],
                      "datatrove, plain words": [*theirs, "--plain-words", "--datatrove-side"]}  # fmt: skip
        else:
            print(f"no datatrove at {options.datatrove_python}: name one with --datatrove-python")
        outs = {side: folder / f"out{number}" for number, side in enumerate(sides)}
        seconds = {side: timed(lambda side=side: run([*sides[side], outs[side]])) for side in sides}
        found = {side: kept(out) for side, out in outs.items()}
    size = num_bytes / 1e6
    print(f"\n{size:.1f} MB, {options.workers} processes, start-up included")
    print(f"{'':26s}{'seconds':>9s}{'MB/s':>8s}{'MB/cpu-s':>10s}{'kept':>8s}{'also kept by ours':>20s}")
    also = found["data_tools.clean"]
    for side, (wall, cpu) in seconds.items():
        rates = f"{wall:9.1f}{size / wall:8.2f}{size / cpu:10.2f}"
        print(f"{side:26s}{rates}{len(found[side]):8d}{len(found[side] & also):20d}")


def copies(paths: list[Path], folder: Path, count: int, parts: int) -> list[Path]:
    """`count` copies of .jsonl files with ids of their own, spread over `parts` files or more."""
    folder.mkdir()
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    written = [folder / f"{part}.jsonl" for part in range(parts)]
    files = [open(path, "w", encoding="utf-8") for path in written]
    for number in range(count * len(lines)):
        record = {**json.loads(lines[number % len(lines)]), "id": f"{number}"}
        files[number % parts].write(json.dumps(record, ensure_ascii=False) + "\n")
    for file in files:
        file.close()
    return written


if __name__ == "__main__":
    main()
