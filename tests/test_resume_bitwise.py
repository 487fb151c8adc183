"""The promise of the project: a killed run continues to the same bits.

N steps straight == k steps, kill -9, a new process, N - k steps, on one and on two ranks, mid-epoch and mid-document
(400 documents make about 290 sequences of 64 tokens, a step takes 8 of them; the step's place is inside an epoch and
its sequences begin inside documents). Weights, moments and every logged loss are compared for equality, not closeness.
"""

from __future__ import annotations

import signal

import pytest

from tests.support.launching import ROOT, checkpoint, command, losses, metrics, run, run_until, same_bits

STEPS = 12


@pytest.mark.gpu  # as well: law 1 on a GPU, one rank
@pytest.mark.parametrize(
    "ranks, json_name",
    [(1, "zero2.json"), (2, "zero2.json"), pytest.param(2, "zero3.json", marks=pytest.mark.slow)],
)
def test_killed_run_continues_to_the_same_bits(tmp_path, tiny_settings, ranks, json_name, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2" if ranks == 1 else "1")
    json_file = ROOT / "ds_configs" / json_name
    settings = {**tiny_settings, "run_root": str(tmp_path), "train.max_steps": STEPS, "train.train_batch_size": 8}
    settings["train.train_micro_batch_size_per_gpu"] = 2

    run(command("pretrain.py", json_file, {**settings, "run_name": "straight"}, ranks))
    broken = command("pretrain.py", json_file, {**settings, "run_name": "broken"}, ranks)

    def past_step_6() -> bool:  # checkpoints are at 4, 8, 12: at least two steps have to be done again
        return len([r for r in metrics(tmp_path / "broken") if "loss" in r]) >= 6

    code = run_until(broken, past_step_6, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = run(broken)
    assert "resumed from step" in done.stdout

    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert validation_losses(tmp_path / "broken") == validation_losses(tmp_path / "straight")
    assert same_bits(checkpoint(tmp_path / "broken", STEPS), checkpoint(tmp_path / "straight", STEPS))
    generators = [tmp_path / n / "checkpoints" / f"step-{STEPS:06d}" / "rng.json" for n in ("broken", "straight")]
    assert generators[0].read_text() == generators[1].read_text()


def validation_losses(run_dir) -> list[float]:
    return [r["val_loss"] for r in metrics(run_dir) if "val_loss" in r]
