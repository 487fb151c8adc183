"""Topic models: `python -m data_tools.lda` against calling gensim and tomotopy directly, on the same tokens.

    python tests/benchmarks/bench_lda.py [--papers ../shared/data/neurips-2022/papers.csv] [--limit 1000] [--rounds 1]

Same documents, vocabulary, priors, passes and seed on both sides. Rows:
  fit            the model alone: ours reads the corpus from disk, the library has it in memory as its users do
  whole          from a new process to the end. Ours: read the .csv, tokenise, learn phrases and vocabulary, fit, three
                 coherences, the documents' topics, tables (without pictures and page). Direct: tokens are given; fit,
                 gensim's CoherenceModel for the same three, the documents' topics
`ratio` is the library's time over ours: above 1 ours is faster. Each side is run in turn, the best of the rounds is
kept. CPU seconds are those of all processes: they say more than wall seconds where the machine has other work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from measure import ROOT, SHARED, parser_of, sides_in_turn

TOPICS, PASSES, SWEEPS, SEED = 10, 50, 1000, 0
ROW = "{:<14}{:<10}{:>12}{:>12}{:>8}{:>12}{:>12}{:>8}"


def main() -> None:
    parser = parser_of(__doc__, limit=1000, rounds=1)
    parser.add_argument("--papers", type=Path, default=SHARED / "neurips-2022" / "papers.csv")
    parser.add_argument("--direct", nargs=2, metavar=("ENGINE", "TEXTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.direct:
        direct(args.direct[0], Path(args.direct[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(args.papers, args.limit, Path(folder))
        size = (
            f"{len(corpus.bags):,} documents, {int(corpus.bags.counts.sum()):,} words, {len(corpus.words):,} different"
        )
        cores = len(os.sched_getaffinity(0))
        print(f"{size}; {TOPICS} topics, {PASSES} passes or {SWEEPS} sweeps; {cores} cores")
        print(ROW.format("", "engine", "direct s", "ours s", "ratio", "direct cpu", "ours cpu", "ratio"))
        for name, engine, theirs, mine in rows(args, corpus, Path(folder)):
            times = sides_in_turn({"theirs": theirs, "ours": mine}, args.rounds)
            (wall_theirs, cpu_theirs), (wall_mine, cpu_mine) = (map(min, zip(*side)) for side in times.values())
            figures = [f"{wall_theirs:.1f}", f"{wall_mine:.1f}", f"{wall_theirs / wall_mine:.2f}",
                       f"{cpu_theirs:.1f}", f"{cpu_mine:.1f}", f"{cpu_theirs / cpu_mine:.2f}"]  # fmt: skip
            print(ROW.format(name, engine, *figures), flush=True)


def prepare(papers: Path, limit: int, folder: Path):
    """The corpus as data_tools.lda makes it, and texts.json with the same tokens for the libraries."""
    import csv

    from data_tools.topics.corpus import open_corpus, write_corpus
    from data_tools.topics.vocabulary import Choices, learn
    from data_tools.topics.words import Tokenizer

    csv.field_size_limit(1 << 30)
    with open(papers, newline="", encoding="utf-8") as file:
        texts = [row["abstract"] for _, row in zip(range(limit), csv.DictReader(file), strict=False)]
    tokenizer = Tokenizer("words")
    runs = [tokenizer.chunks(text) for text in texts]
    vocabulary = learn(lambda: iter(runs), Choices())
    write_corpus((vocabulary.encode(document) for document in runs), folder / "corpus")
    corpus = open_corpus(folder / "corpus", vocabulary.words)
    documents = [[corpus.words[n] for n in sequence[sequence >= 0]] for sequence in corpus.sequences()]
    (folder / "texts.json").write_text(json.dumps(documents))
    return corpus


def rows(args: argparse.Namespace, corpus, folder: Path):
    """(name, engine, the library's way, ours)."""
    from data_tools.topics.engines import Training, fit

    texts = json.loads((folder / "texts.json").read_text())
    gensim = Training(passes=PASSES, seed=SEED, start="random")
    gibbs = Training(engine="gibbs", alpha=0.1, eta=0.01, iterations=SWEEPS, seed=SEED, start="random")
    yield "fit", "gensim", lambda: fit_gensim(texts), lambda: fit(corpus, TOPICS, gensim)
    yield "fit", "gibbs", lambda: fit_tomotopy(texts), lambda: fit(corpus, TOPICS, gibbs)
    for engine in ("gensim", "gibbs"):
        ours = [sys.executable, "-m", "data_tools.lda", args.papers, "--text-column", "abstract", "--limit", args.limit,
                "--num-topics", TOPICS, "--engine", engine, "--start", "random", "--no-page", "--no-pictures",
                "--out", folder / engine]  # fmt: skip
        theirs = [sys.executable, __file__, "--direct", engine, folder / "texts.json"]
        yield "whole", engine, partial(run, theirs, folder), partial(run, ours, ROOT)


def run(line: list[object], cwd: Path) -> None:
    shutil.rmtree(line[-1], ignore_errors=True)  # the folder of the round before
    subprocess.run([str(part) for part in line], check=True, stdout=subprocess.DEVNULL, cwd=cwd)


def fit_gensim(texts: list[list[str]]):
    """(model, dictionary, bags of words) as gensim's users write it."""
    from gensim.corpora import Dictionary
    from gensim.models import LdaModel

    dictionary = Dictionary(texts)
    corpus = [dictionary.doc2bow(text) for text in texts]
    model = LdaModel(corpus, num_topics=TOPICS, id2word=dictionary, passes=PASSES, random_state=SEED, alpha="auto",
                     eta=0.05, chunksize=2000, eval_every=None)  # fmt: skip
    return model, dictionary, corpus


def fit_tomotopy(texts: list[list[str]]):
    """A model as tomotopy's users write it; one worker, as ours, for a result that comes again."""
    import tomotopy

    model = tomotopy.LDAModel(k=TOPICS, seed=SEED, alpha=0.1, eta=0.01)
    for text in texts:
        model.add_doc(text)
    model.train(SWEEPS, workers=1)
    return model


def direct(engine: str, path: Path) -> None:
    """What a script without data_tools does after tokenising."""
    import numpy as np
    from gensim.corpora import Dictionary
    from gensim.models.coherencemodel import CoherenceModel

    texts = json.loads(path.read_text())
    if engine == "gensim":
        model, dictionary, corpus = fit_gensim(texts)
        topics = [[word for word, _ in model.show_topic(topic, 10)] for topic in range(TOPICS)]
        shares = [model.get_document_topics(bag, minimum_probability=0) for bag in corpus]
    else:
        model = fit_tomotopy(texts)
        dictionary = Dictionary(texts)
        corpus = [dictionary.doc2bow(text) for text in texts]
        topics = [[word for word, _ in model.get_topic_words(topic, 10)] for topic in range(TOPICS)]
        shares = [document.get_topic_dist() for document in model.docs]
    for measure in ("c_v", "c_npmi", "u_mass"):
        found = CoherenceModel(topics=topics, texts=texts, corpus=corpus, dictionary=dictionary, coherence=measure,
                               topn=10, processes=len(os.sched_getaffinity(0)))  # fmt: skip
        print(measure, found.get_coherence())
    with open("document_topics.json", "w") as file:
        json.dump(np.asarray(shares, dtype=float).tolist(), file)


if __name__ == "__main__":
    main()
