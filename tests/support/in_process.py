"""A whole run inside this process: the same `train_in_group` the launch scripts end in.

In a test that is one rank; tests/support/ranks.py does it in each of several.
"""

from __future__ import annotations

from minillm.settings.deepspeed_json import resolve_deepspeed_config
from minillm.settings.run import RunConfig, load_run_config, raise_problems
from minillm.training.build import open_data, resolve_model_config
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


def resolve(run: RunConfig, deepspeed: dict | None) -> dict:
    """DeepSpeed's configuration for as many ranks as the process group has."""
    values = deepspeed or FP32_ZERO2
    resolved, problems = resolve_deepspeed_config(values, run, distributed.world_size(), "the test's JSON")
    raise_problems(problems, "of the test")
    return resolved


def train(settings: dict, deepspeed: dict | None = None, stage: str = "pretrain") -> int:
    """Train to the end; the exit code."""
    run = load(settings, stage)
    resolved = resolve(run, deepspeed)
    stop = StopRequest(launched=distributed.world_size() > 1)
    try:
        return train_in_group(run, resolved, open_data(run), stop)
    finally:
        stop.restore()


def built_trainer(settings: dict, deepspeed: dict | None = None) -> Trainer:
    """A trainer at the start of its loop."""
    run = load(settings)
    data = open_data(run)
    trainer = Trainer(run, data, Watch(run.faults.timeout))
    trainer.build(resolve(run, deepspeed), resolve_model_config(run, data))
    return trainer
