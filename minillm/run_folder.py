"""The run folder: what lies where in it, its checkpoints, its one writer, and the settings that a start leaves in it.

Contract: stdlib and yaml only. Names inside a run folder are spelled here and nowhere else. Where one looks for a
checkpoint, the sizes of all its files are compared with its manifest, and the content of the small ones (config,
tokenizer, counters: what is read when one looks); the content of weights and moments is compared once, by who loads
them. A checkpoint that does not pass is never used: inside a run it is skipped with a warning that names the file, and
named directly it is an error.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from minillm.utils.errors import UserError
from minillm.utils.files import MANIFEST, file_lock, manifest_problems, read_json, write_atomic, write_json
from minillm.utils.logging import warn
from minillm.utils.places import home

Check = Literal["sizes", "content"]
SMALL = 16 << 20  # bytes of a file whose content is compared wherever one looks
EXPORT_RECORD = "minillm_export.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
COUNTERS, GENERATORS = "trainer_state.json", "rng.json"
RESUMABLE = (WEIGHTS, OPTIMIZER, COUNTERS, GENERATORS)  # without them nothing can go on from a checkpoint
_CHECKPOINTS, _CHECKPOINT = "checkpoints", re.compile(r"step-(\d+)")
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors", "webdataset", "wandb")


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint folder, step-000500 say; a Hugging Face folder too."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def optimizer(self) -> Path:
        return self.path / OPTIMIZER

    @property
    def counters(self) -> Path:
        return self.path / COUNTERS

    @property
    def generators(self) -> Path:
        return self.path / GENERATORS

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def problems(self, check: Check, needed: Sequence[str] = ()) -> list[str]:
        """What is wrong with it, one sentence each.

        Args:
            needed: files without which it is of no use.
        """
        if found := manifest_problems(self.path, None if check == "content" else SMALL, needed):
            return found
        step = read_json(self.manifest).get("step")
        return [] if step == self.step else [f"{self.manifest} is of step {step}, its folder is named otherwise"]


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME."""

    path: Path

    settings = property(lambda self: self.path / "run.yaml")
    deepspeed_config = property(lambda self: self.path / "ds_config.json")
    model_config = property(lambda self: self.path / "model_config.json")
    environment = property(lambda self: self.path / "env.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    experts = property(lambda self: self.path / "experts.jsonl")
    samples = property(lambda self: self.path / "samples.jsonl")
    events = property(lambda self: self.path / "events.jsonl")
    skipped_batches = property(lambda self: self.path / "skipped.json")
    threads = property(lambda self: self.path / "threads.json")
    loss_picture = property(lambda self: self.path / "plots" / "loss.png")
    experts_picture = property(lambda self: self.path / "plots" / "experts.png")
    wandb_id = property(lambda self: self.path / "wandb" / "run_id")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints_folder = property(lambda self: self.path / _CHECKPOINTS)

    def checkpoint(self, step: int) -> Checkpoint:
        """Where the checkpoint of a step is, or would be."""
        return Checkpoint(self.checkpoints_folder / f"step-{step:06d}")

    def checkpoints(self) -> list[Checkpoint]:
        """The finished ones, newest (highest step) first, damaged ones included; unfinished `.tmp` do not count."""
        found = [
            Checkpoint(path)
            for path in self.checkpoints_folder.glob("step-*")
            if _CHECKPOINT.fullmatch(path.name) and path.is_dir()
        ]
        return sorted(found, key=lambda one: one.step, reverse=True)

    def leftovers(self) -> list[Path]:
        """What killed writers left: checkpoints that were not finished, or only half deleted."""
        return [*self.checkpoints_folder.glob("step-*.tmp"), *self.checkpoints_folder.glob(".step-*.deleted")]

    def newest(self, check: Check = "sizes", needed: Sequence[str] = ()) -> Checkpoint | None:
        """The newest checkpoint without a problem; a warning names what is wrong with each newer one."""
        for checkpoint in self.checkpoints():
            problems = checkpoint.problems(check, needed)
            if not problems:
                return checkpoint
            warn(f"skipping the checkpoint {checkpoint.path}: {'; '.join(problems)}")
        return None

    def newest_to_resume(self, check: Check = "sizes") -> Checkpoint | None:
        """The checkpoint that the run goes on from; None before its first.

        Raises:
            UserError: it has checkpoints and none is whole: a fresh start would delete them.
        """
        found = self.newest(check, RESUMABLE)
        if found is None and self.checkpoints():
            raise UserError(
                f"every checkpoint of {self.path} is damaged (the warnings name the files); nothing was changed. Put "
                f"whole files back, or move {self.checkpoints_folder} away to start anew"
            )
        return found

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the folder's lock; a second run on the same folder is refused.

        Raises:
            UserError: another process trains in this folder.
        """
        path = self.path / ".lock"

        def refuse() -> None:
            owner = path.read_text().strip() or "another process"
            raise UserError(f"{self.path} is being written by {owner}; stop it, or give this run another run_name")

        with file_lock(path, busy=refuse, wait=False):
            path.write_text(f"process {os.getpid()} on {platform.node()}\n")
            for leftover in self.path.glob(".*.tmp"):  # of a writer that was killed (write_atomic)
                leftover.unlink()
            yield

    def recorded_settings(self) -> dict[str, Any] | None:
        """The run.yaml of an earlier start, None before the first.

        Raises:
            UserError: it is not what a start writes.
        """
        path = self.settings
        if not path.exists():
            return None
        fix = f"write it back (the settings this run was started with), or move {self.path} away"
        try:
            recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); {fix}") from error
        if not isinstance(recorded, dict) or not isinstance(recorded.get("model"), dict):
            raise UserError(f"{path} is damaged (there are no settings of a run in it); {fix}")
        return recorded

    def stage(self) -> str | None:
        """pretrain or sft; None where the folder does not say.

        Raises:
            UserError: its run.yaml is not YAML.
        """
        if not self.settings.is_file():
            return None
        try:
            values = yaml.safe_load(self.settings.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{self.settings} is not valid YAML: {error}") from error
        return values.get("stage") if isinstance(values, dict) else None

    def write_settings(self, run_yaml: str, deepspeed_config: dict, model_config: dict, world_size: int) -> None:
        """What this start was told and where it runs."""
        write_atomic(self.settings, run_yaml)
        write_json(self.deepspeed_config, deepspeed_config)
        write_json(self.model_config, model_config)
        write_json(self.environment, describe_environment(world_size))


# ---- models by what a user calls them


@dataclass(frozen=True)
class ModelFolder:
    """Where a model came from: `run`, `step` and `stage` (pretrain | sft) are None where the folder does not say."""

    path: Path
    run: str | None = None
    step: int | None = None
    stage: str | None = None


def resolve_model_folder(
    path: str | Path | None = None, run_root: str | Path = "runs", check: Check = "content"
) -> Path:
    """Find the Hugging Face folder that `path` means.

    Args:
        path: a folder (run, checkpoint, exported, any model folder), the name of a run under `run_root`, or None for
            the run with the newest checkpoint.
        check: "content" for who loads the weights now.

    Raises:
        UserError: nothing there, no whole checkpoint, or a named checkpoint is damaged.
    """
    root = Path(run_root)
    if path is None:
        return newest_run_checkpoint(root, check=check)
    for folder in (Path(path), root / path):
        if (folder / "config.json").is_file() or (folder / MANIFEST).is_file():
            return _checked_folder(folder, check)
        if RunFolder(folder).checkpoints_folder.is_dir():
            return _run_checkpoint(RunFolder(folder), check)
    if Path(path).is_dir():
        raise UserError(
            f"{path} is neither a model folder (no config.json) nor a run (no checkpoints/): name a run, a checkpoint "
            f"or an exported folder{_known_runs(root)}"
        )
    raise UserError(
        f"there is no run or folder {str(path)!r} (looked for ./{path} and {root / path}): name a run under {root}/ or "
        f"a model folder on this machine{_known_runs(root, str(path))}"
    )


def newest_run_checkpoint(root: Path, stage: str | None = None, check: Check = "content") -> Path:
    """The newest whole checkpoint of the newest run under `root` (of that `stage`, where one is named)."""
    for run in _runs_newest_first(root):
        if stage is not None and run.stage() != stage:
            continue
        if checkpoint := run.newest(check):
            return checkpoint.path
        warn(f"skipping the run {run.path}: it has no whole checkpoint")
    raise UserError(
        f"there is no {stage or 'trained'} run under {root}{os.sep} yet: train one (`python -m minillm pretrain`, in a "
        "checkout `bash launch/quickstart.sh`), or name a run or model folder"
    )


def describe_model_folder(folder: Path) -> ModelFolder:
    """What a resolved folder says about its origin: its place in a run, or the record an export left in it."""
    if (run := run_of_checkpoint(folder)) is not None:
        return ModelFolder(folder, run.path.name, Checkpoint(folder).step, run.stage())
    if (folder / EXPORT_RECORD).is_file():
        record = read_json(folder / EXPORT_RECORD)
        return ModelFolder(folder, record.get("run"), record.get("step"), record.get("stage"))
    return ModelFolder(folder)


def run_of_checkpoint(folder: Path) -> RunFolder | None:
    """The run that a checkpoint folder lies in."""
    parent = folder.absolute().parent
    inside = _CHECKPOINT.fullmatch(folder.name) and parent.name == _CHECKPOINTS
    return RunFolder(parent.parent) if inside else None


def check_content(folder: Path) -> None:
    """Compare every byte of a model folder with its manifest, where it has one: for who loads it next.

    Raises:
        UserError: the files that differ.
    """
    if (folder / MANIFEST).is_file() and (problems := manifest_problems(folder)):
        raise UserError(
            f"{folder} is damaged: {'; '.join(problems)}; move that folder away to start from an older checkpoint, or "
            f"name other weights"
        )


def _checked_folder(folder: Path, check: Check) -> Path:
    problems = []
    if (folder / MANIFEST).is_file():
        problems = manifest_problems(folder, None if check == "content" else SMALL)
    if problems:
        raise UserError(f"{folder} is damaged: {'; '.join(problems)}; name its run to use the newest whole checkpoint")
    return folder


def _run_checkpoint(run: RunFolder, check: Check) -> Path:
    if not run.checkpoints():
        raise UserError(f"the run {run.path} has no checkpoint yet: train it further, or name another run")
    checkpoint = run.newest(check)
    if checkpoint is None:
        raise UserError(f"every checkpoint of the run {run.path} is damaged (see the warnings): name another run")
    return checkpoint.path


def _runs_newest_first(root: Path) -> Iterator[RunFolder]:
    """Runs that have a checkpoint, by when their newest one was finished (the manifest is the last file written)."""

    def finished(run: RunFolder) -> tuple[float, str]:
        newest = run.checkpoints()[0]
        manifest = newest.manifest
        return ((manifest if manifest.exists() else newest.path).stat().st_mtime, run.path.name)

    if root.is_dir():
        runs = (RunFolder(path) for path in root.iterdir())
        yield from sorted((run for run in runs if run.checkpoints()), key=finished, reverse=True)


def _known_runs(root: Path, wanted: str = "") -> str:
    names = [run.path.name for run in _runs_newest_first(root)]
    if not names:
        return ""
    near = difflib.get_close_matches(Path(wanted).name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"; the runs with a checkpoint are {', '.join(names[:10])}{hint}"


def describe_environment(world_size: int = 1) -> dict[str, object]:
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
        "world_size": world_size,
        "command": [sys.executable, *sys.argv],
    }
