"""From files to a folder with a topic model and its report: what `python -m data_tools.lda FILE` does.

Contract: passes that leave their results in OUT/.work, so that the same command goes on after a kill: tokens (a unit at
a time), vocabulary, corpus, a model for each number of topics. Then the report. Only `.work/command.json` stays there.
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_tools.parallel import identity, work_folder
from data_tools.records import UNIT_BYTES, TextField
from data_tools.topics import documents as of_documents
from data_tools.topics.coherence import MEASURES, SAMPLE, TOP_WORDS, coherence
from data_tools.topics.corpus import Corpus, open_corpus, write_corpus
from data_tools.topics.engines import Fitted, Training, fit
from data_tools.topics.model import TopicModel, labels_of, readable, save_model, top_words
from data_tools.topics.tokens import choose_date_field, choose_tokenizer, look_at, read_about, read_runs, tokenize
from data_tools.topics.vocabulary import Choices, Vocabulary, learn
from data_tools.workshop import found_units
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_atomic, write_json
from minillm.utils.logging import say

_LEARN_FROM = 200_000  # documents the vocabulary is learned from, spread evenly over the corpus


@dataclass(frozen=True)
class Request:
    """What `fit_topics` is asked for."""

    paths: Sequence[str]
    out: Path
    text: TextField
    num_topics: Sequence[int]  # several: `choose` takes one
    training: Training = field(default_factory=Training)
    choices: Choices = field(default_factory=Choices)
    tokenizer: str = "auto"
    stop_words: Sequence[str] = ()
    limit: int | None = None
    choose_by: str = "c_npmi"
    date_column: str | None = None
    table: str = "auto"  # csv, parquet or auto
    num_words: int = 20  # of a topic, in topics.json and pictures
    pictures: bool = True
    page: bool = True
    font: Path | None = None
    workers: int | None = None
    unit_bytes: int = UNIT_BYTES


def fit_topics(request: Request) -> dict:
    """Fit, write the report, say what came out; the summary.

    Raises:
        UserError: nothing to read, no such column, too few documents or words, OUT in use.
    """
    paths = [str(path) for path in request.paths]
    units = found_units(paths, request.unit_bytes)
    command = {
        "tool": "lda", "inputs": identity(units), "text": asdict(request.text), "num_topics": list(request.num_topics),
        "training": asdict(request.training), "choices": asdict(request.choices), "tokenizer": request.tokenizer,
        "stop_words": sorted(request.stop_words), "limit": request.limit, "choose_by": request.choose_by,
        "date_column": request.date_column, "num_words": request.num_words,
    }  # fmt: skip
    texts, fields = look_at(units, request.text)  # before OUT is made: a wrong column leaves nothing behind
    with work_folder(request.out, paths, command) as work:
        if (request.out / "summary.json").is_file():
            say(f"{request.out} holds this model already: nothing to do")
            return read_json(request.out / "summary.json")
        start = time.monotonic()
        mode = choose_tokenizer(request.tokenizer, texts)
        date_field = choose_date_field(request.date_column, fields)
        units, counts = tokenize(
            units, request.text, work, mode=mode, stop_words=request.stop_words, date_field=date_field,
            limit=request.limit, workers=request.workers,
        )  # fmt: skip
        corpus, vocabulary = _corpus(request, mode, units, counts, work)
        times = {"tokens": time.monotonic() - start}
        best, fitted, table = _fitted(request, corpus, work)
        times["model"] = time.monotonic() - start - times["tokens"]
        abouts = read_about(units, work, request.limit)
        summary = _report(request, corpus, vocabulary, fitted, table, abouts, work, mode)
        times["report"] = time.monotonic() - start - sum(times.values())
        counts["rejected"] |= {"no_word_left": counts["records_out"] - len(corpus.bags)}
        counts["rejected"] = {reason: count for reason, count in counts["rejected"].items() if count}
        summary = {
            "tool": "lda", "inputs": paths, "options": command,
            **{key: counts[key] for key in ("records_in", "bytes_in", "rejected", "examples")},
            "records_out": len(corpus.bags), "tokenizer": mode, "date_column": date_field, "num_topics": best,
            **summary, "seconds": round(time.monotonic() - start, 2),
            "seconds_of": {name: round(seconds, 2) for name, seconds in times.items()},
        }  # fmt: skip
        write_json(request.out / "summary.json", summary)
        corpus = None  # its files are unmapped before they go
        for left in work.iterdir():
            if left.name not in ("command.json", "lock"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        _say_topics(request, summary)
        return summary


def _corpus(request: Request, mode: str, units, counts: dict, work: Path) -> tuple[Corpus, Vocabulary]:
    """The vocabulary and the corpus in its numbers, made now or by an earlier run."""
    num_documents = min(counts["records_out"], request.limit or counts["records_out"])
    counts["records_out"] = num_documents
    if num_documents < 2:
        raise UserError(
            f"{', '.join(map(str, request.paths))}: {num_documents} document with words in it: topics are found by "
            "comparing documents, give many (about 100 or more)"
        )
    known = work / "vocabulary.json"
    if known.is_file():
        vocabulary = Vocabulary.from_json(read_json(known))
    else:
        step = -(-num_documents // _LEARN_FROM)
        vocabulary = learn(lambda: read_runs(units, work, request.limit, step), request.choices, mode)
        write_json(known, vocabulary.to_json())
    folder = work / "corpus"
    if not folder.is_dir():
        shutil.rmtree(work / ".corpus.tmp", ignore_errors=True)
        write_corpus((vocabulary.encode(runs) for runs in read_runs(units, work, request.limit)), folder)
    corpus = open_corpus(folder, vocabulary.words)
    common = f" ({', '.join(vocabulary.common[:8])} ...)" if vocabulary.common else ""
    say(
        f"{len(corpus.bags):,} documents, {int(corpus.bags.counts.sum()):,} words, {len(vocabulary.words):,} different "
        f"ones; left out {len(vocabulary.common):,} that are everywhere{common} and {vocabulary.num_rare:,} rare ones"
    )
    if len(corpus.bags) < 2 or len(vocabulary.words) < TOP_WORDS:
        raise UserError(
            f"{len(corpus.bags)} documents and {len(vocabulary.words)} words are left, too few for topics: lower "
            f"--no-below (now {request.choices.no_below}), or give more text"
        )
    return corpus, vocabulary


def _fitted(request: Request, corpus: Corpus, work: Path) -> tuple[int, Fitted, list[dict]]:
    """(number of topics, the model, the table of all that were tried)."""
    step = -(-len(corpus.bags) // SAMPLE)
    table: list[dict] = []
    for number in request.num_topics:
        folder = work / f"model-{number:04d}"
        if (folder / "done.json").is_file():
            row = read_json(folder / "done.json")
        else:
            start = time.monotonic()
            fitted = fit(corpus, number, request.training)
            seconds = time.monotonic() - start
            tops = top_words(fitted, TOP_WORDS)
            found = coherence(tops, lambda: corpus.sequences(step))
            row = {"num_topics": number, **{name: round(float(np.mean(found[name])), 4) for name in MEASURES},
                   "distinct": round(len(np.unique(tops)) / tops.size, 4), "seconds": round(seconds, 2),
                   "by_topic": found}  # fmt: skip
            _save_arrays(fitted, folder)
            write_json(folder / "done.json", row)
        table.append(row)
        say(f"{number} topics: c_npmi {row['c_npmi']:.4f}, c_v {row['c_v']:.4f}, u_mass {row['u_mass']:.3f}, "
            f"{row['seconds']:.1f} s")  # fmt: skip
    best, why = choose(table, request.choose_by)
    if len(table) > 1:
        say(why)
    fitted = Fitted(*(np.load(work / f"model-{best['num_topics']:04d}" / f"{name}.npy") for name in _ARRAYS))
    return best["num_topics"], fitted, table


def choose(table: list[dict], measure: str) -> tuple[dict, str]:
    """The row with the best topics, and why: coherence times the share of distinct words among all top words.

    The product is the topic quality of Dieng, Ruiz and Blei (2020). A topic split in two keeps its coherence, so that
    coherence alone would take too many.
    """

    def quality(row: dict) -> float:
        return row[measure] * row["distinct"] if row[measure] > 0 else row[measure] / row["distinct"]

    best = max(table, key=quality)
    why = (
        f"{best['num_topics']} topics have the highest {measure} x distinct top words "
        f"({best[measure]:.4f} x {best['distinct']:.2f})"
    )
    return best, why


_ARRAYS = ("topics", "weights", "alpha")


def _save_arrays(fitted: Fitted, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(fitted, name), allow_pickle=False)


def _report(
    request: Request, corpus: Corpus, vocabulary: Vocabulary, fitted: Fitted, table: list[dict], abouts, work: Path,
    mode: str,
) -> dict:  # fmt: skip
    """Write everything but summary.json; what the summary says of it."""
    out = request.out
    word_counts = corpus.word_counts()
    lengths = of_documents.lengths_of(corpus)
    share = of_documents.document_shares(corpus, fitted, work / "shares.npy")
    by_words = _words_of_topics(share, lengths)
    order = np.argsort(-by_words, kind="stable")  # the largest topic is topic 0
    fitted, by_words = fitted.reordered(order), by_words[order]
    of_documents.reorder(share, order)
    labels = labels_of(fitted, vocabulary.words, word_counts)
    model = TopicModel(fitted, vocabulary, mode, list(request.stop_words), labels)
    save_model(model, out / "model", {"engine": request.training.engine, "seed": request.training.seed})
    path, found = of_documents.write_table(out, abouts, corpus, share, request.table)
    best = next(row for row in table if row["num_topics"] == len(labels))
    quality = {name: [best["by_topic"][name][old] for old in order] for name in MEASURES}
    topics = _topics(fitted, vocabulary.words, labels, by_words, found, quality, request.num_words)
    write_json(out / "topics.json", topics)
    write_atomic(out / "topic_words.csv", _csv(
        [["topic", "rank", "word", "probability"]]
        + [[topic["topic"], rank, entry["word"], entry["probability"]]
           for topic in topics for rank, entry in enumerate(topic["words"], 1)]
    ))  # fmt: skip
    scores = [{key: row[key] for key in ("num_topics", *MEASURES, "distinct", "seconds")} for row in table]
    if len(scores) > 1:
        write_atomic(out / "num_topics.csv", _csv([list(scores[0]), *(list(row.values()) for row in scores)]))
    periods = None
    if found.by_date:
        names, parts = of_documents.over_time(found.by_date)
        periods = (names, parts)
        write_atomic(out / "topics_over_time.csv", _csv(
            [["period", *(f"topic_{n}" for n in range(len(labels)))]]
            + [[name, *(f"{value:.4f}" for value in row)] for name, row in zip(names, parts.tolist(), strict=True)]
        ))  # fmt: skip
    if request.pictures:
        _draw(request, topics, labels, scores, periods)
    if request.page:
        from data_tools.topics.page import write_page

        title = f"{len(topics)} topics of {', '.join(Path(p).name for p in map(str, request.paths))}"
        write_page(out / "topics.html", title, fitted, vocabulary.words, word_counts, by_words, topics)
    return {
        "engine": request.training.engine, "document_table": path.name,
        "coherence": {name: best[name] for name in MEASURES}, "chosen": choose(table, request.choose_by)[1],
        "tried": scores, "words": int(word_counts.sum()), "vocabulary": len(vocabulary.words),
        "common_words": vocabulary.common[:200], "phrases": sum(map(len, vocabulary.phrases)),
        "dated": found.num_dated,
        "topics": [{"topic": t["topic"], "label": t["label"], "share": t["share"], "documents": t["documents"]}
                   for t in topics],
    }  # fmt: skip


def _words_of_topics(share: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[topics] share of all words, from the documents' shares, chunk by chunk."""
    total = np.zeros(share.shape[1])
    for start in range(0, len(share), 1 << 16):
        total += lengths[start : start + (1 << 16)] @ np.asarray(share[start : start + (1 << 16)], dtype=np.float64)
    return total / total.sum()


def _topics(
    fitted: Fitted, words: list[str], labels: list[str], by_words: np.ndarray, found: of_documents.Found,
    quality: dict[str, list[float]], num_words: int,
) -> list[dict]:  # fmt: skip
    """The entries of topics.json."""
    examples = found.examples
    return [
        {
            "topic": topic, "label": label, "share": round(float(by_words[topic]), 4),
            "documents": int(found.documents[topic]),
            "coherence": {name: round(float(values[topic]), 4) for name, values in quality.items()},
            "words": [{"word": words[number], "probability": round(float(fitted.topics[topic, number]), 6)}
                      for number in top_words(fitted, num_words)[topic]],
            "examples": examples[topic],
        }
        for topic, label in enumerate(labels)
    ]  # fmt: skip


def _draw(request: Request, topics: list[dict], labels: list[str], scores: list[dict], periods) -> None:
    from data_tools.topics.pictures import Pictures

    words = [
        (
            f"{topic['topic']}: {topic['label']} ({topic['share']:.0%})",
            [(readable(entry["word"]), entry["probability"]) for entry in topic["words"]],
        )
        for topic in topics
    ]
    pictures = Pictures(request.out, (word for _, entries in words for word, _ in entries), request.font)
    pictures.words(words)
    if len(scores) > 1:
        best = len(topics)
        pictures.numbers_of_topics(scores, request.choose_by, best)
    if periods is not None:
        pictures.over_time(periods[0], periods[1].tolist(), labels)


def _csv(rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _say_topics(request: Request, summary: dict) -> None:
    for topic in load_topics(request.out):
        words = ", ".join(readable(entry["word"]) for entry in topic["words"][:9])
        say(f"  {topic['topic']:>2} {topic['share']:>5.1%}  c_npmi {topic['coherence']['c_npmi']:>6.3f}  {words}")
    found = ", ".join(f"{name} {value:.4f}" for name, value in summary["coherence"].items())
    say(f"{request.out}: {summary['num_topics']} topics of {summary['records_out']:,} documents, {found}, "
        f"{summary['seconds']:.1f} s")  # fmt: skip


def load_topics(out: Path) -> list[dict]:
    """The entries of a model's topics.json."""
    return read_json(out / "topics.json")
