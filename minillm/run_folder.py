"""The run folder: its layout, its checkpoints, its one writer, and the settings that a start leaves in it.

Contract: stdlib and yaml only. A damaged checkpoint is never used: inside a run it is skipped with a warning that names
the file, and named directly it is an error.
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
from typing import Any

import yaml

from minillm.utils.errors import UserError
from minillm.utils.files import MANIFEST, file_lock, manifest_problems, read_json, write_atomic, write_json
from minillm.utils.logging import warn
from minillm.utils.places import home

EXPORT_RECORD = "minillm_export.json"
_CHECKPOINT_NAME = re.compile(r"step-(\d+)")
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors", "webdataset", "wandb")


@dataclass(frozen=True)
class ModelFolder:
    """Where a model came from: `run`, `step` and `stage` (pretrain | sft) are None where the folder does not say."""

    path: Path
    run: str | None = None
    step: int | None = None
    stage: str | None = None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The finished checkpoint folders of a run, newest (highest step) first; unfinished `.tmp` ones do not count."""
    found = [
        (int(match[1]), path)
        for path in (run_folder / "checkpoints").glob("step-*")
        if (match := _CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(run_folder: Path, needed: Sequence[str] = ()) -> Path | None:
    """The newest checkpoint whose manifest holds; a warning names what is wrong with each newer one.

    Args:
        needed: files without which it is of no use.
    """
    for path in list_checkpoints(run_folder):
        problems = manifest_problems(path, needed=needed) or _wrong_step(path)
        if not problems:
            return path
        warn(f"skipping the checkpoint {path}: {'; '.join(problems)}")
    return None


def _wrong_step(path: Path) -> list[str]:
    """A folder that was renamed, or holds the files of another."""
    step = read_json(path / MANIFEST).get("step")
    if step == int(_CHECKPOINT_NAME.fullmatch(path.name)[1]):
        return []
    return [f"{path / MANIFEST} is of step {step}, its folder is named otherwise"]


def resolve_model_folder(path: str | Path | None = None, run_root: str | Path = "runs") -> Path:
    """Find the Hugging Face folder that `path` means.

    Args:
        path: a folder (run, checkpoint, exported, any model folder), the name of a run under `run_root`, or None for
            the run with the newest checkpoint.

    Raises:
        UserError: nothing there, no whole checkpoint, or a named checkpoint is damaged.
    """
    root = Path(run_root)
    if path is None:
        return newest_run_checkpoint(root)
    for folder in (Path(path), root / path):
        if (folder / "config.json").is_file() or (folder / MANIFEST).is_file():
            return _checked_folder(folder)
        if (folder / "checkpoints").is_dir():
            return _run_checkpoint(folder)
    if Path(path).is_dir():
        raise UserError(
            f"{path} is neither a model folder (no config.json) nor a run (no checkpoints/): name a run, a checkpoint "
            f"or an exported folder{_known_runs(root)}"
        )
    raise UserError(
        f"there is no run or folder {str(path)!r} (looked for ./{path} and {root / path}): name a run under {root}/ or "
        f"a model folder on this machine{_known_runs(root, str(path))}"
    )


def describe_model_folder(folder: Path) -> ModelFolder:
    """What a resolved folder says about its origin: its place in a run, or the record an export left in it."""
    match = _CHECKPOINT_NAME.fullmatch(folder.name)
    run_folder = folder.absolute().parent.parent
    if match and folder.absolute().parent.name == "checkpoints":
        return ModelFolder(folder, run_folder.name, int(match[1]), _stage_of_run(run_folder))
    if (folder / EXPORT_RECORD).is_file():
        record = read_json(folder / EXPORT_RECORD)
        return ModelFolder(folder, record.get("run"), record.get("step"), record.get("stage"))
    return ModelFolder(folder)


def newest_run_checkpoint(root: Path, stage: str | None = None) -> Path:
    """The newest whole checkpoint of the newest run under `root` (of that `stage`, where one is named)."""
    for run_folder in _runs_newest_first(root):
        if stage is not None and _stage_of_run(run_folder) != stage:
            continue
        if checkpoint := newest_checkpoint(run_folder):
            return checkpoint
        warn(f"skipping the run {run_folder}: it has no whole checkpoint")
    raise UserError(
        f"there is no {stage or 'trained'} run under {root}{os.sep} yet: train one (`python -m minillm pretrain`, in a "
        "checkout `bash launch/quickstart.sh`), or name a run or model folder"
    )


def _checked_folder(folder: Path) -> Path:
    if (folder / MANIFEST).is_file() and (problems := manifest_problems(folder)):
        raise UserError(f"{folder} is damaged: {'; '.join(problems)}; name its run to use the newest whole checkpoint")
    return folder


def _run_checkpoint(run_folder: Path) -> Path:
    if not list_checkpoints(run_folder):
        raise UserError(f"the run {run_folder} has no checkpoint yet: train it further, or name another run")
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise UserError(f"every checkpoint of the run {run_folder} is damaged (see the warnings): name another run")
    return checkpoint


def _runs_newest_first(root: Path) -> Iterator[Path]:
    """Runs that have a checkpoint, by when their newest one was finished (the manifest is the last file written)."""

    def finished(run_folder: Path) -> tuple[float, str]:
        newest = list_checkpoints(run_folder)[0]
        manifest = newest / MANIFEST
        return ((manifest if manifest.exists() else newest).stat().st_mtime, run_folder.name)

    if root.is_dir():
        yield from sorted((path for path in root.iterdir() if list_checkpoints(path)), key=finished, reverse=True)


def _known_runs(root: Path, wanted: str = "") -> str:
    names = [path.name for path in _runs_newest_first(root)]
    if not names:
        return ""
    near = difflib.get_close_matches(Path(wanted).name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"; the runs with a checkpoint are {', '.join(names[:10])}{hint}"


def _stage_of_run(run_folder: Path) -> str | None:
    config = run_folder / "run.yaml"
    if not config.is_file():
        return None
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is not valid YAML: {error}") from error
    return values.get("stage") if isinstance(values, dict) else None


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run folder's lock; a second run on the same folder is refused.

    Raises:
        UserError: another process trains in this folder.
    """
    path = run_dir / ".lock"

    def refuse() -> None:
        owner = path.read_text().strip() or "another process"
        raise UserError(f"{run_dir} is being written by {owner}; stop it, or give this run another run_name")

    with file_lock(path, busy=refuse, wait=False):
        path.write_text(f"process {os.getpid()} on {platform.node()}\n")
        for leftover in run_dir.glob(".*.tmp"):  # of a writer that was killed (write_atomic)
            leftover.unlink()
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


def write_settings(run_dir: Path, run_yaml: str, deepspeed_config: dict, model_fields: dict, world_size: int) -> None:
    """run.yaml, ds_config.json, model_config.json and env.json of this start (called on rank 0)."""
    write_atomic(run_dir / "run.yaml", run_yaml)
    write_json(run_dir / "ds_config.json", deepspeed_config)
    write_json(run_dir / "model_config.json", model_fields)
    write_json(run_dir / "env.json", describe_environment(world_size))


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
