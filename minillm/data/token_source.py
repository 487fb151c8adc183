"""A source of tokens: the token shards of one entry of `data.train`, opened and checked against the tokenizer.

Contract: opening costs one index.json a folder and one stat a shard; counts come from the index, so that they are the
same on every rank whether or not a shard can be read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data.text_shards import FoundShards
from minillm.data.token_shards import TokenShard
from minillm.utils.errors import UserError
from minillm.utils.logging import warn


@dataclass
class TokenSource:
    """Token shards under one name. `weight` is the source's share of the run's sequences, relative to the others'."""

    name: str
    weight: float
    shards: list[TokenShard] = field(repr=False)
    eos_token_id: int
    num_tokens: int
    num_documents: int
    has_loss_mask: bool
    num_bad_samples: int = 0


def open_token_source(
    folders: Sequence[FoundShards],
    *,
    name: str,
    weight: float = 1.0,
    fingerprint: str,
    tokenizer_path: Path,
    max_bad_samples: int = 0,
    mend: str = "write the shards again",
) -> TokenSource:
    """Open token shards.

    Args:
        folders: token shards; each has its index.
        fingerprint: of the tokenizer in `tokenizer_path`, which must have written the shards.
        max_bad_samples: 0 refuses shards that are missing, cut, or were compiled with samples left out. With more, an
            unreadable shard is named, and its sequences count as bad where a stream meets them.
        mend: what to do about shards that are missing or cut.

    Raises:
        UserError: another tokenizer's shards, a missing or cut shard, more bad samples than allowed, no documents.
    """
    shards: list[TokenShard] = []
    num_bad_samples = 0
    for folder, names, index in folders:
        if index["tokenizer"] != fingerprint:
            raise UserError(
                f"the token shards in {folder} were made with another tokenizer (fingerprint {index['tokenizer']}) "
                f"than {tokenizer_path} ({fingerprint}): name that tokenizer, or compile the text shards again"
            )
        entries = {entry["name"]: entry for entry in index["shards"]}
        shards += [TokenShard(folder / shard, entries[shard], index) for shard in names]
        num_bad_samples += index["num_bad_samples"]
    if num_bad_samples > max_bad_samples:
        raise UserError(
            f"{num_bad_samples} bad samples were left out when the shards of source {name} were compiled, and "
            f"{max_bad_samples} are allowed: mend the text shards, or raise data.max_bad_samples"
        )
    problems = [shard.problem for shard in shards if shard.problem]
    if problems and max_bad_samples == 0:
        raise UserError("; ".join(problems) + f": {mend}, or raise data.max_bad_samples")
    for problem in problems:
        warn(f"{problem}; the sequences from it are skipped")
    source = TokenSource(
        name=name,
        weight=weight,
        shards=shards,
        eos_token_id=folders[0].index["eos_token_id"],
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=sum(shard.num_documents for shard in shards),
        has_loss_mask=any(shard.has_loss_mask for shard in shards),
        num_bad_samples=num_bad_samples,
    )
    if source.num_documents == 0:
        raise UserError(f"data source {name} is empty: {folders[0].folder} holds no document")
    return source
