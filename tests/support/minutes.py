"""The order of the tests, and where their minutes went: the slowest files and the sum; a budget to look at, no limit.

The longest files come first, so that two processes that share the files end together. SLOWEST_FILES=N in the
environment shows N files (5 by default).
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

LONGEST = ["test_resume_bitwise.py", "test_every_preset.py", "test_preflight.py", "test_expert_parallel.py",
           "test_supervise.py", "test_watch.py", "test_readme.py", "test_old_run.py", "test_muon.py",
           "test_same_losses.py", "test_recovery.py", "test_golden.py", "test_crawl.py", "test_commands.py",
           "test_export.py", "test_plan.py", "test_topology.py", "test_trackers.py", "test_chat.py",
           "test_gradient_parity.py", "test_char_tiny.py", "test_corpus.py", "test_main.py"]  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter) -> None:
    """One line a file, in minutes of one process."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) < 2:
        return
    terminalreporter.section("slowest files")
    for name, spent in seconds.most_common(int(os.environ.get("SLOWEST_FILES", 5))):
        terminalreporter.write_line(f"{spent / 60:5.1f} min  {name}")
    terminalreporter.write_line(f"{sum(seconds.values()) / 60:5.1f} min  all {len(seconds)} files, one after another")
