"""A checkpoint knows no topology: saved on two ranks, continued on one at other ZeRO stages, on the same batches.

The straight run is plain torch (tests/training/test_same_losses.py), so both halves are held against the same curve.
The vocabulary of 383 and three layers make sizes that two ranks do not divide evenly.
"""

from __future__ import annotations

import shutil

import pytest

from tests.support.in_process import train
from tests.support.launching import losses
from tests.training.test_same_losses import BF16, FP32, plain_torch, zero
from tests.training.test_same_losses import settings as settings  # a fixture

HALF, WHOLE = 3, 6


@pytest.mark.usefixtures("group")
def test_two_ranks_to_one_across_stages(settings, two_ranks, tmp_path):
    common = {**settings["text"], "train.train_micro_batch_size_per_gpu": 2, "run_root": str(tmp_path)}
    saved = {"zero2": zero(2, FP32), "zero3": zero(3, FP32), "bf16": zero(1, BF16)}
    two_ranks.train(
        [
            {"settings": {**common, "run_name": name, "train.max_steps": HALF}, "deepspeed": deepspeed}
            for name, deepspeed in saved.items()
        ]
    )

    expected = plain_torch(settings["text"], WHOLE)
    for name in saved:
        for stage in (1, 2, 3) if name == "bf16" else (0, 1, 2, 3):
            moved = f"{name}-to-{stage}"
            shutil.copytree(tmp_path / name, tmp_path / moved)
            precision = BF16 if name == "bf16" else FP32
            train({**common, "run_name": moved, "train.max_steps": WHOLE}, zero(stage, precision))
            tolerance = 5e-3 if name == "bf16" else 1e-5
            assert losses(tmp_path / moved) == pytest.approx(expected, rel=tolerance), moved
