"""Schedules against torch's own schedulers and by hand; decay groups."""

from __future__ import annotations

import pytest
import torch

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.presets import PRESETS
from minillm.settings.run import OptimSection
from minillm.training.optim import build_parameter_groups, learning_rate_at

STEPS = 100


def rates(**settings) -> list[float]:
    optim = OptimSection(learning_rate=1.0, **settings)
    return [learning_rate_at(step, STEPS, optim) for step in range(STEPS)]


def test_cosine_equals_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    expected = []
    for _ in range(90):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(warmup_ratio=0.1)[10:] == pytest.approx(expected, abs=1e-12)


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(warmup_ratio=0.1)[:11] == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0])


def test_wsd_is_flat_and_then_linear():
    found = rates(warmup_ratio=0.1, lr_schedule="wsd", decay_ratio=0.2, min_learning_rate_ratio=0.0)
    assert found[10:81] == pytest.approx([1.0] * 71)
    assert found[80:] == pytest.approx([(STEPS - step) / 20 for step in range(80, STEPS)])


def test_constant_stays():
    assert rates(warmup_ratio=0, lr_schedule="constant") == [1.0] * STEPS


def test_decay_is_for_matrices_and_every_parameter_is_in_one_group():
    model = MiniLLMForCausalLM(MiniLLMConfig(**PRESETS["demo"]))
    groups = {g["name"]: g for g in build_parameter_groups(model, 0.1)}
    assert groups["decay"]["weight_decay"] == 0.1 and groups["no_decay"]["weight_decay"] == 0.0
    vectors = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert vectors and all("norm" in name for name in vectors)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(groups["no_decay"]["params"]) == len(vectors)
