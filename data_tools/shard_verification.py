"""Every byte of a folder of shards against its index.json, for `data_tools.shards verify`.

Contract: reads, never writes; reports every problem it finds, one sentence each.
"""

from __future__ import annotations

from pathlib import Path

from minillm.data.tar import DamagedTar
from minillm.data.text_shards import (
    INDEX,
    TEXT_FORMAT,
    BadSample,
    TextShard,
    iterate_samples,
    read_shard_index,
    text_shards_of_index,
)
from minillm.data.token_shards import TokenShard
from minillm.utils.errors import UserError
from minillm.utils.files import sha256_file


def shard_problems(folder: Path) -> tuple[str, list[str]]:
    """(what the folder holds in one line, what is wrong with it); without index.json it is checked as text shards.

    Raises:
        UserError: no such folder, no shards, or an index that cannot be read.
    """
    index = read_shard_index(folder)
    if index is None:
        shards = [TextShard(path) for path in sorted(folder.glob("*.tar"))]
        if not shards:
            raise UserError(f"{folder} holds no shards (.tar) and no {INDEX}: name a folder of shards")
        return _text_problems(shards)
    listed = {entry["name"] for entry in index["shards"]}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    if index["format"] == TEXT_FORMAT:
        summary, problems = _text_problems(text_shards_of_index(folder, index))
        total = sum(entry["num_samples"] for entry in index["shards"])
        if index.get("num_samples", total) != total:
            problems.append(f"{folder / INDEX}: num_samples is not the sum over its shards")
    else:
        summary, problems = _token_problems(folder, index)
    return summary, problems + [f"{folder / name} is not listed in {INDEX}" for name in strangers]


def _text_problems(shards: list[TextShard]) -> tuple[str, list[str]]:
    problems = []
    total = 0
    for shard in shards:
        problem = shard.problem()
        if problem is not None:
            problems.append(problem)
            continue
        count = 0
        try:
            with open(shard.path, "rb", buffering=1 << 20) as file:
                for sample in iterate_samples(file):
                    count += 1
                    try:
                        sample.document()
                    except BadSample as error:
                        problems.append(f"{shard.path}: sample {sample.key!r}: {error}")
        except DamagedTar as error:
            problems.append(f"{shard.path}: {error}")
        if shard.num_samples not in (None, count):
            problems.append(f"{shard.path} holds {count} samples, its {INDEX} says {shard.num_samples}")
        total += count
    return f"{len(shards)} text shards, {total:,} samples", problems


def _token_problems(folder: Path, index: dict) -> tuple[str, list[str]]:
    problems = []
    for entry in index["shards"]:
        shard = TokenShard(folder / entry["name"], entry, index)
        if not shard.open():
            problems.append(str(shard.problem))
            continue
        bad_chunks = []
        for chunk in range(shard.num_chunks):
            if (problem := shard.chunk_problem(chunk)) is not None:
                bad_chunks.append(problem)
            if chunk % 1024 == 0:
                shard.release()
        problems += bad_chunks
        if not bad_chunks and sha256_file(shard.path) != entry["sha256"]:
            problems.append(f"{shard.path} does not match the checksum in its {INDEX}")
    for key in ("num_tokens", "num_documents"):
        if sum(entry[key] for entry in index["shards"]) != index[key]:
            problems.append(f"{folder / INDEX}: {key} is not the sum over its shards")
    counts = f"{index['num_documents']:,} documents, {index['num_tokens']:,} tokens"
    return f"{len(index['shards'])} token shards, {counts}", problems
