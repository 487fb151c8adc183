"""A topic model on disk, and what it says of a text.

Contract: OUT/model holds `model.json` (engine, tokenizer, vocabulary, labels), `topics.npy` (probabilities [topics,
words]), `weights.npy` ([words, topics], what the inference takes) and `alpha.npy`; no pickle. `TopicModel.distribution`
is the same inference as the training's, so that a text gets the same topics wherever it is labelled.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.topics.engines import Fitted
from data_tools.topics.inference import Bags, infer
from data_tools.topics.vocabulary import Vocabulary
from data_tools.topics.words import Tokenizer
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_atomic, write_json

FORMAT = "minillm-topics-1"
_FOLD_IN_ITERATIONS = 100
_RELEVANCE = 0.6  # LDAvis' lambda that its authors found readers to do best with


@dataclass
class TopicModel:
    """A fitted model with all that is needed to read a text as it does."""

    fitted: Fitted
    vocabulary: Vocabulary
    mode: str
    stop_words: list[str]
    labels: list[str]

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None

    @property
    def num_topics(self) -> int:
        return len(self.fitted.topics)

    def distribution(self, text: str) -> np.ndarray | None:
        """[topics] probabilities of the topics in a text; None where it has no word of the vocabulary."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.mode, self.stop_words)
        numbers = np.array(self.vocabulary.encode(self._tokenizer.chunks(text)), dtype=np.int32)
        ids, counts = np.unique(numbers[numbers >= 0], return_counts=True)
        if not len(ids):
            return None
        return shares(Bags(np.array([0, len(ids)]), ids, counts), self.fitted)[0]


def shares(bags: Bags, fitted: Fitted, pool=None) -> np.ndarray:
    """[documents, topics] expected shares of the topics in documents."""
    gamma = infer(bags, fitted.weights, fitted.alpha, iterations=_FOLD_IN_ITERATIONS, pool=pool)
    return gamma / gamma.sum(axis=1, keepdims=True)


def top_words(fitted: Fitted, count: int) -> np.ndarray:
    """[topics, count] numbers of the most probable words."""
    return np.argsort(-fitted.topics, axis=1, kind="stable")[:, :count]


def labels_of(fitted: Fitted, words: list[str], word_counts: np.ndarray) -> list[str]:
    """Three words for each topic: probable in it, and more so than elsewhere (the relevance of Sievert and Shirley)."""
    overall = word_counts / word_counts.sum()
    log_topics = np.log(fitted.topics + 1e-12)
    relevance = _RELEVANCE * log_topics + (1 - _RELEVANCE) * (log_topics - np.log(overall + 1e-12))
    return [", ".join(readable(words[n]) for n in np.argsort(-row, kind="stable")[:3]) for row in relevance]


def readable(word: str) -> str:
    """A word as people write it: `neural network`."""
    return word.replace("_", " ")


def save_model(model: TopicModel, folder: Path, about: dict) -> None:
    """Write a model into `folder`; `about` goes into model.json too."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"topics": model.fitted.topics, "weights": model.fitted.weights, "alpha": model.fitted.alpha}
    for name, values in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        write_atomic(folder / f"{name}.npy", buffer.getvalue())
    header = {"format": FORMAT, "num_topics": model.num_topics, "labels": model.labels, "tokenizer": model.mode,
              "stop_words": model.stop_words}  # fmt: skip
    write_json(folder / "model.json", {**header, **about, "vocabulary": model.vocabulary.to_json()})


def load_model(folder: Path) -> TopicModel:
    """Read what `save_model` wrote; `folder` may be the OUT of data_tools.lda.

    Raises:
        UserError: no model there, or a damaged one.
    """
    folder = Path(folder)
    folder = folder / "model" if (folder / "model" / "model.json").is_file() else folder
    if not (folder / "model.json").is_file():
        raise UserError(f"{folder} holds no topic model (model.json): name the --out of python -m data_tools.lda")
    header = read_json(folder / "model.json")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{folder / 'model.json'} is not of the format {FORMAT}: fit the model again")
    try:
        arrays = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("topics", "weights", "alpha")]
        vocabulary = Vocabulary.from_json(header["vocabulary"])
        model = TopicModel(Fitted(*arrays), vocabulary, header["tokenizer"], header["stop_words"], header["labels"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{folder} holds a damaged topic model ({error}): fit it again") from error
    topics, words = model.fitted.topics.shape
    if model.fitted.weights.shape != (words, topics) or len(vocabulary.words) != words or len(model.labels) != topics:
        raise UserError(f"{folder} holds a damaged topic model: its arrays and its vocabulary differ in size")
    return model
