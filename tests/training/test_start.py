"""What a rank does before its first step: the warm-up step, and what the process group sets."""

from __future__ import annotations

import json

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from minillm.training import loop
from minillm.training.zero_state import loss_scale_state
from tests.launching import ROOT
from tests.training.in_process import built_trainer

FP16 = json.loads((ROOT / "ds_configs" / "zero2_fp16.json").read_text())["fp16"]


@pytest.mark.usefixtures("group")
def test_the_warm_up_step_is_a_step_of_the_run_and_leaves_no_loss_scale_behind(settings, monkeypatch):
    # The real warm-up step, with fp16's scaler on the engine: DeepSpeed puts one there on GPUs only.
    before, after, results, batches = [], [], [], []

    def warm_up(engine, micro_batches, *count):
        engine.optimizer.loss_scaler = DynamicLossScaler(
            init_scale=2.0 ** FP16["initial_scale_power"], scale_window=FP16["loss_scale_window"],
            min_scale=FP16["min_loss_scale"], delayed_shift=FP16["hysteresis"], consecutive_hysteresis=False,
            dtype=torch.float32,
        )  # fmt: skip
        before.append(loss_scale_state(engine))
        batches.extend(micro_batches)
        results.append(real_warm_up(engine, micro_batches, *count))
        after.append(loss_scale_state(engine))

    real_warm_up = loop.warm_up_engine
    monkeypatch.setattr(loop, "warm_up_engine", warm_up)
    trainer = built_trainer({**settings, "model.hidden_dropout": 0})
    trainer.close(0)
    assert before[0]["cur_scale"] == 65536 and after == before
    # The mean over the batch's targets, by torch's own cross-entropy; fp32 sums of 8 rows differ in the last digits.
    with torch.no_grad():
        logits = [trainer.engine.module(**{k: v for k, v in b.items() if k != "shift_labels"}).logits for b in batches]
    targets = torch.cat([batch["shift_labels"].flatten() for batch in batches])
    expected = torch.nn.functional.cross_entropy(torch.cat([x.flatten(0, 1) for x in logits]), targets)
    assert results[0].loss == pytest.approx(float(expected), rel=1e-5)
