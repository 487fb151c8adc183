"""Tokens a second one process gets from local token shards, and the time of a jump to a far step.

    python tests/benchmarks/bench_loader.py [--tokens 40000000] [--seq-len 512]

"first" reads rows for the first time (every chunk is verified on the way), "again" the same rows once more. Tokens are
inputs, padding not counted. The second rate is by processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import parser_of

ROW = "{:8s} {:>6s} {:>6s} {:>7s} {:>14s} {:>16s} {:>10s}"


def main() -> None:
    options = parser_of(__doc__, tokens=40_000_000, seq_len=512).parse_args()

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = write_tokens(Path(name) / "tokens", options.tokens)
        print(f"{options.tokens / 1e6:.0f} M tokens (uint16), documents of 100 to 900, sequence {options.seq_len}")
        print(ROW.format("packing", "micro", "batch", "pass", "M tokens/s", "M tokens/cpu-s", "seek ms"))
        for packing in ("concat", "none"):
            for micro, batch in ((8, 32), (32, 128), (64, 512)):
                measure(folder, packing, micro, batch, options.seq_len)


def write_tokens(folder: Path, num_tokens: int) -> Path:
    """Random documents as token shards."""
    from minillm.data.token_shards import CHUNK_TOKENS, TokenShardWriter
    from minillm.utils.files import write_json

    draw = np.random.default_rng(0)
    folder.mkdir()
    writer = TokenShardWriter(folder, dtype=np.dtype("<u2"), eos_token_id=0, has_loss_mask=False)
    total = documents = 0
    while total < num_tokens:
        lengths = draw.integers(100, 900, 2000)
        writer.append(draw.integers(1, 6400, lengths.sum()).astype("<u2"), lengths)
        total, documents = total + int(lengths.sum()), documents + 2000
    index = {
        "format": "minillm-tokens-1",
        "dtype": "<u2",
        "chunk_tokens": CHUNK_TOKENS,
        "has_loss_mask": False,
        "tokenizer": "none",
        "eos_token_id": 0,
        "num_documents": documents,
        "num_tokens": total,
        "num_bad_samples": 0,
        "shards": writer.close(),
    }
    write_json(folder / "index.json", index)
    return folder


def measure(folder: Path, packing: str, micro: int, batch: int, seq_len: int) -> None:
    from minillm.data.loader import BatchLoader
    from minillm.data.sequence_stream import build_stream
    from minillm.data.text_shards import FoundShards, read_shard_index
    from minillm.data.token_source import open_token_source

    index = read_shard_index(folder)
    found = FoundShards(folder, [shard["name"] for shard in index["shards"]], index)
    source = open_token_source([found], name="bench", fingerprint="none", tokenizer_path=Path("none"))
    stream = build_stream([source], seq_len=seq_len, packing=packing, seed=1)
    loader = BatchLoader(stream, train_batch_size=batch, micro_batch_size=micro, rank=0, world_size=1)
    steps = min(stream.num_sequences, 16384) // batch
    for run in ("first", "again"):
        tokens = 0
        clock, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            ready = loader.batch_at(step)
            tokens += batch * seq_len if packing == "concat" else ready.num_target_tokens
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        seeks = []
        for jump in range(20):
            began = time.perf_counter()
            loader.batch_at(10**6 * (jump + 1))
            seeks.append(time.perf_counter() - began)
        rates = (f"{tokens / clock / 1e6:.1f}", f"{tokens / cpu / 1e6:.1f}", f"{statistics.median(seeks) * 1e3:.1f}")
        print(ROW.format(packing, str(micro), str(batch), run, *rates))
    loader.close()


if __name__ == "__main__":
    main()
