"""Where metrics go: metrics.jsonl always, experts.jsonl where there are experts, W&B and TensorBoard beside them.
Rank 0 only; one writer a run folder.

Contract: one JSON object a line, flushed. On resume the files are cut back to the checkpoint's step, so that the curves
have no doubles; W&B continues the same run id, with our own step as the axis.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from minillm.run_folder import RunFolder
from minillm.settings.run import RunConfig
from minillm.training.expert_load import scalars
from minillm.utils.errors import UserError
from minillm.utils.files import write_atomic
from minillm.utils.logging import say, warn


class Tracker:
    """Everything that is told a record."""

    def __init__(self, run: RunConfig, step: int):
        self._folder = run.folder
        cut_back(self._folder, step)
        self._files: dict[Path, TextIO] = {}  # each opened for its first record
        self._wandb = open_wandb(run)
        self._board = open_tensorboard(run, step)

    def log(self, step: int, record: dict[str, float], experts: dict[str, list] | None = None) -> None:
        """Add one record; a step's keys are merged by their readers, a later line wins.

        Args:
            experts: minillm.training.expert_load.experts_record of the step.
        """
        self._append(self._folder.metrics, {"step": step, **record})
        if experts is not None:
            self._append(self._folder.experts, {"step": step, **experts})
            record = record | scalars(experts)
        self._tell_wandb(lambda tracked: tracked.log({**record, "train_step": step}))
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, value, step)

    def _append(self, path: Path, record: dict[str, object]) -> None:
        try:
            if path not in self._files:
                self._files[path] = open(path, "a", encoding="utf-8")
            self._files[path].write(json.dumps(record, ensure_ascii=False) + "\n")
            self._files[path].flush()
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error}); mend that and run again") from error

    def sample(self, step: int, samples: list[dict[str, str]]) -> None:
        """Append generated texts to samples.jsonl."""
        for sample in samples:
            self._append(self._folder.samples, {"step": step, **sample})

    def close(self, exit_code: int = 0) -> None:
        """End the run in the trackers: `exit_code` other than 0 marks it as failed in W&B."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # every record was flushed, and a full disk has been reported
                file.close()
        self._tell_wandb(lambda tracked: tracked.finish(exit_code=exit_code))
        if self._board is not None:
            self._board.close()

    def _tell_wandb(self, action: Callable[[object], object]) -> None:
        """W&B runs in a process of its own, which a Ctrl-C at the terminal ends too: training goes on without it."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:  # of several libraries' own kinds
            problem = f"{type(error).__name__}: {error}"
            warn(f"W&B stopped ({problem}); metrics.jsonl goes on, and so does W&B at the next start")
            self._wandb = None


class NoTracker:
    """The other ranks'."""

    def log(self, step: int, record: dict[str, float], experts: dict[str, list] | None = None) -> None: ...

    def sample(self, step: int, samples: list[dict[str, str]]) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


def cut_back(folder: RunFolder, step: int) -> None:
    """Drop the records after `step` (and a line that a kill left half-written)."""
    for file in (folder.metrics, folder.experts, folder.samples):
        if not file.exists():
            continue
        # "\n" alone ends a record: texts of samples may hold the line ends that str.splitlines also knows.
        *lines, _ = file.read_bytes().split(b"\n")
        write_atomic(file, b"".join(line + b"\n" for line in lines if _step_of(line) <= step))


def _step_of(line: bytes) -> float:
    """A record's step; infinity for bytes that are none (a disk that was full)."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def wandb_mode(setting: str) -> str:
    """auto: online with a key, offline without one."""
    if setting != "auto":
        return setting
    try:
        has_key = bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        has_key = False
    return os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")


def open_wandb(run: RunConfig):
    """The run in W&B; the id lives in the run folder, so a resumed run is the same run."""
    mode = wandb_mode(run.log.wandb)
    if mode == "disabled":
        return None
    import wandb  # heavy, and not needed where W&B is off

    id_file = run.folder.wandb_id
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4))
    tracked = wandb.init(
        project=run.log.wandb_project,
        name=run.run_name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(run.run_dir),
        mode=mode,
        config=run.model_dump(),
        settings=wandb.Settings(silent=True, console="off"),
    )
    tracked.define_metric("train_step")
    tracked.define_metric("*", step_metric="train_step")
    say(f"W&B: {mode}, run {tracked.id}" + (f", {tracked.url}" if mode == "online" else ""))
    return tracked


def open_tensorboard(run: RunConfig, step: int):
    if not run.log.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("log.tensorboard=true needs the tensorboard package: pip install tensorboard") from error
    return SummaryWriter(run.folder.tensorboard, purge_step=step + 1)
