"""Peak memory of every process while a large corpus is sharded, tokenized and streamed.

    python tests/benchmarks/bench_memory.py [--gigabytes 2] [--folder DIR]

The corpus is the standard library's source over and over in a temporary folder (about 3.5 times its size is needed, and
is freed at the end); the tokenizer is character-level, which is the fastest. Peaks are VmHWM, shared and mapped pages
included, so they count more than a process costs. The goal is 500 MB a process whatever the size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corpus import standard_library_documents, write_jsonl
from measure import ROOT, parser_of

STREAM = """
import sys
from pathlib import Path
from minillm.data.loader import BatchLoader
from minillm.data.sources import open_sources
from minillm.data.sequence_stream import build_stream
sources = open_sources(sys.argv[1], tokenizer_path=Path(sys.argv[2]), cache_dir=Path(sys.argv[1]).parent / "cache")
stream = build_stream(sources, seq_len=512, packing="concat", seed=0)
loader = BatchLoader(stream, train_batch_size=512, micro_batch_size=32, rank=0, world_size=1)
for step in range(-(-stream.num_sequences // 512)):
    loader.batch_at(step)
loader.close()
"""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args()
    from minillm.data.tokenizer import build_char_tokenizer

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        documents = standard_library_documents(10**9)
        size = write_corpus(folder / "corpus.jsonl", documents, options.gigabytes * 1e9)
        build_char_tokenizer(iter(documents)).save_pretrained(folder / "tokenizer")
        del documents
        print(f"{size / 1e9:.2f} GB of text, {len(os.sched_getaffinity(0))} cores", flush=True)
        print(f"{'stage':12s}{'seconds':>9s}{'MB/s':>8s}{'processes':>11s}{'peak MB (each)':>26s}", flush=True)
        tool = [sys.executable, "-m", "data_tools.shards"]
        text, tokens, tokenizer = folder / "text", folder / "tokens", folder / "tokenizer"
        stages = {
            "build": [*tool, "build", "--corpus", folder / "corpus.jsonl", "--out", text],
            "tokenize": [*tool, "tokenize", "--shards", text, "--tokenizer", tokenizer, "--out", tokens],
            "stream": [sys.executable, "-c", STREAM, tokens, tokenizer],
        }
        for stage, command in stages.items():
            began = time.perf_counter()
            peaks = run_and_watch([str(part) for part in command])
            seconds = time.perf_counter() - began
            sizes = ", ".join(f"{peak:.0f}" for peak in sorted(peaks, reverse=True))
            print(f"{stage:12s}{seconds:9.0f}{size / seconds / 1e6:8.1f}{len(peaks):11d}{sizes:>26s}", flush=True)
            if stage == "build":
                (folder / "corpus.jsonl").unlink()


def write_corpus(path: Path, documents: list[str], size: float) -> int:
    """The documents over and over, in whole rounds up to `size` bytes; the bytes written."""
    write_jsonl(path, documents)
    one_round = path.read_bytes()
    written = len(one_round)
    with open(path, "ab") as file:
        while written + len(one_round) <= size:
            written += file.write(one_round)
    return written


def run_and_watch(command: list[str]) -> list[float]:
    """Run a command; the peak resident set in MB of it and of each of its children."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            pids = [process.pid, *map(int, children.read_text().split())]
        except OSError:
            pids = []
        for pid in pids:
            peaks[pid] = max(peaks.get(pid, 0.0), peak_of(pid))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command[:5])} ... failed with {process.returncode}")
    return [peak for peak in peaks.values() if peak]


def peak_of(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0  # it has just ended
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
