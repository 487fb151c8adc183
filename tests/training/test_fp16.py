"""fp16 with loss scaling: refused without a GPU; on one, it learns, overflows without losing a batch, and resumes.

And bf16, refused where only fp16 is fast.
"""

from __future__ import annotations

import json

import pytest
import torch

from minillm.training import loop
from minillm.utils.errors import UserError
from tests.support.in_process import resolved, train
from tests.support.launching import ROOT, checkpoint, losses, same_bits

FP16 = json.loads((ROOT / "ds_configs" / "zero2_fp16.json").read_text())
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 is for GPUs: DeepSpeed refuses it on a CPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused_before_anything_is_written(settings, tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU.*zero2.json"):
        loop.train(resolved(settings, FP16))
    assert not list(tmp_path.glob("r"))


def test_bf16_is_refused_on_a_card_that_emulates_it(settings, tmp_path, monkeypatch):
    """A T4 or V100 as torch describes it: sm_75, sm_70."""
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    unread = {**settings, "data.train": str(tmp_path / "none"), "data.validation": str(tmp_path / "none")}
    with pytest.raises(UserError, match="Tesla T4 has no bf16.*ds_configs/zero2_fp16.json"):
        loop.train(resolved(unread, bf16))
    assert asked == [torch.device("cuda", 0)] and not list(tmp_path.glob("r"))
    for allowed in (FP16, {"zero_optimization": {"stage": 1}}):  # these come as far as the data, which are not there
        with pytest.raises(UserError, match="none"):
            loop.train(resolved(unread, allowed))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("group")
def test_it_resumes_to_the_same_bits_with_its_scale(settings, tmp_path):
    # 2^24 overflows at once, so the first step is taken again at lower scales.
    overflowing = {**FP16, "fp16": {**FP16["fp16"], "initial_scale_power": 24}}
    common = {**settings, "optim.lr_schedule": "constant", "checkpoint.every": 4, "train.max_steps": 8}
    train({**common, "run_name": "straight"}, overflowing)
    train({**common, "run_name": "broken", "train.max_steps": 4}, overflowing)
    train({**common, "run_name": "broken"}, overflowing)
    found = losses(tmp_path / "straight")
    assert found[-1] < found[0] and losses(tmp_path / "broken") == found
    assert same_bits(checkpoint(tmp_path / "broken", 8), checkpoint(tmp_path / "straight", 8))
    saved = json.loads((tmp_path / "straight/checkpoints/step-000004/trainer_state.json").read_text())
    assert saved["loss_scale"]["cur_scale"] < 2.0**24
