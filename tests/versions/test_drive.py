"""The driver of `bash tests/run.sh --versions`, without making its environments (which takes minutes a row)."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.compat.test_versions import driver
from tests.support.launching import ROOT


def versions(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "tests/run.sh", "--versions", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_rows_of_this_machine():
    done = versions("--list")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()][:4] == [
        "oldest", "constraints", "newest", "pre",
    ]  # fmt: skip
    done = versions("oldst")
    assert done.returncode == 2 and "no row oldst here; there are oldest, constraints" in done.stderr


def test_a_row_fails_where_pip_a_check_or_a_column_does(tmp_path, monkeypatch, capsys):
    drive = driver()
    monkeypatch.setattr(drive, "FOLDER", tmp_path)
    row = drive.Row("broken", "/nowhere/python3", [])
    row.run()
    assert row.failed and "/nowhere/python3" in row.problem and "broken" in capsys.readouterr().out
    row = drive.Row("whole", sys.executable, [])
    row.outcome = dict.fromkeys(drive.CHECKS, "ok")
    assert not row.failed
    row.outcome["chat"] = "-"
    assert row.failed and drive.table([row]).splitlines()[1].split()[0] == "whole"
