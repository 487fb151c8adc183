"""The real run, for two steps: its data, model, DeepSpeed JSON and micro-batch, and one checkpoint.

Contract: `try_run` runs in a child of every rank (child.py). The run folder is a new one in run_root, which
the caller removes; no W&B, no validation, no samples. The learning rate is the configured peak from the first step on,
harder than the warm-up of the run itself. What it costs and where it fails comes back; nothing else is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import time
from datetime import timedelta
from pathlib import Path

import torch

from minillm.data.sources import TokenSource
from minillm.preflight.child import Report
from minillm.run_folder import RunFolder
from minillm.settings.resolve import Resolved, choose_model
from minillm.settings.run import RunConfig
from minillm.training.build import Data, build_loader, build_model_config, open_data
from minillm.training.engine import process_group
from minillm.training.loop import Trainer
from minillm.training.signals import StopRequest
from minillm.training.watch import Watch
from minillm.utils import distributed
from minillm.utils.determinism import deterministic_kernels
from minillm.utils.errors import UserError

STEPS = 2


class Stages(Watch):
    """The run's own watch; where a rank stands goes to the parent as well."""

    def __init__(self, report: Report, timeout: float):
        self._report = report
        super().__init__(timeout)

    def at(self, place: str) -> None:
        self._report.stage(place)
        super().at(place)


class Trial(Trainer):
    """A trainer that knows when it saved."""

    def save(self) -> None:
        self.save_started = time.time()
        super().save()
        self.save_returned = time.time()

    def draw(self) -> None:
        """No pictures of two steps."""


def trial_config(run: RunConfig, folder: str) -> RunConfig:
    """The run's configuration with its length, cadences, folder and trackers changed, and nothing that costs memory."""
    trial = run.model_copy(deep=True)
    trial.run_root, trial.run_name = folder, "trial"
    trial.train.max_steps, trial.train.num_epochs = STEPS, None
    trial.optim.lr_schedule, trial.optim.warmup_ratio = "constant", 0.0
    trial.validation.every = trial.samples.every = trial.checkpoint.every = 0
    trial.log.every, trial.log.wandb, trial.log.tensorboard = 1, "disabled", False
    trial.faults.on_non_finite, trial.faults.on_loss_spike = "stop", "ignore"
    return trial


def try_run(report: Report, run: dict, deepspeed_config: dict, folder: str, timeout: float) -> dict[str, object]:
    """Open the data, train STEPS steps, write one checkpoint and verify it.

    Args:
        run: RunConfig.model_dump().
        folder: an existing, empty folder of the run's disk.

    Returns:
        `seconds_a_step`, `tokens_per_s`, `losses`, `memory`, `checkpoint` of this rank.

    Raises:
        UserError: what a run would stop with.
    """
    config = RunConfig.model_validate(run)
    resolved = Resolved(config, deepspeed_config, choose_model(config), int(os.environ.get("WORLD_SIZE", 1)))
    report.stage("opening the data")
    data = open_data(resolved)
    report.note("data", describe_data(config, data))
    stop = StopRequest(launched=False)
    report.stage("joining the process group")
    with process_group(timedelta(seconds=timeout)), deterministic_kernels(config.train.deterministic):
        # The parent's limit ends a stage that hangs; the watch's own would only race it.
        with contextlib.closing(Stages(report, 10 * timeout)) as watch:
            found = _train(resolved, data, folder, watch, stop)
        report.stage("leaving the process group")
    return found


def _train(resolved: Resolved, data: Data, folder: str, watch: Watch, stop: StopRequest) -> dict[str, object]:
    config = build_model_config(resolved, data)
    trial = trial_config(resolved.run, folder)
    trainer = Trial(trial, Data(data.tokenizer, data.train, [], data.base), watch)
    try:
        trainer.build(resolved.deepspeed, config)
        trainer.run_to_end(stop)
    except BaseException:
        trainer.close(exit_code=1)
        raise
    trainer.close(0)
    found: dict[str, object] = {"memory": memory_used()}
    if distributed.rank() == 0:
        watch.at("verifying the checkpoint")
        found |= read_metrics(trial.folder.metrics)
        found["checkpoint"] = check_checkpoint(trial.folder, trainer.save_started, trainer.save_returned)
    return found


def describe_data(run: RunConfig, data: Data) -> dict[str, object]:
    """What is there, after batches from the beginning, the middle and the end of an epoch were read."""
    loader = build_loader(run, data.train, num_epochs=1)
    last = max(0, loader.num_steps - 1)
    try:
        bad = sum(loader.batch_at(step).num_bad_rows for step in sorted({0, last // 2, last}))
    finally:
        loader.close()
    if bad > run.data.max_bad_samples:
        raise UserError(
            f"{bad} unreadable sequences in three batches, data.max_bad_samples = {run.data.max_bad_samples}: repair "
            f"the shards (python -m data_tools.shards verify), or raise the limit"
        )
    steps = run.train.max_steps or math.ceil(run.train.num_epochs * loader.num_steps)
    return {
        "train": _describe_sources(data.train),
        "validation": _describe_sources(data.validation),
        "tokenizer": len(data.tokenizer),
        "epochs": steps / max(1, loader.num_steps),
        "bad_rows": bad,
    }


def _describe_sources(sources: list[TokenSource]) -> dict[str, dict[str, int]]:
    return {
        source.name: {"shards": len(source.shards), "documents": source.num_documents, "tokens": source.num_tokens}
        for source in sources
    }


def memory_used() -> dict[str, int]:
    """Peak bytes of this rank: on its GPU (with what the allocator reserved), and in host memory."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not torch.cuda.is_available():
        return {"host": host}
    device = distributed.default_device()
    total = torch.cuda.get_device_properties(device).total_memory
    return {
        "host": host,
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "total": total,
    }


def read_metrics(path: Path) -> dict[str, object]:
    """Loss and speed of the trial's steps; the speed is the last one's, after the first has warmed everything.

    Raises:
        UserError: a step is missing, or its loss is not finite.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "loss" in record]
    losses = [record["loss"] for record in records]
    if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses):
        raise UserError(f"losses of {STEPS} steps: {losses}; lower optim.learning_rate or optim.gradient_clipping")
    tokens = records[-1]["tokens"] - records[-2]["tokens"]
    speed = records[-1]["tokens_per_s"]
    return {"losses": losses, "tokens_per_s": speed, "seconds_a_step": tokens / speed, "mfu": records[-1].get("mfu")}


def check_checkpoint(folder: RunFolder, started: float, returned: float) -> dict[str, float]:
    """Size and seconds of the one checkpoint, every byte of it checked.

    Raises:
        UserError: it is missing or damaged.
    """
    found = folder.checkpoints()
    if not found:
        raise UserError(f"no checkpoint in {folder.path}: writing one left nothing; see the row `disk run_root`")
    if problems := found[0].problems("content"):
        raise UserError(f"the checkpoint just written is damaged ({problems[0]}): do not trust this disk; use another")
    size = sum(path.stat().st_size for path in found[0].path.iterdir() if path.is_file())
    # The manifest is written last, whether the step waited for the files or not.
    seconds = found[0].manifest.stat().st_mtime - started
    return {"bytes": size, "seconds": max(seconds, 0.0), "stall": returned - started}
