"""Clean a corpus: repair its Unicode, find its languages, mask personal data, drop bad lines and bad documents.

    python -m data_tools.clean PATH ... --out DIR [--preset web|short|book|none] [--language en,zh] [--mask email,phone]
    python -m data_tools.clean PATH ... --dry-run 1000            counts of the first 1000 records, nothing is written
    python -m data_tools.clean [PATH ...] --explain ID_OR_FILE    every rule's value for one document

Contract: a record that stays has its text replaced by the clean one and gains "language" and "language_score"; one that
goes is counted under the first rule it broke (in the order of --explain) with value and bounds. summary.json's
statistics count every rule separately, the lines and personal data taken, and the languages. Cleaning is stable: the
output, cleaned again with the same options, comes out as it is.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_tools.cleaning.cleaner import Cleaned, Cleaner, check_languages, read_bad_words
from data_tools.cleaning.explain import explain, shorten, table
from data_tools.cleaning.masking import GROUPS, KINDS
from data_tools.cleaning.repair import ENTITIES, FORMS, SPACES
from data_tools.cleaning.rules import load_config
from data_tools.records import TEXT, Record, Rejected, TextField, iterate_records
from data_tools.workshop import Stage, add_text_options, add_work_options, positive, run_stage, text_field
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.logging import say

_LINE_EXAMPLES = 5  # different lines kept of every line rule
_LINE_CHARACTERS = 120
_EXPLAINED = 3  # documents of a file


class CleanStage(Stage):
    """Cleaning of a unit of records, with its statistics."""

    name = "clean"

    def __init__(self, options: dict[str, object]):
        super().__init__(options)
        self._cleaner = Cleaner(options)
        self._counts: Counter[str] = Counter()
        self._tables: dict[str, Counter[str]] = {
            name: Counter() for name in ("rules_failed", "lines_removed", "masks", "languages")
        }
        self._line_examples: dict[str, Counter[str]] = {}

    def process(self, record: Record) -> Record | Rejected:
        """The clean record, or the first rule that is against it."""
        record, found = self._cleaner.clean_record(record)
        self._count(found)
        if found.reason:
            return Rejected(str(record["id"]), found.reason, found.detail)
        return record

    def finish_unit(self) -> dict[str, object]:
        """Counts by rule, kind and language."""
        return {**self._counts, **{name: dict(counts) for name, counts in self._tables.items()},
                "line_examples": {rule: dict(lines) for rule, lines in self._line_examples.items()}}  # fmt: skip

    def _count(self, found: Cleaned) -> None:
        self._counts["repaired"] += found.repaired
        self._counts["masked_records"] += bool(found.masks)
        self._counts["records_with_lines_removed"] += bool(found.lines)
        self._tables["masks"].update(found.masks)
        self._tables["lines_removed"].update(found.lines)
        self._tables["languages"][found.language] += 1
        self._tables["rules_failed"].update(verdict.rule for verdict in found.verdicts if verdict.failed)
        for rule, line in found.gone:
            seen = self._line_examples.setdefault(rule, Counter())
            shown = line[:_LINE_CHARACTERS]
            if shown in seen or len(seen) < _LINE_EXAMPLES:
                seen[shown] += 1


def clean(
    paths: list[str],
    out: Path,
    options: dict[str, object] | None = None,
    *,
    text: TextField = TEXT,
    side_inputs: tuple[Path, ...] = (),
    **work: object,
) -> dict[str, object]:
    """Clean a corpus into OUT; the summary.

    Args:
        options: of data_tools.cleaning.cleaner.Cleaner.
        work: workers, unit_bytes, compress of data_tools.workshop.run_stage.

    Raises:
        UserError: wrong options or input.
    """
    options = dict(options or {})
    if text.template:
        options["fields"] = text.names
    Cleaner(options)  # wrong options are told before anything is read
    return run_stage(
        CleanStage, options, paths, out, text=text, extra_summary=_frequent_lines, side_inputs=side_inputs, **work
    )


def _frequent_lines(summary: dict) -> dict:
    """The most frequent lines that each rule took, in the place of all that were kept for counting."""
    examples = summary["statistics"].pop("line_examples", {})
    frequent = {
        rule: [{"line": line, "count": count} for line, count in sorted(lines.items(), key=lambda item: -item[1])]
        for rule, lines in examples.items()
    }
    return {"line_examples": {rule: lines[:_LINE_EXAMPLES] for rule, lines in frequent.items()}}


# -- looking without writing -------------------------------------------------------------------------------------------


def dry_run(paths: list[str], count: int, options: dict[str, object], text: TextField) -> list[str]:
    """What becomes of the first `count` records: a line for each reason, with an example."""
    stage = CleanStage({**options})
    reasons: Counter[str] = Counter()
    examples: dict[str, tuple[str, str]] = {}
    seen = 0
    for record in islice(iterate_records(paths, text), count):
        seen += 1
        answer = record if isinstance(record, Rejected) else stage.process(record)
        if isinstance(answer, Rejected):
            reasons[answer.reason] += 1
            shown = answer.text if isinstance(record, Rejected) else str(record.get("text", ""))
            examples.setdefault(answer.reason, (answer.detail, shorten(shown, _LINE_CHARACTERS // 2)))
    kept = seen - sum(reasons.values())
    rows = [("reason", "records", "first example", "")]
    rows += [(reason, f"{number:,}", *examples[reason]) for reason, number in reasons.most_common()]
    lines = [f"{kept:,} of the first {seen:,} records would stay"] + (table(rows) if reasons else [])
    for name, counts in stage.finish_unit().items():
        if name in ("rules_failed", "lines_removed", "masks", "languages") and counts:
            shown = sorted(counts.items(), key=lambda item: -item[1])
            lines.append(f"  {name.replace('_', ' ')}: " + ", ".join(f"{rule} {number:,}" for rule, number in shown))
    return lines


def explained(paths: list[str], wanted: str, options: dict[str, object], text: TextField) -> Iterator[str]:
    """Reports of one document by its id, or of the first ones of a file.

    Raises:
        UserError: no such document.
    """
    cleaner = Cleaner(options)
    of_file = Path(wanted).exists() or wanted.startswith("hf:")
    if not of_file and not paths:
        raise UserError(f"--explain {wanted} is not a file: name the PATH that holds the document with this id")
    found = 0
    for record in iterate_records([wanted] if of_file else paths, text):
        identity = record.id if isinstance(record, Rejected) else record["id"]
        if not of_file and identity != wanted:
            continue
        found += 1
        if isinstance(record, Rejected):
            yield f"{record.id}: not read, {record.reason}: {record.detail}"
        else:
            yield from explain(record, cleaner)
        if found == (_EXPLAINED if of_file else 1):
            return
    if not found:
        raise UserError(f"--explain {wanted}: no file and no id of a document in {', '.join(paths)}")


# -- command line ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.clean"),
        description="Repair Unicode, find languages, mask personal data, drop bad lines and bad documents.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files, folders, or hf:OWNER/NAME[:CONFIG][:SPLIT]")
    add_text_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the parts and summary.json")
    parser.add_argument("--dry-run", type=positive, metavar="N", help="say what becomes of the first N, write nothing")
    parser.add_argument("--explain", metavar="ID|FILE",
                        help=f"every rule's value for one document, or the first {_EXPLAINED} of a file")  # fmt: skip
    parser.add_argument("--preset", default="web", help="web (default), short (poems, answers), book, none")
    parser.add_argument("--language", type=_names, metavar="A,B", help="keep these only: en,zh")
    parser.add_argument("--min-score", type=float, default=0.0, metavar="S", help="of the language, 0 to 1 (0)")
    parser.add_argument("--rules", type=_names, metavar="A,B", help="in the place of the preset's: gopher, c4, "
                        "fineweb, boilerplate, or single ones of rules.yaml; -NAME leaves one out")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="YAML", help="other thresholds, of the form of rules.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="RULE.min=N",
                        help="a bound: gopher_words.min=20, gopher_words.characters.min=30, fineweb_short_lines.max="
                        "null")  # fmt: skip
    parser.add_argument("--mask", type=_names, metavar="A,B",
                        help=f"personal data to mask: {', '.join([*KINDS, *GROUPS])} (the preset's)")  # fmt: skip
    parser.add_argument("--bad-words", type=Path, metavar="FILE", help="words for the rule c4_bad_words, one a line")
    parser.add_argument("--form", choices=FORMS, default="NFC", help="Unicode normal form (NFC); NFKC narrows Chinese "
                        "punctuation")  # fmt: skip
    parser.add_argument("--entities", choices=ENTITIES, default="keep", help="HTML entities such as &amp; (keep)")
    parser.add_argument("--spaces", choices=SPACES, help="runs of spaces inside lines (the preset's)")
    add_work_options(parser)
    parser.add_argument("--compress", choices=("none", "gz", "zst"), default="none", help="of the parts (none)")
    return parser


def options_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The Cleaner's options.

    Raises:
        UserError: a file that cannot be read, a language or a bound that means nothing.
    """
    if arguments.language:
        check_languages(arguments.language)
    return {
        "preset": arguments.preset,
        "rules": arguments.rules,
        "config": load_config(arguments.config) if arguments.config else None,
        "changes": dict(map(_change, arguments.set)),
        "mask": arguments.mask,
        "languages": arguments.language,
        "min_score": arguments.min_score,
        "form": arguments.form,
        "entities": arguments.entities,
        "spaces": arguments.spaces,
        "bad_words": read_bad_words(arguments.bad_words) if arguments.bad_words else None,
    }


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _change(text: str) -> tuple[str, float | None]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), None if value.strip() == "null" else float(value) if "." in value else int(value)
    except ValueError:
        raise UserError(f"--set {text}: write it as gopher_words.min=20, with a number or null") from None


def main() -> None:
    """Command line entry point."""
    parser = build_parser()
    arguments = parser.parse_args()
    with exit_on_user_error():
        options, text = options_of(arguments), text_field(arguments)
        if arguments.explain is not None:
            for line in explained(arguments.paths, arguments.explain, options, text):
                print(line)
            return
        if not arguments.paths:
            raise UserError("name a PATH: a file or a folder of documents")
        if arguments.dry_run:
            say("\n".join(dry_run(arguments.paths, arguments.dry_run, options, text)))
            return
        if arguments.out is None:
            raise UserError("name a folder for the result: --out DIR (or look first: --dry-run 1000, --explain FILE)")
        summary = clean(
            arguments.paths, arguments.out, options, text=text, workers=arguments.workers,
            unit_bytes=arguments.unit_bytes, compress=arguments.compress,
        )  # fmt: skip
        for name in ("masks", "lines_removed"):
            counts = summary["statistics"].get(name, {})
            if counts:
                said = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items(), key=lambda i: -i[1]))
                say(f"  {name.replace('_', ' ')}: {said}")


if __name__ == "__main__":
    main()
