"""The two ways to fit a topic model: gensim's online variational LDA, tomotopy's collapsed Gibbs sampling.

Contract: `fit(engine, corpus, ...)` gives a Fitted model as plain arrays; the same arguments give the same arrays. The
online engine reads the corpus from disk chunk by chunk, so that memory does not grow with it; Gibbs sampling holds
every occurrence of every word in memory.

The variational engine is gensim's LdaModel, its update rule, schedule and priors, with its E-step replaced by
data_tools.topics.inference, which gives the same numbers faster, and with clustered documents as its start.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_tools.extras import require
from data_tools.topics.clusters import starting_counts
from data_tools.topics.corpus import Corpus
from data_tools.topics.inference import infer
from minillm.utils.logging import say

ENGINES = ("gensim", "gibbs")
_SAY_EVERY = 10.0  # seconds
_CLUSTER_PRIOR = 0.5  # gibbs: occurrences of each word that are laid out as the clusters have it


@dataclass(frozen=True)
class Training:
    """How a model is fitted."""

    engine: str = "gensim"
    seed: int = 0
    passes: int = 50  # gensim: over the corpus
    chunk: int = 2000  # gensim: documents between two updates
    alpha: float | str = "auto"  # prior of a document's topics: a number, gensim also auto, symmetric or asymmetric
    eta: float | str = 0.05  # prior of a topic's words: a number, gensim also auto or symmetric
    start: str = "clusters"  # what it begins with: clusters (of documents; gibbs: a weak prior) or random
    iterations: int = 1000  # gibbs: sweeps over the corpus


@dataclass(frozen=True)
class Fitted:
    """A topic model.

    Attributes:
        topics: [topics, words] float32, probabilities of the words.
        weights: [words, topics] float32, what data_tools.topics.inference takes: exp(E[log topics]) or their transpose.
        alpha: [topics] float32, the prior of a document's topics.
    """

    topics: np.ndarray
    weights: np.ndarray
    alpha: np.ndarray

    def reordered(self, order: np.ndarray) -> Fitted:
        """The same model with its topics in another order."""
        return Fitted(self.topics[order], np.ascontiguousarray(self.weights[:, order]), self.alpha[order])


def fit(corpus: Corpus, num_topics: int, training: Training) -> Fitted:
    """Fit a model of `num_topics` topics.

    Raises:
        UserError: the engine's package is missing.
    """
    return (_fit_gensim if training.engine == "gensim" else _fit_gibbs)(corpus, num_topics, training)


class _Progress:
    """A line now and then, with the time left."""

    def __init__(self, label: str, steps: int) -> None:
        self._label, self._steps = label, steps
        self._start = self._said = time.monotonic()

    def at(self, step: int) -> None:
        now = time.monotonic()
        if step and step < self._steps and now - self._said > _SAY_EVERY:
            self._said = now
            left = (now - self._start) / step * (self._steps - step)
            say(f"{self._label} {step} of {self._steps}, about {left:,.0f} s left")


def _fit_gensim(corpus: Corpus, num_topics: int, training: Training) -> Fitted:
    models = require("gensim.models.ldamodel", "gensim")
    logging.getLogger("gensim").setLevel(logging.ERROR)
    chunks = -(-len(corpus.bags) // training.chunk)
    progress = _Progress(f"{num_topics} topics: pass", training.passes)
    steps = 0

    class OnDisk(models.LdaModel):
        """Its chunks are lists of document numbers, which gensim only counts and hands to `inference`."""

        def inference(self, chunk, collect_sstats=False):
            nonlocal steps
            start = self.random_state.gamma(100.0, 1.0 / 100.0, (len(chunk), self.num_topics)).astype(self.dtype)
            weights = np.ascontiguousarray(self.expElogbeta.T)
            counts = np.zeros_like(weights) if collect_sstats else None
            gamma = infer(
                corpus.bags.part(chunk[0], chunk[-1] + 1), weights, self.alpha, gamma=start, statistics=counts,
                iterations=self.iterations, threshold=self.gamma_threshold, pool=pool,
            )  # fmt: skip
            steps += 1
            progress.at(steps // chunks)
            return gamma, counts.T * self.expElogbeta if collect_sstats else None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        model = OnDisk(
            id2word=dict(enumerate(corpus.words)), num_topics=num_topics, passes=training.passes,
            chunksize=training.chunk, alpha=training.alpha, eta=training.eta, eval_every=None,
            random_state=training.seed,
        )  # fmt: skip
        if training.start == "clusters":
            found = starting_counts(corpus.bags, len(corpus.words), num_topics, training.seed)
            model.state.sstats[...] = found
            model.sync_state()
        model.update(range(len(corpus.bags)))
    topics = np.asarray(model.get_topics(), dtype=np.float32)
    weights = np.ascontiguousarray(model.expElogbeta.T, dtype=np.float32)
    return Fitted(topics, weights, np.asarray(model.alpha, dtype=np.float32))


def _fit_gibbs(corpus: Corpus, num_topics: int, training: Training) -> Fitted:
    tomotopy = require("tomotopy")
    model = tomotopy.LDAModel(k=num_topics, seed=training.seed, alpha=training.alpha, eta=training.eta)
    for sequence in corpus.sequences():
        model.add_doc([str(number) for number in sequence[sequence >= 0]])
    if training.start == "clusters":
        found = starting_counts(corpus.bags, len(corpus.words), num_topics, training.seed)
        priors = training.eta + _CLUSTER_PRIOR * found / found.sum(axis=0)
        for word in range(len(corpus.words)):
            model.set_word_prior(str(word), priors[:, word].tolist())
    progress = _Progress(f"{num_topics} topics: sweep", training.iterations)
    # one worker: with more the order in which they meet is left to chance, and the result with it
    model.train(training.iterations, workers=1, callback_interval=10, callback=lambda _, done, all_: progress.at(done))
    columns = [int(word) for word in model.used_vocabs]
    topics = np.zeros((num_topics, len(corpus.words)), dtype=np.float32)
    for topic in range(num_topics):
        topics[topic, columns] = model.get_topic_word_dist(topic)
    return Fitted(topics, np.ascontiguousarray(topics.T), np.asarray(model.alpha, dtype=np.float32))
