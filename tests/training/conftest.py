"""Settings of the tests that train inside the test's process."""

from __future__ import annotations

import pytest


@pytest.fixture
def settings(tiny_settings, tmp_path) -> dict[str, object]:
    """A tiny run of four steps in this test's own folder."""
    own = {"run_root": str(tmp_path), "run_name": "r", "train.max_steps": 4, "train.train_micro_batch_size_per_gpu": 4}
    return {**tiny_settings, **own, "checkpoint.every": 2, "checkpoint.keep": 2}
