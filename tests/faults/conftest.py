"""The table of the fault campaign: every case adds a row of what was done and what happened.

Contract: `fault_table.row(section, what, outcome)` is called where a case has passed its checks; the rows are printed
as markdown at the end of the session, by section in the order of their first row, and written to the file that the
environment variable FAULTS_TABLE names, if it names one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROWS = pytest.StashKey[dict[str, list[tuple[str, str]]]]()


class FaultTable:
    """Rows by section."""

    def __init__(self, rows: dict[str, list[tuple[str, str]]]):
        self._rows = rows

    def row(self, section: str, what: str, outcome: str) -> None:
        """One case: what was done, what happened."""
        self._rows.setdefault(section, []).append((what, outcome))


@pytest.fixture(scope="session")
def fault_table(request) -> FaultTable:
    return FaultTable(request.config.stash.setdefault(ROWS, {}))


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = config.stash.get(ROWS, {})
    if not rows:
        return
    text = markdown(rows)
    terminalreporter.section("faults: what was tried and what happened")
    terminalreporter.write_line(text)
    if path := os.environ.get("FAULTS_TABLE"):
        Path(path).write_text(text + "\n", encoding="utf-8")


def markdown(rows: dict[str, list[tuple[str, str]]]) -> str:
    tables = []
    for section, cases in rows.items():
        lines = [f"| {cell(what)} | {cell(outcome)} |" for what, outcome in cases]
        tables.append("\n".join([f"### {section} ({len(cases)})", "", "| done | happened |", "|---|---|", *lines]))
    return "\n\n".join(tables)


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


@pytest.fixture(scope="module")
def straight(tiny_settings, tmp_path_factory) -> dict:
    """The settings of an unbroken run of six steps with checkpoints at 2, 4 and 6."""
    from tests.support.in_process import train

    own = {"run_root": str(tmp_path_factory.mktemp("straight")), "run_name": "r", "train.max_steps": 6,
           "train.train_micro_batch_size_per_gpu": 4, "checkpoint.every": 2, "validation.every": 0,
           "model.hidden_dropout": 0.1}  # fmt: skip
    settings = {**tiny_settings, **own}
    assert train(settings) == 0
    return settings
