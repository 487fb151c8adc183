"""Which words a topic model sees: plurals and phrases joined, words of every document and rare words left out.

Contract: `learn` reads a corpus of word runs (data_tools.topics.words) a few times and gives a Vocabulary;
`Vocabulary.encode` turns the runs of any text into word numbers, -1 standing for a word that was left out, so that
distances between words stay. It is JSON on disk. What is left out, in this order:

    common    words that say nothing about a document (data_tools.topics.common): in more than 3 % of the documents,
              with a residual IDF under `common_words` bits, a limit that rises with the share of the documents, and
              without company of their own; words in more than `no_above` of the documents, under one bit
    rare      words in fewer documents than `no_below`
    beyond    all but the `keep` most frequent
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

from data_tools.topics.common import NEIGHBOURS, SAMPLE, residual_idf, with_chosen_company
from minillm.utils.errors import UserError

Runs = list[list[str]]  # one document: runs of neighbouring words
_MAX_COUNTED = 4_000_000  # distinct words counted at once; above it words seen once are forgotten (memory stays flat)
COMMON_WORDS = 0.3  # bits
_COMMON_FROM = 0.03  # share of documents from which a word may be common


@dataclass(frozen=True)
class Choices:
    """What `learn` may be told; the defaults are made for abstracts and articles."""

    no_below: int = 5  # documents a word must be in
    no_above: float = 0.5  # share of the documents a word may be in
    keep: int = 50_000  # words
    common_words: float | None = None  # residual IDF in bits below which a frequent word is left out, 0 keeps them
    plurals: bool = True  # read "networks" as "network" where the corpus has both
    phrases: int = 2  # rounds of joining neighbours: 1 gives phrases of two words, 2 of up to four
    phrase_count: int = 8  # occurrences a phrase must have
    phrase_npmi: float = 0.35  # normalised pointwise mutual information it must have (-1 to 1)

    def common_limit(self, mode: str) -> float:
        """`common_words`, or what suits a tokenizer: a poem does not repeat a character, so that none would be kept."""
        return self.common_words if self.common_words is not None else 0.0 if mode == "characters" else COMMON_WORDS


@dataclass
class Vocabulary:
    """The words of a model in the order of their numbers, and what is done to words before they are looked up."""

    words: list[str]
    document_frequency: list[int]
    singular: dict[str, str] = field(default_factory=dict)
    phrases: list[list[str]] = field(default_factory=list)  # per round: "first_second"
    common: list[str] = field(default_factory=list)  # left out because they are everywhere, the most frequent first
    num_rare: int = 0

    def __post_init__(self) -> None:
        self._numbers = {word: number for number, word in enumerate(self.words)}
        self._rounds = [frozenset(phrases) for phrases in self.phrases]

    def encode(self, runs: Runs) -> list[int]:
        """Word numbers of a document in order; -1 for words that are not in the vocabulary."""
        number = self._numbers.get
        return [number(word, -1) for run in prepare(runs, self.singular, self._rounds) for word in run]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> Vocabulary:
        return cls(**value)


def prepare(runs: Runs, singular: dict[str, str], rounds: Iterable[frozenset[str]]) -> Runs:
    """Runs of words with plurals read as singulars and phrases joined, greedily from the left, round after round."""
    if singular:
        runs = [[singular.get(word, word) for word in run] for run in runs]
    for phrases in rounds:
        runs = [_join(run, phrases) if len(run) > 1 else run for run in runs]
    return runs


def _join(run: list[str], phrases: frozenset[str]) -> list[str]:
    out, place, last = [], 0, len(run) - 1
    while place <= last:
        word = run[place]
        if place < last and f"{word}_{run[place + 1]}" in phrases:
            out.append(glue(word, run[place + 1]))
            place += 2
        else:
            out.append(word)
            place += 1
    return out


def glue(first: str, second: str) -> str:
    """A phrase as one word: `neural_network`, but Chinese without a mark between: 明月."""
    return first + second if first[-1] >= "\u2e80" and second[0] >= "\u2e80" else f"{first}_{second}"


def learn(corpus: Callable[[], Iterator[Runs]], choices: Choices, mode: str = "words") -> Vocabulary:
    """Make the vocabulary of a corpus.

    Args:
        corpus: gives the documents anew each time it is called (6 times with the default choices).
        mode: of the tokenizer that made them.

    Raises:
        UserError: no word is left.
    """
    common_limit = choices.common_limit(mode)
    totals, documents, num_documents = _count(corpus())
    singular = _plurals(totals) if choices.plurals else {}
    rounds: list[frozenset[str]] = []
    if singular:
        totals, documents, _ = _count(prepare(runs, singular, ()) for runs in corpus())
    bits = {word: residual_idf(documents[word], totals[word], num_documents) for word in documents}
    for _ in range(choices.phrases):
        found = _phrases((prepare(runs, singular, rounds) for runs in corpus()), choices)
        if not found:
            break
        rounds.append(found)
    if rounds:
        totals, documents, _ = _count(prepare(runs, singular, rounds) for runs in corpus())
        for word in documents:
            if word not in bits:  # a phrase is as telling as its words are: it is often written once, then shortened
                parts = [bits[part] for part in word.split("_") if part in bits]
                bits[word] = sum(parts) / len(parts) if parts else math.inf
    share = {word: count / num_documents for word, count in documents.items()}
    scattered = [word for word in documents if _is_scattered(share[word], bits[word], common_limit)]
    sample = (prepare(runs, singular, rounds) for runs in itertools.islice(corpus(), SAMPLE))
    # only these are looked at; one string object stands for all occurrences of a word, so that a sample fits in memory
    looked_at = {word: word for word in [*scattered, *(word for word, _ in documents.most_common(NEIGHBOURS))]}
    held = ({looked_at[word] for run in runs for word in run if word in looked_at} for runs in sample)
    saved = with_chosen_company(held, scattered)
    everywhere = {word for word in documents if share[word] > choices.no_above and bits[word] < 1}
    common = [word for word in documents if word in everywhere]
    common += [word for word in scattered if word not in everywhere and word not in saved]
    common_words = set(common)
    kept = [word for word, number in documents.items() if number >= choices.no_below and word not in common_words]
    kept = sorted(kept, key=lambda word: (-totals[word], word))[: choices.keep]
    if not kept:
        raise UserError(
            f"no word is left of {len(documents):,} in {num_documents:,} documents: {len(common):,} are in too many "
            f"documents (--no-above {choices.no_above}, --common-words {common_limit}), the others in fewer "
            f"than --no-below {choices.no_below}: change these, or give more text"
        )
    return Vocabulary(
        words=kept,
        document_frequency=[documents[word] for word in kept],
        singular=singular,
        phrases=[sorted(phrases) for phrases in rounds],
        common=sorted(common, key=lambda word: (-documents[word], word)),
        num_rare=len(documents) - len(common) - len(kept),
    )


def _count(corpus: Iterable[Runs]) -> tuple[Counter[str], Counter[str], int]:
    """Occurrences, documents of every word, number of documents."""
    totals: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    number = 0
    for runs in corpus:
        words = Counter(word for run in runs for word in run)
        totals.update(words)
        documents.update(words.keys())
        number += 1
        if len(totals) > _MAX_COUNTED:
            for word in [word for word, count in totals.items() if count < 2]:
                del totals[word], documents[word]
    return totals, documents, number


def _plurals(totals: Counter[str]) -> dict[str, str]:
    """English plurals whose singular the corpus has too (Harman's S stemmer, held to attested words)."""
    singular = {}
    for word in totals:
        if len(word) < 4 or word[-1] != "s" or word.endswith(("ss", "us", "is", "ics")) or not word.isascii():
            continue
        guesses = [word[:-3] + "y"] if word.endswith("ies") else []
        if word.endswith(("ses", "xes", "zes", "ches", "shes")):
            guesses.append(word[:-2])
        guesses.append(word[:-1])
        best = max(guesses, key=lambda guess: totals.get(guess, 0))
        if totals.get(best, 0) >= max(2, totals[word] // 50):
            singular[word] = best
    return singular


def _phrases(corpus: Iterable[Runs], choices: Choices) -> frozenset[str]:
    """Pairs of neighbours that are met together much more often than apart, as `first_second`.

    The rule is that of gensim's Phrases with scoring="npmi" (Bouma 2009): log(p(ab) / (p(a) p(b))) / -log p(ab).
    """
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for runs in corpus:
        for run in runs:
            words.update(run)
            pairs.update(itertools.pairwise(run))
        if len(pairs) > _MAX_COUNTED:
            for pair in [pair for pair, count in pairs.items() if count < 2]:
                del pairs[pair]
    total = words.total()
    found = []
    for (first, second), count in pairs.items():
        if count >= choices.phrase_count and first != second:
            together = count / total
            attraction = math.log(together * total * total / (words[first] * words[second])) / -math.log(together)
            if attraction > choices.phrase_npmi:
                found.append(f"{first}_{second}")
    return frozenset(found)


def _is_scattered(share: float, bits: float, limit: float) -> bool:
    """`share` of the documents hold the word. The more of them do, the more it must gather in some to be kept."""
    return share > _COMMON_FROM and limit > 0 and bits < limit * (1 + 2 * share)
