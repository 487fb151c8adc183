"""Duplicates out of a corpus: `python -m data_tools.dedup PATH ... --out DIR`.

Contract: of texts that are equal, or near-duplicates by MinHash-LSH, across all files, one stays: the first in input
order (or the longest). OUT gets part-*.jsonl with the records that stay, all their fields as they were,
duplicates.jsonl with a line for every record removed, and summary.json. With --against, records like those of another
corpus go too.

Four passes, each in processes and each going on after a kill: hashes and signatures of every text (fingerprints.py);
equal keys to verified pairs, one range of one band at a time (buckets.py); pairs to clusters (clusters.py); the input
once more to the output (keeping.py). What grows in memory with the corpus is 8 bytes a document in the third pass; on
the disk in OUT/.work are about 670 bytes a document with 112 permutations, deleted at the end. The result is the same
for any number of workers and after any interruption.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_tools.parallel import identity, work_folder
from data_tools.records import TEXT, UNIT_BYTES, TextField
from data_tools.workshop import add_stage_options, found_units, positive, run_stage_on_units, text_field
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.logging import say

METHODS = ("exact", "minhash", "both")


@dataclass(frozen=True)
class Duplicates:
    """What counts as a duplicate, and which of several stays.

    Attributes:
        method: exact, minhash or both.
        threshold: least Jaccard similarity of near-duplicates.
        ngram: tokens in a shingle (words; characters of Chinese).
        permutations, bands, rows: of the signature; None is chosen by the threshold (minhash.py).
        seed: of the permutations.
        verify: signature (estimated similarity), jaccard (true similarity) or none (every candidate is a duplicate).
        keep: first or longest.
        ignore_case: for exact duplicates; near-duplicates always ignore it.
    """

    method: str = "both"
    threshold: float = 0.8
    ngram: int = 5
    permutations: int | None = None
    bands: int | None = None
    rows: int | None = None
    seed: int = 0
    verify: str = "signature"
    keep: str = "first"
    ignore_case: bool = False


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        names = Duplicates.__dataclass_fields__
        deduplicate(
            options.paths,
            options.out,
            Duplicates(**{name: getattr(options, name) for name in names}),
            against=options.against,
            text=text_field(options),
            workers=options.workers,
            unit_bytes=options.unit_bytes,
            compress=options.compress,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.dedup"), description="Remove exact and near duplicates from a corpus."
    )
    add_stage_options(parser)
    add = parser.add_argument
    add("--method", choices=METHODS, default="both", help="equal texts, near-duplicates, or both (both)")
    add("--threshold", type=float, default=0.8, metavar="S", help="least Jaccard similarity of near-duplicates (0.8)")
    add("--ngram", type=positive, default=5, metavar="N", help="words, or Chinese characters, of a shingle (5)")
    add("--permutations", type=positive, metavar="P", help="length of a signature (112)")
    add("--bands", type=positive, metavar="B", help="bands of a signature (by the threshold; 14 for 0.8)")
    add("--rows", type=positive, metavar="R", help="entries of a band (P / B)")
    add("--seed", type=int, default=0, help="of the permutations (0)")
    add("--verify", choices=("signature", "jaccard", "none"), default="signature",
        help="candidates by estimated similarity, by true Jaccard (more disk), or not at all (signature)")  # fmt: skip
    add("--keep", choices=("first", "longest"), default="first", help="which of a cluster stays (first)")
    add("--ignore-case", action="store_true", help="texts that differ in case are equal")
    add("--against", nargs="+", default=[], metavar="PATH",
        help="another corpus: what is like it is removed, itself is not written")  # fmt: skip
    return parser


def deduplicate(
    paths: list[Path | str],
    out: Path,
    what: Duplicates = Duplicates(),
    *,
    against: list[Path | str] | None = None,
    text: TextField = TEXT,
    workers: int | None = None,
    unit_bytes: int = UNIT_BYTES,
    compress: str = "none",
) -> dict:
    """Write the records of `paths` without their duplicates to `out`; the summary, which is in OUT/summary.json too.

    Args:
        against: a reference corpus; it wins over every record, and is not written.

    Raises:
        UserError: nothing to read, a damaged file, options that do not fit together, OUT holds other work.
    """
    from data_tools.deduplication.keeping import Keeper
    from data_tools.deduplication.passes import Passes
    from data_tools.deduplication.runs import clear_work

    paths, against, out = [str(path) for path in paths], [str(path) for path in against or []], Path(out)
    what = _checked(what)
    units, references = found_units(paths, unit_bytes), found_units(against, unit_bytes) if against else []
    command = {"tool": "dedup", "options": asdict(what), "text": asdict(text), "compress": compress,
               "inputs": identity(units), "against": identity(references)}  # fmt: skip
    start = time.monotonic()
    with work_folder(out, [*paths, *against], command) as work:
        passes = Passes(asdict(what), asdict(text), work, workers)
        if not (out / "summary.json").is_file():
            passes.decide(units, references)

        def more(summary: dict) -> dict:
            seconds = round(time.monotonic() - start, 2)
            return {"against": against, **passes.summary(summary, units, out), "seconds": seconds}

        summary = run_stage_on_units(
            Keeper, asdict(what), units, paths, out, work,
            text=text, workers=workers, compress=compress, extra_summary=more,
        )  # fmt: skip
        clear_work(work)
    return summary


def _checked(what: Duplicates) -> Duplicates:
    """With the bands that the threshold asks for."""
    from data_tools.deduplication.minhash import candidate_probability, choose_bands

    if not 0 < what.threshold <= 1:
        raise UserError(f"--threshold is {what.threshold:g}: a similarity above 0 and up to 1")
    if what.method == "exact":
        return replace(what, permutations=None, bands=None, rows=None)
    bands = choose_bands(what.threshold, what.permutations, what.bands, what.rows)
    higher = min(1.0, what.threshold + 0.1)
    say(
        f"{bands.bands} bands of {bands.rows} rows find {candidate_probability(what.threshold, bands):.1%} of the "
        f"pairs of similarity {what.threshold:g}, {candidate_probability(higher, bands):.2%} of those of {higher:g}"
    )
    return replace(what, permutations=bands.permutations, bands=bands.bands, rows=bands.rows)


if __name__ == "__main__":
    main()
