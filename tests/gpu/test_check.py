"""The GPU check itself, where there is no GPU: what it says then, its table of a real result, its limits."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import check

H200 = Path(__file__).with_name("h200.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_table_of_a_measured_card():
    result = json.loads(H200.read_text())
    text = check.table([], result)
    assert text.startswith("NVIDIA H200, 140 GiB, capability 9.0\n")
    rows = [line for line in text.splitlines() if line.startswith("dense-171m ")]
    assert rows == ["dense-171m                     1   16 x 2       yes    185,987  20.0%      6.84     8.74"]
    assert "a growing cache 117, with cuDNN's attention 17, a fixed cache, compiled 530" in text


def test_the_readme_of_this_room_says_what_was_measured():
    rows = json.loads(H200.read_text())["steps"]
    text = H200.with_name("README.md").read_text(encoding="utf-8")
    table = re.findall(r"\| (\d+ x \d+) \| ([\d,]+) \| ([\d.]+) % \| ([\d.]+) \|", text)
    measured = {
        (f"{row['micro']} x {row['micro_steps']}", f"{row['tokens_per_s']:,}", f"{100 * row['mfu']:.1f}",
         f"{row['peak_bytes'] / 2**30:.1f}")
        for row in rows
    }  # fmt: skip
    assert len(table) == len(rows) and set(table) == measured


def step(name: str, code: str, limit: float = 30, alone: bool = False) -> check.Step:
    return check.Step(name, "nothing", limit, [[sys.executable, "-c", code]], alone)


def test_what_fails_and_what_takes_too_long_is_told_from_what_holds(tmp_path):
    steps = [
        step("machine", "print('RESULT {\"card\": \"a card\"}')", alone=True),
        step("good", "print('RESULT {\"cases\": 3}')"),
        step("bad", "import sys; print('what is wrong'); sys.exit(3)"),
        step("slow", "import time; time.sleep(60)", limit=1),
    ]
    check.Check(steps, budget=60, logs=tmp_path).run(jobs=2)
    assert [s.outcome for s in steps] == ["ok", "ok", "exit 3", "out of time"]
    assert [s.held for s in steps] == [True, True, False, False]
    assert "what is wrong" in (tmp_path / "bad.log").read_text()
    result = check.result_of(steps)
    assert result["card"] == "a card" and result["checks"]["good"]["results"] == [{"cases": 3}]


def test_a_spent_budget_skips_what_is_left(tmp_path, capsys):
    steps = [step("one", "pass"), step("two", "pass", alone=True)]
    check.Check(steps, budget=1, logs=tmp_path).run(jobs=1)
    assert [s.outcome for s in steps] == ["skipped", "skipped"]
    assert "two: skipped, the budget of 1 s is spent" in capsys.readouterr().out


def test_every_step_names_files_that_are_there(tmp_path):
    """Scripts, modules and test files of the commands."""
    for one in check.steps(tmp_path, tiny=False):
        for command in one.commands:
            words = command[1:]
            paths = [word for word in words if word.endswith(".py")]
            if words[0] == "-m" and words[1].startswith("tests."):
                paths.append(words[1].replace(".", "/") + ".py")
            assert all((check.ROOT / path).exists() for path in paths), command
