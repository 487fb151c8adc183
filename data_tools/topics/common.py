"""Words that a corpus uses whatever its documents are about: measured, not listed.

Two signs have to meet. A word's occurrences do not gather: its residual IDF (Church and Gale 1995) is low. And the
documents that hold it are like any others: the words beside it are met as often as everywhere. The second saves what
is written once and then abbreviated ("reinforcement learning", then "RL").
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

SAMPLE = 20_000  # documents the company of words is taken from
NEIGHBOURS = 1000  # most frequent words that count as company
_CHOSEN_COMPANY = 0.01  # phi squared from which a word's documents are of their own kind


def residual_idf(documents: int, total: int, num_documents: int) -> float:
    """Bits by which a word's inverse document frequency exceeds that of a word strewn at random."""
    by_chance = -math.log2(-math.expm1(-total / num_documents))
    return -math.log2(documents / num_documents) - by_chance


def with_chosen_company(sample: Iterable[set[str]], words: list[str]) -> set[str]:
    """Those of `words` that keep company of their own kind in a sample of documents.

    For a word in n documents and a neighbour in the share p of all, the documents with both are n * p by chance; the
    mean over neighbours of (found - expected)^2 / (expected * (1 - p)) is 1 by chance and 1 + n * phi^2 in general.
    """
    from scipy.sparse import csr_matrix

    documents = list(sample)
    counts: dict[str, int] = {}
    for document in documents:
        for word in document:
            counts[word] = counts.get(word, 0) + 1
    words = [word for word in words if counts.get(word, 0) > 1]
    neighbours = sorted((w for w in counts if counts[w] < len(documents) / 2), key=lambda w: (-counts[w], w))
    neighbours = neighbours[:NEIGHBOURS]
    if not words or len(neighbours) < 2:
        return set()
    numbers = {word: number for number, word in enumerate(dict.fromkeys([*neighbours, *words]))}
    held = [[numbers[word] for word in document if word in numbers] for document in documents]
    offsets = np.cumsum([0, *map(len, held)])
    columns = np.fromiter((number for row in held for number in row), dtype=np.int32, count=offsets[-1])
    table = csr_matrix((np.ones(len(columns), np.float32), columns, offsets), shape=(len(documents), len(numbers)))
    both = (table[:, [numbers[word] for word in words]].T @ table[:, : len(neighbours)]).toarray()
    share = np.array([counts[word] for word in neighbours]) / len(documents)
    number = np.array([counts[word] for word in words], dtype=float)
    expected = number[:, None] * share
    surprise = (both - expected) ** 2 / (expected * (1 - share))
    surprise[np.array([[word == other for other in neighbours] for word in words])] = 1
    # a word in a large share of the documents has less room to differ from them
    excess = surprise.mean(axis=1) / np.maximum(1 - number / len(documents), 1e-9) - 1
    chosen = (excess / number > _CHOSEN_COMPANY) & (excess > 3 * np.sqrt(2 / len(neighbours)))  # three sigma
    return {word for word, is_chosen in zip(words, chosen, strict=True) if is_chosen}
