"""Topics of a text column: `python -m data_tools.lda FILE ...` and `python -m data_tools.lda apply MODEL PATH ...`.

Contract:
    FILE ...   fit a topic model to records of any format and write the report: topics.json, topic_words.csv,
               document_topics.csv, pictures, topics.html, summary.json and the model itself (model/)
    apply      label records with a fitted model ("topic", "topic_probability"); --split writes a folder for each topic
               and the data.train list of a mixture that weighs them
The same command goes on after a kill and refuses a folder with other work in it; the same input and options give the
same topics. See data_tools/topics for the parts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_tools.workshop import (
    add_input_options,
    add_stage_options,
    add_work_options,
    positive,
    text_field,
)
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["apply"]:
        options = _apply_parser().parse_args(arguments[1:])
        with exit_on_user_error():
            _apply(options)
    else:
        options = _fit_parser().parse_args(arguments)
        with exit_on_user_error():
            _fit(options)


def _fit_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.lda"),
        description="Fit a topic model and write its report.",
        epilog="To label records with a fitted model: python -m data_tools.lda apply --help",
    )
    add_input_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the model and its report")
    parser.add_argument(
        "--num-topics",
        type=_numbers,
        default=[10],
        metavar="N",
        help="10; 5-30 or 5-30:5 (a step) tries each and takes the one with the best topics (10)",
    )
    parser.add_argument(
        "--choose-by",
        choices=["c_npmi", "c_v"],
        default="c_npmi",
        help="coherence that chooses, times the share of distinct top words",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="read the first N documents only")
    parser.add_argument(
        "--date-column", metavar="NAME", help="for topics over time (found by its name: date, year ...)"
    )
    parser.add_argument(
        "--table",
        choices=["auto", "csv", "parquet"],
        default="auto",
        help="of the documents' topics; auto is csv up to 200,000 documents",
    )
    parser.add_argument("--top-words", type=positive, default=20, metavar="N", help="words shown of a topic (20)")
    parser.add_argument("--no-pictures", action="store_true", help="write no .png")
    parser.add_argument("--no-page", action="store_true", help="write no topics.html")
    parser.add_argument("--font", type=Path, metavar="FILE", help="font file for the pictures (Chinese)")
    _add_engine_options(parser.add_argument_group("the model"))
    _add_word_options(parser.add_argument_group("which words"))
    add_work_options(parser)
    return parser


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine",
        choices=["gensim", "gibbs"],
        default="gensim",
        help="gensim: online variational LDA, memory flat; gibbs: tomotopy, corpus in memory (gensim)",
    )
    group.add_argument("--passes", type=positive, default=50, metavar="N", help="gensim: over the corpus (50)")
    group.add_argument("--chunk", type=positive, default=2000, metavar="N", help="gensim: documents an update (2000)")
    group.add_argument(
        "--start",
        choices=["clusters", "random"],
        default="clusters",
        help="clustered documents or at random; gibbs takes the clusters as a weak prior (clusters)",
    )
    group.add_argument("--iterations", type=positive, default=1000, metavar="N", help="gibbs: sweeps (1000)")
    group.add_argument(
        "--alpha",
        type=_prior,
        metavar="A",
        help="prior of a document's topics: a number; gensim also auto, symmetric, asymmetric "
        "(gensim auto, gibbs 0.1 and fitted)",
    )
    group.add_argument(
        "--eta",
        type=_prior,
        metavar="E",
        help="prior of a topic's words: a number; gensim also auto, symmetric (gensim 0.05, gibbs 0.01)",
    )
    group.add_argument("--seed", type=int, default=0, help="(0)")


def _add_word_options(group: argparse._ArgumentGroup) -> None:
    from data_tools.topics.vocabulary import COMMON_WORDS, Choices

    known = Choices()
    group.add_argument(
        "--tokenizer",
        choices=["auto", "words", "jieba", "characters"],
        default="auto",
        help="of Chinese: jieba, or every character a word (classical and traditional) (auto)",
    )
    group.add_argument("--stop-words", type=Path, metavar="FILE", help="more words to leave out, one a line")
    group.add_argument(
        "--no-below",
        type=positive,
        default=known.no_below,
        metavar="N",
        help=f"documents a word must be in ({known.no_below})",
    )
    group.add_argument(
        "--no-above",
        type=_share,
        default=known.no_above,
        metavar="X",
        help=f"share of the documents a word may be in ({known.no_above})",
    )
    group.add_argument(
        "--keep", type=positive, default=known.keep, metavar="N", help=f"words in the vocabulary ({known.keep})"
    )
    group.add_argument(
        "--common-words",
        type=float,
        metavar="BITS",
        help=f"leave out frequent words that say nothing: residual IDF below this; 0 keeps them ({COMMON_WORDS}, for "
        "characters 0)",
    )
    group.add_argument(
        "--lemmatise",
        choices=["plurals", "none"],
        default="plurals",
        help="read English plurals as singulars the corpus has (plurals)",
    )
    group.add_argument(
        "--phrases",
        type=int,
        choices=[0, 1, 2],
        default=known.phrases,
        help=f"rounds of joining neighbouring words ({known.phrases})",
    )
    group.add_argument(
        "--phrase-npmi",
        type=float,
        default=known.phrase_npmi,
        metavar="X",
        help=f"how strongly the words of a phrase must attract each other ({known.phrase_npmi})",
    )
    group.add_argument(
        "--phrase-count",
        type=positive,
        default=known.phrase_count,
        metavar="N",
        help=f"how often a phrase must be met ({known.phrase_count})",
    )


def _numbers(text: str) -> list[int]:
    """`10`, `5-30`, `5-30:5` or `5,10,20` as numbers of topics."""
    wrong = argparse.ArgumentTypeError(f"{text!r}: a number of topics, or a range such as 5-30 or 5-30:5")
    span, _, step = text.partition(":")
    first, dash, last = span.partition("-")
    try:
        if dash:
            numbers = list(range(int(first), int(last) + 1, int(step or 1)))
        else:
            numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise wrong from None
    if not numbers or numbers[0] < 2 or numbers[-1] > 1000:
        raise wrong
    return numbers


def _prior(text: str) -> float | str:
    if text in ("auto", "symmetric", "asymmetric"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0, auto, symmetric or asymmetric")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a share above 0, at most 1")
    return value


def _fit(options: argparse.Namespace) -> None:
    from data_tools.topics.engines import Training
    from data_tools.topics.vocabulary import Choices
    from data_tools.topics.workflow import Request, fit_topics

    gibbs = options.engine == "gibbs"
    alpha = options.alpha if options.alpha is not None else 0.1 if gibbs else "auto"
    eta = options.eta if options.eta is not None else 0.01 if gibbs else 0.05
    if gibbs and isinstance(alpha, str) or gibbs and isinstance(eta, str) or eta == "asymmetric":
        raise UserError(f"--alpha {alpha} --eta {eta}: gibbs takes numbers, and --eta is a number, auto or symmetric")
    stop_words: list[str] = []
    if options.stop_words is not None:
        try:
            stop_words = options.stop_words.read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--stop-words {options.stop_words} cannot be read: {error}") from error
    if options.font is not None and not options.font.is_file():
        raise UserError(f"--font {options.font} does not exist: name a .ttf, .otf or .ttc file")
    fit_topics(
        Request(
            paths=options.paths,
            out=options.out,
            text=text_field(options),
            num_topics=options.num_topics,
            training=Training(
                engine=options.engine,
                seed=options.seed,
                passes=options.passes,
                chunk=options.chunk,
                alpha=alpha,
                eta=eta,
                start=options.start,
                iterations=options.iterations,
            ),
            choices=Choices(
                no_below=options.no_below,
                no_above=options.no_above,
                keep=options.keep,
                common_words=options.common_words,
                plurals=options.lemmatise == "plurals",
                phrases=options.phrases,
                phrase_count=options.phrase_count,
                phrase_npmi=options.phrase_npmi,
            ),
            tokenizer=options.tokenizer,
            stop_words=stop_words,
            limit=options.limit,
            choose_by=options.choose_by,
            date_column=options.date_column,
            table=options.table,
            num_words=options.top_words,
            pictures=not options.no_pictures,
            page=not options.no_page,
            font=options.font,
            workers=options.workers,
            unit_bytes=options.unit_bytes,
        )
    )


def _apply_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{command_name('data_tools.lda')} apply", description="Label records with the topics of a fitted model."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the --out of python -m data_tools.lda")
    add_stage_options(parser)
    parser.add_argument("--split", action="store_true", help="a folder for each topic: DIR/topic-03/part-*.jsonl")
    parser.add_argument(
        "--weights",
        choices=["share", "uniform"],
        default="share",
        help="of the mixture printed with --split: as much of each topic as there is, or the same",
    )
    parser.add_argument(
        "--field", default="topic", metavar="NAME", help="name of the new field; NAME_probability goes with it (topic)"
    )
    return parser


def _apply(options: argparse.Namespace) -> None:
    from data_tools.topics.apply import label_records

    label_records(
        options.model,
        options.paths,
        options.out,
        text=text_field(options),
        split=options.split,
        weights=options.weights,
        field=options.field,
        workers=options.workers,
        unit_bytes=options.unit_bytes,
        compress=options.compress,
    )


if __name__ == "__main__":
    main()
