"""MinHash deduplication: against datatrove's pipeline, what it finds of planted duplicates, and its memory.

    python tests/benchmarks/bench_dedup.py [--megabytes 40] [--rounds 3] [--datatrove PYTHON]     speed
    python tests/benchmarks/bench_dedup.py --quality                  precision and recall on planted duplicates
    python tests/benchmarks/bench_dedup.py --memory                   peak memory at two sizes of the input

Speed: both get the same .jsonl files (two, one a core), shingles of 5 words, 14 bands of 8 rows, 2 processes, and
write the corpus without its duplicates: datatrove runs its four steps (signatures, buckets, clusters, filter) with the
rest of its defaults. datatrove is no dependency of the project: --datatrove names a Python that has it (default
DATATROVE_PYTHON, or datatrove-venv/bin/python). Ours also removes exact duplicates and verifies every candidate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import ROOT, SHARED, parser_of, ratio, sides_in_turn

from tests.data_tools.planted_duplicates import (
    EDITS,
    distinct_texts,
    edited,
    measure_quality,
    peak_of_command,
    plant,
    real_texts,
    true_jaccard,
)

DATATROVE = Path(os.environ.get("DATATROVE_PYTHON", "datatrove-venv/bin/python"))
SENTENCES_A_DOCUMENT = (8, 40)
COPIES = 0.1  # share of near copies in the corpus for the speed


def main() -> None:
    parser = parser_of(__doc__, megabytes=40, rounds=3, workers=2)
    parser.add_argument("--datatrove", type=Path, default=DATATROVE)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.quality:
            print_quality(Path(name))
        elif options.memory:
            print_memory(Path(name))
        else:
            print_speed(Path(name), options)


# -- speed -------------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, num_bytes: int, files: int = 2, seed: int = 0) -> list[Path]:
    """Documents put together of the sentences of real English texts, a tenth of them near copies, in .jsonl files."""
    texts = real_texts(SHARED, chinese_poems=0)
    sentences = [s for kind in ("abstracts", "pages", "wiki") for text in texts[kind] for s in text.split(". ") if s]
    rng = random.Random(seed)
    documents: list[str] = []
    size = 0
    while size < num_bytes:
        if documents and rng.random() < COPIES:
            text = edited(rng.choice(documents), rng.choice(EDITS), rng.random() * 0.3, rng)
        else:
            text = ". ".join(rng.choices(sentences, k=rng.randint(*SENTENCES_A_DOCUMENT)))
        documents.append(text)
        size += len(text.encode())
    paths = [folder / f"corpus-{number}.jsonl" for number in range(files)]
    for number, path in enumerate(paths):
        with open(path, "w", encoding="utf-8") as file:
            for identity in range(number, len(documents), files):
                line = {"id": str(identity), "text": documents[identity]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return paths


def dedup_ours(paths: list[Path], out: Path, workers: int) -> int:
    """Deduplicate with the project's command; records kept."""
    line = [sys.executable, "-m", "data_tools.dedup", *paths, "--out", out, "--workers", workers]
    subprocess.run([str(word) for word in line], cwd=ROOT, check=True, capture_output=True)
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["records_out"]


def dedup_datatrove(paths: list[Path], out: Path, workers: int, python: Path = DATATROVE) -> int:
    """Deduplicate with datatrove's four steps; records kept. The files must be alone in their folder."""
    arguments = {"folder": str(paths[0].parent), "files": len(paths), "out": str(out), "workers": workers}
    line = [str(python), "-c", _DATATROVE, json.dumps(arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"datatrove failed:\n{done.stderr[-3000:]}")
    kept = 0
    for path in (out / "kept").glob("*.jsonl"):
        with open(path, "rb") as file:
            kept += sum(1 for _ in file)
    return kept


_DATATROVE = """
import json, sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter

def main():
    a = json.loads(sys.argv[1])
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    out, files, workers = a["out"], a["files"], a["workers"]
    def run(pipeline, tasks, name):
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=f"{out}/logs/{name}",
            start_method="fork").run()
    reader = JsonlReader(a["folder"], glob_pattern="*.jsonl")
    run([reader, MinhashDedupSignature(output_folder=f"{out}/sig", config=config)], files, "1")
    run([MinhashDedupBuckets(input_folder=f"{out}/sig", output_folder=f"{out}/buckets", config=config)], 14, "2")
    run([MinhashDedupCluster(input_folder=f"{out}/buckets", output_folder=f"{out}/ids", config=config)], 1, "3")
    writer = JsonlWriter(output_folder=f"{out}/kept", output_filename="${rank}.jsonl", compression=None)
    run([reader, MinhashDedupFilter(input_folder=f"{out}/ids"), writer], files, "4")

if __name__ == "__main__":
    main()
"""


def print_speed(folder: Path, options: argparse.Namespace) -> None:
    source = folder / "corpus"
    source.mkdir()
    paths = write_corpus(source, int(options.megabytes * 1e6))
    num_bytes = sum(path.stat().st_size for path in paths)
    with open(paths[0], "rb") as first, open(paths[1], "rb") as second:
        num_documents = sum(1 for file in (first, second) for _ in file)
    sides: dict[str, Callable[[Path], int]] = {"ours": lambda out: dedup_ours(paths, out, options.workers)}
    if options.datatrove.is_file():
        sides["datatrove"] = lambda out: dedup_datatrove(paths, out, options.workers, options.datatrove)
    else:
        print(f"{options.datatrove} is not there: ours alone")
    kept: dict[str, int] = {}

    def run(side: str) -> None:
        kept[side] = sides[side](folder / side)
        shutil.rmtree(folder / side)

    measured = sides_in_turn({side: lambda side=side: run(side) for side in sides}, options.rounds)
    size = f"{num_bytes / 1e6:.1f} MB, {num_documents:,} documents"
    print(f"\n{size}, {options.workers} processes, medians of {options.rounds}")
    print(f"{'':12s}{'seconds':>9s}{'MB/s':>8s}{'cpu-s':>8s}{'MB/cpu-s':>10s}{'kept':>10s}")
    for side, values in measured.items():
        wall, cpu = (statistics.median(value[kind] for value in values) for kind in (0, 1))
        print(
            f"{side:12s}{wall:9.2f}{num_bytes / wall / 1e6:8.2f}{cpu:8.2f}{num_bytes / cpu / 1e6:10.2f}{kept[side]:10,}"
        )
    if len(sides) == 2:
        wall, cpu = ratio(measured["datatrove"], measured["ours"])
        print(f"ours is {wall:.1f} times as fast on the clock, {cpu:.1f} times by processor time")


# -- quality -----------------------------------------------------------------------------------------------------------


def print_quality(folder: Path) -> None:
    from data_tools.deduplication.minhash import Bands, candidate_probability

    texts = real_texts(SHARED, chinese_poems=4000)
    english = distinct_texts([text for kind in ("abstracts", "pages", "wiki") for text in texts[kind]])
    for title, chosen in (("English", english), ("Chinese", distinct_texts(texts["poems"]))):
        place = folder / title
        place.mkdir()
        pairs = plant(chosen)
        found, removals = {}, {}
        for verify in ("none", "signature", "jaccard"):
            found[verify], removals[verify] = measure_quality(pairs, place, verify)
        print(f"\n{title}: {len(pairs):,} texts, each with a planted copy; 5-grams, 14 bands of 8 rows, threshold 0.8")
        print("share of the pairs found, by their true Jaccard similarity")
        print(
            f"{'Jaccard':12s}{'pairs':>7s}{'S-curve':>10s}{'candidates':>12s}{'by signature':>14s}{'by Jaccard':>12s}"
        )
        edges = [0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.01]
        for low, high in zip(edges, edges[1:]):
            inside = [i for i, pair in enumerate(pairs) if low <= pair[3] < high]
            if not inside:
                continue
            theory = statistics.fmean(candidate_probability(pairs[i][3], Bands(14, 8)) for i in inside)
            shares = [statistics.fmean(found[v][i] for i in inside) for v in ("none", "signature", "jaccard")]
            name = "1" if low == 1 else f"{low:.2f}-{min(high, 1):.2f}"
            print(f"{name:12s}{len(inside):7,}{theory:10.3f}{shares[0]:12.3f}{shares[1]:14.3f}{shares[2]:12.3f}")
        positive = [i for i, pair in enumerate(pairs) if pair[3] >= 0.8]
        for verify, name in (("none", "candidates"), ("signature", "by signature"), ("jaccard", "by Jaccard")):
            true = [true_jaccard(pairs[a // 2][a % 2], pairs[b // 2][b % 2]) for a, b in removals[verify]]
            recall = statistics.fmean(found[verify][i] for i in positive)
            print(f"{name}: recall {recall:.4f}, precision {statistics.fmean(t >= 0.8 for t in true):.4f} "
                  f"(within 0.05 of the threshold {statistics.fmean(t >= 0.75 for t in true):.4f}) "
                  f"of {len(true):,} removed")  # fmt: skip


# -- memory ------------------------------------------------------------------------------------------------------------


def print_memory(folder: Path) -> None:
    print(f"{'input':>10s}{'documents':>11s}{'seconds':>9s}{'peak of the process':>21s}")
    for size in (20, 60, 120):
        place = folder / str(size)
        place.mkdir()
        paths = write_corpus(place, size * 1_000_000, files=1)
        start = time.perf_counter()
        peak = peak_of_command([*paths, "--out", place / "out"])
        summary = json.loads((place / "out" / "summary.json").read_text(encoding="utf-8"))
        print(f"{size:7d} MB{summary['records_in']:11,}{time.perf_counter() - start:9.1f}{peak:18.0f} MB", flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
