"""What the rules say of single documents, as a table for people, and of the first N records, without writing anything.

Contract: `explain` gives the lines of one document's report; columns stay aligned where Chinese letters take two
places.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from data_tools.cleaning.cleaner import Cleaned, Cleaner
from data_tools.cleaning.rules import show
from data_tools.records import Record, record_text

_PREVIEW = 70  # places on the screen
_SHOWN_LINES = 10


def width(text: str) -> int:
    """Places on a terminal: wide and full-width letters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, places: int) -> str:
    """The beginning of a text, on one line of so many places."""
    line = " ".join(text.split())
    if width(line) <= places:
        return line
    taken, used = "", 1
    for character in line:
        used += width(character)
        if used > places:
            break
        taken += character
    return taken + "…"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows with aligned columns, by their width on a terminal."""
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        (indent + "  ".join(cell + " " * (places - width(cell)) for cell, places in zip(row, widths))).rstrip()
        for row in rows
    ]


def explain(record: Record, cleaner: Cleaner) -> list[str]:
    """A document's report: what was changed in it, each rule with value, bounds and verdict, and what becomes of it."""
    _, found = cleaner.clean_record(record)
    before = record_text(record)
    sizes = f"{len(before):,} characters, {len(found.text):,} cleaned"
    lines = [f"{record['id']}: {shorten(before, _PREVIEW)}"]
    lines.append(f"  {sizes}; language {found.language} ({found.score})")
    changes = [f"{count} {kind}" for kind, count in found.masks.items()]
    if changes:
        lines.append(f"  masked: {', '.join(changes)}")
    lines += _line_report(found)
    if found.verdicts:
        rows = [("rule", "value", "allowed", "")]
        rows += [(v.rule, show(v.value), v.allowed, "REMOVE" if v.failed else "ok") for v in found.verdicts]
        lines += table(rows)
    lines.append(f"  => {'removed, ' + found.reason + ': ' + found.detail if found.reason else 'kept'}")
    return lines


def _line_report(found: Cleaned) -> list[str]:
    if not found.lines:
        return []
    lines = ["  lines: " + ", ".join(f"{count} {rule}" for rule, count in found.lines.items())]
    rows = [(rule, shorten(line, _PREVIEW)) for rule, line in found.gone[:_SHOWN_LINES]]
    return lines + (table(rows, "    - ") if rows else [])
