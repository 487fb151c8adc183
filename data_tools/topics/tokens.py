"""The first pass over a corpus: records to word runs on disk, one process a core, going on after a kill.

Contract: for each unit of the input two files in the work folder, a line for each document that has words:
`tokens-00007.txt` (runs between tabs, words between spaces) and `tokens-00007.jsonl` (id, date, beginning).
Counts and rejections come back as the unit's result.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from data_tools.parallel import run_units
from data_tools.records import Record, Rejected, TextField, Unit, read_unit, record_text
from data_tools.topics.tally import Tally
from data_tools.topics.vocabulary import Runs
from data_tools.topics.words import Tokenizer, choose_mode
from data_tools.workshop import merge_results
from minillm.utils.errors import UserError
from minillm.utils.logging import say

LABEL = "tokens"
DATE_FIELDS = ("date", "published", "published_at", "publication_date", "pubdate", "created", "created_at",
               "timestamp", "year", "datetime")  # fmt: skip
_BEGINNING = 120  # characters of a text that are kept for people
_SAMPLE = 200  # texts by which the tokenizer is chosen
_SEARCHED = 20_000  # records in which one with text has to be
_DATE = re.compile(r"\s*(\d{4})(?:\s*[-/.年]?\s*(\d{1,2})(?:\s*[-/.月]?\s*(\d{1,2}))?)?(?!\d)")


def look_at(units: Sequence[Unit], text: TextField) -> tuple[list[str], set[str]]:
    """Texts of the first records, and the names of their fields.

    Raises:
        UserError: not one of the first records has text in the column; it says which columns there are.
    """
    texts: list[str] = []
    fields: set[str] = set()
    why = ""
    records = itertools.chain.from_iterable(read_unit(unit, text) for unit in units)
    for record in itertools.islice(records, _SEARCHED):
        if isinstance(record, Rejected):
            why = why or record.detail
        else:
            texts.append(record_text(record))
            fields |= record.keys()
        if len(texts) == _SAMPLE:
            break
    if not texts:
        names: set[str] = set()
        for record in itertools.islice(read_unit(units[0], None), _SAMPLE):
            names |= set() if isinstance(record, Rejected) else record.keys()
        column = text.template or text.column
        known = f"; its columns are {', '.join(sorted(names))} (--text-column, --text-template)" if names else ""
        raise UserError(f"there is no text to read as {column!r}: {why or 'the file is empty'}{known}")
    return texts, fields


def choose_tokenizer(mode: str, texts: Sequence[str]) -> str:
    """`mode`, or what `auto` stands for."""
    if mode != "auto":
        return mode
    mode, why = choose_mode(texts)
    say(f"tokenizer {mode}: {why}")
    return mode


def choose_date_field(name: str | None, fields: set[str]) -> str | None:
    """The field with a date: as asked for, or by its name.

    Raises:
        UserError: the field that was asked for is not there.
    """
    if name is not None and name not in fields:
        raise UserError(f"--date-column {name}: there is no such column; there are {', '.join(sorted(fields))}")
    if name is None:
        by_name = {field.lower(): field for field in sorted(fields, reverse=True)}
        name = next((by_name[known] for known in DATE_FIELDS if known in by_name), None)
    return name


def tokenize(
    units: Sequence[Unit],
    text: TextField,
    work: Path,
    *,
    mode: str,
    stop_words: Sequence[str],
    date_field: str | None,
    limit: int | None,
    workers: int | None,
) -> tuple[list[Unit], dict]:
    """Tokenise units into files in `work`; the units that were read and the merged counts.

    With a `limit` no more units are read than it takes to have as many documents.
    """  # fmt: skip
    arguments = {
        "column": text.column, "template": text.template, "mode": mode, "stop_words": list(stop_words),
        "date_field": date_field, "limit": limit,
    }  # fmt: skip
    if limit is None:
        found = run_units(_tokenize_unit, units, arguments, work, workers=workers, label=LABEL)
        return list(units), merge_results(found)
    step = workers or len(os.sched_getaffinity(0))
    results: list[dict] = []
    for start in range(0, len(units), step):
        results += run_units(_tokenize_unit, units[start : start + step], arguments, work, workers=workers, label=LABEL)
        if sum(result["records_out"] for result in results) >= limit:
            break
    return list(units[: len(results)]), merge_results(results)


def _tokenize_unit(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    tokenizer = Tokenizer(arguments["mode"], arguments["stop_words"])
    text = TextField(arguments["column"], arguments["template"])
    tally = Tally(unit.size)
    result = tally.result
    finals = _files(work, unit)
    temporaries = [path.with_name(f".{path.name}.tmp") for path in finals]
    with open(temporaries[0], "w", encoding="utf-8") as lines, open(temporaries[1], "w", encoding="utf-8") as abouts:
        for record in read_unit(unit, text, progress):
            result["records_in"] += 1
            runs: Runs = []
            if not isinstance(record, Rejected):
                content = record_text(record)
                runs = tokenizer.chunks(content)
                if not runs:
                    record = Rejected(str(record["id"]), "no_words", "nothing but stop words and signs", content)
            if isinstance(record, Rejected):
                tally.reject(record)
                continue
            lines.write("\t".join(" ".join(run) for run in runs) + "\n")
            about = _about(record, content, arguments["date_field"])
            abouts.write(json.dumps(about, ensure_ascii=False) + "\n")
            result["records_out"] += 1
            if arguments["limit"] and result["records_out"] >= arguments["limit"]:
                break
    for temporary, final in zip(temporaries, finals, strict=True):
        os.replace(temporary, final)
    return result


def _about(record: Record, content: str, date_field: str | None) -> dict:
    beginning = " ".join(content[: 2 * _BEGINNING].split())[:_BEGINNING]
    about: dict = {"id": record["id"], "beginning": beginning}
    if date_field is not None:
        about["date"] = as_date(record.get(date_field))
    return about


def _files(work: Path, unit: Unit) -> tuple[Path, Path]:
    return work / f"{LABEL}-{unit.number:05d}.txt", work / f"{LABEL}-{unit.number:05d}.about.jsonl"


def read_runs(units: Sequence[Unit], work: Path, limit: int | None, step: int = 1) -> Iterator[Runs]:
    """The word runs of every `step`-th tokenised document."""
    for line in itertools.islice(_lines(units, work, 0), 0, limit, step):
        yield [run.split(" ") for run in line.rstrip("\n").split("\t")]


def read_about(units: Sequence[Unit], work: Path, limit: int | None) -> Iterator[dict]:
    """What is known of every tokenised document."""
    for line in itertools.islice(_lines(units, work, 1), limit):
        yield json.loads(line)


def _lines(units: Sequence[Unit], work: Path, which: int) -> Iterator[str]:
    for unit in units:
        with open(_files(work, unit)[which], encoding="utf-8", newline="\n") as file:
            yield from file


def as_date(value: object) -> str | None:
    """`2021`, `2021-03` or `2021-03-07` from a year, a Unix time, a date or a string that begins with one."""
    if isinstance(value, bool) or value is None:
        return None
    if hasattr(value, "strftime"):
        return value.strftime("%Y-%m-%d")
    if isinstance(value, str) and re.fullmatch(r"\s*\d{9,13}(\.\d+)?\s*", value):
        value = float(value)
    if isinstance(value, (int, float)):
        if 1000 <= value <= 2999 and value == int(value):
            return str(int(value))
        seconds = value / 1000 if value > 1e11 else value
        if 1e8 <= seconds <= 1e11:
            return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")
        return None
    if not isinstance(value, str) or not (match := _DATE.match(value)):
        return None
    year, month, day = (int(part) if part else None for part in match.groups())
    if not 1000 <= year <= 2999 or month is not None and not 1 <= month <= 12 or day is not None and not 1 <= day <= 31:
        return None
    return "-".join([f"{year:04d}", *(f"{part:02d}" for part in (month, day) if part is not None)])
