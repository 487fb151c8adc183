"""Hit rate and mean reciprocal rank of held-out next items, against what is simplest: popularity and co-occurrence.

For each held-out sequence every item gets a score from the last `context` items before the held-out one; items of the
sequence itself are left out, as nobody wants what he has just heard. The rank of the held-out item counts ties as half
ahead. Ways to score:

    item2vec        the softmax input of Word2Vec: mean of the context's vectors times the output vector of the item
    cosine          cosine between the mean direction of the context and the item (what `similar` does)
    co-occurrence   how often the item stood within a window of the context's items, over the root of its frequency
    popularity      how often the item occurs at all
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_tools.recommendation.sequences import Sequences
from data_tools.recommendation.vectors import Items
from minillm.utils.errors import UserError

WAYS = ("item2vec", "cosine", "co-occurrence", "popularity")
_WINDOW = 5  # of co-occurrence
_FLUSH = 1 << 21  # pairs held before they are added up


def evaluate(items: Items, held: Sequences | None, *, at: tuple[int, ...] = (1, 5, 10, 20), context: int = 10) -> dict:
    """{way: {"hit@10": ..., "mrr": ...}} and the number of "sequences".

    Args:
        held: sequences whose last item is to be predicted; None takes those that training held out.

    Raises:
        UserError: nothing was held out, the training file is gone (co-occurrence is counted from it).
    """
    if held is None:
        held = Sequences(items.folder / "holdout.txt", comment="")
        if not held.path.is_file() or not items.about["held_out"]:
            raise UserError(
                f"{items.folder} has no sequences held out: train with --holdout 0.1, or name a file of others"
            )
    counts = cooccurrence(_training_sequences(items), items.number)
    ranks: dict[str, list[float]] = {way: [] for way in WAYS}
    for known, target in _questions(held, items.number, context):
        recent = known[-context:]
        scores = {
            "item2vec": items.output @ items.vectors[recent].mean(axis=0),
            "cosine": items.directions @ items.directions[recent].mean(axis=0),
            "co-occurrence": np.asarray(counts[recent].sum(axis=0)).ravel() / np.sqrt(items.counts),
            "popularity": items.counts,
        }
        seen = np.zeros(len(items.counts), dtype=bool)
        seen[known] = True
        for way, values in scores.items():
            others = values[~seen]
            ranks[way].append(1 + (others > values[target]).sum() + 0.5 * ((others == values[target]).sum() - 1))
    number = len(ranks["popularity"])
    if not number:
        raise UserError(f"{held.path} has no sequence whose last item and another are known to {items.folder}")
    return {"sequences": number, "items": len(items.counts), **{way: _figures(ranks[way], at) for way in WAYS}}


def _questions(held: Sequences, number: dict[str, int], context: int) -> Iterator[tuple[list[int], int]]:
    """(known items, the item to predict); an item that stood in the sequence before is not asked for."""
    for _, items in held.lines():
        known = [number[item] for item in items[:-1] if item in number]
        if known and items[-1] in number and number[items[-1]] not in known:
            yield known, number[items[-1]]


def _figures(ranks: list[float], at: tuple[int, ...]) -> dict[str, float]:
    values = np.array(ranks)
    hits = {f"hit@{limit}": round(float((values <= limit).mean()), 4) for limit in at}
    return {**hits, "mrr": round(float((1 / values).mean()), 4)}


def _training_sequences(items: Items) -> Iterable[list[str]]:
    source = dict(items.about["source"])
    path = Path(source.pop("path"))
    if not path.is_file():
        raise UserError(f"{path}, from which {items.folder} was trained, is gone: co-occurrence is counted from it")
    return (known for known, _ in Sequences(path, **source).split())


def cooccurrence(sequences: Iterable[list[str]], number: dict[str, int]):
    """[items, items] sparse: how often two items stand at most five places from each other."""
    from scipy.sparse import csr_matrix

    shape = (len(number), len(number))
    total = csr_matrix(shape, dtype=np.float32)
    pairs: list[tuple[int, int]] = []

    def added() -> csr_matrix:
        rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return total + csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)

    for items in sequences:
        known = [number[item] for item in items if item in number]
        for place, first in enumerate(known):
            for second in itertools.islice(known, place + 1, place + 1 + _WINDOW):
                pairs += [(first, second), (second, first)]
        if len(pairs) > _FLUSH:
            total = added()
            pairs.clear()
    return added()
