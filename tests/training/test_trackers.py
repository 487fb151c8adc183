"""metrics.jsonl after a resume, and where W&B goes."""

from __future__ import annotations

import json

from minillm.config import RunConfig
from minillm.training.trackers import Tracker, cut_back, wandb_mode


def test_cut_back_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    cut_back(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"


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
