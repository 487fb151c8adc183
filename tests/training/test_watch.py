"""A rank that stands still or dies: the others leave in time, and say which one and where it stood. Real ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm.training.watch import HUNG, SILENT
from tests.support.launching import ROOT, checkpoint, environment, losses, metrics

ZERO2 = {"zero_optimization": {"stage": 2}}
ALLOWED = 10  # seconds without progress: on a busy machine building the model takes some of them


def start_ranks(settings: dict, folder: Path) -> list[subprocess.Popen]:
    """Two ranks without a launcher, which would stop the other one by itself."""
    (folder / "cases.json").write_text(json.dumps([{"settings": settings, "deepspeed": ZERO2}]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        log = open(folder / f"rank{rank}.log", "w")  # noqa: SIM115 (the child keeps it)
        command = [sys.executable, str(ROOT / "tests" / "support" / "worker.py"), str(folder / "cases.json")]
        ranks.append(subprocess.Popen(command, env={**environment(ranks=2), **own}, stdout=log, stderr=log, cwd=ROOT))
    return ranks


def run_until_hit(settings: dict, folder: Path, number: int, victim: int) -> tuple[int, str, float]:
    """Send a signal to one rank in the middle of training; (the other's exit code, its log, seconds until it left)."""
    ranks = start_ranks(settings, folder)
    try:
        deadline = time.monotonic() + 240
        while len(metrics(folder / "r")) < 4:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), (
                (folder / "rank0.log").read_text() + (folder / "rank1.log").read_text()
            )
            time.sleep(0.05)
        os.kill(ranks[victim].pid, number)
        start = time.monotonic()
        code = ranks[1 - victim].wait(timeout=120)
        return code, (folder / f"rank{1 - victim}.log").read_text(), time.monotonic() - start
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


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


def test_a_rank_that_dies_is_named_and_the_run_goes_on_later(tiny_settings, tmp_path):
    settings = long_run(tiny_settings, tmp_path)
    code, log, seconds = run_until_hit(settings, tmp_path, signal.SIGKILL, victim=1)
    assert code == HUNG and "rank 1 (" in log and "last seen at" in log, log
    assert seconds < ALLOWED + SILENT + 15
    done = len(losses(tmp_path / "r"))
    rest = {**settings, "train.max_steps": done + 4, "faults.timeout": 600}
    for rank in start_ranks(rest, tmp_path):
        assert rank.wait(timeout=240) == 0, (tmp_path / "rank0.log").read_text()
    assert len(losses(tmp_path / "r")) == done + 4 and checkpoint(tmp_path / "r", done + 4)
    assert not [p for p in (tmp_path / "r" / "checkpoints").iterdir() if p.name.endswith(".tmp")]
