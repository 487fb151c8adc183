"""Text shards to token shards against `tokenizers`' own encode_batch, on the same text and the same cores.

    python tests/benchmarks/bench_tokenize.py [--megabytes 12] [--rounds 3] [--cores 0,1]

Both sides are measured in turn, so that a busy machine slows both. encode_batch gets its texts ready in memory and its
results are thrown away; the compiler also reads and checks tars, writes, hashes and syncs token shards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.corpus import standard_library_documents, write_jsonl  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--cores", help="comma-separated, such as 0,1 (default: all this process may use)")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})

    from data_tools.shards import build_shards
    from minillm.data.compile import compile_text_shards
    from minillm.data.shards import TEXTS, read_shard_index, text_shards_of_index
    from minillm.data.tokenizer import train_bpe_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = standard_library_documents(int(options.megabytes * 1e6))
        num_bytes = sum(len(text.encode()) for text in texts)
        tokenizer = train_bpe_tokenizer(iter(texts[: max(1, len(texts) // 8)]), options.vocab_size)
        write_jsonl(folder / "corpus.jsonl", texts)
        build_shards(folder / "corpus.jsonl", folder / "text")
        shards = text_shards_of_index(folder / "text", read_shard_index(folder / "text"))

        rates: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": [], "to shards": []}
        for number in range(options.rounds):
            for side, encode in (
                ("encode_batch", tokenizer.backend_tokenizer.encode_batch),
                ("encode_batch_fast", tokenizer.backend_tokenizer.encode_batch_fast),
            ):
                began = time.perf_counter()
                for start in range(0, len(texts), 512):
                    encode(texts[start : start + 512], add_special_tokens=False)
                rates[side].append(num_bytes / (time.perf_counter() - began))
            began = time.perf_counter()
            compile_text_shards(shards, tokenizer, folder / f"tokens-{number}", kind=TEXTS, source_key="")
            rates["to shards"].append(num_bytes / (time.perf_counter() - began))
    cores = len(os.sched_getaffinity(0))
    print(f"\n{num_bytes / 1e6:.1f} MB of text, {len(texts)} documents, {cores} cores, {options.rounds} rounds, medians")
    for side, values in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, rates["encode_batch"]))
        rounds = " ".join(f"{value / 1e6:.2f}" for value in values)
        print(f"{side:20s} {statistics.median(values) / 1e6:6.2f} MB/s   {ratio:5.2f} of encode_batch   ({rounds})")


if __name__ == "__main__":
    main()
