"""What is in a corpus: lengths, languages, compression, common n-grams and lines, samples, on one page.

    python -m data_tools.inspect PATH ... --out DIR [--tokenizer DIR]      writes DIR/index.html and DIR/summary.json

Contract: streams, in parallel, and goes on after a kill (data_tools/parallel.py); the numbers do not depend on the
number of processes. What is counted and how exactly stands in data_tools/inspection/measures.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data_tools.inspection.measures import Measures, merge
from data_tools.inspection.page import write_page
from data_tools.parallel import identity, run_units, work_folder
from data_tools.records import TEXT, UNIT_BYTES, Rejected, TextField, Unit, read_unit
from data_tools.workshop import (
    add_input_options,
    add_work_options,
    count_rejected,
    found_units,
    merge_results,
    text_field,
)
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import write_json
from minillm.utils.logging import say


def inspect(
    paths: list[str],
    out: Path,
    *,
    tokenizer: Path | None = None,
    text: TextField = TEXT,
    workers: int | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> dict[str, object]:
    """Measure a corpus and draw its page.

    Args:
        tokenizer: a tokenizer folder of the project, to count tokens.

    Raises:
        UserError: nothing to read, or no record with text in it.
    """
    units = found_units(paths, unit_bytes)
    arguments = {"text": asdict(text), "tokenizer": str(tokenizer) if tokenizer else None}
    start = time.monotonic()
    with work_folder(out, paths, {"tool": "inspect", **arguments, "inputs": identity(units)}) as work:
        results = run_units(_measure, units, arguments, work, workers=workers, label="inspect")
        counted = merge_results(results)
        if counted["records_in"] == sum(counted["rejected"].values()):
            first = next(iter(counted["examples"].values()), [{"detail": "the files are empty"}])[0]["detail"]
            raise UserError(
                f"none of {counted['records_in']:,} records has text: {first}; --text-column names the field"
            )
        summary = {
            "tool": "inspect",
            "options": arguments,
            "inputs": paths,
            "records_in": counted["records_in"],
            "bytes_in": counted["bytes_in"],
            "rejected": counted["rejected"],
            "examples": counted["examples"],
            **merge([result["measures"] for result in results if "measures" in result]),
            "seconds": round(time.monotonic() - start, 2),
        }
        write_json(out / "summary.json", summary)
        write_page(summary, out / "index.html")
    _tell(summary, out)
    return summary


def _measure(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    measures = Measures(arguments["tokenizer"])
    result: dict = {"records_in": 0, "records_out": 0, "bytes_in": unit.size, "rejected": {}, "examples": {}}
    for record in read_unit(unit, TextField(**arguments["text"]), progress):
        result["records_in"] += 1
        if isinstance(record, Rejected):
            count_rejected(result, record, record.text)
        else:
            measures.add(record)
    return {**result, "measures": measures.result()}


def _tell(summary: dict, out: Path) -> None:
    lengths, total = summary["characters_a_record"], summary["records"]
    say(f"{total:,} records, {summary['characters']:,} characters, {summary['bytes'] / 1e6:,.1f} MB")
    say(f"characters a record: median {lengths['p50']:,}, 5 % to 95 % {lengths['p5']:,} to {lengths['p95']:,}")
    languages = list(summary["languages"].items())[:6]
    say("languages: " + ", ".join(f"{name} {found['records'] / total:.1%}" for name, found in languages))
    if summary["tokens"]:
        say(f"{summary['tokens']:,} tokens, {summary['bytes_a_token']:.2f} bytes each")
    if summary["equal_texts"]:
        say(f"about {summary['equal_texts']:.1%} of the records repeat another's text (data_tools.dedup removes them)")
    for reason, count in summary["rejected"].items():
        say(f"could not be read: {count:,} {reason}: {summary['examples'][reason][0]['detail']}")
    say(f"look at {out / 'index.html'}")


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog=command_name("data_tools.inspect"), description="Look at a corpus.")
    add_input_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for index.html, summary.json")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a tokenizer folder: counts tokens")
    add_work_options(parser)
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        inspect(
            options.paths,
            options.out,
            tokenizer=options.tokenizer,
            text=text_field(options),
            workers=options.workers,
            unit_bytes=options.unit_bytes,
        )


if __name__ == "__main__":
    main()
