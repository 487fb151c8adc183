"""A rank that stands still or dies: the others leave in time, and say which one and where it stood. Real ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from minillm.training.watch import HUNG, SILENT
from tests.support.launching import checkpoint, losses, metrics
from tests.support.ranks import TRAIN, Ranks

ZERO2 = {"zero_optimization": {"stage": 2}}
ALLOWED = 10  # seconds without progress: on a busy machine building the model takes some of them


def run_until_hit(settings: dict, folder: Path, number: int, victim: int) -> tuple[int, str, float]:
    """Send a signal to one rank in the middle of training; (the other's exit code, its log, seconds until it left)."""
    with Ranks(2) as ranks:
        ranks.begin(TRAIN, [[{"settings": settings, "deepspeed": ZERO2}]])
        deadline = time.monotonic() + 240
        while len(metrics(folder / "r")) < 4:
            assert time.monotonic() < deadline and all(one.poll() is None for one in ranks.processes), ranks.logs()
            time.sleep(0.05)
        os.kill(ranks.processes[victim].pid, number)
        start = time.monotonic()
        code = ranks.processes[1 - victim].wait(timeout=120)
        return code, ranks.log(1 - victim), time.monotonic() - start


def long_run(tiny_settings: dict, tmp_path: Path) -> dict:
    own = {"run_root": str(tmp_path), "run_name": "r", "train.max_steps": 100_000, "checkpoint.every": 2,
           "validation.every": 0, "faults.timeout": ALLOWED, "train.train_micro_batch_size_per_gpu": 4}  # fmt: skip
    return {**tiny_settings, **own}


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(tiny_settings, tmp_path):
    """SIGSTOP: the process is there and does nothing, as in a hung driver."""
    code, log, seconds = run_until_hit(long_run(tiny_settings, tmp_path), tmp_path, signal.SIGSTOP, victim=1)
    assert code == HUNG, log
    assert "no sign of life from rank 1 (" in log and "last seen at" in log
    assert "rank 0 (" in log.split("no sign of life")[1]  # where the others stand
    assert seconds < ALLOWED + SILENT + 15


def test_a_rank_that_dies_is_named_and_the_run_goes_on_later(tiny_settings, two_ranks, tmp_path):
    settings = long_run(tiny_settings, tmp_path)
    code, log, seconds = run_until_hit(settings, tmp_path, signal.SIGKILL, victim=1)
    assert code == HUNG and "rank 1 (" in log and "last seen at" in log, log
    assert seconds < ALLOWED + SILENT + 15
    done = len(losses(tmp_path / "r"))
    rest = {**settings, "train.max_steps": done + 4, "faults.timeout": 600}
    two_ranks.train([{"settings": rest, "deepspeed": ZERO2}])
    assert len(losses(tmp_path / "r")) == done + 4 and checkpoint(tmp_path / "r", done + 4)
    assert not [p for p in (tmp_path / "r" / "checkpoints").iterdir() if p.name.endswith(".tmp")]
