"""The run folder: one writer, settings on disk before anything is allocated, and what resume may not change."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from minillm.config import ModelSection, RunConfig, dump_run_config
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.files import file_lock, write_atomic, write_json
from minillm.utils.places import home

FIXED_KEYS = (
    "seed", "stage", "model.preset", "model.init_from", "data.train", "data.validation", "data.tokenizer",
    "data.seq_len", "data.packing", "data.stride", "train.train_batch_size", "optim.name",
)  # fmt: skip
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors", "webdataset", "wandb")


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; a second run on the same folder is refused.

    Raises:
        UserError: on every rank, another process trains in this folder, or it cannot be written.
    """
    path = run_dir / ".lock"

    def refuse() -> None:
        owner = path.read_text().strip() or "another process"
        raise UserError(f"{run_dir} is being written by {owner}; stop it, or give this run another run_name")

    with contextlib.ExitStack() as held:

        def take() -> None:
            held.enter_context(file_lock(path, busy=refuse, wait=False))
            path.write_text(f"process {os.getpid()} on {platform.node()}\n")
            for leftover in run_dir.glob(".*.tmp"):  # of a writer that was killed (write_atomic)
                leftover.unlink()

        distributed.on_rank_zero(take)
        yield


def recorded_run(run_dir: Path) -> dict[str, Any] | None:
    """The run.yaml of an earlier start, None before the first.

    Raises:
        UserError: it is not what a start writes.
    """
    path = run_dir / "run.yaml"
    if not path.exists():
        return None
    fix = f"write it back (the settings this run was started with), or move {run_dir} away"
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from error
    if not isinstance(recorded, dict) or not isinstance(recorded.get("model"), dict):
        raise UserError(f"{path} is damaged (there are no settings of a run in it); {fix}")
    return recorded


def check_resumable(run: RunConfig, recorded: dict[str, Any]) -> None:
    """What defines the curve may not change under one run name; ranks, ZeRO, micro-batch, steps and cadences may.

    Raises:
        UserError: every changed key with both values.
    """
    now = run.model_dump()
    if _get(recorded, "optim.name") is None:  # of a run that was started before there was a choice
        recorded = {**recorded, "optim": {**(recorded.get("optim") or {}), "name": "adamw"}}
    fixed = [*FIXED_KEYS, *(f"model.{name}" for name in {*(run.model.model_extra or {}), *_extra(recorded)})]
    changed = [
        f"{key}: was {old!r}, now {new!r}" for key in fixed if (old := _get(recorded, key)) != (new := _get(now, key))
    ]
    if changed:
        listed = "\n".join(f"  - {line}" for line in changed)
        raise UserError(
            f"{run.run_dir} was started with other settings that define the run:\n{listed}\n"
            f"Put them back to resume it, or choose another run_name"
        )


def _extra(recorded: dict[str, Any]) -> set[str]:
    return set(recorded["model"]) - set(ModelSection.model_fields)


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def write_settings(run: RunConfig, deepspeed_config: dict, model_fields: dict) -> None:
    """run.yaml, ds_config.json, model_config.json and env.json of this start (called on rank 0)."""
    write_atomic(run.run_dir / "run.yaml", dump_run_config(run))
    write_json(run.run_dir / "ds_config.json", deepspeed_config)
    write_json(run.run_dir / "model_config.json", model_fields)
    write_json(run.run_dir / "env.json", describe_environment())


def describe_environment() -> dict[str, object]:
    """Versions, commit, machine and command of this start."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    commit = None
    # An installed wheel may stand within somebody else's repository; a container may have no git.
    if (home() / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(home()), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "commit": commit,
        "host": platform.node(),
        "platform": platform.platform(),
        "world_size": distributed.world_size(),
        "command": [sys.executable, *sys.argv],
    }
