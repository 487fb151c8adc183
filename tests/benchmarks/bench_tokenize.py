"""Text shards to token shards against `tokenizers`' own encode_batch, on the same text and the same cores.

    python tests/benchmarks/bench_tokenize.py [--megabytes 12] [--rounds 3] [--cores 0,1]

Both sides are measured in turn, so that a busy machine slows both; the second figure is by processor time, which other
work on the machine disturbs less. encode_batch gets its texts ready in memory and its
results are thrown away; the compiler also reads and checks tars, writes, hashes and syncs token shards.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

from corpus import standard_library_documents, write_jsonl
from measure import parser_of, ratio, sides_in_turn


def main() -> None:
    parser = parser_of(__doc__, megabytes=12, rounds=3, vocab_size=6400)
    parser.add_argument("--cores", help="comma-separated, such as 0,1 (default: all this process may use)")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})

    from data_tools.shards import build_shards
    from minillm.data.compile_shards import compile_text_shards
    from minillm.data.text_shards import TEXTS, read_shard_index, text_shards_of_index
    from minillm.data.tokenizer import train_bpe_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = standard_library_documents(int(options.megabytes * 1e6))
        num_bytes = sum(len(text.encode()) for text in texts)
        tokenizer = train_bpe_tokenizer(iter(texts[: max(1, len(texts) // 8)]), options.vocab_size)
        write_jsonl(folder / "corpus.jsonl", texts)
        build_shards(folder / "corpus.jsonl", folder / "text")
        shards = text_shards_of_index(folder / "text", read_shard_index(folder / "text"))

        def encode_with(encode) -> None:
            for start in range(0, len(texts), 512):
                encode(texts[start : start + 512], add_special_tokens=False)

        def to_shards() -> None:
            out = folder / f"tokens-{time.monotonic_ns()}"
            compile_text_shards(shards, tokenizer, out, kind=TEXTS, source_key="")

        backend = tokenizer.backend_tokenizer
        sides = {
            "encode_batch": lambda: encode_with(backend.encode_batch),
            "encode_batch_fast": lambda: encode_with(backend.encode_batch_fast),
            "to shards": to_shards,
        }
        measured = sides_in_turn(sides, options.rounds)
    cores = len(os.sched_getaffinity(0))
    print(f"\n{num_bytes / 1e6:.1f} MB, {len(texts)} documents, {cores} cores, medians of {options.rounds} rounds")
    print(f"{'':20s}{'MB/s':>8s}{'of encode_batch':>17s}{'MB/cpu-s':>10s}{'of encode_batch':>17s}")
    for side, times in measured.items():
        wall, cpu = (statistics.median(num_bytes / time[kind] for time in times) / 1e6 for kind in (0, 1))
        of_wall, of_cpu = ratio(measured["encode_batch"], times)
        print(f"{side:20s}{wall:8.2f}{of_wall:17.2f}{cpu:10.2f}{of_cpu:17.2f}")


if __name__ == "__main__":
    main()
