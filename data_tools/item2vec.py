"""Similar items from sequences: `python -m data_tools.item2vec train | similar | evaluate`.

Contract:
    train     sequences (one a line, item ids with spaces between) and a table of names -> a folder with vectors
    similar   the items most like one or several, by id or by name
    evaluate  hit rate and MRR of held-out next items, against popularity and co-occurrence
The vectors are gensim's Word2Vec (skip-gram, negative sampling), kept without pickle; see data_tools/recommendation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.workshop import positive
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.item2vec"), description="Similar items from sequences."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="sequences -> vectors of their items")
    train.add_argument(
        "file", type=Path, metavar="FILE", help="one sequence a line, ids with spaces between (.gz, .zst)"
    )
    train.add_argument("--names", type=Path, metavar="TABLE", help=".tsv or .csv: id, name and maybe artist")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the vectors")
    _add_reading(train)
    train.add_argument(
        "--holdout",
        type=_share,
        default=0.1,
        metavar="X",
        help="share of the sequences whose last item is kept for evaluate (0.1)",
    )
    train.add_argument("--dimensions", type=positive, default=32, metavar="N", help="(32)")
    train.add_argument("--window", type=positive, default=20, metavar="N", help="neighbours on each side (20)")
    train.add_argument("--min-count", type=positive, default=2, metavar="N", help="occurrences an item must have (2)")
    train.add_argument("--epochs", type=positive, default=20, metavar="N", help="(20)")
    train.add_argument("--negative", type=positive, default=20, metavar="N", help="negative samples a pair (20)")
    train.add_argument(
        "--ns-exponent",
        type=float,
        default=0.75,
        metavar="X",
        help="how much negative samples prefer frequent items; 0 none, below 0 rare ones (0.75)",
    )
    train.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="threads; with 1 the same command gives the same vectors (1)",
    )
    train.add_argument("--seed", type=int, default=0, help="(0)")
    train.add_argument("--text", action="store_true", help="also write vectors.txt in word2vec's text format")
    train.set_defaults(run=_train)

    similar = commands.add_parser("similar", help="the items most like some")
    similar.add_argument("model", type=Path, metavar="DIR")
    similar.add_argument("items", nargs="+", metavar="ITEM", help="id or name; several: like all of them together")
    similar.add_argument("-n", "--number", type=positive, default=10, metavar="N", help="(10)")
    similar.set_defaults(run=_similar)

    evaluate = commands.add_parser("evaluate", help="predict held-out next items")
    evaluate.add_argument("model", type=Path, metavar="DIR")
    evaluate.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="other sequences whose last item is to be predicted (those that train held out)",
    )
    _add_reading(evaluate)
    evaluate.add_argument("--at", type=positive, nargs="+", default=[1, 5, 10, 20], metavar="K", help="(1 5 10 20)")
    evaluate.add_argument(
        "--context", type=positive, default=10, metavar="N", help="last items that the prediction is made from (10)"
    )
    evaluate.set_defaults(run=_evaluate)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-lines",
        type=int,
        default=0,
        metavar="N",
        help="first lines of FILE that are not sequences (2 for the Yes.com playlists)",
    )
    parser.add_argument("--comment", default="#", metavar="SIGN", help="lines that begin so are left out; '' none (#)")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a share from 0 up to below 1")
    return value


def _train(options: argparse.Namespace) -> None:
    from data_tools.recommendation.sequences import Sequences
    from data_tools.recommendation.vectors import Settings, train

    for path in (options.file, options.names):
        if path is not None and not path.is_file():
            raise UserError(f"{path} does not exist or is not a file")
    settings = Settings(
        dimensions=options.dimensions, window=options.window, min_count=options.min_count, epochs=options.epochs,
        negative=options.negative, ns_exponent=options.ns_exponent, seed=options.seed, workers=options.workers,
    )  # fmt: skip
    sequences = Sequences(options.file, options.skip_lines, options.comment, options.holdout, options.seed)
    train(sequences, options.names, options.out, settings, as_text=options.text)


def _similar(options: argparse.Namespace) -> None:
    from data_tools.recommendation.vectors import Items

    items = Items(options.model)
    wanted = [items.find(item) for item in options.items]
    for number, cosine in items.similar(wanted, options.number):
        print(f"{cosine:6.3f}  {items.title(number)}")


def _evaluate(options: argparse.Namespace) -> None:
    from data_tools.recommendation.evaluation import WAYS, evaluate
    from data_tools.recommendation.sequences import Sequences
    from data_tools.recommendation.vectors import Items
    from minillm.utils.files import write_json

    if options.file is not None and not options.file.is_file():
        raise UserError(f"{options.file} does not exist or is not a file")
    held = Sequences(options.file, options.skip_lines, options.comment) if options.file else None
    found = evaluate(Items(options.model), held, at=tuple(sorted(set(options.at))), context=options.context)
    columns = list(found["popularity"])
    print(f"{found['sequences']:,} held-out items of {found['items']:,}")
    print(f"{'':<14}" + "".join(f"{column:>9}" for column in columns))
    for way in WAYS:
        print(f"{way:<14}" + "".join(f"{found[way][column]:>9.4f}" for column in columns))
    write_json(options.model / "evaluation.json", found)


if __name__ == "__main__":
    main()
