"""A whole run inside the test's process (one rank): the same `train_in_group` the launch scripts end in."""

from __future__ import annotations

from minillm.settings.deepspeed_json import resolve_deepspeed_config
from minillm.settings.run import load_run_config, raise_problems
from minillm.training.build import open_data
from minillm.training.loop import Trainer, train_in_group
from minillm.training.signals import StopRequest
from minillm.training.watch import Watch
from tests.support.launching import ROOT, words

FP32_ZERO2 = {"zero_optimization": {"stage": 2}}


def load(settings: dict, stage: str = "pretrain"):
    config = {"pretrain": "demo", "sft": "sft-demo"}[stage]
    run, problems = load_run_config(config, words(settings), stage=stage, configs_dir=ROOT / "launch" / "configs")
    raise_problems(problems, "of the test")
    return run


def train(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain") -> int:
    run = load(settings, stage)
    resolved, problems = resolve_deepspeed_config(deepspeed or FP32_ZERO2, run, 1, "the test's JSON")
    raise_problems(problems, "of the test")
    stop = StopRequest(launched=False)
    try:
        return train_in_group(run, resolved, open_data(run), stop)
    finally:
        stop.restore()


def built_trainer(settings: dict, deepspeed: dict | None = None) -> Trainer:
    """A trainer at the start of its loop."""
    from minillm.training.build import resolve_model_config

    run = load(settings)
    data = open_data(run)
    trainer = Trainer(run, data, Watch(run.faults.timeout))
    resolved, _ = resolve_deepspeed_config(deepspeed or FP32_ZERO2, run, 1, "the test's JSON")
    trainer.build(resolved, resolve_model_config(run, data))
    return trainer
