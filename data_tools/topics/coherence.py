"""How well the top words of a topic go together: c_v, c_npmi and u_mass (Roeder, Both and Hinneburg 2015).

Contract: `coherence` gives for every topic what gensim's CoherenceModel gives for the same words and documents: counted
in windows of 110 words for c_v, 10 for c_npmi, in whole documents for u_mass. One difference: gensim 4.4 takes a word
for gone from a sliding window when one of its occurrences leaves it; here it is there while any of them is. c_v lies
between 0 and 1, c_npmi between -1 and 1, u_mass below 0; higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

MEASURES = ("c_v", "c_npmi", "u_mass")
TOP_WORDS = 10
SAMPLE = 20_000  # documents that are counted, spread evenly over the corpus
_WINDOWS = {"c_v": 110, "c_npmi": 10}
_TINY = 1e-12  # gensim's


def coherence(
    topics: np.ndarray, documents: Callable[[], Iterator[np.ndarray]] | Iterable[np.ndarray]
) -> dict[str, list[float]]:
    """Coherence of topics by measure.

    Args:
        topics: [topics, top words] word numbers, the most probable first.
        documents: word numbers of each document in order, negative ones for words that are not in the vocabulary.
    """
    words = np.unique(topics)
    place = {int(word): number for number, word in enumerate(words)}
    lookup = np.full(int(words[-1]) + 1, -1)
    lookup[words] = np.arange(len(words))
    together = {name: np.zeros((len(words), len(words))) for name in MEASURES}
    total = dict.fromkeys(MEASURES, 0)
    for document in documents() if callable(documents) else documents:
        total["u_mass"] += 1
        relevant = np.flatnonzero((document >= 0) & (document < len(lookup)))
        found = lookup[document[relevant]]
        relevant, found = relevant[found >= 0], found[found >= 0]
        windows_of = {name: max(1, len(document) - size + 1) for name, size in _WINDOWS.items()}
        for name, windows in windows_of.items():
            total[name] += windows
        if not len(found):
            continue
        present, columns = np.unique(found, return_inverse=True)
        grid = np.ix_(present, present)
        together["u_mass"][grid] += 1
        for name, size in _WINDOWS.items():
            windows = windows_of[name]
            if windows == 1:
                together[name][grid] += 1
                continue
            inside = np.zeros((len(present), windows), dtype=np.float32)
            for row, position in zip(columns.tolist(), relevant.tolist(), strict=True):
                inside[row, max(0, position - size + 1) : position + 1] = 1
            together[name][grid] += inside @ inside.T
    rows = np.array([[place[int(word)] for word in topic] for topic in topics])
    npmi = {name: _npmi(together[name] / max(1, total[name])) for name in _WINDOWS}
    return {
        "c_v": [_c_v(npmi["c_v"][np.ix_(row, row)]) for row in rows],
        "c_npmi": [_mean_of_pairs(npmi["c_npmi"][np.ix_(row, row)]) for row in rows],
        "u_mass": [_u_mass(together["u_mass"][np.ix_(row, row)] / max(1, total["u_mass"])) for row in rows],
    }


def _npmi(joint: np.ndarray) -> np.ndarray:
    """Normalised pointwise mutual information from probabilities of pairs (the diagonal: of words)."""
    single = np.diag(joint)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log((joint + _TINY) / np.outer(single, single)) / -np.log(joint + _TINY)
    return np.where(np.outer(single, single) > 0, value, 0.0)


def _mean_of_pairs(values: np.ndarray) -> float:
    return float(values[np.tril_indices(len(values), -1)].mean()) if len(values) > 1 else 0.0


def _c_v(npmi: np.ndarray) -> float:
    """Mean cosine between each word's NPMI with all words of the topic and the sum of those vectors."""
    whole = npmi.sum(axis=0)
    norms = np.linalg.norm(npmi, axis=1) * np.linalg.norm(whole)
    return float((npmi @ whole / np.maximum(norms, _TINY)).mean())


def _u_mass(joint: np.ndarray) -> float:
    """Mean of log P(word | more probable word) over pairs."""
    rows, columns = np.tril_indices(len(joint), -1)
    given = np.diag(joint)[columns]
    kept = given > 0
    if not kept.any():
        return 0.0
    return float(np.log((joint[rows, columns][kept] + _TINY) / given[kept]).sum() / len(rows))
