"""A whole run inside this process: the same `train_in_group` the launch scripts end in.

In a test that is one rank; tests/support/ranks.py does it in each of several.
"""

from __future__ import annotations

from minillm.settings.reading import load_run_config
from minillm.settings.resolve import Resolved, resolve_run
from minillm.settings.run import RunConfig, raise_problems
from minillm.training.build import build_model_config, open_data
from minillm.training.loop import Trainer, train_in_group
from minillm.training.signals import StopRequest
from minillm.training.watch import Watch
from minillm.utils import distributed
from tests.support.launching import ROOT, words

FP32_ZERO2 = {"zero_optimization": {"stage": 2}}


def load(settings: dict, stage: str = "pretrain") -> RunConfig:
    config = {"pretrain": "demo", "sft": "sft-demo"}[stage]
    run, problems = load_run_config(config, words(settings), stage=stage, configs_dir=ROOT / "launch" / "configs")
    raise_problems(problems, "of the test")
    return run


def resolved(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain") -> Resolved:
    """Both configurations for as many ranks as the process group has."""
    run, ranks = load(settings, stage), distributed.world_size()
    return resolve_run(run, deepspeed or FP32_ZERO2, ranks, json_name="the test's JSON", where="of the test")


def train(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain") -> int:
    """Train to the end; the exit code."""
    start, stop = resolved(settings, deepspeed, stage), StopRequest(launched=distributed.world_size() > 1)
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
