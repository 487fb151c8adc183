"""Golden losses: the demo on a fixed text, 50 steps on the CPU in fp32, against the stored curve.

A change that moves the curve is a change of the training itself: regenerate it in a commit of its own that says why
(python -m tests.training.test_golden). Other processors round other ways, so the curve is compared within 1e-3.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.support.in_process import train
from tests.support.launching import losses
from tests.support.tiny_data import write_tiny_data

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "demo_losses.json"


def demo_curve(folder: Path) -> list[float]:
    data = {k: v for k, v in write_tiny_data(folder / "data").items() if k.startswith("data.")}
    settings = {
        **data, "run_root": str(folder), "run_name": "golden", "train.max_steps": 50, "train.train_batch_size": 8,
        "train.train_micro_batch_size_per_gpu": 4, "data.seq_len": 128, "log.every": 1, "log.wandb": "disabled",
        "validation.every": 0, "samples.every": 0, "checkpoint.every": 0,
    }  # fmt: skip
    train(settings)
    return losses(folder / "golden")


@pytest.mark.usefixtures("group")
def test_the_demo_follows_its_golden_curve(tmp_path):
    found = demo_curve(tmp_path)
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)
    assert found[0] - found[11] >= 0.3  # falls at once


if __name__ == "__main__":
    from minillm.training.engine import process_group

    with tempfile.TemporaryDirectory() as temporary, process_group():
        GOLDEN.write_text(json.dumps(demo_curve(Path(temporary)), indent=1) + "\n")
