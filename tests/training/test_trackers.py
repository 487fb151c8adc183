"""metrics.jsonl and experts.jsonl after a resume, and where W&B goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from minillm.run_folder import RunFolder
from minillm.settings.run import RunConfig
from minillm.training.trackers import Tracker, cut_back, wandb_mode
from tests.support.launching import ROOT


def test_cut_back_drops_later_steps_and_a_half_written_line(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in (1, 2, 3, 4)]
    names = ("metrics.jsonl", "experts.jsonl")
    for name in names:
        (tmp_path / name).write_text("\n".join(lines) + '\n{"step": 5, "lo')
    cut_back(RunFolder(tmp_path), 2)
    assert {p.name for p in tmp_path.iterdir()} == set(names)
    for name in names:
        assert (tmp_path / name).read_text() == "\n".join(lines[:2]) + "\n"


def test_wandb_without_a_key_is_offline(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online"
    assert wandb_mode("disabled") == "disabled"


def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    run = RunConfig.model_validate({"run_root": str(tmp_path), "run_name": "r", "log": {"wandb": "offline"}})
    run.run_dir.mkdir()
    for step in (0, 3):
        tracker = Tracker(run, step)
        tracker.log(step + 1, {"loss": 1.0})
        tracker.close()
    folders = sorted((run.run_dir / "wandb").glob("offline-run-*"))
    assert len({f.name.rsplit("-", 1)[1] for f in folders}) == 1  # the id ends the folder's name
    assert [json.loads(line)["step"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 4]


def test_experts_go_to_a_file_of_their_own_and_to_wandb(tmp_path):
    run = RunConfig.model_validate({"run_root": str(tmp_path), "run_name": "r", "log": {"wandb": "offline"}})
    run.run_dir.mkdir()
    tracker = Tracker(run, 0)
    experts = {"layers": [3], "share": [[0.25, 0.75]], "max_over_mean": [1.5], "entropy": [0.5]}
    tracker.log(1, {"loss": 1.0}, experts)
    tracker.log(2, {"loss": 1.0})
    tracker.close()
    assert json.loads((run.run_dir / "experts.jsonl").read_text()) == {"step": 1, **experts}
    assert [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0},
    ]  # fmt: skip
    (log,) = run.run_dir.glob("wandb/offline-run-*/*.wandb")
    names = [f"experts/layer_03/{name}".encode() for name in ("share_00", "share_01", "max_over_mean", "entropy")]
    deadline = time.monotonic() + 60  # W&B's own process may write what it has after `finish` returned
    while (missing := [name for name in names if name not in log.read_bytes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing


OUTLIVING = """
import glob, os, signal, sys, time
from pathlib import Path
from minillm.settings.run import RunConfig
from minillm.run_folder import RunFolder
from minillm.training.trackers import Tracker

def services():  # W&B's own process, a child of this one
    children = [pid for task in glob.glob("/proc/self/task/*/children") for pid in Path(task).read_text().split()]
    return [int(pid) for pid in children if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]

run = RunConfig.model_validate({"run_root": sys.argv[1], "run_name": "r", "log": {"wandb": "offline"}})
run.run_dir.mkdir()
tracker = Tracker(run, 0)
tracker.log(1, {"loss": 1.0})
(service,) = services()
os.kill(service, signal.SIGINT)  # Ctrl-C at a terminal reaches it as well
time.sleep(1)
for step in (2, 3, 4):
    tracker.log(step, {"loss": 1.0})
    time.sleep(0.2)
tracker.close()
print("closed")
"""


def test_training_outlives_wandb(tmp_path):
    command = [sys.executable, "-c", OUTLIVING, str(tmp_path)]
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not this process's service
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert "closed" in done.stdout, done.stderr
    assert "W&B stopped" in done.stderr
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 4
