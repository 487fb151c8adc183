"""A whole run inside the test's process (one rank): the same `train_in_group` the launch scripts end in."""

from __future__ import annotations

from minillm.settings.resolve import Resolved, resolve_run
from minillm.settings.run import load_run_config, raise_problems
from minillm.training.build import build_model_config, open_data
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


def resolved(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain", ranks: int = 1) -> Resolved:
    run, where = load(settings, stage), "of the test"
    return resolve_run(run, deepspeed or FP32_ZERO2, ranks, json_name="the test's JSON", where=where)


def train(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain") -> int:
    start, stop = resolved(settings, deepspeed, stage), StopRequest(launched=False)
    try:
        return train_in_group(start, open_data(start), stop)
    finally:
        stop.restore()


def built_trainer(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain") -> Trainer:
    """A trainer at the start of its loop."""
    start = resolved(settings, deepspeed, stage)
    data = open_data(start)
    trainer = Trainer(start.run, data, Watch(start.run.faults.timeout))
    trainer.build(start.deepspeed, build_model_config(start, data))
    return trainer
