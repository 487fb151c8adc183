"""What the preflight says: rows, put together over the ranks, and the table they are printed in.

Contract: pure functions. A row fails where a run would fail or be wrong, warns where it would be slow or at risk; every
warn and fail has a fix.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

OK, WARN, FAIL = "ok", "warn", "fail"
VERDICTS = (OK, WARN, FAIL)  # in order of weight


@dataclass
class Row:
    """One line of the table.

    Attributes:
        found: what was seen, for people; may have several lines.
        fix: what to do about it; empty where it is ok.
        values: the same numbers for machines (`--json`).
    """

    name: str
    verdict: str
    found: str
    fix: str = ""
    values: dict[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def worst(verdicts: list[str]) -> str:
    return max(verdicts, key=VERDICTS.index, default=OK)


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-3`, `ranks 0-1, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def merge(rows_of_ranks: Mapping[int, list[Row]]) -> list[Row]:
    """One row a name: the worst verdict; equal findings once, different ones with the ranks that had them."""
    names = list(dict.fromkeys(row.name for rows in rows_of_ranks.values() for row in rows))
    merged = []
    for name in names:
        having = {rank: row for rank, rows in rows_of_ranks.items() for row in rows if row.name == name}
        groups: dict[tuple[str, str], list[int]] = {}
        for rank, row in having.items():
            groups.setdefault((row.verdict, row.found), []).append(rank)
        heaviest_first = sorted(groups, key=lambda key: -VERDICTS.index(key[0]))
        found = [text if len(groups) == 1 else f"{name_ranks(groups[verdict, text])}: {text}"
                 for verdict, text in heaviest_first]  # fmt: skip
        fixes = dict.fromkeys(row.fix for row in having.values() if row.fix)
        values = next(iter(having.values())).values
        verdict = worst([row.verdict for row in having.values()])
        merged.append(Row(name, verdict, "\n".join(found), "; ".join(fixes), values))
    return merged


def format_table(rows: list[Row], width: int = 120) -> str:
    """Name, verdict and finding in columns; the fix under what it mends."""
    first = max(len(row.name) for row in rows)
    indent = " " * (first + 8)
    lines = []
    for row in rows:
        text = [part for line in row.found.splitlines() for part in _wrapped(line, width - len(indent))]
        text += _wrapped(f"fix: {row.fix}", width - len(indent)) if row.fix else []
        lines.append(f"{row.name:{first}s}  {row.verdict:4s}  {text[0] if text else ''}")
        lines += [indent + part for part in text[1:]]
    return "\n".join(lines)


def _wrapped(line: str, width: int) -> list[str]:
    """Broken at spaces, except where spaces make columns."""
    if "   " in line or len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")


def summary(rows: list[Row]) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    failed = [row.name for row in rows if row.verdict == FAIL]
    verdict = f"not ready: {', '.join(failed)}" if failed else "ready"
    return f"{verdict} ({counts[OK]} ok, {counts[WARN]} warn, {counts[FAIL]} fail)"
