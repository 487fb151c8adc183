"""Evaluation items in a training corpus: `python -m data_tools.contamination PATH ... --eval EVAL ... --out DIR`.

Contract: n-grams of the evaluation sets are looked up in the corpus (words; characters in Chinese; punctuation and
case count for nothing). OUT gets contaminated.jsonl, a line for each document that holds some, with the items and an
n-gram of each; items.jsonl, a line for each item of which something was found; summary.json with counts by set. With
--remove also part-*.jsonl, the corpus without those documents. Memory follows the evaluation sets, not the corpus; the
work is done in processes, goes on after a kill and comes out the same for any number of workers.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from data_tools.parallel import identity, run_units, work_folder
from data_tools.records import TEXT, UNIT_BYTES, TextField
from data_tools.workshop import add_stage_options, add_up, found_units, run_stage_on_units, text_field
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import read_json, write_atomic, write_json
from minillm.utils.logging import say, warn

MAX_DOCUMENTS = 10  # Brown et al. 2020, appendix C
SHOWN = 5


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        check_contamination(
            options.paths,
            options.eval,
            options.out,
            remove=options.remove,
            fields=[name for name in (options.eval_fields or "").split(",") if name],
            words=options.ngram,
            characters=options.characters,
            max_documents=options.max_documents,
            min_share=options.min_share,
            text=text_field(options),
            workers=options.workers,
            unit_bytes=options.unit_bytes,
            compress=options.compress,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.contamination"), description="Find evaluation items in a training corpus."
    )
    add_stage_options(parser)
    add = parser.add_argument
    add("--eval", nargs="+", required=True, metavar="EVAL", help="files or folders of evaluation items, a set a file")
    add("--eval-fields", metavar="A,B", help="fields of an item that are looked for (all with text)")
    add("--ngram", type=_range, default=(8, 13), metavar="N-M", help="words of an n-gram (8-13, by the set's items)")
    add("--characters", type=_range, default=(13, 20), metavar="N-M", help="the same in Chinese (13-20)")
    add("--max-documents", type=int, default=MAX_DOCUMENTS, metavar="K",
        help="n-grams that more than K documents hold count for nothing; 0: all count (10)")  # fmt: skip
    add("--min-share", type=float, default=0.0, metavar="S",
        help="a document must hold this share of an item's n-grams (0: one n-gram is enough)")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--remove", action="store_true", help="also write the corpus without the documents found")
    mode.add_argument("--report", action="store_false", dest="remove", help="only report (the default)")
    return parser


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not first.isdigit() or last and not last.isdigit() or not 1 <= int(first) <= int(last or first) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: a length such as 13, or from 1 to 100 as in 8-13")
    return int(first), int(last or first)


def check_contamination(
    paths: list[Path | str],
    evaluations: list[Path | str],
    out: Path,
    *,
    remove: bool = False,
    fields: list[str] | None = None,
    words: tuple[int, int] = (8, 13),
    characters: tuple[int, int] = (13, 20),
    max_documents: int = MAX_DOCUMENTS,
    min_share: float = 0.0,
    text: TextField = TEXT,
    workers: int | None = None,
    unit_bytes: int = UNIT_BYTES,
    compress: str = "none",
) -> dict:
    """Look evaluation sets up in a corpus; the summary, which is in OUT/summary.json too.

    Args:
        fields: of an item that are looked for; None is all.
        words, characters: least and greatest n (data_tools/deduplication/evaluation.py).
        max_documents, min_share: data_tools/deduplication/contamination.py, `judge`.

    Raises:
        UserError: nothing to read, no item long enough, OUT holds other work.
    """
    from data_tools.deduplication.arrays import save_array
    from data_tools.deduplication.contamination import Remover, find_hits, judge
    from data_tools.deduplication.evaluation import build_index, read_sets
    from data_tools.deduplication.runs import clear_work

    paths, evaluations, out = [str(path) for path in paths], [str(path) for path in evaluations], Path(out)
    if not 0 <= min_share <= 1:
        raise UserError(f"--min-share is {min_share:g}: a share from 0 to 1")
    if max_documents < 0:
        raise UserError(f"--max-documents is {max_documents}: 0 (no limit) or more")
    units, evaluation_units = found_units(paths, unit_bytes), found_units(evaluations, unit_bytes)
    options = {"fields": fields or [], "words": words, "characters": characters, "max_documents": max_documents,
               "min_share": min_share, "remove": remove}  # fmt: skip
    command = {"tool": "contamination", "options": options, "text": asdict(text), "compress": compress,
               "inputs": identity(units), "eval": identity(evaluation_units)}  # fmt: skip
    start = time.monotonic()
    with work_folder(out, [*paths, *evaluations], command) as work:
        if (out / "summary.json").is_file():
            say(f"{out} is finished already: nothing to do")
            return read_json(out / "summary.json")
        index = build_index(read_sets(evaluations, fields or ()), words, characters)
        save_array(work / "grams.npy", index.grams)
        results = run_units(find_hits, units, {"text": asdict(text), "lengths": list(index.lengths)}, work,
                            workers=workers, label="hits")  # fmt: skip
        verdict = judge(index, work, len(units), max_documents, min_share)

        def more(_: dict) -> dict:
            reports = _write_reports(index, verdict, work, len(units), out)
            return {"eval": evaluations, **reports, "seconds": round(time.monotonic() - start, 2)}

        if remove:
            summary = run_stage_on_units(
                Remover, options, units, paths, out, work,
                text=text, workers=workers, compress=compress, extra_summary=more,
            )  # fmt: skip
        else:
            heading = {"tool": "contamination", "options": options, "inputs": paths}
            summary = heading | _counted(results) | more({})
            write_json(out / "summary.json", summary)
        clear_work(work)
    _say(summary, out, remove)
    return summary


def _counted(results: list[dict]) -> dict:
    """The usual counts, of a run that writes no records."""
    total: dict = {"records": 0, "rejected": {}, "bytes_in": 0}
    for result in results:
        add_up(total, result)
    records = total.pop("records")
    return {"records_in": records + sum(total["rejected"].values()), **total}


def _write_reports(index, verdict, work: Path, num_units: int, out: Path) -> dict:
    """contaminated.jsonl and items.jsonl; what the summary says of them."""
    from data_tools.deduplication.contamination import common_examples, item_lines, set_summaries

    examples: list[dict] = []
    with open(temporary := out / ".contaminated.jsonl.tmp", "w", encoding="utf-8") as file:
        for number in range(num_units):
            with open(work / f"judged-{number:05d}.jsonl", encoding="utf-8") as judged:
                for line in map(json.loads, judged):
                    line.pop("document")
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    if len(examples) < SHOWN:
                        examples.append({**line, "items": line["items"][:1]})
    temporary.replace(out / "contaminated.jsonl")
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in item_lines(index, verdict)]
    write_atomic(out / "items.jsonl", "".join(lines).encode(errors="replace"))
    return {
        "contaminated": verdict.contaminated,
        "sets": set_summaries(index, verdict),
        "ngrams": len(index.grams),
        "common_ngrams": int(verdict.common.sum()),
        "common_examples": common_examples(index, verdict),
        "contaminated_examples": examples,
    }


def _say(summary: dict, out: Path, removed: bool) -> None:
    verb = "removed" if removed else "found"
    say(f"{out}: {summary['contaminated']:,} of {summary['records_in']:,} documents hold evaluation items ({verb}), "
        f"{summary['common_ngrams']:,} common n-grams left out, {summary['seconds']:.1f} s")  # fmt: skip
    for one in summary["sets"]:
        lengths = " and ".join(f"{n} {kind}" for kind, n in one["n"].items()) or "nothing"
        say(
            f"  {one['set']}: {one['found']:,} of {one['items']:,} items found by {lengths} "
            f"({one['found_four_fifths']:,} to four fifths), {one['only_common']:,} only by common n-grams"
        )
        if 2 * one["too_short"] > one["items"]:
            warn(f"{one['too_short']:,} items of {one['set']} are shorter and were not looked for: lower --ngram")


if __name__ == "__main__":
    main()
