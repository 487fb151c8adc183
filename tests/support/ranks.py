"""Processes of one group that do one job after another, since starting them is most of the time of a distributed test.

A job is a function and a list of arguments; every rank calls it with each of them. It is handed over by files, so that
ranks that wait use no processor and no collective is open between two jobs. `python tests/support/ranks.py FOLDER` is a
rank, started without a launcher, which would stop the others by itself where one dies.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.launching import ROOT, TIMEOUT, environment

TRAIN = "tests.support.ranks:train_case"


class Ranks:
    """So many ranks on this machine, started at the first job."""

    def __init__(self, number: int):
        self.number = number
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def train(self, cases: list[dict]) -> None:
        """Train every case to its end: {"settings": {...}, "deepspeed": {...}, "stage": "pretrain"}."""
        assert self.call(TRAIN, [[case] for case in cases]) == [0] * len(cases)

    def call(self, function: str, arguments: list[list], timeout: float = 2 * TIMEOUT) -> list:
        """What rank 0 gets from `function` ("module:name") for each of the arguments.

        Raises:
            AssertionError: a rank failed, with the logs of all; the next job starts new processes.
        """
        self.begin(function, arguments)
        done = [self.folder / f"done-{self.jobs}-{rank}.json" for rank in range(self.number)]
        deadline = time.monotonic() + timeout
        while not all(path.exists() for path in done):
            if any(process.poll() is not None for process in self.processes) or time.monotonic() > deadline:
                time.sleep(1)  # the others may say why
                logs = self.logs()
                self.stop()
                raise AssertionError(f"{function} failed or took longer than {timeout:.0f} s:\n{logs}")
            time.sleep(0.01)
        return json.loads(done[0].read_text())

    def begin(self, function: str, arguments: list[list]) -> None:
        """Hand a job over and do not wait for it."""
        if any(process.poll() is not None for process in self.processes):
            self.stop()  # they ended between two jobs
        if not self.processes:
            self._start()
        self.jobs += 1
        write_whole(self.folder / f"job-{self.jobs}.json", [function, arguments])

    def _start(self) -> None:
        self.folder, self.jobs = Path(tempfile.mkdtemp(prefix="ranks-")), 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.number):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.number, "LOCAL_WORLD_SIZE": self.number,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
            with open(self.folder / f"rank{rank}.log", "w") as log:
                self.processes.append(subprocess.Popen(
                    [sys.executable, __file__, str(self.folder)], stdout=log, stderr=log, cwd=ROOT,
                    env={**environment(ranks=self.number), **{name: str(value) for name, value in own.items()}},
                ))  # fmt: skip

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"rank {rank}:\n{self.log(rank)}" for rank in range(self.number))

    def stop(self) -> None:
        """End the processes; the next job starts new ones."""
        for process in self.processes:
            process.kill()
            process.wait()
        if self.processes:
            shutil.rmtree(self.folder)
        self.processes = []


def write_whole(path: Path, value: object) -> None:
    """JSON that a reader finds whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)


def train_case(case: dict) -> int:
    from tests.support.in_process import train

    return train(**case)


def main() -> None:
    """Do the jobs of FOLDER until whoever started this process has ended."""
    from minillm.training.engine import process_group
    from minillm.utils import distributed

    folder, parent = Path(sys.argv[1]), os.getppid()
    with process_group():
        for number in itertools.count(1):
            while not (job := folder / f"job-{number}.json").exists():
                if os.getppid() != parent:
                    return
                time.sleep(0.01)
            name, arguments = json.loads(job.read_text())
            module, _, function = name.partition(":")
            call = getattr(importlib.import_module(module), function)
            found = [call(*each) for each in arguments]
            write_whole(folder / f"done-{number}-{distributed.rank()}.json", found)


if __name__ == "__main__":
    main()
