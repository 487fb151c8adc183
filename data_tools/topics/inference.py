"""The variational E-step of LDA for many documents at once: used to train (engines), to label (apply) and to report.

Contract: `infer` gives what `gensim.models.LdaModel.inference` gives for the same start values (Hoffman, Blei and Bach
2010, algorithm 2, with Lee and Seung's form of the update), to rounding: documents are updated together, block by
block, and each one stops where it has converged. Nothing here needs gensim.

A corpus is three arrays in CSR form: the words of document d are `ids[start:stop]` with `counts[start:stop]`, where
`start, stop = offsets[d:d+2]`; the ids of one document are distinct.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

ITERATIONS = 50  # gensim's default
THRESHOLD = 1e-3  # gensim's default: mean absolute change of gamma at which a document has converged
_BLOCK_VALUES = 1 << 19  # topics x words of a block: large enough that threads meet seldom, small enough for a cache


@dataclass(frozen=True)
class Bags:
    """Documents as bags of words, in memory or mapped from a file."""

    offsets: np.ndarray  # int64 [documents + 1]
    ids: np.ndarray  # int32 [words]
    counts: np.ndarray  # float32 or int32 [words]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, start: int, stop: int) -> Bags:
        """Documents start to stop (read into memory)."""
        offsets = np.asarray(self.offsets[start : stop + 1])
        first, last = int(offsets[0]), int(offsets[-1])
        return Bags(offsets - first, np.asarray(self.ids[first:last]), np.asarray(self.counts[first:last]))


def infer(
    bags: Bags,
    word_topic: np.ndarray,
    alpha: np.ndarray,
    *,
    gamma: np.ndarray | None = None,
    iterations: int = ITERATIONS,
    threshold: float = THRESHOLD,
    statistics: np.ndarray | None = None,
    pool: Executor | None = None,
) -> np.ndarray:
    """Variational posteriors of documents.

    Args:
        bags: the documents.
        word_topic: [vocabulary, topics] float32: exp(E[log beta]) of a variational model, or plain probabilities.
        alpha: [topics] prior of the documents' topics.
        gamma: start values [documents, topics]; without them every document starts at alpha + words / topics.
        iterations: updates a document may take.
        threshold: mean absolute change of gamma at which a document stops.
        statistics: [vocabulary, topics] array to which the expected counts, before the factor word_topic, are added.
        pool: threads to use; the result does not depend on them.

    Returns:
        gamma [documents, topics] float32; normalised over topics it is the expected share of each topic.
    """
    num_topics = word_topic.shape[1]
    alpha = np.asarray(alpha, dtype=np.float32)
    lengths = np.diff(bags.offsets)
    if gamma is None:
        totals = np.zeros(len(bags), dtype=np.float32)
        filled = lengths > 0
        if filled.any():
            totals[filled] = np.add.reduceat(bags.counts.astype(np.float32), bags.offsets[:-1][filled])
        gamma = alpha + (totals / num_topics)[:, None]
    out = np.array(gamma, dtype=np.float32)
    out[lengths == 0] = alpha
    documents = np.flatnonzero(lengths)
    words_a_block = max(1, _BLOCK_VALUES // num_topics)
    cuts = np.searchsorted(np.cumsum(lengths[documents]), np.arange(words_a_block, lengths.sum(), words_a_block))
    blocks = [block for block in np.split(documents, np.unique(cuts)) if len(block)]

    def run(block: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        return _infer_block(bags, block, word_topic, alpha, out, iterations, threshold, statistics is not None)

    if pool is None or len(blocks) < 2:
        results = map(run, blocks)
    else:
        results = pool.map(run, blocks)
    for found in results:  # in the order of the blocks: the sums are the same for any number of threads
        if statistics is not None:
            statistics[found[0]] += found[1]
    return out


def _infer_block(
    bags: Bags,
    block: np.ndarray,
    word_topic: np.ndarray,
    alpha: np.ndarray,
    out: np.ndarray,
    iterations: int,
    threshold: float,
    statistics: bool,
) -> tuple[np.ndarray, np.ndarray] | None:
    """`infer` for neighbouring documents that are not empty: writes rows of `out`, gives (word ids, their counts)."""
    from scipy.sparse import csr_matrix

    first, last = int(bags.offsets[block[0]]), int(bags.offsets[block[-1] + 1])
    ids = bags.ids[first:last]
    counts = bags.counts[first:last].astype(np.float32)
    lengths = np.diff(bags.offsets)[block]
    epsilon = np.finfo(np.float32).eps
    topics = word_topic[ids]  # [words, topics]
    gamma = out[block]
    weights = _expected_exp_log(gamma)  # [documents, topics]
    norm = _norms(weights, lengths, topics, epsilon)
    open_documents = np.ones(len(block), dtype=bool)  # of those still in the arrays: not converged yet
    rows = np.arange(len(block))  # which documents of the block are still in the arrays
    places = np.arange(len(ids))  # and which words
    final_ratio = np.empty_like(counts)
    final_weights = np.empty_like(weights)
    row_ids, row_counts, row_lengths = ids, counts, lengths
    for iteration in range(iterations):
        if len(rows) == 1:
            expected = (row_counts / norm @ topics)[None]
        else:
            shape, offsets = (len(rows), len(word_topic)), np.concatenate([[0], np.cumsum(row_lengths)])
            expected = csr_matrix((row_counts / norm, row_ids, offsets), shape=shape) @ word_topic
        updated = alpha + weights * expected
        weights = _expected_exp_log(updated)
        norm = _norms(weights, row_lengths, topics, epsilon)
        done = open_documents & (np.abs(updated - gamma).mean(axis=1) < threshold)
        gamma = updated
        if iteration == iterations - 1:
            done = open_documents.copy()
        if not done.any():
            continue
        out[block[rows[done]]] = gamma[done]
        if statistics:
            words = np.repeat(done, row_lengths)
            final_weights[rows[done]] = weights[done]
            final_ratio[places[words]] = row_counts[words] / norm[words]
        open_documents &= ~done
        if not open_documents.any():
            break
        if open_documents.mean() < 0.75:  # what has converged is computed on for a while: packing costs too
            words = np.repeat(open_documents, row_lengths)
            gamma, weights, rows = gamma[open_documents], weights[open_documents], rows[open_documents]
            row_lengths, norm, topics = row_lengths[open_documents], norm[words], topics[words]
            row_ids, row_counts, places = row_ids[words], row_counts[words], places[words]
            open_documents = np.ones(len(rows), dtype=bool)
    if not statistics:
        return None
    vocabulary, columns = np.unique(ids, return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    found = csr_matrix((final_ratio, columns, offsets), shape=(len(block), len(vocabulary))).T @ final_weights
    return vocabulary, found


def _norms(weights: np.ndarray, lengths: np.ndarray, topics: np.ndarray, epsilon: float) -> np.ndarray:
    """For every word of every document the sum over topics of its document's weights times the word's."""
    if len(weights) == 1:
        return topics @ weights[0] + epsilon
    return np.einsum("wt,wt->w", np.repeat(weights, lengths, axis=0), topics) + epsilon


def _expected_exp_log(gamma: np.ndarray) -> np.ndarray:
    """exp(E[log theta]) for theta ~ Dirichlet(gamma), row by row."""
    from scipy.special import psi

    return np.exp(psi(gamma) - psi(gamma.sum(axis=1, keepdims=True)))
